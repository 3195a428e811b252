"""The kernel's counters once ksmd has converged, from a sample of the frames.

The rules are those of `dedup.model.merge`, over contents as `unseen` has them: what only a full
scan can tell stays a range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.errors import Refused
from dedup.estimate.unseen import CONFIDENCE, Seen, Span, Unseen, scaled, times_of
from dedup.model.copies import ABSENT, NOT_STABLE
from dedup.model.prediction import (
    FIELDS,
    RMAP_ITEM_BYTES,
    STABLE_NODE_BYTES,
    Breakdown,
    Prediction,
    ProcessPrediction,
)
from dedup.pages import FRAME_MASK, Flag

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from dedup.model.prediction import Rules
    from dedup.pages import I64, U64, Bool, Pages

    F64 = NDArray[np.float64]

SAMPLED_LEAST: Final = 5000
"""Frames without which no estimate is made: its range would say nothing."""
RATE_MOST: Final = 0.25
"""Above it single pages take as long as all of them in one go."""
RATE_LEAST: Final = 0.01
SLACK: Final = 2
"""All-zero pages of huge pages that may stay, and nodes that others of them then miss."""


@dataclass(frozen=True, slots=True)
class Present:
    """Pages (mappings) there, read or not; a column each of `_core.COUNTS`."""

    pages: int = 0
    exclusive: int = 0
    ksm: int = 0
    huge: int = 0


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a first look chose.

    Parameters
    ----------
    present : Present
    frames : Span
        Distinct frames under the pages present.
    sampled : int
        Distinct frames in the sample.
    """

    present: Present
    frames: Span
    sampled: int

    @property
    def rate(self) -> float:
        """Part of the frames that is in the sample."""
        return self.sampled / self.frames.point if self.sampled else 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a sample says of the whole.

    Parameters
    ----------
    prediction : Prediction
        Fields that are not known are None, with bounds.
    point : dict of str to int
        The likeliest value of each such field.
    frames : Span
    sampled_frames : int
    contents_seen : int
        Different contents in the sample, all-zero pages left out.
    solved : bool
        Whether the programme had solutions; else the bounds are what is certain.
    confidence : float
        Of each of the bounds.
    """

    prediction: Prediction
    point: dict[str, int]
    frames: Span
    sampled_frames: int
    contents_seen: int
    solved: bool
    confidence: float = CONFIDENCE


@dataclass(frozen=True, slots=True)
class Frames:
    """Distinct frames of a sample, with what is mapped where."""

    digest: U64
    word: U64
    mappings: I64

    def __len__(self) -> int:
        return len(self.word)

    def of(self, flags: np.uint64) -> Bool:
        """Those with any of these flags."""
        return np.asarray((self.word & flags) != 0)


def nodes_of(mappings: Span, limit: int) -> Span:
    """Nodes of one content with so many mappings, of which each takes `limit`."""
    return Span(
        max(1.0, math.floor(mappings.low) / limit - 1) if mappings.low >= 2 else 0.0,
        math.ceil(mappings.point / limit) if mappings.point >= 2 else 0.0,
        math.ceil(mappings.high / limit) if mappings.high >= 2 else 0.0,
    )


def told(
    spans: Mapping[str, Span], metadata: Span, breakdown: Breakdown, by_process: I64,
    page_size: int, *, one_look: bool,
) -> tuple[Prediction, dict[str, int]]:  # fmt: skip
    """The prediction from what its fields may be, and their likeliest values.

    Parameters
    ----------
    spans : mapping of str to Span
        By field.
    metadata : Span
        Bytes of KSM's own records.
    breakdown : Breakdown
    by_process : ndarray
        Pages of each process.
    page_size : int
    one_look : bool
        Nobody knows what changes then.
    """
    values: dict[str, int | None] = {}
    bounds, point = {}, {}
    for name in FIELDS:
        span = spans[name]
        low, high = math.floor(span.low), math.ceil(span.high)
        values[name] = low if low == high else None
        if low != high:
            bounds[name] = (low, high)
            point[name] = min(high, max(low, round(span.point)))
    if one_look:
        values["pages_volatile"] = None
        bounds.pop("pages_volatile", None)
        point.pop("pages_volatile", None)
    prediction = Prediction(
        **values,
        bounds=bounds,
        processes=[unknown_but_pages(n, page_size) for n in by_process.tolist()],
        breakdown=breakdown,
        metadata_bytes=math.ceil(metadata.high),
    )
    return prediction, point


def unknown_but_pages(pages: int, page_size: int) -> ProcessPrediction:
    """Of one process nothing is told but how many pages it has."""
    return ProcessPrediction(
        None, None, None, None,
        {
            "ksm_rmap_items": (0, pages),
            "ksm_merging_pages": (0, pages),
            "ksm_process_profit": (-pages * RMAP_ITEM_BYTES, pages * page_size),
        },
    )  # fmt: skip


def distinct(pages: Pages, which: Bool) -> Frames:
    """Distinct frames of some pages; each mapping has its own where frame numbers are hidden."""
    word, digest = pages.frames[which], pages.hashes[which]
    alone = (word & (Flag.EXCLUSIVE | Flag.HIDDEN)) != 0
    _, first, count = np.unique(word[~alone] & FRAME_MASK, return_index=True, return_counts=True)
    return Frames(
        np.concatenate([digest[alone], digest[~alone][first]]),
        np.concatenate([word[alone], word[~alone][first]]),
        np.concatenate([np.ones(int(alone.sum()), np.int64), count]),
    )


def choose(pages: Pages, present: Present, rate: float) -> Chosen:
    """Take stock after the first look.

    Parameters
    ----------
    pages : Pages
        The sample.
    present : Present
        All pages.
    rate : float
        Chance of a frame to be chosen.

    Raises
    ------
    Refused
        The sample is too small.
    """
    everything = np.ones(len(pages.frames), np.bool_)
    frames = distinct(pages, everything)
    alone = int(frames.of(Flag.EXCLUSIVE | Flag.HIDDEN).sum())
    # Each page that is exclusive has a frame of its own; where frames are hidden, all do for now.
    known = present.exclusive if pages.frames_known else present.pages
    shared = len(frames) - alone
    whole = Span.of(float(known))
    if shared or known < present.pages:
        whole += scaled(shared, rate).at_most(present.pages - known)
    if len(frames) < SAMPLED_LEAST:
        enough = SAMPLED_LEAST * 1.2 / max(1.0, whole.point)
        raise Refused(
            f"too small a sample: {len(frames):,} frames of {round(whole.point):,}, and an "
            f"estimate takes {SAMPLED_LEAST:,}",
            "leave out `--sample` and `--within`: reading all of it takes no longer"
            if enough > RATE_MOST
            else f"`--sample {math.ceil(enough * 100)}%`, or leave it out and read all",
        )
    return Chosen(present, whole, len(frames))


def estimate(
    pages: Pages,
    chosen: Chosen,
    present: Present,
    by_process: I64,
    rules: Rules,
    mappings_of: Callable[[I64], I64] | None = None,
) -> Estimate:
    """Estimate the counters.

    Parameters
    ----------
    pages : Pages
        The sample after the last look.
    chosen : Chosen
        Of the first look.
    present : Present
        All pages at the last look.
    by_process : int64 array
        The same by process.
    rules : Rules
    mappings_of : callable, optional
        Mappings of frames on the whole host, by their numbers; None where they are hidden.
    """
    return _Estimator(pages, chosen, present, rules).run(by_process, mappings_of)


class _Estimator:
    def __init__(self, pages: Pages, chosen: Chosen, present: Present, rules: Rules) -> None:
        self.pages, self.chosen, self.present, self.rules = pages, chosen, present, rules
        self.rate = chosen.rate
        self.stable = distinct(pages, (pages.frames & NOT_STABLE) == 0)
        self.zero = self.stable.of(Flag.ZERO)
        if int(self.zero.sum()) < 2:
            # One alone is a content like any other.
            self.zero = np.zeros(len(self.stable), np.bool_)
        self._contents()
        self._population()
        self.unseen = Unseen(
            Seen(times_of(self.count), self.rate, self.frames_of_contents), rules.max_page_sharing
        )

    def _contents(self) -> None:
        """What is not all zero, by content."""
        self.rest = np.flatnonzero(~self.zero)
        _, first, which, self.count = np.unique(
            self.stable.digest[self.rest], return_index=True, return_inverse=True,
            return_counts=True,
        )  # fmt: skip
        self.which = which.reshape(-1)
        once = self.rest[first[self.count == 1]]
        self.once = Frames(
            self.stable.digest[once], self.stable.word[once], self.stable.mappings[once]
        )

    def _population(self) -> None:
        """Frames and mappings that keep their content, and those of all-zero pages."""
        words = self.pages.frames
        unstable = (words & NOT_STABLE) != 0
        moved = distinct(self.pages, unstable)
        lost = scaled(len(moved), self.rate)
        if self.pages.looks == 1 and not len(moved):
            lost = Span.of(0.0)
        frames = (self.chosen.frames - lost).at_least(len(self.stable))
        mappings = scaled(
            int(moved.mappings.sum()), self.rate, square=float((moved.mappings**2).sum())
        )
        if self.pages.looks == 1 and not len(moved):
            mappings = Span.of(0.0)
        self.mappings = (Span.of(self.chosen.present.pages) - mappings).at_least(0)
        self.frames = frames.at_most(self.chosen.present.pages)
        zero, rest = int(self.zero.sum()), len(self.rest)
        if not zero:
            self.frames_of_zero, self.frames_of_contents = Span.of(0.0), self.frames
        elif zero <= rest:
            self.frames_of_zero = scaled(zero, self.rate)
            self.frames_of_contents = (self.frames - self.frames_of_zero).at_least(rest)
        else:
            self.frames_of_contents = scaled(rest, self.rate)
            self.frames_of_zero = (self.frames - self.frames_of_contents).at_least(zero)

    # -- the parts -----------------------------------------------------------------------------

    def _zeros(self) -> tuple[Span, Span, Span]:
        """All-zero mappings that leave KSM, those of them that it places, nodes of the rest."""
        if not self.zero.any():
            return Span.of(0.0), Span.of(0.0), Span.of(0.0)
        word = self.stable.word[self.zero]
        huge = ((word & Flag.THP) != 0) & ((word & Flag.LOCKED) == 0)
        merged = (word & Flag.KSM) != 0
        placed = ~huge & ~merged & self.rules.use_zero_pages
        leaves, places, stay = (
            self._part_of_zeros(some) for some in (huge, placed, ~huge & ~placed)
        )
        nodes = nodes_of(stay, self.rules.max_page_sharing)
        if huge.any():
            nodes += Span(-SLACK, 0, SLACK)
        return leaves + places, places, nodes.at_least(0)

    def _part_of_zeros(self, some: Bool) -> Span:
        """Mappings of the whole, of some of the all-zero frames in the sample."""
        mappings = self.stable.mappings[self.zero][some]
        if not len(mappings):
            # A kind of them that was not seen at all hardly matters.
            return Span.of(0.0)
        total = int(mappings.sum())
        if len(mappings) == total == int(self.zero.sum()):
            return self.frames_of_zero
        return scaled(total, self.rate, square=float((mappings**2).sum()))

    def _once(self, value: F64, single: Span) -> Span:
        """Sum of a value over contents with one frame, from those seen once.

        Parameters
        ----------
        value : float64 array
            Of each frame seen once; at least 0.
        single : Span
            How many contents there are with one frame.
        """
        total = float(value.sum())
        if not total:
            return Span(0.0, 0.0, self._missed())
        value = np.sort(value)
        low, point, high = (
            min(len(value), round(n * self.rate)) for n in (single.low, single.point, single.high)
        )
        least, most = float(value[:low].sum()), float(value[len(value) - high :].sum())
        wide = scaled(len(value), self.rate, square=float((value**2).sum()) + len(value))
        noise = wide.high - wide.point
        middle = total * point / len(value) / self.rate
        return Span(
            max(0.0, least / self.rate - noise),
            middle,
            max(middle, most / self.rate + noise),
        )

    def _missed(self) -> float:
        """What may be there though the sample has none of it."""
        if not self.present.ksm and self.present.exclusive == self.present.pages:
            return 0.0
        return scaled(0, self.rate).high

    def _outside(self, mappings_of: Callable[[I64], I64] | None, single: Span) -> Span:
        """Frames that merge, but that processes outside the scan map too: they may stay."""
        if mappings_of is None:
            return Span.of(0.0)
        known = Flag.EXCLUSIVE | Flag.KSM | Flag.HIDDEN
        at = self.rest[(self.stable.word[self.rest] & known) == 0]
        if not len(at):
            return Span.of(0.0)
        elsewhere = np.zeros(len(self.stable), np.bool_)
        frames = (self.stable.word[at] & FRAME_MASK).astype(np.int64)
        elsewhere[at] = mappings_of(frames) > self.stable.mappings[at]
        alone = elsewhere[self.rest] & (self.count[self.which] == 1)
        sure = int(elsewhere[self.rest].sum()) - int(alone.sum())
        # Of those seen once, the contents with one frame have nothing to merge with.
        twins = max(0, len(self.once) - math.floor(single.low * self.rate))
        return Span(0.0, 0.0, scaled(sure + min(int(alone.sum()), twins), self.rate).high)

    def _splits(self) -> Span:
        """Huge pages that split: those of which a page was seen to merge, up to all."""
        if not self.present.huge:
            return Span.of(0.0)
        size = self.pages.huge_pages
        all_of_them = math.ceil(self.present.huge / size)
        if not self.pages.frames_known:
            return Span.between(0, all_of_them)
        inside = self.stable.of(Flag.THP)
        folio = (self.stable.word & FRAME_MASK).astype(np.int64) // size
        merges = self.zero.copy()
        merges[self.rest] = self.count[self.which] > 1
        surely = len(np.unique(folio[inside & merges]))
        _, pages = np.unique(folio[inside], return_counts=True)
        # Mapped in part, a huge page may have had no page in the sample.
        missed = float((pages == 1).sum()) * (1 - self.rate) / self.rate
        return Span.between(surely, max(all_of_them, len(pages) + missed, surely))

    # -- the whole -----------------------------------------------------------------------------

    def run(self, by_process: I64, mappings_of: Callable[[I64], I64] | None) -> Estimate:
        unseen, page = self.unseen, self.pages.page_size
        extra_low, extra_high = unseen.extra_nodes()
        contents, single_of = unseen.contents(), unseen.single()
        nodes = unseen.figure(contents + extra_low, contents + extra_high)
        single = unseen.figure(single_of)
        merged = contents - single_of
        shared = unseen.figure(merged + extra_low, merged + extra_high)
        chains = unseen.figure(unseen.chained())
        chained = unseen.chained()
        dups = unseen.figure(extra_low + chained, extra_high + chained)
        # The last mapping of a content beyond the limit may find no partner.
        left = Span(0.0, 0.0, math.ceil(chains.high))
        leaves, placed, zero_nodes = self._zeros()
        more_nodes = (zero_nodes.low, zero_nodes.point, zero_nodes.high)
        chains += Span(*(float(n >= 2) for n in more_nodes))
        dups += Span(*(n if n >= 2 else 0.0 for n in more_nodes))
        if zero_nodes.high:
            left += Span(0.0, 0.0, 1.0)
        # Mappings beyond one a frame: of frames that fork shares, and of KSM pages.
        extra = (self.mappings - self.frames).at_least(0)
        is_ksm = self.once.of(Flag.KSM)
        single_ksm = self._once(is_ksm.astype(np.float64), single)
        if not self.present.ksm:
            single_ksm = Span.of(0.0)
        single_extra = Span.of(0.0)
        if extra.high:
            more = np.where(is_ksm, 0, self.once.mappings - 1).astype(np.float64)
            single_extra = self._once(more, single).at_most(extra.high)
            # Nodes are filled by mappings.
            crowd = extra.high / self.rules.max_page_sharing
            nodes += Span(0.0, 0.0, crowd)
            shared += Span(0.0, 0.0, crowd)
            chains += Span(0.0, 0.0, crowd)
            dups += Span(0.0, 0.0, 2 * crowd)
            left += Span(0.0, 0.0, crowd)
        outside = self._outside(mappings_of, single)
        freed = self.frames - nodes - zero_nodes - left
        on_nodes = freed + extra - leaves - single_extra
        freed = (freed - outside).at_least(0)
        volatile = Span.of(float(self.present.pages)) - self.mappings + single_extra
        unshared = single - single_ksm + left
        shared = shared + zero_nodes + single_ksm
        if not self.pages.frames_known:
            # Equal pages that are not exclusive: one frame, perhaps, or a KSM page already.
            hidden = float(self.present.pages - self.present.exclusive)
            freed, on_nodes = freed - Span(0, 0, hidden), on_nodes - Span(0, 0, hidden)
            shared = shared - Span(0, 0, hidden)
            unshared, volatile = unshared + Span(0, 0, hidden), volatile + Span(0, 0, hidden)
            single_most = Span(0, 0, hidden)
            shared = shared + (single_most if self.present.ksm else Span.of(0.0))
        items = Span.of(float(self.present.pages)) - leaves
        before = float(sum(p.ksm_zero_pages for p in self.pages.processes))
        placed = placed + Span.of(before)
        spans = {
            "pages_shared": shared,
            "pages_sharing": on_nodes,
            "pages_unshared": unshared,
            "pages_volatile": volatile,
            "ksm_zero_pages": placed,
            "stable_node_chains": chains,
            "stable_node_dups": dups,
            "frames_freed": freed,
            "thp_split": self._splits(),
        }
        most = float(self.present.pages) + before
        spans = {name: span.at_least(0).at_most(most) for name, span in spans.items()}
        metadata = items.times(RMAP_ITEM_BYTES) + spans["pages_shared"].times(STABLE_NODE_BYTES)
        spans["general_profit"] = (spans["pages_sharing"] + placed).times(page) - items.times(
            RMAP_ITEM_BYTES
        )
        spans["saved_bytes"] = spans["frames_freed"].times(page) - metadata
        return self._result(spans, metadata, by_process)

    def _result(self, spans: dict[str, Span], metadata: Span, by_process: I64) -> Estimate:
        breakdown = self._breakdown(spans["frames_freed"].point)
        one_look = self.pages.looks == 1
        return Estimate(
            *told(spans, metadata, breakdown, by_process, self.pages.page_size, one_look=one_look),
            self.frames,
            self.chosen.sampled,
            len(self.count),
            self.unseen.solved,
        )

    def _breakdown(self, freed: float) -> Breakdown:
        """Where the frames come from: all-zero pages by their number, the rest as in the sample."""
        zero = min(round(freed), round(self.frames_of_zero.point))
        rest = max(0, round(freed) - zero)
        if len(self.pages.processes) == 1:
            return Breakdown(zero, rest, 0)
        return Breakdown(zero, *self._split(rest))

    def _split(self, rest: int) -> tuple[int, int]:
        """Divide frames freed into those within a process and across, as copies seen are."""
        which = np.flatnonzero((self.pages.frames & (NOT_STABLE | ABSENT | Flag.ZERO)) == 0)
        process = self.pages.process_of_region()[self.pages.region_of(which)]
        digest = self.pages.hashes[which]
        _, content = np.unique(digest, return_inverse=True)
        copies = len(which) - int(content.max(initial=-1)) - 1
        pairs = np.unique(content.reshape(-1) * len(self.pages.processes) + process)
        within = len(which) - len(pairs)
        inside = round(rest * within / copies) if copies else 0
        return inside, rest - inside
