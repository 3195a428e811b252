"""A sample against the full scan: error, coverage of the ranges, time.

``python -m benchmarks.sample --trials 40``, and, as root, ``--live`` and ``--time --gib 12``.

* Without more: memory made of numbers, several shapes of duplication, the sampling itself done by
  chance, the estimator the one that a scan has. A row is a shape and a rate: the error of
  `frames_freed` in points of memory (percentage points of its frames), within which 95 of 100
  trials are, how often the range held the truth, how wide it was.
* ``--live``: redis-servers and Python processes with NumPy, whose pages are hashed once; samples
  of those pages, with the flags and frames that they have, against the model on all of them.
* ``--time``: real memory of a size, full scan and sample in turn, from the first page to the
  prediction, two looks each with no time between them (or ``--passes``); a sample's time has
  the import of what estimates in it, for each is a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.speed import target
from dedup import grouping
from dedup.estimate import sampled, unseen
from dedup.estimate.sampled import Present
from dedup.estimate.unseen import Seen, Span, Unseen
from dedup.model import merge
from dedup.model.prediction import FIELDS, Rules
from dedup.pages import FRAME_MASK, Flag, Pages
from dedup.sources.live import LiveSource, Options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    I64 = NDArray[np.int64]

LIMIT = 256
POINTS = 0.02

TIMED = """
import json, sys, time
from dedup import sampling, scanning
from dedup.sources.live import Options
pid, rate, passes = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
plan = scanning.Plan(
    options=Options(), passes=passes, interval_seconds=0.01,
    assumed={"max_page_sharing": 256, "use_zero_pages": 0, "merge_across_nodes": 1},
)
begin = time.perf_counter()
scan = sampling.sample_pids([pid], rate, plan) if rate else scanning.scan_pids([pid], plan)
seconds = time.perf_counter() - begin
found = scan.prediction
span = found.bounds.get("frames_freed", (found.frames_freed,) * 2)
point = scan.estimate.point["frames_freed"] if rate else found.frames_freed
print(json.dumps([seconds, point, span, len(scan.pages.hashes)]))
"""


def shapes(frames: int, rng: np.random.Generator) -> dict[str, I64]:
    """How many frames each content has, by the name of the shape."""
    single = np.ones(frames, np.int64)
    heavy = np.minimum(rng.zipf(1.5, frames // 8), 100_000)
    heavy = heavy[np.cumsum(heavy) < 0.9 * frames]
    tail = rng.zipf(2.2, frames)
    tail = tail[np.cumsum(tail) < frames]
    return {
        "nothing duplicate": single,
        "pairs only": np.full(frames // 2, 2),
        "half unique, half threes": np.repeat([1, 3], [frames // 2, frames // 6]),
        "tens only": np.full(frames // 10, 10),
        "few heavy contents": np.append(np.full(100, frames // 400), single[: frames * 3 // 4]),
        "Zipf 1.5": np.append(heavy, single[: frames - int(heavy.sum())]),
        "Zipf 2.2": np.append(tail, single[: frames - int(tail.sum())]),
        "geometric, mean 5": rng.geometric(0.2, frames // 5),
        "mixed": np.repeat(
            [1, 2, 5, 20, frames // 8],
            [frames // 2, frames // 16, frames // 40, frames // 160, 1],
        ),
        "like virtual machines": np.concatenate(
            [
                single[: int(frames * 0.55)],
                np.repeat([2, 4, 8], [int(frames * 0.03), frames // 100, frames // 100]),
                np.minimum(rng.zipf(1.3, 2_000), frames // 100),
                [frames // 5],
            ]
        ),
    }


def left_over(copies: I64) -> int:
    """Frames that stay once everything has merged."""
    q, r = np.divmod(copies, LIMIT)
    return int((q + (r > 0)).sum())


def row(name: str, rate: float, off: list[float], held: list[bool], wide: list[float]) -> Any:
    """Figures of some trials, printed."""
    figures: dict[str, Any] = {
        "name": name,
        "rate": rate,
        "trials": len(off),
        "error_95_points": float(np.quantile(np.abs(off), 0.95)) * 100,
        "within_2_points": float(np.mean(np.abs(off) <= POINTS)),
        "held": float(np.mean(held)),
        "width_points": statistics.fmean(wide) * 100,
    }
    print(
        "{name:<26} {rate:>5.1%} {trials:>4} trials: 95% within {error_95_points:5.2f} points, "
        "within 2 in {within_2_points:4.0%}; the range held in {held:4.0%}, "
        "was {width_points:5.2f} points wide".format(**figures),
        flush=True,
    )
    return figures


def synthetic(frames: int, rates: list[float], trials: int, seed: int) -> list[dict[str, Any]]:
    """All shapes at all rates."""
    rng = np.random.default_rng(seed)
    rows = []
    for rate in rates:
        all_off: list[float] = []
        all_held: list[bool] = []
        all_wide: list[float] = []
        for name, copies in shapes(frames, rng).items():
            total, truth = int(copies.sum()), left_over(copies)
            off, held, wide = [], [], []
            for _ in range(trials):
                seen = rng.binomial(copies, rate)
                found = Unseen(
                    Seen(unseen.times_of(seen), seen.sum() / total, Span.of(float(total))), LIMIT
                )
                low, high = found.extra_nodes()
                span = found.figure(found.contents() + low, found.contents() + high)
                off.append((span.point - truth) / total)
                held.append(span.low - 1 <= truth <= span.high + 1)
                wide.append((span.high - span.low) / total)
            rows.append(row(name, rate, off, held, wide))
            all_off += off
            all_held += held
            all_wide += wide
        rows.append(row("all shapes", rate, all_off, all_held, all_wide))
    return rows


# -- real processes --------------------------------------------------------------------------------


def kept(pages: Pages, which: NDArray[np.bool_]) -> Pages:
    """A view of some of the pages; runs are one a page."""
    index = np.flatnonzero(which)
    return replace(
        pages,
        hashes=pages.hashes[index],
        frames=pages.frames[index].copy(),
        run_start=pages.address_of(index),
        run_count=np.ones(len(index), np.int64),
        run_first=np.arange(len(index)),
        run_region=pages.region_of(index),
    )


def resampled(name: str, pages: Pages, rates: list[float], trials: int) -> list[dict[str, Any]]:
    """Samples of pages that were read as a whole, against the model on all of them."""
    rng = np.random.default_rng(3)
    rules = Rules()
    pages.frames &= ~Flag.DUPLICATE
    truth = merge.predict(pages, grouping.group(pages), rules)
    word = pages.frames
    count = [int(np.count_nonzero(word & f)) for f in (Flag.EXCLUSIVE, Flag.KSM, Flag.THP)]
    present = Present(len(word), *count)
    names, place = np.unique(word & FRAME_MASK, return_inverse=True)
    place = place.reshape(-1)
    by_process = np.zeros(len(pages.processes), np.int64)
    low, high = truth.bounds.get("frames_freed", (truth.frames_freed or 0,) * 2)
    rows = []
    for rate in rates:
        off, held, wide = [], [], []
        missed: dict[str, int] = {}
        for _ in range(trials):
            sample = kept(pages, rng.random(len(names))[place] < rate)
            chosen = sampled.choose(sample, present, rate)
            found = sampled.estimate(sample, chosen, present, by_process, rules)
            mine = found.prediction
            span = mine.bounds.get("frames_freed", (mine.frames_freed or 0,) * 2)
            point = found.point.get("frames_freed", span[0])
            off.append((point - (low + high) / 2) / len(names))
            held.append(span[0] <= low and high <= span[1])
            wide.append((span[1] - span[0]) / len(names))
            for field in FIELDS:
                value = getattr(truth, field)
                lowest, highest = truth.bounds.get(field, (value, value))
                least, most = mine.bounds.get(field, (getattr(mine, field),) * 2)
                if lowest is not None and not (least <= lowest and highest <= most):
                    missed[field] = missed.get(field, 0) + 1
        rows.append({**row(name, rate, off, held, wide), "missed": missed})
        if missed:
            print("    not held:", missed)
    return rows


NUMPY = """
import sys
import numpy as np
rng = np.random.default_rng(0)
shared = rng.random((96, 1 << 17))
own = np.random.default_rng().random((64, 1 << 17))
some = np.zeros((48, 1 << 17)); some[:, ::4096] = 1
table = {i: str(i) * 3 for i in range(400_000)}
print("ready", flush=True)
sys.stdin.read()
"""


def started(kind: str) -> Iterator[subprocess.Popen[str]]:
    """Three processes of a kind, filled."""
    for number in range(3):
        if kind == "numpy":
            process = subprocess.Popen(
                [sys.executable, "-c", NUMPY],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert process.stdout is not None
            process.stdout.readline()
            yield process
            continue
        socket = f"/tmp/benchmarks-sample-{number}.sock"
        process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", socket, "--save", ""],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        line = ["redis-cli", "-s", socket]
        until = time.monotonic() + 20
        while subprocess.run([*line, "ping"], check=False, capture_output=True).returncode:
            if time.monotonic() > until:
                raise SystemExit("redis-server does not answer")
            time.sleep(0.05)
        fill = "for i=1,300000 do redis.call('set','key:'..i,string.rep('v'..i,60)) end"
        subprocess.run([*line, "eval", fill, "0"], check=True, capture_output=True)
        yield process


def live(rates: list[float], trials: int) -> list[dict[str, Any]]:
    """Real processes, read once."""
    rows = []
    for kind in ("redis", "numpy"):
        processes: list[subprocess.Popen[str]] = []
        try:
            processes.extend(started(kind))
            source = LiveSource([p.pid for p in processes], Options())
            pages = source.first_look()
        finally:
            for p in processes:
                p.kill()
                p.wait()
        print(f"{kind}: {len(pages.hashes):,} pages of {len(processes)} processes")
        rows += resampled(kind, pages, rates, trials)
    return rows


# -- time ------------------------------------------------------------------------------------------


def timed(
    size: int, kind: str, rates: list[float], rounds: int, passes: int
) -> list[dict[str, Any]]:
    """Full scans and samples in turn, each in a fresh process."""
    seconds: dict[float, list[float]] = {}
    off: dict[float, list[float]] = {}
    held: dict[float, list[bool]] = {}
    truth = pages = 0
    with target.process(size, kind) as (pid, _):
        for number in range(rounds + 1):
            for rate in (0.0, *rates):
                done = subprocess.run(
                    [sys.executable, "-c", TIMED, str(pid), str(rate), str(passes)],
                    check=True, capture_output=True, text=True,
                    # As the command has it.
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                )  # fmt: skip
                took, point, span, read = json.loads(done.stdout)
                if not rate:
                    truth, pages = point, read
                if number or not rate:
                    seconds.setdefault(rate, []).append(took)
                    off.setdefault(rate, []).append((point - truth) / pages)
                    held.setdefault(rate, []).append(span[0] <= truth <= span[1])
        seconds[0.0].pop(0)
    rows = []
    for rate in rates:
        ratios = [a / b for a, b in zip(seconds[rate], seconds[0.0], strict=True)]
        figures: dict[str, Any] = {
            "pages": kind,
            "gib": size / 2**30,
            "rate": rate,
            "rounds": rounds,
            "passes": passes,
            "full_seconds": statistics.median(seconds[0.0]),
            "sample_seconds": statistics.median(seconds[rate]),
            "of_full": statistics.median(ratios),
            "error_most_points": 100 * max(map(abs, off[rate])),
            "held": float(np.mean(held[rate])),
        }
        rows.append(figures)
        print(
            "{pages:>5} pages, {gib:.1f} GiB, {passes} looks, {rate:>5.1%}: {sample_seconds:.2f} "
            "of {full_seconds:.2f} s, {of_full:.2f} of the full scan; off by "
            "{error_most_points:.2f} points at the most, held in {held:.0%} of {rounds}".format(
                **figures
            ),
            flush=True,
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rates", default="0.05,0.1,0.15,0.2")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--frames", type=int, default=3 << 20, help="12 GiB by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--live", action="store_true", help="redis and NumPy")
    parser.add_argument("--time", action="store_true", help="on real memory")
    parser.add_argument("--gib", type=float, default=12.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=2, help="looks, one after the other")
    parser.add_argument("--pages", default="small,huge")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rates = [float(r) for r in args.rates.split(",")]
    rows: list[dict[str, Any]] = []
    if args.time:
        size = int(args.gib * 2**30) // target.HUGE * target.HUGE
        for kind in args.pages.split(","):
            rows += timed(size, kind, rates, args.rounds, args.passes)
    elif args.live:
        rows = live(rates, args.trials)
    else:
        rows = synthetic(args.frames, rates, args.trials, args.seed)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
