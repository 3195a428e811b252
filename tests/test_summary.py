"""Passes over frame words: each against the same in plain Python."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dedup import _core
from dedup import pages as module
from dedup.pages import FRAME_MASK, HINT_PAGES, Census, Flag, Groups

FLAGS = [Flag.EXCLUSIVE, Flag.KSM, Flag.THP, Flag.ZERO, Flag.HIDDEN, Flag.OUTSIDE]
FAR = (1 << 48) - 1
HIDDEN = int(Flag.HIDDEN)


@st.composite
def words(draw: st.DrawFn, most: int = 60) -> np.ndarray:
    """Frame words of few frames, and of some that lie far away."""
    frames = st.integers(0, 40) | st.sampled_from([1 << 20, 3 << 20])
    flags = st.sets(st.sampled_from(FLAGS), max_size=3).map(lambda s: sum(map(int, s)))
    word = st.tuples(frames, flags).map(lambda pair: pair[0] | pair[1])
    return np.array(draw(st.lists(word, max_size=most)), np.uint64)


@st.composite
def grouped(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frame words, and groups of them, some of them empty."""
    frames = draw(words())
    order = np.array(draw(st.permutations(range(len(frames)))), np.uint32)
    cuts = sorted(draw(st.lists(st.integers(0, len(frames)), max_size=8)))
    return frames, order, np.array(cuts or [0], np.int64)


MASKS = arrays.arrays(bool, 6).map(
    lambda on: int(sum(int(f) for f, x in zip(FLAGS, on, strict=True) if x))
)


@given(words(), MASKS, MASKS, MASKS)
def test_words_are_chosen_by_their_flags(
    frames: np.ndarray, mask: int, value: int, flags: int
) -> None:
    value &= mask
    chosen = [i for i, w in enumerate(frames.tolist()) if w & mask == value]
    assert _core.count(frames, mask, value) == len(chosen)
    assert _core.select(frames, mask, value).tolist() == chosen
    numbers = [int(frames[i]) & FAR for i in chosen]
    assert _core.all_apart(frames, mask, value) == (len(set(numbers)) == len(numbers))
    after = [w | flags if i in set(chosen) else w for i, w in enumerate(frames.tolist())]
    _core.put(frames, mask, value, flags)
    assert frames.tolist() == after


def test_frames_too_far_apart_are_not_called_apart() -> None:
    frames = np.array([0, FAR], np.uint64)
    assert not _core.all_apart(frames, 0, 0)
    assert _core.all_apart(frames[1:], 0, 0)
    assert _core.all_apart(frames[:0], 0, 0)


@given(words(), st.integers(0, 10), st.integers(0, 30), MASKS, st.integers(1, 9))
def test_runs_are_passed_alone(
    frames: np.ndarray, begin: int, count: int, mask: int, size: int
) -> None:
    begin = min(begin, len(frames))
    count = min(count, len(frames) - begin)
    runs = np.array([begin], np.int64), np.array([count], np.int64)
    inside = [i for i in range(begin, begin + count) if not int(frames[i]) & mask]
    heads = _core.block_heads(frames, *runs, mask, 0, size).tolist()
    assert set(heads) <= set(inside)
    assert {int(frames[i]) % (1 << 48) // size for i in heads} == {
        int(frames[i]) % (1 << 48) // size for i in inside
    }
    after = frames.copy()
    after[inside] |= Flag.SEEN
    _core.put_in_runs(frames, *runs, mask, 0, int(Flag.SEEN))
    assert (frames == after).all()


def test_runs_beyond_the_pages_are_refused() -> None:
    frames = np.zeros(4, np.uint64)
    for first, count in (([3], [2]), ([-1], [1]), ([0], [-1]), ([0, 1], [1])):
        with pytest.raises(ValueError, match="run"):
            _core.put_in_runs(frames, np.array(first), np.array(count), 0, 0, 1)


