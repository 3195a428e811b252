"""One more look: what pages look like, and where the shared zero page is mapped."""

from __future__ import annotations

import mmap
import os
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dedup
from dedup import _core
from dedup.kernel import memory
from dedup.kernel.processes import Handle
from dedup.pages import ProcessId
from dedup.scanning import Plan, Scan, scan_pids
from dedup.sources import again
from dedup.sources.live import Options
from tests.kernel_fixtures import PAGE, Target, frames, pagemap

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = 5
RANDOM = random.Random(1).randbytes(PAGE)


@pytest.fixture
def room() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, 4 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        yield pages


def address_of(pages: mmap.mmap) -> int:
    with memoryview(pages) as view:
        return _core.address_of(view)


def look(pages: mmap.mmap, data: bytes, seen: bytes | None = None) -> str | None:
    """Write a page and look at it; `seen`: what a scan saw there, where that was other data."""
    pages[: len(data)] = data
    memory.load_hash(PAGE)
    digest = _core.hash_bytes(data if seen is None else seen, SEED)
    with Handle(os.getpid()) as handle:
        return memory.look_like(handle, address_of(pages), PAGE, SEED, digest)


def mixed(printable: int) -> bytes:
    """So many printable bytes, the rest not."""
    page = bytearray(b"\x01" * PAGE)
    page[:printable] = b"a" * printable
    return bytes(page)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bytes(PAGE), "zero"),
        (b"\x07" * PAGE, "constant"),
        (b"ABCDEFGH" * (PAGE // 8), "constant"),
        (b"ABCDEFG" * (PAGE // 7) + b"x", "text"),
        (b"key\tvalue\r\n".ljust(32, b".").ljust(PAGE, b"\0"), "text"),
        (b"a" * 31 + bytes(PAGE - 31), "binary"),
        (("\xe4\u6587\u5b57\U0001f600." * 512).encode()[:PAGE], "text"),
        (("\xe4\xf6\xfc" * 2048).encode("latin-1")[:PAGE], "binary"),
        (bytes(PAGE - 1) + b"a", "binary"),
        (mixed(PAGE * 91 // 100), "text"),
        (mixed(PAGE * 89 // 100), "binary"),
        (RANDOM, "binary"),
    ],
)
def test_what_a_page_looks_like(room: mmap.mmap, data: bytes, words: str) -> None:
    assert len(data) == PAGE
    assert look(room, data) == words


def test_another_content_is_not_told(room: mmap.mmap) -> None:
    assert look(room, b"secret " * (PAGE // 7) + b"!", seen=RANDOM) == "changed"


def test_absent_pages_stay_absent(room: mmap.mmap) -> None:
    memory.load_hash(PAGE)
    address = address_of(room) + PAGE
    with Handle(os.getpid()) as handle:
        digest = _core.hash_bytes(bytes(PAGE), SEED)
        assert memory.look_like(handle, address, PAGE, SEED, digest) is None
    assert pagemap(os.getpid(), address, 1)[0] >> 63 == 0


def scan(*pids: int, **plan: Any) -> Scan:
    options = Options(seed=SEED, threads=1)
    return scan_pids(list(pids), Plan(options=options, interval_seconds=0.05, **plan))


def samples(found: Scan) -> list[list[int]]:
    groups = found.groups
    return [
        groups.order[a:b].tolist()
        for a, b in zip(groups.offsets[:-1], groups.offsets[1:], strict=True)
    ]


def test_contents_of_a_process(target: Target) -> None:
    start = target.do("map", name="a", pages=20)
    target.do("fill", name="a", at=0, count=9, what="equal")
    found = scan(target.pid)
    address = found.pages.address_of(np.arange(len(found.pages.hashes)))
    # The target keeps one or two more where it made the page: not those.
    here = np.flatnonzero((address >= start) & (address < start + 9 * PAGE)).tolist()
    assert len(here) == 9
    assert again.looks_like(found.pages, [here], SEED) == ["binary"]
    # A pid that is another process's by now.
    (known,) = found.pages.processes
    other = replace(known, id=ProcessId(known.id.pid, known.id.start_time + 1))
    found.pages.processes[0] = other
    assert again.looks_like(found.pages, [here], SEED) == [None]
    found.pages.processes[0] = known
    # Where the first one has changed, the next one tells.
    target.do("fill", name="a", at=0, count=5, what="unique")
    assert again.looks_like(found.pages, [here], SEED) == ["binary"]
    target.do("fill", name="a", at=0, count=9, what="unique")
    assert again.looks_like(found.pages, [here, here[:1]], SEED) == ["changed"] * 2
    target.do("advise", name="a", what="dontneed")
    assert again.looks_like(found.pages, [here], SEED) == [None]
    target.kill()
    assert again.looks_like(found.pages, [here], SEED) == [None]
    assert again.looks_like(found.pages, [], SEED) == []
    assert again.zero_pages(found.pages) == [None] * len(found.pages.regions)


@pytest.mark.root
def test_sharing_stays(target: Target) -> None:
    start = target.do("map", name="a", pages=20)
    target.do("fill", name="a", at=0, count=20, what="equal")
    child = target.do("fork")
    before = frames(target.pid, start, 20)
    assert frames(child, start, 20) == before
    found = scan(target.pid, child)
    assert "binary" in again.looks_like(found.pages, samples(found), SEED)
    assert frames(target.pid, start, 20) == frames(child, start, 20) == before


def test_our_own_arrays() -> None:
    data = np.full(16 * PAGE, ord("a"), np.uint8)
    data.reshape(-1, PAGE)[:, 0] = ord("b")
    found = dedup.scan(arrays=[data], seed=SEED, interval_seconds=0.01)
    assert again.looks_like(found.pages, samples(found), SEED) == ["text"]


def test_where_the_zero_page_is_mapped(target: Target) -> None:
    a = target.do("map", name="a", pages=64)
    b = target.do("map", name="b", pages=64)
    for name, start, count in (("a", 50, 14), ("b", 0, 7)):
        target.do("touch", name=name, at=start, count=count)
    target.do("fill", name="a", at=0, count=50, what="unique")
    found = scan(target.pid)
    counts = again.zero_pages(found.pages)
    mine = [
        n
        for region, n in zip(found.pages.regions, counts, strict=True)
        if (region.start < b + 64 * PAGE and region.end > b)
        or (region.start < a + 64 * PAGE and region.end > a)
    ]  # fmt: skip
    assert sum(n or 0 for n in mine) == 21
    eligible = [r.eligible for r in found.pages.regions]
    assert [n is not None for n in counts] == eligible
