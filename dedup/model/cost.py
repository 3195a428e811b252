"""The price of KSM: ksmd's CPU, seconds until it has converged, memory.

Costs of a visit are measured on the host (`dedup.observe.calibrate`), never constants of another
machine; this module knows only which visits there are and how ksmd sleeps between them.

Sources: mm/ksm.c (ksm_scan_thread, ksm_do_scan, scan_get_next_rmap_item, cmp_and_merge_page,
should_skip_rmap_item), kernel/time/timer.c (calc_index: a timer never fires early).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np

from dedup.model import smart
from dedup.model.copies import CHUNK_PAGES
from dedup.model.prediction import RMAP_ITEM_BYTES, STABLE_NODE_BYTES
from dedup.pages import Flag

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from dedup.model.prediction import Prediction
    from dedup.pages import Groups, Pages

    F64 = NDArray[np.float64]

VERSION: Final = 1
"""Of the stored form of a calibration."""

MERGE_SCANS: Final = 2
"""Full scans that merge: the first takes the checksums, the second compares (mm/ksm.c)."""

SMART_SCAN_CYCLE: Final = 9
"""With smart scan an old page that does not merge is visited in one of so many scans."""

CPU_RANGE: Final = 0.25
"""Of ksmd's CPU on both sides, where the calibration's own spread is less."""
OBSERVED_RANGE: Final = 0.5
OBSERVED_MERGES: Final = 3.0
"""Merging costs up to so many times the visits of a converged ksmd, which alone were observed."""
TIME_RANGE: Final = 0.15
"""Of times on both sides, for late wake-ups, besides what the CPU's range does to them."""

COST_MOST_NS: Final = 1e9
"""No visit takes a second."""

TREE_PAGES: Final = 1024
"""Unique pages in a scan for which `Costs.tree_ns` stands."""
_TREE_LOG2: Final = 10

_SLICES: Final = 128
_EDGES: Final = np.linspace(0.0, 1.0, _SLICES + 1)
_BATCHES: Final = 4096
_FLOOR_SPREAD: Final = 0.2
_WHEEL_LEVEL: Final = 63
_WHEEL_SHIFT: Final = 3
_NS: Final = 1e-9
# The mean of log2 over 1..n is log2(n) less this.
_MEAN_LOG2: Final = 1 / math.log(2)


@dataclass(frozen=True, slots=True)
class Costs:
    """What ksmd's visits cost, in ns of CPU."""

    first_ns: float
    """First visit of a page: find it, make its rmap_item, take the checksum."""
    tree_ns: float
    """Later visit of a page that does not merge: the mean of a scan that finds `TREE_PAGES`."""
    tree_log2_ns: float
    """What each doubling of their number adds to that mean."""
    stable_log2_ns: float
    """What each doubling of the stable nodes adds to every search."""
    merged_ns: float
    """Visit of a merged mapping."""
    merged_node_ns: float
    """Once for each stable node, besides: its memory comes into the cache."""
    node_ns: float
    """First merge of two pages, besides both visits."""
    join_ns: float
    """A page that joins a stable node, besides its visit."""
    zero_ns: float
    """A page that the shared zero page replaces, its visit included."""
    skip_ns: float
    """A page that smart scan skips."""
    batch_ns: float
    """A batch: ksmd wakes up."""
    cold_ns: float
    """Times the root of the searches and merges in a batch: what they need has left the cache."""


