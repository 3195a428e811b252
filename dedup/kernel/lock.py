"""One of us at a time: a lock on this host's KSM.

Source: flock(2); the kernel lets go of it when its holder ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from dedup.errors import Busy, NotPermitted, OutputFailed

if TYPE_CHECKING:
    from types import TracebackType

PROC: Final = Path("/proc")
STATE: Final = Path("/run/dedup")
"""Lock and journal. Gone after a reboot, as are the kernel's settings that they speak of."""


def make_state_folder(state: Path) -> None:
    """Make the folder for lock and journal.

    Raises
    ------
    NotPermitted, OutputFailed
    """
    try:
        state.mkdir(mode=0o755, parents=True, exist_ok=True)
    except PermissionError as e:
        raise NotPermitted(f"may not make {state}: {e.strerror}") from e
    except OSError as e:
        raise OutputFailed(f"making {state} failed: {e.strerror}", "") from e


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
        NotPermitted, OutputFailed
        """
        make_state_folder(self.path.parent)
        try:
            # Who may open it may lock it, and keep root from its work.
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except PermissionError as e:
            raise NotPermitted(f"may not lock {self.path}: {e.strerror}") from e
        except OSError as e:
            raise OutputFailed(f"opening {self.path} failed: {e.strerror}", "") from e
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
