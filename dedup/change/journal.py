"""The journal: what a run of ours changes, written down before it is changed.

One JSON object a line. It outlives a killed run; `dedup restore` reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from dedup.errors import NotPermitted, OutputFailed
from dedup.kernel.lock import STATE, make_state_folder, open_own, read_own

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

NAME: Final = "journal"
STANDING: Final = "tuned"
"""The record of what stays changed after the run that changed it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One change of one file in /sys or /proc/sys."""

    path: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of one file at the restore."""

    path: str
    value: str
    """What it should have again."""
    found: str
    """What it had."""
    outcome: str
    """`restored`, `unchanged`, `left` (somebody else changed it since) or `failed`."""
    why: str = ""


FIELDS: Final = {"path": str, "before": str, "after": str}
"""Of an entry, with their types."""


def append(path: Path, fields: Mapping[str, Any]) -> None:
    """Write one object as a line, on the disk before this returns.

    Raises
    ------
    NotPermitted, OutputFailed
        Nothing may be changed then.
    """
    make_state_folder(path.parent)
    try:
        fd = open_own(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            before = _whole(fd)
            line = json.dumps(fields).encode() + b"\n"
            if os.write(fd, line) != len(line):
                os.ftruncate(fd, before)
                raise OSError(28, "No space left on device")
            os.fsync(fd)
        finally:
            os.close(fd)
    except PermissionError as e:
        raise NotPermitted(f"may not write the journal {path}: {e.strerror}") from e
    except OSError as e:
        raise OutputFailed(
            f"writing the journal {path} failed: {e.strerror}; nothing was changed",
            "make room there, then run it again",
        ) from e


def _whole(fd: int) -> int:
    """Cut off a last line that a crash has left unfinished; gives the size."""
    size = os.fstat(fd).st_size
    end = os.pread(fd, size, 0).rfind(b"\n") + 1
    if end != size:
        os.ftruncate(fd, end)
    return end


def read(path: Path, needed: Mapping[str, type]) -> list[dict[str, Any]]:
    """The objects of a journal, oldest first; a last line cut short by a crash is left out.

    A change is made only after its line is whole, so nothing is lost with such a line.

    Parameters
    ----------
    path : Path
    needed : mapping of str to type
        Fields that each object has.

    Raises
    ------
    NotPermitted, OutputFailed
    """
    try:
        lines = read_own(path).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except PermissionError as e:
        raise NotPermitted(f"may not read the journal {path}: {e.strerror}") from e
    except OSError as e:
        raise OutputFailed(f"reading {path} failed: {e.strerror}", "") from e
    found = []
    for number, line in enumerate(lines):
        try:
            fields = json.loads(line)
            if not all(isinstance(fields[name], kind) for name, kind in needed.items()):
                raise TypeError
            if "\0" in str(fields.get("path", "")):
                raise ValueError
            found.append(fields)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            if number == len(lines) - 1:
                break
            raise OutputFailed(
                f"line {number + 1} of the journal {path} can't be read",
                f"look at it, put the values back by hand, then remove {path}",
            ) from e
    return found


class Journal:
    """The journal of this host, or its standing record.

    Parameters
    ----------
    state : Path, optional
        Its folder.
    name : str, optional
        `NAME` or `STANDING`.
    """

    def __init__(self, state: Path = STATE, name: str = NAME) -> None:
        self.path = state / name

    def record(self, entry: Entry) -> None:
        """Write an entry to the disk before the change is made.

        Raises
        ------
        NotPermitted, OutputFailed
            Nothing may be changed then.
        """
        append(self.path, asdict(entry))

    def entries(self) -> list[Entry]:
        """What is written, oldest first.

        Raises
        ------
        NotPermitted, OutputFailed
        """
        return [Entry(f["path"], f["before"], f["after"]) for f in read(self.path, FIELDS)]

    def move_to(self, other: Journal) -> None:
        """Append all entries to another journal, whole or not at all, and remove this one.

        A crash in between leaves them in both: to put back this one first, then the other, comes
        out right.

        Raises
        ------
        NotPermitted, OutputFailed
        """
        entries = self.entries()
        if not entries:
            return
        text = "".join(json.dumps(asdict(e)) + "\n" for e in [*other.entries(), *entries])
        part = other.path.with_name(f"{other.path.name}.part")
        try:
            with open(open_own(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            part.replace(other.path)
        except PermissionError as e:
            raise NotPermitted(f"may not write {other.path}: {e.strerror}") from e
        except OSError as e:
            with contextlib.suppress(OSError):
                part.unlink()
            raise OutputFailed(
                f"writing {other.path} failed: {e.strerror}", "make room there, then run it again"
            ) from e
        self.path.unlink(missing_ok=True)

    def restore(
        self,
        read: Callable[[str], str],
        write: Callable[[str, str], None],
        *,
        dry_run: bool = False,
    ) -> list[Restored]:
        """Put everything back, the newest change first; remove the journal when all is done.

        A value that is no longer the one we wrote was changed by somebody else since; it stays.

        Parameters
        ----------
        read : callable
            ``read(path) -> value``.
        write : callable
            ``write(path, value)``; raises `DedupError` when it can't.
        dry_run : bool
            Keep the journal; `write` then does nothing.
        """
        from dedup.errors import DedupError

        entries = self.entries()
        first: dict[str, str] = {}
        ours: dict[str, set[str]] = {}
        for e in entries:
            first.setdefault(e.path, e.before)
            ours.setdefault(e.path, set()).add(e.after)
        done = []
        for path in dict.fromkeys(e.path for e in reversed(entries)):
            try:
                found = read(path)
                if found == first[path]:
                    outcome, why = "unchanged", ""
                elif found in ours[path]:
                    write(path, first[path])
                    outcome, why = "restored", ""
                else:
                    outcome, why = "left", "changed by somebody else since"
            except (DedupError, OSError) as e:
                found, outcome, why = "?", "failed", str(e)
            done.append(Restored(path, first[path], found, outcome, why))
        if not dry_run and not any(r.outcome == "failed" for r in done):
            self.path.unlink(missing_ok=True)
        return done
