"""Instances predicted from three, then started: ``python -m benchmarks.capacity redis`` (as root).

Three instances are started and saved as `dedup scan --save` does. From those files the frames of 8
and 12 are predicted; then so many run, ksmd merges until nothing changes any more, and the frames
that they map are counted by their numbers in pagemap. All memory is mergeable from the start, of
guests what QEMU marks; ksmd rests until the predictions stand. `--mix redis=6,python=6` does the
same for services together, three of each saved.
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

from benchmarks import guests
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
REST_SECONDS: Final = {"guest": 3, "node": 10}
"""Until the memory has the size that it keeps: V8 gives some back after 8 s."""
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
    "node": programs.script(["node", "PROGRAM"], programs.NODE, ".js"),
    "perl": programs.script(["perl", "PROGRAM"], programs.PERL, ".pl"),
    "php": programs.script(["php", "PROGRAM"], programs.PHP, ".php"),
    "java": programs.script(["java", "-Xmx256m", "PROGRAM"], programs.JAVA, ".java"),
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
        self.files: dict[str, list[Path]] = {}

    def save(self, pids: list[int], label: str) -> None:
        """Save those that are not saved yet, one file each."""
        files = self.files.setdefault(label, [])
        for pid in pids[len(files) :]:
            path = self.folder / f"{label}-{len(files)}.dedup"
            one = fingerprints.of_scan(scan([pid], self.key.seed), self.key, label)
            store.save(one, path)
            files.append(path)

    def point(self, wanted: dict[str, int], seen: int | None = None) -> Point:
        """So many instances of each service, by its first ones or all."""
        files = [path for label in wanted for path in self.files[label][:seen]]
        service = Service(store.load_all(files), Rules(), wanted)
        if service.incidence.classes_suspected:
            print("  classes suspected:", service.incidence.private.round())
        return service.curve(1)[0]


def frames(pids: list[int]) -> int:
    found = scan(pids, looks=1)
    return distinct_frames(found.pages, found.groups) or 0


def compare(control: KsmControl, study: Study, running: dict[str, list[int]]) -> float:
    """Let ksmd merge, count the frames, and print how far off the prediction was."""
    wanted = {label: len(pids) for label, pids in running.items()}
    predicted = study.point(wanted, SAVED)
    for label, those in running.items():
        study.save(those, label)
    seen = study.point(wanted)
    pids = [pid for those in running.values() for pid in those]
    with stopped(pids):
        before = frames(pids)
        control.converge(stop=False)
        after = frames(pids)
    # They go on, and write: at any moment some pages are not merged that were and will be.
    scans = control.ksm.counters().full_scans
    while control.ksm.counters().full_scans < scans + STEADY_SCANS:
        time.sleep(0.01)
    moving = frames(pids)
    off = 100 * (predicted.frames - after) / after
    held = predicted.low_frames <= after <= predicted.high_frames
    print(
        f"  n={'+'.join(map(str, wanted.values()))}: frames predicted from {SAVED}: "
        f"{predicted.frames:,} ({predicted.low_frames:,} to {predicted.high_frames:,}; lin "
        f"{predicted.lin_frames:,}), "
        f"from all: {seen.frames:,}, counted: {after:,} stopped, {moving:,} running: "
        f"{off:+.2f} %, {100 * (predicted.frames - moving) / moving:+.2f} % running"
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
                    wait(kind, pids)
            wait(kind, pids)
            if n == SAVED:
                study.save(pids, kind)
            else:
                worst = max(worst, compare(control, study, {kind: pids}))
    return worst


def run_mix(mix: dict[str, int], folder: Path) -> float:
    study = Study(folder / "study")
    with ksm_control() as control, ExitStack() as stack:
        running: dict[str, list[int]] = {kind: [] for kind in mix}
        for last in (False, True):
            for place, (kind, n) in enumerate(mix.items()):
                while len(running[kind]) < (n if last else SAVED):
                    number = 100 * place + len(running[kind])
                    running[kind].append(stack.enter_context(KINDS[kind](folder, number)))
                    wait(kind, running[kind])
            if not last:
                for kind, pids in running.items():
                    study.save(pids, kind)
        return compare(control, study, running)


def wait(kind: str, pids: list[int]) -> None:
    """Until they rest; guests never do: a machine has a clock."""
    if kind != "guest":
        programs.wait_until_idle(pids)
    time.sleep(REST_SECONDS.get(kind, 0))


def mix_of(text: str) -> dict[str, int]:
    """Kinds and numbers of `redis=6,python=6`."""
    found = {kind: int(n) for kind, _, n in (part.partition("=") for part in text.split(","))}
    if not all(kind in KINDS and n >= SAVED for kind, n in found.items()):
        raise ValueError(text)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    every = [*KINDS, "pool", "guest"]
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(every))
    parser.add_argument("--mix", type=mix_of, action="append", default=[], metavar="KIND=N,...")
    parser.add_argument("--within", type=float, default=2.0, metavar="PERCENT")
    parser.add_argument(
        "--together", action="store_true",
        help="start them at once: those of one second have clocks in their memory alike",
    )  # fmt: skip
    options = parser.parse_args()
    unknown = set(options.kinds) - set(every)
    if unknown:
        parser.error(f"no such kinds: {', '.join(unknown)}")
    worst = 0.0
    for kind in options.kinds or ([] if options.mix else every):
        print(kind, flush=True)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if kind == "guest":
                KINDS[kind] = guests.Linux(folder / "linux").start
            worst = max(worst, run(kind, folder, together=options.together))
    for mix in options.mix:
        print(" + ".join(mix), flush=True)
        with tempfile.TemporaryDirectory() as name:
            worst = max(worst, run_mix(mix, Path(name)))
    print(f"the worst: {worst:.2f} %")
    return 0 if worst <= options.within else 1


if __name__ == "__main__":
    sys.exit(main())
