"""Instances predicted from three, then started: ``python -m benchmarks.capacity redis`` (as root).

Three instances are started and saved as `dedup scan --save` does. From those files the frames of 8
and 12 are predicted; then so many run, ksmd merges until nothing changes any more, and the frames
that they map are counted by their numbers in pagemap. All memory is mergeable from the start, ksmd
rests until the predictions stand.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dedup.estimate import fingerprints, key, store
from dedup.estimate.curve import Service
from dedup.estimate.rules import Rules
from dedup.report.summary import distinct_frames
from dedup.scanning import Plan, scan_pids
from dedup.sources.live import Options
from tests import programs
from tests.kernel_fixtures import STEADY_SCANS, KsmControl, ksm_control
from tests.live_programs import stopped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dedup.estimate.curve import Point
    from dedup.scanning import Scan

SAVED: Final = 3
PREDICTED: Final = (8, 12)
KEYS: Final = 30_000
POOL: Final = """
import os, sys, random
import numpy as np
rows = np.arange(200_000, dtype=np.float64).reshape(-1, 100)
table = {i: str(i) * 3 for i in range(20_000)}
for number in range(int(sys.argv[1])):
    if os.fork() == 0:
        own = [random.Random(number).randbytes(100) for _ in range(10_000)]
        some = sum(len(v) for v in table.values())
        os.write(1, b"1")
        sys.stdin.read()
        os._exit(0)
sys.stdin.read()
"""


def scan(pids: list[int], seed: int | None = None, *, looks: int = 2) -> Scan:
    plan = Plan(Options(scope="advised", seed=seed), passes=looks)
    return scan_pids(pids, plan)


def redis(own: int) -> programs.Start:
    """A redis-server with KEYS keys; so many of them have values that no other server has."""

    @contextmanager
    def start(folder: Path, number: int) -> Iterator[int]:
        with programs.redis(folder, number, 0) as pid:
            for first, last, seed in ((0, KEYS - own, 7), (KEYS - own, KEYS, 1000 + number)):
                source = random.Random(seed)
                commands = b"".join(
                    b"SET key:%d %0400x\r\n" % (k, source.getrandbits(1600))
                    for k in range(first, last)
                )
                subprocess.run(
                    ["redis-cli", "-s", str(folder / f"redis{number}.sock"), "--pipe"],
                    input=commands, check=True, stdout=subprocess.DEVNULL,
                )  # fmt: skip
            yield pid

    return start


def _python(*prefix: str) -> programs.Start:
    return programs.script([*prefix, sys.executable, "PROGRAM"], programs.PYTHON, ".py")


KINDS: Final[dict[str, programs.Start]] = {
    "redis": redis(0),
    "redis-half-own": redis(KEYS // 2),
    "python": _python(),
    "python-fixed": _python("setarch", "-R", "env", "PYTHONHASHSEED=0"),
}


@contextmanager
def pool(workers: int) -> Iterator[list[int]]:
    """Workers of one master, each with data of its own besides."""
    process = subprocess.Popen(
        [*programs.RUN, sys.executable, "-c", POOL, str(workers)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.read(workers) == b"1" * workers
        yield [pid for pid in programs.tree(process.pid) if pid != process.pid]
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


class Study:
    """Files of instances, and what is predicted from the first ones."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.key = key.of_file(folder / key.NAME)
        self.files: list[Path] = []

    def save(self, pids: list[int]) -> None:
        """Save those that are not saved yet, one file each."""
        for pid in pids[len(self.files) :]:
            path = self.folder / f"{len(self.files)}.dedup"
            one = fingerprints.of_scan(scan([pid], self.key.seed), self.key)
            store.save(one, path)
            self.files.append(path)

    def point(self, seen: int, instances: int) -> Point:
        """So many instances by the first ones."""
        service = Service(store.load_all(self.files[:seen]), Rules())
        if service.incidence.classes_suspected:
            print("  classes suspected:", service.incidence.private.round())
        return service.curve(instances)[-1]


def frames(pids: list[int]) -> int:
    return distinct_frames(scan(pids, looks=1).pages) or 0


def compare(control: KsmControl, study: Study, pids: list[int]) -> float:
    """Let ksmd merge, count the frames, and print how far off the prediction was."""
    n = len(pids)
    predicted = study.point(SAVED, n)
    study.save(pids)
    seen = study.point(n, n)
    with stopped(pids):
        before = frames(pids)
        control.converge(stop=False)
        after = frames(pids)
    # They go on, and write: at any moment some pages are not merged that were and will be.
    scans = control.ksm.counters().full_scans
    while control.ksm.counters().full_scans < scans + STEADY_SCANS:
        time.sleep(0.01)
    running = frames(pids)
    off = 100 * (predicted.frames - after) / after
    held = predicted.low_frames <= after <= predicted.high_frames
    print(
        f"  n={n}: frames predicted from {SAVED}: {predicted.frames:,} "
        f"({predicted.low_frames:,} to {predicted.high_frames:,}; lin {predicted.lin_frames:,}), "
        f"from all: {seen.frames:,}, counted: {after:,} stopped, {running:,} running: "
        f"{off:+.2f} %, {100 * (predicted.frames - running) / running:+.2f} % running"
        f"{'' if held else ', OUT OF THE INTERVAL'} | without KSM predicted "
        f"{predicted.without_ksm_frames:,}, counted {before:,}"
    )
    control.clear()
    return abs(off)


def run(kind: str, folder: Path, *, together: bool) -> float:
    worst = 0.0
    # Not beside the program: Python lists its folder, and a file more moves all its layout.
    study = Study(folder / "study")
    with ksm_control() as control, ExitStack() as stack:
        pids: list[int] = []
        if kind == "pool":
            workers = stack.enter_context(pool(max(PREDICTED)))
        for n in (SAVED, *PREDICTED):
            while len(pids) < n:
                if kind == "pool":
                    pids.append(workers[len(pids)])
                else:
                    pids.append(stack.enter_context(KINDS[kind](folder, len(pids))))
                if not together:
                    programs.wait_until_idle(pids)
            programs.wait_until_idle(pids)
            if n == SAVED:
                study.save(pids)
            else:
                worst = max(worst, compare(control, study, pids))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, "pool"], default=[*KINDS, "pool"])
    parser.add_argument("--within", type=float, default=2.0, metavar="PERCENT")
    parser.add_argument(
        "--together", action="store_true",
        help="start them at once: those of one second have clocks in their memory alike",
    )  # fmt: skip
    options = parser.parse_args()
    worst = 0.0
    for kind in options.kinds:
        print(kind)
        with tempfile.TemporaryDirectory() as folder:
            worst = max(worst, run(kind, Path(folder), together=options.together))
    print(f"the worst: {worst:.2f} %")
    return 0 if worst <= options.within else 1


if __name__ == "__main__":
    sys.exit(main())
