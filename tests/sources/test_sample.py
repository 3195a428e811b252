"""Which pages a sample reads."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from dedup.kernel import memory, pagemap, processes
from dedup.pages import FRAME_MASK, Flag, Pages
from dedup.sources import speed
from dedup.sources.live import LiveSource, Options
from tests.kernel_fixtures import Target
from tests.kernel_fixtures import pagemap as pagemap_of

RATE = 0.2
HUGE = 2 << 20
PR_SET_DUMPABLE = 4


def look(*pids: int, rate: float | None = RATE, seed: int = 5) -> LiveSource:
    source = LiveSource(list(pids), Options(sample=rate, seed=seed))
    source.first_look()
    return source


def pages_of(source: LiveSource) -> Pages:
    assert source.pages is not None
    return source.pages


def contents(source: LiveSource, process: int = 0) -> dict[int, int]:
    """Hash by address of the pages of a process."""
    pages = pages_of(source)
    index = np.arange(len(pages.hashes))
    mine = pages.process_of_region()[pages.region_of(index)] == process
    address = pages.address_of(index[mine])
    return dict(zip(address.tolist(), pages.hashes[mine].tolist(), strict=True))


def unique(target: Target, name: str, pages: int) -> int:
    start: int = target.do("map", name=name, pages=pages)
    target.do("fill", name=name, at=0, count=pages, what="unique")
    return start


def test_part_of_the_pages_with_their_hashes(target: Target) -> None:
    unique(target, "a", 4_000)
    whole, sample = look(target.pid, rate=None), look(target.pid)
    everything, some = contents(whole), contents(sample)
    assert some.items() <= everything.items()
    n = len(everything)
    # Five standard deviations.
    assert abs(len(some) - RATE * n) < 5 * np.sqrt(n * RATE * (1 - RATE))
    read = sample.tally.process_vm_readv_pages + sample.tally.proc_mem_pages
    assert read == len(some)
    assert sample.tally.bytes_read == read * pages_of(sample).page_size
    assert not whole.counts[0].any()


def test_what_is_done_meanwhile(target: Target) -> None:
    """Once, by the thread that asked, and what it raises ends the look."""
    unique(target, "a", 2_000)
    called = []
    options = Options(
        sample=RATE, threads=2, meanwhile=lambda: called.append(threading.current_thread())
    )
    source = LiveSource([target.pid], options)
    source.first_look()
    source.look_again()
    assert called == [threading.current_thread()]

    def fail() -> None:
        raise RuntimeError("meanwhile")

    with pytest.raises(RuntimeError, match="meanwhile"):
        LiveSource([target.pid], replace(options, meanwhile=fail)).first_look()


@pytest.mark.root
def test_what_is_present_is_counted(target: Target) -> None:
    unique(target, "a", 3_000)
    target.do("map", name="huge", pages=1_024, align=HUGE)
    target.do("advise", name="huge", what="hugepage")
    target.do("fill", name="huge", at=0, count=1_024, what="unique")
    whole, sample = look(target.pid, rate=None), look(target.pid)
    word = pages_of(whole).frames
    present, exclusive, ksm, huge = sample.counts[0].tolist()
    assert present == len(word)
    assert exclusive == int(np.count_nonzero(word & Flag.EXCLUSIVE))
    assert ksm == int(np.count_nonzero(word & Flag.KSM))
    assert huge == int(np.count_nonzero(word & Flag.THP)) >= 1_024


def test_a_seed_is_a_choice(target: Target) -> None:
    unique(target, "a", 4_000)
    first, same, other = (contents(look(target.pid, seed=s)) for s in (5, 5, 6))
    assert first == same
    # Of two choices that know nothing of each other a fifth is common.
    common = len(first.keys() & other.keys()) / len(first)
    assert abs(common - RATE) < 0.1


def test_the_choice_leaves_no_pattern(target: Target) -> None:
    """Neighbours are chosen no more often than others: as many pairs as chance makes."""
    start = unique(target, "a", 20_000)
    source = look(target.pid)
    page = pages_of(source).page_size
    some = contents(source)
    taken = np.array([start + i * page in some for i in range(20_000)])
    for step in (1, 2, 8, 512):
        both = int((taken[:-step] & taken[step:]).sum())
        expected = (20_000 - step) * RATE**2
        assert abs(both - expected) < 6 * np.sqrt(expected)


@pytest.mark.root
def test_a_frame_is_in_with_all_its_mappings(target: Target) -> None:
    unique(target, "a", 3_000)
    child = target.do("fork")
    target.do("fill", name="a", at=0, count=500, what="unique", child=(0,))
    sample = pages_of(look(target.pid, child))
    whole = pages_of(look(target.pid, child, rate=None))

    def mappings(pages: Pages) -> dict[int, int]:
        frame, count = np.unique(pages.frames & FRAME_MASK, return_counts=True)
        return dict(zip(frame.tolist(), count.tolist(), strict=True))

    some = mappings(sample)
    assert some.items() <= mappings(whole).items()
    shared = sum(1 for n in some.values() if n == 2)
    assert shared > 300


def test_later_looks_read_the_same_pages(target: Target) -> None:
    start = unique(target, "a", 4_000)
    source = look(target.pid)
    before = contents(source)
    # New content in a new frame (the child has the old one), in the same frame, and a new mapping.
    target.do("fork")
    target.do("fill", name="a", at=0, count=1_000, what="unique")
    unique(target, "b", 2_000)
    pages = source.look_again()
    after = contents(source)
    assert after.keys() == before.keys()
    page = pages.page_size
    written = {a for a in before if start <= a < start + 1_000 * page}
    index = np.arange(len(pages.hashes))
    volatile = (pages.frames & Flag.VOLATILE) != 0
    changed = set(pages.address_of(index[volatile]).tolist())
    assert written <= changed
    assert not (pages.frames & Flag.NEW).any()
    assert source.counts[0][0] >= len(look(target.pid, rate=None).pages.hashes) - 10  # type: ignore[union-attr]


def test_pages_that_went(target: Target) -> None:
    start = unique(target, "a", 2_000)
    source = look(target.pid)
    target.do("advise", name="a", what="dontneed")
    pages = source.look_again()
    gone = (pages.frames & Flag.GONE) != 0
    address = pages.address_of(np.flatnonzero(gone))
    inside = [a for a in contents(source) if start <= a < start + 2_000 * pages.page_size]
    # A page of the program's own may go, too.
    assert set(inside) <= set(address.tolist())
    assert len(address) < len(inside) + 20
    assert len(inside) > 300


def test_the_target_stays_as_it_was(target: Target) -> None:
    start = unique(target, "a", 2_000)
    hole = target.do("map", name="hole", pages=2_000)
    child = target.do("fork")
    pids = (target.pid, child)
    before = [pagemap_of(pid, at, 2_000) for pid in pids for at in (start, hole)]
    source = look(*pids)
    source.look_again()
    after = [pagemap_of(pid, at, 2_000) for pid in pids for at in (start, hole)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_arrays_that_were_too_small_count_once(target: Target) -> None:
    start = unique(target, "a", 6_000)
    sight = pagemap.sight()
    with processes.of_process(target.pid) as handle:
        ranges = memory.Ranges.of([(start, start + 6_000 * sight.page_size, 0, 0)])
        wanted = memory.Target(handle, fast=True, ranges=ranges)
        store = memory.Store.of(600)
        found = memory.look([wanted], store, 1, 2, sight, memory.Tally(), rate=0.9)
    assert len(store.hashes) > 600
    assert found.counts[0][0] == 6_000
    assert abs(store.used - 5_400) < 150


@pytest.mark.skipif(os.geteuid() != 0, reason="to become nobody")
def test_hidden_frames_are_chosen_by_address() -> None:
    """As nobody: mappings of one frame are chosen each for itself."""
    with Target(user=65534) as target:
        unique(target, "a", 4_000)
        child = target.do("fork")
        sight = replace(pagemap.sight(), zero_frame=-1, kpageflags=False, kpagecount=False)
        # The pid and the address alone, as without privilege: from a child that gave it up.
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
                source = LiveSource([target.pid, child], Options(sample=RATE, seed=5), sight=sight)
                pages = source.first_look()
                hidden = bool(((pages.frames & Flag.HIDDEN) != 0).all())
                both = len(contents(source, 0).keys() & contents(source, 1).keys())
                present = source.counts[0][0] + source.counts[1][0]
                answer = f"{int(hidden)} {len(pages.hashes)} {both} {present}"
                os.write(write, answer.encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            words = pipe.read().split()
        os.waitpid(pid, 0)
        assert words, "the unprivileged child failed"
        all_hidden, chosen, both, present = map(int, words)
        assert all_hidden == 1
        assert present > 8_000
        assert abs(chosen - RATE * present) < 5 * np.sqrt(present * RATE * (1 - RATE))
        # Of those chosen in one process, a fifth is in the other, too; by frame it were all.
        assert 0.1 < both / (chosen / 2) < 0.3


def test_the_measurement_is_of_this_machine() -> None:
    begin = time.monotonic()
    found = speed.measure(pagemap.sight(), 1)
    assert time.monotonic() - begin < 10
    # From a hundredth to a hundred times what it took where this was written.
    assert 1e-9 < found.found < 1e-4
    assert 1e-8 < found.alone < 1e-4
    assert found.seconds(1_000_000) > found.seconds(1_000_000, 0.05)
    assert found.rate(1_000_000, found.seconds(1_000_000, 0.07)) == pytest.approx(0.07)
    assert found.rate(1_000_000, 0) < 0
