"""The order-exact simulator of one content, against the literal one and against the kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.model.order import simulate
from tests.model.simulator import Counts, Frame, Ksmd, Mapping, Node


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
