from __future__ import annotations

import itertools
import math
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.errors import Usage
from dedup.estimate import instances, join
from dedup.estimate.fingerprints import Instance
from dedup.estimate.instances import Incidence
from dedup.estimate.rules import Counts, Rules, kept
from dedup.model.fate import closed_form

from .build import Row, counted, instance

RULES = Rules()


@st.composite
def rows(draw: st.DrawFn) -> dict[int, Row]:
    names = draw(st.sets(st.integers(0, 30), max_size=20))
    out = {}
    for name in sorted(names):
        mappings = draw(st.integers(1, 12))
        out[name] = mappings, draw(st.integers(1, mappings))
    return out


@st.composite
def services(draw: st.DrawFn) -> list[Instance]:
    layouts = draw(st.lists(rows(), min_size=1, max_size=5))
    zero = draw(st.sampled_from([None, 0, 7]))
    volatile = draw(st.integers(0, 5))
    return [instance(i, r, zero=zero, volatile=volatile * i) for i, r in enumerate(layouts)]


rules = st.builds(Rules, st.integers(2, 20), st.booleans())


def two_peaks(k: int, shared: int, own: int, first: int = 0) -> list[Instance]:
    """Instances with so many contents in common, and so many of their own."""
    return [
        instance(
            i,
            {
                **dict.fromkeys(range(shared), (1, 1)),
                **{(i + 1 << 20) + c: (1, 1) for c in range(own)},
            },
        )
        for i in range(first, first + k)
    ]


@given(services(), rules)
def test_what_was_seen_is_exact(seen: list[Instance], rules: Rules) -> None:
    found = Incidence(seen, rules).curve(len(seen))
    for j, frames in enumerate(found, 1):
        every = [counted(s, rules) for s in itertools.combinations(seen, j)]
        assert frames.frames == pytest.approx(mean(every))
        assert frames.low == min(every)
        assert frames.high == max(every)


@given(services())
def test_rarefaction_is_the_mean_over_all_subsets(seen: list[Instance]) -> None:
    i = Incidence(seen, Rules(1 << 20))
    for j in range(len(seen) + 1):
        unions = [
            len(
                {n for one in s for n in one.contents.fingerprint[one.contents.flags == 0].tolist()}
            )
            for s in itertools.combinations(seen, j)
        ]
        assert i.rarefied(j) == pytest.approx(mean(unions))


@given(services(), rules)
def test_more_instances_need_more_and_the_interval_holds_them(
    seen: list[Instance], rules: Rules
) -> None:
    curve = Incidence(seen, rules).curve(24)
    assert len(curve) == 24
    for point in curve:
        assert point.low <= point.frames + 1e-9
        assert point.frames <= point.high + 1e-9
    for before, after in itertools.pairwise(curve):
        assert after.frames >= before.frames - 1e-9
        assert after.high >= before.high - 1e-9


@given(st.integers(2, 5), st.integers(0, 50), st.integers(0, 50), st.integers(6, 40))
def test_two_peaks_go_on_exactly(k: int, shared: int, own: int, n: int) -> None:
    point = Incidence(two_peaks(k, shared, own), RULES).curve(n)[-1]
    assert point.frames == pytest.approx(counted(two_peaks(n, shared, own), RULES))


@given(rows(), rules, st.integers(1, 3), st.integers(4, 30))
def test_alike_instances_make_chains(layout: dict[int, Row], rules: Rules, k: int, n: int) -> None:
    alike = [instance(i, layout, zero=0) for i in range(n)]
    point = Incidence(alike[:k], rules).curve(n)[-1]
    if k == 1:  # that they are alike can't be known
        assert point.low == pytest.approx(counted(alike, rules))
        return
    assert point.frames == pytest.approx(counted(alike, rules))


@given(st.integers(2, 1000), st.integers(2, 300))
def test_frames_kept_are_those_of_the_model(copies: int, limit: int) -> None:
    nodes, left = closed_form(np.array([copies]), limit)
    one = np.array([float(copies)])
    none = np.zeros(1)
    found = kept(Counts(one, one, none, none, none != 0), Rules(limit))
    assert found[0] == nodes[0] + left[0]


