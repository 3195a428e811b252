"""Live programs held against the kernel; run as root, it prints a table of all that are here.

sudo .venv/bin/python -m tests.live_programs
"""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dedup.change import verify
from dedup.change.apply import apply
from dedup.kernel.ksm import process_counters
from dedup.kernel.processes import Handle
from dedup.scanning import Plan, scan_pids
from dedup.sources.live import Options
from tests import programs
from tests.conftest import ksm_lock
from tests.kernel_fixtures import ksm_control

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dedup.model.prediction import Prediction
    from tests.kernel_fixtures import KsmControl

INSTANCES: Final = 3
SAVING: Final = ("pages_sharing", "ksm_zero_pages")


@dataclass(frozen=True, slots=True)
class Held:
    """Programs as predicted, and as the kernel counted them."""

    scanned_pages: int
    prediction: Prediction
    comparison: verify.Comparison
    processes: list[verify.Comparison]
    seconds: float

    @property
    def predicted(self) -> tuple[int, int]:
        """pages_sharing + ksm_zero_pages: the lowest and the highest."""
        c = self.comparison
        ranges = [c.bounds.get(n, (c.predicted[n] or 0, c.predicted[n] or 0)) for n in SAVING]
        return sum(r[0] for r in ranges), sum(r[1] for r in ranges)

    @property
    def actual(self) -> int:
        """pages_sharing + ksm_zero_pages."""
        return sum(self.comparison.actual[n] for n in SAVING)

    @property
    def difference(self) -> int:
        """Of the two: 0 where the actual number lies in the range."""
        low, high = self.predicted
        return min(0, self.actual - low) or max(0, self.actual - high)


@contextmanager
def started(names: Sequence[programs.Program], folder: Path, each: int) -> Iterator[list[int]]:
    """Some of each of these programs, warm and idle: all their processes, the oldest first."""
    with ExitStack() as stack:
        pids: list[int] = []
        for program in names:
            roots = [stack.enter_context(program.start(folder, i)) for i in range(each)]
            pids += [pid for root in roots for pid in programs.tree(root)]
        time.sleep(max(program.rest_seconds for program in names))
        programs.wait_until_idle(pids)
        yield pids


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """All their threads stopped."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for pid in pids:
            while _states(pid) != {"T"}:
                time.sleep(0.001)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _states(pid: int) -> set[str]:
    stats = Path(f"/proc/{pid}/task").glob("*/stat")
    return {stat.read_text().rpartition(")")[2].split()[0] for stat in stats}


def hold_stopped(ksm: KsmControl, pids: Sequence[int], *, order_known: bool = False) -> Held:
    """Predict, merge, read; the processes stopped from before the first look to the end."""
    plan = Plan(Options(scope="advised"), interval_seconds=0.2, order_known=order_known)
    begin = time.monotonic()
    with stopped(pids):
        scan = scan_pids(pids, plan)
        ksm.converge()
        seconds = time.monotonic() - begin
        processes = []
        for process, predicted in zip(scan.pages.processes, scan.prediction.processes, strict=True):
            with Handle(process.id.pid) as handle:
                actual = process_counters(handle)
            assert actual is not None
            processes.append(verify.compare_process(predicted, actual))
        found = verify.compare(scan.prediction, ksm.ksm.counters())
    return Held(scan.scanned_pages, scan.prediction, found, processes, seconds)


def hold_running(pids: Sequence[int]) -> Held:
    """The same by `apply`, the processes left running."""
    programs.wait_until_idle(pids)  # one that was stopped has timers to catch up with
    begin = time.monotonic()
    done = apply(pids, Plan(Options(scope="advised")), start_ksmd=True)
    seconds = time.monotonic() - begin
    assert not done.by_process, "others use KSM too"
    processes = [p.comparison for p in done.processes if p.comparison is not None]
    assert len(processes) == len(done.scan.pages.processes)
    return Held(
        done.scan.scanned_pages,
        done.scan.prediction,
        done.comparison,
        processes,
        seconds,
    )


def _row(name: str, processes: int, held: Held, running: Held) -> str:
    def number(h: Held) -> str:
        low, high = h.predicted
        return f"{low:,}" if low == high else f"{low:,} to {high:,}"

    off = 100 * running.difference / running.actual if running.actual else 0.0
    every = sum(bool(v) for c in (held.comparison, *held.processes) for v in c.difference.values())
    return (
        f"| {name} | {processes} | {held.scanned_pages:,} | {number(held)} | {held.actual:,} "
        f"| {held.difference} | {every} | {number(running)} | {running.actual:,} "
        f"| {running.difference} ({off:.2f} %) | {held.seconds:.1f} |"
    )


def main() -> None:
    """Print the table."""
    with ksm_lock(fcntl.LOCK_EX), tempfile.TemporaryDirectory() as name, ksm_control() as ksm:
        ksm.alone()
        print(
            "| program | processes | pages | predicted | actual | off | counters off "
            "| running: predicted | actual | off | s |\n"
            "|---|---|---|---|---|---|---|---|---|---|---|"
        )
        for program in programs.PROGRAMS:
            if program.missing:
                print(f"| {program.name} | {program.missing} |")
                continue
            with started([program], Path(name), INSTANCES) as pids:
                held = hold_stopped(ksm, pids)
                ksm.clear()
                print(_row(program.name, len(pids), held, hold_running(pids)), flush=True)
            ksm.clear()


if __name__ == "__main__":
    main()
