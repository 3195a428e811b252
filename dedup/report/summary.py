"""Figures that the text and the JSON have in common, added up from a scan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from dedup.model.alone import savings_alone
from dedup.model.copies import UNSTABLE
from dedup.model.prediction import RMAP_ITEM_BYTES
from dedup.pages import NO_FLAG, Flag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.pages import I64, Bool, Groups, Pages, Process, Skipped, Stored
    from dedup.scanning import Scan

By = Literal["name", "user", "cgroup", "unit"]


@dataclass(frozen=True, slots=True)
class RegionPages:
    """Pages by region, in the order of `Pages.regions`."""

    pages: I64
    """There at the last look."""
    duplicates: I64
    """Those whose content is there more than once in this scan."""
    volatile: I64


@dataclass(frozen=True, slots=True)
class Service:
    """Processes that belong together, and what they would save if they alone were mergeable."""

    name: str
    processes: int
    pages: int
    frames_freed_alone: int
    saved_alone_bytes: int
    """Less the memory of their rmap_items."""


def by_region(pages: Pages) -> RegionPages:
    """Count pages by region."""
    present = pages.present
    return RegionPages(
        pages=_count(pages, present),
        duplicates=_count(pages, present & ((pages.frames & Flag.DUPLICATE) != 0)),
        volatile=_count(pages, present & ((pages.frames & UNSTABLE) != 0)),
    )


def _count(pages: Pages, mask: Bool) -> I64:
    total = np.zeros(len(pages.regions), np.int64)
    if len(pages.run_first):
        order = np.argsort(pages.run_first, kind="stable")
        per_run = np.add.reduceat(mask, pages.run_first[order], dtype=np.int64)
        np.add.at(total, pages.run_region[order], per_run)
    return total


def by_process(pages: Pages, counts: I64) -> I64:
    """Add up counts by region to counts by process."""
    total = np.zeros(len(pages.processes), np.int64)
    if len(counts):
        np.add.at(total, pages.process_of_region(), counts)
    return total


@dataclass(frozen=True, slots=True)
class StoredPages:
    """What a scan has of a file, or of a folder of files."""

    stored: Stored
    processes: int
    pages: int
    zero_pages: int
    """Of them, all-zero ones: memory never touched looks the same."""


def sources(pages: Pages) -> list[StoredPages]:
    """What was taken from files, in the order of `Pages.stored`."""
    if not pages.stored:
        return []
    zero = pages.present & ((pages.frames & Flag.ZERO) != 0)
    by = zip(
        pages.processes,
        by_process(pages, _count(pages, pages.present)).tolist(),
        by_process(pages, _count(pages, zero)).tolist(),
        strict=True,
    )
    rows = [(p.stored, n, zeros) for p, n, zeros in by]
    return [
        StoredPages(
            stored,
            sum(1 for at, _, _ in rows if at == i),
            sum(n for at, n, _ in rows if at == i),
            sum(zeros for at, _, zeros in rows if at == i),
        )
        for i, stored in enumerate(pages.stored)
    ]


def distinct_frames(pages: Pages, groups: Groups) -> int | None:
    """Frames under the scanned pages; None where frame numbers are hidden."""
    if not pages.frames_known:
        return None
    absent = Flag.GONE | Flag.UNREAD
    frames = groups.passes.count(pages.frames, absent | Flag.EXCLUSIVE, Flag.EXCLUSIVE)
    for frame, _ in groups.by_frame(pages.frames, absent | Flag.EXCLUSIVE, NO_FLAG):
        frames += int(np.count_nonzero(np.diff(frame, prepend=-1)))
    return frames


def services(scan: Scan, by: By) -> list[Service]:
    """Group the processes and rank them by what each group would save alone."""
    pages = scan.pages
    names = sorted({_label(p, by) for p in pages.processes})
    place = {name: i for i, name in enumerate(names)}
    labels = [place[_label(p, by)] for p in pages.processes]
    frames = savings_alone(pages, scan.groups, labels)
    count = np.bincount(labels, minlength=len(names))
    mappings = np.zeros(len(names), np.int64)
    np.add.at(mappings, labels, by_process(pages, by_region(pages).pages))
    found = [
        Service(
            name=name,
            processes=int(count[i]),
            pages=int(mappings[i]),
            frames_freed_alone=int(frames[i]),
            saved_alone_bytes=int(frames[i]) * pages.page_size - int(mappings[i]) * RMAP_ITEM_BYTES,
        )
        for i, name in enumerate(names)
    ]
    return sorted(found, key=lambda s: (-s.saved_alone_bytes, s.name))


def _label(process: Process, by: By) -> str:
    return {
        "name": process.name,
        "user": process.user,
        "cgroup": process.cgroup,
        "unit": process.unit,
    }[by]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Things skipped for the same reason."""

    code: str
    pids: list[int]
    example: str


def left_out(skipped: Sequence[Skipped]) -> list[LeftOut]:
    """What was skipped, by reason, the most frequent first; what is no process, one by one."""
    found: dict[tuple[str, str], LeftOut] = {}
    for s in skipped:
        if not s.amiss:
            continue
        key = s.code, "" if s.pid is not None else s.what
        entry = found.setdefault(key, LeftOut(s.code, [], s.what))
        if s.pid is not None:
            entry.pids.append(s.pid)
    return sorted(found.values(), key=lambda e: -len(e.pids))
