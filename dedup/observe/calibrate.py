"""Measure what ksmd's visits cost on this host.

At rest, on memory of our own: one full scan at a time, told apart by a sleep of ksmd that only
the next order ends (mm/ksm.c, sleep_millisecs_store: a new value wakes it). Where others use KSM,
nothing is changed: ksmd's own scans are watched.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from dedup import calibration as store
from dedup.change.tunables import Tunables
from dedup.errors import CheckFailed, KsmNotRunning, NotPermitted, OutputFailed
from dedup.kernel import ksm as ksm_interface
from dedup.kernel.ksm import RUN_MERGE, RUN_STOP, RUN_UNMERGE, Ksm
from dedup.kernel.ksmd import Ksmd
from dedup.kernel.lock import STATE
from dedup.model import cost
from dedup.model.cost import Calibration, Costs, Measured
from dedup.selftest.cases import SubjectSpec
from dedup.selftest.run import Subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dedup.change.journal import Restored

    Progress = Callable[[str, int, int], None]

UNIQUE_PAGES: Final = (2000, 6000, 20_000, 64_000)
"""Sets of unique pages; none is more than a quarter of the free memory."""
UNIQUE_SCANS: Final = (7, 5, 3, 1)
"""Full scans of each after the second."""
COPIED_CONTENTS: Final = 200
PAIRS: Final = 4000
ZERO_PAGES: Final = 2000

ALL_PAGES: Final = 1_000_000_000
BATCH_PAGES: Final = 100
BATCH_SLEEP_MILLISECS: Final = 1
HELD_MILLISECS: Final = 60_000
STEADY_SCANS: Final = 5
BATCHED_SCANS: Final = 3
MERGES: Final = 3
"""How often a set is merged, and unmerged again."""
SMART_SCANS: Final = 8
"""Full scans after smart scan is switched on; the fifth, seventh and eighth skip everything."""

WAITING_LEAST_NS: Final = 4_000_000
"""A scan as long as that meets what else wants a processor."""

POLL_SECONDS: Final = 0.001
SCAN_TIMEOUT_SECONDS: Final = 60.0
OBSERVE_LEAST_SECONDS: Final = 3.0
OBSERVE_MOST_SECONDS: Final = 15.0
OBSERVE_WINDOWS: Final = 6
OBSERVE_PAGES: Final = 1000
"""Visits that a mean needs at the least."""


@dataclass(slots=True)
class Calibrated:
    """A finished calibration."""

    calibration: Calibration
    others: list[str] = field(default_factory=list)
    """Who else uses KSM: then ksmd's own scans were watched."""
    seconds: float = 0.0
    leftover: list[Restored] = field(default_factory=list)
    restored: list[Restored] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Planned:
    """What a calibration would do."""

    others: list[str]
    sets: list[str]
    """Of pages of our own to measure; empty where ksmd is watched."""
    tunables: dict[str, int | str]
    """What would be changed for its time; empty where ksmd is watched."""


def users(ksm: Ksm) -> list[str]:
    """Who uses KSM on this host; processes of other pid namespaces show by their pages alone."""
    found = [f"{name} (pid {pid})" for pid, name in ksm_interface.users().items()]
    if not found and (pages := ksm.counters().rmap_items):
        found = [f"{pages} pages of processes out of sight, or that have ended"]
    return found


def plan(ksm: Ksm | None = None) -> Planned:
    """What `calibrate` would do now.

    Raises
    ------
    Unsupported, KsmNotRunning
    """
    ksm = ksm or Ksm()
    ksm.require()
    Ksmd()
    others = users(ksm)
    if others:
        _require_running(ksm, others)
        return Planned(others, [], {})
    there = ksm.tunables()
    wanted: dict[str, int | str] = {
        "run": RUN_MERGE,
        "pages_to_scan": ALL_PAGES,
        "sleep_millisecs": HELD_MILLISECS,
        "smart_scan": 0,
        "use_zero_pages": 0,
        "advisor_mode": "none",
    }
    sets = [f"{n} unique pages" for n in UNIQUE_PAGES]
    sets += [f"{COPIED_CONTENTS} contents, {cost.COPIES} of each", f"{PAIRS} pairs"]
    sets += [f"{PAIRS} unique pages beside them", f"{ZERO_PAGES} zero pages"]
    return Planned([], sets, {k: v for k, v in wanted.items() if k in there})


