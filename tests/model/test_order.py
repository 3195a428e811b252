"""The order-exact simulator of one content, against the literal one and against the kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.model.order import ON_ZERO_PAGE, Memory, Scanner, simulate
from tests.model.layouts import Layout, layouts
from tests.model.simulator import SHARED_ZERO, ZERO, Counts, Frame, HugePage, Ksmd, Mapping, Node


@dataclass
class One:
    """Mappings of one content: the frame of each, in scan order."""

    frames: list[int]
    ksm: set[int] = field(default_factory=set)
    pinned: set[int] = field(default_factory=set)

    def truth(self, limit: int) -> tuple[Counts, list[Mapping]]:
        frames = {f: Frame(1, pinned=f in self.pinned) for f in self.frames}
        for f in self.ksm & frames.keys():
            frames[f].node = Node(frames[f])
        mappings = [Mapping(0, i, frames[f]) for i, f in enumerate(self.frames)]
        return Ksmd(mappings, 1, limit, use_zero_pages=False).run(), mappings


@st.composite
def ones(draw: st.DrawFn, *, pinned: bool = False) -> One:
    frames = draw(st.lists(st.integers(1, 12), max_size=40))
    some = st.sets(st.sampled_from(frames)) if frames else st.just(set())
    ksm = draw(some)
    return One(frames, ksm, draw(some) - ksm if pinned else set())


def check(one: One, limit: int) -> None:
    truth, mappings = one.truth(limit)
    found = simulate(one.frames, [f in one.ksm for f in one.frames], limit)
    assert found.nodes == truth.pages_shared
    assert found.unshared == truth.pages_unshared
    assert found.volatile == truth.pages_volatile
    assert found.merged == [m.node is not None for m in mappings]


@given(ones(), st.integers(2, 20))
def test_it_is_the_literal_scan(one: One, limit: int) -> None:
    check(one, limit)


@given(st.integers(1, 120), st.integers(2, 20), st.integers(1, 9))
def test_families_beyond_the_limit(n: int, limit: int, families: int) -> None:
    check(One([1 + i % families for i in range(n)]), limit)


def counts(one: One, limit: int) -> tuple[int, int, int, int]:
    """shared, sharing, unshared, volatile."""
    pinned = frozenset(one.pinned)
    found = simulate(one.frames, [f in one.ksm for f in one.frames], limit, pinned)
    return found.nodes, sum(found.merged) - found.nodes, found.unshared, found.volatile


@pytest.mark.parametrize(
    ("frames", "limit", "expected"),
    [
        # Frames shared by fork beyond max_page_sharing, as counted on Linux 6.18.
        ([*range(17)] * 2, 16, (2, 31, 1, 0)),
        ([*range(33)] * 3, 16, (6, 93, 0, 0)),
        ([*range(300)] * 6, 256, (7, 1793, 0, 0)),
        # 50 identical pages in four processes; 200 of them.
        ([*range(50)] * 4, 256, (1, 199, 0, 0)),
        ([*range(200)] * 4, 256, (4, 796, 0, 0)),
        # Shared by fork alone: nothing to merge.
        ([1] * 4, 256, (0, 0, 1, 3)),
    ],
)
def test_forks(frames: list[int], limit: int, expected: tuple[int, int, int, int]) -> None:
    assert counts(One(frames), limit) == expected


def test_a_page_pinned_and_scanned_first_blocks_the_others() -> None:
    """It lies in the unstable tree, and every merge with it fails."""
    assert counts(One([1, 2, 3], pinned={1}), 256) == (0, 0, 1, 2)


def test_a_page_pinned_and_scanned_last_stays_out_itself() -> None:
    assert counts(One([1, 2, 3], pinned={3}), 256) == (1, 1, 0, 1)


def test_a_merged_page_forked_goes_beyond_the_limit() -> None:
    assert counts(One([1] * 800, ksm={1}), 256) == (1, 799, 0, 0)


def test_copies_fill_merged_pages_with_room_first() -> None:
    # Nodes of 3 and 1 mappings, limit 4: room for 1 + 3, the other two pair up.
    one = One([1, 1, 1, 2, 11, 12, 13, 14, 15, 16], ksm={1, 2})
    assert counts(one, 4) == (3, 7, 0, 0)
    check(one, 4)


# -- several contents, tied together by huge pages -------------------------------------------------


def require_same_scan(layout: Layout, limit: int, *, use_zero_pages: bool) -> None:
    """Where each mapping ends, and what becomes of each huge page."""
    mappings = [m for p in layout.processes for m in p]
    frames: dict[Frame, int] = {}
    huge: dict[HugePage | None, int] = {None: -1}
    memory = Memory(
        content=[m.frame.content for m in mappings],
        frame=[frames.setdefault(m.frame, len(frames)) for m in mappings],
        huge=[huge.setdefault(m.frame.compound, len(huge) - 1) for m in mappings],
        is_ksm=[m.frame.node is not None for m in mappings],
        zero=frozenset({ZERO}),
        locked=frozenset(huge[m.frame.compound] for m in mappings if m.locked),
    )
    end = Scanner(memory, limit, use_zero_pages=use_zero_pages).run()
    ksmd = Ksmd(mappings, len(layout.processes), limit, use_zero_pages=use_zero_pages)
    truth = ksmd.run()
    assert end.on_node == [m.node is not None for m in mappings]
    gone = [f == ON_ZERO_PAGE for f in end.frame]
    assert gone == [m.frame is SHARED_ZERO for m in mappings]
    assert sum(end.placed) == truth.ksm_zero_pages
    assert sum(len(nodes) for nodes in end.nodes.values()) == truth.pages_shared
    assert len(end.in_tree) == truth.pages_unshared
    assert end.split == {huge[h] for h in ksmd.huge_before if h is not None and h.is_split}


@given(layouts(volatile=False), st.integers(2, 5) | st.integers(2, 20), st.booleans())
def test_huge_pages_are_scanned_as_by_the_literal_scan(
    layout: Layout, limit: int, use_zero_pages: bool
) -> None:
    require_same_scan(layout, limit, use_zero_pages=use_zero_pages)


@pytest.mark.parametrize(("locked", "on_nodes"), [(False, 2), (True, 4)])
def test_the_split_of_a_locked_huge_page_leaves_its_zero_pages(locked: bool, on_nodes: int) -> None:
    """They merge then, with each other; of another huge page they are gone at once."""
    layout = Layout()
    p = layout.process()
    layout.page(p, 1)
    layout.huge(p, [1, ZERO, ZERO], locked=locked)
    mappings = layout.processes[p]
    memory = Memory(
        [m.frame.content for m in mappings],
        list(range(len(mappings))),
        [-1, 0, 0, 0, 0],
        [False] * len(mappings),
        frozenset({ZERO}),
        frozenset({0} if locked else ()),
    )
    end = Scanner(memory, 256, use_zero_pages=False).run()
    assert (sum(end.on_node), end.split) == (on_nodes, {0})
    require_same_scan(layout, 256, use_zero_pages=False)
