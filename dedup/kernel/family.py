"""The processes that descend from one, and the environment that a process was started with.

Source: Documentation/filesystems/proc.rst (/proc/PID/task/TID/children), prctl(2)
PR_SET_CHILD_SUBREAPER and PR_SET_PDEATHSIG, proc_pid_stat(5), getsid(2).
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dedup import _core
from dedup.errors import NoSuchProcess, NotPermitted, OutputFailed
from dedup.kernel.processes import Handle, parents, pids

if TYPE_CHECKING:
    from collections.abc import Iterable

PROC: Final = Path("/proc")
FEW: Final = 8
"""Processes that are asked for their children one by one."""


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends; they must be waited for then.

    Children don't inherit this.
    """
    _core.child_subreaper()


def die_with_parent(parent: int) -> None:
    """Be killed when the parent ends; a child calls it, before exec.

    It survives exec, but not that of a setuid program; our children don't inherit it.
    """
    _core.parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


def session(pid: int) -> int | None:
    """The session of a process; None where it has ended."""
    try:
        return os.getsid(pid)
    except OSError:
        return None


def environment_has(pid: int, word: str, proc: Path = PROC) -> bool:
    """Whether a process was started with `NAME=VALUE` in its environment."""
    try:
        block = (proc / str(pid) / "environ").read_bytes()
    except OSError:
        return False  # ended, or another user's
    return os.fsencode(word) in block.split(b"\0")


def program(pid: int, proc: Path = PROC) -> str:
    """Name of the file that a process runs; empty where it has ended or is another user's."""
    try:
        return Path(os.readlink(proc / str(pid) / "exe")).name
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Use:
    """What processes use, all together."""

    pids: frozenset[int]
    """Those that are no zombies."""
    anonymous_bytes: int
    cpu_seconds: float
    """Of the time that they have lived."""


def use(of: Iterable[int], proc: Path = PROC) -> Use:
    """What some processes use now; those that have ended are left out."""
    found: set[int] = set()
    total = ticks = 0
    for pid in of:
        with suppress(NoSuchProcess, NotPermitted, OutputFailed), Handle(pid, proc) as handle:
            if handle.info.state in {"Z", "X"}:
                continue
            fields = handle.read("stat").rpartition(b")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
            total += handle.info.anonymous_bytes
            found.add(pid)
    return Use(frozenset(found), total, ticks / os.sysconf("SC_CLK_TCK"))


def descendants(root: int, proc: Path = PROC) -> list[int]:
    """Pids of all descendants of a process, zombies included, itself left out.

    One that is born or ends meanwhile may be missing.
    """
    lists = _lists_children(proc)
    by_parent = {} if lists else _by_parent(proc)
    found: list[int] = []
    todo = [root]
    while todo:
        pid = todo.pop()
        born = _children(pid, proc) if lists else by_parent.get(pid, [])
        found += born
        todo += born
    return found


class Parents:
    """Which processes have a child now.

    Parameters
    ----------
    asked : int
        How many it will be asked about: of few, each is asked for its children; of more, every
        process of the host is asked once for its parent.
    """

    def __init__(self, asked: int, proc: Path = PROC) -> None:
        self._proc = proc
        few = asked <= FEW and _lists_children(proc)
        self._all = None if few else parents(proc)

    def __contains__(self, pid: int) -> bool:
        if self._all is not None:
            return pid in self._all
        return bool(_children(pid, self._proc))


def _lists_children(proc: Path) -> bool:
    """Whether this kernel lists them (CONFIG_PROC_CHILDREN)."""
    me = os.getpid()
    return (proc / str(me) / "task" / str(me) / "children").exists()


def _children(pid: int, proc: Path) -> list[int]:
    found: list[int] = []
    tasks = proc / str(pid) / "task"
    try:
        for thread in os.listdir(tasks):
            found += map(int, (tasks / thread / "children").read_bytes().split())
    except OSError:
        pass  # it, or a thread of it, ended meanwhile
    return found


def _by_parent(proc: Path) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for pid in pids(proc):
        try:
            tail = (proc / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue  # ended meanwhile
        found.setdefault(int(tail[1]), []).append(pid)
    return found


def starting_environment(proc: Path = PROC) -> dict[str, str]:
    """The environment that we were started with.

    Python and we ourselves add to the present one (LC_CTYPE in the C locale, by PEP 538, and the
    number of threads of NumPy's BLAS), which is no business of a program that we start.
    """
    try:
        block = (proc / "self" / "environ").read_bytes()
    except OSError:
        return dict(os.environ)
    found: dict[str, str] = {}
    for word in block.split(b"\0"):
        name, separator, value = os.fsdecode(word).partition("=")
        if separator:
            found.setdefault(name, value)  # of two, getenv(3) finds the first
    return found
