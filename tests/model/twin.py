"""A layout, and processes whose real memory is laid out the same."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass

from dedup.kernel.pagemap import sight
from dedup.model.prediction import Prediction, Rules
from dedup.scanning import Plan, scan_pids
from dedup.sources.live import Options
from tests.kernel_fixtures import PAGE, KsmControl, Target, frames, kpageflags, process_numbers
from tests.model.layouts import HUGE, Layout, prediction
from tests.model.simulator import SHARED_ZERO, ZERO, Counts, Ksmd, Mapping

FIELDS = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "ksm_zero_pages",
    "stable_node_chains",
    "stable_node_dups",
    "general_profit",
    "frames_freed",
    "thp_split",
)
PROCESS_FIELDS = (
    "ksm_rmap_items",
    "ksm_zero_pages",
    "ksm_merging_pages",
    "ksm_process_profit",
)
KPF_THP = 22
STILL_SCANS = 3
MOST_SCANS = 100


@dataclass(frozen=True)
class Figure:
    """One counter: as the kernel counts it, as predicted, as the simulator has it."""

    name: str
    counted: int
    predicted: int | None
    bounds: tuple[int, int] | None
    simulated: int

    @property
    def equal(self) -> bool:
        """Predicted as one number, and that is the kernel's."""
        return self.counted == self.predicted

    @property
    def inside(self) -> bool:
        """Equal, or in the range predicted."""
        if self.bounds is None:
            return self.equal
        return self.bounds[0] <= self.counted <= self.bounds[1]

    def __str__(self) -> str:
        found = self.predicted if self.bounds is None else f"{self.bounds[0]}..{self.bounds[1]}"
        return f"{self.name}: counted {self.counted}, predicted {found}, simulated {self.simulated}"


class Paper:
    """A layout alone, and what can be done to it; `Twin` does the same to real memory.

    Parameters
    ----------
    processes : int
    huge_pages : int
        Pages in a huge page.
    """

    def __init__(self, processes: int, huge_pages: int = HUGE) -> None:
        self.huge_pages = huge_pages
        self.layout = Layout(huge_pages=huge_pages)
        self.order: list[int] = []
        """Processes with mergeable memory, in the order of ksmd's list."""
        for _ in range(processes):
            self.layout.process()

    def do(self, p: int, verb: str, **words: object) -> object:
        """Do it to process p."""

    # -- laying out ------------------------------------------------------------------------------

    def _put(self, p: int, mappings: list[Mapping]) -> None:
        words = []
        for m in mappings:
            content = m.frame.content
            words.append("zero" if content == ZERO else "unique" if content > 999 else str(content))
        if words:
            self.do(p, "put", at=mappings[0].address, what=words)

    def pages(
        self, p: int, contents: list[int], *, volatile: bool = False, locked: bool = False
    ) -> None:
        """Touch new pages."""
        for content in contents:
            self.layout.page(p, content, volatile=volatile, locked=locked)
        new = self.layout.processes[p][-len(contents) :]
        self._put(p, new)
        if locked:
            self.do(p, "lock", at=new[0].address, count=len(new))

    def huge(self, p: int, contents: list[int], *, locked: bool) -> None:
        """Make a huge page; contents not given are unique."""
        self.layout.huge(p, contents, locked=locked)
        new = self.layout.processes[p][-self.huge_pages :]
        where = {"at": new[0].address, "count": self.huge_pages}
        self.do(p, "advise", what="hugepage", **where)
        self._put(p, new)
        # It stays huge; but once split, khugepaged must not put it together again.
        self.do(p, "advise", what="nohugepage", **where)
        if locked:
            self.do(p, "lock", **where)

    def fork(self, p: int) -> None:
        """Fork a process; a child of one with mergeable memory is on ksmd's list at once."""
        q = self.layout.fork(p)
        if p in self.order:
            self.order.append(q)

    def rewrite(self, p: int, index: int, content: int) -> None:
        """Write a page that is there; not one on the shared zero page."""
        if self.layout.processes[p][index].frame is not SHARED_ZERO:
            self.layout.rewrite(p, index, content)
            self._put(p, self.layout.processes[p][index : index + 1])

    def advise(self) -> None:
        """Make all memory mergeable, process after process."""
        for p in range(len(self.layout.processes)):
            self.do(p, "advise", what="mergeable")
            if p not in self.order:
                self.order.append(p)

    def merge(self, limit: int, *, use_zero_pages: bool) -> None:
        """Merge what is there; what comes later finds it merged."""
        self.advise()
        ksmd = Ksmd(
            [m for p in self.order for m in self.layout.processes[p]],
            len(self.layout.processes),
            limit,
            use_zero_pages=use_zero_pages,
            zero_pages=self.layout.zero_pages,
        )
        ksmd.run()
        self.layout.zero_pages = ksmd.zero_pages

    # -- what ksmd does otherwise from run to run ------------------------------------------------

    def left_to_chance(self, limit: int) -> str:
        """Why ksmd itself may not do the same with this memory every time; empty: it does.

        Where more mappings have a content than `max_page_sharing`, the order decides; and a page
        is passed by for a scan where a locked mapping of its frame was merged just before
        (munlock_folio), or where the search of the unstable tree comes by an all-zero page that
        the split of its huge page has taken out of KSM.
        """
        every = [m for p in self.layout.processes for m in p if not m.volatile]
        contents: dict[int, list[Mapping]] = {}
        for m in every:
            contents.setdefault(m.frame.content, []).append(m)
        beyond = [g for g in contents.values() if len(g) > limit]
        leaving = any(m.frame.compound and m.frame.content == ZERO and not m.locked for m in every)
        if leaving and any(
            len({m.frame for m in g}) < len(g) or len(g) % limit == 1
            for g in beyond
            if g[0].frame.content != ZERO
        ):
            return "all-zero pages in huge pages, beside contents beyond max_page_sharing"
        for g in contents.values():
            locked = {m.frame for m in g if m.locked}
            shared = any(sum(m.frame is f for m in g) > 1 for f in locked)
            if shared and (len(g) > limit or (leaving and g[0].frame.content == ZERO)):
                return "locked pages shared by fork, beyond max_page_sharing"
            if shared and any(f.compound for f in locked):
                return "locked huge pages shared by fork"
            # When those merge, so that the huge page splits, decides over what else is in it.
            if shared and (leaving or beyond) and any(m.frame.compound for m in g):
                return "locked pages shared by fork, with copies in huge pages"
        return ""

    # -- against the simulator -------------------------------------------------------------------

    def simulated(self, limit: int, *, use_zero_pages: bool) -> list[Figure]:
        """What is predicted, the simulator in the kernel's place."""
        self.advise()
        truth = self.layout.truth(limit, use_zero_pages=use_zero_pages, order=self.order)
        rules = Rules(limit, use_zero_pages, order_known=True)
        found = prediction(self.layout.candidates(self.order), rules)
        return figures(
            found,
            truth,
            self.order,
            [getattr(truth, n) for n in FIELDS],
            [getattr(truth.processes[p], n) for p in self.order for n in PROCESS_FIELDS],
        )


