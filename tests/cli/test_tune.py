from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dedup import calibration
from dedup.change import tune
from dedup.kernel.ksm import Ksm
from dedup.kernel.lock import HostLock
from dedup.model.cost import Calibration
from tests.kernel_fixtures import KsmControl, Target
from tests.model.test_cost import COSTS

from .conftest import Dedup

PAGES = 20_000


@pytest.fixture
def stored() -> Iterator[Path]:
    """The host's calibration; it is afterwards as it was."""
    path = calibration.PATH
    folder, before = path.parent.exists(), path.read_bytes() if path.exists() else None
    yield path
    if before is not None:
        path.write_bytes(before)
        return
    path.unlink(missing_ok=True)
    if not folder:
        with suppress(FileNotFoundError):
            path.parent.rmdir()


@pytest.fixture
def calibrated(stored: Path) -> Iterator[Calibration]:
    """A calibration of this host, of costs that the test knows; nothing of ours stays set."""
    found = Calibration(COSTS, calibration.machine(), taken="2026-01-01T00:00:00+00:00")
    calibration.save(found, stored)
    yield found
    tune.undo()


@pytest.fixture
def other() -> Iterator[Target]:
    """A process with 20,000 pages, a fifth of them copies, which nobody has advised."""
    with Target() as target:
        target.do("map", name="a", pages=PAGES)
        target.do("put", name="a", at=0, what=["unique"] * (PAGES * 4 // 5))
        copies = [f"content {i % 100}" for i in range(PAGES // 5)]
        target.do("put", name="a", at=PAGES * 4 // 5, what=copies)
        yield target


def test_help_begins_with_an_example(dedup: Dedup) -> None:
    result = dedup("tune", "--help")
    assert result.status == 0
    assert result.out.startswith("Examples:\n  sudo dedup tune --calibrate")


@pytest.mark.parametrize(
    ("args", "words"),
    [(["--within", "0"], "above 0"), (["--within", "soon"], "number of seconds"),
     (["--cpu", "0"], "above 0"), (["--cpu", "101%"], "up to 100"), (["--cpu", "nan"], "per cent"),
     (["--cpu", "%"], "per cent"), (["--apply"], "needs a wish"), (["--pid", "1"], "no wish"),
     (["--within", "5", "--advisor"], "need --apply"),
     (["--within", "5", "--start-ksmd"], "need --apply"),
     (["--within", "5", "--calibrate"], "three things"),
     (["--undo", "--calibrate"], "three things"),
     (["--undo", "--apply"], "needs a wish")],
)  # fmt: skip
def test_words_that_do_not_fit(dedup: Dedup, args: list[str], words: str) -> None:
    result = dedup("tune", *args)
    assert result.status == 2
    assert words in " ".join(result.err.split())


@pytest.mark.parametrize("args", [[], ["--dry-run"]])
def test_what_it_can_do_is_named(dedup: Dedup, args: list[str]) -> None:
    result = dedup("tune", *args)
    assert result.status == 2
    assert "tune --calibrate" in " ".join(result.err.split())
    assert dedup("tune", *args, "--json").json["error"]["code"] == "usage"


def test_without_root(dedup_nobody: Dedup) -> None:
    if not Ksm().present:
        pytest.skip("no KSM here")
    result = dedup_nobody("tune", "--calibrate")
    assert result.status == 4
    assert "as root" in result.err


@pytest.mark.ksm
@pytest.mark.root
def test_a_calibration(ksm: KsmControl, dedup: Dedup, stored: Path) -> None:
    ksm.alone()
    before = ksm.ksm.tunables()
    planned = dedup("tune", "--calibrate", "--dry-run", "--json").json
    assert planned["kind"] == "calibration_plan"
    assert planned["tunables"]["smart_scan"] == 0
    assert "put back" in dedup("tune", "--calibrate", "--dry-run").out
    stored.unlink(missing_ok=True)
    result = dedup("tune", "--calibrate", "--json")
    assert result.status == 0
    data = result.json
    assert data["kind"] == "calibration"
    assert data["stored"] == str(stored)
    found = calibration.load().calibration
    assert found is not None
    assert found.to_json() == data["calibration"]
    assert ksm.ksm.tunables() == before
    text = dedup("tune", "--calibrate").out
    for m in found.measured:
        assert m.name in text
    assert str(stored) in text
    assert calibration.load().calibration != found


@pytest.mark.ksm
@pytest.mark.root
def test_busy(ksm: KsmControl, dedup: Dedup) -> None:
    ksm.alone()
    with HostLock():
        result = dedup("tune", "--calibrate")
    assert result.status == 9
    assert str(os.getpid()) in result.err


@pytest.mark.ksm
@pytest.mark.root
def test_others_use_ksm(ksm: KsmControl, dedup: Dedup, stored: Path) -> None:
    with Target() as other:
        other.do("map", name="a", pages=2000)
        other.do("put", name="a", at=0, what=["unique"] * 2000)
        other.do("advise", name="a", what="mergeable")
        for more in ([], ["--dry-run"]):
            result = dedup("tune", "--calibrate", *more)
            assert result.status == 6
            assert "echo 1 > /sys/kernel/mm/ksm/run" in " ".join(result.err.split())
        ksm.set(pages_to_scan=500, sleep_millisecs=20)
        ksm.start()
        assert "would watch ksmd" in dedup("tune", "--calibrate", "--dry-run").out
        text = dedup("tune", "--calibrate").out
    assert "watched ksmd" in text
    assert "wide" in text
    assert stored.exists()


# -- wishes ----------------------------------------------------------------------------------------


@pytest.mark.ksm
@pytest.mark.root
def test_no_wish_without_a_calibration(ksm: KsmControl, dedup: Dedup, stored: Path) -> None:
    stored.unlink(missing_ok=True)
    result = dedup("tune", "--pid", str(os.getpid()), "--within", "5")
    assert result.status == 6
    assert "dedup tune --calibrate`" in " ".join(result.err.split())
    stored.write_text("{}")
    result = dedup("tune", "--pid", str(os.getpid()), "--cpu", "5", "--json")
    assert result.status == 6
    assert result.json["error"]["code"] == "not-calibrated"
    assert str(stored) in result.json["error"]["message"]


@pytest.mark.ksm
@pytest.mark.root
def test_a_wish_for_processes(
    ksm: KsmControl, dedup: Dedup, calibrated: Calibration, other: Target
) -> None:
    ksm.set(pages_to_scan=100, sleep_millisecs=20)
    before = ksm.ksm.tunables()
    words = ("tune", "--pid", str(other.pid), "--within", "2", "--cpu", "50%")
    data = dedup(*words, "--json").json
    assert data["wish"] == {"within_seconds": 2.0, "cores": 0.5}
    assert PAGES <= data["load"]["candidates"] < PAGES + 20_000
    assert data["load"]["pages_shared"] >= 100
    fixed, *advisors = data["alternatives"]
    assert fixed["keeps"]
    assert fixed["price"]["converge_seconds"] <= 2 < data["present"]["converge_seconds"]
    assert fixed["tunables"]["pages_to_scan"] > 100
    assert [a["name"] for a in advisors] == (["advisor"] if "advisor_mode" in before else [])
    assert data["planned"] is data["applied"] is None
    # At the default tunables its looks are seconds apart: one run for all of this.
    text = dedup(*words, "--ascii", COLUMNS="40").out
    assert max(map(len, text.splitlines())) <= 40
    assert text.isascii()
    assert f"{fixed['pages_to_scan']:,}" in text
    typed = f"--pid {other.pid} --within 2 --cpu 50 --apply --start-ksmd"
    assert typed in " ".join(text.split())
    assert ksm.ksm.tunables() == before


@pytest.mark.ksm
@pytest.mark.root
def test_what_can_not_be_had_is_said(
    ksm: KsmControl, dedup: Dedup, calibrated: Calibration, other: Target
) -> None:
    for wish, words in (
        (["--within", "0.001"], "ksmd alone needs"),
        (["--within", "1", "--cpu", "1"], "both can't be had"),
        (["--cpu", "0.0000001"], "of a core here"),
    ):
        result = dedup("tune", "--pid", str(other.pid), *wish, "--apply")
        assert result.status == 1
        assert words in " ".join(result.err.split())
    assert not Path("/run/dedup/tuned").exists()


@pytest.mark.ksm
@pytest.mark.root
def test_applied_to_stay_and_undone(
    ksm: KsmControl, dedup: Dedup, calibrated: Calibration, other: Target
) -> None:
    before = ksm.ksm.tunables()
    words = ["tune", "--pid", str(other.pid), "--within", "3", "--apply", "--start-ksmd"]
    planned = dedup(*words, "--dry-run", "--json").json
    assert planned["planned"]["run"] == 1
    assert planned["applied"] is None
    assert ksm.ksm.tunables() == before
    assert "would set" in dedup(*words, "--dry-run").out
    done = dedup(*words, "--json").json
    assert done["applied"]["ksmd_running"]
    assert {Path(c["path"]).name for c in done["applied"]["changed"]} >= {"pages_to_scan", "run"}
    now = ksm.ksm.tunables()
    assert now == {**before, **done["planned"]}
    # It stays: no run of ours was interrupted.
    assert dedup("restore", "--json").json["restored"] == []
    assert ksm.ksm.tunables() == now
    assert "nothing to set" in dedup(*words).out
    shown = dedup("tune", "--undo", "--dry-run")
    assert "put back to" in shown.out
    assert ksm.ksm.tunables() == now
    undone = dedup("tune", "--undo", "--json").json
    assert undone["kind"] == "tune_undo"
    assert {r["outcome"] for r in undone["restored"]} == {"restored"}
    assert ksm.ksm.tunables() == before
    assert "nothing to undo" in dedup("tune", "--undo").out


@pytest.mark.ksm
@pytest.mark.root
def test_the_kernels_advisor(
    ksm: KsmControl, dedup: Dedup, calibrated: Calibration, other: Target
) -> None:
    before = ksm.ksm.tunables()
    words = ["tune", "--pid", str(other.pid), "--within", "6", "--apply", "--advisor"]
    if "advisor_mode" not in before:
        assert dedup(*words).status == 6
        return
    text = dedup(*words).out
    assert "set advisor_mode to scan-time" in text
    assert "ksmd is not running" in text
    assert ksm.ksm.tunables()["advisor_mode"] == "scan-time"
    assert ksm.ksm.tunables()["advisor_target_scan_time"] in range(1, 4)
    data = dedup("tune", "--pid", str(other.pid), "--within", "6", "--json").json
    assert data["alternatives"][0]["tunables"]["advisor_mode"] == "none"
    dedup("tune", "--undo")
    assert ksm.ksm.tunables() == before


@pytest.mark.ksm
@pytest.mark.root
def test_a_wish_for_what_ksm_follows(
    ksm: KsmControl, dedup: Dedup, calibrated: Calibration, other: Target
) -> None:
    ksm.alone()
    result = dedup("tune", "--within", "5")
    assert result.status == 2
    assert "dedup run -- CMD" in " ".join(result.err.split())
    other.do("advise", name="a", what="mergeable")
    ksm.converge(stop=False)
    data = dedup("tune", "--within", "5", "--json").json
    # ksmd is at work: the page that it visits is in neither tree for a moment, or, since the
    # counters are files of their own, in two of them.
    assert abs(data["load"]["candidates"] - PAGES) <= 1
    assert data["load"]["pages_shared"] == 100
    assert any("scan under way" in note for note in data["notes"])
    ksm.set(smart_scan=1)
    data = dedup("tune", "--within", "5", "--json").json
    assert any("Smart scan is on" in note for note in data["notes"])


@pytest.mark.ksm
@pytest.mark.root
def test_a_choice_in_part(
    ksm: KsmControl, dedup: Dedup, calibrated: Calibration, other: Target, dead_pid: int
) -> None:
    result = dedup("tune", "--pid", str(other.pid), "--pid", str(dead_pid), "--within", "5")
    assert result.status == 3
    assert "in part" in result.err
    assert dedup("tune", "--pid", str(dead_pid), "--within", "5").status == 5


@pytest.mark.ksm
@pytest.mark.root
def test_set_by_root_alone(ksm: KsmControl, dedup_nobody: Dedup, calibrated: Calibration) -> None:
    result = dedup_nobody("tune", "--name", "nothing", "--within", "5", "--apply")
    assert result.status == 4
    assert "as root" in result.err
    assert dedup_nobody("tune", "--undo").status == 4
