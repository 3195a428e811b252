"""The kernel's limits on mappings.

Source: Documentation/admin-guide/sysctl/vm.rst (max_map_count).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

MAX_MAP_COUNT: Final = Path("/proc/sys/vm/max_map_count")
DEFAULT: Final = 65530


def max_map_count(path: Path = MAX_MAP_COUNT) -> int:
    """Mappings that a process may have; the kernel's default where it is hidden from us."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return DEFAULT
