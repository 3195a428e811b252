from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from dedup.cli.options import Seconds, chooses_processes, reports, words_of
from dedup.cli.output import Output
from dedup.kernel.processes import Choice


def test_choice_of_processes() -> None:
    got: list[Choice] = []

    @click.command()
    @chooses_processes
    def command(choice: Choice) -> None:
        got.append(choice)

    words = "--pid 1 --pid 2 --name a* --user u --cgroup /c --container k --tree 7 --all"
    assert CliRunner().invoke(command, words.split()).exit_code == 0
    assert got == [Choice((1, 2), ("a*",), ("u",), ("/c",), ("k",), (7,), all=True)]
    assert CliRunner().invoke(command, []).exit_code == 0
    assert not got[1]


def test_output_options() -> None:
    got: list[Output] = []

    @click.command()
    @reports
    def command(output: Output) -> None:
        got.append(output)

    CliRunner().invoke(command, ["--json", "--color", "never", "--ascii"])
    CliRunner().invoke(command, [])
    assert got == [Output(json=True, color="never", ascii=True), Output()]


@pytest.mark.parametrize(("word", "seconds"), [("5", 5.0), ("0.25", 0.25), ("auto", None)])
def test_seconds(word: str, seconds: float | None) -> None:
    assert Seconds(auto=True).convert(word, None, None) == seconds


@pytest.mark.parametrize("word", ["", "5x", "-1", "0", "nan", "inf", "Auto"])
def test_no_seconds(word: str) -> None:
    with pytest.raises(click.BadParameter, match="seconds above 0, or auto"):
        Seconds(auto=True).convert(word, None, None)


def test_words_of_a_choice() -> None:
    choice = Choice((1, 2), ("a*",), ("u",), ("/c",), ("k",), (7,), all=True)
    assert words_of(choice) == (
        "--pid 1 --pid 2 --name 'a*' --user u --cgroup /c --container k --tree 7 --all"
    )
