from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from dedup.cli import output

from .conftest import Dedup, on_terminal

if TYPE_CHECKING:
    import subprocess


@pytest.mark.parametrize(
    ("color", "no_color", "term", "colored"),
    [
        ("auto", "", "xterm", False),  # no terminal
        ("always", "1", "dumb", True),  # an explicit wish wins
        ("never", "", "xterm", False),
    ],
)
def test_color_off_a_terminal(
    monkeypatch: pytest.MonkeyPatch, color: output.Color, no_color: str, term: str, colored: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    assert output.wants_color(color, io.StringIO()) is colored


@pytest.mark.parametrize(
    ("no_color", "term", "colored"),
    [("", "xterm", True), ("1", "xterm", False), ("", "dumb", False)],
)
def test_color_on_a_terminal(
    target: subprocess.Popen[str], no_color: str, term: str, colored: bool
) -> None:
    args = ["scan", "--pid", str(target.pid), "--passes", "1"]
    shown = on_terminal(args, NO_COLOR=no_color, TERM=term)
    assert shown.status == 0
    assert ("\033[1;32m" in shown.screen) is colored


def test_color_always_through_a_pipe(dedup: Dedup, target: subprocess.Popen[str]) -> None:
    args = ("scan", "--pid", str(target.pid), "--passes", "1", "--color")
    assert "\033[" in dedup(*args, "always").out
    assert "\033[" not in dedup(*args, "never").out
    assert "\033[" not in dedup(*args, "auto").out


def test_advice_and_progress_on_a_terminal_only(
    dedup: Dedup, target: subprocess.Popen[str]
) -> None:
    args = ["scan", "--pid", str(target.pid), "--interval", "1.5"]
    piped = dedup(*args)
    assert piped.err == ""
    assert "Next:" not in piped.out
    shown = on_terminal(args)
    assert "Next:" in shown.screen
    assert "waiting for the next look" in shown.screen
    # The result comes after the bar is gone: erased, cursor back at the line's start.
    assert shown.screen.index("KSM would free") > shown.screen.rindex("waiting for the next look")


def test_progress_keeps_to_ascii(target: subprocess.Popen[str]) -> None:
    args = ["scan", "--pid", str(target.pid), "--interval", "1.5", "--ascii"]
    shown = on_terminal(args)
    assert "waiting for the next look" in shown.screen
    assert shown.screen.isascii()


def test_no_progress_on_a_dumb_terminal(target: subprocess.Popen[str]) -> None:
    args = ["scan", "--pid", str(target.pid), "--interval", "1.5"]
    shown = on_terminal(args, TERM="dumb")
    assert "waiting" not in shown.screen
    assert "\033" not in shown.screen


def test_json_on_a_terminal_is_indented(target: subprocess.Popen[str]) -> None:
    shown = on_terminal(["scan", "--pid", str(target.pid), "--passes", "1", "--json"])
    assert shown.screen.startswith('{\r\n  "schema_version": 1')
    assert "Next:" not in shown.screen


def test_another_encoding_gets_ascii(dedup: Dedup, target: subprocess.Popen[str]) -> None:
    result = dedup(
        "scan", "--pid", str(target.pid), "--passes", "1", "-v",
        PYTHONIOENCODING="ascii", COLUMNS="60",
    )  # fmt: skip
    assert result.status == 0
    assert result.out.isascii()


@pytest.mark.parametrize(("columns", "width"), [("20", 40), ("64", 64), ("500", 100), ("x", 80)])
def test_width(monkeypatch: pytest.MonkeyPatch, columns: str, width: int) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    if columns == "x":
        monkeypatch.setattr("os.get_terminal_size", lambda fd: (_ for _ in ()).throw(OSError()))
    assert output.width() == width
