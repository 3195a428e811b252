"""The price against a slow simulator of ksmd's visits, batches and sleeps."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace

import pytest

from dedup import grouping
from dedup.model import cost
from dedup.model.cost import (
    Calibration,
    Costs,
    Load,
    Machine,
    Measured,
    Settings,
    fit,
    last_merge,
    price,
)
from tests.model.layouts import UNIQUE, Layout

TICK = 0.004
COSTS = Costs(
    first_ns=1100, tree_ns=2500, tree_log2_ns=430, stable_log2_ns=120, merged_ns=230,
    merged_node_ns=50, node_ns=2800, join_ns=1500, zero_ns=2200, skip_ns=250, batch_ns=30_000,
    cold_ns=9000,
)  # fmt: skip
HERE = Machine("6.18", "a processor", TICK)
CALIBRATION = Calibration(COSTS, HERE, taken="2026-01-01T00:00:00+00:00", spread=0.04)


@dataclass
class Scan:
    """A simulated full scan."""

    cpu_ns: float
    seconds: float
    last_merge_cpu_ns: float = 0.0
    last_merge_seconds: float = 0.0


class Ksmd:
    """Page by page: contents are numbers, 0 is the zero page, below 0 changes all the time."""

    def __init__(self, pages: list[int], settings: Settings, costs: Costs = COSTS) -> None:
        self.pages, self.settings, self.costs = pages, settings, costs
        self.seen: set[int] = set()
        self.merged: dict[int, int] = {}
        self.on_node: set[int] = set()
        self.gone: set[int] = set()

    def scan(self) -> Scan:
        """One full scan: a batch after the other, on a clock of ticks."""
        result = Scan(0.0, 0.0)
        unstable: dict[int, int] = {}
        entered: set[int] = set()
        pages = [i for i in range(len(self.pages)) if i not in self.gone]
        at = 0
        while True:
            batch = pages[at : at + self.settings.pages_to_scan]
            ns, searches = 0.0, 0
            merge_at = -1.0
            for i in batch:
                visit, searched, merges = self.visit(i, unstable, entered)
                ns += visit
                searches += searched
                if merges:
                    merge_at = ns
            overhead = self.costs.batch_ns + self.costs.cold_ns * math.sqrt(searches)
            if merge_at >= 0:
                result.last_merge_cpu_ns = result.cpu_ns + merge_at + overhead
                result.last_merge_seconds = result.seconds + (merge_at + overhead) / 1e9
            result.cpu_ns += ns + overhead
            result.seconds += self.with_sleep((ns + overhead) / 1e9)
            at += len(batch)
            if len(batch) < self.settings.pages_to_scan:
                return result

    def with_sleep(self, seconds: float) -> float:
        tick = self.settings.tick_seconds
        sleep = math.ceil(self.settings.sleep_millisecs / 1000 / tick)
        return (math.floor(seconds / tick) + sleep + 1) * tick

    def visit(self, i: int, unstable: dict[int, int], entered: set[int]) -> tuple[float, int, bool]:
        """CPU, whether it searches or merges, and whether it merges."""
        c, content = self.costs, self.pages[i]
        if i not in self.seen:
            self.seen.add(i)
            return c.first_ns, 0, False
        if i in self.on_node:
            first = content not in entered
            entered.add(content)
            return c.merged_ns + c.merged_node_ns * first, 0, False
        if content < 0:
            return c.first_ns, 0, False
        if content == 0:
            self.gone.add(i)
            return c.zero_ns, 1, True
        stable = c.stable_log2_ns * math.log2(max(1, len(self.merged)))
        if content in self.merged:
            self.on_node.add(i)
            return c.first_ns + stable + c.join_ns, 1, True
        # A single visit costs more than the mean of a tree that grew from nothing.
        tree = c.tree_ns + c.tree_log2_ns * (
            math.log2(max(1, len(unstable))) + 1 / math.log(2) - math.log2(cost.TREE_PAGES)
        )
        ns = max(tree, c.first_ns) + stable
        if content in unstable:
            self.on_node |= {i, unstable.pop(content)}
            self.merged[content] = 1
            return ns + c.node_ns, 1, True
        unstable[content] = i
        return ns, 1, False


def mixed(unique: int, contents: int, copies: int, zero: int = 0, changing: int = 0) -> list[int]:
    pages = [*range(1, unique + 1), *([0] * zero), *([-1] * changing)]
    pages += [unique + 1 + c for c in range(contents) for _ in range(copies)]
    random.Random(3).shuffle(pages)
    return pages


LOADS = {
    "unique": (6000, 0, 0, 0, 0),
    "pairs": (0, 3000, 2, 0, 0),
    "copies": (0, 100, 60, 0, 0),
    "mixed": (3000, 800, 5, 0, 0),
    "zero": (2000, 500, 3, 3000, 0),
    "changing": (2000, 500, 3, 0, 3000),
}
SETTINGS = [(100, 20), (1000, 20), (2000, 10), (100_000, 4), (333, 1)]


def load_of(unique: int, contents: int, copies: int, zero: int, changing: int) -> Load:
    return Load(contents, contents * max(0, copies - 1), unique, changing, zero)


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_as_the_simulator_has_it(name: str, setting: tuple[int, int]) -> None:
    settings = Settings(*setting, TICK)
    ksmd = Ksmd(mixed(*LOADS[name]), settings)
    load = load_of(*LOADS[name])
    found = price(load, settings, CALIBRATION)
    first, second = ksmd.scan(), ksmd.scan()
    ksmd.scan()  # zero pages leave
    steady = ksmd.scan()
    merges = load.pages_sharing + load.ksm_zero_pages > 0
    cpu = first.cpu_ns + (second.last_merge_cpu_ns if merges else second.cpu_ns)
    assert found.cpu_seconds == pytest.approx(cpu / 1e9, rel=0.03)
    assert found.first_pass_cpu_seconds == pytest.approx(first.cpu_ns / 1e9, rel=0.01)
    assert found.full_scan_cpu_seconds == pytest.approx(steady.cpu_ns / 1e9, rel=0.03)
    # A batch or two may end on the other side of a tick.
    assert found.full_scan_seconds == pytest.approx(steady.seconds, rel=0.05, abs=TICK)
    if merges:
        seconds = first.seconds + second.last_merge_seconds
        assert found.converge_seconds == pytest.approx(seconds, rel=0.06, abs=TICK)
    for field, (low, high) in found.bounds.items():
        assert low <= getattr(found, field) <= high, field


def test_merges_that_end_early() -> None:
    """All copies lie in the first half of the scan."""
    pages = [c for _ in range(2) for c in range(1, 2001)] + list(range(5001, 9001))
    settings = Settings(100, 20, TICK)
    ksmd = Ksmd(pages, settings)
    first, second = ksmd.scan(), ksmd.scan()
    found = price(Load(2000, 2000, 4000, last_merge=0.5), settings, CALIBRATION)
    seconds = first.seconds + second.last_merge_seconds
    assert found.converge_seconds == pytest.approx(seconds, rel=0.02)
    assert found.cpu_seconds == pytest.approx(
        (first.cpu_ns + second.last_merge_cpu_ns) / 1e9, rel=0.03
    )
    whole = price(Load(2000, 2000, 4000), settings, CALIBRATION)
    assert whole.converge_seconds > 1.3 * found.converge_seconds


@pytest.mark.parametrize(
    ("pages", "to_scan", "sleep", "tick", "seconds"),
    [
        (8000, 100, 20, 0.004, 81 * 6 * 0.004),
        (8050, 100, 20, 0.004, 81 * 6 * 0.004),
        (99, 100, 20, 0.004, 6 * 0.004),
        (8000, 100, 1, 0.004, 81 * 2 * 0.004),
        (8000, 100, 4, 0.004, 81 * 2 * 0.004),
        (8000, 100, 5, 0.004, 81 * 3 * 0.004),
        (8000, 100, 20, 0.001, 81 * 21 * 0.001),
        (8000, 100, 0, 0.004, 0.0),
        # The wheel is eight times coarser from 63 ticks on: 250 ticks end 1 to 8 later.
        (0, 100, 1000, 0.004, 254.5 * 0.004),
    ],
)
def test_sleeps_alone_without_a_calibration(
    pages: int, to_scan: int, sleep: int, tick: float, seconds: float
) -> None:
    found = price(Load(0, 0, pages), Settings(to_scan, sleep, tick), None)
    assert not found.calibrated
    assert found.full_scan_seconds == pytest.approx(seconds)
    assert found.cpu_seconds is None
    assert found.steady_cores is None
    assert set(found.bounds) == {"metadata_bytes"}


def test_two_scans_or_three() -> None:
    settings = Settings(100, 20, TICK)
    plain = price(Load(512, 512, 0), settings, CALIBRATION)
    huge = price(Load(512, 512, 0, pair_in_huge_page=True), settings, CALIBRATION)
    assert (plain.full_scans, huge.full_scans) == (2, 3)
    one = 11 * 6 * TICK
    assert huge.converge_seconds - plain.converge_seconds == pytest.approx(one, rel=0.05)


def ages(scans: int) -> list[bool]:
    """Whether a page that never merges is visited, scan by scan (should_skip_rmap_item)."""
    age = remaining = 0
    visited = []
    for _ in range(scans):
        before, age = age, min(255, age + 1)
        if before >= 3 and remaining:
            remaining -= 1
            visited.append(False)
            continue
        if before >= 3:
            remaining = 1 if before <= 3 else 2 if before <= 5 else 4 if before <= 8 else 8
        visited.append(True)
    return visited


def test_smart_scan_visits_one_in_nine_and_merges_as_without() -> None:
    visited = ages(400)
    assert [i + 1 for i, v in enumerate(visited) if v][:8] == [1, 2, 3, 4, 6, 9, 14, 23]
    assert sum(visited[-9 * 20 :]) == 20
    plain, smart = (
        price(Load(1000, 1000, 8000), Settings(100, 20, TICK, smart_scan=on), CALIBRATION)
        for on in (False, True)
    )
    assert smart.converge_seconds == plain.converge_seconds
    assert smart.cpu_seconds == plain.cpu_seconds
    # Skipped pages count in no batch: 2000 merged ones remain.
    short, long = 21 * 6 * TICK, 101 * 6 * TICK
    assert smart.full_scan_seconds == pytest.approx((long + 8 * short) / 9, rel=0.02)
    assert smart.full_scan_cpu_seconds is not None
    assert plain.full_scan_cpu_seconds is not None
    skipping = 8000 * COSTS.skip_ns + 2000 * COSTS.merged_ns + 1000 * COSTS.merged_node_ns
    skipping += 21 * COSTS.batch_ns
    mean = (plain.full_scan_cpu_seconds + 8 * skipping / 1e9) / 9
    assert smart.full_scan_cpu_seconds == pytest.approx(mean, rel=0.01)
    low, high = smart.bounds["full_scan_seconds"]
    assert low < short * 1.01
    assert high > long * 0.99


def test_steady_cores_are_cpu_by_time_and_never_more_than_one() -> None:
    found = price(Load(0, 0, 50_000), Settings(1000, 20, TICK), CALIBRATION)
    assert found.full_scan_cpu_seconds is not None
    assert found.steady_cores == pytest.approx(
        found.full_scan_cpu_seconds / found.full_scan_seconds
    )
    busy = price(Load(0, 0, 50_000), Settings(1000, 0, TICK), CALIBRATION)
    assert busy.steady_cores == 1.0
    assert busy.full_scan_seconds == busy.full_scan_cpu_seconds
    assert busy.bounds["steady_cores"][1] == 1.0


def test_nothing_to_do() -> None:
    found = price(Load(0, 0, 0), Settings(100, 20, TICK), CALIBRATION)
    assert found.metadata_bytes == 0
    assert found.cpu_seconds == pytest.approx(2 * COSTS.batch_ns / 1e9)
    assert math.isfinite(found.converge_seconds)


def test_a_huge_host_is_priced_at_once() -> None:
    found = price(Load(10**6, 10**7, 10**9), Settings(100, 20, TICK), CALIBRATION)
    assert found.full_scan_seconds == pytest.approx(1.011e9 / 100 * 6 * TICK, rel=0.01)


def test_memory() -> None:
    found = price(Load(10, 90, 100, 50, ksm_zero_pages=7), Settings(100, 20, TICK), None)
    assert found.metadata_bytes == 250 * 64 + 10 * 64
    assert found.bounds["metadata_bytes"][1] == 250 * 64 + 20 * 64 + 7 * 64


def test_pages_that_fork_shares_are_searched_for() -> None:
    settings = Settings(1000, 20, TICK)
    changing = price(Load(0, 0, 1000, 9000), settings, CALIBRATION)
    forked = price(Load(0, 0, 1000, 9000, fork_shared=9000), settings, CALIBRATION)
    assert forked.cpu_seconds is not None
    assert changing.cpu_seconds is not None
    assert forked.cpu_seconds > 1.3 * changing.cpu_seconds


def test_an_observed_mean_gives_wider_ranges() -> None:
    settings = Settings(1000, 20, TICK)
    load = Load(500, 1500, 8000)
    watched = replace(CALIBRATION, observed=True)
    narrow, wide = price(load, settings, CALIBRATION), price(load, settings, watched)
    for field in ("cpu_seconds", "steady_cores"):
        assert wide.bounds[field][0] < narrow.bounds[field][0], field
        assert wide.bounds[field][1] > narrow.bounds[field][1], field
    noisy = price(load, settings, replace(CALIBRATION, spread=0.2))
    assert noisy.bounds["cpu_seconds"][1] > narrow.bounds["cpu_seconds"][1]


def test_a_busy_host_may_take_longer_for_the_same_cpu() -> None:
    busy = replace(CALIBRATION, waiting=0.5)
    load = Load(500, 1500, 38_000)
    for setting in ((20_000, 0), (5000, 10)):
        settings = Settings(*setting, TICK)
        quiet, found = price(load, settings, CALIBRATION), price(load, settings, busy)
        assert replace(found, bounds={}) == replace(quiet, bounds={})
        assert found.bounds["cpu_seconds"] == quiet.bounds["cpu_seconds"]
        (low, high), before = found.bounds["converge_seconds"], quiet.bounds["converge_seconds"]
        assert low == before[0]
        # All that it waits is added, but for what the sleeps' whole ticks take up.
        more = (high - before[1]) / (1 + cost.TIME_RANGE)
        assert more == pytest.approx(0.5 * found.bounds["cpu_seconds"][1], rel=0.05)


def test_settings_of_the_tunables() -> None:
    tunables: dict[str, int | str] = {"pages_to_scan": 300, "sleep_millisecs": 7, "smart_scan": 1}
    assert Settings.of(tunables, TICK) == Settings(300, 7, TICK, smart_scan=True)
    assert Settings.of({}, TICK) == Settings(100, 20, TICK)


def simulated(pages: list[int], name: str = "", *, batched: bool = False) -> Measured:
    whole = Settings(10**9, 20, TICK)
    ksmd = Ksmd(pages, whole, replace(COSTS, batch_ns=0, cold_ns=0))
    first, second = ksmd.scan().cpu_ns, ksmd.scan().cpu_ns
    steady = ksmd.scan().cpu_ns
    small = Ksmd(pages, Settings(100, 1, TICK))
    small.seen, small.merged, small.on_node = ksmd.seen, ksmd.merged, ksmd.on_node
    return Measured(
        name, len(pages), first, second, steady, small.scan().cpu_ns if batched else 0.0,
        100 if batched else 0, COSTS.skip_ns * len(pages),
    )  # fmt: skip


def test_the_fit_finds_the_costs() -> None:
    unique = [simulated(list(range(1, n + 1)), batched=n == 2000) for n in (2000, 6000, 20_000)]
    contents = list(range(1, 201))
    copies = simulated(contents * cost.COPIES, batched=True)
    of_pairs = list(range(1, 4001))
    pairs = simulated(of_pairs * 2)
    beside = simulated(of_pairs * 2 + list(range(5001, 9001)))
    # Unique pages come when all pairs are merged.
    beside = beside._replace(
        steady_ns=pairs.steady_ns
        + 4000 * (2500 + 430 * (math.log2(4000) - 10) + 120 * math.log2(4000))
    )
    zero = simulated([0] * 2000)
    found = fit(unique, copies, pairs, beside, zero)
    for field, wanted in (
        ("first_ns", 0.01), ("tree_ns", 0.01), ("tree_log2_ns", 0.02), ("stable_log2_ns", 0.05),
        ("merged_ns", 0.01), ("merged_node_ns", 0.05), ("node_ns", 0.1), ("join_ns", 0.1),
        ("zero_ns", 0.01), ("skip_ns", 0.01), ("batch_ns", 0.05), ("cold_ns", 0.05),
    ):  # fmt: skip
        assert getattr(found, field) == pytest.approx(getattr(COSTS, field), rel=wanted), field


def test_stored_and_read_again() -> None:
    kept = replace(CALIBRATION, measured=(Measured("2000 unique", 2000, 1.0, 2.0, 3.0),))
    assert Calibration.from_json(json.loads(json.dumps(kept.to_json()))) == kept


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"costs": {}},
        {"costs": {**CALIBRATION.to_json()["costs"], "first_ns": -1}},
        {"costs": {**CALIBRATION.to_json()["costs"], "first_ns": math.inf}},
        {"costs": None},
        {"machine": {"kernel": "6"}},
        {"measured": [{"name": "x"}]},
        {"spread": "much"},
        {"waiting": -1},
    ],
)
def test_what_is_no_calibration(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"field|version|out of range|convert"):
        Calibration.from_json({**CALIBRATION.to_json(), **change})
    with pytest.raises(ValueError, match="field"):
        Calibration.from_json({})


def test_the_last_page_that_merges() -> None:
    layout = Layout()
    p = layout.process()
    for content in (1, 2, 1, 2, UNIQUE, UNIQUE, UNIQUE, UNIQUE):
        layout.page(p, content)
    pages = layout.pages()
    assert last_merge(pages, grouping.group(pages)) == 0.5
    layout = Layout()
    p, q = layout.process(), layout.process()
    for content in (1, UNIQUE, UNIQUE, UNIQUE):
        layout.page(p, content)
        layout.page(q, content)
    pages = layout.pages()
    assert last_merge(pages, grouping.group(pages)) == 5 / 8
    layout = Layout()
    layout.page(layout.process(), UNIQUE)
    pages = layout.pages()
    assert last_merge(pages, grouping.group(pages)) == 1.0
