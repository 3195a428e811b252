"""The steady state: when to look, and what follows from the looks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.model import steady
from dedup.model.prediction import FIELDS, PROCESS_FIELDS, Rules
from tests.model.layouts import Layout, prediction

PAGE = 4096


def copies(*, volatile: int, of: int = 100) -> Layout:
    """`of` pages in two processes each, the first of them volatile."""
    layout = Layout()
    for p in range(2):
        layout.process()
        for i in range(of):
            layout.page(p, i + 1, volatile=i < volatile)
    return layout


@pytest.mark.parametrize(
    ("full_scan", "at", "extrapolated"),
    [
        (0.001, (0.0, 0.05), False),
        (1.0, (0.0, 1.6), False),
        (3.0, (0.0, 4.8), False),
        (4.0, (0.0, 6.4 / 3, 6.4), False),
        (4.8, (0.0, 2.5, 7.5), True),
        (3600, (0.0, 2.5, 7.5), True),
    ],
)
def test_when_to_look(full_scan: float, at: tuple[float, ...], extrapolated: bool) -> None:
    looks = steady.looks(full_scan)
    assert looks.at == pytest.approx(at)
    assert looks.extrapolated == extrapolated
    assert all(b - a <= 5 for a, b in zip(looks.at, looks.at[1:], strict=False))


@given(
    st.floats(1, 1e7), st.floats(0.01, 3), st.floats(0.05, 1), st.floats(2, 5), st.floats(1, 100)
)
def test_a_weibull_loss_is_found_exactly(
    first: float, loss: float, beta: float, distance: float, times: float
) -> None:
    def left(t: float) -> float:
        return first * math.exp(-loss * t**beta)

    elapsed = distance * times
    value, (low, high) = steady.kept(first, left(1), left(distance), distance, elapsed)
    assert value == pytest.approx(left(elapsed), rel=1e-6)
    assert low <= value * (1 + 1e-9)
    assert value <= high * (1 + 1e-9)


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6), st.floats(3, 1e4))
def test_any_three_figures_give_one_between_the_bounds(
    first: float, second: float, third: float, elapsed: float
) -> None:
    value, (low, high) = steady.kept(first, second, third, 3, elapsed)
    assert 0 <= low <= value * (1 + 1e-9) + 1e-9
    assert value <= high * (1 + 1e-9) + 1e-9
    assert high == third


def test_what_does_not_change_is_as_it_is() -> None:
    assert steady.kept(500, 500, 500, 3, 1000) == (500, (500, 500))


@pytest.mark.parametrize(
    ("first", "last", "changed", "drifts"),
    [
        (7000, 7000, 7000, False),
        (7000, 6700, 600, True),
        (7000, 6950, 600, False),
        (31000, 35300, 9000, True),  # a heap that warms up
        (300, 310, 40, False),  # a few pages are chance
        (0, 0, 0, False),
    ],
)
def test_drift(first: float, last: float, changed: int, drifts: bool) -> None:
    assert steady.drifting(first, last, changed) == drifts


def test_extrapolated_counters_add_up() -> None:
    first, second, third = (prediction(copies(volatile=v), Rules()) for v in (0, 10, 20))
    found = steady.extrapolate((first, second, third), 3.0, 30.0, PAGE)
    assert found.pages_sharing is not None
    assert 0 < found.pages_sharing < 80
    assert found.pages_shared == found.pages_sharing
    numbers = [getattr(found, n) for n in FIELDS[:4]]
    assert sum(numbers) == 200
    assert found.general_profit == found.pages_sharing * PAGE - 200 * 64
    assert found.frames_freed == found.pages_sharing
    low, high = found.bounds["pages_sharing"]
    assert low < found.pages_sharing < high == 80
    for process in found.processes:
        assert process.ksm_merging_pages == found.pages_sharing
        assert process.ksm_process_profit == found.pages_sharing * PAGE - 100 * 64


def test_what_was_a_range_stays_one() -> None:
    first, second, third = (prediction(copies(volatile=v), Rules()) for v in (0, 10, 20))
    unclear = replace(third, pages_sharing=None, bounds={"pages_sharing": (70, 80)})
    found = steady.extrapolate((first, second, unclear), 3.0, 30.0, PAGE)
    assert found.pages_sharing is None
    low, high = found.bounds["pages_sharing"]
    assert low < 70
    assert high == 80


def test_a_drifting_memory_gives_what_was_seen() -> None:
    several = [prediction(copies(volatile=v), Rules()) for v in (0, 30)]
    found = steady.seen(several)
    assert found.pages_sharing is None
    assert found.bounds["pages_sharing"] == (70, 100)
    assert found.bounds["general_profit"] == (70 * PAGE - 200 * 64, 100 * PAGE - 200 * 64)
    assert found.processes[0].ksm_rmap_items == 100
    assert found.processes[0].bounds["ksm_merging_pages"] == (70, 100)
    for name in PROCESS_FIELDS:
        assert (getattr(found.processes[0], name) is None) == (name in found.processes[0].bounds)


def test_how_far_the_counter_is_ahead() -> None:
    # A page in a hundred is written to in a second; the next visit is half of two seconds away.
    assert steady.overstated(1000, 1000 * math.exp(-0.01), 1.0, 2.0) == pytest.approx(9.9, abs=0.1)
    assert steady.overstated(1000, 1000, 1.0, 2.0) == 0
    assert steady.overstated(0, 0, 1.0, 2.0) == 0


def test_a_process_that_ended_leaves_a_range() -> None:
    last = prediction(copies(volatile=20), Rules())
    found = steady.at_the_most(last, 0.5, PAGE)
    assert found.pages_sharing is None
    assert found.bounds["pages_sharing"] == (40, 80)
    assert found.bounds["pages_volatile"] == (40, 120)
    assert steady.at_the_most(last, 1.0, PAGE) == last


def test_pages_not_read_again_are_unshared_or_volatile() -> None:
    layout = copies(volatile=7)
    for i in range(30):
        layout.page(0, 1_000 + i)
    before = prediction(layout, Rules())
    # Of these 30, 5 lie where each look read.
    after = steady.not_read_again(before, 25)
    assert (after.pages_unshared, after.pages_volatile) == (None, None)
    assert after.bounds == {"pages_unshared": (5, 30), "pages_volatile": (14, 39)}
    same = {"pages_unshared": 30, "pages_volatile": 14, "bounds": {}}
    assert replace(after, **same) == before  # type: ignore[arg-type]
    # Never more than there are.
    most = steady.not_read_again(before, 500).bounds
    assert most == {"pages_unshared": (0, 30), "pages_volatile": (14, 230)}


def test_pages_rewritten_with_their_own_bytes_are_apart_for_a_scan() -> None:
    last = prediction(copies(volatile=0), Rules())
    assert steady.rewritten(last, 0.0, PAGE) == last
    high = last.pages_sharing
    assert high is not None
    found = steady.rewritten(last, 20.0, PAGE)
    low = found.bounds["pages_sharing"][0]
    assert found.bounds["pages_sharing"][1] == high
    # A share of the 25 is of the nodes.
    assert high - 25 <= low <= high - 15
    assert found.bounds["stable_node_chains"][0] == 0
    for before, after in zip(last.processes, found.processes, strict=True):
        assert before.ksm_merging_pages is not None
        assert after.bounds["ksm_merging_pages"] == (
            max(0, before.ksm_merging_pages - 25),
            before.ksm_merging_pages,
        )
    all_of_it = steady.rewritten(last, 1e9, PAGE)
    assert all_of_it.bounds["pages_sharing"] == (0, high)


def test_an_extrapolated_breakdown_adds_up() -> None:
    first, second, third = (prediction(copies(volatile=v), Rules()) for v in (0, 10, 20))
    found = steady.extrapolate((first, second, third), 3.0, 30.0, PAGE)
    parts = found.breakdown
    total = parts.zero_pages + parts.within_processes + parts.across_processes
    assert found.frames_freed == pytest.approx(total, abs=2)
