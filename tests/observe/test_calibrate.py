"""Calibrations by the real ksmd: at rest, and while others use it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dedup import calibration
from dedup.errors import Busy, KsmNotRunning, NotPermitted
from dedup.kernel.ksm import Ksm
from dedup.kernel.ksmd import Ksmd
from dedup.kernel.lock import HostLock
from dedup.model.cost import Load, Settings, price
from dedup.observe.calibrate import calibrate, plan
from tests.kernel_fixtures import KsmControl, Target

pytestmark = [pytest.mark.ksm, pytest.mark.root]


def test_at_rest(ksm: KsmControl, tmp_path: Path) -> None:
    ksm.alone()
    before = ksm.ksm.tunables()
    asked: list[str] = []
    path = tmp_path / "calibration.json"
    planned = plan()
    assert planned.sets
    result = calibrate(path, tmp_path, progress=lambda what, _done, _total: asked.append(what))
    assert ksm.ksm.tunables() == before
    assert {r.outcome for r in result.restored} <= {"restored", "unchanged"}
    assert {r.path.rpartition("/")[2] for r in result.restored} <= set(planned.tunables)
    assert not (tmp_path / "journal").exists()
    assert asked
    assert result.others == []
    assert calibration.load(path) == (result.calibration, "")
    # What holds on any machine: merging costs most, a merged page least but for a skipped one.
    c = result.calibration.costs
    assert 50 < c.skip_ns < c.first_ns < c.zero_ns < 100_000
    assert c.merged_ns < c.first_ns < c.tree_ns < 100_000
    assert 0 < c.tree_log2_ns < c.tree_ns
    assert c.node_ns > 0
    assert result.calibration.spread < 1
    assert not ksm.ksm.counters().rmap_items


def test_it_foretells_a_scan(ksm: KsmControl, target: Target, tmp_path: Path) -> None:
    """Right to a factor: how far off is for the benchmark to say, on a machine at rest."""
    ksm.alone()
    target.wait_until_idle()
    found = calibrate(tmp_path / "calibration.json", tmp_path).calibration
    target.do("map", name="a", pages=6000)
    for i in range(0, 6000, 3000):
        target.do("put", name="a", at=i, what=[f"content {n}" for n in range(3000)])
    target.do("advise", name="a", what="mergeable")
    ksm.set(pages_to_scan=1000, sleep_millisecs=20)
    thread, begin, cpu = Ksmd(), time.monotonic(), Ksmd().cpu_ns()
    ksm.start()
    while ksm.ksm.counters().pages_sharing < 3000:
        assert time.monotonic() < begin + 30
        time.sleep(0.001)
    seconds, used = time.monotonic() - begin, (thread.cpu_ns() - cpu) / 1e9
    ksm.stop()
    settings = Settings(1000, 20, found.machine.tick_seconds)
    predicted = price(Load(3000, 3000, 0), settings, found)
    assert predicted.cpu_seconds is not None
    assert predicted.cpu_seconds / 2.5 < used < predicted.cpu_seconds * 2.5
    assert predicted.converge_seconds / 2 < seconds < predicted.converge_seconds * 2


def test_others_memory_is_not_merged_by_a_measurement(
    ksm: KsmControl, target: Target, tmp_path: Path
) -> None:
    target.do("map", name="a", pages=10)
    target.do("fill", name="a", at=0, count=10, what="x")
    target.do("advise", name="a", what="mergeable")
    before = ksm.ksm.tunables(), ksm.ksm.counters().pages_scanned
    for attempt in (lambda: calibrate(tmp_path / "calibration.json", tmp_path), plan):
        with pytest.raises(KsmNotRunning, match=f"pid {target.pid}"):
            attempt()
    assert (ksm.ksm.tunables(), ksm.ksm.counters().pages_scanned) == before
    assert list(tmp_path.iterdir()) == []


def test_merged_pages_of_nobody_in_sight_are_left_alone(ksm: KsmControl, tmp_path: Path) -> None:
    """As of a process in another pid namespace: here it has ended, and ksmd has not come by."""
    with Target() as other:
        other.do("map", name="a", pages=10)
        other.do("fill", name="a", at=0, count=10, what="x")
        other.do("advise", name="a", what="mergeable")
        ksm.converge()
    assert ksm.ksm.counters().pages_sharing == 9
    with pytest.raises(KsmNotRunning, match="10 pages of processes out of sight"):
        calibrate(tmp_path / "calibration.json", tmp_path)
    assert ksm.ksm.counters().pages_sharing == 9


def test_where_others_use_ksm_its_own_scans_are_watched(
    ksm: KsmControl, target: Target, tmp_path: Path
) -> None:
    target.do("map", name="a", pages=2000)
    target.do("put", name="a", at=0, what=[f"content {n}" for n in range(2000)])
    target.do("advise", name="a", what="mergeable")
    ksm.set(pages_to_scan=500, sleep_millisecs=20)
    ksm.start()
    before = ksm.ksm.tunables()
    assert plan().sets == []
    result = calibrate(tmp_path / "calibration.json", tmp_path)
    assert ksm.ksm.tunables() == before
    assert any(f"pid {target.pid}" in o for o in result.others)
    found = result.calibration
    assert found.observed
    assert 200 < found.costs.merged_ns < 100_000
    assert calibration.load(tmp_path / "calibration.json").calibration == found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.json"]


def test_one_of_us_at_a_time(ksm: KsmControl, tmp_path: Path) -> None:
    ksm.alone()
    with HostLock(tmp_path), pytest.raises(Busy):
        calibrate(tmp_path / "calibration.json", tmp_path)


def test_where_it_can_not_be_stored(ksm: KsmControl, tmp_path: Path) -> None:
    """Said before anything is measured."""
    ksm.alone()
    before = Ksm().counters().full_scans
    with pytest.raises(NotPermitted, match="/proc/1/calibration"):
        calibrate(Path("/proc/1/calibration.json"), tmp_path)
    assert Ksm().counters().full_scans == before
