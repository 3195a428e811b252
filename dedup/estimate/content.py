"""The kernel's counters once ksmd has converged, from a sample of the contents.

A content is in the sample by its hash, with all its copies, so that what becomes of it is exact.
Each is there with the same chance q, apart from the others: a sum over the contents of the sample,
divided by q, is right on average. What only the number of pages decides comes from counting them,
so that contents with many copies make no sum uncertain. A content with very many copies still
counts more than once, by its stable nodes: those that a pilot found are counted, each page of
them, and not in the sample by their hash. All-zero pages are one of them.

Of pages whose content is not in the sample, some are kept by their frame. They tell how many change
and how many frames fork shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup import grouping
from dedup.estimate.sampled import SLACK, Estimate, Present, distinct, nodes_of, told
from dedup.estimate.unseen import Span
from dedup.model import merge, steady
from dedup.model.copies import NOT_STABLE
from dedup.model.fate import closed_form
from dedup.model.prediction import RMAP_ITEM_BYTES, STABLE_NODE_BYTES, Breakdown
from dedup.pages import FRAME_MASK, Flag

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from dedup.model.prediction import Rules
    from dedup.pages import I64, U64, Bool, Groups, Pages, Process

    Mark = Callable[[Pages, Groups], None]

PARTS: Final = 24
"""Of the sample, by hash: how they differ tells how far off their sum may be."""
STUDENT: Final = 2.40
"""Quantile 0.9875 of Student's distribution with `PARTS` - 1 degrees of freedom."""
Z: Final = NormalDist().inv_cdf(0.9875)
"""Each part of a figure is within its range in 97.5 of 100 scans, so that two of them are in 95."""

PILOT_TIMES: Final = 8
"""A content that a pilot met so often is counted."""
IN_SAMPLE: Final = 0
BY_FRAME: Final = 1
COUNTED: Final = 2
"""Why a page was kept: its content, its frame, or its frame where its content is counted; then
the number of the content is added. All-zero pages are number 0."""
COUNTED_MOST: Final = (1 << 16) - COUNTED

OF_PAIRS: Final = {"pages_sharing": 1, "frames_freed": 1, "not_unshared": 2}
"""Figures that grow with the copies of a content: their squares, of its pairs at the most."""
MASS: Final = ("pages_shared", "pages_volatile", "stable_node_chains",
               "stable_node_dups")  # fmt: skip
PAIRS: Final = {"pages_sharing": "not_sharing", "frames_freed": "stay",
                "pages_unshared": "not_unshared"}  # fmt: skip
"""Figures, and what is left of all pages, or frames, without them. Their sum is known better than
either: the one that is estimated with less doubt gives the other."""


@dataclass(frozen=True, slots=True)
class Stock:
    """What the first look kept.

    Parameters
    ----------
    kind : uint16 array
        Of each page, why it was kept.
    counted : int64 array
        Pages of each counted content; all-zero pages first.
    present : Present
        All pages.
    frames : Span
        Distinct frames under them.
    distinct_frames : int
        Of pages kept.
    rate : float
        Chance of a content to be in the sample.
    frame_rate : float
        Chance of another page to be kept.
    pairs : float
        See `Pilot`.
    """

    kind: NDArray[np.uint16]
    counted: I64
    present: Present
    frames: Span
    distinct_frames: int
    rate: float
    frame_rate: float
    pairs: float


@dataclass(frozen=True, slots=True)
class Pilot:
    """What a small sample of the frames tells before.

    Parameters
    ----------
    counted : uint64 array
        Hashes of contents to count: all-zero pages, and what is there often.
    pairs : float
        Of the other contents, pairs of copies (each twice), at the most. A sum over contents that
        grows with their copies may be off by its root: few of them in the sample can't show it.
    """

    counted: U64
    pairs: float

    @classmethod
    def of(cls, hashes: U64, zero: int, rate: float) -> Pilot:
        """From the hashes of frames, each of which was met with the chance `rate`.

        Parameters
        ----------
        hashes : uint64 array
        zero : int
            Hash of an all-zero page.
        rate : float
        """
        found, times = np.unique(hashes, return_counts=True)
        some = (times >= PILOT_TIMES) & (found != np.uint64(zero))
        order = np.argsort(-times[some], kind="stable")[: COUNTED_MOST - 1]
        counted = np.append(np.uint64(zero), found[some][order])
        met = times[~np.isin(found, counted)].astype(np.float64)
        pairs = met * (met - 1)
        wide = Z * math.sqrt(float((pairs**2).sum())) + 2 * Z * Z
        return cls(counted, (float(pairs.sum()) + wide) / rate**2)


