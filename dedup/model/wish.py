"""From a wish to tunables: merged within so long, at most so much of a core.

Everything rests on `dedup.model.cost`: paces of ksmd are tried until one keeps the wish. The
kernel's own advisor, which sets `pages_to_scan` anew after each full scan, is played through scan
by scan.

Source: mm/ksm.c (scan_time_advisor, set_advisor_defaults, pages_to_scan_store).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from dedup.errors import CheckFailed
from dedup.model.cost import MERGE_SCANS, SMART_SCAN_CYCLE, Settings, full_scan, price

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dedup.model.cost import Calibration, Load

SLEEP_MILLISECS: Final = 20
"""The kernel's default, from which a wish departs only where batches alone can't keep it."""
SLEEP_MOST_MILLISECS: Final = 60_000
BATCH_LEAST_PAGES: Final = 100
"""The kernel's default. To be slower still ksmd sleeps longer: a wake-up for less costs more than
its visits."""
PAGES_TO_SCAN_MOST: Final = (1 << 32) - 1

SCANS: Final = 90
"""Full scans for which the advisor is played through."""
SCANS_SHOWN: Final = 2 * SMART_SCAN_CYCLE
"""The last ones, of which its later figures are the mean."""
HEADROOM: Final = 2
"""The advisor may scan so many times the pages that the wish needs now: memory may grow."""
ADVISOR_LEAST_PERCENT: Final = 10
"""Of a core: it gives ksmd so much at the least, up to `advisor_max_pages_to_scan`."""
_EWMA_PERCENT: Final = 30
_PERCENT: Final = 100
_TARGETS: Final = 8

FIXED: Final = "fixed"
ADVISOR: Final = "advisor"


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of ksmd.

    Parameters
    ----------
    within_seconds : float, optional
        Merged so long after its start, all memory registered: see `dedup.model.cost.Cost`.
    cores : float, optional
        At most so much of a core, in each full scan until then and in the mean of later ones; even
        where ksmd's CPU comes out at the upper end of its range, since it is a limit.
    """

    within_seconds: float | None = None
    cores: float | None = None


@dataclass(frozen=True, slots=True)
class Price:
    """What ksmd takes with some tunables."""

    converge_seconds: float
    cpu_seconds: float
    """Until converged."""
    merging_cores: float
    """Share of a core in the busiest full scan until then."""
    full_scan_seconds: float
    """Of a later full scan: with smart scan the mean of its cycle."""
    full_scan_cpu_seconds: float
    steady_cores: float
    """Share of a core later on, in the mean."""
    later_seconds: float
    """Two full scans, nothing passed over: memory that comes later is merged after as long, and
    what was left of the scan under way."""
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Lowest and highest of each figure that has a range."""

    def keeps(self, wish: Wish) -> bool:
        """Whether the wish holds by this price."""
        return (wish.within_seconds is None or self.converge_seconds <= wish.within_seconds) and (
            wish.cores is None or self.most_cores <= wish.cores
        )

    @property
    def most_cores(self) -> float:
        """Share of a core, merging or later, at the upper end of its range."""
        return max(self.bounds["merging_cores"][1], self.bounds["steady_cores"][1])


@dataclass(frozen=True, slots=True)
class Alternative:
    """A way to keep a wish."""

    name: str
    """`fixed` or `advisor`."""
    tunables: dict[str, int | str]
    """To be written in this order."""
    price: Price
    keeps: bool
    """Whether the wish holds from the start, by the price."""
    pages_to_scan: int
    """Later on; the advisor's is what it comes to rest at."""


