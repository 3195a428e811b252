"""What pinned pages may change: how far each figure can be from what it is without pins.

A pinned page has references besides its mappings (io_uring's buffers, RDMA, devices given to a
guest), so it never merges. If ksmd comes by it first, it lies in the unstable tree and blocks all
other copies of its content; otherwise it only stays out itself. The kernel tells how much a
process has pinned (VmPin), never which pages. Long-term pins take pages that are a process's own
(mm/gup.c, gup_must_unshare), and a fork copies them (mm/memory.c, copy_present_page): so only
exclusive pages that are no KSM pages can be pinned. A pin in a huge page keeps all of it.

Sources: mm/ksm.c, write_protect_page(), stable_tree_search(), try_to_merge_two_pages().
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dedup.model.copies import joined
from dedup.pages import Flag

if TYPE_CHECKING:
    from dedup.model.copies import Copies
    from dedup.model.given import Given
    from dedup.model.huge import HugePages
    from dedup.model.totals import Totals
    from dedup.pages import I64, Bool, Pages

Change = tuple[int, int]
"""By how much a figure may be lower, and by how much higher."""


@dataclass(slots=True)
class _Pinnable:
    """The mappings of contents with two or more, content after content."""

    group: I64
    groups: int
    frame: I64
    process: I64
    ksm: Bool
    unclear: Bool
    """Sharing by fork, or by KSM, is hidden."""
    thp: Bool
    folio: I64
    """The huge page of each, where `thp`."""
    candidate: Bool
    """It may be pinned."""


@dataclass(slots=True)
class Widening:
    """By how much each figure may be off."""

    shared: Change
    sharing: Change
    unshared: Change
    volatile: Change
    chains: Change
    dups: Change
    freed: Change
    merging: list[Change] = field(default_factory=list)
    """By process."""
    safe: I64 = field(default_factory=lambda: np.empty(0, np.int64))
    """Huge pages that split unless they are pinned themselves."""


def widen(given: Given, totals: Totals, huge: HugePages, zeros: Copies) -> None:
    """Widen all figures by what pinned pages may change.

    Parameters
    ----------
    given : Given
    totals : Totals
        All pages added up, as if none were pinned.
    huge : HugePages
    zeros : Copies
        All-zero pages, as `zero.ZeroPages.find` gave them.
    """
    pages, order = given.pages, given.groups.order
    sizes = np.diff(given.groups.offsets)
    group = np.repeat(np.arange(len(sizes)), sizes)
    some = (pages.frames[order] & Flag.ZERO) == 0
    c = given.copies(order[some], group[some], len(sizes))
    vanishing = zeros.thp & ((zeros.word & Flag.LOCKED) == 0)
    if not given.rules.use_zero_pages and not vanishing.any():
        c = joined(c, zeros)
    folio = huge.folio_of(c)
    w = _how_far(
        _Pinnable(
            c.group, c.groups, c.frame, c.process, c.ksm, c.maybe_shared | c.maybe_ksm,
            c.thp, folio, _may_be_pinned(pages, c),
        ),
        given.pinned, given.limit, pages.huge_pages, len(pages.processes),
    )  # fmt: skip
    totals.widen(w)
    huge.safe = set(w.safe.tolist())
    huge.may_split |= set(folio[c.thp].tolist())
    if given.rules.use_zero_pages:
        _widen_placed(given, totals, huge, zeros)


def _widen_placed(given: Given, totals: Totals, huge: HugePages, zeros: Copies) -> None:
    """use_zero_pages: a pinned zero page stays where it is."""
    may = _may_be_pinned(given.pages, zeros)
    if not may.any():
        return
    folio = huge.folio_of(zeros) if zeros.thp.any() else zeros.frame
    most = given.pinned * (given.pages.huge_pages if zeros.thp.any() else 1)
    mine = np.minimum(zeros.count(may), most)
    n = min(int(may.sum()), most)
    totals.zero.low -= n
    totals.gone.low -= n
    totals.zero_by_process[:, 0] -= mine
    totals.gone_by_process[:, 0] -= mine
    for low in (totals.zero_by_process, totals.gone_by_process):
        np.maximum(low[:, 0], 0, out=low[:, 0])
    totals.unshared.high += min(n, zeros.groups)
    totals.volatile.high += n
    totals.freed.low -= n
    assert huge.safe is not None
    huge.safe |= set(folio[zeros.thp & ~zeros.ksm].tolist())


def _may_be_pinned(pages: Pages, c: Copies) -> Bool:
    has = np.array([p.pinned_bytes > 0 for p in pages.processes])
    return np.asarray(((c.word & Flag.EXCLUSIVE) != 0) & ~c.ksm & has[c.process])


def _how_far(c: _Pinnable, pins: int, limit: int, huge_pages: int, processes: int) -> Widening:
    """How far figures may be from those without pins.

    Parameters
    ----------
    c : Copies
    pins : int
        Pages pinned at the most.
    limit : int
        `max_page_sharing`.
    huge_pages : int
        Pages in a huge page.
    processes : int
    """
    new = ~c.ksm

    def count(mask: Bool) -> I64:
        return np.bincount(c.group[mask], minlength=c.groups).astype(np.int64)

    n, merged = count(new), count(c.ksm)
    frames, copies = _frames(c, new)
    d, forked = frames, copies
    nodes, room = _nodes(c, limit)
    unclear = count(c.unclear) > 0
    room = np.where(unclear, 0, room)
    may = count(c.candidate) > 0
    beyond = np.maximum(0, n - room)
    most = nodes + np.minimum(np.where(beyond >= 2, (beyond - 2) // limit + 1, 0), d)
    odd = unclear | ((d < n) & (n + merged > limit))
    # The first pin of a content blocks what finds no room on a merged page.
    joins = np.minimum(room, np.maximum(0, n - 1))
    blocked = n - joins
    first = (nodes == 0).astype(np.int64)
    top = _Top(c, pins, may)
    # Each further pin keeps itself out where others find room.
    alone = int(np.count_nonzero(c.candidate & (room > 0)[c.group]))
    alone = min(alone, pins * (huge_pages if (c.thp & c.candidate).any() else 1))
    left = odd | ((beyond % limit) == 1)
    fewer = np.where(odd, n - d, 0)
    result = Widening(
        shared=(top(most - nodes), top(np.where(odd, most - nodes, 0))),
        sharing=(top(blocked - first) + alone, top(fewer + odd)),
        unshared=(top(left.astype(np.int64)), top(may.astype(np.int64))),
        volatile=(top(fewer), top(blocked) + alone),
        chains=(top((most >= 2).astype(np.int64)), top((odd & (most >= 2)).astype(np.int64))),
        dups=(
            top(np.where(most >= 2, most, 0)),
            top(np.where(odd & (most >= 2), most, 0)),
        ),
        # A merge that fails half way gives a page that is shared by fork a new frame.
        freed=(top(d - first + forked) + alone, top(np.where(odd, most, 0))),
    )
    for p in range(processes):
        mine = count(new & (c.process == p))
        down = min(top(np.minimum(mine, blocked)) + alone, int(mine[may].sum()))
        up = top(np.where(left, np.minimum(mine, 1 + fewer), 0))
        result.merging.append((down, up))
    result.safe = np.unique(c.folio[c.thp & ~may[c.group]])
    return result


class _Top:
    """The greatest sum that so many pins can make, of a value for each content.

    A pin takes a content, or, in a huge page, all contents in it that it may be pinned with.
    """

    def __init__(self, c: _Pinnable, pins: int, may: Bool) -> None:
        self.pins, self.may = pins, may
        small = c.candidate & ~c.thp
        self.small = np.unique(c.group[small])
        huge = np.flatnonzero(c.candidate & c.thp)
        if len(huge):
            pairs = np.unique(np.stack((c.folio[huge], c.group[huge])), axis=1)
            _, self.folio = np.unique(pairs[0], return_inverse=True)
            self.inside = pairs[1]
        else:
            self.folio = self.inside = np.empty(0, np.int64)

    def __call__(self, value: I64) -> int:
        values = value[self.small]
        if len(self.folio):
            sums = np.bincount(self.folio, value[self.inside]).astype(np.int64)
            values = np.concatenate((values, sums))
        if len(values) > self.pins:
            values = np.partition(values, -self.pins)[-self.pins :]
        return int(min(values.sum(), value[self.may].sum()))


def _frames(c: _Pinnable, new: Bool) -> tuple[I64, I64]:
    """Distinct frames of each content, and how many of them have several mappings."""
    if not new.any():
        nothing = np.zeros(c.groups, np.int64)
        return nothing, nothing
    pairs, times = np.unique(np.stack((c.group[new], c.frame[new])), axis=1, return_counts=True)
    shared = times > 1
    return (
        np.bincount(pairs[0], minlength=c.groups).astype(np.int64),
        np.bincount(pairs[0], shared, c.groups).astype(np.int64)
        + np.bincount(c.group, c.unclear, c.groups).astype(np.int64),
    )


def _nodes(c: _Pinnable, limit: int) -> tuple[I64, I64]:
    """Stable nodes of each content, and the mappings that they take by merging."""
    if not c.ksm.any():
        nothing = np.zeros(c.groups, np.int64)
        return nothing, nothing
    pairs, length = np.unique(
        np.stack((c.group[c.ksm], c.frame[c.ksm])), axis=1, return_counts=True
    )
    room = np.maximum(0, limit - length)
    return (
        np.bincount(pairs[0], minlength=c.groups).astype(np.int64),
        np.bincount(pairs[0], room, c.groups).astype(np.int64),
    )
