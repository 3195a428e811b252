"""Where the calibration of this host is kept: what ksmd's visits cost here."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import stat
from pathlib import Path
from typing import Final, NamedTuple

from dedup.errors import NotPermitted, OutputFailed
from dedup.kernel import ksmd
from dedup.model.cost import Calibration, Machine

PATH: Final = Path("/var/lib/dedup/calibration.json")
MOST_BYTES: Final = 1 << 16
MODE: Final = 0o644
"""Every user's prices come from it."""


class Stored(NamedTuple):
    """What was found."""

    calibration: Calibration | None
    why: str
    """Why there is none to use; empty where none was ever taken."""


def machine() -> Machine:
    """The machine here, as far as costs depend on it."""
    return Machine(platform.release(), ksmd.cpu_model(), ksmd.tick_seconds())


def load(path: Path = PATH, here: Machine | None = None) -> Stored:
    """Find the calibration of this host; one of another kernel or processor is refused.

    Parameters
    ----------
    path : Path, optional
    here : Machine, optional
        What it must have been taken on.
    """
    try:
        calibration = Calibration.from_json(json.loads(_read(path)))
    except FileNotFoundError:
        return Stored(None, "")
    except OSError as e:
        return Stored(None, f"{path} can't be read: {e.strerror}")
    except (ValueError, RecursionError, OverflowError) as e:
        return Stored(None, f"{path} is no calibration that this version can read: {e}")
    here = here or machine()
    taken = calibration.machine
    for what, then, now in (
        ("kernel", taken.kernel, here.kernel),
        ("processor", taken.cpu, here.cpu),
        ("timer tick", taken.tick_seconds, here.tick_seconds),
    ):
        if then != now:
            return Stored(None, f"{path} was taken with another {what} ({then}, here {now})")
    return Stored(calibration, "")


def _read(path: Path) -> bytes:
    """The file, if it is one and of a size that a calibration has."""
    # Not to wait for the other end, where it is a pipe.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is no regular file")
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError("it is too long")
    return data


def save(calibration: Calibration, path: Path = PATH) -> None:
    """Store a calibration, whole or not at all.

    Raises
    ------
    NotPermitted, OutputFailed
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    data = json.dumps(calibration.to_json(), indent=1, allow_nan=False).encode() + b"\n"
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, MODE)
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(fd, MODE)
                os.fsync(fd)
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
    except PermissionError as e:
        raise NotPermitted(f"may not write {path}: {e.strerror}") from e
    except OSError as e:
        raise OutputFailed(
            f"writing {path} failed: {e.strerror}", "make room there, then run it again"
        ) from e
