"""How the mappings of one content end, once ksmd has converged: exact, or in bounds.

Sources: mm/ksm.c (cmp_and_merge_page, stable_node_dup, try_to_merge_two_pages), mm/rmap.c
(page_address_in_vma). Where the order of scanning decides and is not known, where frame numbers
are hidden, or where huge pages make ksmd come back a scan later, the outcome is a range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dedup.model.order import simulate

if TYPE_CHECKING:
    from dedup.pages import I64, Bool

Span = tuple[int, int]
"""The lowest and the highest value."""


@dataclass(slots=True)
class Members:
    """The mappings of one content."""

    frame: I64
    """Frame number; where it is hidden, a number of its own for each mapping."""
    process: I64
    rank: I64
    """Place in the order of scanning."""
    ksm: Bool
    """On a KSM page already."""
    thp: Bool
    folio: I64
    """The huge page, where `thp`."""
    maybe_shared: Bool
    """Frame hidden and not exclusive: the same as another's, or not."""
    maybe_ksm: Bool
    """Frame hidden, in a region with KSM pages."""
    outside: Bool
    """The frame is mapped outside the scan too."""

    def __len__(self) -> int:
        return len(self.frame)


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a content's mappings."""

    nodes: Span
    """Stable nodes."""
    out: Span
    """Mappings on no stable node."""
    unshared: Span
    """Of these, in the unstable tree."""
    freed: Span
    """Frames given back."""
    stays: Bool
    """Mappings that may be among `out`."""
    one_frame: bool = True
    """Those on no node share one frame."""

    @property
    def exact(self) -> bool:
        """Whether it is known of each mapping whether it is on a node."""
        return self.out == (int(self.stays.sum()),) * 2

    @property
    def volatile(self) -> Span:
        """Mappings neither on a node nor in the tree."""
        return max(0, self.out[0] - self.unshared[1]), max(0, self.out[1] - self.unshared[0])

    def sharing(self, mappings: int) -> Span:
        """pages_sharing of `mappings` in all."""
        low = mappings - self.out[1] - self.nodes[1]
        high = mappings - self.out[0] - max(1, self.nodes[0])
        return max(0, low), max(0, high)


def closed_form(n: I64, limit: int) -> tuple[I64, I64]:
    """Nodes and leftover for n mappings of distinct frames: a lone last one finds no partner."""
    q, r = np.divmod(n, limit)
    left = np.where(r == 1, 1, 0)
    return np.asarray(q + (r > 1)), np.asarray(left)


def _closed_form(n: int, limit: int) -> Span:
    nodes, left = closed_form(np.array([n]), limit)
    return int(nodes[0]), int(left[0])


def _most_nodes(n: int, limit: int) -> int:
    """Nodes that n mappings can make at the most: each but the last one is full."""
    return (n - 2) // limit + 1 if n >= 2 else 0


