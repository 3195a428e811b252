from __future__ import annotations

import io

from rich.console import Console

from dedup.report.progress import Progress


def shown(calls: list[tuple[str, int, int]], after_seconds: float, *, plain: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=60, color_system=None)
    bar = Progress(console, after_seconds, plain=plain)
    for call in calls:
        bar(*call)
    bar.close()
    bar.close()  # twice is no harm
    return file.getvalue()


def test_what_is_quick_shows_no_bar() -> None:
    assert shown([("pages", 1, 10), ("pages", 9, 10)], after_seconds=60) == ""


def test_a_bar_that_goes_away() -> None:
    text = shown([("processes", 128, 400), ("pages", 5, 10), ("waiting", 3, 20)], after_seconds=-1)
    assert "waiting for the next look" in text
    assert text.endswith("\x1b[2K")  # its line is erased
