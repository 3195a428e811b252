from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Dedup, on_terminal


@pytest.mark.parametrize("dashes", [["--"], []])
def test_the_command_takes_our_place(dedup: Dedup, dashes: list[str]) -> None:
    code = "import os, sys; print(os.getppid()); print(sys.argv[1:])"
    words = ["--json", "--help", "--", "-x", ""]
    result = dedup("run", *dashes, sys.executable, "-c", code, *words)
    assert result.status == 0
    parent, argv = result.out.splitlines()
    assert int(parent) == os.getpid()
    assert argv == str(words)
    assert result.err == ""


def test_its_memory_and_its_childrens_is_mergeable(dedup: Dedup) -> None:
    result = dedup("run", "--", "sh", "-c", "grep -c ' mg' /proc/self/smaps; true")
    assert int(result.out) > 5


def test_its_status_is_the_commands(dedup: Dedup) -> None:
    assert dedup("run", "--", "sh", "-c", "exit 7").status == 7
    assert dedup("run", "--", "sh", "-c", "kill -9 $$").status == -9


def test_signals_are_as_they_were(dedup: Dedup) -> None:
    lines = "grep -E 'Sig(Ign|Blk)' /proc/self/status"
    assert (
        dedup("run", "--", "sh", "-c", lines).out
        == subprocess.run(["sh", "-c", lines], capture_output=True, text=True).stdout
    )


def test_not_found(dedup: Dedup) -> None:
    for word in ("no-such-command-here", "/no/such/command", "/etc/passwd/x"):
        result = dedup("run", "--", word)
        assert result.status == 127
        assert "there is no command" in result.err


def test_not_executable(dedup: Dedup, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    plain = tmp_path / "plain"
    plain.write_text("text")
    for path in (script, plain, tmp_path):
        result = dedup("run", str(path))
        assert result.status == 126
        assert str(path) in result.err.replace("\n  ", "")


@pytest.mark.parametrize("args", [[], ["--"], ["--nonsense", "true"]])
def test_its_own_failures(dedup: Dedup, args: list[str]) -> None:
    result = dedup("run", *args)
    assert result.status == 125
    assert "`dedup run --help`" in result.err


def test_help_tells_of_children_and_of_ksmd(dedup: Dedup) -> None:
    text = " ".join(dedup("run", "--help").out.split())
    assert "children" in text
    assert "maps later" in text
    assert "ksmd" in text


def test_names_that_are_no_text(dedup: Dedup) -> None:
    word = b"\xff\x1b[31m".decode(errors="surrogateescape")
    result = dedup("run", word)
    assert result.status == 127
    assert "\\xff\\x1b[31m" in result.err
    assert dedup("run", "echo", word).out == word + "\n"


def test_a_word_on_a_terminal_where_ksmd_rests() -> None:
    try:
        resting = Path("/sys/kernel/mm/ksm/run").read_text().strip() != "1"
    except OSError:
        pytest.skip("no KSM here")
    shown = on_terminal(["run", "true"])
    assert shown.status == 0
    assert ("ksmd is not running" in " ".join(shown.screen.split())) is resting