def of(load: Load, settings: Settings, calibration: Calibration) -> Price:
    """Price of fixed tunables."""
    cost = price(load, settings, calibration)
    assert cost.cpu_seconds is not None
    assert cost.full_scan_cpu_seconds is not None
    assert cost.steady_cores is not None
    passes = [full_scan(load, settings, calibration, n + 1) for n in range(cost.full_scans)]
    steady = full_scan(load, _all_processed(settings), calibration, MERGE_SCANS + 1)
    merging = max(_share(p.cpu_seconds, p.seconds) for p in passes)
    bounds = {
        name: cost.bounds[name]
        for name in ("converge_seconds", "cpu_seconds", "full_scan_seconds", "steady_cores")
    }
    low, high = (bound / cost.cpu_seconds for bound in bounds["cpu_seconds"])
    bounds["merging_cores"] = (merging * low, min(1.0, merging * high))
    return Price(
        converge_seconds=cost.converge_seconds,
        cpu_seconds=cost.cpu_seconds,
        merging_cores=merging,
        full_scan_seconds=cost.full_scan_seconds,
        full_scan_cpu_seconds=cost.full_scan_cpu_seconds,
        steady_cores=cost.steady_cores,
        later_seconds=MERGE_SCANS * steady.seconds,
        bounds=bounds,
    )


def _share(cpu_seconds: float, seconds: float) -> float:
    return min(1.0, cpu_seconds / seconds)


def _all_processed(settings: Settings) -> Settings:
    return Settings(settings.pages_to_scan, settings.sleep_millisecs, settings.tick_seconds)


# -- fixed tunables --------------------------------------------------------------------------------


class _Paces:
    """Paces of ksmd from the slowest to the fastest, by their number.

    First ever shorter sleeps between batches of 100 pages, then ever larger batches with sleeps of
    20 ms until one holds everything, then shorter sleeps again.
    """

    def __init__(self, load: Load, tick_seconds: float, *, smart_scan: bool) -> None:
        self.tick_seconds, self.smart_scan = tick_seconds, smart_scan
        self.slow = SLEEP_MOST_MILLISECS - SLEEP_MILLISECS
        largest = min(PAGES_TO_SCAN_MOST, max(BATCH_LEAST_PAGES, load.candidates + 1))
        self.growing = largest - BATCH_LEAST_PAGES
        self.last = self.slow + self.growing + SLEEP_MILLISECS

    def __getitem__(self, number: int) -> Settings:
        over = max(0, number - self.slow - self.growing)
        pages = BATCH_LEAST_PAGES + min(self.growing, max(0, number - self.slow))
        sleep = SLEEP_MILLISECS + max(0, self.slow - number) - over
        return Settings(pages, sleep, self.tick_seconds, self.smart_scan)