def scaled(sampled: float, rate: float, *, square: float | None = None) -> Span:
    """The whole of which so much was sampled, each with the chance `rate`.

    The limits are those of a binomial number, by its score, with a correction for whole numbers.

    Parameters
    ----------
    sampled : float
    rate : float
    square : float, optional
        Sum of squares, where what was sampled counts more than once each; `sampled` is the sum.
    """
    if rate >= 1:
        return Span.of(sampled)
    rest, point = 1 - rate, sampled / rate
    z = Z

    def limit(x: float, sign: int) -> float:
        root = math.sqrt(z * z * rest * rest + 4 * x * rest)
        return (2 * x + z * z * rest + sign * z * root) / (2 * rate)

    low = limit(sampled - 0.5, -1) if sampled >= 1 else 0.0
    high = limit(sampled + 0.5, 1)
    if square is not None and square > sampled > 0:
        wide = z * math.sqrt(square * rest) / rate
        # The largest that was seen tells what an unseen one may be.
        low = min(low, point - wide)
        high = max(high, point + wide + square / sampled / rate)
    return Span(max(float(sampled), low), point, high)


def narrower(a: Span, b: Span) -> Span:
    """Of two estimates of a figure the one with less doubt."""
    return a if a.high - a.low <= b.high - b.low else b


def take_stock(
    pages: Pages,
    chosen: Bool,
    hashes: U64,
    counted: I64,
    present: Present,
    rate: float,
    frame_rate: float,
    pairs: float,
) -> Stock:
    """Note what the first look kept, before later ones write over it.

    Parameters
    ----------
    pages : Pages
    chosen : bool array
        Pages kept by their content.
    hashes, counted : arrays
        Of the counted contents, and the pages of each; all-zero pages first.
    present : Present
    rate, frame_rate, pairs : float
    """
    order = np.argsort(hashes)
    at = np.minimum(np.searchsorted(hashes[order], pages.hashes), len(hashes) - 1)
    which = order[at]
    is_counted = hashes[which] == pages.hashes
    kind = np.where(is_counted, COUNTED + which, BY_FRAME).astype(np.uint16)
    # What could not be read is kept, whatever it holds.
    kind[chosen | ((pages.frames & Flag.UNREAD) != 0)] = IN_SAMPLE
    inside = kind == IN_SAMPLE
    mine, others = distinct(pages, inside), distinct(pages, ~inside)
    known = present.exclusive if pages.frames_known else present.pages
    frames = Span.of(float(known))
    if known < present.pages:
        alone = Flag.EXCLUSIVE | Flag.HIDDEN
        shared_in, shared_out = (len(f) - int(f.of(alone).sum()) for f in (mine, others))
        shared = Span.of(float(shared_in)) + scaled(shared_out, frame_rate)
        frames += shared.at_most(present.pages - known)
    return Stock(kind, counted, present, frames, len(mine) + len(others), rate, frame_rate, pairs)


@dataclass(slots=True)
class _Sum:
    """A figure over the contents of the sample, part by part: its lowest and its highest."""

    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    squares: float = 0.0
    """Of what each content counts, added up, where that is known from its copies alone."""

    def add(self, low: float, high: float) -> None:
        self.low.append(low)
        self.high.append(high)

    def whole(self, rate: float, square: float = 0.0) -> Span:
        """Of all contents, the squares of which add up to `square` at the most, if it is known."""
        low, high = (self._scaled(parts, rate, square) for parts in (self.low, self.high))
        return Span(low.low, (low.point + high.point) / 2, high.high)

    def _scaled(self, parts: list[float], rate: float, square: float) -> Span:
        total = max(0.0, sum(parts))
        spread = float(np.var(parts, ddof=1)) * len(parts)
        # As if each content that counts had the same weight, one that spreads them as they are.
        spread = max(spread * (STUDENT / Z) ** 2, self.squares)
        weight = max(1.0, spread / total) if total else 1.0
        found = scaled(total / weight, rate).times(weight)
        wide = Z * math.sqrt(square * (1 - rate) / rate)
        return Span(
            max(total, min(found.low, found.point - wide)),
            found.point,
            max(found.high, found.point + wide),
        )


