"""Processes that appear later, in a cgroup or by any other choice, and those that exec.

By polling: the kernel tells nobody of new processes without a privileged socket. One that comes
and goes between two polls is never seen.

Source: Documentation/admin-guide/cgroup-v2.rst (cgroup.procs lists one cgroup, not those below).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dedup.errors import NoMemory, NoSuchProcess, NotPermitted, OutputFailed, Unsupported
from dedup.kernel.processes import PROC, Choice, Handle, Info, choose

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from dedup.pages import ProcessId

ROOTS: Final = (
    Path("/sys/fs/cgroup"),
    Path("/sys/fs/cgroup/unified"),
    Path("/sys/fs/cgroup/systemd"),
)
"""Where the unified hierarchy is mounted, or systemd's own of version 1."""
INTERVAL_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Arrival:
    """A process that is new, or that runs another program now."""

    info: Info
    exec: bool
    """It was there before and has called exec: its memory is another."""


class Arrivals:
    """Watch what a search finds.

    Parameters
    ----------
    find : callable
        Gives the pids of now: see `in_cgroup` and `in_choice`.
    already : list of Info, optional
        Processes that are no news; by default all that `find` gives at the first poll are.
    proc : Path, optional
    """

    def __init__(
        self, find: Callable[[], list[int]], already: Iterable[Info] = (),
        proc: Path = PROC,
    ) -> None:  # fmt: skip
        self._find = find
        self._proc = proc
        self._seen: dict[ProcessId, tuple[bytes, ...]] = {i.id: i.program for i in already}

    def poll(self) -> list[Arrival]:
        """What is new since the last poll; processes without memory of their own are left out."""
        found = []
        now: dict[ProcessId, tuple[bytes, ...]] = {}
        for pid in self._find():
            try:
                with Handle(pid, self._proc) as handle:
                    handle.require_memory()
                    info = handle.info
            except (NoSuchProcess, NoMemory, NotPermitted, OutputFailed):
                continue  # ended meanwhile, a zombie, or hidden from us
            before = self._seen.get(info.id)
            now[info.id] = info.program
            if before is None or before != info.program:
                found.append(Arrival(info, before is not None))
        self._seen = now
        return found

    def watch(self, interval_seconds: float = INTERVAL_SECONDS) -> Iterator[Arrival]:
        """Poll for ever."""
        while True:
            yield from self.poll()
            time.sleep(interval_seconds)


def in_choice(choice: Choice, proc: Path = PROC) -> Callable[[], list[int]]:
    """A search for `Arrivals`: what fits a choice, which may be nothing now."""

    def find() -> list[int]:
        try:
            return choose(choice, proc)
        except NoSuchProcess:
            return []

    return find


def in_cgroup(path: str) -> Callable[[], list[int]]:
    """A search for `Arrivals`: the processes of a cgroup and of those below it.

    Parameters
    ----------
    path : str
        As /proc/PID/cgroup has it: ``/system.slice/redis.service``. It may come and go.

    Raises
    ------
    Unsupported
        No hierarchy is mounted where it belongs.
    """
    root = next((r for r in ROOTS if (r / "cgroup.procs").exists()), None)
    if root is None:
        raise Unsupported(
            "no cgroup hierarchy is mounted in /sys/fs/cgroup",
            "choose the processes another way: `--name`, `--tree`",
        )
    top = root / path.removeprefix("/sys/fs/cgroup").strip("/")

    def find() -> list[int]:
        found: set[int] = set()
        for folder, _, files in os.walk(top):
            if "cgroup.procs" not in files:
                continue
            try:
                words = Path(folder, "cgroup.procs").read_bytes().split()
            except OSError:
                continue  # removed meanwhile, or of threads: those above list its processes
            found |= {int(w) for w in words}
        return sorted(found - {0})  # 0: in no pid namespace of ours

    return find
