"""A scan of a sample of the frames: what it chooses, when it looks, what it says of the whole."""

from __future__ import annotations

import importlib.util
import itertools
import platform
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup import calibration, scanning
from dedup.errors import NoSuchProcess, Refused, Usage
from dedup.estimate import sampled, unseen
from dedup.estimate.sampled import RATE_LEAST, RATE_MOST, Present
from dedup.kernel import ksmd, memory, numa, pagemap, processes, shortage
from dedup.model import cost, steady
from dedup.sources import speed
from dedup.sources.live import LiveSource, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from dedup.estimate.sampled import Estimate
    from dedup.kernel.memory import Tally
    from dedup.model.cost import Cost
    from dedup.model.prediction import Prediction, Rules
    from dedup.pages import I64, Pages
    from dedup.scanning import Plan
    from dedup.sources.speed import Speed

OVERHEAD_SECONDS: Final = 0.5
"""Of the time allowed, for all that is not reading: start, measurement, model."""
ESTIMATE_SECONDS: Final = 0.25
"""Of a sample, besides: the import of scipy and highspy, and the estimate."""
CAUTION: Final = 0.75
"""Of the time allowed, for a machine that is busier than it was a moment ago."""
LOOKS: Final = 2


@dataclass(frozen=True, slots=True)
class Sampled:
    """A finished scan of a sample."""

    kernel: str
    tunables: dict[str, int | str]
    pages: Pages
    """Those read."""
    present: Present
    """All, at the last look."""
    by_process: I64
    """Pages present, of each process."""
    estimate: Estimate
    rules: Rules
    tally: Tally
    rate: float
    """Chance of a frame to be in the sample; by content, of a content."""
    within_seconds: float | None
    seed: int
    seconds: float
    looks_seconds: list[float]
    """When each look began, after the first."""
    full_scan_seconds: float
    scope: str
    pagemap_scan: bool
    cost: Cost | None
    """Of the point estimate."""
    assumed: dict[str, int] = field(default_factory=dict)
    memory_bytes: int | None = None
    """By content: what the scan's own memory was to fit into."""
    frame_rate: float | None = None
    """By content: chance of a page to be kept by its frame, whatever it holds."""

    @property
    def by(self) -> Literal["frame", "content"]:
        """What was chosen at random."""
        return "frame" if self.memory_bytes is None else "content"

    @property
    def prediction(self) -> Prediction:
        """The counters: ranges, but for what pagemap tells."""
        return self.estimate.prediction

    @property
    def interval_seconds(self) -> float | None:
        """The longest time between looks; None after one."""
        times = self.looks_seconds
        return max((b - a for a, b in itertools.pairwise(times)), default=None)

    @property
    def complete(self) -> bool:
        """Whether nothing chosen was left out."""
        return not any(s.amiss for s in self.pages.skipped) and not self.tally.unread_pages


def check(rate: float) -> None:
    """Say what is wrong with a rate; above `RATE_MOST` everything is read, which is no error.

    Raises
    ------
    Usage, Refused
    """
    if not 0 < rate <= 1:
        raise Usage(
            f"--sample takes a part of the memory, above 0 up to 1, not {rate:g}",
            "`--sample 10%` or `--sample 0.1`",
        )
    if rate < RATE_LEAST:
        raise Refused(
            f"of a sample below {RATE_LEAST:.0%} nothing certain follows: copies hardly meet in it",
            f"`--sample {RATE_LEAST:.0%}` at the least; from 10% on the range is of use",
        )


