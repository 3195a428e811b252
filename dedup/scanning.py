"""One scan from end to end: looks, groups, prediction."""

from __future__ import annotations

import math
import os
import platform
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup import grouping
from dedup.errors import Unsupported, Usage
from dedup.kernel import processes
from dedup.kernel.ksm import Ksm
from dedup.model import merge, smart, steady
from dedup.pages import Flag
from dedup.sources.live import LiveSource, Options, Span, mark_outside, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.kernel.memory import Tally
    from dedup.model.merge import Prediction, Rules
    from dedup.model.smart import SmartScan
    from dedup.pages import Groups, Pages

PACE_SECONDS: Final = 0.3
PACE_BATCHES: Final = 8
"""So long, and so many batches, ksmd is watched before its own pace counts."""
ENOUGH: Final = 0.95
"""A look this near to the steady state's time is as good as one at it."""
CLOCK_MONOTONIC_COARSE: Final = 6
"""Its resolution is the kernel's tick (include/uapi/linux/time.h)."""
THIRD_LOOK: Final = 3
"""When the third look comes, in units of the time from the first to the second."""


@dataclass(slots=True)
class Plan:
    """What to scan and how.

    Parameters
    ----------
    options : Options
    passes : int, optional
        Looks; pages whose content differs between two are volatile. None: two, or three and an
        extrapolation where ksmd's full scan takes too long to wait for.
    interval_seconds : float, optional
        From one look to the next; None takes it from ksmd's full scan, at most 5 s.
    full_scan_seconds : float, optional
        ksmd's full scan, where other tunables than the present ones are intended.
    order_known : bool
        ksmd comes by the processes in the order given.
    """

    options: Options = field(default_factory=Options)
    passes: int | None = None
    interval_seconds: float | None = None
    full_scan_seconds: float | None = None
    order_known: bool = False


@dataclass(slots=True)
class Scan:
    """A finished scan: the fields of the JSON, and the pages as arrays."""

    kernel: str
    tunables: dict[str, int | str]
    pages: Pages
    groups: Groups
    prediction: Prediction
    rules: Rules
    tally: Tally
    seed: int
    seconds: float
    interval_seconds: float
    full_scan_seconds: float
    passes: int
    scope: str
    pagemap_scan: bool
    looks_seconds: list[float] = field(default_factory=list)
    """When each look began, after the first."""
    extrapolated: bool = False
    """Whether the steady state lies beyond the last look."""
    drifting: bool | None = None
    """Whether the memory is still changing its nature; None where one look can't know."""
    overstated_most_pages: int | None = None
    """So many of `pages_sharing`, at the most, are not shared any more at any moment."""
    smart_scan: SmartScan | None = None
    """The outcome with smart scan on; None where this kernel has no smart scan."""

    @property
    def complete(self) -> bool:
        """Whether nothing chosen was left out."""
        return not self.pages.skipped and not self.tally.unread_pages

    @property
    def scanned_pages(self) -> int:
        """Mappings of pages there at the last look."""
        return int(self.pages.present.sum())


