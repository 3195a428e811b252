"""Memory of a process besides the pages that KSM could merge.

Sources: Documentation/filesystems/proc.rst (status, smaps_rollup),
Documentation/admin-guide/cgroup-v2.rst (memory.stat).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dedup.errors import NotPermitted
from dedup.kernel.processes import kilobytes

if TYPE_CHECKING:
    from collections.abc import Collection

    from dedup.kernel.processes import Handle

SELF: Final = Path("/proc/self/status")
CGROUPS: Final = Path("/sys/fs/cgroup")


def resident_bytes(status: Path = SELF) -> int:
    """Memory that this process has at the moment (VmRSS)."""
    return int(status.read_text().partition("VmRSS:")[2].split()[0]) * 1024


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes."""

    file_bytes: int
    """Pages of files, which all instances on a host share."""
    shared_memory_bytes: int
    """tmpfs and shared mappings: its part of them, where smaps_rollup may be read."""
    page_table_bytes: int


def read(handle: Handle) -> Footprint:
    """Read it from a process.

    Raises
    ------
    ProcessGone, NotPermitted
    """
    status = handle.read("status")
    try:
        # Several processes may map the same shared memory: each takes its part of it.
        shared = kilobytes(b"Pss_Shmem", handle.read("smaps_rollup"))
    except NotPermitted:
        shared = None
    return Footprint(
        file_bytes=kilobytes(b"RssFile", status) or 0,
        shared_memory_bytes=kilobytes(b"RssShmem", status) or 0 if shared is None else shared,
        page_table_bytes=kilobytes(b"VmPTE", status) or 0,
    )


def kernel_bytes(cgroup: str, pids: Collection[int], root: Path = CGROUPS) -> int | None:
    """The kernel's own memory for a cgroup, page tables left out; cgroup v2.

    Parameters
    ----------
    cgroup : str
        Its path; the root cgroup counts nothing of the kind.
    pids : collection of int
        Whose memory is meant: a cgroup with others in it tells nothing of them.
    """
    folder = root / cgroup.strip("/")
    try:
        inside = {int(pid) for pid in (folder / "cgroup.procs").read_text().split()}
        text = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    found = dict(re.findall(r"^(kernel|pagetables) (\d+)$", text, re.MULTILINE))
    if not inside or not inside <= set(pids) or "kernel" not in found or folder == root:
        return None
    return max(0, int(found["kernel"]) - int(found.get("pagetables", 0)))
