"""Tunables set to stay, on the real kernel: undone, refused, killed at every step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedup.change import tune
from dedup.change.journal import Journal
from dedup.change.tunables import planned_restore, planned_undo, restore
from dedup.errors import Busy, CheckFailed, Unsupported
from dedup.kernel.ksm import Ksm
from dedup.kernel.lock import HostLock

pytestmark = [pytest.mark.ksm, pytest.mark.root]

FIXED: dict[str, int | str] = {"pages_to_scan": 321, "sleep_millisecs": 7}
ADVISED: dict[str, int | str] = {
    "sleep_millisecs": 20,
    "advisor_target_scan_time": 17,
    "advisor_max_cpu": 33,
    "advisor_min_pages_to_scan": 222,
    "advisor_max_pages_to_scan": 444,
    "advisor_mode": "scan-time",
}

KILLED = """
import os, signal, sys
from pathlib import Path
from dedup.change import tune
state, step = Path(sys.argv[1]), int(sys.argv[2])
wanted = dict(w.split("=") for w in sys.argv[3:])
count = 0
def each_step(event, args):
    "Before a file of ours or of KSM is opened for writing, renamed or removed."
    global count
    if event == "open":
        changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    else:
        changes = event in {"os.rename", "os.remove"}
    if not changes or not str(args[0]).startswith((str(state), "/sys/kernel/mm/ksm")):
        return
    count += 1
    if count == step:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(each_step)
