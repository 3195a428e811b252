"""The closed form against the literal simulator of ksmd's scan, over random layouts."""

from __future__ import annotations

import itertools
import random
import secrets
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dedup import grouping
from dedup.model.contents import Contents
from dedup.model.given import Given
from dedup.model.merge import predict
from dedup.model.prediction import PROCESS_FIELDS, Prediction, Rules
from dedup.model.zero import ZeroPages
from dedup.pages import FRAME_MASK, Flag
from tests.model.layouts import UNIQUE, Layout, layouts, prediction
from tests.model.simulator import ZERO
from tests.model.twin import FIELDS
from tests.random_layouts import numbers, on_paper

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.model.simulator import Counts

LIMITS = st.integers(2, 5) | st.integers(2, 20)


def figures(truth: Counts, found: Prediction) -> Iterator[tuple[str, int, Any, Any]]:
    """Name, the truth, the prediction, its bounds; of the whole and of each process."""
    for name in FIELDS:
        yield name, getattr(truth, name), getattr(found, name), found.bounds.get(name)
    for i, (t, p) in enumerate(zip(truth.processes, found.processes, strict=True)):
        for name in PROCESS_FIELDS:
            yield f"{name} of {i}", getattr(t, name), getattr(p, name), p.bounds.get(name)


def check(truth: Counts, found: Prediction, *, exact: bool) -> None:
    """A number equals the truth, a range holds it; exact: there are no ranges."""
    for name, true, value, bounds in figures(truth, found):
        if value is not None:
            assert value == true, name
            continue
        assert not exact, name
        assert bounds is not None, name
        assert bounds[0] <= true <= bounds[1], (name, true, bounds)


COMMON = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@COMMON
@given(layouts(huge=False, ksm=False), LIMITS, st.booleans())
def test_small_pages_in_a_known_order_are_exact(
    layout: Layout, limit: int, use_zero_pages: bool
) -> None:
    truth = layout.truth(limit, use_zero_pages=use_zero_pages)
    rules = Rules(limit, use_zero_pages, order_known=True)
    check(truth, prediction(layout, rules, seed=limit), exact=True)


@COMMON
@given(layouts(huge=False), LIMITS, st.booleans())
def test_pages_merged_before_in_a_known_order_are_exact(
    layout: Layout, limit: int, use_zero_pages: bool
) -> None:
    truth = layout.truth(limit, use_zero_pages=use_zero_pages)
    rules = Rules(limit, use_zero_pages, order_known=True)
    check(truth, prediction(layout, rules, seed=limit), exact=True)


NOT_ZERO = st.sampled_from([1, 2, UNIQUE])


@COMMON
@given(layouts(contents=NOT_ZERO), LIMITS)
def test_huge_pages_in_a_known_order_are_exact(layout: Layout, limit: int) -> None:
    truth = layout.truth(limit, use_zero_pages=False)
    check(truth, prediction(layout, Rules(limit, order_known=True), seed=limit), exact=True)


@COMMON
@given(layouts(), st.booleans())
def test_all_zero_pages_in_huge_pages_are_exact_below_the_limit(
    layout: Layout, use_zero_pages: bool
) -> None:
    """Beyond it, what searches of the unstable tree come by depends on the bytes of all pages."""
    truth = layout.truth(256, use_zero_pages=use_zero_pages)
    rules = Rules(256, use_zero_pages, order_known=True)
    check(truth, prediction(layout, rules, seed=1), exact=True)


