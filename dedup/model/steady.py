"""The steady state of memory that is written to: which looks see it, and what follows from them.

ksmd merges a page whose content is the same at two of its visits, one full scan apart. Two looks
1.6 full scans apart find the pages for which that holds most of the time. Where that is too long
to wait, three looks (0, T and 3T) give the share of pages that keep their content for time t as
exp(-(t/theta)^beta), a Weibull distribution: few pages change quickly, many slowly, beta <= 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dedup.model.prediction import (
    FIELDS,
    PROCESS_FIELDS,
    RMAP_ITEM_BYTES,
    Breakdown,
    Prediction,
    ProcessPrediction,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

STEADY_FACTOR: Final = 1.6
"""Looks this many full scans apart see as volatile what ksmd does in the steady state."""
INTERVAL_MOST_SECONDS: Final = 5.0
INTERVAL_LEAST_SECONDS: Final = 0.05
THIRD_LOOK: Final = 3
"""When the third look comes, in units of the time from the first to the second."""
LAST_LOOK_SECONDS: Final = 7.5
"""At the latest, so that no two looks are more than 5 s apart."""
DRIFT_SHARE: Final = 0.01
"""A figure of one look that moves by more of itself from look to look is no steady state."""
SPREAD: Final = 4.0
"""Standard deviations that chance may move it by."""

Span = tuple[float, float]
P = TypeVar("P", Prediction, ProcessPrediction)


@dataclass(frozen=True, slots=True)
class Looks:
    """When to look, in seconds after the first look."""

    at: tuple[float, ...]
    extrapolated: bool = False
    """Whether the steady state lies beyond the last one."""


REMERGE_SCANS: Final = 1.25
"""Full scans for which a page that is broken may be out of the counters: one, as rates vary."""


def looks(full_scan_seconds: float) -> Looks:
    """When to look, for ksmd's full scan of this time.

    Parameters
    ----------
    full_scan_seconds : float

    Returns
    -------
    Looks
        Two looks 1.6 full scans apart; where that is more than 5 s three, the third one then or
        after 7.5 s, the second one at a third of its time.
    """
    steady = STEADY_FACTOR * full_scan_seconds
    if steady <= INTERVAL_MOST_SECONDS:
        return Looks((0.0, max(INTERVAL_LEAST_SECONDS, steady)))
    last = min(steady, LAST_LOOK_SECONDS)
    return Looks((0.0, last / THIRD_LOOK, last), extrapolated=last < steady)


def drifting(first: float, last: float, changed: int) -> bool:
    """Whether memory is still changing its nature, so that no steady state can be given.

    Parameters
    ----------
    first, last : float
        `pages_sharing` by the first look alone, and by the last one alone.
    changed : int
        Pages whose content differed, that came or went, between them.
    """
    chance = SPREAD * math.sqrt(min(changed, max(first, last)))
    return abs(last - first) > DRIFT_SHARE * max(first, last) + chance


def kept(
    first: float, second: float, third: float, distance: float, elapsed: float
) -> tuple[float, Span]:
    """What is left of a figure after a time, from three looks at 0, 1 and `distance`.

    Parameters
    ----------
    first : float
        By one look alone.
    second, third : float
        Without what changed until then.
    distance, elapsed : float
        Of the third look, and of the time to see; in units of the first two looks' distance.

    Returns
    -------
    value : float
    span : (float, float)
        From a loss that goes on as from the start, to none any more.
    """
    if third <= 0 or first <= third:
        return third, (third, third)
    late = math.log(first / third)
    early = math.log(first / second) if 0 < second < first else 0.0
    beta = min(1.0, math.log(late / early) / math.log(distance)) if 0 < early < late else 1.0
    if early >= late:
        beta = 0.0
    times = elapsed / distance
    return first * math.exp(-late * times**beta), (first * math.exp(-late * times), third)


def overstated(first: float, last: float, elapsed: float, full_scan_seconds: float) -> float:
    """How far `pages_sharing` is ahead of the memory really shared, in the mean, at the most.

    A page that is written to leaves its node at once, and the counter at ksmd's next visit: half a
    full scan later in the mean. That is the whole of what the looks see change, if all of it was
    merged before; the pages that change the most are not. Writes of the same content are not seen.

    Parameters
    ----------
    first, last : float
        Pages merged by the first look alone, and without what changed until the last one.
    elapsed : float
        Seconds between these looks.
    full_scan_seconds : float

    Returns
    -------
    float
        Pages.
    """
    if not 0 < last < first or elapsed <= 0:
        return 0.0
    return last * math.log(first / last) / elapsed * full_scan_seconds / 2


def merged(prediction: Prediction) -> float:
    """Pages merged or mapped to the shared zero page, the middle where it is a range."""
    return (sum(span(prediction, "pages_sharing")) + sum(span(prediction, "ksm_zero_pages"))) / 2


def at_the_most(last: Prediction, kept: float, page_size: int) -> Prediction:
    """What the last look said as the highest, for a steady state that lies beyond it.

    Parameters
    ----------
    last : Prediction
    kept : float
        Share of the pages that keep their content until then, at the least.
    page_size : int
    """
    if kept >= 1:
        return last
    found: dict[str, tuple[int, int]] = {}
    for name in ("pages_shared", "pages_sharing", "ksm_zero_pages", "frames_freed"):
        low, high = reach(last, name)
        found[name] = (math.floor(low * kept) if low > 0 else low, high)
    for name, unit in (("general_profit", "pages_sharing"), ("saved_bytes", "frames_freed")):
        low, high = reach(last, name)
        lost = reach(last, unit)[0] - found[unit][0]
        found[name] = (low - lost * page_size, high)
    lost = sum(reach(last, n)[0] - found[n][0] for n in ("pages_shared", "pages_sharing"))
    for name in ("pages_unshared", "pages_volatile"):
        low, high = reach(last, name)
        found[name] = (low, high + lost)
    values: dict[str, Any] = {n: None if s[0] != s[1] else s[0] for n, s in found.items()}
    bounds = {n: s for n, s in found.items() if s[0] != s[1]}
    return replace(last, **values, bounds={**last.bounds, **bounds})


def not_read_again(last: Prediction, unread: int) -> Prediction:
    """What later looks leave open that read only what would merge.

    A page that was like no other at the first look is unshared if it keeps its content, and
    volatile if it does not; savings depend on neither.

    Parameters
    ----------
    last : Prediction
        As if all pages that were not read again kept their content.
    unread : int
        How many these are.
    """
    low, high = reach(last, "pages_unshared")
    least, most = reach(last, "pages_volatile")
    items = sum(reach(p, "ksm_rmap_items")[1] for p in last.processes)
    open_to = {
        "pages_unshared": (max(0, low - unread), high),
        "pages_volatile": (least, max(most, min(most + unread, items))),
    }
    return replace(
        last, pages_unshared=None, pages_volatile=None, bounds={**last.bounds, **open_to}
    )


def rewritten(last: Prediction, broken_pages: float, page_size: int) -> Prediction:
    """What was predicted, as a range where programs write again what merged pages hold already.

    No look sees that, since the content stays; the kernel counts it (cow_ksm). Such a page merges
    anew when ksmd comes by, its checksum being the one that ksmd knows, and is counted as shared
    until then. But where all mappings of a content are written to within a full scan, its KSM page
    is freed and all of them leave the counters at once (mm/ksm.c, ksm_get_folio), to come back one
    by one. So: between all and none of those pages.

    Parameters
    ----------
    last : Prediction
    broken_pages : float
        Merged pages that are written to in a full scan.
    page_size : int
    """
    pages = merged(last)
    lost = min(pages, REMERGE_SCANS * broken_pages)
    if lost < 1:
        return last
    out = at_the_most(last, 1 - lost / pages, page_size)
    chains = {n: (0, reach(last, n)[1]) for n in ("stable_node_chains", "stable_node_dups")}
    fewer = math.ceil(lost)
    processes = []
    for process in out.processes:
        low, high = reach(process, "ksm_merging_pages")
        profit = reach(process, "ksm_process_profit")
        processes.append(
            replace(
                process,
                ksm_merging_pages=None,
                ksm_process_profit=None,
                bounds={
                    **process.bounds,
                    "ksm_merging_pages": (max(0, low - fewer), high),
                    "ksm_process_profit": (profit[0] - fewer * page_size, profit[1]),
                },
            )
        )
    return replace(
        out,
        stable_node_chains=None,
        stable_node_dups=None,
        bounds={**out.bounds, **chains},
        processes=processes,
    )


def seen(predictions: Sequence[Prediction]) -> Prediction:
    """What several looks said, as ranges: for memory that has no steady state.

    Parameters
    ----------
    predictions : sequence of Prediction
        Of the same processes; the last one gives what does not depend on time.
    """
    last = predictions[-1]
    processes = [
        _from_lowest_to_highest(
            one, PROCESS_FIELDS, [p.processes[i] for p in predictions if i < len(p.processes)]
        )
        for i, one in enumerate(last.processes)
    ]
    return replace(_from_lowest_to_highest(last, FIELDS, predictions), processes=processes)


def _from_lowest_to_highest(last: P, names: Sequence[str], several: Sequence[P]) -> P:
    values: dict[str, Any] = {}
    bounds: dict[str, tuple[int, int]] = {}
    for name in names:
        spans = [span(p, name) for p in several if _is_known(p, name)]
        if not spans:
            continue
        low, high = min(s[0] for s in spans), max(s[1] for s in spans)
        values[name] = low if low == high else None
        if low != high:
            bounds[name] = (low, high)
    return replace(last, **values, bounds=bounds)


@dataclass(frozen=True, slots=True)
class _Three:
    """The predictions of three looks, and how far ahead to see."""

    first: Prediction
    second: Prediction
    third: Prediction
    distance: float
    elapsed: float

    def figure(self, name: str) -> tuple[int, int, int]:
        """Value, lowest and highest of a field, pages."""
        return self._kept([span(p, name) for p in (self.first, self.second, self.third)])

    def of_process(self, index: int, name: str) -> tuple[int, int, int]:
        """The same of a process."""
        spans = []
        for prediction in (self.first, self.second, self.third):
            # A process that was not there at the first look changed nothing since.
            known = prediction.processes
            one = known[index] if index < len(known) else self.third.processes[index]
            spans.append(span(one, name))
        return self._kept(spans)

    def steady_pages(self, rmap_items: int) -> int:
        """Pages that keep their content, of `rmap_items`."""
        first, second, third = (
            max(0.0, rmap_items - sum(span(p, "pages_volatile")) / 2)
            for p in (self.first, self.second, self.third)
        )
        return round(kept(first, second, third, self.distance, self.elapsed)[0])

    def _kept(self, spans: list[tuple[int, int]]) -> tuple[int, int, int]:
        first, second, third = spans
        at = self.distance, self.elapsed
        low, (least, _) = kept(first[0], second[0], third[0], *at)
        high, (_, most) = kept(first[1], second[1], third[1], *at)
        return round((low + high) / 2), math.floor(least), math.ceil(most)


def extrapolate(
    predictions: tuple[Prediction, Prediction, Prediction],
    distance: float,
    elapsed: float,
    page_size: int,
) -> Prediction:
    """The steady state beyond the last look.

    Parameters
    ----------
    predictions : three Predictions
        By the first look alone, then without what changed until the second and the third.
    distance, elapsed : float
        When the third look came, and when ksmd's steady state shows, both after the first look and
        in units of the time from the first to the second.
    page_size : int

    Returns
    -------
    Prediction
        The last one where nothing changed; else estimates, with `bounds` from a loss that goes on
        as it began to none any more.
    """
    three = _Three(*predictions, distance, elapsed)
    last = predictions[2]
    names = ("pages_shared", "pages_sharing", "ksm_zero_pages", "stable_node_chains",
             "stable_node_dups", "frames_freed", "thp_split")  # fmt: skip
    found = {name: three.figure(name) for name in names if _is_known(last, name)}
    items = sum(sum(span(p, "ksm_rmap_items")) for p in last.processes) // 2
    merged = found["pages_shared"][0] + found["pages_sharing"][0]
    steady = max(merged, three.steady_pages(items))
    least = found["pages_shared"][1] + found["pages_sharing"][1]
    found["pages_unshared"] = (steady - merged, 0, max(0, items - least))
    seen = min(span(last, "pages_volatile")[0], items - steady)
    found["pages_volatile"] = (items - steady, seen, items)
    for name, unit in (("general_profit", "pages_sharing"), ("saved_bytes", "frames_freed")):
        value, low, high = (_money(last, name, unit, n, page_size) for n in found[unit])
        found[name] = value, low, high
    values: dict[str, Any] = _values(last, found)
    before = sum(span(last, "frames_freed"))
    share = 2 * found["frames_freed"][0] / before if before > 0 else 1.0
    return replace(
        last,
        **values,
        breakdown=Breakdown(
            round(last.breakdown.zero_pages * share),
            round(last.breakdown.within_processes * share),
            round(last.breakdown.across_processes * share),
        ),
        bounds=_bounds(found),
        processes=[_process(three, i, page_size) for i in range(len(last.processes))],
    )


def _values(
    last: Prediction | ProcessPrediction, found: dict[str, tuple[int, int, int]]
) -> dict[str, int | None]:
    """What was one number by the looks is one beyond them; a range stays a range."""
    return {
        name: None if getattr(last, name) is None else value
        for name, (value, _, _) in found.items()
    }


def _bounds(found: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int]]:
    return {name: (low, high) for name, (_, low, high) in found.items() if low != high}


def _money(last: Prediction, name: str, unit: str, pages: int, page_size: int) -> int:
    """Bytes of a figure whose pages are fewer now; KSM's own records stay."""
    bytes_low, bytes_high = span(last, name)
    pages_low, pages_high = span(last, unit)
    return (bytes_low + bytes_high) // 2 + (pages - (pages_low + pages_high) // 2) * page_size


