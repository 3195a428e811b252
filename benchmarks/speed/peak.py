"""How much a scan's own memory grows with the pages that it scans."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed.scans import one_pass
from benchmarks.speed.target import HUGE, PAGE, process


def own_memory(name: str) -> int:
    """A size of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def peak_of(pid: int, threads: int) -> int:
    """By how many bytes a scan raises the peak of this process's memory."""
    before = own_memory("VmRSS")
    # From here on VmHWM is anew the highest (Documentation/filesystems/proc.rst, clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    one_pass([pid], threads)
    return own_memory("VmHWM") - before


def measure(size: int, pages: str, threads: int) -> list[dict[str, Any]]:
    """Peaks at a quarter, a half and the whole of the size, each in a process of its own."""
    rows: list[dict[str, Any]] = []
    for part in (size // 4, size // 2, size):
        with process(part // HUGE * HUGE, pages) as (pid, _):
            command = [sys.executable, "-m", "benchmarks.speed", "--peak-of", str(pid)]
            done = subprocess.run(
                [*command, "--threads", str(threads)], check=True, capture_output=True, text=True
            )
        rows.append({"pages": pages, "scanned": part // PAGE, "peak_bytes": int(done.stdout)})
    for small, large in itertools.pairwise(rows):
        more = large["scanned"] - small["scanned"]
        large["bytes_a_page"] = (large["peak_bytes"] - small["peak_bytes"]) / more
    return rows


def line(row: dict[str, Any]) -> str:
    """For people."""
    more = f", {row['bytes_a_page']:.1f} a page more" if "bytes_a_page" in row else ""
    return (
        f"{row['pages']:>5} pages, {row['scanned']:>9,}: peak {row['peak_bytes'] / 2**20:.0f} MiB, "
        f"{row['peak_bytes'] / row['scanned']:.1f} bytes a page{more}"
    )
