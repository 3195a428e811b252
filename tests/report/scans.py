"""Scans made by hand: real grouping and prediction over given contents."""

from __future__ import annotations

import numpy as np

from dedup import grouping
from dedup.kernel.memory import Tally
from dedup.model import cost, merge
from dedup.model.prediction import Rules
from dedup.pages import Flag, Pages, Process, ProcessId, Region, Skipped
from dedup.scanning import Scan

PAGE = 4096
TUNABLES: dict[str, int | str] = {
    "run": 0,
    "pages_to_scan": 100,
    "sleep_millisecs": 20,
    "max_page_sharing": 256,
    "use_zero_pages": 0,
    "smart_scan": 1,
    "advisor_mode": "none",
}
ZERO = 0


def region(process: int, start: int, pages: int, name: str = "", **more: object) -> Region:
    plain = Region(
        process=process,
        start=start * PAGE,
        end=(start + pages) * PAGE,
        perms="rw-p",
        name=name,
        vm_flags=frozenset({"rd", "wr"}),
        eligible=True,
        why="",
        advised=False,
        scanned=True,
        anonymous_bytes=pages * PAGE,
    )
    return plain._replace(**more)  # type: ignore[arg-type]


def make(
    contents: list[list[int]],
    *,
    name: str = "worker",
    region_name: str = "",
    user: str = "www-data",
    looks: int = 2,
    frames_known: bool = True,
    shared: bool = False,
    tunables: dict[str, int | str] | None = None,
    extra_regions: tuple[Region, ...] = (),
    skipped: tuple[Skipped, ...] = (),
    full_scan_seconds: float = 0.1,
    advised: bool = False,
) -> Scan:
    """A scan of processes with these contents: a page each, 0 is the zero page.

    `shared`: no page is exclusive, and equal contents have the same frame.
    """
    flat = np.array([c for process in contents for c in process], np.int64)
    starts = np.cumsum([0, *map(len, contents)])
    frame = flat if shared else np.arange(len(flat)) + 1000
    words = frame.astype(np.uint64)
    words[flat == ZERO] |= Flag.ZERO | Flag.CONSTANT
    if not shared:
        words |= Flag.EXCLUSIVE
    if not frames_known:
        words = (words & ~np.uint64((1 << 48) - 1)) | Flag.HIDDEN
    regions = [
        region(p, 16 + 4096 * p, len(c), region_name, advised=advised)
        for p, c in enumerate(contents)
    ]
    used = [p for p, c in enumerate(contents) if c]
    pages = Pages(
        page_size=PAGE,
        hashes=flat.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15),
        frames=words,
        run_start=np.array([regions[p].start for p in used], np.int64),
        run_count=np.array([len(contents[p]) for p in used], np.int64),
        run_first=starts[used].astype(np.int64),
        run_region=np.array(used, np.int64),
        regions=[*regions, *extra_regions],
        processes=[
            Process(ProcessId(100 + p, 5), name, user, f"/system.slice/s{p % 2}", f"s{p % 2}")
            for p in range(len(contents))
        ],
        looks=looks,
        frames_known=frames_known,
        skipped=list(skipped),
    )
    groups = grouping.group(pages)
    rules = Rules()
    prediction = merge.predict(pages, groups, rules)
    load = cost.load_of(pages, groups, prediction)
    return Scan(
        kernel="6.18.0",
        tunables=TUNABLES if tunables is None else tunables,
        pages=pages,
        groups=groups,
        prediction=prediction,
        rules=rules,
        tally=Tally(hash_source="test", threads=1),
        seed=1,
        seconds=0.5,
        interval_seconds=0.2 if looks > 1 else 0.0,
        full_scan_seconds=full_scan_seconds,
        passes=looks,
        scope="compatible",
        pagemap_scan=True,
        cost=cost.price(load, cost.Settings(100, 20, 0.004), None),
    )