def calibrate(
    path: Path = store.PATH, state: Path = STATE, progress: Progress | None = None
) -> Calibrated:
    """Measure, and store the result.

    Raises
    ------
    Unsupported, KsmNotRunning
        No KSM; or ksmd rests while others have mergeable memory, which is not ours to merge.
    NotPermitted, Busy
    CheckFailed
        Somebody changed the tunables or used KSM meanwhile, or ksmd made no headway.
    OutputFailed
    """
    begin = time.monotonic()
    ksm = Ksm()
    ksm.require()
    if not ksm.writable() or not os.access(_nearest(path), os.W_OK):
        raise NotPermitted("a calibration runs ksmd and writes " + str(path))
    ksmd = Ksmd()
    others = users(ksm)
    if others:
        _require_running(ksm, others)
        result = Calibrated(_observe(ksm, ksmd, progress), others)
    else:
        tunables = Tunables(ksm, state)
        with tunables:
            found = _Bench(ksm, ksmd, tunables, progress).run()
        result = Calibrated(found, leftover=tunables.leftover, restored=tunables.restored)
    store.save(result.calibration, path)
    result.seconds = time.monotonic() - begin
    return result


def _nearest(path: Path) -> Path:
    """The folder of a path that is there."""
    return next(p for p in path.absolute().parents if p.exists())


def _require_running(ksm: Ksm, others: list[str]) -> None:
    if not ksm.running:
        raise KsmNotRunning(
            f"others use KSM ({', '.join(others[:3])}), and ksmd rests: "
            "a measurement would merge their memory",
            "let ksmd run, `echo 1 > /sys/kernel/mm/ksm/run`, and its own scans are watched; "
            "what processes left that have ended goes with `echo 2 > /sys/kernel/mm/ksm/run`",
        )


def _calibration(
    costs: Costs, spread: float, waiting: float, measured: list[Measured] | None = None
) -> Calibration:
    return Calibration(
        costs=costs,
        machine=store.machine(),
        taken=datetime.now(UTC).isoformat(timespec="seconds"),
        spread=spread,
        waiting=waiting,
        observed=measured is None,
        measured=tuple(measured or ()),
    )


# -- on memory of our own --------------------------------------------------------------------------


