"""Free and anonymous memory of the host.

Source: Documentation/filesystems/proc.rst; pages on the per-cpu lists are free, but MemFree does
not count them, so it alone proves nothing.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes."""

    anon_pages_bytes: int
    mem_free_bytes: int
    per_cpu_bytes: int
    """Free pages on the per-cpu lists, which MemFree leaves out."""

    @property
    def free_bytes(self) -> int:
        """MemFree and the per-cpu lists."""
        return self.mem_free_bytes + self.per_cpu_bytes


def read(proc: Path = PROC) -> Memory:
    """Read the host's memory figures."""
    text = (proc / "meminfo").read_text()
    zones = (proc / "zoneinfo").read_text()
    return Memory(
        anon_pages_bytes=_kilobytes("AnonPages", text),
        mem_free_bytes=_kilobytes("MemFree", text),
        per_cpu_bytes=sum(int(n) for n in re.findall(r"^\s+count: +(\d+)", zones, re.MULTILINE))
        * mmap.PAGESIZE,
    )


def total_bytes(proc: Path = PROC) -> int:
    """All memory that the kernel manages (MemTotal)."""
    return _kilobytes("MemTotal", (proc / "meminfo").read_text())


def available_bytes(proc: Path = PROC) -> int:
    """Memory to be had without swapping, as the kernel guesses it (MemAvailable)."""
    return _kilobytes("MemAvailable", (proc / "meminfo").read_text())


def swap_bytes(proc: Path = PROC) -> int:
    """All swap space, whether used or not (SwapTotal)."""
    return _kilobytes("SwapTotal", (proc / "meminfo").read_text())


def swap_used_bytes(proc: Path = PROC) -> int:
    """Swap space in use on the whole host."""
    text = (proc / "meminfo").read_text()
    return _kilobytes("SwapTotal", text) - _kilobytes("SwapFree", text)


def _kilobytes(name: str, text: str) -> int:
    found = re.search(rf"^{name}: +(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
