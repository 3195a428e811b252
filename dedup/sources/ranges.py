"""Which addresses of a process to look at: the time follows the pages present, not the mappings.

Where pages lie densely, pagemap alone is the fastest: a region is one range. Where memory is sparse
or huge, or frame numbers are hidden (which leaves the shared zero page unknown), the kernel is
asked for the ranges of present pages, in one call for as many regions as lie in a stretch.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup import _core
from dedup.kernel import pagemap
from dedup.kernel.memory import Ranges

if TYPE_CHECKING:
    from dedup.kernel.maps import Mapping
    from dedup.kernel.pagemap import Sight
    from dedup.pages import I64, Region

BETWEEN_PAGES: Final = 64
"""A mapping that is not asked for ends a stretch if it has more: to walk them takes as long as
another call."""


_START, _END, _FLAGS, _HUGE_FLAGS, _REGION, _STRETCH = range(6)
_COLUMNS: Final = 6
"""Of a region: the flags of what is mapped as huge pages, and -1 as the stretch of one range."""


@dataclass(slots=True)
class Chooser:
    """Collects the regions of one process, ascending by address, and gives their ranges.

    Parameters
    ----------
    sight : Sight
    """

    sight: Sight
    pages: int = 0
    """How many to expect in the ranges, once they are given."""
    _rows: array[int] = field(default_factory=lambda: array("q"))
    _stretch: int = 0

    def add(self, region: Region, m: Mapping, index: int) -> None:
        """Add the region of a mapping, or a part of it.

        Parameters
        ----------
        region : Region
        m : Mapping
        index : int
            Of the region, for the result.
        """
        if not region.scanned or m.anonymous_bytes == 0:
            self._pass_by(m)
            return
        size = m.end - m.start
        flags = (_core.RANGE_LOCKED if "lo" in m.vm_flags else 0) | (
            _core.RANGE_KSM if m.ksm_bytes is None or m.ksm_bytes > 0 else 0
        )
        # Of a huge page mapped as one, each page has the exclusive mark of the first. Where a
        # relative wrote to that one alone, the others are shared all the same, and would be
        # unshared by process_vm_readv.
        shared = 0 if m.shared_bytes == 0 else _core.RANGE_SHARED
        flags |= 0 if m.shared_bytes == 0 else _core.RANGE_TORN
        sparse = m.anonymous_bytes * 2 < size
        start, end = region.start, region.end
        if self.sight.pagemap_scan and (sparse or m.anon_huge_bytes or not self.sight.frames):
            if end - start != size:
                self._pass_by(m)  # other parts of it are not asked for
            huge_flags = flags | _core.RANGE_HUGE | shared
            self._rows.extend((start, end, flags, huge_flags, index, self._stretch))
            return
        self._pass_by(m)
        if m.anon_huge_bytes:
            flags |= shared
        self._rows.extend((start, end, flags, flags, index, -1))
        self.pages += min(m.anonymous_bytes, end - start) // self.sight.page_size

    def _pass_by(self, m: Mapping) -> None:
        """A mapping that the kernel is not asked about."""
        if m.resident_bytes + m.swap_bytes > BETWEEN_PAGES * self.sight.page_size:
            self._stretch += 1

    def ranges(self, fd: int) -> Ranges:
        """The ranges of all regions added; each has its region's index.

        Parameters
        ----------
        fd : int
            The process's open pagemap.

        Raises
        ------
        OSError
            From PAGEMAP_SCAN.
        """
        rows = np.array(self._rows, np.int64).reshape(-1, _COLUMNS)
        asked = rows[:, _STRETCH] >= 0
        whole, parts = rows[~asked], rows[asked]
        columns = [whole[:, c] for c in (_START, _END, _FLAGS, _REGION)]
        if len(parts):
            found = self._present(fd, parts)
            self.pages += int((found[1] - found[0]).sum()) // self.sight.page_size
            columns = [np.concatenate(c) for c in zip(columns, found, strict=True)]
            order = np.argsort(columns[0], kind="stable")
            columns = [c[order] for c in columns]
        start, end, flags, region = columns
        return Ranges(start.astype(np.uint64), end.astype(np.uint64), flags.copy(), region.copy())

    def _present(self, fd: int, parts: I64) -> tuple[I64, I64, I64, I64]:
        """Present pages in regions that the kernel is asked about: start, end, flags, region."""
        (first,) = np.nonzero(np.diff(parts[:, _STRETCH], prepend=-1))
        last = np.append(first[1:], len(parts)) - 1
        stretches = zip(parts[first, _START].tolist(), parts[last, _END].tolist(), strict=True)
        found = np.concatenate([pagemap.present_ranges(fd, *s) for s in stretches])
        # The kernel joins ranges over the bounds of mappings, and tells of mappings in between:
        # each range once for each region that it is in, cut to it.
        start, end = found[:, 0].astype(np.int64), found[:, 1].astype(np.int64)
        begin = np.searchsorted(end, parts[:, _START], "right")
        count = np.searchsorted(start, parts[:, _END], "left") - begin
        row = np.repeat(np.arange(len(parts)), count)
        at = np.arange(len(row)) + np.repeat(begin - np.cumsum(count) + count, count)
        huge = (found[at, 2] & np.uint64(_core.PAGE_IS_HUGE)) != 0
        return (
            np.maximum(start[at], parts[row, _START]),
            np.minimum(end[at], parts[row, _END]),
            np.where(huge, parts[row, _HUGE_FLAGS], parts[row, _FLAGS]),
            parts[row, _REGION],
        )