class _Bench:
    """ksmd at our command, a full scan at a time."""

    def __init__(self, ksm: Ksm, ksmd: Ksmd, tunables: Tunables, progress: Progress | None) -> None:
        self.ksm, self.ksmd, self.tunables, self.progress = ksm, ksmd, tunables, progress
        self.has = ksm.tunables()
        self.spreads: list[float] = []
        self.waits: list[float] = []
        self.done = 0
        largest = max(UNIQUE_PAGES[1], os.sysconf("SC_AVPHYS_PAGES") // 4)
        self.sizes = sorted({min(n, largest) for n in UNIQUE_PAGES})

    def run(self) -> Calibration:
        for name, value in (
            ("advisor_mode", "none"),
            ("smart_scan", 0),
            ("use_zero_pages", 0),
            ("pages_to_scan", ALL_PAGES),
            ("sleep_millisecs", HELD_MILLISECS),
        ):
            if name in self.has:
                self.tunables.set(name, value)
        self._rest()
        early = self._copies()
        unique = [
            self._unique(n, scans) for n, scans in zip(self.sizes, UNIQUE_SCANS, strict=False)
        ]
        # Twice, some seconds apart: merges are short enough for one burst of other work.
        copies = _less(early, self._copies())
        pairs, beside = self._pairs()
        zero = self._zero()
        costs = cost.fit(unique, copies, pairs, beside, zero)
        self._rest()
        self.tunables.require_unchanged()
        return _calibration(
            costs,
            statistics.median(self.spreads),
            statistics.median(self.waits),
            [*unique, copies, pairs, beside, zero],
        )

    def _unique(self, pages: int, scans: int) -> Measured:
        small = pages == self.sizes[0]
        batched = skipped = 0.0
        with self._set([["unique", pages]]):
            first, second = self._two(pages)
            # Nothing merges, so that the second scan is like all later ones.
            steady = self._middle([second, *(self._scan() for _ in range(scans))])
            if small:
                batched = self._batched(BATCH_PAGES)
                skipped = self._skipped()
        return Measured(
            f"{pages} unique", pages, first, second, steady,
            batched, BATCH_PAGES if small else 0, skipped,
        )  # fmt: skip

    def _copies(self) -> Measured:
        contents = [[f"copies {c}", 1] for c in range(COPIED_CONTENTS)]
        pages = COPIED_CONTENTS * cost.COPIES
        with self._set(contents * cost.COPIES):
            first, second = self._merges(pages)
            steady = self._steady()
            batched = self._batched(BATCH_PAGES)
        return Measured(
            f"{COPIED_CONTENTS} contents, {cost.COPIES} of each", pages, first, second, steady,
            batched, BATCH_PAGES,
        )  # fmt: skip

    def _pairs(self) -> tuple[Measured, Measured]:
        pages = 2 * PAIRS
        contents = [[f"pairs {c}", 1] for c in range(PAIRS)]
        with self._set(contents * 2) as subject:
            pairs = Measured(f"{PAIRS} pairs", pages, *self._merges(pages), self._steady())
            subject.tell("region", kind="private", pages=[["unique", PAIRS]])
            subject.tell("advise", on=True)
            first, second = self._scan(), self._scan()
            beside = Measured(
                f"{PAIRS} unique beside them", pages + PAIRS, first, second, self._steady()
            )
        return pairs, beside

    def _zero(self) -> Measured:
        if "use_zero_pages" in self.has:
            self.tunables.set("use_zero_pages", 1)
        with self._set([["zero", ZERO_PAGES]]):
            first, second = self._merges(ZERO_PAGES)
        if "use_zero_pages" in self.has:
            self.tunables.set("use_zero_pages", 0)
        return Measured(f"{ZERO_PAGES} zero", ZERO_PAGES, first, second, 0.0)

    @contextmanager
    def _set(self, pages: list[list[object]]) -> Iterator[Subject]:
        """A process with these pages, mergeable; ksmd starts at the head of its list."""
        if self.progress is not None:
            self.progress("sets measured", self.done, len(self.sizes) + 4)
        self._rest()
        with Subject(SubjectSpec(()), 0) as subject:
            answer = subject.tell("region", kind="private", pages=pages)
            if "error" in answer:
                raise OutputFailed(f"no memory to measure with: {answer['error']}", "")
            subject.tell("advise", on=True)
            yield subject
        self.done += 1

    def _rest(self) -> None:
        self.tunables.set("run", RUN_UNMERGE)
        self.tunables.set("run", RUN_STOP)
        # Out of its long sleep: `run` wakes it only where it waits for that.
        self._wake()

    def _two(self, pages: int) -> tuple[float, float]:
        """CPU of the first full scan, and of the second."""
        before = self.ksm.counters().pages_scanned
        first = self._scan()
        visited = self.ksm.counters().pages_scanned - before
        if visited != pages:
            # Nothing is merged yet: a first scan takes checksums.
            raise CheckFailed(
                f"ksmd visited {visited} pages and not the {pages} of our own: "
                "a process out of sight uses KSM (in another pid namespace?)",
                "let ksmd run, and calibrate from its own scans in that namespace",
            )
        return first, self._scan()

    def _merges(self, pages: int) -> tuple[float, float]:
        """The same of several times, all unmerged between them."""
        both = []
        for i in range(MERGES):
            if i:
                self._rest()
            both.append(self._two(pages))
        return statistics.median(b[0] for b in both), self._middle([b[1] for b in both])

    def _steady(self) -> float:
        return self._middle([self._scan() for _ in range(STEADY_SCANS)])

    def _middle(self, found: list[float]) -> float:
        middle = statistics.median(found)
        self.spreads.append((max(found) - min(found)) / middle)
        return middle

    def _scan(self) -> float:
        """CPU of one full scan in one batch, ksmd asleep before and after it."""
        before, cpu = self.ksm.counters().full_scans, self.ksmd.cpu_ns()
        waited = self.ksmd.waited_ns() or 0
        self._go()
        self._wait(before + 1)
        used = self._asleep_ns() - cpu
        if used > WAITING_LEAST_NS:
            self.waits.append(((self.ksmd.waited_ns() or 0) - waited) / used)
        return float(used)

    def _go(self) -> None:
        if not self.ksm.running:
            self.tunables.set("run", RUN_MERGE)
        else:
            self._wake()

    def _wake(self) -> None:
        odd = int(self.ksm.tunables()["sleep_millisecs"]) % 2
        self.tunables.set("sleep_millisecs", HELD_MILLISECS + 1 - odd)

    def _wait(self, full_scans: int) -> None:
        end = time.monotonic() + SCAN_TIMEOUT_SECONDS
        while self.ksm.counters().full_scans < full_scans:
            if time.monotonic() > end:
                raise CheckFailed(
                    f"ksmd did no full scan in {SCAN_TIMEOUT_SECONDS:.0f} s: is it running?",
                    "see `cat /sys/kernel/mm/ksm/run`",
                )
            time.sleep(POLL_SECONDS)

    def _asleep_ns(self) -> int:
        """CPU of ksmd once it sleeps again: it is not brought up to date before."""
        last = -1
        while (now := self.ksmd.cpu_ns()) != last:
            last = now
            time.sleep(POLL_SECONDS)
        return now

    def _batched(self, pages: int) -> float:
        """CPU of a full scan in small batches, with sleeps between them."""
        self.tunables.set("pages_to_scan", pages)
        self._wait_next(BATCH_SLEEP_MILLISECS)
        found = []
        for _ in range(BATCHED_SCANS):
            before = self.ksmd.cpu_ns()
            self._wait(self.ksm.counters().full_scans + 1)
            found.append(float(self.ksmd.cpu_ns() - before))
        self.tunables.set("pages_to_scan", ALL_PAGES)
        self._wait_next(HELD_MILLISECS)
        # Not exact to the batch, since ksmd goes on; and a burst of other work is no cost of it.
        return statistics.median(found)

    def _wait_next(self, sleep_millisecs: int) -> None:
        """Sleep otherwise from now on; wait for the end of the scan that this begins."""
        begin = self.ksm.counters().full_scans
        self.tunables.set("sleep_millisecs", sleep_millisecs)
        self._wait(begin + 1)
        if sleep_millisecs >= HELD_MILLISECS:
            self._asleep_ns()

    def _skipped(self) -> float:
        """CPU of a full scan in which smart scan skips all; the mean of its cycle of eight."""
        if "smart_scan" not in self.has:
            return 0.0
        self.tunables.set("smart_scan", 1)
        found = []
        for _ in range(SMART_SCANS):
            before = self.ksm.counters().pages_scanned
            ns = self._scan()
            if self.ksm.counters().pages_scanned == before:
                found.append(ns)
        self.tunables.set("smart_scan", 0)
        return statistics.fmean(found) if found else 0.0


def _less(one: Measured, other: Measured) -> Measured:
    """Of two measurements of a set, what each scan took at the least."""
    return one._replace(
        first_ns=min(one.first_ns, other.first_ns),
        second_ns=min(one.second_ns, other.second_ns),
        steady_ns=min(one.steady_ns, other.steady_ns),
        batched_ns=min(one.batched_ns, other.batched_ns),
    )


# -- on what ksmd does anyway ----------------------------------------------------------------------


def _observe(ksm: Ksm, ksmd: Ksmd, progress: Progress | None) -> Calibration:
    """Mean CPU of a visit, over a full scan or some seconds; nothing is changed."""
    begin = time.monotonic()
    start = ksm.counters()
    marks = [(start.pages_scanned, ksmd.cpu_ns())]
    waited = ksmd.waited_ns() or 0
    step = OBSERVE_LEAST_SECONDS / OBSERVE_WINDOWS
    while True:
        time.sleep(step)
        now = ksm.counters()
        marks.append((now.pages_scanned, ksmd.cpu_ns()))
        seconds = time.monotonic() - begin
        if progress is not None:
            progress("seconds watched", int(seconds), int(OBSERVE_MOST_SECONDS))
        enough = now.pages_scanned - start.pages_scanned >= OBSERVE_PAGES
        # The first that ends had begun before.
        whole = now.full_scans >= start.full_scans + 2
        if seconds >= OBSERVE_MOST_SECONDS or (
            enough and whole and seconds >= OBSERVE_LEAST_SECONDS
        ):
            break
    pages = marks[-1][0] - marks[0][0]
    if pages < OBSERVE_PAGES or not ksm.running:
        raise CheckFailed(
            f"ksmd visited {pages} pages in {seconds:.0f} s: too few for a mean",
            "give it more pages a batch, `echo 1000 > /sys/kernel/mm/ksm/pages_to_scan`",
        )
    used = marks[-1][1] - marks[0][1]
    mean = used / pages
    waiting = ((ksmd.waited_ns() or 0) - waited) / used if used else 0.0
    windows = [
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for earlier, later in itertools.pairwise(marks)
        if later[0] > earlier[0]
    ]
    spread = statistics.pstdev(windows) / mean if mean else 0.0
    costs = Costs(
        first_ns=mean, tree_ns=mean, tree_log2_ns=0, stable_log2_ns=0, merged_ns=mean,
        merged_node_ns=0, node_ns=0, join_ns=0, zero_ns=mean, skip_ns=0, batch_ns=0, cold_ns=0,
    )  # fmt: skip
    return _calibration(costs, spread, waiting)
