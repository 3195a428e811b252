"""What smart scan, ksmd's default, changes: pages that do not merge soon are visited less.

A page that is on no stable node is processed in its own scans 1, 2, 3, 4, 6, 9, 14, 23 and every
ninth from there on; in between it is in no tree. So two copies that became mergeable at different
times may never lie in the unstable tree together. What became mergeable at the same time merges in
its second scan, as without smart scan.

Source: mm/ksm.c, should_skip_rmap_item() and skip_age().
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dedup.model import merge, steady
from dedup.model.copies import distinct
from dedup.pages import FRAME_MASK, NO_FLAG, Flag

if TYPE_CHECKING:
    from collections.abc import Callable

    from dedup.model.prediction import Prediction, Rules
    from dedup.pages import I64, Bool, Groups, Pages

PERIOD: Final = 9
"""Scans from one visit of an old page to the next."""
YOUNG: Final = (1, 2, 3, 4, 6, 9)
"""A page's own scans in which it is processed, before the ninths from 14 on."""
OLD_FROM: Final = 14

FIELDS: Final = (
    "pages_shared",
    "pages_sharing",
    "ksm_zero_pages",
    "general_profit",
    "frames_freed",
    "saved_bytes",
)


@dataclass(frozen=True, slots=True)
class SmartScan:
    """The counters with smart scan on. Pages, but profit and savings in bytes.

    None where the result is not one number; `bounds` then has the lowest and the highest.
    """

    pages_shared: int | None
    pages_sharing: int | None
    pages_unshared_and_volatile: int | None
    """As one: a page that is passed over is in no tree, and counts as volatile."""
    ksm_zero_pages: int | None
    general_profit: int | None
    frames_freed: int | None
    saved_bytes: int | None
    never_merging_pages: int | None
    """Equal pages that may never meet."""
    full_scans: int | None
    """Until what merges is merged."""
    bounds: dict[str, tuple[int, int]] = field(default_factory=dict)


def processed(scan: int) -> bool:
    """Whether a page on no stable node is processed in its own scan of this number, from 1 on."""
    return scan in YOUNG or (scan >= OLD_FROM and (scan - OLD_FROM) % PERIOD == 0)


def meet(ahead: int) -> int | None:
    """When two copies meet, one of which has been scanned for longer.

    Parameters
    ----------
    ahead : int
        Full scans by which the older one is ahead.

    Returns
    -------
    int, optional
        The younger one's own scan in which they merge; None: never. Its first scan does not count,
        since it only stores the checksum.
    """
    for scan in range(2, OLD_FROM + PERIOD):
        if processed(scan) and processed(scan + ahead):
            return scan
    return None


LATEST_MEETING: Final = max(m for ahead in range(300) if (m := meet(ahead)) is not None)


def forecast(
    pages: Pages,
    groups: Groups,
    rules: Rules,
    prediction: Prediction,
    group: Callable[[Pages], Groups],
) -> SmartScan:
    """The outcome with smart scan on.

    Parameters
    ----------
    pages, groups, rules
        As for `merge.predict`.
    prediction : Prediction
        With smart scan off.
    group : callable
        Groups pages, as `dedup.grouping.group` does.

    Returns
    -------
    SmartScan
        That of `prediction` where all pages become mergeable together. Copies that ksmd follows
        already and has not merged are of an age that can't be seen: they may merge or not.
    """
    unsure = _unsure(pages, groups, rules)
    count = len(unsure)
    if not count:
        return _of(prediction, prediction, never=(0, 0), scans=(2, 2))
    frames = pages.frames.copy()
    frames[unsure] |= Flag.VOLATILE
    apart = replace(pages, frames=frames)
    low = merge.predict(apart, group(apart), rules)
    return _of(low, prediction, never=(0, count), scans=(2, LATEST_MEETING))


