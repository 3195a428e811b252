"""A scan of several instances at once, taken apart."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection

    from dedup.pages import Pages
    from dedup.scanning import Scan


def part(scan: Scan, pids: Collection[int]) -> Scan:
    """The same scan with the pages of some of its processes only.

    Its prediction, its price and its groups are still those of all.
    """
    return replace(scan, pages=_part(scan.pages, pids))


def _part(pages: Pages, pids: Collection[int]) -> Pages:
    chosen = [i for i, p in enumerate(pages.processes) if p.id.pid in pids]
    process = {old: new for new, old in enumerate(chosen)}
    kept = [i for i, r in enumerate(pages.regions) if r.process in process]
    region = np.full(len(pages.regions), -1, np.int64)
    region[kept] = np.arange(len(kept))
    runs = np.flatnonzero(region[pages.run_region] >= 0)
    first, count = pages.run_first[runs], pages.run_count[runs]
    new_first = np.cumsum(count) - count
    # Page j of the part is page j - new_first + first of its run.
    index = np.arange(int(count.sum())) + np.repeat(first - new_first, count)
    return replace(
        pages,
        hashes=pages.hashes[index],
        frames=pages.frames[index],
        run_start=pages.run_start[runs],
        run_count=count,
        run_first=new_first,
        run_region=region[pages.run_region[runs]],
        regions=[
            pages.regions[i]._replace(process=process[pages.regions[i].process]) for i in kept
        ],
        processes=[pages.processes[i] for i in chosen],
        skipped=[s for s in pages.skipped if s.pid is None or s.pid in pids],
        origin=None,
    )
