"""One scan from end to end: looks, groups, prediction."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup import calibration, grouping
from dedup.errors import Unsupported, Usage
from dedup.kernel import ksmd, pagemap, processes, shortage
from dedup.kernel.ksm import Ksm
from dedup.model import cost, merge, smart, steady
from dedup.model.prediction import Rules
from dedup.pages import Flag
from dedup.sources import stored
from dedup.sources.live import LiveSource, Options, Span, mark_outside, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dedup.kernel.memory import Tally
    from dedup.model.cost import Cost
    from dedup.model.prediction import Prediction
    from dedup.model.smart import SmartScan
    from dedup.pages import Bool, Groups, Pages

PACE_SECONDS: Final = 0.3
PACE_BATCHES: Final = 8
"""So long, and so many batches, ksmd is watched before its own pace counts."""
CONFIRMING_LOOKS: Final = 2
CONFIRMING_PART: Final = 3
"""Looks that confirm a drift, and the part of the time looked at that lies before each."""
ENOUGH: Final = 0.95
"""A look this near to the steady state's time is as good as one at it."""
PROPOSED_PAGES_TO_SCAN: Final = (1000, 5000, 20_000)
"""Batches whose price is told besides that of the present one."""
DEFAULT_PAGES_TO_SCAN: Final = 100
ASSUMABLE: Final = {
    "max_page_sharing": (2, (1 << 31) - 1),
    "use_zero_pages": (0, 1),
    "merge_across_nodes": (0, 1),
    "pages_to_scan": (1, (1 << 32) - 1),
    "sleep_millisecs": (0, (1 << 32) - 1),
    "smart_scan": (0, 1),
}
"""Tunables for whose other values a scan can be made, with the lowest and the highest."""


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
    interval_most_seconds : float, optional
        Where it comes from ksmd's full scan, no more than this; there is no third look then.
    full_scan_seconds : float, optional
        ksmd's full scan, where other tunables than the present ones are intended.
    order_known : bool
        ksmd comes by the processes in the order given.
    assumed : mapping of str to int
        Tunables (`ASSUMABLE`) that the prediction is for, in place of the present ones.
    partial_passes : bool
        Looks after the first read only the pages that savings depend on by then.
    """

    options: Options = field(default_factory=Options)
    passes: int | None = None
    interval_seconds: float | None = None
    interval_most_seconds: float | None = None
    full_scan_seconds: float | None = None
    order_known: bool = False
    assumed: Mapping[str, int] = field(default_factory=dict)
    partial_passes: bool = False


@dataclass(frozen=True, slots=True)
class Proposal:
    """The price with other tunables."""

    tunables: dict[str, int]
    cost: Cost


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
    """Whether the memory is still changing its nature.

    None where that can't be known: after one look, after looks that read only what would merge (new
    copies make up for lost ones, and are not seen), or where a process ended between looks.
    """
    overstated_most_pages: int | None = None
    """So many of `pages_sharing`, at the most, are not shared any more at any moment."""
    load: cost.Load | None = None
    """What ksmd has to do: the price comes from it."""
    cost: Cost | None = None
    """The price, at the present tunables or the assumed ones."""
    proposals: list[Proposal] = field(default_factory=list)
    """The price at other paces."""
    why_uncalibrated: str = ""
    """Why a calibration that is there can't be used."""
    assumed: dict[str, int] = field(default_factory=dict)
    """Tunables that the prediction is for, where they are not those of the host."""
    smart_scan: SmartScan | None = None
    """The outcome with smart scan on; None where this kernel has no smart scan."""
    read_again_pages: int | None = None
    """Pages that looks after the first read: those that savings depend on; None: everything.

    Then `pages_unshared` and `pages_volatile` are not known but for their bounds; the price, and
    what becomes of each page, take those that were not read again for steady.
    """

    @property
    def complete(self) -> bool:
        """Whether nothing chosen was left out."""
        return not any(s.amiss for s in self.pages.skipped) and not self.tally.unread_pages

    @property
    def scanned_pages(self) -> int:
        """Mappings of pages there at the last look."""
        return self.groups.census.of(Flag.GONE | Flag.UNREAD)


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


