"""Memory that is written to all the time: predicted against ksmd's own counters.

    sudo .venv/bin/python -m benchmarks.steady_state

Three redis-servers that all get the same steady stream of writes, and Python programs that rewrite
part of their heap. For each full-scan time: a scan while ksmd rests, then `pages_sharing` in the
mean over ten full scans. A redis with random writes over all its keys is drifting, and must be
called so.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.change.tunables import Tunables
from dedup.kernel.ksm import Ksm
from dedup.kernel.ksmd import tick_seconds
from dedup.pages import FRAME_MASK, Flag
from dedup.scanning import Plan, scan_pids
from dedup.sources.live import Options

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN: Final = [sys.executable, "-m", "dedup", "run", "--"]
SCANS: Final = 10
SETTLE_SCANS: Final = 6

WRITER: Final = """
import random, socket, sys, time
keys, every, rate, same, *paths = sys.argv[1:]
links = []
for path in paths:
    link = socket.socket(socket.AF_UNIX)
    link.connect(path)
    links.append(link)
sources = [random.Random(5 if same == "same" else i) for i in range(len(links))]
print("ready", flush=True)
begin, sent = time.monotonic(), 0
while True:
    due = int((time.monotonic() - begin) * int(rate))
    for link, source in zip(links, sources):
        batch = b"".join(
            b"SET key:%d %d-%0400x\\r\\n" % (k, k, source.getrandbits(1600))
            for k in (source.randrange(int(keys)) * int(every) for _ in range(due - sent))
        )
        link.sendall(batch)
        try:
            while link.recv(1 << 16, socket.MSG_DONTWAIT):
                pass
        except BlockingIOError:
            pass
    sent = due
    time.sleep(0.005)
"""

HEAP: Final = """
import random, sys, time
import numpy as np
seed = int(sys.argv[1])
table = np.random.default_rng(3).integers(0, 1 << 62, (20_000, 512))
names = {i: str(i) * 20 for i in range(60_000)}
source = random.Random(seed)
print("ready", flush=True)
begin, done = float(sys.argv[2]), 0
while True:
    due = int((time.time() - begin) * 1_000)
    for _ in range(due - done):
        # A quarter of the rows, some often and most of them seldom.
        row = int(5_000 * source.random() ** 4)
        table[row, source.randrange(512)] = source.getrandbits(62)
    done = due
    time.sleep(0.005)
"""

LOADS: Final = {
    "redis": (3_000, 20, 400, "same"),
    "redis-all-keys": (60_000, 1, 2_000, "same"),
    "redis-drifting": (60_000, 1, 2_000, "own"),
    "heap": (),
    "heap-drifting": (),
}
"""For redis: keys written to, of every so many, a second, and whether all servers get the same.

The heaps are written to with the same values in all processes, or each with its own.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    load: str
    full_scan_seconds: float
    predicted_full_scan_seconds: float
    interval_seconds: float
    looks: int
    drifting: bool | None
    predicted: int | None
    bounds: tuple[int, int] | None
    mean: float
    lowest: int
    highest: int
    one_look: float
    overstated_most: int | None
    really_overstated: float
    """`pages_sharing` less what pagemap says is shared, in the mean."""

    @property
    def error(self) -> float | None:
        """Of the prediction, as a share of the mean."""
        return None if self.predicted is None else self.predicted / self.mean - 1


@contextmanager
def program(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A program that says `ready`."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def redis_servers(folder: Path, load: str, keys: int = 60_000) -> Iterator[list[int]]:
    """Three servers with the same keys, and one who writes to all of them."""
    with ExitStack() as stack:
        pids, paths = [], []
        source = random.Random(7)
        commands = b"".join(
            b"SET key:%d %d-%0400x\r\n" % (k, k, source.getrandbits(1600)) for k in range(keys)
        )
        for i in range(3):
            path = folder / f"{i}.sock"
            process = subprocess.Popen(
                [*RUN, "redis-server", "--port", "0", "--save", "", "--unixsocket", str(path),
                 "--dir", str(folder)],
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.terminate)
            while True:
                with socket.socket(socket.AF_UNIX) as link, suppress(OSError):
                    link.connect(str(path))
                    break
                assert process.poll() is None
                time.sleep(0.02)
            subprocess.run(
                ["redis-cli", "-s", str(path), "--pipe"], input=commands, check=True,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            pids.append(process.pid)
            paths.append(str(path))
        words = map(str, LOADS[load])
        stack.enter_context(program([sys.executable, "-c", WRITER, *words, *paths]))
        yield pids


@contextmanager
def heaps(load: str) -> Iterator[list[int]]:
    """Three Python programs that rewrite part of their heap."""
    now = str(time.time())
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                program([*RUN, sys.executable, "-c", HEAP, "5" if load == "heap" else str(i), now])
            ).pid
            for i in range(3)
        ]


