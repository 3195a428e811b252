"""Real commands on real processes."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dedup import schema

REPOSITORY = Path(__file__).parents[2]
EQUAL_PAGES = 300
TARGET = f"""
import mmap, os, sys
if len(sys.argv) > 1:
    with open("/proc/self/comm", "wb", buffering=0) as comm:
        comm.write(os.fsencode(sys.argv[1]))
PAGE = mmap.PAGESIZE
memory = mmap.mmap(-1, {EQUAL_PAGES} * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for page in range({EQUAL_PAGES}):
    memory[page * PAGE : (page + 1) * PAGE] = b"dedup-cli" + bytes(PAGE - 9)
print("ready", flush=True)
sys.stdin.read()
"""
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@dataclass
class Result:
    """What a command left."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.out)
        jsonschema.Draft202012Validator(schema.load()).validate(data)
        return data


Dedup = Callable[..., Result]
Start = Callable[..., subprocess.Popen[str]]


def environment(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in {"COLUMNS", "NO_COLOR", "TERM"}}
    return {**env, "LC_ALL": "C.UTF-8", **more}


@pytest.fixture
def dedup(tmp_path: Path) -> Dedup:
    """Run dedup to its end."""

    def run(*args: str, prefix: tuple[str, ...] = (), **more: str) -> Result:
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "dedup", *args],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            env=environment(**more),
            cwd=REPOSITORY,
            timeout=60,
        )
        assert "Traceback" not in done.stderr
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def dedup_nobody() -> Dedup:
    """Run dedup without any privilege, with a Python that nobody may execute."""
    prefix = NOBODY if os.geteuid() == 0 else ()
    env = environment()
    if prefix:
        packages = [
            str(REPOSITORY),
            *{sysconfig.get_path("platlib"), sysconfig.get_path("purelib")},
        ]
        env |= {"PYTHONPATH": ":".join(packages), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/"}
    for python in (
        sys.executable,
        "/usr/bin/python3",
        shutil.which("python3", path="/usr/local/bin"),
    ):
        command = [*prefix, str(python), "-m", "dedup"]
        try:
            probe = subprocess.run(
                [*prefix, str(python), "-c", "import dedup.scanning, click, rich"],
                env=env, cwd="/", capture_output=True,
            )  # fmt: skip
        except OSError:
            continue
        if probe.returncode == 0:
            break
    else:
        pytest.skip("no Python here that an unprivileged user may run")

    def run(*args: str) -> Result:
        done = subprocess.run(
            [*command, *args], env=env, cwd="/", capture_output=True, text=True, timeout=60
        )
        assert "Traceback" not in done.stderr
        return Result(done.returncode, done.stdout, done.stderr)

    return run


def start_program(
    program: str, *words: str, prefix: tuple[str, ...] = (), python: str = sys.executable,
    busy: bool = False,
) -> subprocess.Popen[str]:  # fmt: skip
    """Start a Python program that says "ready" once its memory is made; `end` ends it.

    If it is not `busy` then, it waits for something: until it does, its heap still changes.
    """
    process = subprocess.Popen(
        [*prefix, python, "-c", program, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        if not busy:
            wait_for(lambda: state_of(process.pid) == "S")
    except BaseException:
        end(process)
        raise
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


@pytest.fixture(scope="module")
def process(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """The module's TARGET, running."""
    started = start_program(request.module.TARGET)
    yield started
    end(started)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start processes with EQUAL_PAGES equal pages each; they end with the test."""
    started: list[subprocess.Popen[str]] = []

    def one(
        prefix: tuple[str, ...] = (), python: str = sys.executable, name: str = ""
    ) -> subprocess.Popen[str]:
        words = (name,) if name else ()
        started.append(start_program(TARGET, *words, prefix=prefix, python=python))
        return started[-1]

    yield one
    for process in started:
        end(process)


@pytest.fixture
def target(start: Start) -> subprocess.Popen[str]:
    return start()


@pytest.fixture
def dead_pid() -> int:
    """A pid that nobody has."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def state_of(pid: int) -> str:
    """As ps(1) shows it; the name before it may be no UTF-8."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0].decode()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_at, "waited in vain"
        time.sleep(0.02)


@dataclass
class Terminal:
    """What a command shows on a terminal of its own."""

    status: int
    screen: str

    @property
    def lines(self) -> list[str]:
        """Without what moves the cursor: a progress bar comes only where it takes long."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.screen).splitlines()


def on_terminal(args: list[str], columns: int = 80, **more: str) -> Terminal:
    """Run dedup on a pseudo-terminal and give all that it wrote there."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "dedup", *args],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(**{"TERM": "xterm", **more}),
        cwd=REPOSITORY,
    )
    os.close(theirs)
    written = b""
    while True:
        ready, _, _ = select.select([ours], [], [], 60)
        if not ready:
            break
        try:
            part = os.read(ours, 65536)
        except OSError:
            break  # the other side is closed
        if not part:
            break
        written += part
    os.close(ours)
    return Terminal(process.wait(), written.decode())
