"""A scan within a budget of memory: everything where that fits, else a sample by content."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup import sampling, scanning
from dedup.errors import NoSuchProcess, NotPermitted, Refused, Usage
from dedup.estimate import content
from dedup.kernel import memory, pagemap, processes, shortage
from dedup.pages import Flag
from dedup.sources.live import LiveSource, mark_outside

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.estimate.content import Stock
    from dedup.estimate.sampled import Present
    from dedup.kernel.pagemap import Sight
    from dedup.pages import U64, Groups, Pages
    from dedup.sampling import Sampled
    from dedup.scanning import Plan, Scan

FIXED_BYTES: Final = 16 << 20
"""Of a scan, for all that goes neither by pages nor by threads: modules, the model's tables."""
THREAD_BYTES: Final = 5 << 19
"""Of each reading thread: its buffer and stack."""
MAPPING_BYTES: Final = 2600
"""Of each mapping: what smaps says of it, and its region."""
PROCESS_BYTES: Final = 8 << 10
SIMPLE_BYTES: Final = 40
"""Of a page in a full scan, where its frame and the number of copies decide (`_simple`)."""
PAGE_BYTES: Final = 240
"""Of any other, at the most: each of them has a copy, and its content is one of few."""
KEPT_BYTES: Final = 90
ALONE_BYTES: Final = 70
"""Of a page of a sample, and more of it where its neighbours are not in the sample, so that it is a
run by itself."""
LEAST_PAGES: Final = 20_000
"""Of a sample: with fewer nothing useful follows."""
PILOT_PAGES: Final = 1 << 16
PILOT_RATE_MOST: Final = 0.2
MARGIN: Final = 0.8
"""Of the room, what is expected to be kept."""
FRAMES_PART: Final = 4
"""A content is in the sample this much more often than another page is kept by its frame."""
TRIES: Final = 6
ROUNDS: Final = 30
MIB: Final = 1 << 20
SPARE_MIB: Final = 2


@dataclass(frozen=True, slots=True)
class _Need:
    """What a scan takes, in bytes."""

    fixed: int
    pages: int

    @property
    def everything(self) -> int:
        """For all pages, at the most."""
        return self.fixed + self.pages * PAGE_BYTES

    @property
    def least(self) -> int:
        """With the smallest sample, and the pilot."""
        pilot = min(PILOT_PAGES, int(self.pages * PILOT_RATE_MOST))
        return self.fixed + (LEAST_PAGES + pilot) * (KEPT_BYTES + ALONE_BYTES)


@shortage.needed("estimate from a sample")
def scan_pids(
    pids: Sequence[int],
    memory_bytes: int,
    plan: Plan | None = None,
    *,
    own_bytes: int = 0,
    whole: str = "",
) -> Scan | Sampled:
    """Scan live processes within a budget of memory.

    Parameters
    ----------
    pids : sequence of int
    memory_bytes : int
        The budget.
    plan : Plan, optional
    own_bytes : int
        What of the budget this process has taken already.
    whole : str
        An option, if any, that needs everything to be kept.

    Raises
    ------
    Usage
        Not even the smallest sample fits, or `whole` is wanted and everything does not.
    Refused
        A sample can't tell what is asked for.
    NoSuchProcess, NoMemory, NotPermitted, ProcessGone
        As `dedup.scanning.scan_pids`.
    """
    plan = plan or scanning.Plan()
    if plan.passes is not None and plan.passes < 1:
        raise Usage("--passes takes a number from 1 on")
    begin = time.monotonic()
    sight = pagemap.sight()
    threads = plan.options.threads or memory.default_threads()
    need = _need(pids, sight, threads)
    room = memory_bytes - own_bytes
    if need.everything <= room:
        return scanning.scan_pids(pids, plan)
    _require(need, room, own_bytes)
    pilot = _Pilot.of(pids, plan)
    fixed = max(need.fixed, _fixed(threads, pilot.mappings, pilot.processes))
    if fixed + pilot.full_bytes() <= room:
        return scanning.scan_pids(pids, plan)
    _require(replace(need, fixed=fixed), room, own_bytes)
    if whole or plan.partial_passes:
        words = whole or "--partial-passes"
        everything = _told(need.everything + own_bytes)
        raise Usage(
            f"{words} needs all pages to be kept, and they do not fit into {size(memory_bytes)}",
            f"`--memory {everything}M`, or leave out `{words}`",
        )
    return _Sample(pids, plan, memory_bytes, begin).run(pilot, _room(room - fixed, pilot.present))


