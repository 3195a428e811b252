"""Processes that appear later."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from dedup.change.applied import Applied
from dedup.change.follow import Followed, follow
from dedup.change.plan import Wish
from dedup.change.undo import undo
from dedup.kernel.arrivals import in_choice
from dedup.kernel.ksm import process_counters
from dedup.kernel.lock import HostLock
from dedup.kernel.processes import Choice, Handle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.kernel_fixtures import KsmControl

pytestmark = [pytest.mark.ksm, pytest.mark.root]

NAMED = (
    "import sys; open('/proc/self/comm', 'w').write(sys.argv[1]); print('ready', flush=True); "
    "sys.stdin.read()"
)


def start(name: str, user: int | None = None) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        ["/usr/bin/python3" if user else sys.executable, "-c", NAMED, name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user=user, cwd="/",
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()


def merges_any(pid: int) -> bool:
    with Handle(pid) as handle:
        counters = process_counters(handle)
    assert counters is not None
    return bool(counters.ksm_merge_any)


class Following:
    """A thread that follows processes named `appears*`."""

    def __init__(self, wish: Wish) -> None:
        self.told: list[Followed] = []
        self.ending = False
        self.thread = threading.Thread(
            target=follow,
            args=(in_choice(Choice(names=("appears*",))), [], wish, self.told.append),
            kwargs={"interval_seconds": 0.02, "stop": lambda: self.ending},
        )
        self.thread.start()

    def wait_for(self, pid: int) -> Followed:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for one in self.told:
                if one.pid == pid:
                    return one
            time.sleep(0.01)
        raise AssertionError(self.told)

    def close(self) -> None:
        self.ending = True
        self.thread.join()


@pytest.fixture
def following(ksm: KsmControl) -> Iterator[Callable[[Wish], Following]]:
    begun: list[Following] = []

    def begin(wish: Wish) -> Following:
        begun.append(Following(wish))
        return begun[-1]

    yield begin
    for one in begun:
        one.close()
    undo(Applied())


def test_one_that_appears_is_made_mergeable_and_undone(
    following: Callable[[Wish], Following],
) -> None:
    watch = following(Wish())
    process = start("appears")
    try:
        assert watch.wait_for(process.pid).outcome == "marked"
        assert merges_any(process.pid)
        watch.close()
        (one,) = undo(Applied()).processes
        assert one.outcome == "undone"
        assert not merges_any(process.pid)
    finally:
        end(process)


def test_another_domain_and_holders_of_secrets_are_left(
    following: Callable[[Wish], Following],
) -> None:
    ours, theirs = start("appears"), start("appears too", user=65534)
    try:
        watch = following(Wish())
        outcomes = {watch.wait_for(p.pid).outcome for p in (ours, theirs)}
        assert outcomes == {"marked", "left"}
        assert merges_any(ours.pid) != merges_any(theirs.pid)
    finally:
        end(ours)
        end(theirs)


def test_it_waits_while_another_dedup_is_at_work(
    following: Callable[[Wish], Following],
) -> None:
    process = start("appears")
    try:
        with HostLock():
            watch = following(Wish())
            time.sleep(0.2)
            assert not watch.told
        assert watch.wait_for(process.pid).outcome == "marked"
    finally:
        end(process)
