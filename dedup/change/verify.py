"""Hold the kernel's counters against a prediction."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Final

from dedup.kernel.ksm import Counters
from dedup.model.prediction import FIELDS, PROCESS_FIELDS

if TYPE_CHECKING:
    from dedup.kernel.ksm import ProcessCounters
    from dedup.model.prediction import Prediction, ProcessPrediction
    from dedup.model.smart import SmartScan

COUNTERS: Final = tuple(n for n in FIELDS if n in {f.name for f in fields(Counters)})
"""Predicted figures that the kernel counts."""
SMART_COUNTERS: Final = ("pages_shared", "pages_sharing", "ksm_zero_pages", "general_profit")
"""Of these, what smart scan leaves to be told one by one."""
LEFT_BEHIND: Final = ("stable_node_chains", "stable_node_dups")
"""What outlasts the pages that it was made for."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Predicted and actual figures by the counter's name."""

    predicted: dict[str, int | None]
    actual: dict[str, int]
    bounds: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def difference(self) -> dict[str, int]:
        """Actual less predicted; less the nearer bound where the prediction is a range."""
        out = {}
        for name, value in self.actual.items():
            predicted = self.predicted[name]
            # An estimate has both.
            if name in self.bounds:
                low, high = self.bounds[name]
                out[name] = min(0, value - low) or max(0, value - high)
            elif predicted is not None:
                out[name] = value - predicted
        return out

    @property
    def exact(self) -> bool:
        """Whether every figure was predicted as one number."""
        return None not in self.predicted.values() and not self.bounds

    def holds(self, tolerance_pages: int = 0, page_size: int = 4096) -> bool:
        """Whether all figures agree within a number of pages."""
        for name, off in self.difference.items():
            unit = page_size if name.endswith("profit") else 1
            if abs(off) > tolerance_pages * unit:
                return False
        return True


def compare(prediction: Prediction, actual: Counters, before: Counters | None = None) -> Comparison:
    """Global counters.

    Parameters
    ----------
    prediction : Prediction
    actual : Counters
    before : Counters, optional
        Those before ksmd ran for it. What it had merged then may have been given back or swapped
        out since: the content's chain and nodes count until ksmd meets such a page again
        (mm/ksm.c, stable_node_dup), so that the kernel may have so many more of them.
    """
    predicted: dict[str, int | None] = {name: getattr(prediction, name) for name in COUNTERS}
    counted: dict[str, int] = {name: getattr(actual, name) for name in COUNTERS}
    bounds: dict[str, tuple[int, int]] = {
        k: v for k, v in prediction.bounds.items() if k in COUNTERS
    }
    for name in LEFT_BEHIND if before is not None else ():
        left = getattr(before, name)
        one = predicted[name]
        low, high = bounds[name] if one is None or name in bounds else (one, one)
        if left and counted[name] > high:
            predicted[name], bounds[name] = None, (low, high + left)
    return Comparison(predicted, counted, bounds)


def compare_smart(forecast: SmartScan, actual: Counters) -> Comparison:
    """Global counters with smart scan on: unshared and volatile as one."""
    counted = {name: getattr(actual, name) for name in SMART_COUNTERS}
    counted["pages_unshared_and_volatile"] = actual.pages_unshared + actual.pages_volatile
    return Comparison(
        {name: getattr(forecast, name) for name in counted},
        counted,
        {k: v for k, v in forecast.bounds.items() if k in counted},
    )


def compare_process(prediction: ProcessPrediction, actual: ProcessCounters) -> Comparison:
    """ksm_stat of one process."""
    return Comparison(
        {name: getattr(prediction, name) for name in PROCESS_FIELDS},
        {name: getattr(actual, name) for name in PROCESS_FIELDS},
        prediction.bounds,
    )