def _require(need: _Need, room: int, own_bytes: int) -> None:
    if need.least > room:
        raise Usage(
            f"{size(room + own_bytes)} is too little memory for this scan, even for a sample",
            f"`--memory {_told(need.least + own_bytes)}M` at the least",
        )


def _told(least_bytes: int) -> int:
    """MiB that still do when the command is typed anew, and its own memory differs a little."""
    return math.ceil(least_bytes / MIB) + SPARE_MIB


def _room(size_bytes: int, present: int) -> int:
    """How many of the pages present may be kept in so much memory."""
    pages = 0.0
    # The more are kept, the fewer are alone. It rises to the answer, and is below it on its way.
    for _ in range(ROUNDS):
        alone = 1 - min(1.0, pages / max(1, present))
        pages = size_bytes / (KEPT_BYTES + ALONE_BYTES * alone)
    return int(pages)


def size(n: int) -> str:
    """For people, as `--memory` takes it."""
    for unit, name in ((MIB << 10, "G"), (MIB, "M"), (1 << 10, "K")):
        if n >= unit:
            return f"{n / unit:.4g}{name}"
    return str(n)


def _fixed(threads: int, mappings: int, count: int) -> int:
    return FIXED_BYTES + threads * THREAD_BYTES + mappings * MAPPING_BYTES + count * PROCESS_BYTES


def _need(pids: Sequence[int], sight: Sight, threads: int) -> _Need:
    pages = mappings = 0
    for pid in pids:
        try:
            with processes.of_process(pid) as handle:
                pages += handle.info.anonymous_bytes // sight.page_size
                mappings += handle.read("maps").count(b"\n")
        except (NoSuchProcess, NotPermitted):
            continue
    fixed = _fixed(threads, mappings, len(pids))
    return _Need(fixed, pages)


@dataclass(frozen=True, slots=True)
class _Pilot:
    """A small sample of the frames: what is there, and which contents are there very often."""

    mappings: int
    processes: int
    pinned: bool
    seed: int
    present: int
    simple: int
    """Pages that the model needs no array of its own for."""
    told: content.Pilot
    rest: float
    """Part of the pages that has other contents."""

    @classmethod
    def of(cls, pids: Sequence[int], plan: Plan) -> _Pilot:
        sight = pagemap.sight()
        expected = 1
        for pid in pids:
            try:
                with processes.of_process(pid) as handle:
                    expected += handle.info.anonymous_bytes // sight.page_size
            except NoSuchProcess:
                continue
        rate = min(PILOT_RATE_MOST, PILOT_PAGES / expected)
        source = LiveSource(list(pids), replace(plan.options, sample=rate))
        pages = source.first_look()
        found = sampling.present_of(source)
        there = (pages.frames & Flag.UNREAD) == 0
        zero = memory.zero_hash(sight.page_size, source.seed)
        told = content.Pilot.of(pages.hashes[there], zero, rate)
        some = np.isin(pages.hashes[there], told.counted)
        pinned = any(p.pinned_bytes for p in pages.processes)
        return cls(
            len(pages.regions),
            len(pages.processes),
            pinned,
            source.seed,
            found.pages,
            _simple(pages, found, plan, zero),
            told,
            1 - float(some.mean()) if len(some) else 1.0,
        )

    def full_bytes(self) -> int:
        """What all pages take in a full scan, at the most."""
        return self.simple * SIMPLE_BYTES + (self.present - self.simple) * PAGE_BYTES


