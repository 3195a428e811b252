"""The one way to stdout and stderr.

stdout holds the result alone, written at once. Progress, warnings and advice go to stderr, and
only where that is a terminal.
"""

from __future__ import annotations

import json as json_format
import os
import shutil
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from dedup.errors import OutputFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TextIO

    from rich.console import Console, RenderableType

    from dedup.errors import Told
    from dedup.report.progress import Progress

Color = Literal["auto", "always", "never"]

WIDTH_MOST: Final = 100
WIDTH_LEAST: Final = 40
PROGRESS_AFTER_SECONDS: Final = 0.5

_bar: Progress | None = None
"""The bar shown; it makes room for whatever is printed meanwhile."""
_failed = False
"""Whether stdout has failed already, so that nothing more can be said there."""


@dataclass(frozen=True, slots=True)
class Output:
    """How a command speaks, from its options `--json`, `--color` and `--ascii`."""

    json: bool = False
    color: Color = "auto"
    ascii: bool = False

    @property
    def plain(self) -> bool:
        """Whether to keep to ASCII: asked for, or stdout's encoding has no more."""
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        return self.ascii or not encoding.lower().replace("-", "").startswith("utf")

    @property
    def width(self) -> int:
        """Columns to fill."""
        return width()

    def result(self, data: dict[str, Any]) -> None:
        """Print the result as JSON: indented on a terminal, else one line.

        Raises
        ------
        OutputFailed
        """
        indent = 2 if _is_terminal(sys.stdout) else None
        write(json_format.dumps(data, indent=indent, allow_nan=False) + "\n")

    def show(self, *parts: RenderableType) -> None:
        """Print the result for people.

        Raises
        ------
        OutputFailed
        """
        write(self._render(parts, sys.stdout))

    def advise(self, *parts: RenderableType) -> None:
        """Print a warning or an advice on stderr, where that is a terminal."""
        if _is_terminal(sys.stderr) and not self.json:
            _to_stderr(self._render(parts, sys.stderr))

    def note(self, text: str) -> None:
        """Print on stderr what must not get lost, such as that the result is partial."""
        if not self.json:
            _to_stderr(_paragraph(text))

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None] | None]:
        """Give the callback for `Options.progress`; None where stderr is no terminal."""
        if not _is_terminal(sys.stderr) or os.environ.get("TERM") == "dumb":
            yield None
            return
        global _bar
        from dedup.report.progress import Progress

        bar = Progress(
            self._console(sys.stderr, sys.stderr), PROGRESS_AFTER_SECONDS, plain=self.plain
        )
        _bar = bar
        try:
            yield bar
        finally:
            bar.close()
            _bar = None

    def _render(self, parts: tuple[RenderableType, ...], stream: TextIO | None) -> str:
        from io import StringIO

        buffer = StringIO()
        console = self._console(buffer, stream)
        for part in parts:
            console.print(part)
        # Padding to the right would be copied along with what people copy.
        return "".join(line.rstrip(" ") + "\n" for line in buffer.getvalue().splitlines())

    def _console(self, file: TextIO, stream: TextIO | None) -> Console:
        from rich.console import Console

        color = wants_color(self.color, stream)
        return Console(
            file=file,
            width=width(),
            force_terminal=color or file is sys.stderr,
            color_system="standard" if color else None,
            no_color=not color,
            highlight=False,
            markup=False,
            emoji=False,
            legacy_windows=False,
            safe_box=self.plain,
        )


def width() -> int:
    """Columns to fill: those of the terminal (or of COLUMNS), 80 where there is none."""
    return max(WIDTH_LEAST, min(WIDTH_MOST, shutil.get_terminal_size((80, 24)).columns))


def wants_color(color: Color, stream: TextIO | None) -> bool:
    """Whether to colour what goes to a stream; an explicit wish wins over the environment."""
    if color != "auto":
        return color == "always"
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") in {"dumb", None}:
        return False
    return _is_terminal(stream)


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False  # closed


def write(text: str) -> None:
    """Write to stdout whole; a reader that went away is no error.

    Raises
    ------
    OutputFailed
        Disk full, or stdout is closed.
    """
    global _failed
    if _bar is not None:
        _bar.close()
    if sys.stdout is None:
        raise OutputFailed("stdout is closed", "send it somewhere: `dedup ... > FILE`")
    try:
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()
    except OSError as e:
        _failed = True
        drop_stdout()
        raise OutputFailed(
            f"writing to stdout failed: {e.strerror}", "free some space, or send it elsewhere"
        ) from e


def flush() -> None:
    """Flush stdout before the interpreter does, which could only print a traceback.

    Raises
    ------
    OutputFailed
    """
    if sys.stdout is not None:
        write("")


def drop_stdout() -> None:
    """Send what is still buffered for stdout nowhere."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.close(devnull)


def error(e: Told, hint: str, *, json: bool) -> None:
    """Tell of an error: one paragraph on stderr, or the error object on stdout."""
    from dedup.report.names import safe

    if json and not _failed:
        from dedup.report.jsonout import error_object

        try:
            Output(json=True).result(error_object(e, hint))
        except OutputFailed:
            pass  # stdout is what failed: stderr it is
        else:
            return
    mark = "dedup: "
    if wants_color("auto", sys.stderr):
        mark = f"\033[1;31m{mark}\033[0m"
    _to_stderr(mark + _paragraph(f"{safe(e.message)}{'; ' if hint else ''}{safe(hint)}"))


def _paragraph(text: str) -> str:
    return textwrap.fill(
        text, width() - 8, break_long_words=False, break_on_hyphens=False,
        subsequent_indent="  ",
    ) + "\n"  # fmt: skip


def _to_stderr(text: str) -> None:
    if _bar is not None:
        _bar.close()
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        pass  # nobody is there to be told