@COMMON
@given(layouts(), LIMITS, st.booleans())
def test_one_process_adds_up_to_the_same_at_once(
    layout: Layout, limit: int, use_zero_pages: bool
) -> None:
    """What shortens the way of a lone process: frames that others share with it, or KSM pages."""
    pages = layout.pages()
    mine = pages.process_of_region()[pages.region_of(np.arange(len(pages.frames)))] == 0
    frames = pages.frames & FRAME_MASK
    elsewhere = mine & np.isin(frames, frames[~mine])
    alone = Layout([layout.processes[0]], [layout.zero_pages[0]]).pages()
    order = np.argsort(alone.scan_order(np.arange(len(alone.frames))))
    shared = np.zeros(len(order), bool)
    shared[order] = elsewhere[mine][np.argsort(pages.scan_order(np.flatnonzero(mine)))]
    alone.frames[shared] &= ~Flag.EXCLUSIVE
    groups = grouping.group(alone)
    copies = (alone.frames & (Flag.DUPLICATE | Flag.KSM)) == Flag.DUPLICATE
    alone.frames[shared & copies] |= Flag.OUTSIDE
    rules = Rules(limit, use_zero_pages)
    at_once = predict(alone, groups, rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ZeroPages, "_all_apart", lambda *_: False)
        patch.setattr(Given, "copies_apart", lambda *_: False)
        patch.setattr(
            Contents, "_but_simple",
            lambda m, g: (m.pages.frames[g.order[g.offsets[:-1]]] & Flag.ZERO) == 0,
        )  # fmt: skip
        one_by_one = predict(alone, groups, rules)
    assert at_once == one_by_one


@COMMON
@given(layouts(), LIMITS, st.booleans(), st.randoms(use_true_random=False))
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("order_known", [False, True])
def test_the_truth_is_never_outside(
    hidden: bool, order_known: bool, layout: Layout, limit: int, use_zero_pages: bool,
    chance: random.Random,
) -> None:  # fmt: skip
    """With huge pages, in any order, with frame numbers hidden: equal, or within the bounds."""
    order = list(range(len(layout.processes)))
    if not order_known:
        chance.shuffle(order)
    truth = layout.truth(limit, use_zero_pages=use_zero_pages, order=order)
    rules = Rules(limit, use_zero_pages, order_known=order_known)
    check(truth, prediction(layout, rules, hidden=hidden, seed=limit), exact=False)


@COMMON
@given(
    layouts(nodes=True, contents=NOT_ZERO) | layouts(nodes=True, huge=False), LIMITS, st.booleans()
)
def test_numa_nodes_that_merge_apart_are_exact(
    layout: Layout, limit: int, use_zero_pages: bool
) -> None:
    truth = layout.truth(limit, use_zero_pages=use_zero_pages)
    rules = Rules(limit, use_zero_pages, order_known=True, merge_across_nodes=False)
    check(truth, prediction(layout, rules, seed=limit), exact=True)


@COMMON
@given(layouts(nodes=True), LIMITS, st.booleans(), st.booleans())
def test_numa_nodes_hidden_or_in_any_order_hold_the_truth(
    layout: Layout, limit: int, use_zero_pages: bool, hidden: bool
) -> None:
    truth = layout.truth(limit, use_zero_pages=use_zero_pages)
    rules = Rules(limit, use_zero_pages, merge_across_nodes=False)
    check(truth, prediction(layout, rules, hidden=hidden, seed=limit), exact=False)


@COMMON
@given(layouts(pins=True), LIMITS, st.booleans())
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("order_known", [False, True])
def test_pinned_pages_never_put_the_truth_outside(
    hidden: bool, order_known: bool, layout: Layout, limit: int, use_zero_pages: bool
) -> None:
    truth = layout.truth(limit, use_zero_pages=use_zero_pages)
    rules = Rules(limit, use_zero_pages, order_known=order_known)
    check(truth, prediction(layout, rules, hidden=hidden, seed=limit), exact=False)


