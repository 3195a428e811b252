from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from dedup.cli import guard, root

from .conftest import REPOSITORY, Dedup, environment


def dedup_shell(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in which `dedup` is the command."""
    function = 'dedup() { "$PYTHON" -m dedup "$@"; }; '
    return subprocess.run(
        ["bash", "-c", function + script, "bash", *args],
        capture_output=True,
        text=True,
        env=environment(PYTHON=sys.executable),
        cwd=REPOSITORY,
        timeout=60,
    )


@pytest.mark.parametrize(
    "args",
    [
        ["--nonsense"],
        ["nonsense"],
        ["scan"],
        ["scan", "--nonsense"],
        ["scan", "stray"],
        ["scan", "--pid"],
        ["scan", "--pid", "abc"],
        ["scan", "--pid", "0"],
        ["scan", "--pid", "-5"],
        ["scan", "--pid", "1", "--threads", "-1"],
        ["scan", "--pid", "1", "--threads", "0"],
        ["scan", "--pid", "1", "--passes", "0"],
        ["scan", "--pid", "1", "--interval", "abc"],
        ["scan", "--pid", "1", "--interval", "-1"],
        ["scan", "--pid", "1", "--interval", "nan"],
        ["scan", "--pid", "1", "--interval", "inf"],
        ["scan", "--pid", "1", "--full-scan", "auto"],
        ["scan", "--pid", "1", "--scope", "all"],
        ["scan", "--pid", "1", "--by", "colour"],
        ["scan", "--pid", "1", "--seed", "-1"],
        ["scan", "--pid", "1", "--seed", str(1 << 64)],
        ["scan", "--pid", "1", "--color", "maybe"],
    ],
)
def test_nonsense_is_a_usage_error(dedup: Dedup, args: list[str]) -> None:
    result = dedup(*args)
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("dedup: ")
    assert "`dedup" in result.err  # what to type next
    with_json = dedup(*args, "--json")
    assert with_json.status == 2
    assert with_json.err == ""
    assert with_json.json["error"]["code"] == "usage"
    assert with_json.json["error"]["hint"]


def test_a_reader_that_goes_away_is_no_error(target: subprocess.Popen[str]) -> None:
    done = dedup_shell(
        "set -o pipefail; dedup scan --pid $1 --passes 1 -v | head -1", str(target.pid)
    )
    assert done.returncode == 0
    assert done.stdout.startswith("KSM would free")
    assert done.stderr == ""


@pytest.mark.parametrize("args", ["scan --pid $1 --passes 1 --json", "--help", "--version"])
def test_a_full_disk_is_output_that_failed(target: subprocess.Popen[str], args: str) -> None:
    done = dedup_shell(f"dedup {args} > /dev/full", str(target.pid))
    assert done.returncode == 10
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_keeps_its_status_where_json_cannot_be_written() -> None:
    done = dedup_shell("dedup scan --json > /dev/full")
    assert done.returncode == 2
    assert "nothing chosen" in done.stderr


def test_closed_stdout(target: subprocess.Popen[str]) -> None:
    done = dedup_shell("dedup scan --pid $1 --passes 1 >&-", str(target.pid))
    assert done.returncode == 10
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("json", [False, True])
def test_signals(
    target: subprocess.Popen[str], number: signal.Signals, status: int, json: bool
) -> None:
    command = [sys.executable, "-m", "dedup", "scan", "--pid", str(target.pid), "--interval", "30"]
    process = subprocess.Popen(
        [*command, *(["--json"] if json else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
    )
    time.sleep(1.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert "Traceback" not in err
    assert ('"interrupted"' in out) == json


def test_a_defect_says_how_to_report_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> int:
        raise ZeroDivisionError("division by zero")

    # Nothing that a user can do leads here, so the way in is made by hand.
    monkeypatch.setattr(root.command, "main", broken)
    handlers = {n: signal.getsignal(n) for n in guard.ENDING}
    try:
        monkeypatch.delenv("DEDUP_TRACEBACK", raising=False)
        assert guard.run(["scan"]) == 70
        short = capsys.readouterr().err
        monkeypatch.setenv("DEDUP_TRACEBACK", "1")
        assert guard.run(["scan"]) == 70
        long = capsys.readouterr().err
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    assert "defect" in short
    assert "report" in short
    assert "DEDUP_TRACEBACK=1" in short
    assert "Traceback" not in short
    assert "Traceback" in long


def test_a_signal_amid_an_import_is_no_defect(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11 wraps what is raised in `__set_name__`, as of NumPy's, into a RuntimeError."""

    class Attribute:
        def __set_name__(self, owner: type, name: str) -> None:
            signal.raise_signal(signal.SIGTERM)

    def interrupted(*args: object, **kwargs: object) -> int:
        type("Owner", (), {"attribute": Attribute()})
        return 0

    monkeypatch.setattr(root.command, "main", interrupted)
    handlers = {n: signal.getsignal(n) for n in guard.ENDING}
    try:
        assert guard.run(["scan"]) == 143
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    assert capsys.readouterr().err == "dedup: ended by SIGTERM\n"


def test_a_signal_after_the_end_changes_nothing() -> None:
    done = dedup_shell(
        "$PYTHON -c 'import atexit, os, signal, sys; from dedup.__main__ import main;"
        " atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT));"
        ' sys.exit(main(["--version"]))\''
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_python_m_dedup_gives_the_status_to_the_shell() -> None:
    assert dedup_shell("dedup scan 2>/dev/null").returncode == 2
