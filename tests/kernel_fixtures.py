"""Driving the host's KSM in tests, and processes to look at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
import pytest

from dedup import _core
from dedup.errors import Unsupported
from dedup.kernel.ksm import TUNABLES, Counters, Ksm, users

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

TARGET = Path(__file__).with_name("target.py")
STEADY_SCANS = 5
PAGE = os.sysconf("SC_PAGESIZE")
FRAME_BITS = (1 << 55) - 1


class Target:
    """A process whose memory a test lays out: ``target.do("put", name="a", at=0, what=["zero"])``.

    The commands are those of target.py.
    """

    def __init__(self, user: int | None = None) -> None:
        # Another user may not reach our interpreter, nor the checkout; python3 reads the program
        # from a descriptor that we opened.
        python = sys.executable if user is None else "/usr/bin/python3"
        program = os.open(TARGET, os.O_RDONLY)
        self.process = subprocess.Popen(
            [python, "-I", f"/dev/fd/{program}"],
            pass_fds=[program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
        os.close(program)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in: IO[bytes] = self.process.stdin
        self._out: IO[bytes] = self.process.stdout
        self.pid = self.process.pid
        assert self.answer() == "ready"
        self.wait_until_idle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it and its children."""
        with suppress(BrokenPipeError):
            self._in.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._out.close()

    def kill(self) -> None:
        """End it the hard way."""
        self.process.kill()
        self.process.wait()

    def send(self, verb: str, child: tuple[int, ...] = (), **words: Any) -> None:
        """Give a command without waiting for its answer."""
        line = json.dumps({"do": verb, "child": list(child), **words}) + "\n"
        self._in.write(line.encode())
        self._in.flush()

    def answer(self) -> Any:
        """The next answer."""
        line = self._out.readline()
        assert line, "the target is gone"
        answer = json.loads(line)
        if "error" in answer:
            raise OSError(answer.get("errno", 0), answer["error"])
        return answer["ok"]

    def do(self, verb: str, child: tuple[int, ...] = (), **words: Any) -> Any:
        """Give a command and wait until it is done."""
        self.send(verb, child, **words)
        answer = self.answer()
        self.wait_until_idle()
        return answer

    def wait_until_idle(self) -> None:
        """Wait until it waits for the next command: what it does by itself is over then."""
        stat = Path(f"/proc/{self.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] in {"R", "D"}:
            time.sleep(0.0005)

    def stop(self) -> Any:
        """End a command that goes on until a line comes in; gives its answer."""
        self._in.write(b"\n")
        self._in.flush()
        return self.answer()


class KsmControl:
    """The host's KSM in a test's hands; `restore` puts all tunables back."""

    def __init__(self) -> None:
        self.ksm = Ksm()
        self.before = self.ksm.tunables()
        self._nap = 1_800_000

    def take(self) -> None:
        """Unmerge everything, and let ksmd be quick and come by all pages, by the usual rules."""
        self.clear()
        self.set(advisor_mode="none", smart_scan=0, sleep_millisecs=1, pages_to_scan=200_000)
        self.set(max_page_sharing=256, use_zero_pages=0)

    def set(self, **values: int | str) -> None:
        """Write tunables; those that this kernel lacks are left out."""
        for name, value in values.items():
            if name in self.before:
                self._write(name, value)

    def _write(self, name: str, value: int | str) -> None:
        """Write a tunable; the kernel refuses some while a process that ends still maps KSM pages.

        It has left ksmd's list by then (mm/ksm.c, remove_stable_node), so nothing tells but this.
        """
        deadline = time.monotonic() + 10
        while True:
            try:
                return self.ksm.write(name, value)
            except Unsupported:
                if name != "max_page_sharing" or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def start(self) -> None:
        """Let ksmd merge."""
        self.ksm.write("run", 1)

    def step(self) -> None:
        """One full scan; ksmd sleeps after it, and all counters stand still.

        A write of `sleep_millisecs` wakes it (mm/ksm.c, sleep_millisecs_store). A scan that ends
        in between reads the new value and sleeps on: so a second write never makes two scans.
        """
        before = self.ksm.counters().full_scans
        deadline = time.monotonic() + 30
        while self.ksm.counters().full_scans == before:
            assert time.monotonic() < deadline, (self.ksm.counters(), self.ksm.tunables())
            self._nap = 3_600_001 - self._nap
            self.set(sleep_millisecs=self._nap)
            end = time.monotonic() + 0.02
            while self.ksm.counters().full_scans == before and time.monotonic() < end:
                time.sleep(0.0002)

    def stop(self) -> None:
        """Put ksmd to rest; what is merged stays."""
        self.ksm.write("run", 0)

    def clear(self) -> None:
        """Unmerge everything; ksmd rests then, at the head of its list."""
        self.ksm.write("run", 2)
        deadline = time.monotonic() + 30
        while self._in_use():
            assert time.monotonic() < deadline, self.ksm.counters()
            time.sleep(0.01)
        self.ksm.write("run", 0)

    def _in_use(self) -> bool:
        # Not the chains: a chain without nodes is counted until ksmd comes by it.
        c = self.ksm.counters()
        return bool(c.rmap_items or c.ksm_zero_pages)

    def converge(self, seconds: float = 60, *, stop: bool = True) -> Counters:
        """Run ksmd until two more full scans change nothing, five at least."""
        begin = self.ksm.counters().full_scans
        self.start()
        deadline = time.monotonic() + seconds
        last, last_scan = None, begin
        while True:
            assert time.monotonic() < deadline, (self.ksm.counters(), self.ksm.tunables())
            counters = self.ksm.counters()
            if counters.settled() != last:
                last, last_scan = counters.settled(), counters.full_scans
            elif counters.full_scans >= max(begin + STEADY_SCANS, last_scan + 2):
                break
            time.sleep(0.005)
        if stop:
            self.stop()
            counters = self.ksm.counters()
        return counters

    def alone(self, ours: Iterable[int] = ()) -> None:
        """Fail where other processes have mergeable memory: all counters would be theirs too."""
        deadline = time.monotonic() + 30
        while others := {pid: name for pid, name in users().items() if pid not in set(ours)}:
            # Another test's, at its end perhaps.
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        assert not others, f"other processes have mergeable memory: {others}"

    def restore(self) -> None:
        """Everything as it was."""
        self.clear()
        # The advisor last, since it holds others; `run` at the very end.
        names = [n for n in TUNABLES if n in self.before and n not in {"run", "advisor_mode"}]
        for name in [*names, "advisor_mode", "run"]:
            if name in self.before and self.ksm.tunables()[name] != self.before[name]:
                with suppress(Unsupported):  # held by the advisor: its own affair
                    self._write(name, self.before[name])
        after = self.ksm.tunables()
        assert after == self.before, (self.before, after)


@contextmanager
def at_rest(pids: list[int]) -> Iterator[None]:
    """Processes stopped: what they do after an answer would show in one scan and not in another."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for pid in pids:
            stat = Path(f"/proc/{pid}/stat")
            deadline = time.monotonic() + 10
            while stat.read_text().rpartition(")")[2].split()[0] != "T":
                assert time.monotonic() < deadline, f"process {pid} does not stop"
                time.sleep(0.001)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def ksm_control() -> Iterator[KsmControl]:
    """KSM in our hands for a while."""
    control = KsmControl()
    try:
        control.take()
        yield control
    finally:
        control.restore()


@pytest.fixture
def ksm() -> Iterator[KsmControl]:
    """The host's KSM; mark the test `ksm`."""
    with ksm_control() as control:
        yield control


@pytest.fixture
def target() -> Iterator[Target]:
    """A process to lay out."""
    with Target() as process:
        yield process


def pagemap(pid: int, start: int, pages: int) -> list[int]:
    """The words of /proc/PID/pagemap."""
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        data = os.pread(fd, pages * 8, start // PAGE * 8)
    finally:
        os.close(fd)
    return [int(w) for w in np.frombuffer(data, np.uint64)]


def frames(pid: int, start: int, pages: int) -> list[int]:
    """Frame of each page, 0 where there is none."""
    return [w & FRAME_BITS if w >> 63 else 0 for w in pagemap(pid, start, pages)]


def kpageflags(numbers: list[int]) -> list[int]:
    """The words of /proc/kpageflags for frames."""
    fd = os.open("/proc/kpageflags", os.O_RDONLY)
    try:
        return [int(w) for w in _core.read_words(fd, np.array(numbers, np.int64))]
    finally:
        os.close(fd)


def process_numbers(pid: int, file: str) -> dict[str, int]:
    """The numbers of a /proc/PID file of lines "name: number unit"."""
    numbers = {}
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[1].lstrip("-").isdigit():
            numbers[words[0]] = int(words[1])
    return numbers
