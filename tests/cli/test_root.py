from __future__ import annotations

import subprocess
import sys

import click
import pytest

from dedup.cli.root import COMMANDS, Exemplified, Root, command

from .conftest import REPOSITORY, Dedup, environment


def test_version(dedup: Dedup) -> None:
    result = dedup("--version")
    assert result.status == 0
    assert result.out.startswith("dedup ")
    assert result.err == ""


@pytest.mark.parametrize(
    "args", [["--help"], ["scan", "--help"], ["run", "--help"], ["scan", "-h"]]
)
def test_help_begins_with_an_example(dedup: Dedup, args: list[str]) -> None:
    result = dedup(*args)
    assert result.status == 0
    assert result.out.startswith("Example")
    assert result.out.splitlines()[1].startswith("  dedup ")
    assert "Usage: dedup" in result.out


@pytest.mark.parametrize("args", [["--help"], ["scan", "--help"], ["run", "--help"]])
def test_help_fits_a_narrow_terminal(dedup: Dedup, args: list[str]) -> None:
    result = dedup(*args, COLUMNS="60")
    assert max(map(len, result.out.splitlines())) <= 60


def test_no_command_is_a_usage_error_with_help(dedup: Dedup) -> None:
    result = dedup()
    assert result.status == 2
    assert "Commands:" in result.out


def test_every_command_of_the_table_is_there() -> None:
    context = click.Context(command)
    assert isinstance(command, Root)
    for name in COMMANDS:
        found = command.get_command(context, name)
        assert isinstance(found, Exemplified)
        assert found.examples


def test_a_mistyped_command_is_guessed(dedup: Dedup) -> None:
    result = dedup("scna")
    assert result.status == 2
    assert "`dedup scan`" in result.err


def test_version_and_help_import_nothing_heavy() -> None:
    code = (
        "import sys; from dedup.__main__ import main; main(sys.argv[1:]);"
        "heavy = {'numpy', 'rich', 'xxhash', 'pyarrow', 'dedup._core'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    for word in ("--version", "--help"):
        subprocess.run(
            [sys.executable, "-c", code, word], check=True, cwd=REPOSITORY, env=environment(),
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
