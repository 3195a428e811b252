"""The counters of a converged ksmd, in closed form.

Sources: mm/ksm.c (cmp_and_merge_page, stable_node_dup, try_to_merge_one_page), mm/migrate.c
(try_to_map_unused_to_zeropage, for huge pages that split), Documentation/admin-guide/mm/ksm.rst.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.model.order import simulate
from dedup.pages import FRAME_MASK, Flag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.pages import I64, U64, Bool, Groups, Pages

RMAP_ITEM_BYTES: Final = 64
STABLE_NODE_BYTES: Final = 64
"""Slab sizes of struct ksm_rmap_item and ksm_stable_node on 64-bit kernels."""

UNSTABLE: Final = Flag.VOLATILE | Flag.NEW

FIELDS: Final = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "ksm_zero_pages",
    "stable_node_chains",
    "stable_node_dups",
    "general_profit",
    "frames_freed",
    "saved_bytes",
    "thp_split",
)
PROCESS_FIELDS: Final = (
    "ksm_rmap_items",
    "ksm_zero_pages",
    "ksm_merging_pages",
    "ksm_process_profit",
)


@dataclass(frozen=True, slots=True)
class Rules:
    """The tunables that decide what merges."""

    max_page_sharing: int = 256
    use_zero_pages: bool = False
    order_known: bool = False
    """Whether ksmd comes by the processes in the order of `Pages.processes`."""


@dataclass(slots=True)
class Range:
    """A figure that may not be one number."""

    low: int = 0
    high: int = 0

    def add(self, low: int, high: int | None = None) -> None:
        """Add a number, or a range."""
        self.low += int(low)
        self.high += int(low if high is None else high)

    @property
    def value(self) -> int | None:
        """The number, None where it is a range."""
        return self.low if self.low == self.high else None


@dataclass(frozen=True, slots=True)
class ProcessPrediction:
    """ksm_stat of one process once ksmd has converged; pages, profit in bytes."""

    ksm_rmap_items: int | None
    ksm_zero_pages: int | None
    ksm_merging_pages: int | None
    ksm_process_profit: int | None
    bounds: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Where the frames freed come from: pages, adding up to about `frames_freed`.

    Mappings, where frame numbers are hidden.
    """

    zero_pages: int
    """All-zero pages, those given back by splits of huge pages included."""
    within_processes: int
    """Other copies of a content inside one process."""
    across_processes: int
    """Other copies of a content in different processes."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The kernel's counters once ksmd has converged, smart scan off.

    Pages, but `general_profit` and `saved_bytes` in bytes and `thp_split` in huge pages. None
    where the result is not one number; `bounds` then has the lowest and the highest.
    """

    pages_shared: int | None
    pages_sharing: int | None
    pages_unshared: int | None
    pages_volatile: int | None
    ksm_zero_pages: int | None
    stable_node_chains: int | None
    stable_node_dups: int | None
    general_profit: int | None
    frames_freed: int | None
    saved_bytes: int | None
    thp_split: int | None
    bounds: dict[str, tuple[int, int]]
    processes: list[ProcessPrediction]
    breakdown: Breakdown
    metadata_bytes: int
    """Memory of rmap_items and stable nodes."""


@dataclass(slots=True)
class _Copies:
    """The mappings of contents that are there twice or more, group after group."""

    index: I64
    group: I64
    groups: int
    word: U64
    frame: I64
    """Frame number; a number of its own for each mapping where it is hidden and exclusive."""
    process: I64
    thp: Bool
    ksm: Bool
    zero: Bool
    maybe_shared: Bool
    """Hidden and not exclusive: the same frame as another mapping, or not."""


def predict(
    pages: Pages, groups: Groups, rules: Rules, *, one_look: bool | None = None
) -> Prediction:
    """Predict the counters for the pages of a scan.

    Parameters
    ----------
    pages : Pages
        Marked by `dedup.grouping.group`.
    groups : Groups
        From the same call.
    rules : Rules
    one_look : bool, optional
        Whether volatile pages are unknown; by default, whether there was one look only.

    Returns
    -------
    Prediction
    """
    return _Model(pages, groups, rules).run(
        volatile_known=not (pages.looks < 2 if one_look is None else one_look)
    )