def wait_scans(ksm: Ksm, scans: int) -> None:
    """Wait for full scans of ksmd."""
    end = ksm.counters().full_scans + scans
    while ksm.counters().full_scans < end:
        time.sleep(0.005)


def ahead_of_memory(ksm: Ksm, pids: list[int]) -> int:
    """`pages_sharing` less the mappings that really share a KSM page now."""
    word = scan_pids(pids, Plan(options=Options(scope="advised"), passes=1)).pages.frames
    merged = word[(word & Flag.KSM) != 0] & FRAME_MASK
    return ksm.counters().pages_sharing - (len(merged) - len(np.unique(merged)))


def measure(load: str, pids: list[int], tunables: Tunables, ksm: Ksm, full: float) -> Row:
    """Scan while ksmd rests, then let it run, and compare."""
    tunables.set("run", 2)
    tunables.set("run", 0)
    pages = scan_pids(pids, Plan(options=Options(scope="advised"), passes=1)).scanned_pages
    # Sleeps make the time; each ends a tick late.
    batches = max(1, round(full / (0.02 + tick_seconds())))
    tunables.set("pages_to_scan", max(1, pages // batches))
    tunables.set("sleep_millisecs", 20)
    scan = scan_pids(pids, Plan(options=Options(scope="advised")))
    one = scan_pids(pids, Plan(options=Options(scope="advised"), passes=1))
    tunables.set("run", 1)
    wait_scans(ksm, SETTLE_SCANS)
    samples: list[int] = []
    first = ksm.counters().full_scans
    begin = time.monotonic()
    while (now := ksm.counters()).full_scans < first + SCANS:
        samples.append(now.pages_sharing)
        time.sleep(0.01)
    took = (time.monotonic() - begin) / SCANS
    ahead = [ahead_of_memory(ksm, pids) for _ in range(9)]
    prediction = scan.prediction
    return Row(
        load=load,
        full_scan_seconds=took,
        predicted_full_scan_seconds=scan.full_scan_seconds,
        interval_seconds=scan.interval_seconds,
        looks=scan.passes,
        drifting=scan.drifting,
        predicted=prediction.pages_sharing,
        bounds=prediction.bounds.get("pages_sharing"),
        mean=sum(samples) / len(samples),
        lowest=min(samples),
        highest=max(samples),
        one_look=float(one.prediction.pages_sharing or 0),
        overstated_most=scan.overstated_most_pages,
        really_overstated=sum(ahead) / len(ahead),
    )


def main() -> None:
    """Measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full-scans", default="0.5,1.5,6", help="seconds, by sleeps alone")
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    ksm = Ksm()
    rows: list[Row] = []
    with Tunables(ksm) as tunables, tempfile.TemporaryDirectory() as folder:
        tunables.set("smart_scan", 0)
        for load in arguments.loads.split(","):
            with ExitStack() as one:
                place = Path(folder) / load
                place.mkdir()
                begun = heaps(load) if load.startswith("heap") else redis_servers(place, load)
                pids = one.enter_context(begun)
                # Steady loads settle; a drifting one is caught on its way.
                time.sleep(3 if load.endswith("drifting") else 20)
                for full in map(float, arguments.full_scans.split(",")):
                    row = measure(load, pids, tunables, ksm, full)
                    rows.append(row)
                    error = "" if row.error is None else f"{row.error:+.2%}"
                    print(
                        f"{row.load:14} scan {row.full_scan_seconds:6.2f} s"
                        f" (said {row.predicted_full_scan_seconds:6.2f}), {row.looks} looks"
                        f" {row.interval_seconds:5.2f} s apart: predicted {row.predicted}"
                        f" {row.bounds or ''} mean {row.mean:.0f}"
                        f" ({row.lowest} to {row.highest}) {error}"
                        f" one look {row.one_look / row.mean - 1:+.1%}"
                        f" ahead {row.really_overstated:.0f} (said up to {row.overstated_most})"
                        f"{' DRIFTING' if row.drifting else ''}",
                        flush=True,
                    )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))


if __name__ == "__main__":
    main()
