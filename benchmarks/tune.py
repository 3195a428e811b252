"""What `dedup tune` is worth: tunables set for a wish, and what ksmd then does.

    sudo .venv/bin/python -m benchmarks.tune --calibrate
    sudo .venv/bin/python -m benchmarks.tune --layouts copies --wishes within=4 --advisor

Memory is laid out and registered while ksmd rests; `dedup tune` finds tunables for the wish, and
they are applied as `--apply` does. Then `run=1` is written, and time and ksmd's CPU are taken until
the counters of merged pages have their predicted final values, and over later full scans. Nobody
else may use KSM meanwhile. All is put back at the end, whatever happens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.price import HUGE_BYTES, contents
from dedup import calibration, tuning
from dedup.change import tune
from dedup.change.tunables import Tunables
from dedup.kernel import ksm as ksm_interface
from dedup.kernel.ksm import RUN_MERGE, RUN_STOP, RUN_UNMERGE, Ksm
from dedup.kernel.ksmd import Ksmd
from dedup.model.wish import Alternative, Wish
from dedup.observe.calibrate import calibrate
from dedup.scanning import Plan
from dedup.selftest.cases import SubjectSpec
from dedup.selftest.run import Subject
from dedup.sources.live import Options

if TYPE_CHECKING:
    from dedup.model.cost import Load

PAGES = 64_000
LAYOUTS = {"copies": "each content 64 times", "unique": "70 % unique, the rest pairs"}
WISHES = "within=4,within=12,cpu=10"
POLL_SECONDS = 0.002
TIMEOUT_SECONDS = 240.0
LATER_SECONDS = 3.0
LATER_SCANS = 2
ADVISOR_SCANS = 20
"""Full scans after which the advisor has come to rest, more or less."""
SMART_SCANS = 12
SMART_CYCLE = 9
"""With smart scan the steady state begins so many full scans later, in cycles of as many."""

Row = dict[str, Any]


def layout(name: str) -> list[list[Any]]:
    """What a process holds, page by page."""
    if name == "copies":
        return contents("copies", PAGES)
    pairs = contents("pairs", PAGES * 3 // 10)
    # Evenly mixed: three pairs' pages, then seven unique ones.
    mixed: list[list[Any]] = []
    for i in range(0, len(pairs), 3):
        mixed += [*pairs[i : i + 3], ["unique", 7]]
    return mixed


class Bench:
    """ksmd with what was wished for."""

    def __init__(self, tunables: Tunables, state: Path, *, smart_scan: bool) -> None:
        self.ksm, self.ksmd, self.tunables, self.state = Ksm(), Ksmd(), tunables, state
        for name, value in (
            ("advisor_mode", "none"), ("use_zero_pages", 0), ("smart_scan", int(smart_scan)),
        ):  # fmt: skip
            if name in self.ksm.tunables():
                tunables.set(name, value)

    def rest(self) -> None:
        """Nothing merged, ksmd at the head of its list."""
        self.tunables.set("run", RUN_UNMERGE)
        self.tunables.set("run", RUN_STOP)

    def run(self, name: str, wish: Wish, *, advisor: bool) -> Row:
        """Wish, apply, merge, watch."""
        self.rest()
        with Subject(SubjectSpec(()), HUGE_BYTES) as subject:
            subject.tell("region", kind="private", pages=layout(name), huge_bytes=HUGE_BYTES)
            subject.tell("advise", on=True)
            plan = Plan(options=Options(scope="advised"), interval_seconds=0.05, order_known=True)
            found = tuning.tune(wish, subject.pids, plan)
            chosen = found.named("advisor" if advisor else "fixed")
            tune.apply(chosen.tunables, self.state)
            try:
                between = ADVISOR_SCANS if advisor else SMART_SCANS if found.smart_scan else 0
                measured = self.measure(
                    found.load, between, SMART_CYCLE if found.smart_scan else LATER_SCANS
                )
            finally:
                self.tunables.set("run", RUN_STOP)
                tune.undo(self.state)
        self.rest()
        return {"layout": name, "wish": words(wish), **priced(chosen), **measured}

    def measure(self, load: Load, scans_between: int, later_scans: int) -> Row:
        """From `run=1` until converged, and later."""
        final = (load.pages_shared, load.pages_sharing, load.ksm_zero_pages)
        waited = self.ksmd.waited_ns() or 0
        begin, cpu = time.monotonic(), self.ksmd.cpu_ns()
        scans = self.ksm.counters().full_scans
        passes = [(begin, cpu)]
        self.tunables.set("run", RUN_MERGE)
        while True:
            c = self.ksm.counters()
            now, used = time.monotonic(), self.ksmd.cpu_ns()
            if c.full_scans > scans + len(passes) - 1:
                passes.append((now, used))
            if (c.pages_shared, c.pages_sharing, c.ksm_zero_pages) == final:
                break
            if now - begin > TIMEOUT_SECONDS:
                sys.exit(f"not converged: {c}, wanted {final}")
            time.sleep(POLL_SECONDS)
        passes.append((now, used))
        between = [
            (b[1] - a[1]) / 1e9 / (b[0] - a[0])
            for a, b in itertools.pairwise(passes)
            if b[0] - a[0] > POLL_SECONDS * 10
        ]
        row = {
            "seconds": now - begin,
            "cpu_seconds": (used - cpu) / 1e9,
            "mean_cores": (used - cpu) / 1e9 / (now - begin),
            "busiest_cores": max(between),
            "waited_seconds": ((self.ksmd.waited_ns() or 0) - waited) / 1e9,
        }
        self.scanned(c.full_scans + 1 + scans_between)
        first = self.ksm.counters().full_scans
        begin, cpu = time.monotonic(), self.ksmd.cpu_ns()
        after = first
        while after < first + later_scans or (
            later_scans == LATER_SCANS and time.monotonic() - begin < LATER_SECONDS
        ):
            after = self.scanned(after + 1)
        seconds = time.monotonic() - begin
        return {
            **row,
            "full_scan_seconds": seconds / (after - first),
            "later_cores": (self.ksmd.cpu_ns() - cpu) / 1e9 / seconds,
            "later_pages_to_scan": int(self.ksm.tunables()["pages_to_scan"]),
        }

    def scanned(self, full_scans: int) -> int:
        """Wait for the end of a full scan; gives how many there were then."""
        end = time.monotonic() + TIMEOUT_SECONDS
        while (now := self.ksm.counters().full_scans) < full_scans:
            if time.monotonic() > end:
                sys.exit("ksmd makes no headway")
            time.sleep(POLL_SECONDS)
        return now


def words(wish: Wish) -> str:
    """A wish on a line."""
    within = f"within {wish.within_seconds:g} s" if wish.within_seconds else ""
    cpu = f"{wish.cores:.0%} of a core" if wish.cores else ""
    return ", ".join(w for w in (within, cpu) if w)


def priced(chosen: Alternative) -> Row:
    """What was predicted."""
    p = chosen.price
    return {
        "way": chosen.name,
        "tunables": chosen.tunables,
        "predicted_seconds": p.converge_seconds,
        "predicted_cpu_seconds": p.cpu_seconds,
        "predicted_busiest_cores": p.merging_cores,
        "predicted_full_scan_seconds": p.full_scan_seconds,
        "predicted_later_cores": p.steady_cores,
        "predicted_pages_to_scan": chosen.pages_to_scan,
    }


def wished(text: str) -> Wish:
    """A wish of its words: within=4, cpu=10."""
    name, _, number = text.partition("=")
    return Wish(float(number)) if name == "within" else Wish(cores=float(number) / 100)


def show(row: Row, wish: Wish) -> None:
    """Two lines."""
    off = ""
    if wish.within_seconds and row["way"] == "fixed":
        off = f" ({row['seconds'] / wish.within_seconds - 1:+.0%} of the wish)"
    print(
        f"{row['layout']:7} {row['wish']:14} {row['way']:8} merged in {row['seconds']:6.2f} s, "
        f"predicted {row['predicted_seconds']:6.2f}{off}; CPU {row['cpu_seconds']:.2f} s, "
        f"predicted {row['predicted_cpu_seconds']:.2f}; waited {row['waited_seconds']:.2f} s\n"
        f"{'':32}core: busiest scan {row['busiest_cores']:.1%} "
        f"({row['predicted_busiest_cores']:.1%}), mean {row['mean_cores']:.1%}, later "
        f"{row['later_cores']:.1%} ({row['predicted_later_cores']:.1%}); full scan "
        f"{row['full_scan_seconds']:.2f} s ({row['predicted_full_scan_seconds']:.2f}); "
        f"pages_to_scan {row['later_pages_to_scan']} ({row['predicted_pages_to_scan']})",
        flush=True,
    )


def main() -> None:
    """Wish, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--calibrate", action="store_true", help="even where one is stored")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--wishes", default=WISHES)
    parser.add_argument("--advisor", action="store_true", help="the kernel's, not fixed tunables")
    parser.add_argument("--smart-scan", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if others := ksm_interface.users():
        sys.exit(f"others use KSM: {others}")
    if args.calibrate or calibration.load().calibration is None:
        calibrate()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as state, Tunables(Ksm()) as tunables:
        bench = Bench(tunables, Path(state), smart_scan=args.smart_scan)
        for _ in range(args.rounds):
            for name in args.layouts.split(","):
                for wish in map(wished, args.wishes.split(",")):
                    rows.append(bench.run(name, wish, advisor=args.advisor))
                    show(rows[-1], wish)
    errors = [abs(r["seconds"] / r["predicted_seconds"] - 1) for r in rows]
    print(f"time until merged: mean error {statistics.fmean(errors):.1%}, worst {max(errors):.1%}")
    if args.json:
        machine = {"kernel": platform.release()}
        args.json.write_text(json.dumps({"machine": machine, "results": rows}, indent=2))


if __name__ == "__main__":
    main()