def _first(last: int, holds: Callable[[int], bool]) -> int:
    """The first number up to `last` for which it holds; it holds for `last`."""
    low, high = -1, last
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def fixed(
    wish: Wish, load: Load, calibration: Calibration, tick_seconds: float, *, smart_scan: bool
) -> Alternative:
    """Tunables that keep a wish: of those in time the cheapest, else the fastest for the CPU.

    Parameters
    ----------
    wish : Wish
    load : Load
    calibration : Calibration
    tick_seconds : float
        By which the kernel rounds sleeps.
    smart_scan : bool
        Left as it is.

    Raises
    ------
    CheckFailed
        It can't be kept; the message has what can.
    """
    paces = _Paces(load, tick_seconds, smart_scan=smart_scan)
    known: dict[int, Price] = {}

    def at(number: int) -> Price:
        if number not in known:
            known[number] = of(load, paces[number], calibration)
        return known[number]

    within, cores = wish.within_seconds, wish.cores
    number = paces.last
    if within is not None:
        if at(paces.last).converge_seconds > within:
            raise CheckFailed(
                f"it can't be merged within {within:g} s: ksmd alone needs "
                f"{_seconds(at(paces.last).converge_seconds)} of one processor",
                f"wish for `--within {_above(at(paces.last).converge_seconds)}` or more, or choose "
                "less memory",
            )
        number = _first(paces.last, lambda i: at(i).converge_seconds <= within)
    if cores is not None:
        if at(0).most_cores > cores:
            raise CheckFailed(
                f"ksmd can't do with {cores * 100:.2g}% of a core here: even with sleeps of "
                f"{SLEEP_MOST_MILLISECS // 1000} s it may take {at(0).most_cores * 100:.2g}%",
                f"wish for `--cpu {_above(at(0).most_cores * 100)}` or more, or choose less memory",
            )
        if within is None or at(number).most_cores > cores:
            # The numbers that take too much begin one further on.
            too_fast = _first(paces.last + 1, lambda i: i > paces.last or at(i).most_cores > cores)
            affordable = too_fast - 1
            if within is not None and at(affordable).converge_seconds > within:
                raise CheckFailed(
                    f"both can't be had: merged within {within:g} s may take "
                    f"{at(number).most_cores:.1%} of a core, and with {cores:.1%} at the most it "
                    f"takes {_seconds(at(affordable).converge_seconds)}",
                    f"wish for `--within {_above(at(affordable).converge_seconds)} "
                    f"--cpu {cores * _PERCENT:g}` or `--within {within:g} "
                    f"--cpu {_above(at(number).most_cores * _PERCENT)}`",
                )
            number = affordable
    chosen = paces[number]
    return Alternative(
        FIXED,
        {"pages_to_scan": chosen.pages_to_scan, "sleep_millisecs": chosen.sleep_millisecs},
        at(number),
        at(number).keeps(wish),
        chosen.pages_to_scan,
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"


def _above(figure: float) -> str:
    """The figure to two digits, rounded up, so that it can be wished for."""
    step = 10.0 ** (math.floor(math.log10(figure)) - 1)
    return f"{(int(figure / step) + 1) * step:.6g}"


# -- the kernel's advisor --------------------------------------------------------------------------


class Advisor(NamedTuple):
    """Its tunables, by the kernel's names but for the `advisor_` before them."""

    target_scan_time: int
    """Whole seconds."""
    max_cpu: int
    """Per cent of a core."""
    min_pages_to_scan: int
    """At its start; later on it may go below."""
    max_pages_to_scan: int

    def next_batch(
        self, pages: int, scan_seconds: int, before_seconds: int, change: int, cpu_percent: int
    ) -> tuple[int, int]:
        """`pages_to_scan` after a full scan, and its smoothed change in per cent.

        Parameters
        ----------
        pages : int
            In that scan.
        scan_seconds, before_seconds : int
            Its time, and that of the scan before; whole seconds, at least one.
        change : int
            After the scan before; 0 at first, so that it takes some scans to have its say.
        cpu_percent : int
            Of a core in that scan, at least 1.
        """
        factor = max(1, self.target_scan_time * _PERCENT // scan_seconds)
        now = max(1, scan_seconds * _PERCENT // before_seconds)
        change = ((_PERCENT - _EWMA_PERCENT) * change + _EWMA_PERCENT * now) // _PERCENT
        wanted = pages * _PERCENT // factor * change // _PERCENT
        for_a_percent = max(1, pages // cpu_percent)
        wanted = min(wanted, for_a_percent * self.max_cpu)
        wanted = max(wanted, for_a_percent * ADVISOR_LEAST_PERCENT)
        return min(wanted, self.max_pages_to_scan), change


class _Played(NamedTuple):
    price: Price
    pages_to_scan: int


def play(
    advisor: Advisor,
    load: Load,
    settings: Settings,
    calibration: Calibration,
    ksmd_cpu_seconds: float = 0.0,
) -> _Played:
    """What the advisor makes of a load, from the moment at which it is switched on.

    Parameters
    ----------
    advisor : Advisor
    load : Load
    settings : Settings
        `pages_to_scan` is not used.
    calibration : Calibration
    ksmd_cpu_seconds : float
        ksmd's CPU since boot: it takes all of it for that of the first full scan.
    """
    pages, change, before = max(1, advisor.min_pages_to_scan), 0, 0
    converge = cpu_until = merging = 0.0
    merged_after = MERGE_SCANS + load.pair_in_huge_page
    ways = []
    cpu = ksmd_cpu_seconds
    longest = 0.0
    for number in range(1, SCANS + 1):
        now = Settings(pages, settings.sleep_millisecs, settings.tick_seconds, settings.smart_scan)
        way = full_scan(load, now, calibration, number)
        if number <= merged_after:
            part = full_scan(load, now, calibration, number, until_merged=number == merged_after)
            converge += part.awake_seconds if number == merged_after else part.seconds
            cpu_until += part.cpu_seconds
            merging = max(merging, _share(way.cpu_seconds, way.seconds))
        if number > SCANS - SCANS_SHOWN:
            ways.append(way)
            new = full_scan(load, _all_processed(now), calibration, MERGE_SCANS + 1)
            longest = max(longest, new.seconds)
        cpu += way.cpu_seconds
        seconds = max(1, int(way.awake_seconds))
        percent = max(1, int(cpu * 1000) * _PERCENT // (seconds * 1000))
        pages, change = advisor.next_batch(pages, seconds, before or seconds, change, percent)
        # It may come down to nothing where `advisor_max_cpu` or the largest batch is 0.
        pages, before, cpu = max(1, pages), seconds, 0.0
    mean_seconds = sum(w.seconds for w in ways) / len(ways)
    mean_cpu = sum(w.cpu_seconds for w in ways) / len(ways)
    found = Price(
        converge_seconds=converge,
        cpu_seconds=cpu_until,
        merging_cores=merging,
        full_scan_seconds=mean_seconds,
        full_scan_cpu_seconds=mean_cpu,
        steady_cores=_share(mean_cpu, mean_seconds),
        later_seconds=MERGE_SCANS * longest,
    )
    return _Played(found, pages)


def _alike(price: Price, other: Price) -> dict[str, tuple[float, float]]:
    """Bounds as wide as those of another price, by their share of the figure."""
    found = {}
    for name, (low, high) in other.bounds.items():
        ratio = getattr(price, name) / getattr(other, name)
        most = 1.0 if name.endswith("_cores") else math.inf
        found[name] = (low * ratio, min(most, high * ratio))
    return found


def advised(
    wish: Wish,
    by: Alternative,
    load: Load,
    calibration: Calibration,
    settings: Settings,
    present: Mapping[str, int | str],
    ksmd_cpu_seconds: float,
) -> Alternative:
    """The kernel's advisor in place of fixed tunables.

    It starts with the batch of the fixed ones and may go to twice that, or as far as the wished CPU
    allows. Its target is the longest scan time, in whole seconds, of which two fit into the wished
    time later on.

    Parameters
    ----------
    wish : Wish
    by : Alternative
        The fixed tunables.
    load : Load
    calibration : Calibration
    settings : Settings
        Tick and smart scan of this host.
    present : mapping
        Tunables of this host.
    ksmd_cpu_seconds : float
        See `play`.
    """
    batch = by.pages_to_scan
    sleep = int(by.tunables["sleep_millisecs"])
    settings = Settings(batch, sleep, settings.tick_seconds, settings.smart_scan)
    max_cpu = int(present.get("advisor_max_cpu", 70))
    most = batch * HEADROOM
    if wish.cores is not None:
        max_cpu = max(1, int(wish.cores * _PERCENT))
        cheap = fixed(
            Wish(cores=wish.cores),
            load,
            calibration,
            settings.tick_seconds,
            smart_scan=settings.smart_scan,
        )
        # Below its own ten per cent nothing holds it but the size of a batch.
        if int(cheap.tunables["sleep_millisecs"]) == sleep:
            most = min(most, cheap.pages_to_scan)
        else:
            most = batch
    elif by.price.most_cores * _PERCENT * HEADROOM > max_cpu:
        max_cpu = _PERCENT
    most = min(most, PAGES_TO_SCAN_MOST)
    wanted = wish.within_seconds or by.price.later_seconds
    longest = max(1, int(wanted / MERGE_SCANS))
    for target in range(longest, max(0, longest - _TARGETS), -1):
        advisor = Advisor(target, max_cpu, batch, most)
        played = play(advisor, load, settings, calibration, ksmd_cpu_seconds)
        if played.price.later_seconds <= wanted:
            break
    found = replace(played.price, bounds=_alike(played.price, by.price))
    return Alternative(
        ADVISOR,
        {
            "sleep_millisecs": sleep,
            **{f"advisor_{name}": value for name, value in advisor._asdict().items()},
            "advisor_mode": "scan-time",
        },
        found,
        found.keeps(wish),
        played.pages_to_scan,
    )