class _Model:
    def __init__(self, pages: Pages, groups: Groups, rules: Rules) -> None:
        self.pages, self.groups, self.rules = pages, groups, rules
        self.limit = rules.max_page_sharing
        n_processes = len(pages.processes)
        self.shared, self.sharing, self.unshared, self.volatile = (Range() for _ in range(4))
        self.zero, self.chains, self.dups, self.freed, self.split = (Range() for _ in range(5))
        self.gone_by_process = np.zeros(n_processes, np.int64)  # rmap_items that leave KSM
        self.zero_by_process = np.array([p.ksm_zero_pages for p in pages.processes], np.int64)
        self.merging = np.zeros((n_processes, 2), np.int64)  # low, high
        self.zero_saved = self.within_saved = self.across_saved = 0

    def run(self, *, volatile_known: bool) -> Prediction:
        pages = self.pages
        present = pages.present
        rmap_by_process = self._count_by_process(present)
        unstable = present & ((pages.frames & UNSTABLE) != 0)
        self.volatile.add(int(np.count_nonzero(unstable)))
        copies = self._copies()
        self._singles(present & ~unstable)
        if copies.groups:
            self._merge(copies)
        else:
            self._lone_zero()
        self.zero.add(int(self.zero_by_process.sum()))
        return self._result(rmap_by_process, volatile_known=volatile_known)

    # -- counting ------------------------------------------------------------------------------

    def _count_by_process(self, mask: Bool) -> I64:
        """How many pages of the mask each process has."""
        pages = self.pages
        total = np.zeros(len(pages.processes), np.int64)
        if not len(pages.run_first):
            return total
        order = np.argsort(pages.run_first, kind="stable")
        per_run = np.add.reduceat(mask, pages.run_first[order], dtype=np.int64)
        process = pages.process_of_region()[pages.run_region[order]]
        np.add.at(total, process, per_run)
        return total

    def _process_of(self, index: I64) -> I64:
        if not len(index):
            return np.empty(0, np.int64)
        return np.asarray(self.pages.process_of_region()[self.pages.region_of(index)])

    def _folio_of(self, index: I64, word: U64) -> I64:
        """A number for the huge page of each page; the same for all mappings of a huge page."""
        huge = self.pages.huge_pages
        frame = (word & FRAME_MASK).astype(np.int64)
        hidden = (word & Flag.HIDDEN) != 0
        folio = frame // huge
        if hidden.any():
            address = self.pages.address_of(index[hidden]) // (self.pages.page_size * huge)
            process = self._process_of(index[hidden])
            folio[hidden] = -1 - (address * len(self.pages.processes) + process)
        return folio

    def _copies(self) -> _Copies:
        index = self.groups.order
        sizes = np.diff(self.groups.offsets)
        word = self.pages.frames[index]
        frame = (word & FRAME_MASK).astype(np.int64)
        hidden = (word & Flag.HIDDEN) != 0
        # Below 0: never a frame number. Each hidden mapping counts as a frame of its own here.
        frame[hidden] = -1 - index[hidden]
        return _Copies(
            index=index,
            group=np.repeat(np.arange(len(sizes)), sizes),
            groups=len(sizes),
            word=word,
            frame=frame,
            process=self._process_of(index),
            thp=(word & Flag.THP) != 0,
            ksm=(word & Flag.KSM) != 0,
            zero=(word & Flag.ZERO) != 0,
            maybe_shared=hidden & ((word & Flag.EXCLUSIVE) == 0),
        )

    def _singles(self, stable: Bool) -> None:
        """Contents that are there once: unshared, or a KSM page that lost its partners."""
        single = stable & ((self.pages.frames & Flag.DUPLICATE) == 0)
        ksm = np.flatnonzero(single & ((self.pages.frames & Flag.KSM) != 0))
        self.unshared.add(int(np.count_nonzero(single)) - len(ksm))
        self.shared.add(len(ksm))
        np.add.at(self.merging, self._process_of(ksm), 1)

    # -- huge pages and zero pages -------------------------------------------------------------

    def _lone_zero(self) -> None:
        """Without duplicates only a single all-zero page can matter, with use_zero_pages."""
        if self.rules.use_zero_pages:
            index = self._single_zero()
            if len(index):
                thp = (self.pages.frames[index] & Flag.THP) != 0
                locked = (self.pages.frames[index] & Flag.LOCKED) != 0
                self.split.add(int(thp[0]))
                self._leave(index, to_zero_page=not (thp[0] and not locked[0]))
                self.unshared.add(-1)
                self.freed.add(1)
                self.zero_saved += 1

    def _single_zero(self) -> I64:
        word = self.pages.frames
        unstable = UNSTABLE | Flag.GONE | Flag.UNREAD | Flag.DUPLICATE | Flag.KSM
        return np.flatnonzero(((word & Flag.ZERO) != 0) & ((word & unstable) == 0))

    def _leave(self, index: I64, *, to_zero_page: bool) -> None:
        """Pages that leave KSM: by use_zero_pages (counted), or as a huge page splits."""
        process = self._process_of(index)
        np.add.at(self.gone_by_process, process, 1)
        if to_zero_page:
            np.add.at(self.zero_by_process, process, 1)

    def _merge(self, c: _Copies) -> None:
        n = np.bincount(c.group, minlength=c.groups)
        d = self._distinct(c.group, c.frame, c.groups)
        attempt = (d >= 2)[c.group] & ~c.ksm
        huge = c.thp & attempt & ~c.zero
        split = set(np.unique(self._folio_of(c.index[huge], c.word[huge])).tolist())
        keep = self._zero_content(c, split)
        self.split.add(len(split))
        if not keep.all():
            c = _take(c, keep)
            n = np.bincount(c.group, minlength=c.groups)
            d = self._distinct(c.group, c.frame, c.groups)
        self._contents(c, n, d)

    def _zero_content(self, c: _Copies, split: set[int]) -> Bool:
        """All-zero pages: what leaves KSM; adds to `split`; gives the copies that stay."""
        keep = np.ones(len(c.index), bool)
        zero = np.flatnonzero(c.zero & ~c.ksm)
        single = self._single_zero()
        index = np.concatenate((c.index[zero], single))
        if not len(index):
            return keep
        word = self.pages.frames[index]
        thp = (word & Flag.THP) != 0
        # A split remaps zero subpages to the shared zero page, but not in locked memory.
        vanishing = thp & ((word & Flag.LOCKED) == 0)
        folio = self._folio_of(index, word)
        existing = int(np.count_nonzero(c.zero & c.ksm))
        frames = np.concatenate((c.frame[zero], (word[len(zero) :] & FRAME_MASK).astype(np.int64)))
        touched = self._zero_attempts(index, folio, vanishing, frames, existing)
        for f in np.unique(folio[thp & touched]).tolist():
            split.add(f)
        gone = vanishing & np.isin(folio, np.fromiter(split, np.int64, len(split)))
        to_zero = ~gone if self.rules.use_zero_pages else np.zeros(len(index), bool)
        self._leave(index[gone], to_zero_page=False)
        self._leave(index[to_zero], to_zero_page=True)
        out = gone | to_zero
        freed = len(np.unique(frames[out]))
        self.freed.add(freed)
        self.zero_saved += freed
        keep[zero[out[: len(zero)]]] = False
        self.unshared.add(-int(np.count_nonzero(out[len(zero) :])))
        return keep

    def _zero_attempts(
        self, index: I64, folio: I64, vanishing: Bool, frames: I64, existing: int
    ) -> Bool:
        """Which zero pages take part in a merge attempt."""
        everyone = np.ones(len(index), bool)
        if self.rules.use_zero_pages:
            return everyone
        if len(np.unique(frames)) + min(existing, 1) < 2:
            return ~everyone
        if existing or not vanishing.all():
            return everyone
        # Zero pages inside huge pages alone: one scanned while another lies in the unstable tree
        # splits its own huge page; the first stays whole if it has a single zero page.
        first = folio[np.argmin(self.pages.scan_order(index))]
        if np.count_nonzero(folio == first) >= 2:
            return everyone
        return np.asarray(folio != first)

    # -- contents ------------------------------------------------------------------------------

    @staticmethod
    def _distinct(group: I64, frame: I64, groups: int) -> I64:
        """Distinct frames of each group."""
        if not len(group):
            return np.zeros(groups, np.int64)
        order = np.lexsort((frame, group))
        g, f = group[order], frame[order]
        fresh = np.ones(len(g), bool)
        fresh[1:] = (g[1:] != g[:-1]) | (f[1:] != f[:-1])
        return np.bincount(g[fresh], minlength=groups)

    def _contents(self, c: _Copies, n: I64, d: I64) -> None:
        """Add up all contents: the plain ones at once, the others one by one."""
        ksm = np.bincount(c.group, c.ksm, c.groups)
        has_ksm = ksm > 0
        unclear = np.bincount(c.group, c.maybe_shared, c.groups) > 0
        outside = np.bincount(c.group, (c.word & Flag.OUTSIDE) != 0, c.groups) > 0
        fork = d < n
        limit = self.limit
        there = n > 0
        plain = there & ~has_ksm & ~unclear & ~outside & (~fork | (n <= limit) | (d == 1))
        one_frame = plain & (d == 1)
        # One frame alone, shared by fork: one mapping in the unstable tree, the rest in neither.
        self.unshared.add(int(np.count_nonzero(one_frame)))
        self.volatile.add(int((n[one_frame] - 1).sum()))
        many = plain & (d >= 2)
        nodes, left = _closed_form(n, limit)
        nodes, left = np.where(many, nodes, 0), np.where(many, left, 0)
        self._add_nodes(nodes, n, left, many)
        freed = np.where(many, d - nodes - left, 0)
        self.freed.add(int(freed.sum()))
        self._add_merging(c, many, left)
        self._add_breakdown(c, many, freed)
        # Merged as far as it goes already: each frame is a node.
        merged = there & (ksm == n)
        self._add_nodes(d, n, np.zeros_like(n), merged)
        self._add_merging(c, merged, np.zeros_like(n))
        for g in np.flatnonzero(there & ~plain & ~merged).tolist():
            lo, hi = np.searchsorted(c.group, [g, g + 1])
            self._special(_take(c, slice(int(lo), int(hi))))

    def _add_nodes(self, nodes: I64, n: I64, left: I64, mask: Bool) -> None:
        self.shared.add(int(nodes[mask].sum()))
        self.sharing.add(int((n - nodes - left)[mask].sum()))
        self.unshared.add(int(left[mask].sum()))
        chained = mask & (nodes >= 2)
        self.chains.add(int(np.count_nonzero(chained)))
        self.dups.add(int(nodes[chained].sum()))

    def _add_merging(self, c: _Copies, merged: Bool, left: I64) -> None:
        """Mappings on stable nodes by process; the leftover is the last in scan order."""
        on = merged[c.group]
        for column in (0, 1):
            np.add.at(self.merging[:, column], c.process[on], 1)
        for g in np.flatnonzero(merged & (left > 0)).tolist():
            lo, hi = np.searchsorted(c.group, [g, g + 1])
            self._take_leftover(c.process[lo:hi])

    def _take_leftover(self, process: I64) -> None:
        involved = np.unique(process)
        if len(involved) == 1 or self.rules.order_known:
            self.merging[involved[-1]] -= 1
        else:
            self.merging[involved, 0] -= 1

    def _add_breakdown(self, c: _Copies, merged: Bool, freed: I64) -> None:
        zero_group = np.bincount(c.group, c.zero, c.groups) > 0
        self.zero_saved += int(freed[merged & zero_group].sum())
        rest = merged & ~zero_group
        on = rest[c.group]
        if not on.any():
            return
        # Distinct frames of each (content, process), less one: what it saves by itself.
        pair = c.group[on] * len(self.pages.processes) + c.process[on]
        _, packed = np.unique(pair, return_inverse=True)
        own = self._distinct(packed, c.frame[on], int(packed.max()) + 1)
        group_of = np.zeros(len(own), np.int64)
        group_of[packed] = c.group[on]
        within = np.bincount(group_of, own - 1, c.groups).astype(np.int64)
        within = np.minimum(within, freed)
        self.within_saved += int(within[rest].sum())
        self.across_saved += int((freed - within)[rest].sum())

    def _special(self, c: _Copies) -> None:
        """One content with KSM pages, hidden sharing, or forks beyond the limit."""
        if c.maybe_shared.any():
            self._hidden(c)
            return
        order = np.argsort(self.pages.scan_order(c.index))
        outcome = simulate(c.frame[order].tolist(), c.ksm[order].tolist(), self.limit)
        nodes, merged = outcome.nodes, np.array(outcome.merged)
        left = outcome.unshared
        self.shared.add(nodes)
        self.sharing.add(int(merged.sum()) - nodes)
        self.unshared.add(left)
        self.volatile.add(outcome.volatile)
        if nodes >= 2:
            self.chains.add(1)
            self.dups.add(nodes)
        out = np.flatnonzero(~merged)
        process = c.process[order]
        if len(out) and len(np.unique(process)) > 1 and nodes and not self.rules.order_known:
            for p in np.unique(process).tolist():
                mine = int(np.count_nonzero(process == p))
                self.merging[p] += (max(0, mine - len(out)), mine)
        else:
            np.add.at(self.merging, process[merged], 1)
        d = len(np.unique(c.frame))
        # Frames of mappings that stay out, and of the nodes, remain.
        remaining = len(set(c.frame[order][out].tolist())) + nodes if nodes else d
        freed = max(0, d - remaining)
        outside = len(np.unique(c.frame[(c.word & Flag.OUTSIDE) != 0]))
        low = max(0, freed - outside)
        high = max(low, freed - max(0, outside - nodes))
        self.freed.add(low, high)
        if c.zero[0]:
            self.zero_saved += low
        elif len(np.unique(process)) == 1:
            self.within_saved += low
        else:
            self.across_saved += low

    def _hidden(self, c: _Copies) -> None:
        """Frame numbers hidden: mappings that are not exclusive may share a frame, or be KSM's."""
        n = len(c.index)
        own = int(np.count_nonzero(~c.maybe_shared))
        # In one process two addresses have two frames, unless KSM merged them.
        shared = c.process[c.maybe_shared]
        maybe_ksm = any(self.pages.regions[r].ksm_bytes for r in self._regions_of(c))
        fewest = own + (1 if maybe_ksm else int(np.bincount(shared).max()))
        nodes, left = _closed_form_one(n, self.limit)
        surely = fewest >= 2
        # Unknown frames that others outside the scan map too may stay.
        self.freed.add(max(0, own - nodes - left) if surely else 0, max(0, n - nodes - left))
        merged_low = n - left if surely else 0
        exact = surely and n <= self.limit and not maybe_ksm
        if exact:
            self.shared.add(nodes)
            self.sharing.add(n - nodes - left)
            self.unshared.add(left)
        else:
            most_nodes = max(nodes, min(n // 2, nodes + 1)) if surely else nodes
            self.shared.add(nodes if surely else 0, most_nodes)
            self.sharing.add(max(0, n - most_nodes - 1) if surely else 0, n - 1)
            self.unshared.add(0, 1)
            self.volatile.add(0, 0 if surely else n - 1)
        if nodes >= 2:
            self.chains.add(1 if exact else 0, 1)
            self.dups.add(nodes if exact else 0, nodes + (0 if exact else 1))
        for p in np.unique(c.process).tolist():
            mine = int(np.count_nonzero(c.process == p))
            self.merging[p] += (mine if exact and not left else min(merged_low, mine - 1), mine)
        if c.zero[0]:
            self.zero_saved += n - nodes
        elif len(np.unique(c.process)) == 1:
            self.within_saved += n - nodes
        else:
            self.across_saved += n - nodes

    def _regions_of(self, c: _Copies) -> list[int]:
        return [int(r) for r in np.unique(self.pages.region_of(c.index[c.maybe_shared]))]

    # -- the result ----------------------------------------------------------------------------

    def _result(self, rmap_by_process: I64, *, volatile_known: bool) -> Prediction:
        page = self.pages.page_size
        rmap = rmap_by_process - self.gone_by_process
        rmap_total = int(rmap.sum())
        profit = Range()
        profit.add(
            (self.sharing.low + self.zero.low) * page - rmap_total * RMAP_ITEM_BYTES,
            (self.sharing.high + self.zero.high) * page - rmap_total * RMAP_ITEM_BYTES,
        )
        metadata_high = rmap_total * RMAP_ITEM_BYTES + self.shared.high * STABLE_NODE_BYTES
        metadata_low = rmap_total * RMAP_ITEM_BYTES + self.shared.low * STABLE_NODE_BYTES
        saved = Range()
        saved.add(self.freed.low * page - metadata_high, self.freed.high * page - metadata_low)
        ranges = {
            "pages_shared": self.shared,
            "pages_sharing": self.sharing,
            "pages_unshared": self.unshared,
            "pages_volatile": self.volatile,
            "ksm_zero_pages": self.zero,
            "stable_node_chains": self.chains,
            "stable_node_dups": self.dups,
            "general_profit": profit,
            "frames_freed": self.freed,
            "saved_bytes": saved,
            "thp_split": self.split,
        }
        values = {name: r.value for name, r in ranges.items()}
        bounds = {name: (r.low, r.high) for name, r in ranges.items() if r.value is None}
        if not self.pages.huge_known:
            # Whether a page belongs to a huge page is hidden too.
            values["thp_split"] = None
        if not volatile_known:
            values["pages_volatile"] = None
        return Prediction(
            **values,
            bounds=bounds,
            processes=self._processes(rmap),
            breakdown=Breakdown(self.zero_saved, self.within_saved, self.across_saved),
            metadata_bytes=metadata_high,
        )

    def _processes(self, rmap: I64) -> list[ProcessPrediction]:
        page = self.pages.page_size
        out = []
        for items, zero, (low, high) in zip(
            rmap.tolist(), self.zero_by_process.tolist(), self.merging.tolist(), strict=True
        ):
            profits = tuple((m + zero) * page - items * RMAP_ITEM_BYTES for m in (low, high))
            exact = low == high
            out.append(
                ProcessPrediction(
                    ksm_rmap_items=items,
                    ksm_zero_pages=zero,
                    ksm_merging_pages=low if exact else None,
                    ksm_process_profit=profits[0] if exact else None,
                    bounds={}
                    if exact
                    else {
                        "ksm_merging_pages": (low, high),
                        "ksm_process_profit": (profits[0], profits[1]),
                    },
                )
            )
        return out


def _take(c: _Copies, which: Bool | slice) -> _Copies:
    return _Copies(
        c.index[which],
        c.group[which],
        c.groups,
        c.word[which],
        c.frame[which],
        c.process[which],
        c.thp[which],
        c.ksm[which],
        c.zero[which],
        c.maybe_shared[which],
    )


def _closed_form(n: I64, limit: int) -> tuple[I64, I64]:
    """Nodes and leftover for n mappings of distinct frames: a lone last one finds no partner."""
    q, r = np.divmod(n, limit)
    left = np.where(r == 1, 1, 0)
    return np.asarray(q + (r > 1)), np.asarray(left)


def _closed_form_one(n: int, limit: int) -> tuple[int, int]:
    nodes, left = _closed_form(np.array([n]), limit)
    return int(nodes[0]), int(left[0])


def savings_alone(pages: Pages, groups: Groups, labels: Sequence[int]) -> I64:
    """Frames that each label's processes would free if they alone were mergeable.

    Parameters
    ----------
    pages, groups
        As for `predict`.
    labels : sequence of int
        Label of each process, 0 to the number of labels less one.

    Returns
    -------
    int64 array
        Frames by label, by the count of distinct contents (`max_page_sharing` aside).
    """
    label = np.asarray(labels, np.int64)
    total = np.zeros(int(label.max()) + 1 if len(label) else 0, np.int64)
    index = groups.order
    if not len(index):
        return total
    word = pages.frames[index]
    frame = (word & FRAME_MASK).astype(np.int64)
    hidden = (word & Flag.HIDDEN) != 0
    frame[hidden] = -1 - index[hidden]
    group = np.repeat(np.arange(len(groups.offsets) - 1), np.diff(groups.offsets))
    mine = label[pages.process_of_region()[pages.region_of(index)]]
    order = np.lexsort((frame, group, mine))
    m, g, f = mine[order], group[order], frame[order]
    new_pair = np.ones(len(m), bool)
    new_pair[1:] = (m[1:] != m[:-1]) | (g[1:] != g[:-1])
    new_frame = new_pair.copy()
    new_frame[1:] |= f[1:] != f[:-1]
    np.add.at(total, m[new_frame], 1)
    np.add.at(total, m[new_pair], -1)
    return total