tune.apply(wanted, state)
"""


@pytest.fixture
def before() -> Iterator[dict[str, int | str]]:
    """Tunables of the host, no advisor at work; they are so again afterwards."""
    ksm = Ksm()
    found = ksm.tunables()
    if "advisor_mode" not in found:
        pytest.skip("this kernel has no advisor")
    assert found["advisor_mode"] == "none"
    yield found
    ksm.write("advisor_mode", "none")
    for name, value in found.items():
        if ksm.tunables()[name] != value:
            ksm.write(name, value)


def test_they_stay_until_they_are_undone(tmp_path: Path, before: dict[str, int | str]) -> None:
    ksm = Ksm()
    done = tune.apply({**FIXED, "run": 1}, tmp_path)
    assert ksm.tunables() == {**before, **FIXED, "run": 1}
    assert done.running
    assert [Path(e.path).name for e in done.changed] == ["pages_to_scan", "sleep_millisecs", "run"]
    assert restore(ksm, tmp_path) == []
    assert ksm.tunables()["pages_to_scan"] == 321
    assert {r.outcome for r in planned_undo(tmp_path)} == {"restored"}
    assert ksm.tunables()["pages_to_scan"] == 321
    assert {r.outcome for r in tune.undo(tmp_path)} == {"restored"}
    assert ksm.tunables() == before
    assert tune.undo(tmp_path) == []


def test_the_values_before_the_first_one_come_back(
    tmp_path: Path, before: dict[str, int | str]
) -> None:
    for wanted in (FIXED, ADVISED, {"pages_to_scan": 900}, ADVISED, FIXED):
        tune.apply(wanted, tmp_path)
    assert tune.apply(FIXED, tmp_path).changed == []
    assert {r.outcome for r in tune.undo(tmp_path)} <= {"restored", "unchanged"}
    assert Ksm().tunables() == before


def test_the_advisor_and_the_batch_of_before(tmp_path: Path, before: dict[str, int | str]) -> None:
    ksm = Ksm()
    ksm.write("pages_to_scan", 777)
    tune.apply(ADVISED, tmp_path)
    now = ksm.tunables()
    assert {name: now[name] for name in ADVISED} == ADVISED
    assert now["pages_to_scan"] == 222
    assert {r.outcome for r in planned_undo(tmp_path)} == {"restored"}
    assert ksm.tunables() == now
    tune.undo(tmp_path)
    assert ksm.tunables() == {**before, "pages_to_scan": 777}


def test_an_advisor_at_work_is_switched_off_and_comes_back(
    tmp_path: Path, before: dict[str, int | str]
) -> None:
    ksm = Ksm()
    ksm.write("advisor_mode", "scan-time")
    tune.apply({"advisor_mode": "none", **FIXED}, tmp_path)
    assert ksm.tunables() == {**before, **FIXED}
    tune.undo(tmp_path)
    assert ksm.tunables() == {**before, "advisor_mode": "scan-time", "pages_to_scan": 500}


def test_what_others_changed_since_stays(tmp_path: Path, before: dict[str, int | str]) -> None:
    ksm = Ksm()
    tune.apply(FIXED, tmp_path)
    ksm.write("pages_to_scan", 555)
    outcomes = {Path(r.path).name: r.outcome for r in tune.undo(tmp_path)}
    assert outcomes == {"pages_to_scan": "left", "sleep_millisecs": "restored"}
    assert ksm.tunables()["pages_to_scan"] == 555


@pytest.mark.parametrize(
    ("wanted", "error"),
    [({**FIXED, "no_such_tunable": 1}, Unsupported), ({**FIXED, "smart_scan": 7}, Unsupported)],
)
def test_all_or_nothing(
    tmp_path: Path, before: dict[str, int | str], wanted: dict[str, int | str],
    error: type[Exception],
) -> None:  # fmt: skip
    with pytest.raises(error):
        tune.apply(wanted, tmp_path)
    assert Ksm().tunables() == before
    assert {p.name for p in tmp_path.iterdir()} <= {"lock", "ksmd.lock"}


def test_a_disk_that_is_full_keeps_nothing(tmp_path: Path, before: dict[str, int | str]) -> None:
    (tmp_path / "tuned.part").mkdir()
    with pytest.raises(Exception, match="tuned"):
        tune.apply(FIXED, tmp_path)
    assert Ksm().tunables() == before


def test_busy(tmp_path: Path, before: dict[str, int | str]) -> None:
    with HostLock(tmp_path):
        for call in (lambda: tune.apply(FIXED, tmp_path), lambda: tune.undo(tmp_path)):
            with pytest.raises(Busy):
                call()


@pytest.mark.parametrize("wanted", [{**FIXED, "run": 1}, ADVISED])
def test_killed_at_every_step(
    tmp_path: Path, before: dict[str, int | str], wanted: dict[str, int | str]
) -> None:
    """Either `dedup restore` brings all back, or the record is whole and `--undo` does."""
    ksm = Ksm()
    ksm.write("pages_to_scan", 101)
    before = ksm.tunables()
    words = [f"{name}={value}" for name, value in wanted.items()]
    recorded = step = 0
    while True:
        step += 1
        state = tmp_path / str(step)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(state), str(step), *words], stderr=subprocess.PIPE
        )
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        if (state / "tuned").exists():
            recorded += 1
            assert tune.undo(state) != []
        else:
            restore(ksm, state)
        assert ksm.tunables() == before
        assert not (state / "journal").exists()
        assert tune.undo(state) == []
    # A line and a value for each but one, the record renamed, and killed after that, too.
    assert step > 2 * len(wanted)
    assert recorded > 0
    assert planned_restore(state) == []
    assert len(Journal(state, "tuned").entries()) >= len(wanted) - 1
    tune.undo(state)
    assert ksm.tunables() == before


def test_somebody_else_at_the_knobs(tmp_path: Path, before: dict[str, int | str]) -> None:
    """Another writer that always has the last word."""
    code = (
        "import os\n"
        "fd = os.open('/sys/kernel/mm/ksm/pages_to_scan', os.O_WRONLY)\n"
        "print('ready', flush=True)\n"
        "while True: os.pwrite(fd, b'123', 0)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(CheckFailed, match="somebody else"):
                tune.apply({**FIXED, "run": 1}, tmp_path)
        finally:
            process.kill()
    assert not (tmp_path / "tuned").exists()
    assert Ksm().tunables()["run"] == before["run"]
