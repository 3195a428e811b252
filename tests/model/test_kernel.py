"""The literal simulator, which the model is held against, against ksmd itself."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack

import pytest

from dedup.kernel.pagemap import sight
from tests.kernel_fixtures import PAGE, KsmControl, Target, frames, process_numbers
from tests.model.layouts import UNIQUE, Layout
from tests.model.simulator import ZERO, Mapping

FIELDS = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "ksm_zero_pages",
    "stable_node_chains",
    "stable_node_dups",
    "general_profit",
)
PROCESS_FIELDS = ("ksm_rmap_items", "ksm_zero_pages", "ksm_merging_pages")


class Twin:
    """A layout, and processes whose memory is laid out the same."""

    def __init__(self, stack: ExitStack, processes: int) -> None:
        self.huge_pages = sight().huge_bytes // PAGE or 512
        self.layout = Layout(huge_pages=self.huge_pages)
        self.room = 16 * self.huge_pages
        self.start = 0
        self.targets: list[Target] = []
        self.way: list[tuple[int, ...]] = []
        self.pids: list[int] = []
        self.starts: list[int] = []
        for _ in range(processes):
            self.layout.process()
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
        return self.targets[p].do(verb, child=self.way[p], name="a", **words)

    def _put(self, p: int, mappings: list[Mapping]) -> None:
        words = []
        for m in mappings:
            content = m.frame.content
            words.append("zero" if content == ZERO else "unique" if content > 999 else str(content))
        self.do(p, "put", at=mappings[0].address, what=words)

    def page(self, p: int, content: int) -> None:
        self.layout.page(p, content)
        self._put(p, self.layout.processes[p][-1:])

    def huge(self, p: int, contents: list[int], *, locked: bool) -> None:
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
        self.layout.fork(p)
        pid = self.targets[p].do("fork", child=self.way[p])
        before = sum(
            t is self.targets[p] and w[:-1] == self.way[p] and bool(w)
            for t, w in zip(self.targets, self.way, strict=True)
        )
        self._add(self.targets[p], (*self.way[p], before), pid, self.starts[p])

    def rewrite(self, p: int, index: int, content: int) -> None:
        if self.layout.processes[p][index].frame.huge is None:
            self.layout.rewrite(p, index, content)
            self._put(p, self.layout.processes[p][index : index + 1])

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

    def huge_mapped(self) -> int:
        return sum(process_numbers(p, "smaps_rollup")["AnonHugePages"] for p in self.pids)


def lay_out(chance: random.Random, stack: ExitStack) -> Twin:
    """Pages, copies, huge pages (locked, too), all-zero ones more than others, forks."""
    contents = [ZERO, ZERO, ZERO, 1, UNIQUE] if chance.random() < 0.5 else [ZERO, 1, 2, UNIQUE]
    twin = Twin(stack, chance.randint(1, 2))
    for _ in range(chance.randint(2, 9)):
        p = chance.randrange(len(twin.pids))
        mappings = twin.layout.processes[p]
        match chance.choice(["page", "copies", "huge", "huge", "fork", "rewrite"]):
            case "page":
                twin.page(p, chance.choice(contents))
            case "copies":
                content = chance.choice(contents)
                for _ in range(chance.randint(1, 6)):
                    twin.page(p, content)
            case "huge":
                some = [chance.choice(contents) for _ in range(chance.randint(0, 4))]
                twin.huge(p, some, locked=chance.random() < 0.15)
            # Not of huge pages: splitting one that is shared is not the same every time.
            case "fork" if len(twin.pids) < 4 and not any(m.frame.huge for m in mappings):
                twin.fork(p)
            case "rewrite" if mappings:
                twin.rewrite(p, chance.randrange(len(mappings)), chance.choice(contents))
            case _:
                pass
    return twin


def compare(ksm: KsmControl, twin: Twin, limit: int, *, use_zero_pages: bool) -> dict[str, object]:
    """What differs between ksmd and the simulator: name, (counted, simulated)."""
    ksm.alone()
    before = twin.frames()
    for p in range(len(twin.pids)):
        twin.do(p, "advise", what="mergeable")
    counters = ksm.converge()
    truth = twin.layout.truth(limit, use_zero_pages=use_zero_pages)
    pairs: dict[str, tuple[int, int]] = {
        name: (getattr(counters, name), getattr(truth, name)) for name in FIELDS
    }
    pairs["frames_freed"] = (len(before) - len(twin.frames()), truth.frames_freed)
    for p, process in enumerate(truth.processes):
        counted = process_numbers(twin.pids[p], "ksm_stat")
        for name in PROCESS_FIELDS:
            pairs[f"{name} of {p}"] = (counted[name], getattr(process, name))
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@pytest.mark.ksm
@pytest.mark.parametrize("tens", range(4))
def test_random_layouts(ksm: KsmControl, tens: int) -> None:
    """Every counter, of the whole and of each process, and the frames given back."""
    for seed in range(10 * tens, 10 * tens + 10):
        chance = random.Random(seed)
        limit, use_zero_pages = chance.choice([2, 2, 3, 3, 4, 5]), chance.random() < 0.2
        ksm.clear()
        ksm.set(max_page_sharing=limit, use_zero_pages=int(use_zero_pages))
        with ExitStack() as stack:
            twin = lay_out(chance, stack)
            wrong = compare(ksm, twin, limit, use_zero_pages=use_zero_pages)
            assert not wrong, (seed, limit, use_zero_pages)


@pytest.mark.ksm
def test_a_merge_that_fails_half_way_costs_a_forked_page_its_chance(ksm: KsmControl) -> None:
    """An all-zero page in a huge page, then one shared by fork: that one never merges."""
    ksm.set(max_page_sharing=256, use_zero_pages=0)
    with ExitStack() as stack:
        twin = Twin(stack, 2)
        twin.huge(0, [ZERO], locked=False)
        twin.page(1, ZERO)
        twin.fork(1)
        wrong = compare(ksm, twin, 256, use_zero_pages=False)
        assert not wrong
        counters = ksm.ksm.counters()
        assert (counters.pages_shared, counters.pages_volatile) == (0, 1)


@pytest.mark.ksm
def test_one_zero_page_alone_keeps_its_huge_page(ksm: KsmControl) -> None:
    """The first that ksmd comes to stays whole, the others split as they meet it."""
    ksm.set(max_page_sharing=256, use_zero_pages=0)
    with ExitStack() as stack:
        twin = Twin(stack, 1)
        for zeros in ([ZERO, ZERO], [ZERO], [ZERO]):
            twin.huge(0, zeros, locked=False)
        before = twin.huge_mapped()
        wrong = compare(ksm, twin, 256, use_zero_pages=False)
        assert not wrong
        assert twin.layout.truth(256, use_zero_pages=False).thp_split == 2
        assert before - twin.huge_mapped() == 2 * sight().huge_bytes // 1024
