"""Wait until ksmd has really converged.

The rule (mm/ksm.c): a merge shows two full scans after its memory is mergeable, a pair inside one
huge page one later, rmap_items of zero pages one later again. So: at least five full scans, then
all counters the same over two more.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dedup.errors import CheckFailed, KsmNotRunning
from dedup.kernel import vmstat

if TYPE_CHECKING:
    from collections.abc import Callable

    from dedup.kernel.ksm import Counters, Ksm

LEAST_SCANS: Final = 5
STILL_SCANS: Final = 2
POLL_SECONDS: Final = 0.004


@dataclass(frozen=True, slots=True)
class Convergence:
    """How long it took."""

    counters: Counters
    full_scans: int
    seconds: float
    broken_pages: float | None
    """Merged pages broken by writes in a full scan, at the end (cow_ksm), by whomever; None where
    the kernel does not count them."""


def converge(
    ksm: Ksm,
    timeout_seconds: float,
    progress: Callable[[Counters], None] | None = None,
    settled: Callable[[], tuple[int, ...]] | None = None,
    slack_pages: int = 0,
    least_scans: int = LEAST_SCANS + STILL_SCANS,
) -> Convergence:
    """Wait until the counters stand still. Read them once ksmd rests: a scan moves them.

    Parameters
    ----------
    ksm : Ksm
    timeout_seconds : float
    progress : callable, optional
        Called with the counters now and then.
    settled : callable, optional
        What must stand still; by default KSM's own counters.
    slack_pages : int
        By which figures may still move, where processes go on writing.
    least_scans : int
        Full scans to wait for in any case; with smart scan on, old pages are visited seldom.

    Raises
    ------
    CheckFailed
        Not within the time.
    KsmNotRunning
        Somebody stopped ksmd.
    """
    begin = time.monotonic()
    first = since = ksm.counters().full_scans
    last: tuple[int, ...] | None = None
    broken: int | None = None
    while True:
        now = ksm.counters()
        figures = settled() if settled else now.settled()
        # Pages that were written to since may have left the counters, and come back.
        events = vmstat.events().cow_ksm
        apart = 0 if events is None or broken is None else events - broken
        if last is None or any(
            abs(a - b) > slack_pages + apart for a, b in zip(figures, last, strict=True)
        ):
            last, since, broken = figures, now.full_scans, events
        # A scan is under way when the figures are read: one more makes it whole.
        if now.full_scans - first >= least_scans and now.full_scans - since > STILL_SCANS:
            return Convergence(
                counters=now,
                full_scans=now.full_scans - first,
                seconds=time.monotonic() - begin,
                broken_pages=None
                if events is None or broken is None
                else apart / (now.full_scans - since),
            )
        if progress is not None:
            progress(now)
        _require_running(ksm, begin, timeout_seconds, now, first)
        time.sleep(POLL_SECONDS)


def forgotten(ksm: Ksm, timeout_seconds: float) -> None:
    """Wait until ksmd follows no page any more, as after MADV_UNMERGEABLE by its only user.

    Full scans can't be counted then: ksmd stands still without work.

    Raises
    ------
    CheckFailed
        Not within the time.
    """
    end = time.monotonic() + timeout_seconds
    while ksm.counters().rmap_items:
        if time.monotonic() > end:
            raise CheckFailed(f"ksmd still follows pages after {timeout_seconds:.0f} s", "")
        time.sleep(POLL_SECONDS)


def _require_running(
    ksm: Ksm, begin: float, timeout_seconds: float, now: Counters, first: int
) -> None:
    if time.monotonic() - begin > timeout_seconds:
        raise CheckFailed(
            f"ksmd has not converged in {timeout_seconds:g} s "
            f"({now.full_scans - first} full scans)",
            "give it more time, or more pages a batch: "
            "`echo 5000 > /sys/kernel/mm/ksm/pages_to_scan`",
        )
    if not ksm.running:
        raise KsmNotRunning("ksmd was stopped by somebody else while we waited")
