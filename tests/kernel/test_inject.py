"""System calls put into real processes: what they do, and that nobody notices."""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dedup.errors import (
    DedupError,
    NoMemory,
    NoSuchProcess,
    NotPermitted,
    NotStopped,
    ProcessGone,
    Refused,
)
from dedup.kernel import inject, maps
from dedup.kernel.inject import PR_GET_MEMORY_MERGE, Injection
from dedup.kernel.processes import Handle
from tests.injections import injections
from tests.outsiders import (
    COROUTINE_SOURCE,
    EXEC_SOURCE,
    KILLER_SOURCE,
    SECCOMP_SOURCE,
    SIGNALS_SOURCE,
    VFORK_SOURCE,
    build_foreign,
    running,
    started,
)
from tests.waits import KINDS, Checker, Wait, build

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel_fixtures import Target

pytestmark = pytest.mark.root

PAGE = mmap.PAGESIZE
REPOSITORY = Path(__file__).parents[2]


def ask(pid: int, times: int = 1, **options: float) -> list[inject.Stop]:
    """Put the harmless PR_GET_MEMORY_MERGE into a process, each in a stop of its own."""
    with Handle(pid) as handle, Injection(handle, **options) as injection:  # type: ignore[arg-type]
        for _ in range(times):
            assert injection.run([injection.prctl(PR_GET_MEMORY_MERGE, 0)]) == [0]
        return injection.stops


