"""Memory in files, added to a scan: hashed as live memory is, with what files can't tell hidden.

A file holds no frame numbers, no huge pages, no KSM pages, no volatile ones. Frames that processes
share since a fork show in one way alone: the same content at the same address of two of them.
Where that is so, pages may be one frame or copies; all others have frames of their own. A file
can't tell memory that is all zeros from memory that was never touched: zeros are told apart, and
figures go from what they are without zeros to what they are with them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup import _core
from dedup.errors import BadInput
from dedup.pages import Flag, Origin, Process, ProcessId, Stored
from dedup.sources import criu, elfcore, image
from dedup.sources.files import cut, failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dedup.kernel.memory import Store, Tally
    from dedup.pages import I64, Bool, Pages
    from dedup.sources.files import Extent, File, Source

READERS: Final[dict[str, Callable[[str, int], Source]]] = {
    "core": elfcore.read,
    "image": image.read,
    "criu": criu.read,
}
"""By the option's word."""
PIECE_PAGES: Final = 1 << 14
"""Hashed by a thread at a time."""
HOLES_PLAIN: Final = 1 << 22
HOLES_TIMES: Final = 64
"""Pages in holes that may be: so many, and so many times the others. Each takes 16 bytes here."""
WORD: Final = Flag.HIDDEN | Flag.EXCLUSIVE
"""Of a page, before what is found out."""
ADDRESS_FACTOR: Final = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that each address has a product of its own."""


def open_all(named: Sequence[tuple[str, str]], page_size: int) -> list[Source]:
    """Open what options name; a file named twice is one.

    Parameters
    ----------
    named : sequence of (kind, path)
    page_size : int
        Bytes.

    Raises
    ------
    BadInput, NotPermitted, Unsupported
    """
    found: list[Source] = []
    known = set()
    try:
        for kind, path in named:
            source = READERS[kind](path, page_size)
            mark = tuple(f.identity for f in source.files)
            if mark in known:
                source.close()
                continue
            known.add(mark)
            found.append(source)
    except BaseException:
        for source in found:
            source.close()
        raise
    return found


@dataclass(slots=True)
class _Piece:
    """Pages to hash."""

    file: File
    offset: I64
    count: I64
    first: I64


def add(
    sources: Sequence[Source],
    pages: Pages,
    store: Store,
    seed: int,
    tally: Tally,
    *,
    advised_only: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[I64, I64, I64, I64]:
    """Add processes, regions and pages of files to those of a scan.

    Gives their runs: addresses, counts, first pages, regions.

    Raises
    ------
    BadInput
        Holes beyond all measure, or a file that was cut meanwhile.
    OutputFailed
        Reading failed.
    """
    known = len(pages.processes)
    extents = _laid_out(sources, pages, advised_only=advised_only)
    count = np.array([e.pages for _, e in extents], np.int64)
    holes = np.array([e.file is None for _, e in extents], bool)
    first = store.used + np.cumsum(np.concatenate((np.zeros(1, np.int64), count)))[:-1]
    total = int(count.sum())
    store.grow(total)
    _fill_holes(store, first[holes], count[holes], pages.page_size, seed)
    _hash(extents, first, store, pages, seed, tally, progress)
    _keep_origin(pages, extents, first)
    address = np.array([e.address for _, e in extents], np.int64)
    region = np.array([r for r, _ in extents], np.int64)
    forks = np.zeros(len(pages.processes), bool)
    forks[known:] = [memory.forks for source in sources for memory in source.memories]
    if np.count_nonzero(forks) > 1:
        owner = pages.process_of_region()[region]
        _mark_shareable(store, address, count, first, forks[owner], pages.page_size)
    store.used += total
    return address, count, first, region


def without_zeros(pages: Pages) -> Pages | None:
    """The same pages without the all-zero ones of files; None where there are none."""
    if not pages.stored:
        return None
    frames = pages.frames.copy()
    owner = pages.process_of_region()[pages.run_region]
    in_file = np.array([p.stored is not None for p in pages.processes], bool)[owner]
    for first, n in zip(pages.run_first[in_file], pages.run_count[in_file], strict=True):
        part = frames[first : first + n]
        part[(part & Flag.ZERO) != 0] |= Flag.GONE
    if not np.any(frames != pages.frames):
        return None
    return replace(pages, frames=frames)


def _mark_shareable(
    store: Store, address: I64, count: I64, first: I64, forks: Bool, page_size: int
) -> None:
    """Mark pages that may share a frame since a fork: another process has the same there."""
    keys = np.empty(int(count[forks].sum()), np.uint64)
    where = np.empty(len(keys), np.int64)
    at = 0
    rows = zip(address[forks].tolist(), count[forks].tolist(), first[forks].tolist(), strict=True)
    for start, n, begin in rows:
        here = np.arange(start, start + n * page_size, page_size, dtype=np.uint64)
        keys[at : at + n] = store.hashes[begin : begin + n] ^ (here * ADDRESS_FACTOR)
        where[at : at + n] = np.arange(begin, begin + n)
        at += n
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    several = np.zeros(len(keys), bool)
    several[order[1:][same]] = True
    several[order[:-1][same]] = True
    store.frames[where[several]] &= ~Flag.EXCLUSIVE


def _laid_out(
    sources: Sequence[Source], pages: Pages, *, advised_only: bool
) -> list[tuple[int, Extent]]:
    """Take processes and regions over; give what is to be read, by region."""
    found: list[tuple[int, Extent]] = []
    for source in sources:
        here = Stored(source.kind, source.path, sum(f.size for f in source.files))
        data = 0
        for memory in source.memories:
            process = len(pages.processes)
            pages.processes.append(
                Process(ProcessId(memory.pid, 0), memory.name, stored=len(pages.stored))
            )
            for i, region in enumerate(memory.regions()):
                scanned = region.scanned and (region.advised or not advised_only)
                if scanned:
                    for extent in memory.extents(i):
                        found.append((len(pages.regions), extent))
                        if extent.file is None:
                            here.hole_pages += extent.pages
                        else:
                            data += extent.pages
                pages.regions.append(region._replace(process=process, scanned=scanned))
        if here.hole_pages > HOLES_PLAIN + HOLES_TIMES * data:
            raise BadInput(
                f"{source.path} has {here.hole_pages * pages.page_size} bytes of holes and "
                f"{data * pages.page_size} of data: memory is not that empty",
                "see its real size with `du -h`",
            )
        pages.stored.append(here)
        pages.skipped += source.skipped
    return found


def _fill_holes(store: Store, first: I64, count: I64, page_size: int, seed: int) -> None:
    digest = _core.hash_bytes(np.zeros(page_size, np.uint8), seed)
    for at, n in zip(first.tolist(), count.tolist(), strict=True):
        store.hashes[at : at + n] = digest
        store.frames[at : at + n] = WORD | Flag.ZERO | Flag.CONSTANT


def _pieces(extents: Sequence[tuple[int, Extent]], first: I64, page_size: int) -> Iterator[_Piece]:
    """Extents of a file one after another, cut to what a thread takes at a time."""
    file: File | None = None
    rows: list[tuple[int, int, int]] = []
    room = PIECE_PAGES

    def piece() -> _Piece:
        assert file is not None
        offset, count, start = (np.array(column, np.int64) for column in zip(*rows, strict=True))
        return _Piece(file, offset, count, start)

    for (_, e), at in zip(extents, first.tolist(), strict=True):
        if e.file is None:
            continue
        done = 0
        while done < e.pages:
            if rows and (e.file is not file or room == 0):
                yield piece()
                rows, room = [], PIECE_PAGES
            file = e.file
            n = min(room, e.pages - done)
            rows.append((e.offset + done * page_size, n, at + done))
            done += n
            room -= n
    if rows:
        yield piece()


def _hash(
    extents: Sequence[tuple[int, Extent]],
    first: I64,
    store: Store,
    pages: Pages,
    seed: int,
    tally: Tally,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    total = sum(e.pages for _, e in extents if e.file is not None)

    def work(piece: _Piece) -> tuple[_Piece, int]:
        try:
            return piece, _core.hash_file(
                piece.file.fd,
                pages.page_size,
                seed,
                piece.offset,
                piece.count,
                piece.first,
                store.hashes,
                store.frames,
                int(WORD),
            )
        except OSError as e:
            raise failure(piece.file.path, e) from e

    done = 0
    with ThreadPoolExecutor(tally.threads) as pool:
        try:
            for piece, n in pool.map(work, _pieces(extents, first, pages.page_size)):
                if n < int(piece.count.sum()):
                    raise cut(piece.file.path)
                done += n
                tally.bytes_read += n * pages.page_size
                if progress is not None:
                    progress("pages", done, total)
        finally:
            pool.shutdown(cancel_futures=True)


def _keep_origin(pages: Pages, extents: Sequence[tuple[int, Extent]], first: I64) -> None:
    """Note where the pages lie, for a later look at some of them."""
    paths: dict[str, int] = {}
    rows = [
        (at, e.pages, e.offset, paths.setdefault(e.file.path, len(paths)))
        for (_, e), at in zip(extents, first.tolist(), strict=True)
        if e.file is not None
    ]
    table = np.array(rows, np.int64).reshape(-1, 4)
    start, count, offset, path = (np.ascontiguousarray(column) for column in table.T)
    pages.origin = Origin(start, count, offset, path, list(paths))