def require() -> None:
    """See whether what estimates is there, before the work of a scan.

    Raises
    ------
    Unsupported
        scipy or highspy is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in unseen.NEEDED):
        unseen.require()


def rate_within(pids: Sequence[int], plan: Plan, seconds: float) -> float | None:
    """The rate at which all looks are over within a time; None where all can be read.

    Parameters
    ----------
    pids : sequence of int
    plan : Plan
        Its looks share the time.
    seconds : float
        From the start until the answer; looks that are to lie further apart don't fit in.

    Raises
    ------
    Refused
        Not even the smallest sample fits.
    """
    looks = plan.passes or LOOKS
    if plan.interval_seconds is not None and plan.interval_seconds * (looks - 1) >= seconds:
        raise Usage(
            f"{looks} looks {plan.interval_seconds:g} s apart do not fit into {seconds:g} s",
            "leave out `--interval`, or give more time",
        )
    sight = pagemap.sight()
    total = 0
    for pid in pids:
        try:
            with processes.of_process(pid) as handle:
                total += handle.info.anonymous_bytes
        except NoSuchProcess:
            continue
    pages = total // sight.page_size
    found = speed.measure(sight, plan.options.threads or memory.default_threads())
    return rate_at(found, pages, looks, seconds)


def rate_at(found: Speed, pages: int, looks: int, seconds: float) -> float | None:
    """The rate at which so many looks at so many pages fit into a time, at a speed.

    None where all can be read.

    Raises
    ------
    Refused
        Not even the smallest sample fits.
    """
    if found.seconds(pages) <= (seconds - OVERHEAD_SECONDS) * CAUTION / looks:
        return None
    overhead = OVERHEAD_SECONDS + ESTIMATE_SECONDS
    rate = found.rate(pages, (seconds - overhead) * CAUTION / looks)
    if rate < RATE_LEAST:
        least = found.seconds(pages, RATE_LEAST) * looks / CAUTION + overhead
        raise Refused(
            f"{seconds:g} s are too short for {pages:,} pages here: not even {RATE_LEAST:.0%} of "
            "them could be read",
            f"`--within {np.ceil(least * 10) / 10:g}`, fewer processes, or `--passes 1`",
        )
    return min(rate, RATE_MOST)


def interval_within(plan: Plan, seconds: float) -> float:
    """How far apart looks may begin at the most, so that all are over within a time."""
    return seconds * CAUTION / (plan.passes or LOOKS)


def refuse_nodes(rules: Rules, hint: str) -> None:
    """Raise `Refused` where contents of each NUMA node merge apart."""
    if not rules.merge_across_nodes and numa.nodes() is not None:
        raise Refused(
            "with merge_across_nodes 0 a content is another one on each node, and a sample can't "
            "tell how they are spread",
            hint,
        )


def refuse_pinned(hint: str, *, pinned: bool) -> None:
    """Raise `Refused` where a process has pinned memory."""
    if pinned:
        raise Refused(
            "a process has pinned memory (VmPin): which contents that blocks, a sample can't tell",
            hint,
        )


@shortage.needed("estimate from a sample")
def sample_pids(
    pids: Sequence[int], rate: float, plan: Plan | None = None, within: float | None = None
) -> Sampled:
    """Scan a sample of live processes.

    Parameters
    ----------
    pids : sequence of int
    rate : float
        Part of the frames to read.
    plan : Plan, optional
    within : float, optional
        Seconds that the looks may lie apart at the most, where the plan does not say.

    Raises
    ------
    NoSuchProcess, NoMemory, NotPermitted, ProcessGone
        As `dedup.scanning.scan_pids`.
    Refused
        No honest estimate can be made.
    Unsupported
        scipy or highspy is missing.
    """
    plan = plan or scanning.Plan()
    check(rate)
    if plan.passes is not None and plan.passes < 1:
        raise Usage("--passes takes a number from 1 on")
    if plan.partial_passes:
        raise Usage(
            "--partial-passes does not go with a sample: each look at it reads all of it",
            "leave out one of them",
        )
    require()
    begin = time.monotonic()
    tunables = scanning.tunables()
    assumed = {**tunables, **plan.assumed}
    rules = scanning.rules_of(assumed)
    refuse_nodes(rules, "leave out `--sample` and `--within`")
    # What is imported takes a fifth of a second: beside the reading, then.
    options = replace(plan.options, sample=rate, meanwhile=unseen.require)
    source = LiveSource(list(pids), options)
    pages = source.first_look()
    pinned = any(p.pinned_bytes for p in pages.processes)
    refuse_pinned("leave out `--sample` and `--within`, or that process", pinned=pinned)
    chosen = sampled.choose(pages, present_of(source), rate)
    full_scan = plan.full_scan_seconds or full_scan_of(chosen.present.pages, assumed)
    began = look_on(source, plan, begin, full_scan, within)
    unseen.require()
    present, sight = present_of(source), source.sight
    estimate = sampled.estimate(
        pages,
        chosen,
        present,
        by_process_of(source),
        rules,
        pagemap.mappings_of if sight.kpagecount else None,
    )
    return result_of(
        source, plan, estimate, rules, tunables, rate=rate, began=began, full_scan=full_scan,
        seconds=time.monotonic() - begin, within=within,
    )  # fmt: skip


def result_of(
    source: LiveSource, plan: Plan, estimate: Estimate, rules: Rules,
    tunables: dict[str, int | str], *, rate: float, began: Sequence[float], full_scan: float,
    seconds: float, within: float | None = None, memory_bytes: int | None = None,
    frame_rate: float | None = None,
) -> Sampled:  # fmt: skip
    """All that a scan of a sample gives, by frame or by content.

    Parameters
    ----------
    source : LiveSource
        After its last look.
    plan : Plan
    estimate : Estimate
    rules : Rules
    tunables : dict
        The host's.
    rate : float
    began : sequence of float
        When each look began.
    full_scan, seconds : float
        ksmd's full scan, and the time that all took.
    within, memory_bytes, frame_rate : optional
        As `Sampled` has them.
    """
    assert source.pages is not None
    return Sampled(
        kernel=platform.release(),
        tunables=tunables,
        pages=source.pages,
        present=present_of(source),
        by_process=by_process_of(source),
        estimate=estimate,
        rules=rules,
        tally=source.tally,
        rate=rate,
        within_seconds=within,
        seed=source.seed,
        seconds=seconds,
        looks_seconds=[t - began[0] for t in began],
        full_scan_seconds=full_scan,
        scope=plan.options.scope,
        pagemap_scan=source.sight.pagemap_scan,
        cost=cost_of(estimate, {**tunables, **plan.assumed}),
        assumed=dict(plan.assumed),
        memory_bytes=memory_bytes,
        frame_rate=frame_rate,
    )


def look_on(
    source: LiveSource, plan: Plan, begin: float, full_scan: float, within: float | None = None
) -> list[float]:
    """Look again at a sample, as often as is wanted; when each look began.

    Raises
    ------
    ProcessGone
        All processes have ended.
    """
    began = [begin]
    interval = plan.interval_seconds
    if interval is None:
        interval = max(
            steady.INTERVAL_LEAST_SECONDS,
            min(steady.INTERVAL_MOST_SECONDS, steady.STEADY_FACTOR * full_scan),
        )
        if within is not None:
            interval = min(interval, interval_within(plan, within))
    for _ in range((plan.passes or LOOKS) - 1):
        wait_until(began[-1] + interval, plan.options.progress)
        began.append(time.monotonic())
        source.look_again()
        source.require_any()
    return began


def by_process_of(source: LiveSource) -> I64:
    """Pages present, read or not, of each process."""
    assert source.pages is not None
    none = np.zeros(1, np.int64)
    return np.array(
        [source.counts.get(i, none)[0] for i in range(len(source.pages.processes))], np.int64
    )


def present_of(source: LiveSource) -> Present:
    """All pages, read or not; of processes that ended none."""
    assert source.pages is not None
    alive = [source.counts[i] for i in source.counts if i not in source.ended]
    return Present(*(int(n) for n in np.sum(alive, axis=0))) if alive else Present()


def full_scan_of(pages: int, tunables: dict[str, int | str]) -> float:
    """Time of ksmd's full scan over so many pages, as if none of them merged."""
    assumed = {**tunables, "smart_scan": 0}
    if not int(assumed.get("pages_to_scan", scanning.DEFAULT_PAGES_TO_SCAN)):
        assumed["pages_to_scan"] = scanning.DEFAULT_PAGES_TO_SCAN
    settings = cost.Settings.of(assumed, ksmd.tick_seconds())
    load = cost.Load(pages_shared=0, pages_sharing=0, pages_unshared=pages)
    return cost.price(load, settings, calibration.load().calibration).full_scan_seconds


def cost_of(estimate: Estimate, tunables: dict[str, int | str]) -> Cost | None:
    """The price of the point estimate."""
    settings = cost.Settings.of(tunables, ksmd.tick_seconds())
    if not settings.pages_to_scan:
        return None

    def middle(name: str) -> int:
        value = getattr(estimate.prediction, name)
        return int(estimate.point.get(name, 0) if value is None else value)

    load = cost.Load(
        pages_shared=middle("pages_shared"),
        pages_sharing=middle("pages_sharing"),
        pages_unshared=middle("pages_unshared"),
        pages_volatile=middle("pages_volatile"),
        ksm_zero_pages=middle("ksm_zero_pages"),
    )
    return cost.price(load, settings, calibration.load().calibration)
