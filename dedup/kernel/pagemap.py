"""Frames and flags: pagemap, PAGEMAP_SCAN, kpageflags, kpagecount.

Source: Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import errno
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup import _core
from dedup.errors import NotPermitted

if TYPE_CHECKING:
    from dedup.pages import I64, U64

PROC: Final = Path("/proc")
THP: Final = Path("/sys/kernel/mm/transparent_hugepage")
PFN_MASK: Final = (1 << 55) - 1
KPF_SWAPBACKED: Final = 1 << 14
ALONE_FRAMES: Final = 1 << 13
"""So few are asked about sooner than threads start."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What the kernel shows us of frames."""

    page_size: int
    huge_bytes: int
    """Bytes of a PMD-mapped huge page; 0 where the kernel has none."""
    zero_frame: int
    """Frame number of the shared zero page, -1 where frame numbers are hidden."""
    pagemap_scan: bool
    """Whether the PAGEMAP_SCAN ioctl works."""
    kpageflags: bool
    kpagecount: bool
    every_folio: bool
    """Huge pages of sizes below the PMD's are in use, so each page must be looked up."""

    @property
    def frames(self) -> bool:
        """Whether frame numbers are shown."""
        return self.zero_frame >= 0


@cache
def sight(proc: Path = PROC, thp: Path = THP) -> Sight:
    """Probe, once a process, what the kernel shows us.

    Raises
    ------
    NotPermitted
        Not even our own pagemap can be read.
    """
    page_size = mmap.PAGESIZE
    try:
        huge = int((thp / "hpage_pmd_size").read_text())
    except OSError:
        huge = 0
    zero_frame = -1
    with mmap.mmap(-1, page_size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        # Read, never written: it maps the shared zero page.
        _ = page[0]
        with memoryview(page) as view:
            address = _core.address_of(view)
        try:
            fd = os.open(proc / "self" / "pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as e:
            raise NotPermitted(
                "may not read /proc/self/pagemap: this process gave up its rights (not dumpable)",
                "start it anew as the user that it should run as",
            ) from e
        try:
            word = int(_core.read_words(fd, np.array([address // page_size], np.int64))[0])
            frame = word & PFN_MASK
            if word >> 63 and frame:
                zero_frame = frame
            try:
                _core.pagemap_scan(fd, address, address + page_size, 0, 0, _core.PAGE_IS_PRESENT)
                scan = True
            except OSError as e:
                if e.errno not in {errno.ENOTTY, errno.EINVAL}:
                    raise
                scan = False
        finally:
            os.close(fd)
    return Sight(
        page_size=page_size,
        huge_bytes=huge,
        zero_frame=zero_frame,
        pagemap_scan=scan,
        kpageflags=zero_frame >= 0 and os.access(proc / "kpageflags", os.R_OK),
        kpagecount=zero_frame >= 0 and os.access(proc / "kpagecount", os.R_OK),
        every_folio=_small_folios(thp, huge),
    )


def _small_folios(thp: Path, pmd_bytes: int) -> bool:
    """Whether anonymous memory may get huge pages smaller than the PMD's (mTHP)."""
    for enabled in thp.glob("hugepages-*kB/enabled"):
        size = int(enabled.parent.name.removeprefix("hugepages-").removesuffix("kB")) * 1024
        if size != pmd_bytes and "[never]" not in enabled.read_text():
            return True
    return False


def present_ranges(fd: int, start: int, end: int) -> U64:
    """Ranges of present anonymous pages: shape (n, 3) of start, end, categories.

    Pages of files and the shared zero page are left out. The categories have
    `_core.PAGE_IS_HUGE` where a huge page is mapped as one.

    Raises
    ------
    OSError
        ENOTTY where the kernel has no PAGEMAP_SCAN.
    """
    unwanted = _core.PAGE_IS_FILE | _core.PAGE_IS_PFNZERO
    return _core.pagemap_scan(
        fd, start, end, unwanted, _core.PAGE_IS_PRESENT | unwanted, _core.PAGE_IS_HUGE
    )


def kinds_of_ranges(fd: int, start: int, end: int) -> U64:
    """Ranges of present pages, the shared zero page left out: shape (n, 3) of start, end, kind.

    The kind has `_core.PAGE_IS_FILE` for pages of files and of shared memory, and
    `_core.PAGE_IS_HUGE` where a huge page is mapped as one.

    Raises
    ------
    OSError
        ENOTTY where the kernel has no PAGEMAP_SCAN.
    """
    zero = _core.PAGE_IS_PFNZERO
    kinds = _core.PAGE_IS_FILE | _core.PAGE_IS_HUGE
    return _core.pagemap_scan(fd, start, end, zero, _core.PAGE_IS_PRESENT | zero, kinds)


def zero_pages(fd: int, start: int, end: int) -> U64:
    """Ranges that map the shared zero page: shape (n, 3) of start, end, categories.

    Raises
    ------
    OSError
        ENOTTY where the kernel has no PAGEMAP_SCAN.
    """
    return _core.pagemap_scan(fd, start, end, 0, _core.PAGE_IS_PFNZERO, 0)


def mappings_of(frames: I64, proc: Path = PROC, threads: int = 1) -> I64:
    """How many mappings each frame has on the whole host (/proc/kpagecount, root only).

    Parameters
    ----------
    frames : int64 array
    proc : Path, optional
    threads : int, optional
        That ask side by side: the kernel takes some 100 ns a frame.

    Raises
    ------
    OSError
    """
    frames = np.ascontiguousarray(frames, np.int64)
    fd = os.open(proc / "kpagecount", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if threads == 1 or len(frames) <= ALONE_FRAMES:
            return _core.read_words(fd, frames).astype(np.int64)
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(partial(_core.read_words, fd), np.array_split(frames, threads))
            return np.concatenate(list(parts)).astype(np.int64)
    finally:
        os.close(fd)


def flags_of(frames: I64, proc: Path = PROC) -> U64:
    """The kpageflags of frames, best ascending (root only).

    Raises
    ------
    OSError
    """
    fd = os.open(proc / "kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _core.read_words(fd, np.ascontiguousarray(frames, np.int64))
    finally:
        os.close(fd)
