"""Which ranges of memory pay: those that bring the savings without the pages that bring none.

Every page in a mergeable range has an rmap_item of 64 bytes, and ksmd looks at it in each full scan
for as long as it is mapped. So a page that merges with nothing costs, and a range pays where what
it frees outweighs all its pages. Which set of ranges is best is exact arithmetic: along the
addresses, each window adds what it brings, and each range begun costs a mapping of its own.

Sources: mm/ksm.c (struct ksm_rmap_item, scan_get_next_rmap_item), Documentation/admin-guide/mm/
ksm.rst ("KSM efficiency"), Documentation/admin-guide/sysctl/vm.rst (max_map_count).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.model.prediction import RMAP_ITEM_BYTES
from dedup.pages import FRAME_MASK, Flag

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from dedup.model.cost import Costs
    from dedup.pages import I64, Bool, Groups, Pages

    F64 = NDArray[np.float64]

WORTH_VISITS: Final = 16
"""A freed page is worth ksmd's looking at so many pages in vain in each full scan."""
RANGE_BYTES: Final = 1024
"""Of the kernel's memory for the mappings that a range is cut from, and of our time."""
WINDOW_BYTES: Final = 64 << 10
"""Ranges are chosen in windows of so much, then cut to the pages that merge."""
MAPPINGS_OF_RANGE: Final = 2
"""A range inside a mapping makes three of one."""
ROUNDS: Final = 8
_ENOUGH: Final = 0.95
_LESS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Choice:
    """Ranges, and what they bring beside the whole."""

    ranges: dict[int, list[tuple[int, int]]]
    """By index of the process: first address and the one behind the last, ascending."""
    freed_frames: float
    """About what merging in the ranges frees."""
    followed: int
    """Pages that ksmd follows then."""
    whole_freed_frames: float
    whole_followed: int

    @property
    def pays(self) -> bool:
        """Whether the ranges bring nearly all that the whole brings, for at most half of it."""
        return (
            self.freed_frames >= _ENOUGH * self.whole_freed_frames
            and self.followed <= _LESS * self.whole_followed
        )


def choose(
    pages: Pages,
    groups: Groups,
    free: Bool,
    *,
    max_page_sharing: int,
    costs: Costs | None,
    mappings_left: Mapping[int, int],
) -> Choice:
    """Choose the ranges that pay.

    Parameters
    ----------
    pages, groups
        As for `dedup.model.merge.predict`.
    free : array of bool, shape (len(pages.regions),)
        Regions from which ranges may be chosen. Pages of all others are mergeable already.
    max_page_sharing : int
    costs : Costs, optional
        Of this host; without them every look of ksmd at a page counts the same.
    mappings_left : mapping of int to int
        By index of the process: mappings that it may have more (vm.max_map_count).

    Returns
    -------
    Choice
    """
    runs = _Runs(pages, free)
    value = _values(pages, groups, np.ones(len(pages.hashes), np.bool_), max_page_sharing)
    whole = float(value[runs.index].sum()), len(runs.index)
    kept = np.zeros(0, np.int64)
    ranges: dict[int, list[tuple[int, int]]] = {}
    cost = _costs(value > 0, pages.page_size, costs)
    net = value * pages.page_size - cost
    for _ in range(ROUNDS):
        ranges, now = runs.best(net, value, mappings_left)
        done, kept = len(now) == len(kept), now
        if done:
            break
        # A copy outside merges with nothing: its content is worth less inside.
        inside = np.ones(len(pages.hashes), np.bool_)
        inside[runs.index] = False
        inside[kept] = True
        value = _values(pages, groups, inside, max_page_sharing)
        net = value * pages.page_size - _costs(value > 0, pages.page_size, costs)
    return Choice(ranges, float(value[kept].sum()), len(kept), *whole)


