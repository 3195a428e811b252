"""What was made mergeable in other processes: written down before it is done, for `--undo`.

One JSON object a line. It lasts until it is undone, or the next boot, which ends the processes too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from dedup.change import journal
from dedup.errors import OutputFailed
from dedup.kernel.lock import STATE
from dedup.pages import ProcessId

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

NAME: Final = "applied"

Way = Literal["whole", "ranges"]
Ranges = tuple[tuple[int, int], ...]


@dataclass(slots=True)
class Mark:
    """One process that was made mergeable, or may have been: written before the attempt."""

    application: str
    id: ProcessId
    name: str
    program: tuple[str, ...]
    """Where its code and arguments lie; another place after an exec (`Info.program`)."""
    way: Way
    ranges: Ranges
    """Those marked; empty for `whole`."""
    own: Ranges
    """Ranges that the program had marked mergeable itself before."""
    undoing: bool = False
    """An undoing of it has begun."""


@dataclass(slots=True)
class Application:
    """What one `dedup apply` did."""

    id: str
    began_ticks: int
    """Clock ticks after boot, as start times of processes are."""
    mergeable_before: tuple[ProcessId, ...]
    """Processes that were mergeable before it."""
    marks: list[Mark] = field(default_factory=list)
    finished: bool = False
    """It came to its end; else it was interrupted, unless it is under way."""


class Applied:
    """The record of this host.

    Parameters
    ----------
    state : Path, optional
        Its folder.
    """

    def __init__(self, state: Path = STATE) -> None:
        self.path = state / NAME
        self._forgotten: set[tuple[str, ProcessId]] = set()

    def begin(
        self, application: str, began_ticks: int, mergeable_before: Iterable[ProcessId]
    ) -> None:
        """Begin an application.

        Raises
        ------
        NotPermitted, OutputFailed
            As from all that write here: nothing may be changed then.
        """
        self._write(
            "begin",
            application,
            began_ticks=began_ticks,
            mergeable_before=[[p.pid, p.start_time] for p in mergeable_before],
        )

    def mark(self, mark: Mark) -> None:
        """Write that a process is about to be marked."""
        self._write(
            "mark",
            mark.application,
            pid=mark.id.pid,
            start_time=mark.id.start_time,
            name=os.fsencode(mark.name).decode("latin-1"),
            program=list(mark.program),
            way=mark.way,
            ranges=mark.ranges,
            own=mark.own,
        )

    def finish(self, application: str) -> None:
        """Write that an application came to its end."""
        self._write("finish", application)

    def undoing(self, mark: Mark) -> None:
        """Write that a mark is about to be undone."""
        self._write("undoing", mark.application, pid=mark.id.pid, start_time=mark.id.start_time)

    def undone(self, mark: Mark) -> None:
        """Write that a mark is undone, or that there is nothing left to undo."""
        self._write("undone", mark.application, pid=mark.id.pid, start_time=mark.id.start_time)

    def forget(self, mark: Mark) -> None:
        """As `undone`, where that can't be written: for this object alone."""
        self._forgotten.add((mark.application, mark.id))

    def tidy(self) -> None:
        """Remove the record once nothing in it is left to undo."""
        if not self.applications():
            self.path.unlink(missing_ok=True)

    def _write(self, event: str, application: str, **fields: Any) -> None:
        journal.append(self.path, {"event": event, "application": application, **fields})

    def applications(self) -> list[Application]:
        """Applications with marks that are not undone, oldest first.

        Raises
        ------
        NotPermitted, OutputFailed
        """
        found: dict[str, Application] = {}
        lines = journal.read(self.path, {"event": str, "application": str})
        for fields in lines:
            try:
                _take(found, fields)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
                raise OutputFailed(
                    f"the record {self.path} can't be read: {type(e).__name__} {e}",
                    f"the processes in it stay mergeable; look at it, then remove {self.path}",
                ) from e
        for name, application in found.items():
            application.marks = [
                m for m in application.marks if (name, m.id) not in self._forgotten
            ]
        return [a for a in found.values() if a.marks]


def _take(found: dict[str, Application], fields: dict[str, Any]) -> None:
    event, name = fields["event"], fields["application"]
    if event == "begin":
        before = tuple(ProcessId(int(p), int(t)) for p, t in fields["mergeable_before"])
        found[name] = Application(name, int(fields["began_ticks"]), before)
        return
    application = found[name]
    if event == "finish":
        application.finished = True
        return
    process = ProcessId(int(fields["pid"]), int(fields["start_time"]))
    if event == "mark":
        if fields["way"] not in {"whole", "ranges"}:
            raise ValueError(fields["way"])
        application.marks.append(
            Mark(
                application=name,
                id=process,
                name=os.fsdecode(fields["name"].encode("latin-1")),
                program=tuple(map(str, fields["program"])),
                way=fields["way"],
                ranges=_ranges(fields["ranges"]),
                own=_ranges(fields["own"]),
            )
        )
        return
    for mark in application.marks:
        if mark.id == process:
            mark.undoing = True
    if event == "undone":
        application.marks = [m for m in application.marks if m.id != process]


def _ranges(pairs: Sequence[Sequence[int]]) -> Ranges:
    return tuple((int(start), int(end)) for start, end in pairs)
