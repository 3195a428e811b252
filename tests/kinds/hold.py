"""Predict, merge, count: for memory of every kind."""

from __future__ import annotations

import time
from dataclasses import dataclass

from dedup.kernel import maps
from dedup.kernel.pagemap import sight
from dedup.kernel.processes import Handle
from dedup.model.prediction import Prediction
from dedup.scanning import Plan, scan_pids
from dedup.sources.live import Options
from tests.kernel_fixtures import PAGE, KsmControl, kpageflags, pagemap, process_numbers

GLOBAL = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "ksm_zero_pages",
    "stable_node_chains",
    "stable_node_dups",
    "general_profit",
)
PER_PROCESS = ("ksm_rmap_items", "ksm_zero_pages", "ksm_merging_pages", "ksm_process_profit")
FRAME_BITS = (1 << 55) - 1
KPF_THP = 22
STILL_SCANS, MOST_SCANS = 3, 60


@dataclass
class Held:
    """A prediction and what became of it."""

    prediction: Prediction
    counted: dict[str, int]
    """By the names of the prediction; of process i with `[i]` after it."""

    def predicted(self, name: str) -> int | None:
        """The figure predicted."""
        if not name.endswith("]"):
            value: int | None = getattr(self.prediction, name)
            return value
        base, _, rest = name.partition("[")
        found: int | None = getattr(self.prediction.processes[int(rest[:-1])], base)
        return found

    def bounds(self, name: str) -> tuple[int, int]:
        """The range predicted, of a number too."""
        value = self.predicted(name)
        if value is not None:
            return value, value
        base, _, rest = name.partition("[")
        of = self.prediction.processes[int(rest[:-1])] if rest else self.prediction
        return of.bounds[base]

    def require_equal(self) -> None:
        """Every figure is one number, and the kernel's."""
        assert {name: self.predicted(name) for name in self.counted} == self.counted

    def require_inside(self) -> None:
        """Every figure of the kernel is within the range predicted."""
        ranges = {name: self.bounds(name) for name in self.counted}
        outside = {
            name: (value, ranges[name])
            for name, value in self.counted.items()
            if not ranges[name][0] <= value <= ranges[name][1]
        }
        assert not outside


def mergeable_frames(pids: list[int]) -> tuple[set[int], int]:
    """Frames of present anonymous pages in mergeable mappings; how many are in huge pages."""
    found: set[int] = set()
    for pid in pids:
        with Handle(pid) as handle:
            ranges = [(m.start, m.end) for m in maps.read(handle) if "mg" in m.vm_flags]
        for start, end in ranges:
            words = pagemap(pid, start, (end - start) // PAGE)
            found |= {w & FRAME_BITS for w in words if w >> 63 and not w >> 61 & 1}
    found -= {sight().zero_frame}
    huge = sum(f >> KPF_THP & 1 for f in kpageflags(sorted(found)))
    return found, huge


def counters(ksm: KsmControl, pids: list[int]) -> dict[str, int]:
    """What the kernel counts now."""
    found = {name: int(getattr(ksm.ksm.counters(), name)) for name in GLOBAL}
    for i, pid in enumerate(pids):
        stat = process_numbers(pid, "ksm_stat")
        found |= {f"{name}[{i}]": stat[name] for name in PER_PROCESS}
    return found


def converge(ksm: KsmControl, pids: list[int]) -> dict[str, int]:
    """Scan after scan until nothing changes."""
    last: dict[str, int] = {}
    still = 0
    ksm.start()
    try:
        for _ in range(MOST_SCANS):
            ksm.step()
            now = counters(ksm, pids)
            still = still + 1 if now == last else 0
            if still == STILL_SCANS:
                return now
            last = now
    finally:
        ksm.stop()
    raise AssertionError(f"ksmd does not come to rest: {last}")


def hold(ksm: KsmControl, pids: list[int]) -> Held:
    """Predict and merge; `pids` in the order in which their memory became mergeable."""
    ksm.alone(pids)
    scan = scan_pids(
        pids, Plan(options=Options(scope="advised"), interval_seconds=0.01, order_known=True)
    )
    before, huge_before = mergeable_frames(pids)
    counted = converge(ksm, pids)
    after, huge_after = mergeable_frames(pids)
    counted["frames_freed"] = len(before) - len(after)
    counted["thp_split"] = (huge_before - huge_after) * PAGE // (sight().huge_bytes or PAGE)
    return Held(scan.prediction, counted)


def wait_until(what: str, seconds: float, done: object) -> None:
    """Wait for a state of the kernel that it comes to by itself."""
    assert callable(done)
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
