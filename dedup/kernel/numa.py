"""Which NUMA node a frame belongs to.

Sources: Documentation/ABI/testing/sysfs-devices-memory (the memory blocks of a node),
Documentation/ABI/stable/sysfs-devices-node, mm/vmstat.c (zoneinfo_show_print).
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Final

import numpy as np

from dedup.errors import Unsupported
from dedup.pages import Nodes

DEVICES: Final = Path("/sys/devices/system")
PROC: Final = Path("/proc")


def nodes(
    devices: Path = DEVICES, proc: Path = PROC, page_size: int = mmap.PAGESIZE
) -> Nodes | None:
    """Read the frames of each node; None where there is one node.

    Raises
    ------
    Unsupported
        Several nodes, and neither memory blocks nor zones with their frames.
    """
    numbers = _numbers(devices / "node", "node")
    if len(numbers) < 2:
        return None
    ranges = _blocks(devices, numbers, page_size) or _zones(proc)
    if not ranges:
        raise Unsupported(
            f"this host has {len(numbers)} NUMA nodes, but neither {devices}/node/node*/memory* "
            f"nor {proc}/zoneinfo says which memory is whose",
            "mount sysfs and procfs",
        )
    ranges.sort()
    start, node = (np.array(column, np.int64) for column in zip(*ranges, strict=True))
    first = np.ones(len(node), bool)
    first[1:] = node[1:] != node[:-1]
    return Nodes(start[first], node[first])


def _numbers(folder: Path, name: str) -> list[int]:
    found = (re.fullmatch(rf"{name}(\d+)", p.name) for p in folder.glob(f"{name}[0-9]*"))
    return sorted(int(m[1]) for m in found if m)


def _blocks(devices: Path, numbers: list[int], page_size: int) -> list[tuple[int, int]]:
    """First frame and node of each memory block."""
    try:
        size = int((devices / "memory" / "block_size_bytes").read_text(), 16) // page_size
    except (OSError, ValueError):
        return []
    # A block that reaches over into another node is linked in both: by the zones, then.
    owners: dict[int, int] = {}
    for n in numbers:
        for block in _numbers(devices / "node" / f"node{n}", "memory"):
            if block in owners:
                return []
            owners[block] = n
    return [(block * size, n) for block, n in owners.items()]


def _zones(proc: Path) -> list[tuple[int, int]]:
    """First frame and node of each zone that has memory."""
    try:
        text = (proc / "zoneinfo").read_text()
    except OSError:
        return []
    found = []
    for part in re.split(r"^(?=Node )", text, flags=re.MULTILINE):
        node = re.match(r"Node (\d+), zone", part)
        present = re.search(r"^\s+present\s+(\d+)", part, re.MULTILINE)
        start = re.search(r"^\s+start_pfn:\s+(\d+)", part, re.MULTILINE)
        if node and start and present and int(present[1]):
            found.append((int(start[1]), int(node[1])))
    return found