@pytest.mark.parametrize("use_zero_pages", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_huge_page_is_locked_by_a_mapping_of_any_of_its_pages(
    hidden: bool, use_zero_pages: bool
) -> None:
    """A parent locks a huge page, its child alone still maps the all-zero page in it."""
    layout = Layout()
    p = layout.process()
    layout.page(p, 1)
    layout.huge(p, [ZERO, 1], locked=True)
    layout.page(p, ZERO)
    layout.fork(p)
    zero = next(i for i, m in enumerate(layout.processes[p]) if m.frame.huge)
    layout.rewrite(p, zero, UNIQUE)
    truth = layout.truth(256, use_zero_pages=use_zero_pages)
    rules = Rules(256, use_zero_pages, order_known=True)
    check(truth, prediction(layout, rules, hidden=hidden), exact=False)


def test_257_pages_over_three_processes() -> None:
    """The leftover is the last process's where the order is known, any one's where not."""
    layout = Layout()
    for n in (100, 100, 57):
        p = layout.process()
        for _ in range(n):
            layout.page(p, 7)
    known = prediction(layout, Rules(256, order_known=True))
    assert [p.ksm_merging_pages for p in known.processes] == [100, 100, 56]
    unknown = prediction(layout, Rules(256))
    assert (unknown.pages_sharing, unknown.pages_unshared) == (255, 1)
    assert [p.ksm_merging_pages for p in unknown.processes] == [None, None, None]
    assert [p.bounds["ksm_merging_pages"] for p in unknown.processes] == [
        (99, 100), (99, 100), (56, 57),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("n", "shared", "sharing", "unshared", "chains", "dups"),
    [
        (1, 0, 0, 1, 0, 0), (2, 1, 1, 0, 0, 0), (3, 1, 2, 0, 0, 0), (255, 1, 254, 0, 0, 0),
        (256, 1, 255, 0, 0, 0), (257, 1, 255, 1, 0, 0), (258, 2, 256, 0, 1, 2),
        (512, 2, 510, 0, 1, 2), (513, 2, 510, 1, 1, 2), (1000, 4, 996, 0, 1, 4),
    ],
)  # fmt: skip
def test_sizes_around_max_page_sharing(
    n: int, shared: int, sharing: int, unshared: int, chains: int, dups: int
) -> None:
    """As counted on Linux 6.18."""
    layout = Layout()
    p = layout.process()
    for _ in range(n):
        layout.page(p, 7)
    found = prediction(layout, Rules(256))
    assert found.pages_shared == shared
    assert found.pages_sharing == sharing
    assert found.pages_unshared == unshared
    assert (found.stable_node_chains, found.stable_node_dups) == (chains, dups)
    assert found.general_profit == sharing * 4096 - n * 64
    assert found.frames_freed == sharing


def test_random_layouts_on_paper() -> None:
    """Those that `tests.random_layouts` makes of real memory: new ones at each run."""
    seed = secrets.randbelow(10**9)
    for number in itertools.islice(numbers(seed), 500):
        result = on_paper(number)
        assert not result.wrong, (number, result.chance, [str(f) for f in result.wrong])


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(
    ("frames", "outside", "freed"), [(2, 0, (1, 1)), (2, 1, (0, 1)), (2, 2, (0, 0)), (5, 2, (2, 3))]
)
def test_frames_mapped_outside_the_scan_stay(
    frames: int, outside: int, freed: tuple[int, int], across: bool
) -> None:
    """But one of them may become the node's, which stays anyhow."""
    layout = Layout()
    p = q = layout.process()
    if across:
        q = layout.process()
    for i in range(frames):
        layout.page(q if i else p, 1)
    layout.page(p, 2)
    pages = layout.pages()
    groups = grouping.group(pages)
    word = pages.frames[groups.order[:outside]]
    pages.frames[groups.order[:outside]] = (word & ~Flag.EXCLUSIVE) | Flag.OUTSIDE
    found = predict(pages, groups, Rules())
    assert (found.pages_shared, found.pages_sharing) == (1, frames - 1)
    assert found.bounds.get("frames_freed", (found.frames_freed,) * 2) == freed
    if outside:
        parts = found.breakdown.within_processes, found.breakdown.across_processes
        within = min(frames - 2, freed[0]) if across else freed[0]
        assert parts == (within, freed[0] - within)


def test_no_pages_at_all() -> None:
    layout = Layout()
    layout.process()
    found = prediction(layout, Rules())
    assert not any(getattr(found, name) for name in FIELDS)
