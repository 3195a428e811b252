"""A bar on stderr for what takes long."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

WORDS = {
    "pages": "reading memory",
    "waiting": "waiting for the next look",
    "merged": "waiting for ksmd",
    "cases": "self-test",
}


class Progress:
    """The callback of `Options.progress`: shows nothing in the first moments, leaves nothing.

    Parameters
    ----------
    console : rich.console.Console
    after_seconds : float
        What is done by then shows no bar.
    plain : bool
        ASCII: the percentage alone.
    """

    def __init__(self, console: Console, after_seconds: float, *, plain: bool) -> None:
        self._console = console
        self._plain = plain
        self._begin = time.monotonic() + after_seconds
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._part = ""
        self._kind = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show how far it is."""
        if what == "processes":
            self._part = f" ({done} of {total} processes)" if done < total else ""
            return
        if self._bar is None:
            if time.monotonic() < self._begin:
                return
            self._bar = self._start()
        words = WORDS.get(what, what) + (self._part if what == "pages" else "")
        kind = what.partition(":")[0]
        if self._task is not None and kind != self._kind:
            # Another speed.
            self._bar.remove_task(self._task)
            self._task = None
        self._kind = kind
        if self._task is None:
            self._task = self._bar.add_task(words, total=total, completed=done)
        else:
            self._bar.update(self._task, description=words, total=total, completed=done)

    def _start(self) -> RichProgress:
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        bars = [] if self._plain else [BarColumn(None)]
        columns = [
            TextColumn("{task.description}"),
            *bars,
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
        ]
        bar = Progress(
            *columns,
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            expand=True,
        )
        bar.start()
        return bar

    def close(self) -> None:
        """Take the bar away; the next call shows it again."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