class Measured(NamedTuple):
    """Full scans of one set of pages, in ns of CPU for all of it."""

    name: str
    pages: int
    first_ns: float
    second_ns: float
    steady_ns: float
    """A later scan, everything in one batch."""
    batched_ns: float = 0.0
    """The same in small batches; 0 where that was not measured."""
    batch_pages: int = 0
    skipped_ns: float = 0.0
    """A scan in which smart scan skips everything; 0 where that was not measured."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a calibration holds for."""

    kernel: str
    cpu: str
    tick_seconds: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """The costs of this host.

    Parameters
    ----------
    costs : Costs
    machine : Machine
    taken : str
        Time, ISO 8601.
    spread : float
        By which repeated scans differed, of their median.
    waiting : float
        Time in which ksmd had work but no processor, by its CPU time: how busy the host was.
    observed : bool
        From ksmd's own scans of others' memory: one mean for every visit.
    measured : tuple of Measured
        What the costs were fitted to.
    """

    costs: Costs
    machine: Machine
    taken: str = ""
    spread: float = 0.0
    waiting: float = 0.0
    observed: bool = False
    measured: tuple[Measured, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return {
            "version": VERSION,
            "taken": self.taken,
            "machine": asdict(self.machine),
            "observed": self.observed,
            "spread": self.spread,
            "waiting": self.waiting,
            "costs": asdict(self.costs),
            "measured": [m._asdict() for m in self.measured],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Of its stored form.

        Raises
        ------
        ValueError
            It is none, or of another version of ours.
        """
        try:
            if data["version"] != VERSION:
                raise ValueError(f"it is of version {data['version']}, not {VERSION}")
            costs = Costs(**{f.name: float(data["costs"][f.name]) for f in fields(Costs)})
            numbers = [*asdict(costs).values(), float(data["spread"]), float(data["waiting"])]
            if not all(0 <= v < COST_MOST_NS for v in numbers):
                raise ValueError("a figure is out of range")
            machine = data["machine"]
            return cls(
                costs=costs,
                machine=Machine(
                    str(machine["kernel"]), str(machine["cpu"]), float(machine["tick_seconds"])
                ),
                taken=str(data["taken"]),
                spread=float(data["spread"]),
                waiting=float(data["waiting"]),
                observed=bool(data["observed"]),
                measured=tuple(Measured(**m) for m in data["measured"]),
            )
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"a field is missing or of another kind: {e}") from e


@dataclass(frozen=True, slots=True)
class Load:
    """What ksmd has to merge and then to follow, from scratch: the counters it will end with.

    Pages; the names are the kernel's.

    Parameters
    ----------
    pages_shared, pages_sharing, pages_unshared : int
    pages_volatile : int
        Those that change between visits, and those of `fork_shared`.
    ksm_zero_pages : int
        Placed by `use_zero_pages`.
    fork_shared : int
        Mappings, among the volatile ones, of frames that fork shares: searched for at each visit.
    last_merge : float
        Which part of a full scan is over at the last page that merges, 0 to 1; see `last_merge`.
    pair_in_huge_page : bool
        Two equal pages lie in one huge page, and nothing else splits it: a third scan merges them.
    """

    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    pages_volatile: int = 0
    ksm_zero_pages: int = 0
    fork_shared: int = 0
    last_merge: float = 1.0
    pair_in_huge_page: bool = False

    @property
    def rmap_items(self) -> int:
        """Pages that ksmd follows once it has converged."""
        return self.pages_shared + self.pages_sharing + self.pages_unshared + self.pages_volatile

    @property
    def candidates(self) -> int:
        """Pages that ksmd visits until then: the zero pages, too."""
        return self.rmap_items + self.ksm_zero_pages


@dataclass(frozen=True, slots=True)
class Settings:
    """Tunables, and the tick by which the kernel rounds sleeps."""

    pages_to_scan: int
    sleep_millisecs: int
    tick_seconds: float
    smart_scan: bool = False

    @classmethod
    def of(cls, tunables: Mapping[str, int | str], tick_seconds: float) -> Self:
        """Of `Ksm.tunables()`; defaults of the kernel where one is missing.

        The advisor's `pages_to_scan` is taken as it stands.
        """
        return cls(
            pages_to_scan=int(tunables.get("pages_to_scan", 100)),
            sleep_millisecs=int(tunables.get("sleep_millisecs", 20)),
            tick_seconds=tick_seconds,
            smart_scan=bool(int(tunables.get("smart_scan", 0))),
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """The price.

    "Until converged" runs from the moment at which ksmd starts (`run=1`) at the head of its list,
    all memory registered (madvise, prctl) and nothing of it merged yet, until `pages_sharing`,
    `pages_shared` and `ksm_zero_pages` have their final values. That is in the second full scan
    (the third, if two equal pages lie in one huge page), at its end unless `Load.last_merge` says
    otherwise. Where others use KSM already, a scan under way comes on top: up to one full scan.

    CPU is None without a calibration, and times are then those of the sleeps alone: at the least.
    Times are those of free processors; ksmd has nice 5. How it had to wait for one during the
    calibration is in their upper bounds.
    """

    calibrated: bool
    full_scans: int
    """Until converged."""
    converge_seconds: float
    cpu_seconds: float | None
    """ksmd's CPU until converged: both passes."""
    first_pass_cpu_seconds: float | None
    merge_pass_cpu_seconds: float | None
    full_scan_seconds: float
    """Of a full scan later on; with smart scan the mean of its cycle."""
    full_scan_cpu_seconds: float | None
    steady_cores: float | None
    """ksmd's share of a core later on."""
    metadata_bytes: int
    """rmap_items and stable nodes, once converged."""
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Lowest and highest of each figure that has a range; none without a calibration but for
    `metadata_bytes`."""


# -- the scans -------------------------------------------------------------------------------------


class _Scan:
    """CPU of one full scan as a function of how much of it is over."""

    def __init__(self, pages: int, cost_ns: F64, searches: float) -> None:
        """Of the costs of equal slices, and the share of visits that search or merge."""
        self.pages = pages
        self.searches = searches
        self.ns = np.concatenate(([0.0], np.cumsum(cost_ns)))

    def until(self, part: F64 | float) -> F64:
        """Sum of the visits' CPU in ns, up to these parts of the scan."""
        return np.asarray(np.interp(part, _EDGES, self.ns), dtype=np.float64)


class Way(NamedTuple):
    """CPU and time of a full scan, or of a part of it."""

    cpu_seconds: float
    seconds: float
    """With the sleep after each batch."""
    awake_seconds: float
    """Without the last one."""


def _middles() -> F64:
    return (np.arange(_SLICES) + 0.5) / _SLICES


def _log2(n: F64 | float) -> F64:
    return np.asarray(np.log2(np.maximum(n, 1.0)), dtype=np.float64)


class _Model:
    def __init__(
        self, load: Load, settings: Settings, costs: Costs | None, factor: float, waiting: float
    ) -> None:
        self.load, self.settings, self.costs = load, settings, costs
        self.factor, self.waiting = factor, waiting
        self._sleep: float | None = None
        """Of a batch that takes no time."""

    def _visit(self, unstable: F64, stable: F64 | float) -> F64:
        """A search in both trees, found nothing."""
        c = self.costs
        assert c is not None
        tree = c.tree_ns + c.tree_log2_ns * (_log2(unstable) + _MEAN_LOG2 - _TREE_LOG2)
        return np.asarray(np.maximum(tree, c.first_ns) + c.stable_log2_ns * _log2(stable))

    def first(self) -> _Scan:
        """The first full scan: checksums."""
        n = self.load.candidates
        cost = self.costs.first_ns * n / _SLICES if self.costs else 0.0
        return _Scan(n, np.full(_SLICES, cost), 0.0)

    def merging(self, part: float) -> _Scan:
        """The second, up to the part in which its last merge is: all that merges lies before.

        Contents are taken as mixed evenly there. Of r copies of a content, a share r x (1-x)^(r-1)
        has come by once when the part x is over, so that one copy waits in the unstable tree.
        """
        load, c = self.load, self.costs
        nodes = load.pages_shared
        merging = nodes + load.pages_sharing + load.ksm_zero_pages
        others = load.candidates - merging
        n = max(round(part * load.candidates), merging)
        if c is None or not n:
            return _Scan(n, np.zeros(_SLICES), 0.0)
        before = (n - merging) / others if others else 0.0
        changing = before * (load.pages_volatile - load.fork_shared)
        unique = before * load.pages_unshared
        x = _middles()
        joins = max(0, load.pages_sharing - nodes)
        copies = max(2.0, (nodes + load.pages_sharing) / nodes) if nodes else 2.0
        waiting = copies * x * (1 - x) ** (copies - 1)
        merged = np.maximum(0.0, 1 - (1 - x) ** copies - waiting)
        search = self._visit(unique * x + nodes * waiting, nodes * merged)
        cost = (unique + before * load.fork_shared) / _SLICES * search
        cost += changing / _SLICES * c.first_ns
        cost += load.ksm_zero_pages / _SLICES * c.zero_ns
        if nodes:
            cost += nodes * _share((1 - x) ** (copies - 1)) * search
            cost += nodes * _share(x * (1 - x) ** (copies - 2)) * (search + c.node_ns)
            join = c.first_ns + c.stable_log2_ns * _log2(nodes * merged) + c.join_ns
            cost += joins * _share(1 - (1 - x) ** (copies - 1)) * join
        return _Scan(n, cost, 1 - changing / n)

    def steady(self) -> _Scan:
        """Any later one, nothing skipped."""
        load, c = self.load, self.costs
        n = load.rmap_items
        if c is None or not n:
            return _Scan(n, np.zeros(_SLICES), 0.0)
        x = _middles()
        searched = load.pages_unshared + load.fork_shared
        cost = searched / _SLICES * self._visit(load.pages_unshared * x, load.pages_shared)
        return _Scan(n, cost + self._followed() / _SLICES, searched / n)

    def skipping(self) -> _Scan:
        """Any later one in which smart scan skips what did not merge; skips count in no batch."""
        load, c = self.load, self.costs
        merged = load.pages_shared + load.pages_sharing
        if c is None:
            return _Scan(merged, np.zeros(_SLICES), 0.0)
        skips = (load.pages_unshared + load.pages_volatile) * c.skip_ns
        merged_ns = merged * c.merged_ns + load.pages_shared * c.merged_node_ns
        return _Scan(merged, np.full(_SLICES, (skips + merged_ns) / _SLICES), 0.0)

    def _followed(self) -> float:
        """Visits of merged and of volatile pages."""
        load, c = self.load, self.costs
        assert c is not None
        merged = load.pages_shared + load.pages_sharing
        changing = max(0, load.pages_volatile - load.fork_shared)
        return merged * c.merged_ns + load.pages_shared * c.merged_node_ns + changing * c.first_ns

    def way(self, scan: _Scan, part: float = 1.0) -> Way:
        """A scan, or its first part, in batches.

        ksmd sleeps after each batch, and after the one in which the scan ends: the next one starts
        a batch of its own.
        """
        size = self.settings.pages_to_scan
        pages = scan.pages * part
        whole = int(pages // size)
        step = size / scan.pages if scan.pages else 0.0
        sample = min(whole, _BATCHES)
        if self.costs is None:
            return self._asleep(sample, whole, ends_with_batch=pages == whole * size)
        # The last one at the end of the arrays.
        begin = np.arange(sample + 1, dtype=np.float64) * (whole / sample if sample else 1.0) * step
        end = begin + step
        begin[-1], end[-1] = whole * step, part
        cpu = self._batch_seconds(scan, begin, end)
        asleep, awake_each = self._with_sleep(cpu), self._awake(cpu)
        each = whole / sample if sample else 0.0
        before, last_asleep = float(asleep[:-1].sum()) * each, float(asleep[-1])
        cpu_seconds = float(cpu[:-1].sum()) * each + float(cpu[-1])
        if sample and pages == whole * size:
            # Nothing is left for the last batch but to find the end.
            awake = before - float(asleep[-2] - awake_each[-2])
        else:
            awake = before + float(awake_each[-1])
        return Way(cpu_seconds, before + last_asleep, awake)

    def _asleep(self, sample: int, whole: int, *, ends_with_batch: bool) -> Way:
        """The same where batches take no time: all sleeps are of one length."""
        if self._sleep is None:
            self._sleep = float(self._with_sleep(np.zeros(1))[0])
        sleep = self._sleep
        before = float(np.full(sample, sleep).sum()) * (whole / sample if sample else 0.0)
        awake = before - sleep if sample and ends_with_batch else before
        return Way(0.0, before + sleep, awake)

    def _batch_seconds(self, scan: _Scan, begin: F64, end: F64) -> F64:
        c = self.costs
        assert c is not None
        pages = (end - begin) * scan.pages
        cold = c.cold_ns * np.sqrt(np.maximum(0.0, pages * scan.searches))
        if self.settings.sleep_millisecs == 0:
            cold = np.zeros(len(begin))
        visits = scan.until(end) - scan.until(begin)
        return (visits + cold + c.batch_ns) * self.factor * _NS

    def _awake(self, cpu: F64) -> F64:
        """Time of batches of so much CPU."""
        return cpu * (1 + self.waiting)

    def _with_sleep(self, cpu: F64) -> F64:
        """Time of batches of so much CPU with the sleep after each.

        A timer runs for whole ticks and starts anew at the next one, so that batch and sleep
        together last whole ticks: those that the batch has used up, those of the sleep, and one.
        With `sleep_millisecs` 0 ksmd does not sleep at all.
        """
        s = self.settings
        if s.sleep_millisecs == 0:
            return self._awake(cpu)
        sleep = _timer_ticks(math.ceil(round(s.sleep_millisecs / 1000 / s.tick_seconds, 6)))
        ticks = _mean_floor(self._awake(cpu) / s.tick_seconds) + sleep
        return np.asarray(ticks * s.tick_seconds, dtype=np.float64)


def _share(rate: F64) -> F64:
    """Scale to a sum of 1."""
    total = rate.sum()
    return np.asarray(rate / total) if total > 0 else np.full(len(rate), 1 / len(rate))


def _timer_ticks(ticks: int) -> float:
    """Ticks that a sleep lasts, from one tick on: the wheel is coarser the longer it is.

    Source: kernel/time/timer.c, eight times coarser from 63 ticks on, again from 504 on.
    """
    granularity, limit = 1, _WHEEL_LEVEL
    while ticks >= limit:
        granularity, limit = granularity << _WHEEL_SHIFT, limit << _WHEEL_SHIFT
    return ticks + (granularity + 1) / 2


def _mean_floor(x: F64) -> F64:
    """Mean of the whole part of what varies around `x`: no batch is like the other."""
    low, high = x * (1 - _FLOOR_SPREAD), x * (1 + _FLOOR_SPREAD)
    width = np.maximum(high - low, 1e-12)
    return np.asarray((_floors(high) - _floors(low)) / width, dtype=np.float64)


def _floors(x: F64) -> F64:
    """Integral of floor from 0 to x."""
    k = np.floor(x)
    return np.asarray(k * (k - 1) / 2 + k * (x - k))


# -- the price -------------------------------------------------------------------------------------


class _Figures(NamedTuple):
    converge_seconds: float
    cpu_seconds: float
    first_pass_cpu_seconds: float
    merge_pass_cpu_seconds: float
    full_scan_seconds: float
    full_scan_cpu_seconds: float
    shortest_scan_seconds: float
    longest_scan_seconds: float


def _figures(
    load: Load, settings: Settings, costs: Costs | None, factor: float = 1.0, waiting: float = 0.0
) -> _Figures:
    m = _Model(load, settings, costs, factor, waiting)
    first = m.way(m.first())
    part = min(1.0, max(0.0, load.last_merge))
    steady = m.way(m.steady())
    if load.pair_in_huge_page:
        whole, last = m.way(m.merging(1.0)), m.way(m.steady(), part)
        merge_cpu = whole.cpu_seconds + last.cpu_seconds
        seconds = first.seconds + whole.seconds + last.awake_seconds
    else:
        merging = m.way(m.merging(part))
        merge_cpu, seconds = merging.cpu_seconds, first.seconds + merging.awake_seconds
    scans = [steady]
    if settings.smart_scan:
        scans += [m.way(m.skipping())] * (SMART_SCAN_CYCLE - 1)
    return _Figures(
        converge_seconds=seconds,
        cpu_seconds=first.cpu_seconds + merge_cpu,
        first_pass_cpu_seconds=first.cpu_seconds,
        merge_pass_cpu_seconds=merge_cpu,
        full_scan_seconds=sum(s.seconds for s in scans) / len(scans),
        full_scan_cpu_seconds=sum(s.cpu_seconds for s in scans) / len(scans),
        shortest_scan_seconds=min(s.seconds for s in scans),
        longest_scan_seconds=max(s.seconds for s in scans),
    )


def full_scan(
    load: Load,
    settings: Settings,
    calibration: Calibration,
    number: int,
    *,
    until_merged: bool = False,
) -> Way:
    """One of the full scans since ksmd began with a load, all of it registered.

    Parameters
    ----------
    load : Load
    settings : Settings
        In that scan.
    calibration : Calibration
    number : int
        From 1 on: the first takes checksums, the second merges. With smart scan the later ones
        pass over what did not merge, but for some (`dedup.model.smart.processed`).
    until_merged : bool
        Only as far as the last page that merges.
    """
    m = _Model(load, settings, calibration.costs, 1.0, 0.0)
    part = min(1.0, max(0.0, load.last_merge)) if until_merged else 1.0
    if number == 1:
        return m.way(m.first())
    if number == MERGE_SCANS:
        return m.way(m.merging(part))
    if settings.smart_scan and not smart.processed(number):
        return m.way(m.skipping(), part)
    return m.way(m.steady(), part)


def price(load: Load, settings: Settings, calibration: Calibration | None) -> Cost:
    """What it costs to merge a load, and to keep it merged.

    Parameters
    ----------
    load : Load
    settings : Settings
        The present ones, or intended ones.
    calibration : Calibration, optional
        Of this host; None gives no CPU, and times of the sleeps alone.

    Returns
    -------
    Cost
        See there from when to when its times run.
    """
    costs = calibration.costs if calibration else None
    value = _figures(load, settings, costs)
    metadata = load.rmap_items * RMAP_ITEM_BYTES + load.pages_shared * STABLE_NODE_BYTES
    # A chain has a node of its own, and zero pages have an rmap_item until the third scan.
    most = metadata + load.ksm_zero_pages * RMAP_ITEM_BYTES + load.pages_shared * STABLE_NODE_BYTES
    cost = Cost(
        calibrated=calibration is not None,
        full_scans=MERGE_SCANS + load.pair_in_huge_page,
        converge_seconds=value.converge_seconds,
        cpu_seconds=None,
        first_pass_cpu_seconds=None,
        merge_pass_cpu_seconds=None,
        full_scan_seconds=value.full_scan_seconds,
        full_scan_cpu_seconds=None,
        steady_cores=None,
        metadata_bytes=metadata,
        bounds={"metadata_bytes": (metadata, most)},
    )
    return cost if calibration is None else _with_cpu(cost, value, load, settings, calibration)


def _with_cpu(
    cost: Cost, value: _Figures, load: Load, settings: Settings, calibration: Calibration
) -> Cost:
    least = OBSERVED_RANGE if calibration.observed else CPU_RANGE
    spread = min(0.9, max(least, 2 * calibration.spread))
    low = _figures(load, settings, calibration.costs, 1 - spread)
    high = _figures(load, settings, calibration.costs, 1 + spread, calibration.waiting)
    bounds = dict(cost.bounds)
    for name in _Figures._fields[:6]:
        widened = TIME_RANGE if name in {"converge_seconds", "full_scan_seconds"} else 0.0
        bounds[name] = (
            getattr(low, name) * (1 - widened),
            getattr(high, name) * (1 + widened),
        )
    bounds["full_scan_seconds"] = (
        min(bounds["full_scan_seconds"][0], low.shortest_scan_seconds * (1 - TIME_RANGE)),
        max(bounds["full_scan_seconds"][1], high.longest_scan_seconds * (1 + TIME_RANGE)),
    )
    if calibration.observed:
        merging = _figures(load, settings, calibration.costs, OBSERVED_MERGES, calibration.waiting)
        for name in ("converge_seconds", "cpu_seconds", "merge_pass_cpu_seconds"):
            bounds[name] = (bounds[name][0], getattr(merging, name))
    cores = [f.full_scan_cpu_seconds / f.full_scan_seconds for f in (low, value, high)]
    bounds["steady_cores"] = (min(cores), min(1.0, max(cores)))
    return Cost(
        calibrated=True,
        full_scans=cost.full_scans,
        converge_seconds=value.converge_seconds,
        cpu_seconds=value.cpu_seconds,
        first_pass_cpu_seconds=value.first_pass_cpu_seconds,
        merge_pass_cpu_seconds=value.merge_pass_cpu_seconds,
        full_scan_seconds=value.full_scan_seconds,
        full_scan_cpu_seconds=value.full_scan_cpu_seconds,
        steady_cores=min(1.0, cores[1]),
        metadata_bytes=cost.metadata_bytes,
        bounds=bounds,
    )


def last_merge(pages: Pages, groups: Groups) -> float:
    """Which part of a full scan is over at the last page that merges; 1 where none does.

    Between processes by the order of `pages.processes`, as `Pages.scan_order` has it.

    Parameters
    ----------
    pages, groups
        As for `dedup.model.merge.predict`.
    """
    gone = np.uint64(Flag.GONE | Flag.UNREAD)
    unstable = np.uint64(Flag.VOLATILE | Flag.NEW)
    after = 0
    # From the end on: mostly some page of the last run merges.
    for first, count in zip(
        pages.run_first[::-1].tolist(), pages.run_count[::-1].tolist(), strict=True
    ):
        for end in range(first + count, first, -CHUNK_PAGES):
            word = pages.frames[max(first, end - CHUNK_PAGES) : end]
            merges = np.flatnonzero((word & (gone | unstable | Flag.DUPLICATE)) == Flag.DUPLICATE)
            at = int(merges[-1]) + 1 if len(merges) else 0
            after += int(np.count_nonzero((word[at:] & gone) == 0))
            if len(merges):
                return 1 - after / groups.census.of(gone)
    return 1.0


def pair_in_huge_page(pages: Pages, groups: Groups) -> bool:
    """Whether a content lies twice in one huge page and nowhere else: merged a scan later.

    ksmd holds both pages then and can't split the huge page (mm/ksm.c, try_to_merge_one_page).

    Parameters
    ----------
    pages, groups
        As for `dedup.model.merge.predict`.
    """
    both = Flag.THP | Flag.DUPLICATE
    if not groups.census.of(both | Flag.ZERO | Flag.HIDDEN, both):
        return False
    inside = Flag.THP | Flag.HIDDEN
    return groups.passes.any_in_one_block(
        pages.frames, groups.order, groups.offsets, Flag.ZERO, inside, Flag.THP, pages.huge_pages
    )


def load_of(pages: Pages, groups: Groups, prediction: Prediction, others: int = 0) -> Load:
    """What ksmd has to do for a scan: the middle of each range.

    Parameters
    ----------
    pages, groups
        As for `dedup.model.merge.predict`.
    prediction : Prediction
    others : int
        Pages that ksmd follows besides: they make its full scans longer.
    """

    def middle(name: str) -> int:
        value = getattr(prediction, name)
        return int(value) if value is not None else sum(prediction.bounds.get(name, (0, 0))) // 2

    changing = 0
    if pages.looks > 1:
        absent = Flag.GONE | Flag.UNREAD
        steady = groups.census.of(absent | Flag.VOLATILE | Flag.NEW)
        changing = groups.census.of(absent) - steady
    volatile = max(changing, middle("pages_volatile"))
    placed = middle("ksm_zero_pages") - sum(p.ksm_zero_pages for p in pages.processes)
    return Load(
        pages_shared=middle("pages_shared"),
        pages_sharing=middle("pages_sharing"),
        pages_unshared=middle("pages_unshared") + others,
        pages_volatile=volatile,
        ksm_zero_pages=max(0, placed),
        fork_shared=volatile - changing,
        last_merge=last_merge(pages, groups),
        pair_in_huge_page=pair_in_huge_page(pages, groups),
    )


# -- fitting ---------------------------------------------------------------------------------------


def fit(
    unique: Sequence[Measured], copies: Measured, pairs: Measured, beside: Measured, zero: Measured
) -> Costs:
    """Costs of scans of known sets, by least squares.

    Parameters
    ----------
    unique : sequence of Measured
        Unique pages, sets of two sizes or more; the first was measured in batches and skipped too.
    copies : Measured
        Each content 20 times; in batches too.
    pairs : Measured
        Each content twice, all first copies before all second ones.
    beside : Measured
        The same pairs and as many unique pages as there are pairs.
    zero : Measured
        Zero pages, `use_zero_pages` on.
    """
    n = np.array([m.pages for m in unique], dtype=np.float64)
    steady = np.array([m.steady_ns for m in unique]) / n
    slope = max(0.0, float(np.polynomial.polynomial.polyfit(_log2(n), steady, 1)[1]))
    tree = float((steady - slope * (_log2(n) - _TREE_LOG2)).mean())
    first = float(np.median([m.first_ns / m.pages for m in (*unique, copies, pairs)]))

    def alone(pages: float) -> float:
        return max(first, tree + slope * (math.log2(max(1.0, pages)) - _TREE_LOG2))

    # What n nodes with m mappings cost: m merged + n node.
    of_copies, of_pairs = copies.pages / COPIES, pairs.pages / 2
    merged, node_visit = np.linalg.solve(
        np.array([[copies.pages, of_copies], [pairs.pages, of_pairs]]),
        np.array([copies.steady_ns, pairs.steady_ns]),
    )
    node_visit = max(0.0, float(node_visit))
    merged = (copies.steady_ns - node_visit * of_copies) / copies.pages

    extra = (beside.steady_ns - pairs.steady_ns) / (beside.pages - pairs.pages)
    stable = max(0.0, (extra - alone(beside.pages - pairs.pages)) / math.log2(of_pairs))

    def grown(nodes: float) -> float:
        return stable * max(0.0, math.log2(nodes) - _MEAN_LOG2)

    node = max(0.0, pairs.second_ns / of_pairs - 2 * alone(of_pairs) - grown(of_pairs))
    joins = copies.pages - 2 * of_copies
    begun = of_copies * (2 * alone(of_copies) + grown(of_copies) + node)
    join = (copies.second_ns - begun) / joins - first - stable * math.log2(of_copies)

    small = unique[0]
    wake = _by_batch(copies)
    cold = max(0.0, _by_batch(small) - wake) / math.sqrt(small.batch_pages or 1)
    return Costs(
        first_ns=first,
        tree_ns=max(0.0, tree),
        tree_log2_ns=slope,
        stable_log2_ns=stable,
        merged_ns=float(merged),
        merged_node_ns=node_visit,
        node_ns=node,
        join_ns=max(0.0, join),
        zero_ns=zero.second_ns / zero.pages,
        skip_ns=small.skipped_ns / small.pages,
        batch_ns=wake,
        cold_ns=cold,
    )


COPIES: Final = 20
"""Of each content in the set `copies` of `fit`."""


def _by_batch(m: Measured) -> float:
    """What each batch cost besides its visits."""
    if not m.batch_pages:
        return 0.0
    return max(0.0, (m.batched_ns - m.steady_ns) / (m.pages // m.batch_pages + 1))