def slowed(smart: SmartScan, kept: float, page_size: int) -> SmartScan:
    """The forecast for memory that is written to: a page must last from visit to visit.

    Parameters
    ----------
    smart : SmartScan
    kept : float
        Share of the merging pages that keep their content for that long, at the least.
    page_size : int
    """
    bounds = dict(smart.bounds)
    values: dict[str, Any] = {}
    for name in (*FIELDS, "pages_unshared_and_volatile"):
        value = getattr(smart, name)
        low, high = (value, value) if value is not None else bounds[name]
        if name == "pages_unshared_and_volatile":
            shared = _low(smart, "pages_shared") + _low(smart, "pages_sharing")
            high += round(shared * (1 - kept))
        elif name in {"general_profit", "saved_bytes"}:
            unit = "pages_sharing" if name == "general_profit" else "frames_freed"
            low -= round(max(0, _low(smart, unit)) * (1 - kept)) * page_size
        else:
            low = round(low * kept) if low > 0 else low
        if low != high:
            bounds[name] = (low, high)
            values[name] = None
    return replace(smart, **values, bounds=bounds)


def _low(smart: SmartScan, name: str) -> int:
    value = getattr(smart, name)
    return int(smart.bounds[name][0] if value is None else value)


def _unsure(pages: Pages, groups: Groups, rules: Rules) -> I64:
    """Which mappings may never meet a partner."""
    nobody = np.empty(0, np.int64)
    followed = np.array(
        [r.advised and pages.processes[r.process].ksm_rmap_items > 0 for r in pages.regions], bool
    )
    unmerged = groups.census.of(Flag.DUPLICATE | Flag.KSM, Flag.DUPLICATE)
    if not unmerged or not followed.any():
        return nobody
    parts = [_unsure_of(pages, piece, rules, followed) for piece in groups.pieces()]
    return np.concatenate(parts)


def _unsure_of(pages: Pages, groups: Groups, rules: Rules, followed: Bool) -> I64:
    """The same of some contents; ksmd follows some pages of the regions `followed`."""
    # What is merged altogether needs no closer look.
    sums = groups.sums(pages.frames, 0, (NO_FLAG, NO_FLAG))
    order, sizes = groups.of((sums.every & Flag.KSM) == 0)
    if not len(order):
        return np.empty(0, np.int64)
    word = pages.frames[order]
    frame = (word & FRAME_MASK).astype(np.int64)
    hidden = (word & Flag.HIDDEN) != 0
    frame[hidden] = -1 - order[hidden].astype(np.int64)
    ksm = (word & Flag.KSM) != 0
    old = followed[pages.region_of(order)] & ~ksm
    number = np.repeat(np.arange(len(sizes)), sizes)
    fresh = distinct(number[~old & ~ksm], frame[~old & ~ksm], len(sizes))
    aged = distinct(number[old], frame[old], len(sizes))
    # Two that are new merge with each other, and then the old ones find their node.
    unsure = (fresh < 2) & (aged >= 1) & (fresh + aged >= 2)
    # A node takes an old page in whenever it is visited, as long as it has room.
    on_nodes = np.bincount(number, ksm, len(sizes))
    unsure &= (on_nodes == 0) | (on_nodes + aged + fresh > rules.max_page_sharing)
    if rules.use_zero_pages:
        # To the shared zero page a page goes alone.
        unsure &= np.bincount(number, (word & Flag.ZERO) != 0, len(sizes)) == 0
    return np.asarray(order[unsure[number] & ~ksm])


def _of(
    low: Prediction, high: Prediction, *, never: tuple[int, int], scans: tuple[int, int]
) -> SmartScan:
    spans = {name: _between(low, high, name) for name in FIELDS}
    rest = [_between(low, high, name) for name in ("pages_unshared", "pages_volatile")]
    spans["pages_unshared_and_volatile"] = _together(low, high) or (
        rest[0][0] + rest[1][0],
        rest[0][1] + rest[1][1],
    )
    spans["never_merging_pages"] = never
    spans["full_scans"] = scans
    return SmartScan(
        **{name: s[0] if s[0] == s[1] else None for name, s in spans.items()},
        bounds={name: s for name, s in spans.items() if s[0] != s[1]},
    )


def _together(low: Prediction, high: Prediction) -> tuple[int, int] | None:
    """Unshared and volatile as one, where each prediction has one number for both."""
    sums = []
    for p in (low, high):
        if "pages_unshared" in p.bounds or "pages_volatile" in p.bounds:
            return None
        if p.pages_unshared is None or p.pages_volatile is None:
            return None
        sums.append(p.pages_unshared + p.pages_volatile)
    return min(sums), max(sums)


def _between(low: Prediction, high: Prediction, name: str) -> tuple[int, int]:
    spans = [steady.reach(p, name) for p in (low, high)]
    return min(s[0] for s in spans), max(s[1] for s in spans)
