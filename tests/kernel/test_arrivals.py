"""Processes that appear later, in a real cgroup and by choice."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dedup.errors import Unsupported
from dedup.kernel import arrivals
from dedup.kernel.arrivals import Arrivals, in_cgroup, in_choice
from dedup.kernel.processes import Choice, Handle

Start = Callable[..., subprocess.Popen[bytes]]
WAITS = "import sys; sys.stdin.read(1)"
EXECS = f"import os, sys; sys.stdin.read(1); os.execv(sys.executable, ['python', '-c', {WAITS!r}])"


@pytest.fixture
def cgroup() -> Iterator[Path]:
    root = next((r for r in arrivals.ROOTS if (r / "cgroup.controllers").exists()), None)
    if root is None or os.geteuid() != 0:
        pytest.skip("needs root and a unified cgroup hierarchy")
    path = root / f"dedup-test-{os.getpid()}"
    (path / "below").mkdir(parents=True)
    yield path
    for folder in (path / "below", path):
        deadline = time.monotonic() + 10
        while folder.exists():
            with contextlib.suppress(OSError):  # a process on its way out
                folder.rmdir()
            assert time.monotonic() < deadline


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def one(cgroup: Path | None = None, code: str = WAITS) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        started.append(process)
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(process.pid))
        return process

    yield one
    for process in started:
        process.kill()
        process.communicate()


def test_a_cgroup_and_those_below(cgroup: Path, start: Start) -> None:
    watched = Arrivals(in_cgroup("/" + cgroup.name))
    assert watched.poll() == []
    first, second = start(cgroup), start(cgroup / "below")
    start()
    found = watched.poll()
    assert {a.info.id.pid for a in found} == {first.pid, second.pid}
    assert not any(a.exec for a in found)
    assert watched.poll() == []
    first.communicate(b"x")
    third = start(cgroup)
    assert [a.info.id.pid for a in watched.poll()] == [third.pid]


def test_what_was_there_before_is_no_news(cgroup: Path, start: Start) -> None:
    process = start(cgroup)
    with Handle(process.pid) as handle:
        watched = Arrivals(in_cgroup("/" + cgroup.name), [handle.info])
    assert watched.poll() == []


def test_exec_is_told(start: Start) -> None:
    process = start(code=EXECS)
    watched = Arrivals(in_choice(Choice(pids=(process.pid,))))
    assert [a.exec for a in watched.poll()] == [False]
    assert process.stdin is not None
    process.stdin.write(b"x")
    process.stdin.flush()
    for arrival in watched.watch(0.01):
        assert (arrival.info.id.pid, arrival.exec) == (process.pid, True)
        break


def test_a_choice_that_nothing_fits_yet(start: Start) -> None:
    watched = Arrivals(in_choice(Choice(names=("dedup-later*",))))
    assert watched.poll() == []
    process = start(
        code="open('/proc/self/comm', 'w').write('dedup-later'); import sys; sys.stdin.read()"
    )
    for arrival in watched.watch(0.01):
        assert arrival.info.id.pid == process.pid
        break


def test_zombies_are_left_out(start: Start) -> None:
    process = start(code="pass")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert Arrivals(in_choice(Choice(pids=(process.pid,)))).poll() == []


def test_a_cgroup_that_is_not_there() -> None:
    assert Arrivals(in_cgroup("/none/such")).poll() == []


def test_no_hierarchy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arrivals, "ROOTS", (tmp_path,))
    with pytest.raises(Unsupported):
        in_cgroup("/x")
