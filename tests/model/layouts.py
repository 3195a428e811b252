"""Memory layouts for tests of the model: as `Pages` arrays, and for the simulator."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import strategies as st

from dedup import grouping
from dedup.model.merge import predict
from dedup.model.prediction import Prediction, Rules
from dedup.pages import Flag, Nodes, Pages, Process, ProcessId, Region
from tests.model.simulator import SHARED_ZERO, ZERO, Counts, Frame, HugePage, Ksmd, Mapping, Node

PAGE = 4096
HUGE = 4
"""Pages in a huge page here."""
NODE_FRAMES = 1 << 20
NODES = Nodes(np.array([0, NODE_FRAMES]), np.array([0, 1]))
"""Two NUMA nodes; all frames are on the first where nothing is said."""
UNIQUE = -1
"""Stands for a content that nothing else has."""


@dataclass
class Layout:
    """Processes with their mappings, in address order."""

    processes: list[list[Mapping]] = field(default_factory=list)
    zero_pages: list[int] = field(default_factory=list)
    huge_pages: int = HUGE
    numa: int = 0
    """Node of the frames that come next."""
    pinned: dict[int, int] = field(default_factory=dict)
    """Pages pinned, by process."""
    _next_content: int = 1000

    def process(self, zero_pages: int = 0) -> int:
        """Start a process."""
        self.processes.append([])
        self.zero_pages.append(zero_pages)
        return len(self.processes) - 1

    def content(self, wanted: int) -> int:
        if wanted != UNIQUE:
            return wanted
        self._next_content += 1
        return self._next_content

    def _end(self, p: int) -> int:
        return self.processes[p][-1].address + 1 if self.processes[p] else 0

    def page(self, p: int, content: int, *, volatile: bool = False, locked: bool = False) -> None:
        """Touch a new page."""
        frame = Frame(self.content(content), numa=self.numa)
        self.processes[p].append(Mapping(p, self._end(p), frame, volatile, locked))

    def huge(self, p: int, contents: list[int], *, locked: bool = False) -> None:
        """A new huge page; contents not given are unique."""
        huge = HugePage()
        start = -(-self._end(p) // self.huge_pages) * self.huge_pages
        for i in range(self.huge_pages):
            content = self.content(contents[i] if i < len(contents) else UNIQUE)
            huge.frames.append(Frame(content, huge, numa=self.numa))
            self.processes[p].append(Mapping(p, start + i, huge.frames[-1], locked=locked))

    def ksm(self, content: int, processes: list[int]) -> None:
        """A page merged already, mapped by these processes (one may stand there twice)."""
        frame = Frame(self.content(content), numa=self.numa)
        frame.node = Node(frame)
        for p in processes:
            self.processes[p].append(Mapping(p, self._end(p), frame))

    def may_fork(self, p: int) -> bool:
        """Not with a locked huge page: what a split does to one that is shared is left open."""
        return not any(m.locked and m.frame.huge for m in self.processes[p])

    def fork(self, p: int) -> int:
        """A child: all frames shared."""
        q = self.process(self.zero_pages[p])
        for m in self.processes[p]:
            # Volatile pages get a frame of their own at the next write; mlock is not inherited.
            frame = Frame(m.frame.content, numa=self.numa) if m.volatile else m.frame
            self.processes[q].append(Mapping(q, m.address, frame, m.volatile))
        return q

    def rewrite(self, p: int, index: int, content: int) -> None:
        """Write a page: it gets a frame of its own, if it had not one."""
        m = self.processes[p][index]
        content = self.content(content)
        mapped = sum(o.frame is m.frame for mappings in self.processes for o in mappings)
        if m.frame.compound is not None and mapped == 1:
            m.frame.content = content
        else:
            m.frame = Frame(content, numa=self.numa)

    def pin(self, p: int, index: int) -> None:
        """Pin a page that is the process's own and no KSM page: only such ones can be.

        Nor can one in a huge page of which another process still maps a part.
        """
        frame = self.processes[p][index].frame
        whole = frame.compound.frames if frame.compound else [frame]
        owners = [o.process for q in self.processes for o in q if o.frame in whole]
        once = sum(o.frame is frame for o in self.processes[p]) == 1
        if set(owners) == {p} and once and frame.node is None and not frame.pinned:
            frame.pinned = True
            self.pinned[p] = self.pinned.get(p, 0) + 1

    # -- the two views ---------------------------------------------------------------------------

    def truth(self, limit: int, *, use_zero_pages: bool, order: list[int] | None = None) -> Counts:
        """What the simulator makes of it, ksmd coming by the processes in this order."""
        mappings = copy.deepcopy(
            [self.processes[p] for p in order or range(len(self.processes))],
            {id(SHARED_ZERO): SHARED_ZERO},
        )
        return Ksmd(
            [m for p in mappings for m in p],
            len(self.processes),
            limit,
            use_zero_pages=use_zero_pages,
            zero_pages=self.zero_pages,
        ).run()

    def pages(self, *, hidden: bool = False, seed: int = 0) -> Pages:
        """The arrays of a scan; pages lie in the arrays in an order drawn from `seed`."""
        everything = [m for p in self.processes for m in p]
        numbers = self._frame_numbers(everything)
        mapped: dict[Frame, int] = {}
        for m in everything:
            mapped[m.frame] = mapped.get(m.frame, 0) + 1
        hashes: list[int] = []
        words: list[np.uint64] = []
        runs: list[tuple[int, int, int, int]] = []  # process, address, count, first
        chunks = self._runs()
        np.random.default_rng(seed).shuffle(chunks)
        for p, begin, end in chunks:
            part = self.processes[p][begin:end]
            runs.append((p, part[0].address * PAGE, len(part), len(hashes)))
            for m in part:
                f = m.frame
                word = Flag.HIDDEN if hidden else np.uint64(numbers[f])
                for flag, on in (
                    (Flag.EXCLUSIVE, mapped[f] == 1),
                    (Flag.KSM, f.node is not None and not hidden),
                    (Flag.THP, f.compound is not None),
                    (Flag.ZERO | Flag.CONSTANT, f.content == ZERO),
                    (Flag.VOLATILE, m.volatile),
                    (Flag.LOCKED, m.locked),
                ):
                    if on:
                        word |= flag
                words.append(word)
                hashes.append(f.content * 0x9E3779B97F4A7C15 % 2**64)
        runs.sort()
        table = np.array(runs, np.int64).reshape(-1, 4)
        return Pages(
            page_size=PAGE,
            hashes=np.array(hashes, np.uint64),
            frames=np.array(words, np.uint64),
            run_start=table[:, 1].copy(),
            run_count=table[:, 2].copy(),
            run_first=table[:, 3].copy(),
            run_region=table[:, 0].copy(),
            regions=[self._region(p) for p in range(len(self.processes))],
            processes=[
                Process(
                    ProcessId(100 + p, 1),
                    f"p{p}",
                    ksm_zero_pages=z,
                    pinned_bytes=self.pinned.get(p, 0) * PAGE,
                )
                for p, z in enumerate(self.zero_pages)
            ],
            nodes=NODES,
            looks=2,
            frames_known=not hidden,
            huge_pages=self.huge_pages,
        )

    def _frame_numbers(self, everything: list[Mapping]) -> dict[Frame, int]:
        numbers: dict[Frame, int] = {}
        block = 1
        for m in everything:
            if m.frame in numbers:
                continue
            if m.frame.huge is not None:
                for i, f in enumerate(m.frame.huge.frames):
                    numbers[f] = f.numa * NODE_FRAMES + block * self.huge_pages + i
            else:
                numbers[m.frame] = m.frame.numa * NODE_FRAMES + block * self.huge_pages
            block += 1
        return numbers

    def candidates(self, order: list[int]) -> Layout:
        """The processes in this order; what is on the shared zero page is no candidate."""
        processes = [
            [replace(m, process=i) for m in self.processes[p] if m.frame is not SHARED_ZERO]
            for i, p in enumerate(order)
        ]
        return replace(self, processes=processes, zero_pages=[self.zero_pages[p] for p in order])

    def _runs(self) -> list[tuple[int, int, int]]:
        """(process, begin, end) of addresses without a hole."""
        found = []
        for p, part in enumerate(self.processes):
            begin = 0
            for i in range(1, len(part) + 1):
                if i == len(part) or part[i].address != part[i - 1].address + 1:
                    found.append((p, begin, i))
                    begin = i
        return found

    def _region(self, p: int) -> Region:
        part = self.processes[p]
        ksm = sum(m.frame.node is not None for m in part)
        return Region(
            process=p,
            start=0,
            end=(self._end(p) + 1) * PAGE,
            perms="rw-p",
            name="",
            vm_flags=frozenset({"rd", "wr", "mg"}),
            eligible=True,
            why="",
            advised=True,
            scanned=True,
            anonymous_bytes=len(part) * PAGE,
            ksm_bytes=ksm * PAGE,
        )


def prediction(layout: Layout, rules: Rules, *, hidden: bool = False, seed: int = 0) -> Prediction:
    """Group and predict, as a scan does."""
    pages = layout.pages(hidden=hidden, seed=seed)
    return predict(pages, grouping.group(pages), rules)


CONTENTS = st.sampled_from([ZERO, 1, 2, UNIQUE])


@st.composite
def layouts(
    draw: st.DrawFn,
    *,
    huge: bool = True,
    ksm: bool = True,
    volatile: bool = True,
    fork: bool = True,
    nodes: bool = False,
    pins: bool = False,
    contents: st.SearchStrategy[int] = CONTENTS,
    most: int = 24,
) -> Layout:
    """Random processes: pages, copies of a content, huge pages, merged pages, forks."""
    layout = Layout()
    for _ in range(draw(st.integers(1, 3))):
        layout.process(draw(st.sampled_from([0, 0, 3])))
    kinds = ["page", "copies"]
    kinds += ["huge"] * huge + ["ksm"] * ksm + ["volatile"] * volatile
    kinds += ["fork", "rewrite"] * fork
    for _ in range(draw(st.integers(0, most))):
        p = draw(st.integers(0, len(layout.processes) - 1))
        if nodes:
            layout.numa = draw(st.integers(0, 1))
        match draw(st.sampled_from(kinds)):
            case "page":
                layout.page(p, draw(contents))
            case "copies":
                content = draw(contents)
                for _ in range(draw(st.integers(1, 8))):
                    layout.page(p, content)
            case "volatile":
                layout.page(p, draw(contents.filter(bool)), volatile=True)
            case "huge":
                layout.huge(p, draw(st.lists(contents, max_size=HUGE)), locked=draw(st.booleans()))
            case "ksm":
                every = st.integers(0, len(layout.processes) - 1)
                layout.ksm(draw(contents), draw(st.lists(every, min_size=1, max_size=5)))
            case "fork" if len(layout.processes) < 5 and layout.may_fork(p):
                layout.fork(p)
            case "rewrite" if layout.processes[p]:
                index = draw(st.integers(0, len(layout.processes[p]) - 1))
                layout.rewrite(p, index, draw(contents))
            case _:
                pass
    if pins:
        for _ in range(draw(st.integers(0, 4))):
            p = draw(st.integers(0, len(layout.processes) - 1))
            if layout.processes[p]:
                layout.pin(p, draw(st.integers(0, len(layout.processes[p]) - 1)))
    return layout
