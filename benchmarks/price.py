"""The price that dedup gives against what ksmd then takes: seconds and CPU until converged.

    sudo python benchmarks/price.py --calibrate
    sudo python benchmarks/price.py --test

The first stores a calibration; the second, another run, predicts with it. ksmd rests while memory
is laid out and scanned, then `run=1` is written, and time and ksmd's CPU are taken until the
counters of merged pages have their final values. Nobody else may use KSM meanwhile.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from dedup import calibration
from dedup.change.tunables import Tunables
from dedup.kernel import ksm as ksm_interface
from dedup.kernel.ksm import RUN_MERGE, RUN_STOP, RUN_UNMERGE, Ksm
from dedup.kernel.ksmd import Ksmd, tick_seconds
from dedup.model.cost import Calibration, Load, Settings, last_merge, price
from dedup.observe.calibrate import calibrate
from dedup.scanning import Plan, scan_pids
from dedup.selftest.cases import SubjectSpec
from dedup.selftest.run import Subject
from dedup.sources.live import Options

HUGE_BYTES = 2 << 20
POLL_SECONDS = 0.001
TIMEOUT_SECONDS = 60.0
QUIET = 0.03
SETTINGS = {"100/20": 8_000, "1000/20": 40_000, "5000/10": 40_000, "20000/0": 40_000}
"""pages_to_scan/sleep_millisecs, with the pages of a layout."""

Row = dict[str, Any]


def contents(name: str, pages: int) -> list[list[Any]]:
    """What a layout holds, page by page in the order of ksmd."""
    draw = random.Random(7)
    if name == "unique":
        return [["unique", pages]]
    if name == "identical":
        return [["same", pages]]
    if name == "zero":
        return [["zero", pages // 2], ["unique", pages // 2]]
    if name == "copies first":
        return [[f"c{i % 50}", 1] for i in range(pages // 2)] + [["unique", pages // 2]]
    if name == "pairs":
        return [[f"c{i % (pages // 2)}", 1] for i in range(pages)]
    if name == "copies":
        words = [f"c{i % (pages // 64)}" for i in range(pages)]
    elif name in {"mixed", "huge"}:
        words = ["unique"] * (pages * 4 // 10)
        words += [f"p{i // 2}" for i in range(pages * 3 // 10)]
        words += [f"d{i // 12}" for i in range(pages * 2 // 10)]
        words += ["common"] * (pages - len(words))
    else:
        raise ValueError(name)
    draw.shuffle(words)
    return [[w, 1] for w in words]


LAYOUTS = ("unique", "copies", "pairs", "mixed", "identical", "zero", "huge", "copies first")


class Bench:
    """Layouts under ksmd."""

    def __init__(self, tunables: Tunables, found: Calibration) -> None:
        self.ksm, self.ksmd, self.tunables, self.found = Ksm(), Ksmd(), tunables, found
        tunables.set("smart_scan", 0)
        tunables.set("advisor_mode", "none")

    def run(self, layout: str, setting: str, pages: int) -> Row:
        """Predict, merge, compare."""
        self.rest()
        self.tunables.set("use_zero_pages", int(layout == "zero"))
        pages_to_scan, sleep_millisecs = map(int, setting.split("/"))
        with Subject(SubjectSpec(()), HUGE_BYTES) as subject:
            kind = "huge" if layout == "huge" else "private"
            subject.tell("region", kind=kind, pages=contents(layout, pages), huge_bytes=HUGE_BYTES)
            subject.tell("advise", on=True)
            plan = Plan(options=Options(scope="advised"), interval_seconds=0.05, order_known=True)
            scan = scan_pids(subject.pids, plan)
            p = scan.prediction
            load = Load(
                pages_shared=p.pages_shared or 0,
                pages_sharing=p.pages_sharing or 0,
                pages_unshared=p.pages_unshared or 0,
                pages_volatile=p.pages_volatile or 0,
                ksm_zero_pages=p.ksm_zero_pages or 0,
                last_merge=last_merge(scan.pages, scan.groups),
            )
            settings = Settings(pages_to_scan, sleep_millisecs, tick_seconds())
            predicted = price(load, settings, self.found)
            self.tunables.set("pages_to_scan", pages_to_scan)
            self.tunables.set("sleep_millisecs", sleep_millisecs)
            seconds, cpu, waited = self.until_converged(load)
        self.rest()
        assert predicted.cpu_seconds is not None
        return {
            "layout": layout,
            "setting": setting,
            "pages": load.candidates,
            "seconds": seconds,
            "predicted_seconds": predicted.converge_seconds,
            "seconds_error": predicted.converge_seconds / seconds - 1,
            "waited_seconds": waited,
            "cpu_seconds": cpu,
            "predicted_cpu_seconds": predicted.cpu_seconds,
            "cpu_error": predicted.cpu_seconds / cpu - 1,
            "within": all(
                low <= actual <= high
                for actual, (low, high) in (
                    (seconds, predicted.bounds["converge_seconds"]),
                    (cpu, predicted.bounds["cpu_seconds"]),
                )
            ),
        }

    def until_converged(self, load: Load) -> tuple[float, float, float]:
        """From `run=1` until all that merges is merged: seconds, ksmd's CPU, its waits for one."""
        merges = load.pages_sharing + load.ksm_zero_pages > 0
        waited = self.ksmd.waited_ns() or 0
        begin, cpu = time.monotonic(), self.ksmd.cpu_ns()
        self.tunables.set("run", RUN_MERGE)
        while True:
            c = self.ksm.counters()
            seconds = time.monotonic() - begin
            now = (c.pages_shared, c.pages_sharing, c.ksm_zero_pages)
            final = (load.pages_shared, load.pages_sharing, load.ksm_zero_pages)
            if now == final and (merges or c.pages_unshared == load.pages_unshared):
                break
            if seconds > TIMEOUT_SECONDS:
                sys.exit(f"not converged: {c}, wanted {load}")
            time.sleep(POLL_SECONDS)
        used = self.ksmd.cpu_ns() - cpu
        waited = (self.ksmd.waited_ns() or 0) - waited
        self.tunables.set("run", RUN_STOP)
        return seconds, used / 1e9, waited / 1e9

    def rest(self) -> None:
        """Nothing merged, ksmd at the head of its list, awake for `run`."""
        self.tunables.set("run", RUN_UNMERGE)
        self.tunables.set("run", RUN_STOP)