def _simple(pages: Pages, found: Present, plan: Plan, zero: int) -> int:
    """How many of the pages found the model needs no array of its own for.

    Of several processes that is mostly all of them or none (`dedup.model.merge`).
    """
    if not pages.frames_known:
        return 0
    if len(pages.processes) == 1:
        return max(0, found.exclusive - found.ksm)
    rules = scanning.rules_of({**scanning.tunables(), **plan.assumed})
    apart = not rules.merge_across_nodes and pages.nodes is not None
    pinned = any(p.pinned_bytes for p in pages.processes)
    locked = any("lo" in r.vm_flags for r in pages.regions)
    if plan.order_known or rules.use_zero_pages or apart or pinned or locked or found.ksm:
        return 0
    if not found.huge:
        return found.pages
    # Beside all-zero pages in huge pages, what becomes of the small ones takes a closer look.
    there = (pages.frames & Flag.UNREAD) == 0
    beside = there & (pages.hashes == zero) & ((pages.frames & Flag.THP) == 0)
    part = int(np.count_nonzero(beside)) / max(1, int(np.count_nonzero(there)))
    return int(found.pages * (1 - part))


@dataclass(slots=True)
class _Sample:
    pids: Sequence[int]
    plan: Plan
    memory_bytes: int
    begin: float

    def run(self, pilot: _Pilot, room: int) -> Sampled:
        plan = self.plan
        tunables = scanning.tunables()
        assumed = {**tunables, **plan.assumed}
        rules = scanning.rules_of(assumed)
        sampling.refuse_nodes(rules, "leave out `--memory`, or give more")
        sampling.refuse_pinned(
            "leave out `--memory`, give more, or leave out that process", pinned=pilot.pinned
        )
        rate = min(1.0, MARGIN * room / pilot.present / (pilot.rest + 1 / FRAMES_PART))
        told, seed = pilot.told, pilot.seed
        source, rate, first = self._first_look(told.counted, seed, rate, room)
        stock = self._stock(source, told, rate)
        full_scan = plan.full_scan_seconds or sampling.full_scan_of(stock.present.pages, assumed)
        began = sampling.look_on(source, plan, first, full_scan)
        pages, sight = source.pages, source.sight
        assert pages is not None

        def mark(some: Pages, groups: Groups) -> None:
            mark_outside(some, groups, sight)

        estimate = content.estimate(
            pages,
            stock,
            sampling.present_of(source),
            sampling.by_process_of(source),
            rules,
            mark if sight.kpagecount else None,
            pagemap.mappings_of if sight.kpagecount else None,
        )
        return sampling.result_of(
            source, plan, estimate, rules, tunables, rate=rate, began=began, full_scan=full_scan,
            seconds=time.monotonic() - self.begin, memory_bytes=self.memory_bytes,
            frame_rate=stock.frame_rate,
        )  # fmt: skip

    def _first_look(
        self, counted: U64, seed: int, rate: float, room: int
    ) -> tuple[LiveSource, float, float]:
        """Look until what is to be kept has room; gives the rate, and when that look began."""
        for _ in range(TRIES):
            below = min((1 << 64) - 1, max(1, int(rate * (1 << 64))))
            options = replace(
                self.plan.options,
                seed=seed,
                sample=rate / FRAMES_PART,
                content=memory.Content(below, counted, room),
            )
            source, began = LiveSource(list(self.pids), options), time.monotonic()
            try:
                source.first_look()
            except memory.Full:
                rate /= 2
                continue
            return source, rate, began
        raise Refused(
            "the memory changes too fast for a sample that fits",
            "leave out `--memory`, or give more",
        )

    @staticmethod
    def _stock(source: LiveSource, told: content.Pilot, rate: float) -> Stock:
        pages, chosen = source.pages, source.options.content
        assert pages is not None
        assert chosen is not None
        return content.take_stock(
            pages,
            chosen.chosen(pages.hashes),
            told.counted,
            source.counted,
            sampling.present_of(source),
            rate,
            rate / FRAMES_PART,
            told.pairs,
        )
