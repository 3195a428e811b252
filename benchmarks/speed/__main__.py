"""The speed of a scan, beside its peers: ``sudo .venv/bin/python -m benchmarks.speed``.

Each round runs every contender once, in turn, so that a machine whose speed drifts drifts for all;
what is printed are medians of the rounds' ratios, with the least and the greatest one. The scan is
one pass with all that a real one does (see scans.py), its peers are

* exclusive: `process_vm_readv` alone, on the same threads, of all that the scan reads;
* shared: reading /proc/PID/mem alone, on the same threads, of memory shared with a forked child,
  and of memory that ksmd has merged;
* own: a read-only sum over our own memory, and memcpy;
* passes: two looks that read everything, beside two of which the second reads what would merge
  (`--partial-passes`), and the second looks alone; of mixed memory, and of pages all unlike;
* python: plain loops with xxhash and sha1 (1 MiB reads and a Counter; page by page) and `dd bs=1M`,
  on one core;
* many: 2,000 small processes, 65,530 mappings in one process, three pages in 16 TiB;
* start: `dedup --version` and `--help`, beside a Python that does nothing.

``--sizes`` measures the time against the size, ``--memory`` the peak of the scan's own memory,
instead. Run it as root, on a quiet machine; what is shared needs ksmd to itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

# As the command does: NumPy's BLAS would start threads that spin, on the cores that we measure on.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import xxhash

from benchmarks.speed import growth, limits, many, peak
from benchmarks.speed.scans import one_pass
from benchmarks.speed.target import HUGE
from dedup.kernel import memory

if TYPE_CHECKING:
    from collections.abc import Sequence

PARTS: Final = ("exclusive", "shared", "own", "passes", "python", "many", "start")


def machine() -> dict[str, Any]:
    """What it was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    # A virtual machine may hide the name; family and model tell it all the same.
    number = [x.partition(":")[2].strip() for x in lines if x.startswith(("cpu family", "model\t"))]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": f"{model} (family {number[0]}, model {number[1]})" if len(number) > 1 else model,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(total / 2**30, 1),
        "kernel": platform.release(),
        "thp": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "xxhash": xxhash.VERSION,
        "hash": memory.load_hash(os.sysconf("SC_PAGE_SIZE")),
        "load": os.getloadavg()[0],
    }


def ratios(
    parts: Sequence[str], size: int, kinds: Sequence[str], threads: Sequence[int], rounds: int
) -> list[limits.Ratio]:
    """All ratios of the chosen parts, printed as they come."""
    rows: list[limits.Ratio] = []

    def show(found: list[limits.Ratio]) -> None:
        for r in found:
            print(r.line(), flush=True)
        rows.extend(found)

    for kind in kinds:
        if "exclusive" in parts or "python" in parts:
            chosen = {"limits": "exclusive" in parts, "python": "python" in parts}
            show(limits.exclusive(size, kind, threads, rounds, **chosen))
        if "shared" in parts:
            show(limits.shared(size, kind, threads, rounds))
        if "own" in parts:
            show(limits.own(size, kind, threads, rounds))
        if "passes" in parts:
            show(limits.passes(size, kind, threads, rounds))
    return rows


def cases(parts: Sequence[str], rounds: int) -> list[many.Case]:
    """All cases of the chosen parts, printed as they come."""
    found: list[many.Case] = []
    if "many" in parts:
        for case in (many.sparse, many.mappings, many.processes):
            found.append(case(rounds))
            print(found[-1].line(), flush=True)
    if "start" in parts:
        for one in many.start_up(rounds):
            print(one.line(), flush=True)
            found.append(one)
    return found


def against_size(
    largest: int, kinds: Sequence[str], threads: int, rounds: int, drawing: Path | None
) -> list[growth.Line]:
    """The time against the size, said and drawn."""
    lines = []
    for kind in kinds:
        lines.append(growth.measure(kind, threads, growth.sizes(largest), rounds))
        print(lines[-1].words(), flush=True)
    if drawing:
        drawing.write_text(growth.plot(lines))
    return lines


def _words(allowed: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        words = text.split(",")
        if wrong := set(words) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: not in {', '.join(allowed)}")
        return words

    return parse


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=(__doc__ or "").splitlines()[0]
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--gib", type=float, default=2.0, help="memory to scan")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default=f"1,{cores}", help="of the scan and of its peers")
    parser.add_argument("--only", type=_words(PARTS), default=list(PARTS), metavar=",".join(PARTS))
    parser.add_argument("--pages", type=_words(("small", "huge")), default=["small", "huge"])
    parser.add_argument(
        "--sizes", type=float, nargs="?", const=0.0, metavar="GIB",
        help="the time against the size, from 64 MiB to so much, or as much as fits",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="of --sizes")
    parser.add_argument("--memory", action="store_true", help="the peak, not the speed")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    size = int(args.gib * 2**30) // HUGE * HUGE
    threads = sorted({int(t) for t in args.threads.split(",")})
    if args.peak_of:
        print(peak.peak_of(args.peak_of, threads[-1]))
        return
    host = machine()
    found: dict[str, Any] = {"machine": host, "command": sys.argv[1:]}
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    if args.memory:
        found["memory"] = []
        for kind in args.pages:
            for row in peak.measure(size, kind, threads[-1]):
                print(peak.line(row), flush=True)
                found["memory"].append(row)
    elif args.sizes is not None:
        largest = int(args.sizes * 2**30)
        one_pass([os.getpid()])
        lines = against_size(largest, args.pages, threads[-1], args.rounds, args.plot)
        found["sizes"] = [line.row() for line in lines]
    else:
        one_pass([os.getpid()])  # imports, hash and probes are there then
        rows = ratios(args.only, size, args.pages, threads, args.rounds)
        found["ratios"] = [r.row() for r in rows]
        some = cases(args.only, args.rounds)
        found["cases"] = [c.row() for c in some]
        held = [r.holds for r in rows if r.holds is not None] + [c.holds for c in some]
        print(f"{sum(held)} of {len(held)} hold")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
