"""The processes that descend from one, and the environment that a process was started with.

Source: Documentation/filesystems/proc.rst (/proc/PID/task/TID/children), prctl(2)
PR_SET_CHILD_SUBREAPER.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from dedup import _core
from dedup.kernel.processes import pids

PROC: Final = Path("/proc")


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends; they must be waited for then.

    Children don't inherit this.
    """
    _core.child_subreaper()


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