def _values(pages: Pages, groups: Groups, inside: Bool, max_page_sharing: int) -> F64:
    """Frames that each page's merging frees: those of its content, in equal parts."""
    value = np.zeros(len(pages.hashes))
    if not len(groups.order):
        return value
    index, starts = groups.order, groups.offsets[:-1]
    taking = inside[index]
    frame = pages.frames[index] & FRAME_MASK
    group = np.repeat(np.arange(len(starts)), np.diff(groups.offsets))
    # Frames counted once: shared by fork, or merged already.
    order = np.lexsort((frame, ~taking, group))
    first = np.ones(len(order), np.bool_)
    first[1:] = (frame[order][1:] != frame[order][:-1]) | (group[order][1:] != group[order][:-1])
    if not pages.frames_known:
        first[:] = True
    distinct = np.add.reduceat((first & taking[order]).astype(np.int64), starts)
    mappings = np.add.reduceat(taking.astype(np.int64), starts)
    nodes = -(-mappings // max_page_sharing)
    freed = np.maximum(0, distinct - nodes)
    share = np.divide(freed, mappings, out=np.zeros(len(starts)), where=mappings > 0)
    value[index] = np.where(taking, share[group], 0.0)
    return value


def _costs(merges: Bool, page_size: int, costs: Costs | None) -> F64:
    """Bytes that following each page is worth."""
    in_vain = page_size / WORTH_VISITS
    merged = in_vain
    if costs is not None and costs.tree_ns > 0:
        merged *= min(1.0, (costs.merged_ns + costs.merged_node_ns) / costs.tree_ns)
    return np.where(merges, merged, in_vain) + RMAP_ITEM_BYTES


class _Runs:
    """The pages to choose from, by address, in windows."""

    def __init__(self, pages: Pages, free: Bool) -> None:
        self.pages = pages
        rows = np.flatnonzero(free[pages.run_region]) if len(pages.run_region) else pages.run_region
        count = pages.run_count[rows]
        total = int(count.sum())
        ends = np.cumsum(count)
        offset = np.arange(total) - np.repeat(ends - count, count)
        index = np.repeat(pages.run_first[rows], count) + offset
        address = np.repeat(pages.run_start[rows], count) + offset * pages.page_size
        region = np.repeat(pages.run_region[rows], count)
        here = pages.present[index]
        self.index: I64 = index[here]
        self.address: I64 = address[here]
        self.region: I64 = region[here]
        window = self.address // WINDOW_BYTES
        new = np.ones(len(self.index), np.bool_)
        new[1:] = (window[1:] != window[:-1]) | (self.region[1:] != self.region[:-1])
        self.starts: I64 = np.flatnonzero(new)
        self.process: I64 = pages.process_of_region()[self.region[self.starts]]

    def best(
        self, net: F64, value: F64, mappings_left: Mapping[int, int]
    ) -> tuple[dict[int, list[tuple[int, int]]], I64]:
        """The ranges of most worth, and the pages in them."""
        ranges: dict[int, list[tuple[int, int]]] = {}
        taken = [np.zeros(0, np.int64)]
        if not len(self.index):
            return ranges, taken[0]
        windows = np.add.reduceat(net[self.index], self.starts)
        region = self.region[self.starts]
        for process in np.unique(self.process).tolist():
            rows = np.flatnonzero(self.process == process)
            left = mappings_left.get(process, 0) // MAPPINGS_OF_RANGE
            segments = _at_most(left, windows[rows], region[rows])
            cut = [self._cut(int(rows[low]), int(rows[high]), value) for low, high in segments]
            found = _joined([piece for piece in cut if piece is not None])
            if not found:
                continue
            ranges[process] = found
            # Within a process the addresses ascend.
            low, high = self.starts[rows[0]], self._end(int(rows[-1]))
            edges = low + np.searchsorted(self.address[low:high], np.array(found))
            taken += [self.index[start:stop] for start, stop in edges.tolist()]
        return ranges, np.concatenate(taken)

    def _end(self, window: int) -> int:
        return int(self.starts[window + 1]) if window + 1 < len(self.starts) else len(self.index)

    def _cut(self, low: int, high: int, value: F64) -> tuple[int, int] | None:
        """Windows `low` to `high`, less the pages at both ends that don't merge."""
        size = self.pages.page_size
        begin = int(self.starts[low])
        merging = np.flatnonzero(value[self.index[begin : self._end(high)]] > 0)
        if not len(merging):
            return None
        first, last = begin + int(merging[0]), begin + int(merging[-1])
        start, stop = int(self.address[first]), int(self.address[last]) + size
        region = self.pages.regions[int(self.region[first])]
        huge = self.pages.huge_pages * size
        # A range that ends within a huge page would have it mapped by small pages.
        if self._is_huge(first):
            start = max(region.start, start // huge * huge)
        if self._is_huge(last):
            stop = min(region.end, -(-stop // huge) * huge)
        return start, stop

    def _is_huge(self, at: int) -> bool:
        return bool(self.pages.frames[self.index[at]] & Flag.THP)


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges, those that overlap as one."""
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def _at_most(number: int, net: F64, region: I64) -> list[tuple[int, int]]:
    """Segments of large worth, so many at the most: a dearer range makes fewer of them."""
    price = float(RANGE_BYTES)
    best: list[tuple[int, int]] = []

    def worth(segment: tuple[int, int]) -> float:
        return float(net[segment[0] : segment[1] + 1].sum())

    while len(segments := _segments(net, region, price)) > number:
        best = sorted(sorted(segments, key=worth)[len(segments) - number :])
        price *= 2
    return max(best, segments, key=lambda found: sum(map(worth, found)))


def _segments(net: F64, region: I64, price: float) -> list[tuple[int, int]]:
    """The sets of neighbouring windows with the largest sum, each set at a price.

    By dynamic programming: outside or inside of a segment, the better way to be there.
    """
    outside, inside = 0.0, -np.inf
    began: list[bool] = []
    ended: list[bool] = []
    previous = -1
    for worth, where in zip(net.tolist(), region.tolist(), strict=True):
        if where != previous:
            inside, previous = -np.inf, where
        fresh = outside - price
        began.append(fresh > inside)
        inside = max(fresh, inside) + worth
        ended.append(inside > outside)
        outside = max(outside, inside)
    found = []
    at = len(began) - 1
    while at >= 0:
        if not ended[at]:
            at -= 1
            continue
        high = at
        while not began[at]:
            at -= 1
        found.append((at, high))
        at -= 1
    return found[::-1]