def full_scan_seconds(rmap_items: int, tunables: dict[str, int | str]) -> float:
    """Time of ksmd's sleeps in a full scan at these tunables; its own work comes on top.

    Source: mm/ksm.c, ksm_scan_thread(): a batch of `pages_to_scan`, then a sleep of whole ticks,
    and one tick more.
    """
    batch = int(tunables.get("pages_to_scan", 100)) or 1
    sleep = int(tunables.get("sleep_millisecs", 20)) / 1000
    tick = time.clock_getres(CLOCK_MONOTONIC_COARSE)
    return (rmap_items // batch + 1) * (math.ceil(sleep / tick) + 1 if sleep else 0) * tick


def scan_pids(pids: Sequence[int], plan: Plan | None = None) -> Scan:
    """Scan live processes.

    Raises
    ------
    NoSuchProcess, NoMemory, NotPermitted, ProcessGone
        The only process chosen, or all of them, can't be scanned; where some can, the others are
        in `Scan.pages.skipped`.
    """
    plan = plan or Plan()
    return _run(LiveSource(list(pids), plan.options), plan)


def scan_spans(spans: Sequence[Span], plan: Plan | None = None) -> Scan:
    """Scan pieces of our own memory, hashed where they lie; each page once."""
    plan = plan or Plan()
    apart: list[Span] = []
    for span in sorted(spans, key=lambda s: s.start):
        end = apart[-1].start + apart[-1].length if apart else 0
        start = max(span.start, end)
        if start < span.start + span.length:
            apart.append(Span(start, span.start + span.length - start))
    return _run(LiveSource([os.getpid()], plan.options, spans=apart), plan)


def choose(choice: processes.Choice) -> list[int]:
    """Pids of a choice.

    Raises
    ------
    Usage
        Nothing is chosen.
    NoSuchProcess
    """
    if not choice:
        raise Usage(
            "nothing chosen to scan",
            "name processes: `dedup scan --pid 1234`, `--name 'redis*'`, `--user www-data`, "
            "`--all`",
        )
    return processes.choose(choice)


def _tunables() -> dict[str, int | str]:
    ksm = Ksm()
    try:
        return ksm.tunables()
    except Unsupported:
        return {}  # no KSM here: the prediction is for a kernel with the defaults


def rules_of(tunables: dict[str, int | str], *, order_known: bool = False) -> Rules:
    """The rules that the tunables make."""
    return merge.Rules(
        max_page_sharing=int(tunables.get("max_page_sharing", 256)),
        use_zero_pages=bool(tunables.get("use_zero_pages", 0)),
        order_known=order_known,
    )


def _run(source: LiveSource, plan: Plan) -> Scan:
    if plan.passes is not None and plan.passes < 1:
        raise Usage("--passes takes a number from 1 on")
    return _Looking(source, plan).run()


@dataclass(slots=True)
class _Pace:
    """ksmd's own pace, where it runs while we look."""

    ksm: Ksm = field(default_factory=Ksm)
    running: bool = False
    began: float = 0.0
    scanned: int = 0

    def start(self) -> None:
        """Begin to watch."""
        self.running = self.ksm.running
        if self.running:
            self.began, self.scanned = time.monotonic(), self.ksm.counters().pages_scanned

    def full_scan_seconds(self, pages: int) -> float | None:
        """Time of a full scan over so many pages; None where it can't be told (yet)."""
        if not self.running:
            return None
        now, elapsed = self.ksm.counters(), time.monotonic() - self.began
        batch = int(self.ksm.tunables().get("pages_to_scan", 100)) or 1
        scanned = now.pages_scanned - self.scanned
        # With less work than a batch, its sleeps decide: another load has another pace.
        if now.rmap_items < min(pages / 2, 4 * batch) or scanned < PACE_BATCHES * batch:
            return None
        return pages * elapsed / scanned if elapsed >= PACE_SECONDS else None


@dataclass(slots=True)
class _Looking:
    """The looks of one scan, and what they give together."""

    source: LiveSource
    plan: Plan
    tunables: dict[str, int | str] = field(default_factory=_tunables)
    rules: Rules = field(init=False)
    pace: _Pace = field(default_factory=_Pace)
    began: list[float] = field(default_factory=list)
    full_scan: float = 0.0
    alone: list[Prediction] = field(default_factory=list)
    """By one look alone: the first, then the last."""
    predictions: list[Prediction] = field(default_factory=list)
    """Without what changed until each later look."""
    groups: Groups = field(init=False)

    def run(self) -> Scan:
        begin = time.monotonic()
        self.rules = rules_of(self.tunables, order_known=self.plan.order_known)
        self.pace.start()
        self.began.append(begin)
        pages = self.source.first_look()
        self.full_scan = self._full_scan()
        extrapolated = False
        if self.plan.passes == 1:
            self._predict(pages)
        else:
            extrapolated = self._look_on(pages)
        drifts = self._drifts(pages) if len(self.began) > 1 else None
        prediction = self._steady(pages) if extrapolated else self.predictions[-1]
        if drifts:
            prediction = steady.seen([*self.alone, *self.predictions])
        return Scan(
            kernel=platform.release(),
            tunables=self.tunables,
            pages=pages,
            groups=self.groups,
            prediction=prediction,
            rules=self.rules,
            tally=self.source.tally,
            seed=self.source.seed,
            seconds=time.monotonic() - begin,
            interval_seconds=max(
                (b - a for a, b in zip(self.began, self.began[1:], strict=False)), default=0.0
            ),
            full_scan_seconds=self.full_scan,
            passes=len(self.began),
            scope=self.plan.options.scope,
            pagemap_scan=self.source.sight.pagemap_scan,
            looks_seconds=[t - begin for t in self.began],
            extrapolated=extrapolated,
            drifting=drifts,
            overstated_most_pages=self._overstated(prediction) if drifts is False else None,
            smart_scan=self._smart(pages, prediction),
        )

    def _look_on(self, pages: Pages) -> bool:
        """Look again until ksmd's steady state shows; whether it lies beyond the last look."""
        # In the time until the next look: what this one alone says.
        self.alone.append(self._snapshot(pages, first=True))
        if self.plan.passes is not None or self.plan.interval_seconds is not None:
            interval = self.plan.interval_seconds
            if interval is None:
                interval = min(steady.INTERVAL_MOST_SECONDS, self._steady_seconds())
            for _ in range((self.plan.passes or 2) - 1):
                self._look_after(self.began[-1] + interval)
            self._predict(pages)
            return False
        if self.pace.running and self.plan.full_scan_seconds is None:
            self._wait_until(self.began[0] + PACE_SECONDS)
            self.full_scan = self._full_scan()
        self._look_after(self.began[0] + steady.looks(self.full_scan).at[1])
        self._predict(pages)
        distance = self.began[1] - self.began[0]
        if distance >= self._steady_seconds() * ENOUGH:
            return False
        self._look_after(self.began[0] + THIRD_LOOK * distance)
        self._predict(pages)
        return self.began[2] - self.began[0] < self._steady_seconds()

    def _steady_seconds(self) -> float:
        return max(steady.INTERVAL_LEAST_SECONDS, steady.STEADY_FACTOR * self.full_scan)

    def _look_after(self, moment: float) -> None:
        self._wait_until(moment)
        self.began.append(time.monotonic())
        self.source.look_again()

    def _wait_until(self, moment: float) -> None:
        wait_until(moment, self.plan.options.progress)

    def _full_scan(self) -> float:
        if self.plan.full_scan_seconds is not None:
            return self.plan.full_scan_seconds
        pages = self.source.pages
        assert pages is not None
        ours = sum(p.ksm_rmap_items for p in pages.processes)
        others = 0
        if self.pace.ksm.present:
            others = max(0, self.pace.ksm.counters().rmap_items - ours)
        total = len(pages.hashes) + others
        return self.pace.full_scan_seconds(total) or full_scan_seconds(total, self.tunables)

    def _snapshot(self, pages: Pages, *, first: bool = False) -> Prediction:
        """What one look says: as if nothing had changed since the one before."""
        frames = pages.frames if first else pages.frames & ~(Flag.VOLATILE | Flag.NEW)
        view = replace(pages, frames=frames, looks=2)
        groups = grouping.group(view, self.source.tally.threads)
        return merge.predict(view, groups, self.rules)

    def _predict(self, pages: Pages) -> None:
        self.groups = grouping.group(pages, self.source.tally.threads)
        mark_outside(pages, self.groups, self.source.sight)
        self.predictions.append(merge.predict(pages, self.groups, self.rules))

    def _drifts(self, pages: Pages) -> bool:
        """Whether what one look says has moved since the first."""
        word = pages.frames & (Flag.VOLATILE | Flag.NEW | Flag.GONE)
        changed = int(np.count_nonzero(word))
        before = steady.merged(self.alone[0])
        if changed <= steady.DRIFT_SHARE * before:
            return False
        self.alone.append(self._snapshot(pages))
        return steady.drifting(before, steady.merged(self.alone[-1]), changed)

    def _steady(self, pages: Pages) -> Prediction:
        second, third = self.predictions
        if not np.any(pages.frames & (Flag.VOLATILE | Flag.NEW | Flag.GONE)):
            return third
        unit = self.began[1] - self.began[0]
        return steady.extrapolate(
            (self.alone[0], second, third),
            (self.began[2] - self.began[0]) / unit,
            self._steady_seconds() / unit,
            pages.page_size,
        )

    def _smart(self, pages: Pages, prediction: Prediction) -> SmartScan | None:
        if self.tunables and "smart_scan" not in self.tunables:
            return None
        threads = self.source.tally.threads
        found = smart.forecast(
            pages, self.groups, self.rules, prediction, lambda p: grouping.group(p, threads)
        )
        if not self.alone:
            return found
        # Unmerged, a page is visited every ninth scan: it has to last for so much longer.
        at_once = steady.merged(self.alone[0])
        last = steady.merged(self.predictions[-1])
        times = max(1.0, smart.PERIOD * self._steady_seconds() / self.began[-1])
        return smart.slowed(found, (last / at_once) ** times if at_once else 1.0, pages.page_size)

    def _overstated(self, prediction: Prediction) -> int:
        lost = steady.overstated(
            steady.merged(self.alone[0]),
            steady.merged(self.predictions[-1]),
            self.began[-1] - self.began[0],
            self.full_scan,
        )
        return round(min(lost, steady.merged(prediction)))