def scan_files(
    named: Sequence[tuple[str, str]], pids: Sequence[int] = (), plan: Plan | None = None
) -> Scan:
    """Scan memory in files, together with live processes where there are any.

    Parameters
    ----------
    named : sequence of (kind, path)
        `core`, `image` or `criu` each.
    pids : sequence of int
    plan : Plan, optional
        Files are looked at once: `passes` is for the processes.

    Raises
    ------
    BadInput, NotPermitted, Unsupported
        A file can't be read or is not what it should be.
    Usage
        Something is asked for that files don't tell.
    NoSuchProcess, NoMemory, ProcessGone
        As `scan_pids`.
    """
    plan = plan or Plan()
    if not pids:
        if plan.passes is not None and plan.passes > 1:
            raise Usage(
                "a file is the memory of one moment: there is no second look at it",
                "leave --passes out",
            )
        if plan.partial_passes:
            raise Usage(
                "--partial-passes is about looks after the first, and files are looked at once",
                "leave it out",
            )
        plan = replace(plan, passes=1)
    untold = [kind for kind, _ in named if kind != "criu"]
    if plan.options.scope == "advised" and untold:
        raise Usage(
            f"--scope advised does not go with --{untold[0]}: such a file does not tell which "
            "mappings are marked mergeable",
            "leave --scope out",
        )
    sources = stored.open_all(named, pagemap.sight().page_size)
    try:
        return _run(LiveSource(list(pids), plan.options, sources=sources), plan)
    finally:
        for source in sources:
            source.close()


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


def tunables() -> dict[str, int | str]:
    """The host's tunables; none where its kernel has no KSM."""
    ksm = Ksm()
    try:
        return ksm.tunables()
    except Unsupported:
        return {}  # no KSM here: the prediction is for a kernel with the defaults


def rules_of(tunables: dict[str, int | str], *, order_known: bool = False) -> Rules:
    """The rules that the tunables make."""
    return Rules(
        max_page_sharing=int(tunables.get("max_page_sharing", 256)),
        use_zero_pages=bool(tunables.get("use_zero_pages", 0)),
        order_known=order_known,
        merge_across_nodes=bool(tunables.get("merge_across_nodes", 1)),
    )


