"""Which processes: pid and start time, name, user, cgroup, container, tree.

Source: Documentation/filesystems/proc.rst.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import pwd
import re
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from dedup import _core
from dedup.errors import (
    NoMemory,
    NoSuchProcess,
    NotPermitted,
    OutputFailed,
    ProcessGone,
    Unsupported,
)
from dedup.pages import ProcessId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

PROC: Final = Path("/proc")
ADDR_NO_RANDOMIZE: Final = 0x0040000
DOCKER: Final = Path("/var/lib/docker/containers")


@dataclass(frozen=True, slots=True)
class Info:
    """One process as /proc shows it to everyone."""

    id: ProcessId
    name: str
    uid: int
    ppid: int
    state: str
    kernel_thread: bool
    reaped_faults: int
    """Page faults of children that it waited for: more than 0 when it has forked before."""
    anonymous_bytes: int
    pinned_bytes: int
    """VmPin: pinned for devices and io_uring; vmsplice, for one, does not count."""
    locked_bytes: int
    """VmLck."""
    swapped_bytes: int
    """VmSwap."""
    cgroup: str
    tgid: int
    """The process, where the pid is that of a thread."""
    program: tuple[bytes, ...]
    """Where code and arguments lie: another place after an exec. Zeros where hidden from us."""

    @property
    def user(self) -> str:
        """Name of the real user, the number where it has none."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)

    @property
    def unit(self) -> str:
        """Systemd unit, by the cgroup's path; empty where there is none."""
        for part in reversed(self.cgroup.split("/")):
            if part.endswith((".service", ".scope", ".socket", ".mount")):
                return part
        return ""


@cache
def require_own_proc(proc: Path = PROC) -> None:
    """Raise where /proc is that of another pid namespace: its numbers mean others to system calls.

    Raises
    ------
    Unsupported
    """
    try:
        shown = os.readlink(proc / "self")
    except OSError:
        # We are not in it; or there is no /proc at all, which is told of elsewhere.
        shown = "" if (proc / "stat").exists() else str(os.getpid())
    if shown != str(os.getpid()):
        raise Unsupported(
            f"{proc} shows the processes of another pid namespace than ours",
            "enter that one with its mounts, `nsenter --all --target PID`, or have ours shown, "
            "`unshare --mount sh -c 'mount -t proc proc /proc && exec dedup ...'`",
        )


