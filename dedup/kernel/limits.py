"""Settings in /proc/sys that bear on merging, and swap.

Source: Documentation/admin-guide/sysctl/kernel.rst and vm.rst, proc_swaps(5).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
DEFAULT_MAX_MAP_COUNT: Final = 65530
"""The kernel's (include/linux/mm.h), for where it is hidden from us."""


@dataclass(frozen=True, slots=True)
class Limits:
    """None where the kernel does not tell."""

    randomize_va_space: int | None
    """0 no address randomisation, 1 all but the heap, 2 all."""
    max_map_count: int | None
    """Mappings that a process may have."""
    swaps: tuple[str, ...]
    """Swap areas in use, by their names."""


def read(proc: Path = PROC) -> Limits:
    """Read them."""
    try:
        lines = (proc / "swaps").read_text(errors="replace").splitlines()[1:]
    except OSError:
        lines = []
    return Limits(
        randomize_va_space=_number(proc / "sys/kernel/randomize_va_space"),
        max_map_count=_number(proc / "sys/vm/max_map_count"),
        swaps=tuple(line.split()[0] for line in lines if line.strip()),
    )


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
