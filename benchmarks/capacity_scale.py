"""Fingerprints of much memory, estimated: ``python -m benchmarks.capacity_scale``.

It makes files of fingerprints by the store's own writer, as `dedup scan --save` would of instances
with so much memory, and times `dedup capacity` on them in a process of its own, loading included:
seconds and peak RSS. What the contents have in common is drawn: all-zero pages, some contents with
many copies in each instance, a part that all have, a part that some have, the rest each one's own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.estimate import store
from dedup.estimate.fingerprints import CONSTANT, ZERO, Contents, Facts, Instance

if TYPE_CHECKING:
    from dedup.pages import I64, U64

PAGE: Final = 4096
SHARED: Final = 0.30
"""Of an instance's pages: in all instances."""
SOME: Final = 0.10
"""In some of them."""
COPIED: Final = 0.02
"""Copies of few contents, in all."""
ZEROS: Final = 0.05
COPIES: Final = 40
"""Of a content that is copied, on average."""
RANKS: Final = 4
"""So many times more contents that some have are there than one instance has."""


def fingerprints(numbers: I64) -> U64:
    """Of numbered contents, each its own: a bijection of 64 bits (splitmix64's last steps)."""
    x = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def instance(number: int, pages: int, label: str) -> Instance:
    """One with so many pages."""
    draw = np.random.default_rng(number)
    shared, some = int(SHARED * pages), int(SOME * pages)
    copied = max(1, int(COPIED * pages) // COPIES)
    # The lower its rank the more have it.
    rank = np.unique((some * RANKS * draw.power(0.5, some)).astype(np.int64))
    names = [
        np.zeros(1, np.int64),
        1 + np.arange(copied),
        (1 << 40) + np.arange(shared),
        (2 << 40) + rank,
    ]
    counts = [
        np.array([int(ZEROS * pages)]),
        1 + draw.geometric(1 / COPIES, copied),
        np.ones(shared, np.int64),
        np.ones(len(rank), np.int64),
    ]
    own = pages - int(sum(c.sum() for c in counts))
    names.append((3 << 40) + number * pages + np.arange(own))
    counts.append(np.ones(own, np.int64))
    name, mappings = np.concatenate(names), np.concatenate(counts).astype(np.uint32)
    order = np.argsort(fingerprints(name))
    zero = name[order] == 0
    mappings = mappings[order]
    none = np.zeros(len(order), np.uint32)
    return Instance(
        Facts(
            label=label, instance=f"{label}-{number}", key_id="scale", kernel=os.uname().release,
            page_size=PAGE, tunables={}, processes=1, looks=2, scanned_pages=pages,
            volatile_pages=0, volatile_frames=0,
            single_pages=int(np.count_nonzero(mappings == 1)), frames_known=True, complete=True,
            drifting=False, extrapolated=False, other_anonymous_bytes=0, file_bytes=100 << 20,
            shared_memory_bytes=0, page_table_bytes=pages * 8, kernel_bytes=None, swap_bytes=0,
            randomized="all", taken="2026-01-01T00:00:00+00:00",
        ),
        Contents(
            fingerprints(name)[order], mappings, mappings.copy(), none,
            np.where(zero, mappings, none).astype(np.uint32) // np.uint32(2),
            np.where(zero, ZERO | CONSTANT, np.uint8(0)).astype(np.uint8),
        ),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=64, help="memory of all instances")
    parser.add_argument("--instances", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="keep the files there, and take those there")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--peak-gib", type=float, default=2)
    parser.add_argument("words", nargs="*", help="more for `dedup capacity`, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as own:
        folder = options.folder or Path(own)
        folder.mkdir(exist_ok=True)
        pages = int(options.gib * (1 << 30)) // PAGE // options.instances
        paths = [folder / f"web-{i}.dedup" for i in range(options.instances)]
        for number, path in enumerate(paths):
            if not path.exists():
                store.save(instance(number, pages, "web"), path)
        begin = time.monotonic()
        words = [sys.executable, "-m", "dedup", "capacity", *map(str, paths), *options.words]
        process = subprocess.Popen(words)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds, peak = time.monotonic() - begin, used.ru_maxrss / (1 << 20)
        files = sum(path.stat().st_size for path in paths)
    print(
        f"{options.instances} x {pages:,} pages, files of {files >> 20:,} MiB: {seconds:.1f} s "
        f"({used.ru_utime + used.ru_stime:.1f} s of CPU), {peak:.2f} GiB at the peak"
    )
    good = process.returncode == 0 and seconds <= options.seconds and peak <= options.peak_gib
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
