"""One pass over another process's memory, against `process_vm_readv` alone.

``sudo .venv/bin/python benchmarks/scan_speed.py --gib 4``

The target holds 30 % zero pages, 20 % pages of a few contents (Zipf), 50 % unique ones. Each round
runs every contender once, in turn, so that a machine whose speed drifts drifts for all; what is
printed are medians of the rounds' ratios.

* `readv`: `process_vm_readv` alone, 2 MiB chunks into a buffer that stays in the cache, as many
  threads as the scan has. Nothing is looked at.
* `scan`: everything that one look of a real scan does: smaps, pagemap for frames and the exclusive
  bit, the reading, the zero test, XXH3, the grouping, the model, what smart scan changes, the load
  of ksmd that the price comes from.
* `python`: the plain loop, 1 MiB reads of /proc/PID/mem, xxhash page by page, a Counter.
* `dd`: `dd bs=1M` of the same memory to /dev/null.

With ``--memory`` it measures, instead of the speed, how much the peak of a scan's own memory grows
with the pages it scans: one fresh process for each of three sizes, all threads.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dedup import grouping
from dedup.kernel.ksm import Ksm
from dedup.model import cost, merge, smart
from dedup.scanning import rules_of
from dedup.sources.live import LiveSource, Options, mark_outside

PAGE = mmap.PAGESIZE
CHUNK = 2 << 20

TARGET = """
import mmap, sys
import numpy as np
size, huge = int(sys.argv[1]), sys.argv[2] == "huge"
page = mmap.PAGESIZE
m = mmap.mmap(-1, size + (2 << 20), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
m.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
a = np.frombuffer(m, np.uint8)
start = -a.__array_interface__["data"][0] % (2 << 20)
a = a[start : start + size].reshape(-1, page)
rng = np.random.default_rng(1)
kinds = rng.random(len(a))
pool = rng.integers(0, 256, (512, page), dtype=np.uint8)
step = 4096
for i in range(0, len(a), step):
    part, kind = a[i : i + step], kinds[i : i + step]
    unique = kind >= 0.5
    part[kind < 0.3] = 0
    some = (kind >= 0.3) & ~unique
    part[some] = pool[np.minimum(rng.zipf(1.3, int(some.sum())) - 1, 511)]
    part[unique] = rng.integers(0, 256, (int(unique.sum()), page), dtype=np.uint8)
print(a.__array_interface__["data"][0], flush=True)
sys.stdin.read()
"""


class Iovec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


libc = ctypes.CDLL(None, use_errno=True)
libc.process_vm_readv.restype = ctypes.c_ssize_t
libc.process_vm_readv.argtypes = [
    ctypes.c_int, ctypes.POINTER(Iovec), ctypes.c_ulong, ctypes.POINTER(Iovec), ctypes.c_ulong,
    ctypes.c_ulong,
]  # fmt: skip


def in_threads(count: int, work: object) -> float:
    """Seconds for `count` threads to run `work(number)`."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]  # type: ignore[arg-type]
    begin = time.perf_counter()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return time.perf_counter() - begin


def readv(pid: int, start: int, size: int, threads: int) -> float:
    """`process_vm_readv` alone."""
    buffers = []
    for _ in range(threads):
        m = mmap.mmap(-1, 2 * CHUNK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        m.madvise(mmap.MADV_HUGEPAGE)
        m[:] = bytes(2 * CHUNK)
        address = ctypes.addressof(ctypes.c_char.from_buffer(m))
        buffers.append((m, address + -address % CHUNK))
    chunks = iter(range(start, start + size, CHUNK))
    lock = threading.Lock()

    def work(number: int) -> None:
        local = Iovec(buffers[number][1], CHUNK)
        remote = Iovec(0, CHUNK)
        while True:
            with lock:
                at = next(chunks, None)
            if at is None:
                return
            remote.base = at
            got = libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
            if got != CHUNK:
                raise OSError(ctypes.get_errno(), "process_vm_readv")

    return in_threads(threads, work)


def scan(pid: int, threads: int) -> tuple[float, float]:
    """One look and all that follows; seconds, and those of the look alone."""
    begin = time.perf_counter()
    source = LiveSource([pid], Options(threads=threads))
    pages = source.first_look()
    looked = time.perf_counter() - begin
    groups = grouping.group(pages, threads)
    mark_outside(pages, groups, source.sight)
    rules = rules_of(Ksm().tunables())
    prediction = merge.predict(pages, groups, rules)
    smart.forecast(pages, groups, rules, prediction, lambda p: grouping.group(p, threads))
    cost.load_of(pages, groups, prediction)
    return time.perf_counter() - begin, looked


def plain_python(pid: int, start: int, size: int) -> float:
    """1 MiB reads, xxhash page by page, a Counter."""
    begin = time.perf_counter()
    seen: Counter[int] = Counter()
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    for at in range(start, start + size, 1 << 20):
        data = memoryview(os.pread(fd, 1 << 20, at))
        for i in range(0, len(data), PAGE):
            seen[xxhash.xxh3_64_intdigest(data[i : i + PAGE])] += 1
    os.close(fd)
    return time.perf_counter() - begin


def dd(pid: int, start: int, size: int) -> float:
    """`dd bs=1M` of the same memory."""
    begin = time.perf_counter()
    subprocess.run(
        [
            "dd", f"if=/proc/{pid}/mem", "of=/dev/null", "bs=1M", f"skip={start >> 20}",
            f"count={size >> 20}", "status=none",
        ],
        check=True,
    )  # fmt: skip
    return time.perf_counter() - begin


def target(size: int, kind: str) -> tuple[subprocess.Popen[str], int]:
    """A process with so much to scan, and where that begins."""
    process = subprocess.Popen(
        [sys.executable, "-c", TARGET, str(size), kind],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def own_memory(name: str) -> int:
    """A size of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def peak(pid: int, threads: int) -> int:
    """By how many bytes a scan raises the peak of this process's memory."""
    before = own_memory("VmRSS")
    # From here on VmHWM is anew the highest (Documentation/filesystems/proc.rst, clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    scan(pid, threads)
    return own_memory("VmHWM") - before


def measure_memory(size: int, kind: str, threads: int) -> list[dict[str, Any]]:
    """Peaks at a quarter, a half and the whole of the size, each in a process of its own."""
    rows: list[dict[str, Any]] = []
    for part in (size // 4, size // 2, size):
        process, _ = target(part // CHUNK * CHUNK, kind)
        try:
            command = [sys.executable, __file__, "--peak-of", str(process.pid)]
            done = subprocess.run(
                [*command, "--threads", str(threads)], check=True, capture_output=True, text=True
            )
        finally:
            process.communicate()
        rows.append({"pages": kind, "scanned": part // PAGE, "peak_bytes": int(done.stdout)})
    for small, large in itertools.pairwise(rows):
        more = large["scanned"] - small["scanned"]
        large["bytes_a_page"] = (large["peak_bytes"] - small["peak_bytes"]) / more
    return rows


def measure(size: int, kind: str, thread_counts: list[int], rounds: int) -> list[dict[str, Any]]:
    """All contenders over one target, interleaved."""
    process, start = target(size, kind)
    rows: dict[int, list[dict[str, float]]] = {t: [] for t in thread_counts}
    try:
        for number in range(rounds + 1):
            for t in thread_counts:
                seconds = {"readv": readv(process.pid, start, size, t)}
                seconds["scan"], seconds["look"] = scan(process.pid, t)
                if t == thread_counts[0]:
                    seconds["python"] = plain_python(process.pid, start, size)
                    seconds["dd"] = dd(process.pid, start, size)
                else:
                    first = rows[thread_counts[0]][-1] if rows[thread_counts[0]] else seconds
                    seconds |= {k: first[k] for k in ("python", "dd") if k in first}
                rows[t].append(seconds)
            if number == 0:  # the warm-up
                for t in thread_counts:
                    rows[t].clear()
    finally:
        process.communicate()
    out: list[dict[str, Any]] = []
    for t, all_rounds in rows.items():
        gib = size / 2**30
        ratio = {
            name: statistics.median(r[name] / r["scan"] for r in all_rounds if name in r)
            for name in ("readv", "python", "dd")
        }
        out.append(
            {
                "pages": kind,
                "threads": t,
                "gib": gib,
                "rounds": len(all_rounds),
                "scan_seconds": statistics.median(r["scan"] for r in all_rounds),
                "look_seconds": statistics.median(r["look"] for r in all_rounds),
                "readv_seconds": statistics.median(r["readv"] for r in all_rounds),
                "of_process_vm_readv": ratio["readv"],
                "times_plain_python": ratio["python"],
                "times_dd": ratio["dd"],
            }
        )
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default=f"1,{len(os.sched_getaffinity(0))}")
    parser.add_argument("--pages", default="small,huge")
    parser.add_argument("--memory", action="store_true", help="the peak, not the speed")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    size = int(args.gib * 2**30) // CHUNK * CHUNK
    threads = sorted({int(t) for t in args.threads.split(",")})
    if args.peak_of:
        print(peak(args.peak_of, threads[-1]))
        return
    results: list[dict[str, Any]] = []
    if args.memory:
        for kind in args.pages.split(","):
            for row in measure_memory(size, kind, threads[-1]):
                results.append(row)
                more = f", {row['bytes_a_page']:.1f} a page more" if "bytes_a_page" in row else ""
                print(
                    f"{kind:>5} pages, {row['scanned']:>9,}: peak "
                    f"{row['peak_bytes'] / 2**20:.0f} MiB, "
                    f"{row['peak_bytes'] / row['scanned']:.1f} bytes a page{more}",
                    flush=True,
                )
        write(args.json, results)
        return
    for kind in args.pages.split(","):
        for row in measure(size, kind, threads, args.rounds):
            results.append(row)
            print(
                "{pages:>5} pages, {threads} threads, {gib:.1f} GiB: scan {scan_seconds:.3f} s "
                "(the look {look_seconds:.3f}), {of_process_vm_readv:.2f} of process_vm_readv "
                "alone, {times_plain_python:.1f}x the plain Python loop, {times_dd:.1f}x dd".format(
                    **row
                ),
                flush=True,
            )
    write(args.json, results)


def write(path: Path | None, results: list[dict[str, Any]]) -> None:
    """Write the results to a file, if one is wanted."""
    machine = {"kernel": platform.release(), "cpus": os.cpu_count(), "numpy": np.__version__}
    if path:
        path.write_text(json.dumps({"machine": machine, "results": results}, indent=2))


if __name__ == "__main__":
    main()
