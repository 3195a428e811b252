"""Which pages a sample by content keeps."""

from __future__ import annotations

import numpy as np
import pytest

from dedup.kernel import memory, pagemap
from dedup.pages import Flag, Pages
from dedup.sources.live import LiveSource, Options
from tests.kernel_fixtures import Target

SEED = 5
RATE = 0.3
BELOW = int(RATE * 2**64)
FRAMES = 0.1


def look(
    *pids: int,
    below: int = BELOW,
    counted: np.ndarray | None = None,
    room: int = 100_000,
    frames: float = FRAMES,
) -> LiveSource:
    """By content; all of it with `below` 0."""
    hashes = np.zeros(0, np.uint64) if counted is None else counted
    content = memory.Content(below, hashes, room) if below else None
    options = Options(seed=SEED, sample=frames if below else None, content=content)
    source = LiveSource(list(pids), options)
    source.first_look()
    return source


def pages_of(source: LiveSource) -> Pages:
    assert source.pages is not None
    return source.pages


def fill(target: Target, pages: int, what: str = "unique", name: str = "a") -> int:
    start: int = target.do("map", name=name, pages=pages)
    target.do("fill", name=name, at=0, count=pages, what=what)
    return start


def contents(source: LiveSource) -> dict[int, int]:
    """Hash by address, of the pages there."""
    pages = pages_of(source)
    index = np.flatnonzero(pages.present)
    return dict(zip(pages.address_of(index).tolist(), pages.hashes[index].tolist(), strict=True))


def kept_by_content(hashes: np.ndarray) -> np.ndarray:
    return memory.mixed(hashes) < np.uint64(BELOW)


def test_all_copies_of_a_content_or_none(target: Target) -> None:
    fill(target, 3_000)
    fill(target, 500, "same", "b")
    whole, sample = look(target.pid, below=0), look(target.pid)
    hashes = pages_of(whole).hashes
    chosen = kept_by_content(hashes)
    everything, some = contents(whole), contents(sample)
    assert some.items() <= everything.items()
    expected = {a for a, h in everything.items() if kept_by_content(np.array([h], np.uint64))[0]}
    assert expected <= some.keys()
    # Of the others those by frame.
    others = len(some) - len(expected)
    n = len(everything) - len(expected)
    if n > 2_000:
        assert abs(others - FRAMES * n) < 6 * np.sqrt(FRAMES * n) + 2
    assert 0.2 < chosen[:3_000].mean() < 0.4
    mine = pages_of(sample)
    assert sample.options.content is not None
    by_content = sample.options.content.chosen(mine.hashes)
    assert int(by_content.sum()) == len(expected)
    # Everything was read, and counted.
    assert sample.tally.bytes_read == whole.tally.bytes_read
    assert sample.counts[0][0] == len(hashes)


def test_contents_that_are_counted(target: Target) -> None:
    fill(target, 2_000)
    fill(target, 700, "same", "b")
    fill(target, 300, "zero", "c")
    whole = look(target.pid, below=0)
    names, times = np.unique(pages_of(whole).hashes, return_counts=True)
    zero = memory.zero_hash(pagemap.sight().page_size, SEED)
    assert zero in names.tolist()
    heaviest = np.append(np.uint64(zero), names[times >= 100][names[times >= 100] != zero])
    assert len(heaviest) >= 2
    sample = look(target.pid, counted=heaviest)
    exact = dict(zip(names.tolist(), times.tolist(), strict=True))
    assert sample.counted.tolist() == [exact[h] for h in heaviest.tolist()]
    # Kept by frame alone.
    mine = np.isin(pages_of(sample).hashes, heaviest)
    total = sum(exact[h] for h in heaviest.tolist())
    assert abs(int(mine.sum()) - FRAMES * total) < 6 * np.sqrt(FRAMES * total)


def test_several_batches_count_together(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    monkeypatch.setattr("dedup.sources.live.BATCH_PROCESSES", 1)
    zero = np.array([memory.zero_hash(pagemap.sight().page_size, SEED)], np.uint64)
    with Target() as another:
        for t in (target, another):
            fill(t, 600, "zero")
            fill(t, 500, name="b")
        whole = look(target.pid, another.pid, below=0)
        sample = look(target.pid, another.pid, counted=zero)
    n = int(np.count_nonzero(pages_of(whole).frames & Flag.ZERO))
    assert n >= 1_200
    assert abs(int(sample.counted[0]) - n) <= 2


def test_no_room(target: Target) -> None:
    fill(target, 3_000)
    with pytest.raises(memory.Full):
        look(target.pid, room=500)
    assert look(target.pid, room=3_000)


def test_later_looks_read_what_the_first_kept(target: Target) -> None:
    start = fill(target, 3_000)
    source = look(target.pid)
    first = contents(source)
    read = source.tally.bytes_read
    mine = sorted(a for a in first if start <= a < start + 3_000 * 4096)
    # A hundred change, kept or not; new pages come.
    target.do("fill", name="a", at=0, count=100, what="unique")
    fill(target, 400, name="more")
    pages = source.look_again()
    again = (source.tally.bytes_read - read) // pages.page_size
    assert 0 <= len(first) - again < 20
    index = np.arange(len(pages.hashes))
    volatile = set(pages.address_of(index[(pages.frames & Flag.VOLATILE) != 0]).tolist())
    changed = {a for a in mine if a < start + 100 * 4096}
    assert changed <= volatile
    assert not any(pages.frames & Flag.NEW)
    # Those that came are counted all the same.
    assert source.counts[0][0] >= 3_400
