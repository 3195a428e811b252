from __future__ import annotations

from typing import TYPE_CHECKING

from dedup import pages
from dedup.pages import Flag, Skipped
from dedup.report import summary

from .scans import PAGE, ZERO, make

if TYPE_CHECKING:
    import pytest

    from dedup.scanning import Scan


def test_pages_by_region_and_process() -> None:
    scan = make([[1, 1, 2], [], [1, 3]])
    scan.pages.frames[2] |= Flag.VOLATILE
    scan.pages.frames[4] |= Flag.GONE
    counts = summary.by_region(scan.pages)
    assert counts.pages.tolist() == [3, 0, 1]
    assert counts.duplicates.tolist() == [2, 0, 1]
    assert counts.volatile.tolist() == [1, 0, 0]
    assert summary.by_process(scan.pages, counts.pages).tolist() == [3, 0, 1]


def distinct_frames(scan: Scan) -> int | None:
    return summary.distinct_frames(scan.pages, scan.groups)


def test_distinct_frames() -> None:
    assert distinct_frames(make([[1, 1, 2], [1, 3]])) == 5
    assert distinct_frames(make([[1, 1, 2], [1, 3]], shared=True)) == 3
    assert distinct_frames(make([[1, 1]], frames_known=False)) is None
    assert distinct_frames(make([[]])) == 0


def test_distinct_frames_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = make([[1, 2, 3, 1], [2, 1, 4]], shared=True)
    monkeypatch.setattr(pages, "PIECE_PAGES", 2)
    assert distinct_frames(scan) == 4


def test_services_are_ranked_by_what_each_saves_alone() -> None:
    # Processes 0, 2 are of unit s0; 1, 3 of s1.
    scan = make([[1, 1, 2], [5, 6], [1, ZERO], [5, 6, 7]])
    found = summary.services(scan, "unit")
    assert [(s.name, s.processes, s.pages, s.frames_freed_alone) for s in found] == [
        ("s0", 2, 5, 2),
        ("s1", 2, 5, 2),
    ]
    assert found[0].saved_alone_bytes == 2 * PAGE - 5 * 64
    assert [s.name for s in summary.services(scan, "user")] == ["www-data"]


def test_left_out_by_reason() -> None:
    found = summary.left_out(
        [
            Skipped(1, "may not read 1", "not-permitted"),
            Skipped(9, "gone", "process-gone"),
            Skipped(2, "may not read 2", "not-permitted"),
        ]
    )
    assert [(e.code, e.pids, e.example) for e in found] == [
        ("not-permitted", [1, 2], "may not read 1"),
        ("process-gone", [9], "gone"),
    ]