def estimate(
    pages: Pages,
    stock: Stock,
    present: Present,
    by_process: I64,
    rules: Rules,
    mark: Mark | None = None,
    mappings_of: Callable[[I64], I64] | None = None,
) -> Estimate:
    """Estimate the counters.

    Parameters
    ----------
    pages : Pages
        What was kept, after the last look.
    stock : Stock
        Of the first look.
    present : Present
        All pages at the last look.
    by_process : int64 array
        The same by process.
    rules : Rules
    mark : callable, optional
        Marks pages whose frames are mapped outside the scan too.
    mappings_of : callable, optional
        Mappings of frames on the whole host, by their numbers; None where they are hidden.
    """
    return _Estimator(pages, stock, present, rules, mark).run(by_process, mappings_of)


class _Estimator:
    def __init__(
        self, pages: Pages, stock: Stock, present: Present, rules: Rules, mark: Mark | None
    ) -> None:
        self.pages, self.stock, self.present, self.rules = pages, stock, present, rules
        self.mark = mark
        self.limit = rules.max_page_sharing
        self.inside = stock.kind == IN_SAMPLE
        self.stable = (pages.frames & NOT_STABLE) == 0
        self.still = pages.looks == 1
        """One look: nothing is known to change."""
        self.sums = {name: _Sum() for name in (*MASS, *PAIRS, *PAIRS.values())}
        self.within = self.across = 0
        self.contents = 0
        self.split: set[int] = set()

    # -- contents of the sample ----------------------------------------------------------------

    def _add_parts(self) -> None:
        """What the model says of each part of the sample."""
        pages = self.pages
        index = np.flatnonzero(self.inside & self.stable)
        part = (pages.hashes[index] % np.uint64(PARTS)).astype(np.uint8)
        index = index[np.argsort(part, kind="stable")]
        ends = np.cumsum(np.bincount(part, minlength=PARTS))
        del part
        order = np.argsort(pages.run_first, kind="stable")
        first = pages.run_first[order]
        processes = [replace(p, ksm_zero_pages=0) for p in pages.processes]
        begin = 0
        for end in ends.tolist():
            some = index[begin:end]
            run = order[np.searchsorted(first, some, side="right") - 1]
            self._add(self._view(some, run, processes))
            begin = end

    def _view(self, index: I64, run: I64, processes: list[Process]) -> Pages:
        """Some of the pages, each a run."""
        pages = self.pages
        at = np.lexsort((index, run))
        index, run = index[at], run[at]
        return replace(
            pages,
            hashes=pages.hashes[index],
            frames=pages.frames[index],
            run_start=pages.run_start[run] + (index - pages.run_first[run]) * pages.page_size,
            run_count=np.ones(len(index), np.int64),
            run_first=np.arange(len(index)),
            run_region=pages.run_region[run],
            processes=processes,
            looks=2,
        )

    def _add(self, part: Pages) -> None:
        groups = grouping.group(part)
        self.contents += groups.considered - len(groups.order) + len(groups.offsets) - 1
        if self.mark is not None:
            self.mark(part, groups)
        found = merge.predict(part, groups, self.rules)
        for name in MASS:
            self.sums[name].add(*steady.span(found, name))
        n, frames = len(part.frames), len(distinct(part, np.ones(len(part.frames), np.bool_)))
        for name, rest in PAIRS.items():
            low, high = steady.span(found, name)
            whole = frames if name == "frames_freed" else n
            self.sums[name].add(low, high)
            self.sums[rest].add(whole - high, whole - low)
        nodes = closed_form(np.diff(groups.offsets), self.limit)[0].astype(np.float64)
        self.sums["pages_shared"].squares += float((nodes**2).sum())
        self.sums["stable_node_dups"].squares += float((nodes[nodes > 1] ** 2).sum())
        self.within += found.breakdown.within_processes
        self.across += found.breakdown.across_processes
        huge = Flag.THP | Flag.DUPLICATE | Flag.EXCLUSIVE
        self._add_split((part.frames & huge) == huge, part.frames)

    def _add_split(self, which: Bool, words: U64) -> None:
        folio = (words[which] & FRAME_MASK).astype(np.int64) // self.pages.huge_pages
        self.split.update(np.unique(folio).tolist())

    # -- pages that change, and frames ---------------------------------------------------------

    def _population(self) -> None:
        """Mappings and frames that keep their content."""
        rate, present = self.stock.frame_rate, self.stock.present
        mappings = frames = Span.of(0.0)
        for which, exact in ((self.inside, True), (~self.inside, False)):
            moved = distinct(self.pages, which & ~self.stable)
            total = int(moved.mappings.sum())
            if exact or (self.still and not total):
                mappings, frames = (
                    mappings + Span.of(float(total)), frames + Span.of(float(len(moved)))
                )  # fmt: skip
            else:
                square = float((moved.mappings**2).sum())
                mappings += scaled(total, rate, square=square)
                frames += scaled(len(moved), rate)
        least = int(np.count_nonzero(self.stable))
        all_of_them = Span.of(float(present.pages))
        self.mappings = (all_of_them - mappings).at_least(least)
        self.frames = (self.stock.frames - frames).at_least(0).at_most(present.pages)

    def _changed(self, kinds: Bool) -> Span:
        """Pages of some counted contents that changed."""
        n = int(np.count_nonzero(kinds & ~self.stable))
        return Span.of(0.0) if self.still and not n else scaled(n, self.stock.frame_rate)

    # -- counted contents ----------------------------------------------------------------------

    def _counted(self) -> dict[str, Span]:
        """Nodes, chains and what is left over of counted contents, all-zero pages apart."""
        n, limit = self.stock.counted[1:], self.limit
        nodes, left = closed_form(n, limit)
        several = nodes > 1
        total, chained = int(nodes.sum()), int(nodes[several].sum())
        there = Span.of(float(n.sum()))
        exact = {
            "pages": there,
            "nodes": Span.of(float(total)),
            "left": Span.of(float(left.sum())),
            "chains": Span.of(float(several.sum())),
            "dups": Span.of(float(chained)),
            "unsure": Span.of(0.0),
        }
        kinds = self.stock.kind > COUNTED
        changed = self._changed(kinds).at_most(float(n.sum()))
        if changed.high:
            # At the least as many nodes as all pages fill; a node can't go without a page.
            lost = min(changed.high, total - (int(n.sum()) - changed.high) / limit)
            lose = int(np.count_nonzero(np.cumsum(np.sort((n - limit)[several])) <= changed.high))
            # The last mapping of any of them may be left over.
            more = min(len(n), changed.high)
            point = changed.point / limit
            exact = {
                "pages": (there - changed).at_least(0),
                "nodes": Span(max(0.0, total - lost), max(0.0, total - point), total),
                "left": Span(0.0, float(left.sum()), float(left.sum()) + more),
                "chains": Span(float(several.sum()) - lose, *([float(several.sum())] * 2)),
                "dups": Span(max(0.0, chained - lost - lose), max(0.0, chained - point), chained),
                "unsure": Span.of(0.0),
            }
        word = self.pages.frames
        plain = (word & (Flag.EXCLUSIVE | Flag.KSM)) == Flag.EXCLUSIVE
        unsure = kinds & self.stable & ~plain
        if unsure.any():
            # Shared by fork, or merged before: they may have fewer nodes, or more.
            some = distinct(self.pages, unsure)
            mappings = scaled(
                int(some.mappings.sum()), self.stock.frame_rate,
                square=float((some.mappings**2).sum()),
            ).high  # fmt: skip
            old = int(np.count_nonzero(some.of(Flag.KSM)))
            merged = scaled(old, self.stock.frame_rate).high if old else 0.0
            fewer = mappings / limit + min(mappings, len(n))
            exact["unsure"] = Span(0.0, 0.0, mappings)
            for name in ("nodes", "dups", "chains"):
                exact[name] = (exact[name] + Span(-fewer, 0.0, merged)).at_least(0)
        huge = Flag.THP | Flag.EXCLUSIVE
        self._add_split(kinds & self.stable & ((word & huge) == huge), word)
        return exact

    def _outside(self, mappings_of: Callable[[I64], I64] | None, nodes: Span) -> Span:
        """Frames of counted contents that processes outside the scan map too: they may stay."""
        if mappings_of is None:
            return Span.of(0.0)
        known = Flag.EXCLUSIVE | Flag.KSM | Flag.HIDDEN
        word = self.pages.frames
        some = (self.stock.kind >= COUNTED) & self.stable & ((word & known) == 0)
        # All-zero pages of a huge page that splits go from all processes that map it.
        goes = (self.stock.kind == COUNTED) & ((word & (Flag.THP | Flag.LOCKED)) == Flag.THP)
        some &= ~goes
        shared = distinct(self.pages, some)
        elsewhere = mappings_of((shared.word & FRAME_MASK).astype(np.int64)) > shared.mappings
        if not elsewhere.any():
            return Span.of(0.0)
        found = scaled(int(np.count_nonzero(elsewhere)), self.stock.frame_rate)
        return Span(max(0.0, found.low - nodes.high), found.point, found.high)

    def _zeros(self) -> tuple[Span, Span, Span, Span, Span]:
        """All-zero mappings; those that leave KSM; those that it places; nodes; left over."""
        none = Span.of(0.0)
        n = int(self.stock.counted[0])
        kinds = self.stock.kind == COUNTED
        total = (Span.of(float(n)) - self._changed(kinds)).at_least(0)
        word = self.pages.frames[kinds & self.stable]
        if n == 1:
            return total, none, none, none, Span(float(self.still), float(total.point), 1.0)
        if not len(word):
            # So few that none was kept.
            few = Span(0.0, total.point, total.high)
            leave = Span(0.0, 0.0, total.high) if self.present.huge else none
            place = few if self.rules.use_zero_pages else none
            node = Span(0.0, float(total.point >= 2), math.ceil(total.high / self.limit))
            return total, leave + place, place, node, Span(0.0, 0.0, float(n > 0))
        huge = ((word & Flag.THP) != 0) & ((word & Flag.LOCKED) == 0)
        merged = (word & Flag.KSM) != 0
        placed = ~huge & ~merged & self.rules.use_zero_pages
        leaves, places, stay = (self._part(some, total) for some in (huge, placed, ~huge & ~placed))
        nodes, left = (int(x[0]) for x in closed_form(np.array([n]), self.limit))
        exact = (word & (Flag.EXCLUSIVE | Flag.KSM | Flag.THP)) == Flag.EXCLUSIVE
        if stay.low == stay.high == n and bool(exact.all()):
            return total, leaves, places, Span.of(float(nodes)), Span.of(float(left))
        some = nodes_of(stay, self.limit)
        if not np.all(word & Flag.EXCLUSIVE):
            # Forks of a node's frame go beyond the limit.
            forked = scaled(
                int(np.count_nonzero((word & Flag.EXCLUSIVE) == 0)), self.stock.frame_rate
            )
            some += Span(-forked.high / self.limit, 0.0, 0.0)
        if huge.any():
            some += Span(-SLACK, 0, SLACK)
            split = (self.stock.kind == COUNTED) & self.stable
            self._add_split(split & ((self.pages.frames & Flag.THP) != 0), self.pages.frames)
        if merged.any():
            some += Span(0.0, 0.0, scaled(len(np.unique(word[merged])), self.stock.frame_rate).high)
        return total, leaves + places, places, some.at_least(0), Span(0.0, 0.0, float(n > 0))

    def _part(self, some: Bool, total: Span) -> Span:
        """Pages of a kind of all-zero ones, from those kept; a kind that was not seen is none."""
        if not some.any():
            return Span.of(0.0)
        if some.all():
            return total
        mine, others = (
            scaled(int(np.count_nonzero(s)), self.stock.frame_rate) for s in (some, ~some)
        )
        rest = total - others
        return Span(
            max(mine.low, rest.low),
            total.point * int(np.count_nonzero(some)) / len(some),
            min(mine.high, rest.high),
        )

    def _splits(self) -> Span:
        """Huge pages that split: those of which a page was seen to merge, up to all."""
        if not self.present.huge:
            return Span.of(0.0)
        size = self.pages.huge_pages
        all_of_them = math.ceil(self.present.huge / size)
        if not self.pages.frames_known:
            return Span.between(0, all_of_them)
        word = self.pages.frames
        inside = self.stable & ((word & Flag.THP) != 0)
        folio, pages = np.unique(
            (word[inside] & FRAME_MASK).astype(np.int64) // size, return_counts=True
        )
        # Mapped in part, a huge page may have had no page among those kept.
        rate = self.stock.frame_rate
        missed = float((pages == 1).sum()) * (1 - rate) / rate
        surely = len(self.split)
        return Span.between(surely, max(all_of_them, min(self.present.huge, len(folio) + missed)))

    def _hidden_zeros(self) -> Span:
        """All-zero pages of which may be less frames, where those are hidden."""
        word = self.pages.frames[(self.stock.kind == COUNTED) & self.stable]
        some = int(np.count_nonzero((word & Flag.EXCLUSIVE) == 0))
        if self.pages.frames_known or not some:
            return Span.of(0.0)
        return Span(0.0, 0.0, scaled(some, self.stock.frame_rate).high)

    def _own_frames(self) -> bool:
        """Whether each page of a counted content, as far as those kept tell, has its own frame."""
        word = self.pages.frames[(self.stock.kind >= COUNTED) & self.stable]
        return bool(np.all(word & Flag.EXCLUSIVE))

    # -- the whole -----------------------------------------------------------------------------

    def run(self, by_process: I64, mappings_of: Callable[[I64], I64] | None) -> Estimate:
        page, present = self.pages.page_size, self.present
        self._population()
        self._add_parts()
        part = {
            name: found.whole(self.stock.rate, OF_PAIRS.get(name, 0) * self.stock.pairs)
            for name, found in self.sums.items()
        }
        if present.exclusive == present.pages and not sum(self.sums["pages_volatile"].high):
            # Nothing is shared by fork.
            part["pages_volatile"] = Span.of(0.0)
        counted = self._counted()
        zeros, leaves, placed, zero_nodes, zero_left = self._zeros()
        nodes, left = counted["nodes"] + zero_nodes, counted["left"] + zero_left
        unsure = counted["unsure"].high
        on_nodes = nodes + left + Span(0.0, 0.0, unsure)
        rest = counted["pages"] + zeros
        freed = self.frames - part["stay"] - on_nodes - self._hidden_zeros()
        if self._own_frames():
            freed = narrower(freed, part["frames_freed"] + rest - on_nodes)
        freed = freed - self._outside(mappings_of, nodes)
        sharing = narrower(
            self.mappings - part["not_sharing"] - leaves - on_nodes,
            part["pages_sharing"] + rest - leaves - on_nodes,
        )
        unshared = narrower(part["pages_unshared"], self.mappings - rest - part["not_unshared"])
        more_chains = Span(
            *(float(n >= 2) for n in (zero_nodes.low, zero_nodes.point, zero_nodes.high))
        )
        more_dups = Span(
            *(n if n >= 2 else 0.0 for n in (zero_nodes.low, zero_nodes.point, zero_nodes.high))
        )
        spans = {
            "pages_shared": part["pages_shared"] + nodes,
            "pages_sharing": sharing,
            "pages_unshared": unshared + left,
            "pages_volatile": Span.of(float(present.pages))
            - self.mappings
            + part["pages_volatile"]
            + Span(0.0, 0.0, unsure),
            "stable_node_chains": part["stable_node_chains"] + counted["chains"] + more_chains,
            "stable_node_dups": part["stable_node_dups"] + counted["dups"] + more_dups,
            "frames_freed": freed,
            "thp_split": self._splits(),
        }
        items = (Span.of(float(present.pages)) - leaves).at_least(0)
        before = float(sum(p.ksm_zero_pages for p in self.pages.processes))
        spans["ksm_zero_pages"] = placed + Span.of(before)
        most = float(present.pages) + before
        spans = {name: span.at_least(0).at_most(most) for name, span in spans.items()}
        metadata = items.times(RMAP_ITEM_BYTES) + spans["pages_shared"].times(STABLE_NODE_BYTES)
        spans["general_profit"] = (spans["pages_sharing"] + spans["ksm_zero_pages"]).times(
            page
        ) - items.times(RMAP_ITEM_BYTES)
        spans["saved_bytes"] = spans["frames_freed"].times(page) - metadata
        return self._result(spans, metadata, by_process)

    def _result(self, spans: dict[str, Span], metadata: Span, by_process: I64) -> Estimate:
        breakdown, size = self._breakdown(spans["frames_freed"].point), self.pages.page_size
        return Estimate(
            *told(spans, metadata, breakdown, by_process, size, one_look=self.still),
            self.stock.frames,
            self.stock.distinct_frames,
            self.contents + int(np.count_nonzero(self.stock.counted[1:])),
            solved=True,
        )

    def _breakdown(self, freed: float) -> Breakdown:
        """Where the frames come from: all-zero pages by their number, the rest as in the sample."""
        zero = min(round(freed), round(max(0.0, float(self.stock.counted[0]) - 1)))
        rest = max(0, round(freed) - zero)
        both = self.within + self.across
        within = round(rest * self.within / both) if both else rest
        return Breakdown(zero, within, rest - within)