def test_what_is_new_gets_less_by_a_power() -> None:
    # Contents in 1, 2, … of 4: the new ones go as a power of the number of instances.
    incidence = {1: 60, 2: 20, 3: 12, 4: 8}
    layouts: list[dict[int, Row]] = [{} for _ in range(4)]
    name = 0
    for q, times in incidence.items():
        for _, members in zip(range(times), itertools.cycle(itertools.combinations(range(4), q))):
            for member in members:
                layouts[member][name] = 1, 1
            name += 1
    i = Incidence([instance(n, r) for n, r in enumerate(layouts)], RULES)
    new, before = i.rarefied(4) - i.rarefied(3), i.rarefied(3) - i.rarefied(2)
    alpha = math.log(before / new) / math.log(4 / 3)
    assert i.exponent() == pytest.approx(alpha)
    assert alpha > 0
    expected = 100 + sum(new * (j / 4) ** -alpha for j in range(5, 11))
    point = i.curve(10)[-1]
    assert point.frames == pytest.approx(expected)
    assert point.lin == pytest.approx(100 + 6 * new)
    assert point.frames < point.lin


def test_the_interval_goes_by_what_they_have_of_their_own() -> None:
    seen = [two_peaks(1, 1000, own, first=i)[0] for i, own in enumerate((60, 70, 65))]
    point = Incidence(seen, RULES).curve(10)[-1]
    assert point.frames == pytest.approx(1195 + 7 * 65)
    # Student's t of two degrees, times the deviation of the mean of three less that of seven.
    half = 4.303 * 5 * math.sqrt(1 / 3 + 1 / 7)
    assert point.low == pytest.approx(1195 + 7 * (65 - half) - 0.01 * point.frames)
    assert point.high == pytest.approx(1195 + 7 * (65 + half) + 0.01 * point.frames)
    # Many instances: the mean is known well, the least and the most bound it.
    many = [two_peaks(1, 1000, 60 + i, first=i)[0] for i in range(21)]
    point = Incidence(many, RULES).curve(100)[-1]
    seen_frames = 1000 + 21 * 70
    assert point.low == pytest.approx(seen_frames + 79 * 60 - 0.01 * point.frames)
    assert point.high == pytest.approx(seen_frames + 79 * 80 + 0.01 * point.frames)


def test_the_interval_holds_sizes_that_vary() -> None:
    """Instances with normally distributed private frames: 95 of 100 studies hold the truth."""
    draw = np.random.default_rng(8)
    held = 0
    for _ in range(200):
        sizes = np.maximum(0, draw.normal(300, 30, 12)).astype(int).tolist()
        seen = [two_peaks(1, 10, own, first=i)[0] for i, own in enumerate(sizes[:3])]
        point = Incidence(seen, RULES).curve(12)[-1]
        held += point.low <= 10 + sum(sizes) <= point.high
    assert held >= 180


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (9, 2.262), (10, 2.228), (30, 2.042), (63, 1.998)]
)
def test_students_t(freedom: int, t: float) -> None:
    assert instances.student(freedom) == pytest.approx(t, abs=0.003)


def test_classes() -> None:
    one = two_peaks(2, 500, 10)
    alone = instance(9, {50_000 + c: (1, 1) for c in range(510)})
    i = Incidence([*one, alone], RULES)
    assert i.classes_suspected
    # Worst of all, whoever comes shares with nobody.
    assert i.curve(5)[-1].high >= counted([*one, alone], RULES) + 2 * 510
    # At the best, it is like the two that are alike.
    assert i.curve(100)[-1].frames >= counted([*one, alone], RULES) + 97 * 10
    assert not Incidence(two_peaks(3, 500, 10), RULES).classes_suspected
    # However many there are, the ones seen are among them.
    assert i.curve(10_000)[-1].low >= 0.98 * counted([*one, alone], RULES)
    # Two can't tell.
    assert not Incidence([one[0], alone], RULES).classes_suspected