class Handle:
    """A process pinned by its open /proc directory.

    Files opened through it belong to this process or fail; they never belong to a later one with
    the same pid.

    Raises
    ------
    NoSuchProcess, NoMemory
    """

    def __init__(self, pid: int, proc: Path = PROC) -> None:
        self.pid = pid
        try:
            self.dir_fd = os.open(proc / str(pid), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise NoSuchProcess(f"there is no process {pid}") from e
        try:
            self.info = self._info()
        except BaseException:
            self.close()
            raise
        self.id = self.info.id

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the process go; may be called twice."""
        if self.dir_fd >= 0:
            os.close(self.dir_fd)
            self.dir_fd = -1

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Open a file of the process; the descriptor is the caller's.

        Raises
        ------
        ProcessGone, NotPermitted, OutputFailed
        """
        try:
            return os.open(name, flags | os.O_CLOEXEC, dir_fd=self.dir_fd)
        except OSError as e:
            raise self._error(e, name) from e

    def read(
        self,
        name: str,
        at_a_time: int = 1 << 20,
        enough: Callable[[bytes], bool] = lambda _: False,
    ) -> bytes:
        """Read a file of the process whole.

        Parameters
        ----------
        name : str
            In its folder in /proc.
        at_a_time : int
            Bytes asked for by one call.
        enough : callable, optional
            Told of what each call brought; true: what follows it is not wanted.

        Raises
        ------
        ProcessGone, NotPermitted, OutputFailed
        """
        fd = self.open(name)
        try:
            parts = []
            while part := os.read(fd, at_a_time):
                parts.append(part)
                if enough(part):
                    break
        except OSError as e:
            raise self._error(e, name) from e
        finally:
            os.close(fd)
        return b"".join(parts)

    def read_or_none(self, name: str) -> bytes | None:
        """Read a file of the process; None where it is absent in this kernel or not ours to see.

        Raises
        ------
        ProcessGone
        """
        try:
            return self.read(name)
        except NotPermitted:
            return None
        except ProcessGone:
            if self.alive():
                return None
            raise

    def alive(self) -> bool:
        """Whether the process still runs: neither ended nor a zombie."""
        try:
            fd = os.open("stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.dir_fd)
            try:
                text = os.read(fd, 4096)
            finally:
                os.close(fd)
        except OSError:
            return False
        return text.rpartition(b")")[2].split()[0] not in {b"Z", b"X"}

    def same_program(self) -> bool:
        """Whether it still runs the program that it ran when it was opened.

        Raises
        ------
        ProcessGone, NotPermitted
        """
        return _program(self.read("stat").rpartition(b")")[2].split()) == self.info.program

    def require_memory(self) -> None:
        """Raise `NoMemory` for a zombie or a kernel thread."""
        if self.info.state in {"Z", "X"}:
            raise NoMemory(f"process {self.pid} ({self.info.name}) is a zombie: it has no memory")
        if self.info.kernel_thread:
            raise NoMemory(
                f"process {self.pid} ({self.info.name}) is a kernel thread: "
                "it has no memory of its own"
            )

    def _error(self, e: OSError, name: str) -> Exception:
        who = f"process {self.pid}"
        if e.errno in {errno.ENOENT, errno.ESRCH}:
            return ProcessGone(f"{who} has ended")
        if e.errno in {errno.EACCES, errno.EPERM}:
            return NotPermitted(f"may not read /proc/{self.pid}/{name}: {e.strerror}")
        return OutputFailed(f"reading /proc/{self.pid}/{name} failed: {e.strerror}", "")

    def _info(self) -> Info:
        return _parse(self.pid, self.read("stat"), self.read("status"), self.read("cgroup"))


def _parse(pid: int, stat: bytes, status: bytes, cgroup: bytes) -> Info:
    head, _, tail = stat.rpartition(b")")
    f = tail.split()
    uid = re.search(rb"^Uid:\s+(\d+)", status, re.MULTILINE)
    tgid = re.search(rb"^Tgid:\s+(\d+)", status, re.MULTILINE)
    return Info(
        id=ProcessId(pid, int(f[19])),
        name=head.partition(b"(")[2].decode(errors="surrogateescape"),
        uid=int(uid[1]) if uid else -1,
        ppid=int(f[1]),
        state=f[0].decode(),
        kernel_thread=bool(int(f[6]) & 0x00200000),
        reaped_faults=int(f[8]) + int(f[10]),
        anonymous_bytes=kilobytes(b"RssAnon", status) or 0,
        pinned_bytes=kilobytes(b"VmPin", status) or 0,
        locked_bytes=kilobytes(b"VmLck", status) or 0,
        swapped_bytes=kilobytes(b"VmSwap", status) or 0,
        cgroup=_cgroup_path(cgroup.decode(errors="surrogateescape")),
        tgid=int(tgid[1]) if tgid else pid,
        program=_program(f),
    )


def _program(f: list[bytes]) -> tuple[bytes, ...]:
    # start_code, start_stack, arg_start (proc_pid_stat(5)), from the fields behind the name.
    return (f[23], f[25], f[45]) if len(f) > 45 else ()


def kilobytes(name: bytes, text: bytes) -> int | None:
    """Bytes of a field of status or smaps_rollup, None where it is not there."""
    found = re.search(rb"^%b:\s+(\d+) kB" % name, text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _cgroup_path(text: str) -> str:
    """Path in the unified hierarchy, else in the first one with a path."""
    fallback = ""
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            return path
        if path not in {"", "/"} and not fallback:
            fallback = path
    return fallback or "/"


def of_process(pid: int, proc: Path = PROC) -> Handle:
    """The process of a pid, also where the number is that of one of its threads.

    Raises
    ------
    NoSuchProcess
    """
    handle = Handle(pid, proc)
    tgid = handle.info.tgid
    if tgid == pid:
        return handle
    handle.close()
    return Handle(tgid, proc)


def label(handle: Handle) -> str:
    """Security label (SELinux, AppArmor, Smack); empty where no module gives one.

    Source: proc_pid_attr(5).

    Raises
    ------
    ProcessGone
    """
    try:
        text = handle.read("attr/current")
    except (NotPermitted, OutputFailed):
        return ""  # EINVAL: no module that labels
    return text.rstrip(b"\0\n").decode(errors="surrogateescape")


def boot_id(proc: Path = PROC) -> str:
    """Identifier of this boot; empty where it is hidden from us."""
    try:
        return (proc / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def now_ticks() -> int:
    """The present moment as `ProcessId.start_time` has it."""
    ticks = os.sysconf("SC_CLK_TCK")
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) * ticks // 1_000_000_000


def randomized(pid: int, proc: Path = PROC) -> bool:
    """Whether a process's addresses are random, so that no two programs share them by chance.

    Source: personality(2), ADDR_NO_RANDOMIZE; sysctl kernel.randomize_va_space.
    """
    try:
        personality = int((proc / str(pid) / "personality").read_text(), 16)
        host = (proc / "sys/kernel/randomize_va_space").read_text().strip()
    except (OSError, ValueError):
        return False  # gone, or hidden from us
    return host != "0" and not personality & ADDR_NO_RANDOMIZE


def joins(pid: int, others: list[int]) -> bool:
    """Whether a process runs in the address space of another one (CLONE_VM, vfork).

    Source: kcmp(2), whose order of address spaces serves to search among many forks.

    Parameters
    ----------
    pid : int
    others : list of int
        Processes with address spaces of their own, in that order; `pid` is put among them if it
        has another one.
    """
    low, high = 0, len(others)
    while low < high:
        middle = (low + high) // 2
        try:
            order = _core.kcmp_vm(pid, others[middle])
        except OSError:
            break  # ended, hidden from us, or no such call: apart, as nearly always
        if order == 0:
            return True
        low, high = (low, middle) if order == 1 else (middle + 1, high)
    others.insert(low, pid)
    return False


def pids(proc: Path = PROC) -> list[int]:
    """All pids in sight, ascending."""
    return sorted(int(e.name) for e in os.scandir(proc) if e.name.isdigit())


def every(proc: Path = PROC) -> list[Info]:
    """All processes that are there and have memory of their own, ascending by pid."""
    found = []
    for pid in pids(proc):
        try:
            with Handle(pid, proc) as handle:
                handle.require_memory()
                found.append(handle.info)
        except NoSuchProcess:
            continue
        except NotPermitted:
            continue  # hidden by hidepid: not ours to see
    return found


@dataclass(frozen=True, slots=True)
class Choice:
    """How the user chose processes; all parts add up."""

    pids: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    cgroups: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()
    trees: tuple[int, ...] = ()
    all: bool = False

    def __bool__(self) -> bool:
        return self.all or any(
            (self.pids, self.names, self.users, self.cgroups, self.containers, self.trees)
        )


def choose(choice: Choice, proc: Path = PROC) -> list[int]:
    """Pids that fit the choice, ascending, ourselves left out unless named by pid.

    Raises
    ------
    NoSuchProcess
        A pid (or a tree's root) that is not there, or nothing fits.
    """
    chosen = set(choice.pids)
    if (
        choice.names
        or choice.users
        or choice.cgroups
        or choice.containers
        or choice.trees
        or (choice.all)
    ):
        infos = every(proc)
        chosen |= {i.id.pid for i in infos if _fits(i, choice) and i.id.pid != os.getpid()}
        for root in choice.trees:
            if not (proc / str(root)).exists():
                raise NoSuchProcess(f"there is no process {root}, so it has no tree")
            chosen |= _descendants(root, infos)
    if not chosen:
        raise NoSuchProcess("no process fits the choice")
    return sorted(chosen)


def _fits(info: Info, choice: Choice) -> bool:
    return (
        choice.all
        or any(fnmatch.fnmatchcase(info.name, g) for g in choice.names)
        or any(u in {info.user, str(info.uid)} for u in choice.users)
        or any(_in_cgroup(info.cgroup, c) for c in choice.cgroups)
        or any(_in_container(info.cgroup, c) for c in choice.containers)
    )


def _in_cgroup(path: str, wanted: str) -> bool:
    wanted = "/" + wanted.removeprefix("/sys/fs/cgroup").strip("/")
    return path == wanted or path.startswith(wanted.rstrip("/") + "/")


_CONTAINER = re.compile(
    r"(?:docker|libpod|crio|cri-containerd|containerd)-(?P<scope>[0-9a-f]{12,64})(?:\.scope)?"
    r"|(?:.*:)?(?:crio|cri-containerd):(?P<cri>[0-9a-f]{12,64})"
    r"|(?P<bare>[0-9a-f]{64})"
    r"|lxc\.payload\.(?P<lxc>.+)"
    r"|machine-(?P<machine>.+)\.scope"
    r"|systemd-nspawn@(?P<nspawn>.+)\.service"
)
"""A part of a cgroup path that names a container: by its id, or by a name that people gave."""


def container_of(cgroup: str) -> str:
    """Id or name of the container that a cgroup path belongs to, empty where none."""
    parts = cgroup.strip("/").split("/")
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        if m := _CONTAINER.fullmatch(part):
            name = m[m.lastgroup or 0]
            # Names of units have their dashes escaped.
            return name.replace("\\x2d", "-") if m.lastgroup in {"machine", "nspawn"} else name
        if part in {"lxc", "lxc.payload"} and following:
            return following
        if part == "machine.slice" and not _CONTAINER.fullmatch(following):
            unit, _, kind = following.rpartition(".")
            # Podman's monitor is none of the container.
            if kind in {"scope", "service"} and not unit.startswith("libpod-conmon-"):
                return unit
    return ""


def _in_container(cgroup: str, wanted: str) -> bool:
    container = container_of(cgroup)
    if not container:
        return False
    if container == wanted or (len(wanted) >= 4 and container.startswith(wanted)):
        return True
    # Docker keeps the name that people use beside the id.
    try:
        config = json.loads((DOCKER / container / "config.v2.json").read_text())
    except (OSError, ValueError):
        return False
    return str(config.get("Name", "")).lstrip("/") == wanted


def _descendants(root: int, infos: Iterable[Info]) -> set[int]:
    children: dict[int, list[int]] = {}
    for info in infos:
        children.setdefault(info.ppid, []).append(info.id.pid)
    found: set[int] = set()
    todo = [root]
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children.get(pid, [])
    known = {i.id.pid for i in infos}
    return {p for p in found if p in known or p == root} - {os.getpid()}


def parents(proc: Path = PROC) -> set[int]:
    """Pids that have a child now."""
    found = set()
    for pid in pids(proc):
        try:
            fd = os.open(f"{proc}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # ended meanwhile
        try:
            found.add(int(os.read(fd, 4096).rpartition(b")")[2].split()[1]))
        except ProcessLookupError:
            continue  # ended just now
        finally:
            os.close(fd)
    return found
