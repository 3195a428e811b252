"""One of us at a time: a lock on this host's KSM.

Source: flock(2); the kernel lets go of it when its holder ends, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from dedup.errors import Busy, NotPermitted, OutputFailed, Refused

if TYPE_CHECKING:
    from types import TracebackType

PROC: Final = Path("/proc")
STATE: Final = Path("/run/dedup")
"""Lock and journal. Gone after a reboot, as are the kernel's settings that they speak of."""


ROOT: Final = 0


def make_state_folder(state: Path) -> None:
    """Make the folder for lock and journal.

    Raises
    ------
    NotPermitted, OutputFailed
    Refused
        Others may write there.
    """
    try:
        state.mkdir(mode=0o755, parents=True, exist_ok=True)
    except FileExistsError:
        pass  # which is told below
    except PermissionError as e:
        raise NotPermitted(f"may not make {state}: {e.strerror}") from e
    except OSError as e:
        raise OutputFailed(
            f"making {state} failed: {e.strerror}; nothing was changed",
            f"see `df -h {state.parent}` and `df -i {state.parent}`, then run it again",
        ) from e
    require_own_folder(state)


def require_own_folder(state: Path) -> None:
    """Raise where lock and journal are at others' mercy: what is written there is put back by root.

    Raises
    ------
    NotPermitted, OutputFailed, Refused
    """
    try:
        found = state.stat()
    except PermissionError as e:
        raise NotPermitted(f"may not look into {state}: {e.strerror}") from e
    except OSError as e:
        raise OutputFailed(
            f"{state} is no folder ({e.strerror})", f"see `ls -ld {state}`, and take it away"
        ) from e
    if not stat.S_ISDIR(found.st_mode):
        raise OutputFailed(f"{state} is no folder", f"see `ls -ld {state}`, and take it away")
    others = found.st_mode & stat.S_IWOTH or (
        found.st_mode & stat.S_IWGRP and found.st_gid not in {ROOT, os.getegid()}
    )
    if others or found.st_uid not in {ROOT, os.geteuid()}:
        raise Refused(
            f"others may write in {state}, and what is written there is what dedup puts back",
            f"look at what is there, then `chown root:root {state}; chmod 755 {state}`",
        )


def open_own(path: Path, flags: int, mode: int = 0o600) -> int:
    """Open a file of the folder: never what a link shows to, nor what another user put there.

    Raises
    ------
    OSError
    OutputFailed
        It is no file of ours.
    """
    # A pipe must not keep us waiting for its other end.
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, mode)
    except OSError as e:
        if e.errno in {errno.ELOOP, errno.EISDIR, errno.ENXIO}:
            raise _not_ours(path) from e
        raise
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_uid in {ROOT, os.geteuid()}:
        return fd
    os.close(fd)
    raise _not_ours(path)


def _not_ours(path: Path) -> OutputFailed:
    return OutputFailed(f"{path} is no file of dedup's", f"see `ls -l {path}`, and take it away")


def cannot_open(path: Path, e: OSError) -> OutputFailed:
    """The error that a file of the folder can't be opened to be written."""
    return OutputFailed(
        f"opening {path} failed: {e.strerror}; nothing was changed",
        f"see `df -h {path.parent}` and `df -i {path.parent}`, then run it again",
    )


def read_own(path: Path) -> bytes:
    """Read a file of the folder.

    Raises
    ------
    OSError
    OutputFailed
        It is no file of ours.
    """
    with open(open_own(path, os.O_RDONLY), "rb") as file:
        return file.read()


def holder(state: Path = STATE, proc: Path = PROC) -> int | None:
    """Who holds the lock, without trying to take it; None where nobody in sight does.

    Source: proc_locks(5). A try, however short, could fail another run that begins just then.
    """
    try:
        found = (state / "lock").stat()
        lines = (proc / "locks").read_text().splitlines()
    except OSError:
        return None
    where = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in lines:
        # `1: FLOCK ADVISORY WRITE 6846 fe:00:2148717 0 EOF`; waiting ones have an arrow more.
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == where:
            return int(fields[4])
    return None


def busy(pid: str) -> Busy:
    """The error that another run of ours holds the lock; its pid, where that is known."""
    return Busy(
        f"another dedup (pid {pid or 'unknown'}) is changing KSM on this host",
        "wait until it is done, or stop it: it puts everything back",
    )


class HostLock:
    """Held by whoever changes KSM's settings.

    Parameters
    ----------
    state : Path, optional
        Folder of the lock file.
    """

    def __init__(self, state: Path = STATE) -> None:
        self.path = state / "lock"
        self._fd = -1

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, or fail at once.

        Raises
        ------
        Busy
            Another run of ours holds it.
        NotPermitted, OutputFailed, Refused
        """
        make_state_folder(self.path.parent)
        try:
            # Who may open it may lock it, and keep root from its work.
            fd = open_own(self.path, os.O_RDWR | os.O_CREAT)
        except PermissionError as e:
            raise NotPermitted(f"may not lock {self.path}: {e.strerror}") from e
        except OSError as e:
            raise cannot_open(self.path, e) from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = os.read(fd, 32).decode(errors="replace").strip()
            os.close(fd)
            raise busy(holder) from e
        self._fd = fd
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as e:
            self.release()
            raise OutputFailed(
                f"writing {self.path} failed: {e.strerror}; nothing was changed",
                "make room there, then run it again",
            ) from e

    def release(self) -> None:
        """Let go; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