def test_two_instances_bound_nothing_above() -> None:
    point = Incidence(two_peaks(2, 500, 10), RULES).curve(8)[-1]
    assert point.frames == 500 + 8 * 10
    assert point.high == pytest.approx(520 + 6 * 510)


def test_one_instance_counts_what_is_certain() -> None:
    i = Incidence([instance(0, {0: (5, 5), 1: (3, 3), 2: (1, 1)}, zero=0)], RULES)
    point = i.curve(10)[-1]
    # The zero page once, the others once in each.
    assert point.frames == point.high == 1 + 2 * 10
    assert point.low == 3


@pytest.mark.parametrize(("use", "frames"), [(False, 1), (True, 0)])
def test_zero_pages_in_huge_pages_go(use: bool, frames: int) -> None:
    # 100 in a huge page, 2 more: the huge page splits, and gives its zero pages back.
    i = Incidence(
        [instance(n, {0: (102, 102)}, zero=0, huge={0: 100}) for n in range(3)], Rules(256, use)
    )
    assert [p.frames for p in i.curve(6)] == [frames] * 6


def test_what_fork_shares_counts_once_without_ksm() -> None:
    # Workers of a pool: 100 of the master's frames, 20 of each one's own.
    workers = [
        instance(
            n,
            {
                **dict.fromkeys(range(100), (1, 1)),
                **{1000 * (n + 1) + c: (1, 1) for c in range(20)},
            },
            outside=dict.fromkeys(range(100), 1),
        )
        for n in range(3)
    ]
    i = Incidence(workers, RULES)
    assert i.without_ksm(np.array([1, 3, 10])).tolist() == [120, 160, 300]
    assert [p.frames for p in i.curve(10)] == [100 + 20 * n for n in range(1, 11)]


def test_many_instances_are_drawn_by_chance() -> None:
    seen = two_peaks(20, 50, 5)
    curve = Incidence(seen, RULES).curve(20)
    assert [p.frames for p in curve] == pytest.approx([50 + 5 * n for n in range(1, 21)])


def test_an_instance_without_contents() -> None:
    assert [p.frames for p in Incidence([instance(0, {})], RULES).curve(3)] == [0, 0, 0]


def test_too_many() -> None:
    with pytest.raises(Usage, match="65 instances"):
        Incidence(two_peaks(65, 1, 1), RULES)


@given(services(), rules, st.integers(1, 7))
def test_pieces_make_no_difference(seen: list[Instance], rules: Rules, rows: int) -> None:
    whole = Incidence(seen, rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "PIECE_ROWS", rows)
        patch.setattr(join, "PATTERNS_MOST", 3)
        pieces = Incidence(seen, rules)
    numbers = np.arange(1, 20)
    assert pieces.curve(20) == whole.curve(20)
    assert pieces.nodes(numbers) == pytest.approx(whole.nodes(numbers))
    assert pieces.fork_shared(numbers) == pytest.approx(whole.fork_shared(numbers))
    assert pieces.private.tolist() == whole.private.tolist()


def test_many_patterns_take_lines_between_points(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each content with a number of mappings of its own.
    layout = {c: (c + 1, c + 1) for c in range(300)}
    seen = [instance(i, layout) for i in range(3)]
    exact = [p.frames for p in Incidence(seen, RULES).curve(200)]
    monkeypatch.setattr(instances, "GROWTH_MOST", 300 * 20)
    monkeypatch.setattr(instances, "CELLS_MOST", 1000)
    found = [p.frames for p in Incidence(seen, RULES).curve(200)]
    assert found == pytest.approx(exact, rel=0.01)


def test_few_subsets_where_each_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "MASKS_MOST", 1)
    i = Incidence(two_peaks(8, 50, 5), RULES)
    assert len(i.subsets([4])) == instances.SUBSETS_LEAST
    assert [p.frames for p in i.curve(8)] == [50 + 5 * n for n in range(1, 9)]