def state(pid: int) -> tuple[str, str]:
    """State and tracer of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in text.splitlines())
    return fields["State"][0], fields["TracerPid"]


def go_on(process: subprocess.Popen[str]) -> str:
    """Let a program end, and hear what it says of itself."""
    said, _ = process.communicate("\n", timeout=20)
    return said.strip() or f"died, status {process.returncode}"


# --- What it does ---------------------------------------------------------------------------------


@pytest.mark.ksm
def test_merge_any_marks_all_memory_and_unmarks_it(target: Target) -> None:
    pid = target.pid
    with Handle(pid) as handle:
        stops = inject.merge_any(handle, True)
        assert all(s.self_healing for s in stops)
        assert "ksm_merge_any: yes" in Path(f"/proc/{pid}/ksm_stat").read_text()
        assert inject.merges_any(handle)
        assert any("mg" in m.vm_flags and m.name == "[heap]" for m in maps.read(handle))
        inject.merge_any(handle, False)
        assert "ksm_merge_any: no" in Path(f"/proc/{pid}/ksm_stat").read_text()
        assert not inject.merges_any(handle)
        assert not any("mg" in m.vm_flags for m in maps.read(handle))


@pytest.mark.ksm
def test_advise_gives_an_answer_for_each_range(target: Target) -> None:
    with Handle(target.pid) as handle:
        heap = next(m for m in maps.read(handle) if m.name == "[heap]")
        ranges = [
            (heap.start, heap.start + PAGE),
            (1 << 20, (1 << 20) + PAGE),
            (heap.start + 1, heap.end),
        ]
        done = inject.advise(handle, ranges, True)
        assert done.errors == [None, errno.ENOMEM, errno.EINVAL]
        marked = [m for m in maps.read(handle) if "mg" in m.vm_flags]
        assert [(m.start, m.end) for m in marked] == [(heap.start, heap.start + PAGE)]
        assert inject.advise(handle, ranges[:1], False).errors == [None]
        assert not any("mg" in m.vm_flags for m in maps.read(handle))


def test_many_calls_take_many_short_stops() -> None:
    with Wait("read") as wait, Handle(wait.pid) as handle, Injection(handle) as injection:
        calls = [injection.prctl(PR_GET_MEMORY_MERGE, n) for n in (0, 1)] * 2000
        assert injection.run(calls) == [0, -errno.EINVAL] * 2000
        assert sum(s.calls for s in injection.stops) == 4000
        assert len(injection.stops) > 3
        assert wait.finish() == "ok"


# --- Nobody notices -------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wait_goes_on(kind: str, threads: int) -> None:
    with Wait(kind, threads, timed_ms=400) as wait:
        stops = ask(wait.pid, 8, deadline_seconds=10)
        assert wait.finish() == "ok"
        assert all(s.self_healing for s in stops)


@pytest.mark.ksm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_thousand_injections() -> None:
    outcomes = injections(2000)
    assert len(outcomes) == 2 * len(KINDS)
    assert sum(len(o.stops) for o in outcomes.values()) >= 2000
    saw = {key: o.saw for key, o in outcomes.items() if set(o.saw) != {"ok"}}
    assert not saw


@pytest.mark.ksm
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_redis_servers_serve_on() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.inject", "--times", "5"],
        capture_output=True, text=True, timeout=120, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("calls", [True, False])
def test_registers_stay_what_they_are(calls: bool) -> None:
    with Checker(calls=calls) as checker:
        before = checker.rounds
        stops = ask(checker.pid, 300, deadline_seconds=10)
        assert checker.wrong == 0
        assert checker.rounds > before
        assert all(s.self_healing for s in stops)


def test_signals_that_come_meanwhile_are_delivered_and_interrupt() -> None:
    with running(SIGNALS_SOURCE, "200") as process:
        while process.poll() is None and state(process.pid)[0] != "Z":
            try:
                ask(process.pid, deadline_seconds=10)
            except NoSuchProcess:
                break
            # A wait that is interrupted again and again begins its 2 ms anew each time.
            time.sleep(0.004)
        assert go_on(process) == "ok"


def test_a_stopped_process_stays_stopped() -> None:
    with Wait("read") as wait:
        os.kill(wait.pid, signal.SIGSTOP)
        while state(wait.pid)[0] != "T":
            time.sleep(0.001)
        ask(wait.pid, 3)
        # Let go, it stops by itself, as soon as it gets a core.
        deadline = time.monotonic() + 10
        while state(wait.pid) == ("R", "0") and time.monotonic() < deadline:
            time.sleep(0.001)
        assert state(wait.pid) == ("T", "0")
        os.kill(wait.pid, signal.SIGCONT)
        assert wait.finish() == "ok"


def test_a_stop_signal_amid_the_calls_stops_it_and_the_calls_are_made() -> None:
    with (
        Checker() as checker,
        Handle(checker.pid) as handle,
        Injection(handle, deadline_seconds=10) as injection,
    ):
        calls = [injection.prctl(PR_GET_MEMORY_MERGE, 0)] * 200
        stops_it = f"kill -STOP {checker.pid}; kill -CONT {checker.pid}; sleep 0.01; "
        stopper = subprocess.Popen(["sh", "-c", stops_it * 10 + f"kill -STOP {checker.pid}"])
        while stopper.poll() is None:
            assert injection.run(calls) == [0] * 200
        while state(checker.pid)[0] != "T":
            time.sleep(0.001)
        os.kill(checker.pid, signal.SIGCONT)
        before = checker.rounds
        while checker.rounds == before:
            assert checker.process.poll() is None
        assert checker.wrong == 0


@pytest.mark.parametrize("how", [(), ("spinning",)])
def test_a_coroutine_s_stack_is_not_written_to(how: tuple[str, ...]) -> None:
    with running(COROUTINE_SOURCE, *how) as process:
        stops = ask(process.pid, 5)
        assert not any(s.self_healing for s in stops)
        assert all(s.window_seconds > 0 for s in stops)
        assert go_on(process) == "ok"


def test_exec_by_another_thread() -> None:
    with running(EXEC_SOURCE, "1500") as process:
        made, gone = 0, 0
        while process.poll() is None and state(process.pid)[0] != "Z":
            begin = time.monotonic()
            try:
                made += len(ask(process.pid))
            except (NoSuchProcess, NotStopped):
                gone += 1
            assert time.monotonic() - begin < 5
        assert go_on(process) == "ok"
        assert made + gone


# --- If we die ------------------------------------------------------------------------------------


def forked_injector(pid: int, *, waits: bool) -> int:
    """A copy of ourselves that puts two calls into a process, again and again, or once."""
    child = os.fork()
    if child:
        return child
    try:
        if waits:
            os.kill(os.getpid(), signal.SIGSTOP)
        with Handle(pid) as handle, Injection(handle, deadline_seconds=10) as injection:
            calls = [injection.prctl(PR_GET_MEMORY_MERGE, 0)] * 2
            while injection.run(calls) == [0, 0] and not waits:
                pass
        os._exit(0)
    finally:
        os._exit(1)


def still_right(checker: Checker) -> bool:
    """Whether it goes on counting, untraced, and finds itself as it was."""
    begin, until = checker.rounds, time.monotonic() + 10
    while checker.rounds < begin + 2 and not checker.wrong:
        if checker.process.poll() is not None or time.monotonic() > until:
            return False
    return not checker.wrong and state(checker.pid)[1] == "0"


@pytest.mark.parametrize("calls", [True, False])
def test_killed_at_any_moment(calls: bool) -> None:
    draw = random.Random(4)
    with Checker(calls=calls) as checker:
        ask(checker.pid)  # everything is loaded then, and the copies are quick
        for _ in range(300):
            child = forked_injector(checker.pid, waits=False)
            time.sleep(draw.uniform(0, 0.006))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert still_right(checker), (checker.wrong, checker.process.poll())


def killed_at(pid: int, number: int) -> str:
    """Kill an injector at one of its steps, and say which that was; empty where it ended before."""
    child = forked_injector(pid, waits=True)
    os.waitid(os.P_PID, child, os.WSTOPPED)
    said = subprocess.run(
        [build(KILLER_SOURCE), str(child), str(number)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    ).stdout.strip()
    _, status = os.waitpid(child, 0)
    if said == "end":
        assert status == 0
        return ""
    assert os.WIFSIGNALED(status)
    return said


def killed_at_each_step(pid: int) -> Iterator[str]:
    """Kill an injector at each of its steps in turn."""
    for number in itertools.count(1):
        step = killed_at(pid, number)
        if not step:
            return
        yield step


def test_killed_at_each_step_of_an_injection() -> None:
    with Checker() as checker:
        ask(checker.pid)
        steps = []
        for step in killed_at_each_step(checker.pid):
            steps.append(step)
            assert still_right(checker), (step, checker.wrong, checker.process.poll())
        assert sum("pwrite64" in s for s in steps) == 2
        assert len(steps) > 30


@pytest.mark.parametrize("kind", ["read", "futex", "condvar", "pause", "sigsuspend", "waitpid",
                                  "msgrcv", "flock", "accept"])  # fmt: skip
def test_a_wait_goes_on_whenever_we_are_killed(kind: str) -> None:
    with Wait(kind) as wait:
        steps = list(killed_at_each_step(wait.pid))
        assert len(steps) > 30
        assert state(wait.pid)[1] == "0"
        assert wait.finish() == "ok"


SEIZE, SETREGSET = 0x4206, 0x4205
FIRST_WRITE = 6
"""SEIZE, INTERRUPT and GETREGSET, entry and end of each, come before SETREGSET."""


@pytest.mark.parametrize("kind", ["epoll_wait", "sigtimedwait", "semtimedop", "recv_timeout"])
def test_eintr_is_seen_only_if_we_die_before_the_first_write_of_registers(kind: str) -> None:
    steps, seen = set(), set()
    for number in itertools.count(1):
        with Wait(kind) as wait:
            step = killed_at(wait.pid, number)
            said = wait.finish()
        if not step:
            break
        steps.add(step)
        if said != "ok":
            assert "Interrupted" in said
            seen.add(step)
    assert len(steps) > 30
    assert f"{FIRST_WRITE} ptrace {SETREGSET} entry" in steps
    assert all(int(s.split()[0]) <= FIRST_WRITE for s in seen), seen
    assert seen, "then the window is closed: say so where it is named"


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["errno", "kill", "strict"])
def test_seccomp_is_refused_unless_asked_for(mode: str) -> None:
    with running(SECCOMP_SOURCE, mode) as process:
        with pytest.raises(Refused, match="seccomp"):
            ask(process.pid)
        stops = ask(process.pid, 3, suspend_seccomp=True)
        assert not any(s.self_healing for s in stops)
        assert all(s.window_seconds > 0 for s in stops)
        assert go_on(process) == "ok"


def test_a_32_bit_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with started([str(build_foreign())]) as process:
        with Handle(process.pid) as handle, pytest.raises(Refused, match="32-bit"):
            inject.require_possible(handle)  # without a stop: a plan says so
        monkeypatch.setattr(Injection, "_refuse", lambda _: None)
        with pytest.raises(Refused, match="32-bit"):
            ask(process.pid)  # by its registers
        process.communicate("\n", timeout=10)
        assert process.returncode == 0


def test_a_traced_one_is_refused() -> None:
    with Wait("read") as wait:
        child = os.fork()
        if not child:
            ctypes.CDLL(None).ptrace(SEIZE, wait.pid, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        os.waitid(os.P_PID, child, os.WSTOPPED)
        with pytest.raises(Refused, match=f"traced by process {child}"):
            ask(wait.pid)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert wait.finish() == "ok"


def test_a_zombie_and_a_kernel_thread_have_no_memory() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with pytest.raises(NoMemory):
        ask(child)
    os.waitpid(child, 0)
    with pytest.raises(NoMemory):
        ask(2)


def test_one_that_ends_is_gone() -> None:
    with Wait("read") as wait, Handle(wait.pid) as handle, Injection(handle) as injection:
        wait.process.kill()
        os.waitid(os.P_PID, wait.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ProcessGone):
            injection.run([injection.prctl(PR_GET_MEMORY_MERGE, 0)])
        wait.process.wait()
        with pytest.raises(ProcessGone):
            injection.run([injection.prctl(PR_GET_MEMORY_MERGE, 0)])


def test_a_parent_of_vfork_does_not_stop_and_is_let_alone() -> None:
    with running(VFORK_SOURCE) as process:
        assert state(process.pid)[0] == "D"
        begin = time.monotonic()
        with pytest.raises(NotStopped) as caught:
            ask(process.pid, deadline_seconds=0.3)
        assert 0.3 <= time.monotonic() - begin < 1.5
        assert caught.value.exit_status == 9
        assert go_on(process) == "ok"


def test_another_user_may_not() -> None:
    with Wait("read") as wait:
        child = os.fork()
        if not child:
            try:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                ask(wait.pid)
            except NotPermitted:
                os._exit(0)
            except DedupError:
                os._exit(2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert wait.finish() == "ok"
