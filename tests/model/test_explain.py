"""Each page in one part, the parts hold against the prediction, whatever way they are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dedup import grouping
from dedup.model import explain
from dedup.model.copies import UNSTABLE
from dedup.model.explain import FREED, End
from dedup.model.prediction import Rules
from dedup.pages import FRAME_MASK, Flag, Groups, Pages
from tests.model.layouts import UNIQUE, Layout, layouts, prediction
from tests.model.simulator import ZERO

COMMON = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
LIMITS = st.integers(2, 5) | st.integers(2, 20)
EVERYTHING = 10**6


def explained(
    layout: Layout, rules: Rules, *, hidden: bool = False, top: int = EVERYTHING
) -> tuple[Pages, Groups, explain.Explanation]:
    pages = layout.pages(hidden=hidden)
    groups = grouping.group(pages)
    return pages, groups, explain.explain(pages, groups, rules, top)


def parts(layout: Layout, rules: Rules | None = None, **options: Any) -> dict[str, int]:
    """The parts that are not empty, in pages."""
    _, _, found = explained(layout, rules or Rules(), **options)
    return {e.name: n for e, n in zip(End, found.pages.sum(0).tolist(), strict=True) if n}


@COMMON
@given(layouts(), LIMITS, st.booleans(), st.booleans())
def test_the_parts_add_up(layout: Layout, limit: int, zero: bool, hidden: bool) -> None:
    pages, _, found = explained(layout, Rules(limit, zero), hidden=hidden)
    assert (found.pages >= 0).all()
    assert found.pages.sum(1).tolist() == [len(p) for p in layout.processes]
    freed = sum(int(found.pages[:, e].sum()) for e in FREED)
    single = (pages.frames & (Flag.ZERO | Flag.DUPLICATE)) == Flag.ZERO
    single &= (pages.frames & (UNSTABLE | Flag.KSM)) == 0
    alone = int(np.count_nonzero(single)) if zero else 0
    assert sum(c.frames_freed[0] for c in found.contents) == freed - alone
    for c in found.contents:
        assert sum(n for _, n in c.regions) == c.mappings
        assert 0 <= c.frames_freed[0] <= c.frames_freed[1] <= c.mappings
        assert len(set(pages.hashes[c.samples].tolist())) == 1


@COMMON
@given(layouts(huge=False, ksm=False), st.integers(2, 20), st.booleans())
def test_what_is_freed_is_what_the_prediction_says(layout: Layout, limit: int, zero: bool) -> None:
    rules = Rules(limit, zero, order_known=True)
    pages, groups, found = explained(layout, rules)
    shared = (pages.frames & Flag.EXCLUSIVE) == 0
    # Beyond the limit the order of forks decides.
    assume(not (shared & (np.diff(groups.offsets) > limit).any()).any())
    freed = sum(int(found.pages[:, e].sum()) for e in FREED)
    assert prediction(layout, rules).frames_freed == freed


@COMMON
@given(layouts(huge=False, ksm=False), st.integers(2, 20), st.booleans())
def test_hidden_frames_are_within_bounds(layout: Layout, limit: int, zero: bool) -> None:
    rules = Rules(limit, zero)
    _, _, found = explained(layout, rules, hidden=True)
    predicted = prediction(layout, rules, hidden=True)
    low, high = predicted.bounds.get("frames_freed", (predicted.frames_freed,) * 2)
    assert low is not None
    assert high is not None
    if not any(c.mappings > limit for c in found.contents):  # as above
        freed = sum(int(found.pages[:, e].sum()) for e in FREED)
        assert low <= freed <= high
        assert sum(c.frames_freed[1] for c in found.contents) <= high


@COMMON
@given(layouts(most=40), LIMITS, st.booleans(), st.booleans(), st.sampled_from([1, 3, 16]))
def test_pieces_change_nothing(
    layout: Layout, limit: int, zero: bool, hidden: bool, chunk: int
) -> None:
    whole = explained(layout, Rules(limit, zero), hidden=hidden)[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain, "CHUNK_PAGES", chunk)
        pieces = explained(layout, Rules(limit, zero), hidden=hidden)[2]
    assert pieces.pages.tolist() == whole.pages.tolist()
    assert pieces.contents == whole.contents


@COMMON
@given(layouts(), st.integers(0, 4))
def test_the_top_is_the_top(layout: Layout, top: int) -> None:
    every = explained(layout, Rules())[2].contents
    assert explained(layout, Rules(), top=top)[2].contents == every[:top]
    freed = [c.frames_freed[1] for c in every]
    assert freed == sorted(freed, reverse=True)


def test_zero_constant_and_real_duplicates_are_kept_apart() -> None:
    layout = Layout()
    p = layout.process()
    for _ in range(3):
        layout.page(p, ZERO)
        layout.page(p, 7)
    layout.huge(p, [ZERO, ZERO])
    layout.page(p, UNIQUE)
    assert parts(layout) == {
        "DUPLICATE": 2, "ZERO": 2, "ZERO_IN_HUGE_PAGE": 2, "KEPT": 2, "UNIQUE": 3,
    }  # fmt: skip
    assert parts(layout, Rules(use_zero_pages=True)) == {
        "DUPLICATE": 2, "ZERO": 3, "ZERO_IN_HUGE_PAGE": 2, "KEPT": 1, "UNIQUE": 3,
    }  # fmt: skip


def test_constant_pages() -> None:
    layout = Layout()
    p = layout.process()
    for _ in range(3):
        layout.page(p, 7)
    pages = layout.pages()
    pages.frames |= Flag.CONSTANT
    found = explain.explain(pages, grouping.group(pages), Rules(), 1)
    assert found.pages[0, [End.CONSTANT, End.KEPT]].tolist() == [2, 1]
    assert found.contents[0].constant
    assert not found.contents[0].zero


def test_a_locked_huge_page_keeps_its_zero_pages() -> None:
    layout = Layout()
    p = layout.process()
    layout.huge(p, [ZERO, ZERO, ZERO], locked=True)
    assert parts(layout) == {"ZERO": 2, "KEPT": 1, "UNIQUE": 1}


def test_shared_by_fork_saves_nothing() -> None:
    layout = Layout()
    p = layout.process()
    layout.page(p, UNIQUE)
    layout.fork(p)
    assert parts(layout) == {"FORK": 2}
    assert parts(layout, hidden=True) == {"HIDDEN": 2}
    # A copy beside it: one frame of the two stays.
    layout.page(p, layout.processes[p][0].frame.content)
    assert parts(layout) == {"FORK": 1, "KEPT": 1, "DUPLICATE": 1}


def test_merged_pages_take_in_new_copies() -> None:
    layout = Layout()
    p = layout.process()
    layout.ksm(1, [p, p])
    assert parts(layout) == {"KSM": 2}
    layout.page(p, 1)
    layout.page(p, 1)
    assert parts(layout) == {"KSM": 2, "DUPLICATE": 2}
    assert parts(layout, Rules(max_page_sharing=3)) == {"KSM": 2, "DUPLICATE": 1, "KEPT": 1}


def test_a_frame_mapped_outside_the_scan_stays() -> None:
    layout = Layout()
    p = layout.process()
    for _ in range(3):
        layout.page(p, 1)
    pages = layout.pages()
    groups = grouping.group(pages)
    pages.frames[0] = (pages.frames[0] & ~Flag.EXCLUSIVE) | Flag.OUTSIDE
    found = explain.explain(pages, groups, Rules(), 1)
    assert found.pages[0, [End.DUPLICATE, End.KEPT, End.OUTSIDE]].tolist() == [1, 1, 1]
    assert found.contents[0].frames_freed == (1, 1)


def test_a_frame_that_stays_anyhow_is_no_choice_to_keep() -> None:
    layout = Layout()
    p = layout.process()
    layout.page(p, 1)
    layout.page(p, 1)
    layout.fork(p)
    pages = layout.pages()
    groups = grouping.group(pages)
    first = pages.frames[groups.order[0]] & FRAME_MASK
    pages.frames[(pages.frames & FRAME_MASK) == first] |= Flag.OUTSIDE
    found = explain.explain(pages, groups, Rules())
    ends = found.pages.sum(0)
    assert ends[[End.FORK, End.KEPT, End.OUTSIDE, End.DUPLICATE]].tolist() == [2, 1, 1, 0]


@pytest.mark.parametrize(
    ("flag", "end"),
    [
        (Flag.VOLATILE, End.VOLATILE),
        (Flag.NEW, End.NEW),
        (Flag.UNREAD, End.UNREAD),
        (Flag.GONE, End.GONE),
    ],
)
def test_pages_that_take_no_part(flag: np.uint64, end: End) -> None:
    layout = Layout()
    p = layout.process()
    for _ in range(3):
        layout.page(p, 1)
    pages = layout.pages()
    pages.frames[:2] |= flag
    found = explain.explain(pages, grouping.group(pages), Rules())
    assert found.pages[0, [end, End.UNIQUE]].tolist() == [2, 1]


def test_nothing() -> None:
    assert parts(Layout()) == {}
    layout = Layout()
    layout.process()
    assert parts(layout) == {}
