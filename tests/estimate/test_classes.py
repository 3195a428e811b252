"""Kinds among instances: told where there are, and not where there are none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.estimate.curve import Service
from dedup.estimate.instances import Incidence
from dedup.estimate.rules import Rules

from .build import counted, instance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.estimate.fingerprints import Instance

RULES = Rules()
STUDIES = 100
LAYOUT = 400
OWN = 40


def alike(draw: np.random.Generator, k: int, clump: int) -> list[Instance]:
    """Instances of one kind: some contents in all, some in each by chance, sizes that vary.

    Those by chance come `clump` at a time, the first ones more often.
    """
    chances = 1 / np.arange(1, 1 + 600 // clump) ** 0.7
    out = []
    for number in range(k):
        own = int(draw.uniform(100, 400))
        some = np.flatnonzero(draw.random(len(chances)) < chances).tolist()
        names = [*range(LAYOUT), *(10_000 + c * clump + i for c in some for i in range(clump))]
        names += range(1_000_000 * (number + 1), 1_000_000 * (number + 1) + own)
        out.append(instance(number, dict.fromkeys(names, (1, 1))))
    return out


def of_kinds(kinds: Sequence[int], *, copies: int = 1, common: int = 100) -> list[Instance]:
    """An instance of each of these kinds; a kind has all of its layout in common."""
    return [
        instance(
            number,
            {
                **dict.fromkeys(range(common), (1, 1)),
                **{1000 * (kind + 1) + c: (copies, copies) for c in range(LAYOUT)},
                **{1_000_000 * (number + 1) + c: (1, 1) for c in range(OWN)},
            },
        )
        for number, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("k", [3, 4, 8])
@pytest.mark.parametrize("clump", [1, 3])
def test_one_kind_is_rarely_taken_for_several(k: int, clump: int) -> None:
    draw = np.random.default_rng(6)
    false = sum(
        Incidence(alike(draw, k, clump), RULES).classes_suspected for _ in range(STUDIES)
    )  # fmt: skip
    assert false <= 0.05 * STUDIES


def test_chance_among_many_contents_is_no_kind() -> None:
    draw = np.random.default_rng(3)
    for _ in range(5):
        has = draw.random((8, 2000)) < 0.5
        seen = [
            instance(n, dict.fromkeys(np.flatnonzero(row).tolist(), (1, 1)))
            for n, row in enumerate(has)
        ]
        i = Incidence(seen, RULES)
        few, many, _ = i.pairs(0)
        assert many - few > 20 + 0.02 * 1000
        assert not i.classes_suspected


@pytest.mark.parametrize(("k", "seldom"), [(3, 0.2), (4, 0.2), (3, 0.5), (4, 0.5), (8, 0.5)])
def test_two_kinds_are_told_whenever_both_were_seen(k: int, seldom: float) -> None:
    draw = np.random.default_rng(7)
    both = 0
    for _ in range(STUDIES):
        kinds = (draw.random(k) < seldom).astype(int).tolist()
        seen = Incidence(of_kinds(kinds), RULES)
        assert seen.classes_suspected == (len(set(kinds)) > 1)
        both += len(set(kinds)) > 1
    assert both > 0.3 * STUDIES


@given(st.lists(st.integers(0, 2), min_size=3, max_size=8), st.integers(1, 4), st.integers(1, 9))
def test_whose_kind_is_whose(kinds: list[int], copies: int, max_page_sharing: int) -> None:
    # Chains make nothing of it.
    i = Incidence(of_kinds(kinds, copies=copies), Rules(max_page_sharing))
    if not 1 < len(set(kinds)) < len(kinds):
        # All alike, or all different: two have as much in common as two others.
        assert not i.classes_suspected
        return
    assert i.classes_suspected
    found = i.kinds(0)
    assert sorted(found) == sorted(
        [n for n, kind in enumerate(kinds) if kind == one] for one in set(kinds)
    )
    assert list(map(len, found)) == sorted(map(len, found), reverse=True)


def test_two_of_each_kind_are_told_though_all_have_as_much_of_their_own() -> None:
    i = Incidence(of_kinds([0, 0, 1, 1]), RULES)
    assert i.private.tolist() == [OWN] * 4
    assert i.classes_suspected


def test_sizes_are_no_kinds() -> None:
    seen = [
        instance(n, {**dict.fromkeys(range(LAYOUT), (1, 1)),
                     **{1_000_000 * (n + 1) + c: (1, 1) for c in range(own)}})
        for n, own in enumerate((50, 60, 500))
    ]  # fmt: skip
    assert not Incidence(seen, RULES).classes_suspected


@pytest.mark.parametrize("kinds", [[0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 1], [2, 1, 1, 0, 1]])
def test_further_ones_are_of_the_kinds_seen(kinds: list[int]) -> None:
    n = 20
    point = Incidence(of_kinds(kinds), RULES).curve(n)[-1]
    more = [kinds[i % len(kinds)] for i in range(n - len(kinds))]
    assert point.frames == pytest.approx(counted(of_kinds([*kinds, *more]), RULES))
    # Or each is a kind of its own.
    worst = counted(of_kinds([*kinds, *range(10, 10 + n - len(kinds))], common=0), RULES)
    assert point.high >= worst + 100
    assert point.worst == point.high


def test_the_worst_case_of_those_that_look_alike() -> None:
    seen = of_kinds([0, 0, 0])
    i = Incidence(seen, RULES)
    assert not i.classes_suspected
    point = i.curve(12)[-1]
    assert point.worst == counted(seen, RULES) + 9 * (100 + LAYOUT + OWN)
    # The interval knows nothing of a kind that was not seen; the worst case holds it.
    truth = counted(of_kinds([0] * 10 + [1] * 2), RULES)
    assert point.high < truth < point.worst


def test_services_have_their_own_kinds() -> None:
    web, db = of_kinds([0, 0, 1]), of_kinds([3, 3, 3, 4, 4, 4, 4])[:3]
    i = Incidence([*web, *db], RULES, [3, 3])
    assert [i.suspected(0), i.suspected(1)] == [True, False]


def test_larger_ones_may_come() -> None:
    """Sizes vary, nothing is shared: the bounds are not cut off at what the mean needs."""
    draw = np.random.default_rng(9)
    held = bounded = 0
    for _ in range(STUDIES):
        sizes = np.maximum(1, draw.normal(300, 40, 12)).astype(int).tolist()
        seen = [
            instance(n, {1_000_000 * (n + 1) + c: (1, 1) for c in range(own)})
            for n, own in enumerate(sizes[:3])
        ]
        point = Service(seen, RULES).curve(12)[-1]
        held += point.low_frames <= sum(sizes) <= point.high_frames
        bounded += sum(sizes) <= point.worst_frames
    assert held >= 0.9 * STUDIES
    assert bounded >= 0.9 * STUDIES
