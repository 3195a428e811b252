"""Whether we run in a container, and what of the host is out of its sight.

Sources: include/linux/proc_ns.h (inode numbers of the initial namespaces), systemd's
container interface, podman-run(1).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dedup.kernel import processes

ROOT: Final = Path("/")
INITIAL: Final = {"pid": 0xEFFFFFFC, "user": 0xEFFFFFFD}
"""PROC_PID_INIT_INO, PROC_USER_INIT_INO."""
MARKS: Final = {
    "run/.containerenv": "podman",
    ".dockerenv": "docker",
    "run/systemd/container": "systemd",
}
"""Files that an engine leaves in its containers."""


@dataclass(frozen=True, slots=True)
class Container:
    """What separates us from the host."""

    pid_namespace: bool
    """Our pids are not the host's: its processes and ksmd are out of sight."""
    user_namespace: bool
    """Our root is not the host's."""
    engine: str
    """By the file that it left; empty where there is none. An image that was booted or unpacked
    may have it too, so it proves nothing by itself."""
    name: str
    """Id or name of the container, by the cgroup; empty where it does not tell."""
    sys_read_only: bool

    @property
    def inside(self) -> bool:
        """Whether this is a container, or as good as one."""
        return bool(self.pid_namespace or self.user_namespace or self.name)


def read(root: Path = ROOT) -> Container:
    """Look; what can't be seen counts as the host's."""
    proc = root / "proc"
    try:
        cgroup = (proc / "self/cgroup").read_text(errors="surrogateescape")
    except OSError:
        cgroup = ""
    names = [processes.container_of(line.split(":", 2)[-1]) for line in cgroup.splitlines()]
    return Container(
        pid_namespace=not _initial(proc, "pid"),
        user_namespace=not _initial(proc, "user"),
        engine=next((e for file, e in MARKS.items() if (root / file).exists()), ""),
        name=next(filter(None, names), ""),
        sys_read_only=_read_only(root / "sys/kernel/mm/ksm"),
    )


def _initial(proc: Path, kind: str) -> bool:
    try:
        return os.readlink(proc / "self/ns" / kind) == f"{kind}:[{INITIAL[kind]}]"
    except OSError:
        return True


def _read_only(path: Path) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False