@given(words(), MASKS, st.integers(1, 9))
def test_words_are_counted_by_block(frames: np.ndarray, mask: int, size: int) -> None:
    others, block, count, last = _core.by_block(frames, mask, 0, int(Flag.THP), size)
    chosen = [(i, w) for i, w in enumerate(frames.tolist()) if not w & mask]
    inside = [(i, (w & FAR) // size) for i, w in chosen if w & int(Flag.THP)]
    assert others.tolist() == [i for i, w in chosen if not w & int(Flag.THP)]
    assert dict(zip(block.tolist(), count.tolist(), strict=True)) == Counter(b for _, b in inside)
    assert dict(zip(block.tolist(), last.tolist(), strict=True)) == {b: i for i, b in inside}
    assert (np.diff(block) > 0).all()


@given(grouped(), MASKS, MASKS, MASKS, st.integers(0, 4))
def test_groups_are_added_up(
    groups: tuple[np.ndarray, np.ndarray, np.ndarray], skip: int, mask: int, value: int, limit: int
) -> None:
    frames, order, offsets = groups
    value &= mask
    some, every, sums = _core.sums(frames, order, offsets, skip, mask, value, limit)
    for g in range(len(offsets) - 1):
        members = [int(frames[i]) for i in order[offsets[g] : offsets[g + 1]]]
        if members and members[0] & skip:
            assert some[g] == every[g] == members[0] & ~FAR
            assert not sums[:, g].any()
            continue
        # A frame known to be one page's own has a name of its own.
        named = [
            (w, -i if w & mask == value or w & int(Flag.HIDDEN) else 1 + (w & FAR))
            for i, w in enumerate(members, 1)
        ]
        merged = Counter(name for w, name in named if w & int(Flag.KSM))
        assert sums[:, g].tolist() == [
            merged.total(),
            len(merged),
            sum(max(0, limit - n) for n in merged.values()),
            len({name for w, name in named if not w & int(Flag.KSM)}),
            len({name for w, name in named if w & int(Flag.OUTSIDE)}),
        ]
        flags = [w & ~FAR for w in members]
        assert some[g] == np.bitwise_or.reduce(np.array(flags, np.uint64), initial=0)
        assert every[g] == np.bitwise_and.reduce(np.array(flags, np.uint64), initial=~FRAME_MASK)


def test_many_frames_in_a_group() -> None:
    """More than there are places for at first, between groups of few."""
    chance = np.random.default_rng(3)
    n = 50_000
    frames = chance.integers(0, 30_000, n).astype(np.uint64)
    frames[::3] |= Flag.KSM
    offsets = np.array([0, 3, 20_000, 20_002, 49_000, n], np.int64)
    _, _, sums = _core.sums(frames, np.arange(n, dtype=np.uint32), offsets, 0, 1, 2, 3)
    for g, (low, high) in enumerate(itertools.pairwise(offsets.tolist())):
        word = frames[low:high]
        ksm = (word & Flag.KSM) != 0
        names, count = np.unique(word[ksm], return_counts=True)
        room = np.maximum(0, 3 - count).sum()
        alone = len(np.unique(word[~ksm]))
        assert sums[:, g].tolist() == [ksm.sum(), len(names), room, alone, 0]


@given(grouped(), MASKS, MASKS, st.integers(1, 9), st.data())
def test_blocks_of_groups(
    groups: tuple[np.ndarray, np.ndarray, np.ndarray],
    skip: int,
    mask: int,
    size: int,
    data: st.DataObject,
) -> None:
    frames, order, offsets = groups
    n = len(offsets) - 1
    which = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), np.uint8)
    members = [
        [int(frames[i]) for i in order[offsets[g] : offsets[g + 1]]] for g in range(n)
    ]  # fmt: skip
    found = _core.blocks_of(frames, order, offsets, which, mask, 0, size)
    assert found.tolist() == sorted(
        {(w & FAR) // size for g in range(n) if which[g] for w in members[g] if not w & mask}
    )
    together = [
        bool(m)
        and not m[0] & skip
        and not any(w & mask for w in m)
        and len({(w & FAR) // size for w in m}) == 1
        for m in members
    ]
    one = _core.any_in_one_block(frames, order, offsets, skip, mask, 0, size)
    assert one == any(together)


@given(grouped(), MASKS, st.data())
def test_groups_by_process(
    groups: tuple[np.ndarray, np.ndarray, np.ndarray], mask: int, data: st.DataObject
) -> None:
    frames, order, offsets = groups
    n, pages = len(offsets) - 1, len(frames)
    which = np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), np.uint8)
    cuts = data.draw(st.lists(st.integers(1, 60), max_size=8))
    start = np.array(sorted({0, *cuts}), np.int64)
    process = np.array(
        data.draw(st.lists(st.integers(0, 3), min_size=len(start), max_size=len(start))), np.int64
    )
    owner = process[np.searchsorted(start, np.arange(pages), side="right") - 1]
    hint = np.searchsorted(start, np.arange(0, pages, HINT_PAGES), side="right") - 1
    counts, within = _core.by_process(
        frames, order, offsets, which, mask, 0, start, process, hint.astype(np.uint32), 4
    )
    expected = np.zeros((4, 4), np.int64)
    for g in range(n):
        index = order[offsets[g] : offsets[g + 1]].tolist()
        mine = sorted(int(owner[i]) for i in index)
        if not which[g] or not mine:
            assert within[g] == 0
            continue
        np.add.at(expected[0], mine, 1)
        if which[g] == 2 and mine[0] == mine[-1]:
            expected[1, mine[0]] += 1
        elif which[g] == 2:
            expected[2, mine[-1]] += 1
            expected[3, sorted(set(mine))] += 1
        words = [(i, int(frames[i])) for i in index]
        apart = [w & HIDDEN or not w & mask for _, w in words]
        names = {
            (int(owner[i]), -1 - i if own else w & FAR)
            for (i, w), own in zip(words, apart, strict=True)
        }
        assert within[g] == len(names) - len(set(mine))
    assert counts.tolist() == expected.tolist()


def test_a_process_that_there_is_not_is_refused() -> None:
    frames, order = np.zeros(4, np.uint64), np.arange(4, dtype=np.uint32)
    one, hint = np.zeros(1, np.int64), np.zeros(1, np.uint32)
    groups = frames, order, np.array([0, 4]), np.ones(1, np.uint8), 0, 0
    with pytest.raises(ValueError, match="no such process"):
        _core.by_process(*groups, one, one + 2, hint, 2)
    with pytest.raises(ValueError, match="no such stretch"):
        _core.by_process(*groups, one, one, hint + 1, 2)
    with pytest.raises(ValueError, match="other pages"):
        _core.by_process(*groups, one, one, np.zeros(2, np.uint32), 2)


@pytest.mark.parametrize("most", [8, 1 << 20, 1 << 36, 1 << 48])
@pytest.mark.parametrize("size", [1, 3, 512])
def test_pages_by_frame(most: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_PAGES", 40)
    chance = np.random.default_rng(1)
    for n in (0, 1, 39, 1000, 5000):
        frames = chance.integers(0, most, n).astype(np.uint64)
        frames[n // 2 :] = frames[chance.integers(0, max(1, n // 2), n - n // 2)]
        odd = chance.random(n) < 0.3
        frames[odd] |= Flag.KSM
        nothing = np.empty(0, np.int64)
        census = Census(nothing, nothing.view(np.uint64), nothing)
        groups = Groups(np.empty(0, np.uint32), np.zeros(1, np.int64), n, census, _core)
        parts = list(groups.by_frame(frames, Flag.KSM, np.uint64(0), size))
        blocks = [np.unique(frame // size).tolist() for frame, _ in parts]
        assert len({b for block in blocks for b in block}) == sum(map(len, blocks))
        found = [pair for f, i in parts for pair in zip(f.tolist(), i.tolist(), strict=True)]
        index = np.flatnonzero(~odd).tolist()
        assert found == sorted((int(frames[i]), i) for i in index)


def test_groups_beyond_the_order_are_refused() -> None:
    frames, order = np.zeros(4, np.uint64), np.arange(4, dtype=np.uint32)
    for offsets in (np.array([0, 5]), np.array([-1, 2])):
        with pytest.raises(ValueError, match="beyond"):
            _core.sums(frames, order, offsets, 0, 0, 0, 1)
        with pytest.raises(ValueError, match="beyond"):
            _core.blocks_of(frames, order, offsets, np.ones(1, np.uint8), 0, 0, 1)
        with pytest.raises(ValueError, match="beyond"):
            _core.any_in_one_block(frames, order, offsets, 0, 0, 0, 1)
