"""The unseen contents: ranges that hold the truth, on populations made for it."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dedup.errors import Unsupported
from dedup.estimate import unseen
from dedup.estimate.unseen import Seen, Span, Unseen, scaled, times_of

pytest.importorskip("scipy")
pytest.importorskip("highspy")


def look(copies: np.ndarray, rate: float, rng: np.random.Generator) -> Seen:
    """What a sample sees of contents with so many frames each."""
    seen = rng.binomial(copies, rate)
    frames = float(copies.sum())
    return Seen(times_of(seen), seen.sum() / frames, Span.of(frames))


def populations(frames: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    zipf = np.minimum(rng.zipf(1.5, frames // 8), 50_000)
    zipf = zipf[np.cumsum(zipf) < frames * 0.9]
    tail = rng.zipf(2.2, frames)
    tail = tail[np.cumsum(tail) < frames]
    return {
        "nothing twice": np.ones(frames, np.int64),
        "pairs": np.full(frames // 2, 2),
        "few heavy": np.append(np.full(100, frames // 400), np.ones(frames * 3 // 4, np.int64)),
        "zipf": np.append(zipf, np.ones(frames - int(zipf.sum()), np.int64)),
        "long tail": np.append(tail, np.ones(frames - int(tail.sum()), np.int64)),
        "tens": np.full(frames // 10, 10),
        "geometric": rng.geometric(0.2, frames // 5),
        "mixed": np.repeat(
            [1, 2, 5, 20, frames // 8],
            [frames // 2, frames // 16, frames // 40, frames // 160, 1],
        ),
        "one content": np.array([frames]),
    }


def nodes_of(copies: np.ndarray, limit: int) -> int:
    """Frames left once all has merged, by the rule of the model."""
    q, r = np.divmod(copies, limit)
    return int((q + (r > 0)).sum())


def figures(seen: Seen, limit: int = 256) -> dict[str, Span]:
    found = Unseen(seen, limit)
    low, high = found.extra_nodes()
    spans = {
        "left": found.figure(found.contents() + low, found.contents() + high),
        "single": found.figure(found.single()),
        "chained": found.figure(found.chained()),
    }
    assert found.solved
    return spans


def holds(span: Span, value: float) -> bool:
    return span.low - 1e-6 * (1 + value) <= value <= span.high + 1e-6 * (1 + value)


TRIALS = 10


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2])
def test_ranges_hold_in_95_of_100_trials(rate: float) -> None:
    rng = np.random.default_rng(11)
    held = total = 0
    for frames in (60_000, 1_000_000):
        for copies in populations(frames, rng).values():
            truth = {
                "left": nodes_of(copies, 256),
                "single": int((copies == 1).sum()),
                "chained": int((copies > 256).sum()),
            }
            for _ in range(TRIALS // 2 if frames > 100_000 else TRIALS):
                found = figures(look(copies, rate, rng))
                held += sum(holds(found[name], value) for name, value in truth.items())
                total += len(truth)
    assert held >= 0.95 * total
    assert total >= 100


def test_error_of_the_point_at_a_tenth() -> None:
    """Within 2 points of all frames in 95 of 100 trials, of all shapes; nearer than the middle."""
    rng = np.random.default_rng(12)
    frames = 3_000_000
    off, middle_off = [], []
    for copies in populations(frames, rng).values():
        for _ in range(3):
            span, truth = figures(look(copies, 0.1, rng))["left"], nodes_of(copies, 256)
            off.append(abs(span.point - truth) / frames)
            middle_off.append(abs((span.low + span.high) / 2 - truth) / frames)
    assert np.quantile(off, 0.95) < 0.02
    assert np.quantile(off, 0.95) < 0.9 * np.quantile(middle_off, 0.95)


def test_contents_seen_more_often_than_the_likeliest_are_sought_for() -> None:
    """Their frames are what is seen of them; with ten of 100,000 each, most have no partner."""
    copies = np.append(np.full(10, 100_000), np.ones(200_000, np.int64))
    span = figures(look(copies, 0.1, np.random.default_rng(3)))["left"]
    truth = nodes_of(copies, 256)
    assert holds(span, truth)
    assert abs(span.point - truth) < 0.01 * copies.sum()


def test_the_solver_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """What it prints would stand in the JSON."""
    rng = np.random.default_rng(4)
    figures(look(populations(60_000, rng)["mixed"], 0.1, rng))
    assert capfd.readouterr() == ("", "")


def test_one_content_may_be_nearly_everything() -> None:
    """Nothing takes memory or time by how often one was seen."""
    assert times_of(np.array([3, 1, 0, 3, 10**15])).tolist() == [[1, 3, 10**15], [1, 2, 1]]
    for rare in (1, 2):  # pairs alone fit no population
        count = np.append(np.full(9_000, rare), 10**7)
        found = Unseen(Seen(times_of(count), 0.1, scaled(int(count.sum()), 0.1)), 256)
        chained = found.figure(found.chained())
        assert found.solved == (rare == 1)
        assert chained.low <= 1 <= chained.high


@settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(
    shape=st.lists(
        st.tuples(st.integers(1, 3_000), st.integers(1, 600)), min_size=1, max_size=6
    ),
    rate=st.sampled_from([0.05, 0.1, 0.25]),
    limit=st.sampled_from([2, 7, 256]),
    seed=st.integers(0, 1 << 32),
)  # fmt: skip
def test_any_population(shape: list[tuple[int, int]], rate: float, limit: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    copies = np.repeat([n for _, n in shape], [many for many, _ in shape])
    copies = np.append(copies, np.ones(20_000, np.int64))
    seen = look(copies, rate, rng)
    found = figures(seen, limit)
    frames = float(copies.sum())
    for span in found.values():
        assert span.low + 1e-6 >= 0
        assert span.low <= span.point <= span.high <= frames * (1 + 1e-6)
    # What was seen is there: no range denies it.
    assert found["left"].high >= seen.contents
    # Ranges of 95 % each, over what hypothesis draws: a fixed set, which they hold.
    assert holds(found["left"], nodes_of(copies, limit))
    assert holds(found["single"], int((copies == 1).sum()))


def test_a_larger_sample_narrows_the_range() -> None:
    rng = np.random.default_rng(1)
    copies = populations(1_000_000, rng)["mixed"]
    wide = [
        (span := figures(look(copies, rate, rng))["left"]).high - span.low
        for rate in (0.02, 0.05, 0.1, 0.25)
    ]
    assert wide == sorted(wide, reverse=True)


def test_nothing_to_estimate() -> None:
    found = Unseen(Seen(times_of(np.zeros(0, np.int64)), 0.1, Span.of(0.0)), 256)
    assert found.figure(found.contents()) == Span.of(0.0)


def test_what_is_certain_where_nothing_fits() -> None:
    """A sample that no population explains: 9,000 pairs, and no content seen once."""
    times = np.array([[2], [9_000]])
    found = Unseen(Seen(times, 0.1, Span.of(180_000.0)), 256)
    low, high = found.extra_nodes()
    left = found.figure(found.contents() + low, found.contents() + high)
    assert not found.solved
    # 9,000 contents at the least, and at the most one a frame.
    assert (left.low, left.high) == (9_000, 180_000)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.25])
@pytest.mark.parametrize("count", [0, 3, 50, 5_000])
def test_scaled_numbers(count: int, rate: float) -> None:
    """Of numbers that give such samples, 95 % are in the range."""
    rng = np.random.default_rng(5)
    truth = int(count / rate)
    found = [scaled(int(n), rate) for n in rng.binomial(truth, rate, 2_000)]
    assert np.mean([s.low <= truth <= s.high for s in found]) >= 0.95
    assert all(s.low <= s.point <= s.high for s in found)


def test_scaled_sums_of_unequal_parts() -> None:
    rng = np.random.default_rng(5)
    parts = rng.integers(1, 40, 3_000)
    hit = 0
    for _ in range(400):
        some = parts[rng.random(len(parts)) < 0.1]
        span = scaled(int(some.sum()), 0.1, square=float((some**2).sum()))
        hit += span.low <= parts.sum() <= span.high
    assert hit >= 0.94 * 400


@pytest.mark.parametrize("lacking", ["scipy", "highspy"])
def test_what_is_needed_is_missing(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(lacking):
            raise ModuleNotFoundError(f"No module named {lacking!r}", name=lacking)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(Unsupported, match=f"No module named '{lacking}'") as e:
        unseen.require()
    assert "pip install 'dedup-ksm[sample]'" in e.value.hint


def test_what_is_needed_is_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linker's words are told, which name no module."""
    real = builtins.__import__

    def broken(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "highspy":
            raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.30' not found")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(Unsupported, match="GLIBCXX_3"):
        unseen.require()
