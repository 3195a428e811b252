"""KSM as it is: derived figures by hand, and the kernel's own on real memory."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dedup.errors import Unsupported
from dedup.kernel.ksm import Counters, Ksm, ProcessCounters, Use, Uses
from dedup.kernel.processes import Info
from dedup.observe.status import Sample, Status, collect, groups
from dedup.pages import ProcessId
from tests.kernel_fixtures import PAGE, KsmControl, Target

COUNTERS = Counters(
    pages_shared=10,
    pages_sharing=90,
    pages_unshared=60,
    pages_volatile=40,
    ksm_zero_pages=5,
    stable_node_chains=2,
    stable_node_dups=7,
    general_profit=95 * PAGE - 200 * 64,
    full_scans=9,
    pages_scanned=300,
    pages_skipped=100,
)
SAMPLE = Sample(
    seconds=2.0,
    ksmd_cpu_seconds=0.5,
    full_scans=0,
    pages_scanned=60,
    pages_skipped=40,
    cow_ksm=6,
    ksm_swpin_copy=None,
)


def use(pid: int, name: str, uid: int, merging: int, followed: int, unit: str = "") -> Use:
    info = Info(
        ProcessId(pid, 7), name, uid, 1, "S", False, 0, 0, 0, 0, 0, f"/system.slice/{unit}", pid, ()
    )
    profit = merging * PAGE - followed * 64
    return Use(info, ProcessCounters(followed, 0, merging, profit, False, True))


USES = (
    use(5, "web", 0, 40, 90, "web.service"),
    use(6, "web", 65534, 60, 100),
    use(7, "idle", 0, 0, 10),
)


def make(**more: object) -> Status:
    status = Status(
        kernel="6.18",
        tunables={"run": 1, "pages_to_scan": 100, "sleep_millisecs": 20, "smart_scan": 1},
        counters=COUNTERS,
        uses=Uses(USES, 0, True),
        ksmd_cpu_seconds=12.0,
        uptime_seconds=1200.0,
        sample=SAMPLE,
        others=(),
        changed_for_now=(),
    )
    return replace(status, **more)  # type: ignore[arg-type]


def test_what_is_saved() -> None:
    status = make()
    assert status.freed_bytes == 95 * PAGE
    assert status.rmap_items_bytes == 200 * 64
    assert status.stable_nodes_bytes == 12 * 64
    # The kernel's own figure leaves the stable nodes out.
    assert status.saved_bytes == COUNTERS.general_profit - 12 * 64
    assert status.sharing_per_shared == 9
    assert status.unshared_share == 0.3
    assert status.skipped_share == 0.25


def test_nothing_merged() -> None:
    status = make(counters=Counters(*([0] * 11)))
    assert status.saved_bytes == 0
    assert status.sharing_per_shared is None
    assert status.unshared_share is None
    assert status.skipped_share is None
    assert status.full_scan_seconds is None


def test_the_time_of_a_full_scan() -> None:
    # 200 pages followed, 50 visits a second.
    assert make().full_scan_seconds == 4.0
    assert make(sample=replace(SAMPLE, full_scans=4)).full_scan_seconds == 0.5
    still = replace(SAMPLE, pages_scanned=0, pages_skipped=0)
    for status in (make(sample=None), make(sample=still), make(tunables={"run": 0})):
        assert status.full_scan_seconds is None


def test_counters_stand_still_while_ksmd_is_stopped() -> None:
    assert not make().stale
    assert make(tunables={"run": 0}).stale
    assert not make(tunables={"run": 0}, counters=Counters(*([0] * 11))).stale


def test_tunables_that_differ() -> None:
    tunables: dict[str, int | str] = {
        "run": 1, "pages_to_scan": 700, "use_zero_pages": 0, "smart_scan": 0, "advisor_mode": "none"
    }  # fmt: skip
    assert make(tunables=tunables).changed_tunables == {
        "pages_to_scan": (700, 100),
        "smart_scan": (0, 1),
    }
    tunables["advisor_mode"] = "scan-time"
    assert make(tunables=tunables).changed_tunables == {
        "smart_scan": (0, 1),
        "advisor_mode": ("scan-time", "none"),
    }


def test_groups_by_profit() -> None:
    assert [g.name for g in groups(USES, "process")] == ["6", "5", "7"]
    by_user = groups(USES, "user")
    assert [(g.name, len(g.uses)) for g in by_user] == [("nobody", 1), ("root", 2)]
    assert by_user[1].ksm_rmap_items == 100
    assert by_user[1].ksm_merging_pages == 40
    assert by_user[1].ksm_process_profit == 40 * PAGE - 100 * 64
    assert [g.name for g in groups(USES, "name")] == ["web", "idle"]
    assert [g.name for g in groups(USES, "unit")] == ["", "web.service"]
    assert groups((), "unit") == []


def test_a_kernel_without_ksm(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no KSM"):
        collect(0, Ksm(tmp_path / "ksm"))


def test_ksmd_out_of_sight(tmp_path: Path) -> None:
    """A container: its own processes, and a ksmd that is none of them."""
    (tmp_path / "ksm").mkdir()
    for name, value in {"run": 1, "pages_to_scan": 100, "pages_sharing": 3}.items():
        (tmp_path / "ksm" / name).write_text(f"{value}\n")
    (tmp_path / "proc").mkdir()
    status = collect(0.01, Ksm(tmp_path / "ksm"), tmp_path / "proc", tmp_path / "state")
    assert status.ksmd_cpu_seconds is None
    assert status.sample is not None
    assert status.sample.ksmd_cores is None
    assert status.sample.cow_ksm is None
    assert status.uses == Uses((), 0, False)
    assert status.freed_bytes == 3 * PAGE
    assert not list((tmp_path).glob("state*"))


@pytest.mark.ksm
@pytest.mark.root
def test_real_memory(ksm: KsmControl, target: Target) -> None:
    with Target(user=65534) as other:
        ksm.alone()
        for process, equal in ((target, 300), (other, 200)):
            process.do("map", name="a", pages=400)
            process.do("put", name="a", at=0, what=["x"] * equal + ["unique"] * (400 - equal))
            process.do("advise", name="a", what="mergeable")
        counters = ksm.converge()
        ksm.alone([target.pid, other.pid])
        status = collect(0)
        assert status.counters == counters
        assert status.sample is None
        assert status.stale
        assert counters.pages_shared == 2
        assert status.freed_bytes == 498 * PAGE
        assert status.rmap_items_bytes == 800 * 64
        assert status.saved_bytes == counters.general_profit - 3 * 64
        # A merged page counts in each process, the frame kept included.
        assert status.process_profit == counters.general_profit + counters.pages_shared * PAGE
        by_user = {g.name: g for g in groups(status.uses.found, "user")}
        assert by_user["root"].ksm_merging_pages == 300
        assert by_user["nobody"].ksm_merging_pages == 200
        assert by_user["nobody"].ksm_rmap_items == 400


@pytest.mark.ksm
@pytest.mark.root
def test_writes_to_merged_pages_are_seen(ksm: KsmControl, target: Target) -> None:
    """320 merged pages are written to while we watch; ksmd rests."""
    target.do("map", name="a", pages=500)
    target.do("fill", name="a", at=0, count=500, what="x")
    target.do("advise", name="a", what="mergeable")
    assert ksm.converge().pages_sharing == 498  # and two frames kept
    left = [320]

    def write(_phase: str, _done: int, _total: int) -> None:
        if left:
            target.do("put", name="a", at=0, what=["unique"] * left.pop())

    sample = collect(0.3, progress=write).sample
    assert sample is not None
    assert sample.cow_ksm == 320
    assert sample.full_scans == sample.pages_scanned == 0
    assert sample.ksmd_cpu_seconds is not None
    assert sample.ksmd_cpu_seconds < 0.01
    again = collect(0.05).sample
    assert again is not None
    assert again.cow_ksm == 0


@pytest.mark.ksm
@pytest.mark.root
def test_ksmd_at_work(ksm: KsmControl, target: Target) -> None:
    target.do("map", name="a", pages=3000)
    target.do("put", name="a", at=0, what=["unique"] * 3000)
    target.do("advise", name="a", what="mergeable")
    ksm.converge(stop=False)
    ksm.set(pages_to_scan=1000, sleep_millisecs=20)
    status = collect(0.7)
    assert status.running
    assert not status.stale
    sample = status.sample
    assert sample is not None
    assert sample.ksmd_cores is not None
    assert 0 < sample.ksmd_cores < 1
    assert sample.pages_scanned > 3000
    # Three batches of 1,000, each with its sleep.
    assert status.full_scan_seconds is not None
    assert 0.06 < status.full_scan_seconds < 0.6
    by_pace = replace(status, sample=replace(sample, full_scans=0)).full_scan_seconds
    assert by_pace is not None
    assert math.isclose(by_pace, status.full_scan_seconds, rel_tol=0.5)
    began = time.monotonic()
    collect(0)
    assert time.monotonic() - began < 5