def _process(three: _Three, index: int, page_size: int) -> ProcessPrediction:
    last = three.third.processes[index]
    merging = three.of_process(index, "ksm_merging_pages")
    zero = three.of_process(index, "ksm_zero_pages")
    items = span(last, "ksm_rmap_items")
    records = sum(items) // 2 * RMAP_ITEM_BYTES
    profit = [(m + z) * page_size - records for m, z in zip(merging, zero, strict=True)]
    found = {
        "ksm_merging_pages": merging,
        "ksm_zero_pages": zero,
        "ksm_process_profit": (profit[0], profit[1], profit[2]),
    }
    spans = {"ksm_rmap_items": items} if items[0] != items[1] else {}
    return replace(last, **_values(last, found), bounds=spans | _bounds(found))


def span(p: Prediction | ProcessPrediction, name: str) -> tuple[int, int]:
    """A field from lowest to highest; 0 where it is unknown."""
    value = getattr(p, name)
    return (value, value) if value is not None else p.bounds.get(name, (0, 0))


def reach(p: Prediction | ProcessPrediction, name: str) -> tuple[int, int]:
    """A field from lowest to highest, also where it has an estimate; 0 where it is unknown."""
    return p.bounds[name] if name in p.bounds else span(p, name)


def _is_known(p: Prediction | ProcessPrediction, name: str) -> bool:
    return getattr(p, name) is not None or name in p.bounds
