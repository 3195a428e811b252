"""The estimate from a sample against the model on everything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from dedup import grouping
from dedup.errors import Refused
from dedup.estimate import sampled
from dedup.estimate.sampled import Estimate, Present
from dedup.model import merge
from dedup.model.prediction import FIELDS, Prediction, Rules
from dedup.pages import Flag, Pages, Process, ProcessId, Region

pytest.importorskip("scipy")
pytest.importorskip("highspy")
PAGE = 4096
HUGE = 512


@dataclass
class Memory:
    """Mappings: content (0: all zero), frame and flags of each, process after process."""

    content: np.ndarray
    frame: np.ndarray
    flags: np.ndarray
    process: np.ndarray

    def pages(self, which: np.ndarray | None = None, looks: int = 2) -> Pages:
        some = np.ones(len(self.content), bool) if which is None else which
        process = self.process[some]
        processes = int(self.process.max()) + 1
        count = np.bincount(process, minlength=processes)
        known = (self.flags[some] & Flag.HIDDEN) == 0
        word = np.where(known, self.frame[some], 0).astype(np.uint64) | self.flags[some]
        word |= np.where(self.content[some] == 0, Flag.ZERO | Flag.CONSTANT, np.uint64(0))
        return Pages(
            page_size=PAGE,
            hashes=self.content[some].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15),
            frames=word,
            run_start=np.full(processes, 1 << 30),
            run_count=count,
            run_first=np.concatenate(([0], np.cumsum(count)[:-1])),
            run_region=np.arange(processes),
            regions=[
                Region(i, 1 << 30, 1 << 40, "rw-p", "", frozenset(), True, "", False, True)
                for i in range(processes)
            ],
            processes=[Process(ProcessId(100 + i, 1), "p") for i in range(processes)],
            looks=looks,
            frames_known=bool(known.all()),
        )

    def present(self) -> Present:
        def count(flag: np.uint64) -> int:
            return int(np.count_nonzero(self.flags & flag))

        pages = len(self.content)
        return Present(pages, count(Flag.EXCLUSIVE), count(Flag.KSM), count(Flag.THP))

    def truth(self, rules: Rules, looks: int = 2) -> Prediction:
        pages = self.pages(looks=looks)
        return merge.predict(pages, grouping.group(pages), rules)

    def sample(
        self, rate: float, rng: np.random.Generator, rules: Rules, looks: int = 2
    ) -> Estimate:
        hidden = bool((self.flags & Flag.HIDDEN).any())
        names = np.arange(len(self.frame)) if hidden else self.frame
        frames, place = np.unique(names, return_inverse=True)
        which = rng.random(len(frames))[place.reshape(-1)] < rate
        pages = self.pages(which, looks)
        present = self.present()
        chosen = sampled.choose(pages, present, rate)
        by_process = np.bincount(self.process)
        return sampled.estimate(pages, chosen, present, by_process, rules)


def lay(
    copies: list[tuple[int, int]],
    rng: np.random.Generator,
    zero: int = 0,
    huge: float = 0.0,
    forked: float = 0.0,
    volatile: float = 0.0,
    merged: int = 0,
    hidden: bool = False,
) -> Memory:
    """Contents as (how many, frames of each), all-zero pages, the share in huge pages, the share
    of frames that a forked child maps too, the share of pages that change, KSM pages that the
    child maps 20 times each (every other one has a copy that is not merged)."""
    sizes = np.repeat([n for _, n in copies], [n for n, _ in copies])
    content = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    content = rng.permutation(np.append(content, np.zeros(zero, np.int64)))
    content = content[: len(content) // HUGE * HUGE]
    frame = HUGE + np.arange(len(content))
    flags = np.zeros(len(content), np.uint64)
    in_huge = np.repeat(rng.random(len(content) // HUGE) < huge, HUGE)
    flags[in_huge] |= Flag.THP
    child = (rng.random(len(content)) < forked) & ~in_huge
    flags[~child] |= Flag.EXCLUSIVE
    flags[rng.random(len(content)) < volatile] |= Flag.VOLATILE
    theirs = [content[child], frame[child], flags[child]]
    if merged:
        number = np.repeat(np.arange(merged), 20)
        lone = content[content > 0][-merged:]
        same = np.where(number % 2, lone[number], content.max() + 1 + number)
        theirs = [
            np.concatenate(pair)
            for pair in zip(
                theirs,
                (same, 2 * len(frame) + number, np.full(len(number), Flag.KSM)),
                strict=True,
            )
        ]
    content, frame, flags = (
        np.concatenate(pair) for pair in zip((content, frame, flags), theirs, strict=True)
    )
    if hidden:
        flags |= Flag.HIDDEN
    process = np.repeat([0, 1], [len(content) - len(theirs[0]), len(theirs[0])])
    return Memory(content, frame, flags, process)


MIXED = [(60_000, 1), (8_000, 2), (1_500, 5), (300, 20), (5, 2_000)]
CASES = {
    "plain": {"copies": MIXED},
    "nothing twice": {"copies": [(100_000, 1)]},
    "pairs": {"copies": [(50_000, 2)]},
    "zero": {"copies": MIXED, "zero": 30_000},
    "few zeros": {"copies": MIXED, "zero": 30},
    "almost all zero": {"copies": [(2_000, 1)], "zero": 98_000},
    "huge": {"copies": MIXED, "zero": 20_000, "huge": 0.5},
    "all huge": {"copies": MIXED, "zero": 20_000, "huge": 1.0},
    "forked": {"copies": MIXED, "zero": 10_000, "forked": 0.3},
    "a fork alone": {"copies": [(100_000, 1)], "forked": 1.0},
    "volatile": {"copies": MIXED, "zero": 10_000, "volatile": 0.1},
    "merged before": {"copies": MIXED, "zero": 10_000, "merged": 2_000},
    "hidden": {"copies": MIXED, "zero": 10_000, "forked": 0.1, "hidden": True},
    "hidden, none shared": {"copies": MIXED, "zero": 10_000, "hidden": True},
    "heavy": {"copies": [(60_000, 1), (40, 1_000)]},
}  # fmt: skip
RULES = {
    "defaults": Rules(),
    "a low limit": Rules(max_page_sharing=7),
    "zero pages": Rules(use_zero_pages=True),
}


def outside(found: Estimate, truth: Prediction) -> dict[str, object]:
    """Fields whose range the truth, or its own range, is not in."""
    wrong: dict[str, object] = {}
    for name in FIELDS:
        value = getattr(truth, name)
        low, high = (value, value) if value is not None else truth.bounds.get(name, (None, None))
        mine = getattr(found.prediction, name)
        if low is None or high is None:
            if mine is not None or name in found.prediction.bounds:
                wrong[name] = "not known"
            continue
        least, most = found.prediction.bounds.get(name, (mine, mine))
        if not least <= low <= high <= most:
            wrong[name] = ((low, high), (least, most))
    return wrong


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("case", CASES)
def test_ranges_hold_the_truth(case: str, rules: str) -> None:
    rng = np.random.default_rng(7)
    memory = lay(rng=rng, **CASES[case])  # type: ignore[arg-type]
    truth = memory.truth(RULES[rules])
    for rate in (0.1, 0.2):
        found = memory.sample(rate, rng, RULES[rules])
        assert outside(found, truth) == {}
        assert found.solved


@pytest.mark.parametrize("case", ["plain", "zero"])
def test_one_look_tells_nothing_of_volatile_pages(case: str) -> None:
    rng = np.random.default_rng(3)
    memory = lay(rng=rng, **CASES[case])  # type: ignore[arg-type]
    found = memory.sample(0.2, rng, Rules(), looks=1)
    assert found.prediction.pages_volatile is None
    assert "pages_volatile" not in {*found.prediction.bounds, *found.point}
    assert outside(found, memory.truth(Rules(), looks=1)) == {}


def test_what_pagemap_tells_is_exact() -> None:
    rng = np.random.default_rng(3)
    memory = lay(MIXED, rng)
    found = memory.sample(0.1, rng, Rules())
    frames = len(memory.frame)
    assert found.frames.low == pytest.approx(frames, abs=40)
    assert found.frames.high == frames
    assert found.prediction.ksm_zero_pages == found.prediction.thp_split == 0
    assert [p.bounds["ksm_rmap_items"][1] for p in found.prediction.processes] == [frames]


def test_point_and_range_agree() -> None:
    rng = np.random.default_rng(3)
    found = lay(MIXED, rng, zero=1_000, huge=0.3).sample(0.1, rng, Rules())
    assert found.point.keys() == found.prediction.bounds.keys()
    for name, (low, high) in found.prediction.bounds.items():
        assert low <= found.point[name] <= high
        assert getattr(found.prediction, name) is None


@pytest.mark.parametrize(
    ("pages", "rate", "way_out"),
    [(100_000, 0.02, "--sample 7%"), (15_000, 0.2, "reading all of it takes no longer")],
)
def test_too_small_a_sample(pages: int, rate: float, way_out: str) -> None:
    rng = np.random.default_rng(3)
    memory = lay([(pages, 1)], rng)
    with pytest.raises(Refused, match="too small a sample") as e:
        memory.sample(rate, rng, Rules())
    assert way_out in e.value.hint


def test_frames_mapped_elsewhere_may_stay() -> None:
    rng = np.random.default_rng(3)
    memory = lay([(40_000, 1), (10_000, 2)], rng)
    memory.flags[: len(memory.flags) // 2] = 0
    which = rng.random(len(memory.frame)) < 0.2
    pages, present = memory.pages(which), memory.present()
    chosen = sampled.choose(pages, present, 0.2)

    def spared(mappings: int) -> int:
        found = sampled.estimate(
            pages, chosen, present, np.bincount(memory.process), Rules(),
            lambda frames: np.full(len(frames), mappings),
        )  # fmt: skip
        return found.prediction.bounds["frames_freed"][0]

    # Half of 10,000 pairs' frames, all of them if it comes to the worst.
    assert spared(1) > 6_000
    assert 0 <= spared(2) < 2_000
