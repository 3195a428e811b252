"""One more look at the memory of a finished scan, for what the scan itself does not keep.

It reads pagemap, and a few present pages through /proc/PID/mem: nothing changes. Processes that
have ended, or that have their pid from another one, are left alone.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from dedup.errors import BadInput, NoSuchProcess, NotPermitted, OutputFailed
from dedup.kernel import memory, pagemap, processes
from dedup.sources.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dedup.kernel.processes import Handle
    from dedup.pages import I64, Pages, Process, Region


@contextmanager
def _opened(process: Process) -> Iterator[Handle | None]:
    """The process, None where it has ended."""
    try:
        handle = processes.Handle(process.id.pid)
    except (NoSuchProcess, NotPermitted):
        yield None
        return
    with handle:
        try:
            same = handle.id == process.id
        except NoSuchProcess:
            same = False
        yield handle if same else None


def looks_like(pages: Pages, samples: Sequence[Sequence[int]], seed: int) -> list[str | None]:
    """What contents look like, by one page each that still has it.

    Parameters
    ----------
    pages : Pages
    samples : sequence of sequences of int
        For each content some pages (indices).
    seed : int
        Of the scan's hash.

    Returns
    -------
    list of str or None
        `zero`, `constant`, `text`, `binary` (see `kernel.memory.look_like`); `changed` where none
        of the pages has the content any more; None where their processes have ended.
    """
    index = np.array([i for some in samples for i in some], np.int64)
    if not len(index):
        return []
    address = dict(zip(index.tolist(), pages.address_of(index).tolist(), strict=True))
    process = dict(
        zip(index.tolist(), pages.process_of_region()[pages.region_of(index)].tolist(), strict=True)
    )
    found = []
    for some in samples:
        looks = None
        for i in some:
            owner = pages.processes[process[i]]
            if owner.stored is None:
                now = _look(pages, owner, address[i], int(pages.hashes[i]), seed)
            else:
                now = _look_in_file(pages, i, seed)
            looks = now or looks
            if now not in {None, "changed"}:
                break
        found.append(looks)
    return found


def _look_in_file(pages: Pages, index: int, seed: int) -> str | None:
    """What a page in a file looks like; a hole is zeros, and None what can't be read any more."""
    where = pages.origin.of(index) if pages.origin is not None else None
    if where is None:
        return "zero"
    path, offset, number = where
    try:
        file = File.open(path)
    except (BadInput, NotPermitted, OutputFailed):
        return None
    try:
        size = pages.page_size
        return memory.look_like_in_file(
            file.fd, offset + number * size, size, seed, int(pages.hashes[index])
        )
    finally:
        file.close()


def _look(pages: Pages, process: Process, address: int, digest: int, seed: int) -> str | None:
    with _opened(process) as handle:
        if handle is None:
            return None
        try:
            return memory.look_like(handle, address, pages.page_size, seed, digest)
        except (NoSuchProcess, NotPermitted):
            return None


def zero_pages(pages: Pages) -> list[int | None]:
    """Mappings of the shared zero page in each region; None where that can't be known."""
    found: list[int | None] = [None] * len(pages.regions)
    if not pagemap.sight().pagemap_scan:
        return found
    by_process: dict[int, list[int]] = {}
    for r, region in enumerate(pages.regions):
        if region.eligible and pages.processes[region.process].stored is None:
            by_process.setdefault(region.process, []).append(r)
    for p, mine in by_process.items():
        for r, n in zip(mine, _zero(pages, p, [pages.regions[r] for r in mine]), strict=False):
            found[r] = n
    return found


def _zero(pages: Pages, process: int, regions: Sequence[Region]) -> list[int]:
    """Of one process; nothing where it has ended."""
    start = np.array([r.start for r in regions], np.int64)
    end = np.array([r.end for r in regions], np.int64)
    with _opened(pages.processes[process]) as handle:
        if handle is None:
            return []
        try:
            fd = handle.open("pagemap")
            try:
                ranges = pagemap.zero_pages(fd, int(start.min()), int(end.max()))
            finally:
                os.close(fd)
        except (NoSuchProcess, NotPermitted, OSError):
            return []
    first, last = ranges[:, 0].astype(np.int64), ranges[:, 1].astype(np.int64)
    before = np.concatenate(([0], np.cumsum(last - first)))

    def below(address: I64) -> I64:
        """Bytes of the ranges below each address; ranges may go over regions' ends."""
        at = np.searchsorted(first, address, "right")
        over = np.where(at > 0, last[at - 1] - address, 0) if len(last) else 0
        return np.asarray(before[at] - np.maximum(0, over))

    return [int(n) for n in (below(end) - below(start)) // pages.page_size]