def figures(
    found: Prediction, truth: Counts, order: list[int], whole: list[int], by_process: list[int]
) -> list[Figure]:
    """All figures, those counted given in the order of `FIELDS` and of `PROCESS_FIELDS`."""
    rows = [
        Figure(name, n, getattr(found, name), found.bounds.get(name), getattr(truth, name))
        for name, n in zip(FIELDS, whole, strict=True)
    ]
    rest = iter(by_process)
    for p, process in zip(order, found.processes, strict=True):
        rows += [
            Figure(
                f"{name} of process {p}",
                next(rest),
                getattr(process, name),
                process.bounds.get(name),
                getattr(truth.processes[p], name),
            )
            for name in PROCESS_FIELDS
        ]
    return rows


class Twin(Paper):
    """Processes with one mapping each; what is done to one is done to its layout.

    The first ones are separate processes, forks come after them. All memory becomes mergeable
    in the order of `order`, while ksmd rests at the head of its list: so it comes by in that order.
    """

    def __init__(self, stack: ExitStack, processes: int, huge_blocks: int = 16) -> None:
        super().__init__(processes, sight().huge_bytes // PAGE or 512)
        self.room = huge_blocks * self.huge_pages
        self.targets: list[Target] = []
        self.way: list[tuple[int, ...]] = []
        self.pids: list[int] = []
        self.starts: list[int] = []
        for _ in range(processes):
            target = stack.enter_context(Target())
            start = target.do("map", name="a", pages=self.room, align=self.huge_pages * PAGE)
            target.do("advise", name="a", what="nohugepage")
            self._add(target, (), target.pid, start)

    def _add(self, target: Target, way: tuple[int, ...], pid: int, start: int) -> None:
        self.targets.append(target)
        self.way.append(way)
        self.pids.append(pid)
        self.starts.append(start)

    def do(self, p: int, verb: str, **words: object) -> object:
        """Give a command to process p, about its mapping."""
        return self.targets[p].do(verb, child=self.way[p], name="a", **words)

    # -- laying out ------------------------------------------------------------------------------

    def fork(self, p: int) -> None:
        """Fork the process too."""
        super().fork(p)
        pid = self.targets[p].do("fork", child=self.way[p])
        before = sum(
            t is self.targets[p] and w[:-1] == self.way[p] and bool(w)
            for t, w in zip(self.targets, self.way, strict=True)
        )
        self._add(self.targets[p], (*self.way[p], before), pid, self.starts[p])

    def rewrite_volatile(self) -> None:
        """Write the pages that are rewritten all the time."""
        for p, mappings in enumerate(self.layout.processes):
            for m in mappings:
                if m.volatile:
                    self.do(p, "put", at=m.address, what=["unique"])

    # -- ksmd ------------------------------------------------------------------------------------

    def converge(self, ksm: KsmControl) -> list[int]:
        """Scan after scan until nothing changes, volatile pages written in between."""
        last: list[int] = []
        still = 0
        ksm.start()
        try:
            for _ in range(MOST_SCANS):
                self.rewrite_volatile()
                ksm.step()
                now = self.counted(ksm)
                still = still + 1 if now == last else 0
                if still == STILL_SCANS:
                    return now
                last = now
        finally:
            ksm.stop()
        raise AssertionError(f"ksmd does not come to rest: {self.counted(ksm)}")

    def merge_now(self, ksm: KsmControl) -> None:
        """Let ksmd merge what is there; what comes later finds it merged."""
        self.advise()
        self.converge(ksm)
        tunables = ksm.ksm.tunables()
        self.merge(
            int(tunables["max_page_sharing"]), use_zero_pages=bool(tunables["use_zero_pages"])
        )

    # -- counting --------------------------------------------------------------------------------

    def counted(self, ksm: KsmControl) -> list[int]:
        """The kernel's counters, of the whole and of each process in order; ksmd at rest."""
        counters = ksm.ksm.counters()
        figures = [getattr(counters, name) for name in FIELDS[:8]]
        for p in self.order:
            stat = process_numbers(self.pids[p], "ksm_stat")
            figures += [stat[name] for name in PROCESS_FIELDS]
        return figures

    def frames(self) -> set[int]:
        """Frames of all, the shared zero page left out."""
        every: set[int] = set()
        for p, mappings in enumerate(self.layout.processes):
            found: list[int] = []
            deadline = time.monotonic() + 5
            # While the kernel moves a page to another frame, pagemap shows none.
            while len(found) != len(mappings) and time.monotonic() < deadline:
                found = [f for f in frames(self.pids[p], self.starts[p], self.room) if f]
            assert len(found) == len(mappings)
            every.update(found)
        return every - {sight().zero_frame}

    def huge_frames(self) -> set[int]:
        """Huge pages that are whole, by number."""
        numbers = sorted(self.frames())
        flags = kpageflags(numbers)
        return {
            n // self.huge_pages for n, f in zip(numbers, flags, strict=True) if f >> KPF_THP & 1
        }

    def predict(self) -> Prediction:
        """Look twice, as `dedup scan` does, the order known."""

        looked = False

        def between(what: str, done: int, total: int) -> None:
            # At the end of the first look: a wait for the second there may be none, where the
            # first took longer than the interval.
            nonlocal looked
            if what == "processes" and done == total and not looked:
                looked = True
                self.rewrite_volatile()

        options = Options(scope="advised", progress=between)
        plan = Plan(options=options, interval_seconds=0.001, order_known=True)
        return scan_pids([self.pids[p] for p in self.order], plan).prediction

    def simulate(self, ksm: KsmControl) -> Counts:
        """What the simulator makes of the layout."""
        tunables = ksm.ksm.tunables()
        return self.layout.truth(
            int(tunables["max_page_sharing"]),
            use_zero_pages=bool(tunables["use_zero_pages"]),
            order=self.order,
        )

    def compare(self, ksm: KsmControl) -> list[Figure]:
        """Predict, merge, count: every counter, the frames given back, the huge pages split."""
        ksm.alone(self.pids)
        self.advise()
        found = self.predict()
        frames_before, huge_before = self.frames(), self.huge_frames()
        truth = self.simulate(ksm)
        counted = self.converge(ksm)
        freed = len(frames_before) - len(self.frames())
        split = len(huge_before) - len(self.huge_frames())
        return figures(found, truth, self.order, [*counted[:8], freed, split], counted[8:])