def _run(source: LiveSource, plan: Plan) -> Scan:
    if plan.passes is not None and plan.passes < 1:
        raise Usage("--passes takes a number from 1 on")
    if plan.partial_passes and plan.passes == 1:
        raise Usage(
            "--partial-passes is about looks after the first, and --passes 1 takes no other",
            "leave out one of them",
        )
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
    tunables: dict[str, int | str] = field(default_factory=tunables)
    """The host's."""
    calibrated: calibration.Stored = field(default_factory=calibration.load)
    rules: Rules = field(init=False)
    pace: _Pace = field(default_factory=_Pace)
    began: list[float] = field(default_factory=list)
    full_scan: float = 0.0
    alone: list[Prediction] = field(default_factory=list)
    """By one look alone: the first, then the last."""
    predictions: list[Prediction] = field(default_factory=list)
    """Without what changed until each later look."""
    groups: Groups = field(init=False)
    only: Bool | None = None
    """Pages of the first look that the later ones read; None: everything."""

    @shortage.needed("group the pages and predict what merges")
    def run(self) -> Scan:
        begin = time.monotonic()
        self.rules = rules_of(self._assumed(), order_known=self.plan.order_known)
        self.pace.start()
        self.began.append(begin)
        pages = self.source.first_look()
        extrapolated = False
        if self.plan.passes == 1:
            self._predict(pages)
            load = self._load(pages, self.predictions[0])
            self.full_scan = self._full_scan(load)
        else:
            # In the time until the next look: what this one alone says.
            self.alone.append(self._snapshot(pages))
            if self.plan.partial_passes:
                self.only = merge.matter(pages)
                self.only[self.source.in_files] = False
            load = self._load(pages, self.alone[0])
            self.full_scan = self._full_scan(load)
            extrapolated = self._look_on(pages, load)
            self.source.require_any()
        drifts = None
        if len(self.began) > 1 and not self.source.lost_any and self.only is None:
            # What the result is made of, before more looks are taken.
            pages = self._kept_apart(pages)
            drifts = self._drifts(pages)
        prediction = self._steady(pages) if extrapolated else self.predictions[-1]
        if self.source.lost_any and not self._reached():
            prediction = steady.at_the_most(prediction, self._share_kept(pages), pages.page_size)
        if drifts:
            prediction = steady.seen([*self.alone, *self.predictions])
        if len(self.began) > 1:
            load = self._load(pages, prediction)
        return Scan(
            kernel=platform.release(),
            tunables=self.tunables,
            pages=pages,
            groups=self.groups,
            prediction=self._told(pages, prediction),
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
            overstated_most_pages=self._overstated(prediction, drifts=drifts),
            load=load,
            cost=self._price(load),
            proposals=self._proposals(load),
            why_uncalibrated=self.calibrated.why,
            assumed=dict(self.plan.assumed),
            smart_scan=self._smart(pages, prediction, drifts=bool(drifts)),
            read_again_pages=None if self.only is None else int(np.count_nonzero(self.only)),
        )

    def _told(self, pages: Pages, prediction: Prediction) -> Prediction:
        """The prediction, without what can't be known of pages that were not read again."""
        if self.only is None:
            return prediction
        unread = pages.present[: len(self.only)] & ~self.only
        unread[self.source.in_files] = False
        return steady.not_read_again(prediction, int(np.count_nonzero(unread)))

    def _look_on(self, pages: Pages, load: cost.Load) -> bool:
        """Look again until ksmd's steady state shows; whether it lies beyond the last look."""
        if self._asked():
            interval = self.plan.interval_seconds
            if interval is None:
                most = self.plan.interval_most_seconds or steady.INTERVAL_MOST_SECONDS
                interval = min(steady.INTERVAL_MOST_SECONDS, most, self._steady_seconds())
            for _ in range((self.plan.passes or 2) - 1):
                self._look_after(self.began[-1] + interval)
            self._predict(pages)
            return False
        if self.pace.running and self.plan.full_scan_seconds is None:
            self._wait_until(self.began[0] + PACE_SECONDS)
            self.full_scan = self._full_scan(load)
        looks = steady.looks(self.full_scan)
        self._look_after(self.began[0] + looks.at[1])
        self._predict(pages)
        distance = self.began[1] - self.began[0]
        if distance >= self._steady_seconds() * ENOUGH:
            return False
        # As far away as a look took, where that is longer than it was meant to be.
        third = max(looks.at[-1], steady.THIRD_LOOK * distance)
        self._look_after(self.began[0] + min(third, max(self._steady_seconds(), looks.at[-1])))
        self._predict(pages)
        # With a process the less, what the first look said is of other memory.
        return not self._reached() and not self.source.lost_any

    def _asked(self) -> bool:
        """Whether the number of looks or their distance is not for us to choose."""
        plan = self.plan
        return (plan.passes, plan.interval_seconds, plan.interval_most_seconds) != (None,) * 3

    def _reached(self) -> bool:
        """Whether the last look was late enough to show the steady state, or as was asked for."""
        return self._asked() or self.began[-1] - self.began[0] >= self._steady_seconds() * ENOUGH

    def _share_kept(self, pages: Pages) -> float:
        """Pages that keep their content until the steady state, at the least, of those here."""
        there = pages.present
        if self.only is not None:
            there = there[: len(self.only)] & self.only
        present = int(np.count_nonzero(there))
        changed = int(np.count_nonzero((pages.frames[: len(there)][there] & Flag.VOLATILE) != 0))
        times = self._steady_seconds() / (self.began[-1] - self.began[0])
        return float((1 - changed / present) ** (times - 1)) if present else 1.0

    def _steady_seconds(self) -> float:
        return max(steady.INTERVAL_LEAST_SECONDS, steady.STEADY_FACTOR * self.full_scan)

    def _look_after(self, moment: float) -> None:
        self._wait_until(moment)
        self.began.append(time.monotonic())
        self.source.look_again(self.only)

    def _wait_until(self, moment: float) -> None:
        wait_until(moment, self.plan.options.progress)

    def _assumed(self) -> dict[str, int | str]:
        return {**self.tunables, **self.plan.assumed}

    def _full_scan(self, load: cost.Load) -> float:
        """Time of ksmd's full scan: asked for, seen while it runs, or its price."""
        if self.plan.full_scan_seconds is not None:
            return self.plan.full_scan_seconds
        seen = None
        if not self.plan.assumed:
            total = sum(p.ksm_rmap_items for p in self._pages.processes)
            seen = self.pace.full_scan_seconds(len(self._pages.hashes) + self._others(total))
        if seen is not None:
            return seen
        # Predictions are for smart scan off.
        price = self._price(load, smart_scan=0)
        # A ksmd that scans nothing has no time of its own: that of the kernel's default.
        price = price or self._price(load, smart_scan=0, pages_to_scan=DEFAULT_PAGES_TO_SCAN)
        assert price is not None
        return price.full_scan_seconds

    @property
    def _pages(self) -> Pages:
        assert self.source.pages is not None
        return self.source.pages

    def _others(self, ours: int) -> int:
        """Pages that ksmd follows besides, as it counts them now."""
        if not self.pace.ksm.present:
            return 0
        return max(0, self.pace.ksm.counters().rmap_items - ours)

    @staticmethod
    def _kept_apart(pages: Pages) -> Pages:
        """A view of the pages that later looks leave as it is, but for the arrays in place."""
        return replace(
            pages,
            regions=list(pages.regions),
            processes=list(pages.processes),
            skipped=list(pages.skipped),
        )

    def _load(self, pages: Pages, prediction: Prediction) -> cost.Load:
        """What ksmd has to do."""
        ours = sum(p.ksm_rmap_items for p in pages.processes)
        return cost.load_of(pages, self.groups, prediction, self._others(ours))

    def _price(self, load: cost.Load, **other: int) -> Cost | None:
        """What it costs, with other tunables than the assumed ones, too.

        None where ksmd scans nothing (`pages_to_scan` 0).
        """
        settings = cost.Settings.of({**self._assumed(), **other}, ksmd.tick_seconds())
        if not settings.pages_to_scan:
            return None
        return cost.price(load, settings, self.calibrated.calibration)

    def _proposals(self, load: cost.Load) -> list[Proposal]:
        present = int(self._assumed().get("pages_to_scan", 0))
        return [
            Proposal({"pages_to_scan": n}, price)
            for n in PROPOSED_PAGES_TO_SCAN
            if n > present and (price := self._price(load, pages_to_scan=n)) is not None
        ]

    def _snapshot(self, pages: Pages) -> Prediction:
        """What one look says: as if nothing had changed since the one before."""
        changed = Flag.VOLATILE | Flag.NEW
        # A copy only where it is one: it takes 8 bytes a page.
        frames = pages.frames & ~changed if pages.looks > 1 else pages.frames
        view = replace(pages, frames=frames, looks=2)
        groups = grouping.group(view, self.source.tally.threads)
        if pages.looks == 1:
            self.groups = groups
        return merge.predict(view, groups, self.rules)

    def _predict(self, pages: Pages) -> None:
        self.groups = grouping.group(pages, self.source.tally.threads)
        mark_outside(pages, self.groups, self.source.sight, self.source.tally.threads)
        found = merge.predict(pages, self.groups, self.rules)
        untouched = stored.without_zeros(pages)
        if untouched is not None:
            # A file can't tell zeros from memory that was never touched: somewhere in between.
            groups = grouping.group(untouched, self.source.tally.threads)
            found = steady.seen([merge.predict(untouched, groups, self.rules), found])
        self.predictions.append(found)

    def _drifts(self, pages: Pages) -> bool:
        """Whether what one look says has moved since the first, and stays so.

        Pages that are written to in step are equal in one moment and not in the next. So, where it
        has moved, two more looks must say the same.
        """
        word = pages.frames & (Flag.VOLATILE | Flag.NEW | Flag.GONE)
        changed = int(np.count_nonzero(word))
        before = steady.merged(self.alone[0])
        if changed <= steady.DRIFT_SHARE * before:
            return False
        side = 0.0
        interval = (self.began[-1] - self.began[0]) / CONFIRMING_PART
        for more in range(1 + CONFIRMING_LOOKS):
            if more == 1:
                # Later looks write in place.
                pages.hashes, pages.frames = pages.hashes.copy(), pages.frames.copy()
            if more:
                wait_until(time.monotonic() + interval, self.plan.options.progress)
                self.source.look_again()
            if self.source.lost_any:
                return False
            self.alone.append(self._snapshot(self._pages))
            moved = steady.merged(self.alone[-1]) - before
            if not steady.drifting(before, before + moved, changed) or moved * side < 0:
                return False
            side = moved
        return True

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

    def _smart(self, pages: Pages, prediction: Prediction, *, drifts: bool) -> SmartScan | None:
        if self.tunables and "smart_scan" not in self.tunables:
            return None
        threads = self.source.tally.threads
        found = smart.forecast(
            pages, self.groups, self.rules, prediction, lambda p: grouping.group(p, threads)
        )
        if not self.alone or self.source.lost_any or drifts:
            return found
        # Unmerged, a page is visited every ninth scan: it has to last for so much longer.
        at_once = steady.merged(self.alone[0])
        last = steady.merged(self.predictions[-1])
        times = max(1.0, smart.PERIOD * self._steady_seconds() / self.began[-1])
        kept = min(1.0, last / at_once) if at_once else 1.0
        return smart.slowed(found, kept**times, pages.page_size)

    def _overstated(self, prediction: Prediction, *, drifts: bool | None) -> int | None:
        # By pages that merged at the first look alone, which are read again in any case.
        known = drifts is False or (self.only is not None and not self.source.lost_any)
        if not known:
            return None
        lost = steady.overstated(
            steady.merged(self.alone[0]),
            steady.merged(self.predictions[-1]),
            self.began[-1] - self.began[0],
            self.full_scan,
        )
        return round(min(lost, steady.merged(prediction)))
