"""A scan within a budget of memory against the full scan: coverage of the ranges, peak of memory.

``python -m benchmarks.budget --trials 20``, and, as root, ``--live`` and ``--peak --gib 4``.

* Without more: memory made of numbers, the shapes of `benchmarks.sample`, with all-zero pages and
  pages that change beside them; what is kept is chosen as the core does it, by another seed each
  time, and the estimator is the one that a scan has. A row is a shape and a rate: the error of
  `frames_freed` in points of memory, how wide its range was, how often it held the truth, and how
  often all ranges of all counters did.
* ``--live``: redis-servers, Python processes with NumPy, memory shared by fork, huge pages: read
  once, with two looks, then as above against the model on all pages.
* ``--peak``: the real command on real memory, in a fresh process for each budget: the highest that
  its memory was (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import sample
from benchmarks.speed import target
from dedup import grouping
from dedup.estimate import content
from dedup.estimate.sampled import Present
from dedup.kernel import memory, pagemap
from dedup.model import merge
from dedup.model.prediction import FIELDS, Prediction, Rules
from dedup.pages import FRAME_MASK, Flag, Pages, Process, ProcessId, Region
from dedup.sources.live import LiveSource, Options, mark_outside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    U64 = NDArray[np.uint64]

PILOT_RATE = 0.05
HALF = 0.5
FRAMES_PART = 4
UNSTABLE = Flag.VOLATILE | Flag.NEW | Flag.GONE

PEAK = """
import sys
from pathlib import Path
from dedup.__main__ import main
done = main()
status = Path("/proc/self/status").read_text()
print("VmHWM", status.partition("VmHWM:")[2].split()[0], file=sys.stderr)
sys.exit(done)
"""


@dataclass(slots=True)
class Whole:
    """Memory that was read as a whole, at two looks."""

    name: str
    pages: Pages
    """After the second."""
    hashes: U64
    """Of the first."""
    first: Present
    last: Present
    zero: int
    """Hash of an all-zero page."""
    rules: Rules
    real: bool = False
    truth: Prediction | None = None

    def predict(self) -> Prediction:
        """By all pages."""
        pages = replace(self.pages, frames=self.pages.frames.copy())
        groups = grouping.group(pages, 2)
        if self.real:
            mark_outside(pages, groups, pagemap.sight())
        return merge.predict(pages, groups, self.rules)


def trial(whole: Whole, rate: float, seed: int) -> Prediction | None:
    """One sample of it, by a seed: what is estimated."""
    pages, mixed = whole.pages, memory.mixed
    known = np.arange(len(whole.hashes))
    # As if the hash had another seed.
    other = mixed(np.array([seed], np.uint64))
    first = mixed(whole.hashes ^ other)
    zero = int(mixed(np.array([whole.zero], np.uint64) ^ other)[0])
    frame = pages.frames[known] & FRAME_MASK
    hidden = (pages.frames[known] & Flag.HIDDEN) != 0
    frame[hidden] = known[hidden].astype(np.uint64) | np.uint64(1 << 50)
    drawn = mixed(frame ^ ~other)
    met = drawn < np.uint64(int(PILOT_RATE * 2**64))
    told = content.Pilot.of(first[met], zero, PILOT_RATE)
    counted = told.counted
    chosen = memory.Content(int(rate * 2**64), counted, 0)
    frame_rate = rate / FRAMES_PART
    by_content = chosen.chosen(first)
    which = by_content | (drawn < np.uint64(int(frame_rate * 2**64)))
    order = np.argsort(counted)
    at = np.minimum(np.searchsorted(counted[order], first), len(counted) - 1)
    is_counted = counted[order][at] == first
    number = np.bincount(order[at][is_counted], minlength=len(counted))
    mask = np.zeros(len(pages.hashes), np.bool_)
    mask[known] = which
    kept = sample.kept(pages, mask)
    before = replace(kept, hashes=first[which], frames=kept.frames & ~UNSTABLE, looks=1)
    stock = content.take_stock(
        before, by_content[which], counted, number, whole.first, rate, frame_rate, told.pairs
    )
    kept = replace(kept, hashes=mixed(kept.hashes ^ other), looks=2)

    def mark(some: Pages, groups: Any) -> None:
        mark_outside(some, groups, pagemap.sight())

    return content.estimate(
        kept, stock, whole.last, np.zeros(len(pages.processes), np.int64), whole.rules,
        mark if whole.real else None, pagemap.mappings_of if whole.real else None,
    ).prediction  # fmt: skip


def row(whole: Whole, rate: float, trials: int, seed: int) -> dict[str, Any]:
    """Figures of some trials, printed."""
    truth = whole.truth = whole.truth or whole.predict()
    total = whole.last.pages
    off, wide, held, every = [], [], [], []
    missed: dict[str, int] = {}
    low, high = truth.bounds.get("frames_freed", (truth.frames_freed or 0,) * 2)
    for number in range(trials):
        found = trial(whole, rate, seed + number)
        assert found is not None
        least, most = found.bounds.get("frames_freed", (found.frames_freed or 0,) * 2)
        off.append(abs((least + most) / 2 - (low + high) / 2) / total)
        wide.append((most - least) / total)
        wrong = []
        for name in FIELDS:
            value = getattr(truth, name)
            lowest, highest = truth.bounds.get(name, (value, value))
            mine = found.bounds.get(name, (getattr(found, name),) * 2)
            if lowest is not None and not (mine[0] <= lowest and highest <= mine[1]):
                wrong.append(name)
                missed[name] = missed.get(name, 0) + 1
        held.append("frames_freed" not in wrong)
        every.append(not wrong)
    figures: dict[str, Any] = {
        "name": whole.name,
        "rate": rate,
        "trials": trials,
        "error_95_points": float(np.quantile(off, 0.95)) * 100,
        "width_points": float(np.mean(wide)) * 100,
        "held": float(np.mean(held)),
        "all_held": float(np.mean(every)),
        "missed": missed,
    }
    print(
        "{name:<28} 1 of {part:>3.0f}, {trials:>3} trials: 95% within {error_95_points:5.2f} "
        "points, {width_points:5.2f} wide; held in {held:4.0%}, every counter in {all_held:4.0%} "
        "{missed}".format(**figures, part=1 / rate),
        flush=True,
    )
    return figures


def synthetic(frames: int, seed: int, changing: float) -> Iterator[Whole]:
    """The shapes of `benchmarks.sample`, and some that are hard for this sample."""
    rng = np.random.default_rng(seed)
    made = sample.shapes(frames, rng)
    half = frames // 2
    made |= {
        "one content has a tenth": np.append(np.ones(frames * 9 // 10, np.int64), frames // 10),
        "a tenth, which changes": np.append(np.ones(frames * 9 // 10, np.int64), frames // 10),
        "below what a pilot finds": np.append(
            np.ones(half, np.int64), np.full(half // 150, 150, np.int64)
        ),
        "many just above the limit": np.full(frames // 300, 300),
        "fours within a tenth": np.append(
            np.ones(frames * 9 // 10, np.int64), np.full(frames // 40, 4)
        ),
    }
    for name, copies in made.items():
        zeros = frames // 5
        hashes = memory.mixed(np.repeat(np.arange(1, len(copies) + 1, dtype=np.uint64), copies))
        hashes = np.append(np.zeros(zeros, np.uint64), hashes)
        n = len(hashes)
        order = rng.permutation(n)
        hashes = hashes[order]
        words = np.arange(1, n + 1, dtype=np.uint64) | Flag.EXCLUSIVE
        words[hashes == 0] |= Flag.ZERO
        after = hashes.copy()
        moved = rng.random(n) < changing
        if "changes" in name:
            # Of all-zero pages one in two.
            heaviest = memory.mixed(np.array([len(copies)], np.uint64))[0]
            moved |= (hashes == heaviest) | ((hashes == 0) & (rng.random(n) < HALF))
        after[moved] = rng.integers(1 << 32, 1 << 63, int(moved.sum()), dtype=np.uint64)
        words[moved] |= Flag.VOLATILE
        words[moved] &= ~Flag.ZERO
        region = Region(0, 0, n * 4096, "rw-p", "", frozenset(), True, "", True, True)
        process = Process(ProcessId(1, 1), "made", "root", "/", "")
        pages = Pages(
            4096, after, words, np.zeros(1, np.int64), np.array([n]), np.zeros(1, np.int64),
            np.zeros(1, np.int64), [region], [process], looks=2,
        )  # fmt: skip
        there = Present(n, n, 0, 0)
        yield Whole(name, pages, hashes, there, there, 0, Rules())


def read(name: str, pids: list[int]) -> Whole:
    """Real processes, at two looks."""
    source = LiveSource(pids, Options(seed=1))
    hashes = source.first_look().hashes.copy()
    first = _present(source)
    pages = source.look_again()
    print(f"{name}: {len(hashes):,} pages of {len(pages.processes)} processes")
    zero = memory.zero_hash(pages.page_size, 1)
    return Whole(name, pages, hashes, first, _present(source), zero, Rules(), real=True)


def _present(source: LiveSource) -> Present:
    assert source.pages is not None
    word = source.pages.frames[source.pages.present]
    return Present(
        len(word), *(int(np.count_nonzero(word & f)) for f in (Flag.EXCLUSIVE, Flag.KSM, Flag.THP))
    )


def live(rates: list[float], trials: int, seed: int) -> list[dict[str, Any]]:
    """Real processes, which live on until their trials are over: frames are asked for in them."""
    rows = []
    for kind in ("redis", "numpy", "fork", "huge-fork", "small", "huge"):
        with ExitStack() as stack:
            pids = []
            if kind in {"redis", "numpy"}:
                for p in sample.started(kind):
                    stack.callback(p.wait)
                    stack.callback(p.kill)
                    pids.append(p.pid)
            else:
                size, what = 512 << 20, "fork" if "fork" in kind else "mixed"
                pages = "huge" if "huge" in kind else "small"
                pids += [
                    stack.enter_context(target.process(size, pages, what))[0] for _ in range(2)
                ]
            whole = read(kind, pids)
            rows += [row(whole, rate, trials, seed) for rate in rates]
    return rows


def peaks(gib: float, budgets: list[str], kinds: list[str], count: int) -> list[dict[str, Any]]:
    """The highest that the command's memory was, for each budget."""
    rows = []
    size = int(gib * 2**30) // count // target.HUGE * target.HUGE
    for kind in kinds:
        with ExitStack() as stack:
            pages, _, what = kind.partition("-")
            chosen = []
            for _ in range(count):
                pid, _ = stack.enter_context(target.process(size, pages, what or "mixed"))
                chosen += ["--pid", str(pid)]
            for budget in budgets:
                more = [] if budget == "none" else ["--memory", budget]
                done = subprocess.run(
                    [sys.executable, "-c", PEAK, "scan", *chosen, "--json", "--interval", "0.1",
                     *more], capture_output=True, text=True, check=False,
                )  # fmt: skip
                peak = int(done.stderr.rpartition("VmHWM")[2]) * 1024
                answer = json.loads(done.stdout)
                figures: dict[str, Any] = {
                    "pages": kind, "gib": gib, "processes": count, "budget": budget,
                    "peak_bytes": peak, "status": done.returncode,
                }  # fmt: skip
                if done.returncode == 0:
                    part = answer["scan"]["sample"]
                    prediction = answer["prediction"]
                    figures |= {
                        "seconds": answer["scan"]["seconds"],
                        "rate": part["rate"] if part else None,
                        "kept": part["pages"] if part else answer["scan"]["pages"],
                        "frames_freed": prediction["frames_freed"]
                        or prediction["bounds"].get("frames_freed"),
                    }
                else:
                    figures["hint"] = answer["error"]["hint"]
                rows.append(figures)
                print(f"peak {peak / 2**20:.0f} MiB:", json.dumps(figures), flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rates", default="0.5,0.125,0.03125")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--frames", type=int, default=1 << 19, help="2 GiB by default")
    parser.add_argument("--changing", type=float, default=0.0, help="part of the pages")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--live", action="store_true", help="real processes")
    parser.add_argument("--peak", action="store_true", help="of memory, on real memory")
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--budgets", default="none,64M,80M,96M,128M,256M")
    parser.add_argument("--pages", default="small,huge")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rates = [float(r) for r in args.rates.split(",")]
    if args.peak:
        budgets, kinds = args.budgets.split(","), args.pages.split(",")
        rows = peaks(args.gib, budgets, kinds, args.processes)
    elif args.live:
        rows = live(rates, args.trials, args.seed)
    else:
        rows = [
            row(whole, rate, args.trials, args.seed)
            for whole in synthetic(args.frames, args.seed, args.changing)
            for rate in rates
        ]
    if not args.peak:
        trials = sum(r["trials"] for r in rows)
        held, every = (sum(r[k] * r["trials"] for r in rows) for k in ("held", "all_held"))
        each = {n: 1 - sum(r["missed"].get(n, 0) for r in rows) / trials for n in FIELDS}
        worst = min(each, key=lambda n: each[n])
        print(
            f"held in {held / trials:.1%} of {trials} trials; {worst}, the counter that did worst, "
            f"in {each[worst]:.1%}; all counters at once in {every / trials:.1%}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
