"""CRIU's images, made by hand: versions 3 and 4, parents, mappings; and what is refused."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dedup.errors import BadInput
from tests.sources.memory_files import PAGE, Dumped, contents, digest, dump, message, page, scan

A, B, C = 0x400000, 0x7F0000000000, 0x7F0000400000
PARENT, LAZY, PRESENT = 1, 2, 4
PRIVATE, FILE, SHARED, VDSO, HEAP = 1 << 9 | 1, 1 << 6 | 1, 1 << 8 | 1, 1 << 3 | 1 << 9, 1 << 5


def pages(*words: str) -> list[bytes]:
    return [page(w) for w in words]


@pytest.mark.parametrize("version", [3, 4])
def test_pages_by_address(tmp_path: Path, version: int) -> None:
    process = Dumped(7, [(A, pages("a", "b"), PRESENT), (B, pages("a"), PRESENT)], name="served")
    found = scan(("criu", dump(tmp_path / "d", process, version=version)))
    assert contents(found.pages) == {
        A: digest(page("a")),
        A + PAGE: digest(page("b")),
        B: digest(page("a")),
    }
    (p,) = found.pages.processes
    assert (p.id.pid, p.name) == (7, "served")
    assert found.prediction.frames_freed == 1
    assert found.complete


def test_processes_of_a_dump(tmp_path: Path) -> None:
    folder = dump(
        tmp_path / "d",
        Dumped(12, [(A, pages("a", "x"), PRESENT)], pages_id=2),
        Dumped(7, [(A, pages("a"), PRESENT), (B, pages("x"), PRESENT)]),
    )
    found = scan(("criu", folder))
    assert [p.id.pid for p in found.pages.processes] == [7, 12]
    # `a` may be one frame since a fork, `x` lies elsewhere.
    assert found.prediction.bounds["frames_freed"] == (1, 2)
    assert found.prediction.pages_sharing is None


def test_mappings(tmp_path: Path) -> None:
    vmas = [
        (A, A + 4 * PAGE, 3, PRIVATE | HEAP, 1 << 12),
        (B, B + PAGE, 3, FILE, 0),
        (B + PAGE, B + 2 * PAGE, 3, SHARED, 0),
        (C, C + 2 * PAGE, 5, VDSO, 0),
    ]
    entries: list[tuple[int, list[bytes] | int, int]] = [
        (A + PAGE, pages("a", "b"), PRESENT),
        (B, pages("c"), PRESENT),
        (C, pages("vdso", "vdso 2"), PRESENT),
    ]
    folder = dump(tmp_path / "d", Dumped(7, entries, vmas))
    found = scan(("criu", folder)).pages
    assert [(r.name, r.perms, r.eligible, r.advised, r.anonymous_bytes) for r in found.regions] == [
        ("[heap]", "rw-p", True, True, 2 * PAGE),
        ("[file]", "rw-p", True, False, PAGE),
        ("[shared memory]", "rw-s", False, False, 0),
        ("[vdso]", "r-xp", False, False, 0),
    ]
    assert set(contents(found)) == {A + PAGE, A + 2 * PAGE, B}
    advised = scan(("criu", folder), scope="advised").pages
    assert set(contents(advised)) == {A + PAGE, A + 2 * PAGE}


def test_pages_of_parents(tmp_path: Path) -> None:
    """Ranges in parents cut their entries as they like, over two generations."""
    dump(tmp_path / "1", Dumped(7, [(A, pages(*"abcdef"), PRESENT)]))
    dump(
        tmp_path / "2",
        Dumped(7, [(A, 2, PARENT), (A + 2 * PAGE, pages("C"), PRESENT), (A + 3 * PAGE, 3, PARENT)]),
        parent="../1",
    )
    folder = dump(
        tmp_path / "3",
        Dumped(7, [(A + PAGE, 4, PARENT), (B, pages("n"), PRESENT)]),
        parent="../2",
    )
    assert contents(scan(("criu", folder)).pages) == {
        **{A + i * PAGE: digest(page(w)) for i, w in ((1, "b"), (2, "C"), (3, "d"), (4, "e"))},
        B: digest(page("n")),
    }


def test_lazy_pages_are_said(tmp_path: Path) -> None:
    entries: list[tuple[int, list[bytes] | int, int]] = [(A, 5, LAZY), (B, pages("a"), PRESENT)]
    found = scan(("criu", dump(tmp_path / "d", Dumped(7, entries))))
    assert set(contents(found.pages)) == {B}
    assert [(s.code, s.pages, s.pid) for s in found.pages.skipped] == [("not-dumped", 5, 7)]


def refused(folder: Path | str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        scan(("criu", folder))


def test_missing_pages_files(tmp_path: Path) -> None:
    folder = dump(tmp_path / "d", Dumped(7, [(A, pages("a", "b"), PRESENT)]))
    (folder / "pages-1.img").write_bytes(page("a"))
    refused(folder, "beyond the end of .*pages-1.img")
    (folder / "pages-1.img").unlink()
    refused(folder, "pages-1.img: No such file")
    os.mkfifo(folder / "pages-1.img")
    refused(folder, "FIFO")


def test_parents(tmp_path: Path) -> None:
    entries: list[tuple[int, list[bytes] | int, int]] = [(A, 2, PARENT)]
    alone = dump(tmp_path / "alone", Dumped(7, entries))
    refused(alone, "no link `parent`")
    one = dump(tmp_path / "one", Dumped(7, entries), parent="../two")
    dump(tmp_path / "two", Dumped(7, entries), parent="../one")
    refused(one, "in a circle")
    refused(dump(tmp_path / "self", Dumped(7, entries), parent="."), "in a circle")
    dump(tmp_path / "less", Dumped(7, [(A, pages("a"), PRESENT)]))
    refused(dump(tmp_path / "more", Dumped(7, entries), parent="../less"), "has none there")
    for i in range(300):
        dump(tmp_path / f"p{i}", Dumped(7, entries), parent=f"../p{i + 1}")
    refused(tmp_path / "p0", "more than 256 parents")
    refused(dump(tmp_path / "gone", Dumped(7, entries), parent="../nowhere"), "No such file")


@pytest.mark.parametrize("n", [-1, -(1 << 31), 1 << 62, (1 << 64) - 1, 1 << 51, 1 << 32, 0])
@pytest.mark.parametrize("flags", [PRESENT, PARENT, LAZY])
def test_numbers_of_pages_that_cant_be(tmp_path: Path, n: int, flags: int) -> None:
    if flags == LAZY and n == 1 << 32:
        n = 1 << 60
    dump(tmp_path / "p", Dumped(7, [(A, pages("a"), PRESENT)]))
    folder = dump(tmp_path / "d", Dumped(7, [(A, n, flags)]), parent="../p")
    (folder / "pages-1.img").write_bytes(page("a"))
    refused(folder, "can't be|beyond the end|has none there")


def test_what_is_no_dump(tmp_path: Path) -> None:
    refused(tmp_path, "no images of processes")
    refused(tmp_path / "none", "No such file")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "no directory")
    refused("/dev/zero", "no directory")
    folder = dump(tmp_path / "d", Dumped(7, [(A, pages("a"), PRESENT)]))
    whole = (folder / "pagemap-7.img").read_bytes()
    for raw, words in (
        (b"", "is empty"),
        (whole[:6], "other magics"),
        (b"x" * 20, "other magics"),
        (whole[:8], "no entries"),
        (whole[:10], "damaged"),
        (whole[:-1], "damaged"),
        (whole[:8] + struct.pack("<I", 0xFFFFFFFF), "damaged"),
        (whole[:8] + struct.pack("<I", 0), "names no file of pages"),
    ):
        (folder / "pagemap-7.img").write_bytes(raw)
        refused(folder, words)


def test_the_same_pages_twice(tmp_path: Path) -> None:
    """Neither in one process nor in two: a small file would be a long read."""
    twice: list[tuple[int, list[bytes] | int, int]] = [
        (A, pages("a", "b"), PRESENT),
        (A + PAGE, 1, PRESENT),
    ]
    refused(dump(tmp_path / "d", Dumped(7, twice)), "overlap")
    folder = dump(
        tmp_path / "e", *(Dumped(pid, [(A, pages("a"), PRESENT)]) for pid in range(10, 20))
    )
    refused(folder, "are those of process 10")


def test_pages_outside_all_mappings(tmp_path: Path) -> None:
    vmas = [(A, A + PAGE, 3, PRIVATE, 0)]
    process = Dumped(7, [(A, pages("a", "b"), PRESENT)], vmas)
    refused(dump(tmp_path / "d", process), "outside its mappings")


@settings(
    max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    image=st.sampled_from(["pagemap-7.img", "mm-7.img", "core-7.img"]),
    changes=st.lists(
        st.tuples(st.integers(0, 80), st.binary(min_size=1, max_size=10)), min_size=1, max_size=4
    ),
    cut=st.one_of(st.none(), st.integers(0, 80)),
)
def test_hostile_bytes_give_a_result_or_a_refusal(
    tmp_path: Path, image: str, changes: list[tuple[int, bytes]], cut: int | None
) -> None:
    vmas = [(A, A + 4 * PAGE, 3, PRIVATE, 0), (B, B + PAGE, 3, FILE, 0)]
    entries: list[tuple[int, list[bytes] | int, int]] = [
        (A, pages("a", "b"), PRESENT),
        (B, pages("c"), PRESENT),
    ]
    folder = dump(tmp_path / "d", Dumped(7, entries, vmas, name="x"))
    raw = bytearray((folder / image).read_bytes())
    for at, what in changes:
        raw[at : at + len(what)] = what
    (folder / image).write_bytes(raw[:cut])
    try:
        found = scan(("criu", folder))
    except BadInput:
        return
    assert found.scanned_pages <= 3


@settings(
    max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    numbers=st.lists(
        st.tuples(st.integers(1, 6), st.integers(-(1 << 63), 1 << 64)), min_size=1, max_size=8
    )
)
def test_hostile_entries(tmp_path: Path, numbers: list[tuple[int, int]]) -> None:
    folder = dump(tmp_path / "d", Dumped(7, [(A, pages("a", "b"), PRESENT)]))
    raw = (folder / "pagemap-7.img").read_bytes()
    entry = message((1, B), *numbers)
    (folder / "pagemap-7.img").write_bytes(raw + struct.pack("<I", len(entry)) + entry)
    try:
        found = scan(("criu", folder))
    except BadInput:
        return
    assert found.scanned_pages <= 2
