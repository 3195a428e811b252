from __future__ import annotations

from dataclasses import replace

import pytest

from dedup.estimate import curve, stress
from dedup.estimate.curve import LEAST, Service
from dedup.estimate.fingerprints import Instance
from dedup.estimate.host import Memory, fit, parse_size
from dedup.estimate.rules import Rules

from .build import instance
from .test_instances import two_peaks

PAGE = 4096


def with_facts(instances: list[Instance], **facts: int) -> list[Instance]:
    return [replace(i, facts=replace(i.facts, **facts)) for i in instances]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("1K", 1024), ("64G", 64 << 30), ("1.5 TiB", 3 << 39),
     ("512 MiB", 1 << 29), ("2gb", 2 << 30), ("10B", 10)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1e9", "1 X", "1GG", "nan", "９G", "9" * 40])
def test_words_that_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_what_is_left_of_a_memory() -> None:
    assert Memory(1000, 200, 0.25).budget_bytes == 600
    assert Memory(100, 200).budget_bytes == 0


def test_all_memory_counts() -> None:
    seen = with_facts(
        two_peaks(3, 100, 10), other_anonymous_bytes=1000, shared_memory_bytes=200,
        page_table_bytes=30, kernel_bytes=4, file_bytes=50_000,
    )  # fmt: skip
    service = Service(seen, Rules())
    p = service.curve(4)[-1]
    assert p.without_ksm_bytes == 4 * 110 * PAGE + 4 * 1234 + 50_000
    # 440 rmap_items, 100 stable nodes.
    assert p.bytes == 140 * PAGE + 4 * 1234 + 50_000 + 440 * 64 + 100 * 64


def test_the_last_that_fits_fits_and_the_next_does_not() -> None:
    service = Service(two_peaks(3, 5000, 700), Rules())
    memory = Memory(200 << 20)
    points, fits = fit(service, memory)
    curve = service.curve(fits.high + 1)
    for number, name in (
        (fits.with_ksm, "bytes"), (fits.low, "high_bytes"), (fits.high, "low_bytes"),
        (fits.without_ksm, "without_ksm_bytes"),
    ):  # fmt: skip
        assert getattr(curve[number - 1], name) <= memory.budget_bytes
        assert getattr(curve[number], name) > memory.budget_bytes
    worst = stress.worst_bytes(service, curve)
    assert worst[fits.safe - 1] <= memory.budget_bytes < worst[fits.safe]
    assert len(points) == max(LEAST, fits.with_ksm)


def test_none_fits() -> None:
    points, fits = fit(Service(two_peaks(3, 100, 10), Rules()), Memory(10 * PAGE))
    assert (fits.without_ksm, fits.with_ksm, fits.safe, fits.high) == (0, 0, 0, 0)
    assert len(points) == LEAST


def test_a_plan_ends_somewhere() -> None:
    # Nothing of their own: no number is too many but for KSM's own memory.
    points, fits = fit(Service(two_peaks(3, 10, 0), Rules(1 << 30)), Memory(1 << 40))
    assert fits.with_ksm == fits.high == curve.MOST
    assert len(points) == curve.MOST


def test_bad_days() -> None:
    seen = [
        instance(i, {**{c: (1, 1) for c in range(1000)}, 5000 + i: (1, 1)}, volatile=9)  # noqa: C420
        for i in range(3)
    ]
    service = Service(seen, Rules())
    points = service.curve(20)
    p = points[9]
    assert p.frames == 1000 + 10 + 90
    # 10,000 merged pages; a page written to has a frame of its own again.
    days = {d.name: d for d in stress.days(service, points, 10, Memory(20 << 20), None)}
    assert days["tenth"].frames == p.frames + 1000
    assert days["measured"].frames == p.frames + round(10_000 * 9 / 1010)
    assert days["all"].frames == p.without_ksm_frames
    assert days["all"].bytes - days["tenth"].bytes == 8000 * PAGE
    assert days["tenth"].fits
    assert not days["all"].fits
    # Five would need 1,010 frames each, and 64 B for each page and each of 1,000 stable nodes.
    assert 5 * 1010 * (PAGE + 64) + 1000 * 64 > 20 << 20 > 4 * 1010 * (PAGE + 64) + 1000 * 64
    assert days["all"].instances == 4
    assert days["tenth"].instances == days["measured"].instances == 20


def test_the_load_of_ksmd() -> None:
    load = Service(two_peaks(3, 1000, 50), Rules()).load(
        Service(two_peaks(3, 1000, 50), Rules()).curve(10)[-1]
    )
    assert load.pages_shared == 1000
    assert load.pages_sharing == 9000
    assert load.pages_unshared == 500
    assert load.pages_volatile == 0
    assert load.rmap_items == 10 * 1050


def test_the_load_with_zero_pages() -> None:
    seen = [instance(i, {0: (100, 100), 1: (1, 1), 10 + i: (1, 1)}, zero=0) for i in range(3)]
    service = Service(seen, Rules(use_zero_pages=True))
    load = service.load(service.curve(5)[-1])
    assert load.ksm_zero_pages == 500
    assert (load.pages_shared, load.pages_sharing, load.pages_unshared) == (1, 4, 5)
