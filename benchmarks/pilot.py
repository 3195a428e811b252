"""Pilots held against KSM: ``python -m benchmarks.pilot python perl`` (as root).

For each program and each setting: a pilot as `dedup capacity --pilot CMD --settings` makes it says
how many pages merge. Then the same copies are started anew, this time with mergeable memory, as
`dedup run` starts them, and ksmd merges until nothing changes any more. Between the two lies what
differs from one start to the next: how much, is told by a scan of those copies just before.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dedup.change import pilot
from dedup.change.copies import Copies
from dedup.estimate import capacity
from dedup.estimate.settings import SETTINGS
from dedup.report.pilot import further_frames, merged
from dedup.scanning import Plan, scan_pids
from dedup.sources.live import Options
from tests import programs
from tests.kernel_fixtures import ksm_control
from tests.live_programs import stopped

if TYPE_CHECKING:
    from collections.abc import Callable

    from dedup.change.pilot import Trial

COPIES: Final = 3
KEYS: Final = 30_000
MODULES: Final = """
import asyncio, ctypes, decimal, email.message, http.client, json, logging, multiprocessing
import sqlite3, sys, unittest, xml.dom.minidom
table = {i: str(i) * 3 for i in range(20_000)}
names = {f"name {i}": i for i in range(20_000)}
print("ready", flush=True)
sys.stdin.read()
"""
REDIS: Final = """
redis-server --port 0 --unixsocket $1/socket --save '' --dir $1 &
until redis-cli -s $1/socket ping | grep -q PONG; do sleep 0.1; done
redis-cli -s $1/socket --pipe < $2 > $1/loaded && echo ready
wait
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """A program."""

    text: str
    words: Callable[[Path], tuple[str, ...]]
    """With the path of the text."""
    rest_seconds: float = 0.0
    """Until its memory has the size that it keeps."""


def _redis(path: Path) -> tuple[str, ...]:
    source, keys = random.Random(7), path.with_name("keys")
    keys.write_text(
        "".join(f"SET key:{k} {source.getrandbits(1600):0400x}\r\n" for k in range(KEYS))
    )
    return "sh", str(path), "{dir}", str(keys)


KINDS: Final = {
    "python": Kind(MODULES, lambda path: (sys.executable, str(path))),
    "python-numpy": Kind(programs.PYTHON, lambda path: (sys.executable, str(path))),
    "perl": Kind(programs.PERL, lambda path: ("perl", str(path))),
    # V8 collects garbage and gives memory back when nothing has happened for 8 s.
    "node": Kind(programs.NODE, lambda path: ("node", str(path)), rest_seconds=12),
    "redis": Kind(REDIS, _redis),
}


def against_ksm(trial: Trial, rest_seconds: float) -> tuple[int, int, int]:
    """The same copies with mergeable memory: pages, merges predicted just before, and counted."""
    with ksm_control() as control, Copies(COPIES) as copies:
        control.alone()
        start = replace(trial.start, words=(*programs.RUN, *trial.start.words))
        for number in range(1, COPIES + 1):
            copies.start(number, start, "^ready")
            copies.look(pilot.STAGGER_SECONDS)
        while not all(copy.pattern_seen for copy in copies.running.values()):
            copies.look(pilot.TURN_SECONDS)
        time.sleep(rest_seconds)
        pids = [pid for some in copies.processes().values() for pid in some]
        programs.wait_until_idle(pids)
        with stopped(pids):
            scan = scan_pids(pids, Plan(Options(scope="advised"), passes=1))
            low, high = merged(replace(trial, scan=scan))
            counters = control.converge()
    assert low == high
    return scan.scanned_pages, low, counters.pages_sharing + counters.ksm_zero_pages


def run(name: str, folder: Path) -> float:
    """All settings of a program; the largest difference, per cent of its pages."""
    kind = KINDS[name]
    path = folder / "program"
    path.write_text(kind.text)
    wish = pilot.Wish(
        kind.words(path), copies=COPIES, settings=SETTINGS,
        ready=pilot.parse_ready(f"{kind.rest_seconds}s" if kind.rest_seconds else "^ready"),
    )  # fmt: skip
    begin = time.monotonic()
    found = pilot.run(wish)
    seconds = time.monotonic() - begin
    print(f"{name}: pilot of {len(found.trials)} settings in {seconds:.1f} s")
    worst = 0.0
    for trial in found.trials:
        low, high = merged(trial)
        pages, again, actual = against_ksm(trial, kind.rest_seconds)
        plan = capacity.of_instances(trial.instances, capacity.Wish())
        off = 100 * (min(0, actual - low) or max(0, actual - high)) / trial.scan.scanned_pages
        worst = max(worst, abs(off))
        print(
            f"  {trial.setting.title}: {trial.scan.scanned_pages:,} pages, "
            f"{low:,}{f' to {high:,}' if high != low else ''} merge by the pilot; "
            f"started again {pages:,}, {again:,} by a scan of these, {actual:,} by KSM: "
            f"{off:+.2f} % of the pages; {further_frames(plan):,} frames each more",
            flush=True,
        )
    for omitted in found.omitted:
        print(f"  {omitted.setting.title}: not tried, {omitted.why}")
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--within", type=float, default=2.0, metavar="PERCENT")
    options = parser.parse_args()
    worst = 0.0
    for name in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            worst = max(worst, run(name, Path(folder)))
    print(f"the worst: {worst:.2f} % of the pages")
    return 0 if worst <= options.within else 1


if __name__ == "__main__":
    sys.exit(main())
