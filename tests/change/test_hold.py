"""ksmd held running by several at once, killed ones among them, with other runs in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from dedup.change import hold, tune
from dedup.change.hold import Hold
from dedup.change.tunables import Tunables, host_locked, planned_restore, restore
from dedup.errors import Busy, OutputFailed
from dedup.kernel.ksm import Ksm
from dedup.kernel.lock import HostLock

pytestmark = [pytest.mark.ksm, pytest.mark.root]

HOLDER = """
import sys
from pathlib import Path
from dedup.change.hold import Hold
from dedup.kernel.ksm import Ksm
with Hold(Ksm(), Path(sys.argv[1])) as held:
    print("waits" if held.waits else "holds", flush=True)
    for line in sys.stdin:
        held.keep()
        print("waits" if held.waits else "holds", flush=True)
print("left", flush=True)
"""
CHANGER = """
import sys
from pathlib import Path
from dedup.change.tunables import Tunables
from dedup.kernel.ksm import Ksm
with Tunables(Ksm(), Path(sys.argv[1])) as t:
    t.set("run", 1)
    t.set("run", 0)
    print("changed", flush=True)
    sys.stdin.readline()
"""


class Other:
    """A process that runs one of the programs above."""

    def __init__(self, program: str, state: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(state)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.says()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(10) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


Start = Callable[[str], Other]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def one(program: str) -> Other:
            other = Other(program, tmp_path)
            stack.callback(other.kill)
            return other

        yield one


@pytest.fixture(autouse=True)
def _rests() -> Iterator[None]:
    ksm = Ksm()
    before = ksm.tunables()["run"]
    ksm.write("run", 0)
    yield
    ksm.write("run", before)


def run() -> int:
    return int(Ksm().tunables()["run"])


def test_the_last_of_two_puts_back(tmp_path: Path, start: Start) -> None:
    first, second = start(HOLDER), start(HOLDER)
    assert {first.says(), second.says()} == {"holds"}
    assert run() == 1
    first.end()
    assert run() == 1
    second.end()
    assert run() == 0
    assert hold.read(tmp_path) is None


def test_ksmd_that_ran_before_runs_on(tmp_path: Path) -> None:
    Ksm().write("run", 1)
    with Hold(Ksm(), tmp_path):
        assert run() == 1
    assert run() == 1


def test_what_somebody_else_set_meanwhile_stays(tmp_path: Path) -> None:
    with Hold(Ksm(), tmp_path):
        Ksm().write("run", 2)
    assert run() == 2


def test_a_killed_one_is_put_right_by_restore(tmp_path: Path, start: Start) -> None:
    killed = start(HOLDER)
    assert killed.says() == "holds"
    assert planned_restore(tmp_path) == []
    assert restore(Ksm(), tmp_path) == []
    assert run() == 1
    killed.kill()
    expected = ("/sys/kernel/mm/ksm/run", "0", "1", "restored")
    for way in (planned_restore, lambda state: restore(Ksm(), state)):
        assert [(r.path, r.value, r.found, r.outcome) for r in way(tmp_path)] == [expected]
    assert run() == 0
    assert planned_restore(tmp_path) == []


def test_a_killed_one_is_put_right_by_the_next_run(tmp_path: Path, start: Start) -> None:
    killed = start(HOLDER)
    assert killed.says() == "holds"
    killed.kill()
    with Tunables(Ksm(), tmp_path) as tunables:
        assert [r.outcome for r in tunables.leftover] == ["restored"]
        assert run() == 0


def test_of_two_one_killed(tmp_path: Path, start: Start) -> None:
    killed, other = start(HOLDER), start(HOLDER)
    assert {killed.says(), other.says()} == {"holds"}
    killed.kill()
    assert restore(Ksm(), tmp_path) == []
    found = hold.read(tmp_path)
    assert found is not None
    assert [h.pid for h in found.holders] == [other.process.pid]
    other.end()
    assert run() == 0


def test_another_run_in_between(tmp_path: Path, start: Start) -> None:
    holder = start(HOLDER)
    assert holder.says() == "holds"
    with Tunables(Ksm(), tmp_path) as tunables:
        tunables.set("run", 0)
    assert run() == 1
    holder.end()
    assert run() == 0


def test_the_last_leaves_while_another_run_changes_ksm(tmp_path: Path, start: Start) -> None:
    holder = start(HOLDER)
    assert holder.says() == "holds"
    with Tunables(Ksm(), tmp_path) as tunables:
        tunables.set("run", 0)
        tunables.set("run", 1)
        holder.end()
        assert run() == 1
        tunables.require_unchanged()
    assert run() == 0
    assert hold.read(tmp_path) is None


def test_one_that_comes_while_another_run_changes_ksm(tmp_path: Path, start: Start) -> None:
    changer = start(CHANGER)
    assert changer.says() == "changed"
    holder, second = start(HOLDER), start(HOLDER)
    assert (holder.says(), second.says()) == ("waits", "waits")
    assert holder.ask() == "waits"
    assert run() == 0
    changer.end()
    assert run() == 1
    assert holder.ask() == "holds"
    holder.end()
    second.end()
    assert run() == 0


def test_one_that_waits_for_a_run_that_is_killed(tmp_path: Path, start: Start) -> None:
    changer = start(CHANGER)
    assert changer.says() == "changed"
    Ksm().write("run", 1)
    holder = start(HOLDER)
    assert holder.says() == "waits"
    changer.kill()
    assert holder.ask() == "holds"
    assert run() == 1
    holder.end()
    assert run() == 0


def test_one_that_waits_and_leaves_again(tmp_path: Path, start: Start) -> None:
    with HostLock(tmp_path):
        holder = start(HOLDER)
        assert holder.says() == "waits"
        holder.end()
    assert restore(Ksm(), tmp_path) == []
    assert run() == 0
    assert hold.read(tmp_path) is None


def test_a_pid_used_again_holds_nothing(tmp_path: Path) -> None:
    Ksm().write("run", 1)
    (tmp_path / "ksmd").write_text(f'{{"before": 0, "holders": [[{os.getpid()}, 1]]}}')
    assert [r.outcome for r in restore(Ksm(), tmp_path)] == ["restored"]


@pytest.mark.parametrize(
    "text", ["{", '{"before": true, "holders": []}', '{"before": 0, "holders": [[1e999, 1]]}',
             "[" * 100_000]
)  # fmt: skip
def test_a_file_that_is_damaged_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "ksmd").write_text(text)
    with pytest.raises(OutputFailed, match="can't be read"):
        restore(Ksm(), tmp_path)
    with HostLock(tmp_path):
        pass


@contextmanager
def self_test() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "dedup", "apply", "--self-test", "--case", "mixed*"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_one_ends_while_the_self_test_runs(number: signal.Signals) -> None:
    before = Ksm().tunables()
    with subprocess.Popen(
        [sys.executable, "-m", "dedup", "run", "--start-ksmd", "--", "sh", "-c", "echo on; cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as runner:  # fmt: skip
        assert runner.stdout is not None
        assert runner.stdout.readline() == "on\n"
        assert run() == 1
        with self_test() as test:
            while not Path("/run/dedup/journal").exists():
                assert test.poll() is None
            runner.send_signal(number)
            runner.wait(10)
            out, err = test.communicate(timeout=60)
        assert test.returncode == 0, out + err
        assert runner.stdin is not None
        runner.stdin.close()
    assert Ksm().tunables() == before
    assert hold.read() is None


def test_ksmd_wished_for_outlives_those_who_hold_it(tmp_path: Path, start: Start) -> None:
    holder = start(HOLDER)
    assert holder.says() == "holds"
    assert [e.before for e in tune.apply({"run": 1}, tmp_path).changed] == ["0"]
    holder.end()
    assert run() == 1
    tune.undo(tmp_path)
    assert run() == 0


def test_ksmd_wished_for_no_longer_runs_on_for_its_holder(tmp_path: Path, start: Start) -> None:
    tune.apply({"run": 1}, tmp_path)
    holder = start(HOLDER)
    assert holder.says() == "holds"
    assert [r.outcome for r in tune.undo(tmp_path)] == ["restored"]
    assert run() == 1
    holder.end()
    assert run() == 0
    assert hold.read(tmp_path) is None


def test_a_wish_and_its_undoing_while_it_is_held(tmp_path: Path, start: Start) -> None:
    holder = start(HOLDER)
    assert holder.says() == "holds"
    tune.apply({"run": 1}, tmp_path)
    tune.undo(tmp_path)
    assert run() == 1
    holder.kill()
    assert [r.outcome for r in restore(Ksm(), tmp_path)] == ["restored"]
    assert run() == 0


def test_one_that_leaves_while_another_run_undoes(tmp_path: Path, start: Start) -> None:
    holder = start(HOLDER)
    assert holder.says() == "holds"
    with host_locked(tmp_path):
        holder.end()
        assert run() == 1
    assert run() == 0
    assert hold.read(tmp_path) is None


def test_a_look_takes_no_lock(tmp_path: Path, start: Start) -> None:
    holder = start(HOLDER)
    assert holder.says() == "holds"
    with host_locked(tmp_path, dry_run=True):
        holder.end()
    assert run() == 0
    with HostLock(tmp_path), pytest.raises(Busy), host_locked(tmp_path, dry_run=True):
        pass
