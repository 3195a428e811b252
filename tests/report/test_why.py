"""Why not more, and the top contents: the parts, their words, and that they add up."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dedup
from dedup.pages import Flag, Skipped
from dedup.report import jsonout
from dedup.report.why import FREED_CODES, NO_MEMORY, NOTHING, WORDS, Why
from tests.kernel_fixtures import PAGE as KERNELS_PAGE

from .scans import PAGE, ZERO, make, region
from .test_jsonout import checked

if TYPE_CHECKING:
    from dedup.report.why import Part


def parts(why: Why) -> dict[str, int | None]:
    return {p.code: p.pages for p in why.whole if p.code != "zero_page"}


def test_everything_has_its_place() -> None:
    why = Why(make([[1, 1, 2, ZERO], [1, 3, ZERO]]))
    assert parts(why) == {"kept": 2, "duplicate": 2, "unique": 2, "zero": 1}
    assert [sum(n or 0 for n in r.values()) for r in why.by_region] == [4, 3]
    # These processes are not there: whether they map the shared zero page is not known.
    assert [r["zero_page"] for r in why.by_region] == [None, None]
    assert why.by_process() == why.by_region
    found = checked(jsonout.scan_object(why.scan))
    freed = sum(p["pages"] for p in found["why_not_more"] if p["code"] in FREED_CODES)
    assert freed == found["prediction"]["frames_freed"] == 3
    assert found["why_not_more"][-1]["bytes"] is None
    memory = [p["bytes"] for p in found["why_not_more"] if p["code"] not in NO_MEMORY]
    assert sum(memory) == found["scan"]["bytes"] == 7 * PAGE
    assert memory == sorted(memory, reverse=True)


EXTRA = {
    "refused": region(
        0, 99, 9, "/dev/shm/x", perms="rw-s", eligible=False, scanned=False, anonymous_bytes=0,
        why="shared", vm_flags=frozenset({"sh", "ms"}),
    ),
    "droppable": region(0, 199, 5, eligible=False, scanned=False, why="droppable",
                        vm_flags=frozenset({"dp"})),
    "scope": region(0, 299, 7, scanned=False),
    "swapped": region(0, 399, 9, anonymous_bytes=0, swap_bytes=6 * PAGE),
    "file": region(0, 499, 9, "/lib/x.so", anonymous_bytes=0, resident_bytes=4 * PAGE),
    "kernel": region(0, 599, 2, "[vdso]", eligible=False, scanned=False, why="special"),
}  # fmt: skip


def part(name: str, **more: Any) -> tuple[Part, Why]:
    why = Why(make([[1]], extra_regions=(EXTRA[name]._replace(**more),)))
    return next(p for p in why.whole if p.code != "unique"), why


@pytest.mark.parametrize(
    ("name", "code", "pages", "words", "flag"),
    [
        ("droppable", "not_eligible", 5, "droppable", "dp"),
        ("scope", "out_of_scope", 7, WORDS["out_of_scope"], None),
        ("swapped", "swapped", 6, WORDS["swapped"], None),
        ("file", "file", 4, WORDS["file"], None),
    ],
)
def test_mappings(name: str, code: str, pages: int, words: str, flag: str | None) -> None:
    found, why = part(name)
    assert (found.code, found.pages, found.words, found.flag) == (code, pages, words, flag)
    assert {c: n for c, n in why.by_region[1].items() if c != "zero_page"} == {code: pages}
    assert why.reason(1) == words
    checked(jsonout.scan_object(why.scan))


def test_shared_mappings_count_what_is_resident() -> None:
    found, why = part("refused", resident_bytes=8 * PAGE)
    assert (found.pages, found.flag) == (8, "sh")
    # A source that does not tell: unknown, not 0.
    found, why = part("refused")
    assert (found.code, found.pages) == ("not_eligible", None)
    whole = checked(jsonout.scan_object(why.scan))["why_not_more"]
    assert (whole[-1]["pages"], whole[-1]["bytes"]) == (None, None)


def test_the_kernels_own_mappings_are_not_news() -> None:
    why = Why(make([[1]], extra_regions=(EXTRA["kernel"],)))
    assert parts(why) == {"unique": 1}
    assert why.by_region[1] == {"not_eligible": 2}


def test_processes_out_of_reach() -> None:
    why = Why(make([[1]], skipped=(Skipped(7, "may not read", "not-permitted"),)))
    assert why.whole[-1].code == "left_out"
    checked(jsonout.scan_object(why.scan))


def test_the_main_reason() -> None:
    why = Why(make([[1, 1, 1], [1, 2, 3, 4], []]))
    assert why.reason(0) == WORDS["duplicate"]
    assert why.reason(1) == WORDS["unique"]
    assert why.reason(2) == NOTHING
    assert all(r["why"] for r in checked(jsonout.scan_object(why.scan))["regions"])


def test_contents() -> None:
    name = os.fsdecode(b"\xff\\")
    scan = make([[ZERO, ZERO, ZERO, 1, 1], [ZERO, 1], [2, 2]], region_name=name)
    found = checked(jsonout.scan_object(scan))["top_contents"]
    assert [(c["number"], c["looks_like"], c["mappings"], c["frames_freed"]) for c in found] == [
        (1, "zero", 4, 3),
        (2, None, 3, 2),
        (3, None, 2, 1),
    ]
    assert found[0]["frames"] == 4
    assert found[0]["freed_bytes"] == 3 * PAGE
    assert found[0]["processes"] == [{"pid": 100, "pages": 3}, {"pid": 101, "pages": 1}]
    assert found[0]["regions"] == [{"name": "\\xff\\\\", "pages": 4}]
    assert len(jsonout.scan_object(scan, top=2)["top_contents"]) == 2
    assert jsonout.scan_object(scan, top=0)["top_contents"] == []


def test_hidden_frames_give_a_range() -> None:
    scan = make([[1, 1], [1]], frames_known=False, shared=True)
    (found,) = checked(jsonout.scan_object(scan))["top_contents"]
    assert (found["frames"], found["frames_freed"], found["freed_bytes"]) == (None, None, None)
    assert found["bounds"] == {"frames_freed": [0, 2], "freed_bytes": [0, 2 * PAGE]}


def test_no_content_and_no_hash_is_shown() -> None:
    text = b"the secret word is swordfish. " * 200
    data = np.frombuffer(bytearray(text[:KERNELS_PAGE] * 8 + bytes(12 * KERNELS_PAGE)), np.uint8)
    scan = dedup.scan(arrays=[data], interval_seconds=0.01)
    out = checked(jsonout.scan_object(scan))
    assert [c["looks_like"] for c in out["top_contents"]] == ["zero", "text"]
    shown = repr(out)
    assert "swordfish" not in shown
    values = scan.pages.hashes.tolist()
    assert not any(str(h) in shown or f"{h:x}" in shown for h in values)


def test_zero_pages_of_huge_pages_are_apart() -> None:
    scan = make([[ZERO] * 3 + [1] * 3])
    scan.pages.frames[:2] |= Flag.THP
    assert parts(Why(scan)) == {"zero_in_huge_page": 2, "kept": 2, "duplicate": 2}