def show(row: Row) -> None:
    """One line."""
    print(
        f"{row['layout']:13} {row['setting']:>8} {row['pages']:7,} pages: "
        f"{row['seconds']:7.3f} s, predicted {row['predicted_seconds']:7.3f} "
        f"({row['seconds_error']:+4.0%}); CPU {row['cpu_seconds']:6.3f} s, predicted "
        f"{row['predicted_cpu_seconds']:6.3f} ({row['cpu_error']:+4.0%}); "
        f"waited {row['waited_seconds']:5.3f} s"
        f"{'' if row['within'] else '  outside the range'}",
        flush=True,
    )


def main() -> None:
    """Calibrate, or measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--calibrate", action="store_true")
    what.add_argument("--test", action="store_true")
    parser.add_argument("--calibration", type=Path, default=calibration.PATH)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.calibrate:
        found = calibrate(args.calibration)
        print(json.dumps(found.calibration.to_json(), indent=2))
        return
    stored = calibration.load(args.calibration)
    if stored.calibration is None:
        sys.exit(stored.why or f"no calibration in {args.calibration}: --calibrate first")
    if others := ksm_interface.users():
        sys.exit(f"others use KSM: {others}")
    rows: list[Row] = []
    with Tunables(Ksm()) as tunables:
        bench = Bench(tunables, stored.calibration)
        for _ in range(args.rounds):
            for layout in args.layouts.split(","):
                for setting in args.settings.split(","):
                    rows.append(bench.run(layout, setting, SETTINGS[setting]))
                    show(rows[-1])
    seconds = statistics.fmean(abs(r["seconds_error"]) for r in rows)
    cpu = statistics.fmean(abs(r["cpu_error"]) for r in rows)
    within = sum(r["within"] for r in rows)
    print(
        f"mean error: time {seconds:.1%}, CPU {cpu:.1%}; {within} of {len(rows)} within both ranges"
    )
    quiet = [r for r in rows if r["waited_seconds"] < QUIET * r["seconds"]]
    if quiet:
        mean = statistics.fmean(abs(r["seconds_error"]) for r in quiet)
        print(
            f"ksmd had a processor at once in {len(quiet)} (waited less than {QUIET:.0%} of the "
            f"time): there time {mean:.1%}"
        )
    if args.json:
        machine = {"kernel": platform.release(), "taken": stored.calibration.taken}
        args.json.write_text(json.dumps({"machine": machine, "results": rows}, indent=2))


if __name__ == "__main__":
    main()
