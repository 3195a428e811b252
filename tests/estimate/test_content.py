"""The estimate from a sample of the contents against the model on everything."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.estimate import content
from dedup.estimate.sampled import Estimate
from dedup.kernel import memory as reading
from dedup.model.copies import NOT_STABLE
from dedup.model.prediction import FIELDS, Rules
from dedup.pages import FRAME_MASK, Flag

from .test_sampled import CASES, MIXED, RULES, Memory, lay, outside

PILOT = 0.05
FRAMES = 0.25
"""Of the rate, for pages kept by their frame."""


def sample(
    memory: Memory,
    rate: float,
    seed: int,
    rules: Rules,
    looks: int = 2,
    elsewhere: int | None = None,
) -> Estimate:
    """Keep what the core would, with another seed of the hash each time."""
    other = reading.mixed(np.array([seed], np.uint64))
    whole = memory.pages(looks=looks)
    hashes = reading.mixed(whole.hashes ^ other)
    zero = int(reading.mixed(other)[0])
    hidden = bool((memory.flags & Flag.HIDDEN).any())
    names = np.arange(len(hashes), dtype=np.uint64) if hidden else whole.frames & FRAME_MASK
    drawn = reading.mixed(names ^ ~other)
    met = drawn < np.uint64(int(PILOT * 2**64))
    pilot = content.Pilot.of(hashes[met], zero, PILOT)
    below = min(2**64 - 1, int(rate * 2**64))
    chosen = reading.Content(below, pilot.counted, 0).chosen(hashes)
    which = chosen | (drawn < np.uint64(int(rate * FRAMES * 2**64)))
    counted = np.array([np.count_nonzero(hashes == h) for h in pilot.counted])
    kept = replace(memory.pages(which, looks), hashes=hashes[which])
    first = replace(kept, frames=kept.frames & ~NOT_STABLE, looks=1)
    present = memory.present()
    stock = content.take_stock(
        first, chosen[which], pilot.counted, counted, present, rate, rate * FRAMES, pilot.pairs
    )
    return content.estimate(
        kept, stock, present, np.bincount(memory.process), rules,
        mappings_of=None if elsewhere is None else lambda f: np.full(len(f), elsewhere),
    )  # fmt: skip


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("case", CASES)
def test_ranges_hold_the_truth(case: str, rules: str) -> None:
    memory = lay(rng=np.random.default_rng(7), **CASES[case])  # type: ignore[arg-type]
    truth = memory.truth(RULES[rules])
    wrong: Counter[str] = Counter()
    for number, rate in enumerate((0.06, 0.25, 0.9, 0.1)):
        # Each case has samples of its own.
        found = sample(memory, rate, zlib.crc32(f"{case} {number}".encode()), RULES[rules])
        wrong.update(outside(found, truth).keys())
        assert found.solved
        assert found.point.keys() == found.prediction.bounds.keys()
        for name, (low, high) in found.prediction.bounds.items():
            assert low <= found.point[name] <= high
            assert getattr(found.prediction, name) is None
    # 95 of 100 is what is promised.
    assert all(times <= 1 for times in wrong.values()), wrong


@pytest.mark.parametrize("case", ["plain", "zero"])
def test_one_look_tells_nothing_of_volatile_pages(case: str) -> None:
    memory = lay(rng=np.random.default_rng(3), **CASES[case])  # type: ignore[arg-type]
    found = sample(memory, 0.2, 3, Rules(), looks=1)
    assert found.prediction.pages_volatile is None
    assert "pages_volatile" not in {*found.prediction.bounds, *found.point}
    assert outside(found, memory.truth(Rules(), looks=1)) == {}


def test_with_all_contents_it_is_exact() -> None:
    memory = lay(MIXED, np.random.default_rng(3), zero=5_000)
    found, truth = sample(memory, 1.0, 1, Rules(), looks=1), memory.truth(Rules(), looks=1)
    for name in FIELDS:
        assert getattr(found.prediction, name) == getattr(truth, name), name


def test_a_larger_sample_tells_more() -> None:
    memory = lay(MIXED, np.random.default_rng(3), zero=5_000)
    widths = []
    for rate in (0.03, 0.12, 0.48):
        low, high = sample(memory, rate, 5, Rules()).prediction.bounds["frames_freed"]
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1] > 2.25 * widths[2]


def test_a_content_with_a_tenth_of_the_pages_makes_no_range_wide() -> None:
    """Whether the sample has it or not."""
    rng = np.random.default_rng(3)
    light, heavy = lay([(90_000, 1)], rng), lay([(90_000, 1), (1, 10_000)], rng)
    for seed in range(3):
        (a, b), (c, d) = (
            sample(m, 0.02, seed, Rules(), looks=1).prediction.bounds["frames_freed"]
            for m in (light, heavy)
        )
        assert d - c < 1.5 * (b - a) + 100
        assert c <= 10_000 - math.ceil(10_000 / 256) <= d


def test_frames_mapped_elsewhere_may_stay() -> None:
    memory = lay([(40_000, 1), (5, 8_000)], np.random.default_rng(3))
    memory.flags[: len(memory.flags) // 2] = 0

    def spared(mappings: int) -> tuple[int, int]:
        found = sample(memory, 0.2, 1, Rules(), elsewhere=mappings)
        return found.prediction.bounds["frames_freed"]

    nodes = 5 * math.ceil(8_000 / 256)
    assert spared(1)[0] <= 40_000 - nodes <= spared(1)[1]
    low, high = spared(2)
    assert low < 20_000 - nodes < high < 25_000


@given(n=st.integers(0, 3_000), rate=st.floats(0.01, 1), seed=st.integers(0, 2**32))
def test_limits_go_around_the_point(n: int, rate: float, seed: int) -> None:
    seen = int(np.random.default_rng(seed).binomial(n, rate))
    found = content.scaled(seen, rate)
    assert seen <= found.low <= found.point + 1e-9 <= found.high + 2e-9
    assert found.point == pytest.approx(seen / rate)


@settings(max_examples=30)
@given(n=st.integers(0, 400), rate=st.floats(0.02, 0.98))
def test_limits_hold_a_number_as_often_as_they_say(n: int, rate: float) -> None:
    """By the binomial distribution itself, not by chance."""
    held = 0.0
    for seen in range(n + 1):
        chance = math.comb(n, seen) * rate**seen * (1 - rate) ** (n - seen)
        found = content.scaled(seen, rate)
        held += chance * (found.low - 1e-9 <= n <= found.high + 1e-9)
    assert held >= 0.95


@settings(max_examples=4, deadline=None)
@given(
    copies=st.lists(st.tuples(st.integers(1, 600), st.integers(1, 100)), min_size=1, max_size=4),
    zero=st.integers(0, 4_000),
    rate=st.floats(0.1, 0.9),
    seed=st.integers(0, 2**31),
)
def test_the_mean_of_many_estimates_is_the_truth(
    copies: list[tuple[int, int]], zero: int, rate: float, seed: int
) -> None:
    """Nothing is off to one side: of eight samples the mean point is near."""
    memory = lay(copies, np.random.default_rng(seed), zero=zero + 512)
    truth = memory.truth(Rules(), looks=1).pages_sharing
    assert truth is not None
    points, widths = [], []
    for number in range(8):
        found = sample(memory, rate, seed + number, Rules(), looks=1)
        low, high = found.prediction.bounds.get("pages_sharing", (truth, truth))
        points.append(found.point.get("pages_sharing", truth))
        widths.append(high - low)
    # Half a width is more than two deviations; of the mean of eight they are a third.
    assert abs(np.mean(points) - truth) <= np.mean(widths) / 3 + 2


def test_what_a_pilot_tells() -> None:
    hashes = np.concatenate(
        [np.arange(1, 1_001), np.repeat(7_000, 20), np.repeat(8_000, 5), [0, 0]]
    )
    pilot = content.Pilot.of(hashes.astype(np.uint64), 0, 0.1)
    # All-zero pages always, whatever their number; then what was met 8 times or more.
    assert pilot.counted.tolist() == [0, 7_000]
    assert pilot.pairs >= 20 / 0.1**2
    assert content.Pilot.of(hashes[:1_000].astype(np.uint64), 0, 0.1).counted.tolist() == [0]
