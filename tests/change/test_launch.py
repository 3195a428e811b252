"""A command that is our child. What it does once it runs: `tests/cli/test_run.py`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.cli.conftest import REPOSITORY, environment, state_of, wait_for

STOPS_BEFORE_EXEC = """
import os, signal, sys
from dedup.change import launch
from dedup.errors import DedupError
def prepare():
    os.kill(os.getpid(), signal.{stop})
    os.execvp("sh", ["sh", "-c", "exit 7"])
with launch.signals_held() as mask:
    end = launch.Child(prepare, mask, lambda *told: DedupError(" ".join(told))).wait(lambda: None)
    print(end.status, end.signal)
"""


@contextmanager
def started(stop: signal.Signals) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Both processes, the child stopped; they end with the test whatever happens."""
    with subprocess.Popen(
        [sys.executable, "-c", STOPS_BEFORE_EXEC.format(stop=stop.name)], process_group=0,
        stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment(),
    ) as process:  # fmt: skip
        try:
            yield process, child_of(process.pid)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def child_of(pid: int) -> int:
    """Its child, once it is stopped."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_for(lambda: children.read_text() != "")
    child = int(children.read_text())
    wait_for(lambda: state_of(child) == "T")
    return child


def test_stopped_before_its_exec_it_goes_on_with_us() -> None:
    with started(signal.SIGSTOP) as (process, _):
        assert state_of(process.pid) != "T"
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=20)
        assert (process.returncode, out) == (0, "7 None\n")


def test_ctrl_z_before_its_exec_stops_both() -> None:
    with started(signal.SIGTSTP) as (process, _):
        wait_for(lambda: state_of(process.pid) == "T")
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=20)
        assert (process.returncode, out) == (0, "7 None\n")


def test_killed_before_its_exec() -> None:
    with started(signal.SIGSTOP) as (process, child):
        os.kill(child, signal.SIGKILL)
        out, _ = process.communicate(timeout=20)
        assert (process.returncode, out) == (0, f"None {int(signal.SIGKILL)}\n")