def _least_nodes(n: int, limit: int, copies: int) -> int:
    """Nodes that take n mappings at the least: forks of a node's frame go beyond the limit."""
    return -(-max(0, n) // (limit + copies - 1))


def _most_in_one_process(process: I64) -> int:
    return int(np.bincount(process).max()) if len(process) else 0


def room(m: Members, limit: int) -> int:
    """Mappings that the nodes there already take by merging."""
    _, lengths = np.unique(m.frame[m.ksm], return_counts=True)
    return int(np.maximum(0, limit - lengths).sum())


def known(
    m: Members, limit: int, *, order_known: bool, delayed: bool = False, spoils: bool = False
) -> Fate:
    """The fate of a content whose frames are known.

    Parameters
    ----------
    m : Members
    limit : int
        `max_page_sharing`.
    order_known : bool
        Whether `rank` is the order of scanning between processes too.
    delayed : bool
        Whether ksmd may have to leave any mapping for a later scan (see `poisoned`).
    spoils : bool
        Whether merges of two pages may fail half way, so that what shares a frame by fork never
        merges (see `poisoned`).
    """
    new = ~m.ksm
    nodes = len(np.unique(m.frame[m.ksm]))
    free = room(m, limit)
    frames, copies = np.unique(m.frame[new], return_counts=True)
    n, d = int(new.sum()), len(frames)
    nobody = np.zeros(len(m), bool)
    order_known = order_known or len(np.unique(m.process)) <= 1
    if n <= free:
        return Fate((nodes, nodes), (0, 0), (0, 0), (d, d), nobody)
    if d == n:
        more, left = _closed_form(n - free, limit)
        stays = _last(m, new, order_known=order_known, delayed=delayed) if left else nobody
        freed = d - more - left
        return Fate((nodes + more,) * 2, (left, left), (left, left), (freed, freed), stays)
    if d == 1:
        # One frame, shared by fork: what finds room on a node joins, nothing else merges.
        out = n - free
        stays = new if delayed or not order_known else new & (m.rank >= np.sort(m.rank[new])[free])
        return Fate((nodes, nodes), (out, out), (1, 1), (0, 0), stays)
    if not nodes and n <= limit:
        return Fate((1, 1), (0, 0), (0, 0), (d - 1, d - 1), nobody)
    if spoils:
        # What finds room on a node joins in the end; only pairs are at risk.
        surely = min(n, free if nodes else limit)
        at_risk = int(copies[copies > 1].sum())
        least = max(nodes, 1)
        return Fate(
            (least, nodes + min(d, _most_nodes(n - free, limit))),
            (0, n - surely),
            (0, 1),
            (-at_risk, d + nodes - least),
            new,
            one_frame=False,
        )
    if order_known and not delayed and not _twins(m).any():
        order = np.argsort(m.rank)
        end = simulate(m.frame[order].tolist(), m.ksm[order].tolist(), limit)
        stays = nobody.copy()
        stays[order] = ~np.array(end.merged)
        out = int(stays.sum())
        freed = d + nodes - end.nodes - min(1, out)
        return Fate((end.nodes,) * 2, (out, out), (end.unshared,) * 2, (freed, freed), stays)
    return _overflow(nodes, free, n, d, d, int(copies.max()), limit, new)


def of_frames(n: int, frames: int, most: int, limit: int) -> Fate:
    """The fate of a content with no KSM pages, whose frames have several mappings, by numbers.

    As `known` has it where the order is not known. `Fate.stays` is of no mapping where all merge,
    else of all of them.

    Parameters
    ----------
    n : int
        Mappings; more than `frames`.
    frames : int
    most : int
        Mappings of one frame, at the most.
    limit : int
        `max_page_sharing`.
    """
    all_of_them = np.broadcast_to(np.True_, n)
    if frames == 1:
        return Fate((0, 0), (n, n), (1, 1), (0, 0), all_of_them)
    if n <= limit:
        return Fate((1, 1), (0, 0), (0, 0), (frames - 1, frames - 1), np.empty(0, np.bool_))
    return _overflow(0, 0, n, frames, frames, most, limit, all_of_them)


def _overflow(
    nodes: int, free: int, n: int, least: int, most: int, copies: int, limit: int, new: Bool
) -> Fate:
    """More mappings than the limit, some of them of one frame, in an order not known.

    Once nothing changes any more, all that are left over share a frame: two different ones would
    have merged. So they are `copies` at the most. A new node appears when no other has room.
    """
    low = nodes + _least_nodes(n - copies - free, limit, copies)
    high = nodes + min(most, _most_nodes(n - free, limit))
    return Fate(
        (low, high),
        (0, copies),
        (0, 1),
        (max(0, least + nodes - high - 1), most + nodes - low),
        new,
    )


def _twins(m: Members) -> Bool:
    """Mappings in a huge page that holds the content twice or more.

    ksmd holds both pages then, can't split the huge page, and comes back in the next scan.
    """
    twins = np.zeros(len(m), bool)
    inside = np.flatnonzero(m.thp)
    if len(inside):
        frames, where = np.unique(m.frame[inside], return_index=True)
        folios, count = np.unique(m.folio[inside][where], return_counts=True)
        twins[inside] = np.isin(m.folio[inside], folios[count >= 2])
        del frames
    return twins


def _last(m: Members, new: Bool, *, order_known: bool, delayed: bool) -> Bool:
    """Which mappings may be the one left over: the last in the order, or one left for later."""
    if delayed:
        return new
    stays = _twins(m) & new
    for p in [None] if order_known else np.unique(m.process[new]).tolist():
        mine = np.flatnonzero(new if p is None else new & (m.process == p))
        stays[mine[np.argmax(m.rank[mine])]] = True
    return stays


def poisoned(
    m: Members, fate: Fate, limit: int, *, order_known: bool, delayed: bool = False
) -> Fate:
    """All-zero pages beside all-zero pages of huge pages: widen the fate by what may go wrong.

    When one in a huge page lies in the unstable tree and another page is merged with it, the
    huge page splits, its zero pages go to the shared zero page, and the merge fails half way:
    the other gets a new frame, and its old one stays marked as a KSM page without a node. Whoever
    else maps that frame, by fork, can never merge again.
    """
    new = ~m.ksm
    n = int(new.sum())
    frames, copies = np.unique(m.frame[new], return_counts=True)
    hidden = bool(m.maybe_shared.any())
    if not hidden and (not len(copies) or copies.max() == 1) and not m.outside.any():
        return fate
    if not hidden and len(frames) == 1:
        return replace(fate, freed=(fate.freed[0] - 1, fate.freed[1]))
    if hidden:
        others = max(0, len(np.unique(m.process[m.maybe_shared])) - 1)
        stays = m.maybe_shared
        first_is_safe = False
    else:
        at = np.flatnonzero(new)
        order_known = order_known or len(np.unique(m.process)) <= 1
        firsts = [
            int(mine[np.argmin(m.rank[mine])])
            for p in ([None] if order_known else np.unique(m.process[at]).tolist())
            for mine in [at if p is None else at[m.process[at] == p]]
        ]
        risky = frames[(np.isin(frames, m.frame[firsts]) | delayed) & (copies > 1)]
        first_is_safe = not len(risky)
        others = int(copies[np.isin(frames, risky)].max()) - 1 if len(risky) else 0
        stays = new & np.isin(m.frame, risky)
        if order_known and not delayed:
            stays[firsts] = False
    merged_already = bool(m.ksm.any() or m.maybe_ksm.any())
    if not merged_already and n <= limit and fate.nodes[0] == 1:
        if first_is_safe and not m.outside.any():
            return fate
        return replace(fate, out=(0, others), freed=(fate.freed[0] - 1, fate.freed[1]), stays=stays)
    # A frame that can't merge may lie first in the unstable tree and block all others; each
    # frame that is tried in vain may go the same way.
    at_risk = int(m.maybe_shared.sum()) if hidden else int((copies > 1).sum())
    at_risk += int((m.outside & new).sum())
    if merged_already:
        surely = min(room(m, limit), n) if not m.maybe_ksm.any() else 0
        nodes = fate.nodes[0] if not m.maybe_ksm.any() else min(fate.nodes[0], 1)
        nodes = min(nodes, len(np.unique(m.frame[m.ksm]))) if not m.maybe_ksm.any() else nodes
    else:
        most = others if hidden else int(copies.max()) - 1
        surely = min(limit, n - most) if fate.nodes[0] else 0
        nodes = min(1, fate.nodes[0])
    return Fate(
        (nodes, max(fate.nodes[1], nodes + _most_nodes(n, limit))),
        (0, n - surely),
        (0, 1),
        (-at_risk, fate.freed[1] + max(0, fate.nodes[0] - nodes)),
        new,
        one_frame=False,
    )


def hidden(m: Members, limit: int, *, order_known: bool, delayed: bool = False) -> Fate:
    """The fate of a content whose frame numbers are hidden."""
    n = len(m)
    everyone, nobody = np.ones(n, bool), np.zeros(n, bool)
    shared = int(m.maybe_shared.sum())
    own = n - shared
    sharers = len(np.unique(m.process[m.maybe_shared]))
    # In one process, two addresses have two frames, unless KSM merged them.
    least = own + _most_in_one_process(m.process[m.maybe_shared])
    if m.maybe_ksm.any():
        surely = least >= 2
        return Fate(
            (int(surely), n), (0, n - surely), (0, 1), (0, n - 1), everyone, one_frame=False
        )
    if sharers < 2:
        nodes, left = _closed_form(n, limit)
        order_known = order_known or len(np.unique(m.process)) <= 1
        stays = _last(m, everyone, order_known=order_known, delayed=delayed) if left else nobody
        # A frame that others outside the scan map too is not given back.
        freed = max(0, own - nodes - left), n - nodes - left
        return Fate((nodes, nodes), (left, left), (left, left), freed, stays)
    if least >= 2 and n <= limit:
        return Fate((1, 1), (0, 0), (0, 0), (max(0, own - 1), n - 1), nobody)
    if least >= 2:
        return _overflow(0, 0, n, own, n, sharers, limit, everyone)
    return Fate((0, _most_nodes(n, limit)), (0, n), (0, 1), (0, n - 1), everyone, one_frame=False)


def spread(m: Members, limit: int, nodes: int) -> Fate:
    """The fate of a content whose frames are hidden, on so many NUMA nodes that merge apart."""
    n = len(m)
    # A KSM page may have one mapping left.
    most = n if m.maybe_ksm.any() else min(n // 2, _most_nodes(n, limit) + nodes - 1)
    return Fate(
        (0, most),
        (0, n),
        (0, min(n, nodes)),
        (0, n - 1),
        np.ones(n, bool),
        one_frame=False,
    )
