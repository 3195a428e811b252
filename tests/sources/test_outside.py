"""Frames that processes outside the scan map too: as many as the kernel counts."""

from __future__ import annotations

import numpy as np
import pytest

from dedup import grouping
from dedup.kernel import pagemap
from dedup.pages import FRAME_MASK, Flag, Pages
from dedup.sources.live import LiveSource, Options, mark_outside
from tests.kernel_fixtures import Target

pytestmark = pytest.mark.root
HUGE = 2 << 20
PAGES = 512
ALONE = Flag.EXCLUSIVE | Flag.KSM | Flag.HIDDEN


def marked(*pids: int, looks: int = 1, threads: int = 1) -> Pages:
    """The pages of a scan, marked."""
    source = LiveSource(list(pids), Options())
    pages = source.first_look()
    for _ in range(looks - 1):
        source.look_again()
    mark_outside(pages, grouping.group(pages), source.sight, threads)
    return pages


def check(pages: Pages) -> int:
    """Hold the marks against the kernel's counts; gives how many there are."""
    frames = (pages.frames & FRAME_MASK).astype(np.int64)
    some = (pages.frames & (Flag.DUPLICATE | ALONE)) == Flag.DUPLICATE
    here = np.bincount(frames)[frames]
    outside = np.zeros(len(frames), bool)
    outside[some] = pagemap.mappings_of(frames[some]) > here[some]
    assert (((pages.frames & Flag.OUTSIDE) != 0) == outside).all()
    return int(outside.sum())


def huge_target(target: Target, name: str, pages: int = 2 * PAGES) -> None:
    """Huge pages of one content."""
    target.do("map", name=name, pages=pages, align=HUGE)
    target.do("advise", name=name, what="hugepage")
    target.do("fill", name=name, at=0, count=pages, what="same")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames the kernel is asked about, call by call."""
    counts: list[int] = []
    real = pagemap.mappings_of

    def counted(frames: np.ndarray, *, threads: int = 1) -> np.ndarray:
        counts.append(len(frames))
        return real(frames, threads=threads)

    monkeypatch.setattr("dedup.sources.live.pagemap.mappings_of", counted)
    return counts


def test_small_pages(target: Target, asked: list[int]) -> None:
    target.do("map", name="a", pages=100)
    target.do("fill", name="a", at=0, count=100, what="same")
    target.do("fork")
    target.do("put", name="a", at=10, what=["same"] * 5)
    pages = marked(target.pid)
    assert sum(asked) == 0, "a lone process's own frames are known by the exclusive mark"
    assert check(pages) >= 95


@pytest.mark.parametrize("looks", [1, 2])
def test_huge_pages_that_are_shared_throughout(
    target: Target, asked: list[int], looks: int
) -> None:
    huge_target(target, "a")
    target.do("fork")
    pages = marked(target.pid, looks=looks)
    if looks == 1:
        assert sum(asked) <= 4, "smaps tells it"
    else:
        assert sum(asked) >= 2 * PAGES, "smaps was that of the first look"
    assert check(pages) >= 2 * PAGES


@pytest.mark.parametrize("how", ["child writes", "child drops", "parent writes"])
def test_huge_pages_shared_in_part(target: Target, how: str) -> None:
    huge_target(target, "a")
    huge_target(target, "b")
    target.do("fork")
    whose = {} if how == "parent writes" else {"child": (0,)}
    if how == "child drops":
        target.do("advise", name="a", what="dontneed", at=PAGES + 100, count=200, **whose)
    else:
        target.do("put", name="a", at=PAGES + 1, what=["same"] * 200, **whose)
    assert 3 * PAGES <= check(marked(target.pid)) < 4 * PAGES


def test_smaps_out_of_date(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything shared when smaps was read, a huge page not any more: each page is asked for."""
    huge_target(target, "a")
    target.do("fork")
    source = LiveSource([target.pid], Options())
    pages = source.first_look()
    target.do("advise", name="a", what="dontneed", at=0, count=PAGES, child=(0,))
    mark_outside(pages, grouping.group(pages), source.sight)
    assert PAGES <= check(pages) < 2 * PAGES


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_that_ask(target: Target, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagemap, "ALONE_FRAMES", 16)
    target.do("map", name="a", pages=1000)
    target.do("fill", name="a", at=0, count=1000, what="same")
    first, second = target.do("fork"), target.do("fork")
    target.do("put", name="a", at=3, what=["same"] * 50, child=(1,))
    assert check(marked(target.pid, first, threads=threads)) > 1500
    assert second


@pytest.mark.parametrize("huge", [False, True])
def test_several_processes(target: Target, huge: bool) -> None:
    if huge:
        huge_target(target, "a")
    else:
        target.do("map", name="a", pages=1000)
        target.do("fill", name="a", at=0, count=1000, what="same")
    first, second = target.do("fork"), target.do("fork")
    target.do("put", name="a", at=3, what=["same"] * 50, child=(1,))
    assert check(marked(target.pid, first)) > 1500
    check(marked(target.pid, first, second))
