"""The mappings known without smaps, against smaps."""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING, Any, Final

import pytest

from dedup.errors import DedupError
from dedup.kernel import ksm, maps, pagemap, processes
from dedup.model.eligibility import why_not
from dedup.scanning import Plan, Scan, scan_pids
from dedup.sources import mappings
from dedup.sources.live import Options
from tests.kernel_fixtures import PAGE, Target, at_rest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dedup.pages import Region

pytestmark = pytest.mark.root

HUGE: Final = 2 << 20
PAGES: Final = 6000
"""Of the memory that makes it worth it."""
PRIVATE, SHARED, DROPPABLE, ANONYMOUS, NORESERVE = 2, 1, 8, 0x20, 0x4000


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mappings, "LEAST_BYTES", PAGES * PAGE)


@pytest.fixture
def target() -> Iterator[Target]:
    with Target() as found:
        found.do("map", name="main", pages=PAGES)
        found.do("fill", name="main", at=0, count=PAGES, what="unique")
        yield found


def without_smaps(pid: int) -> list[maps.Mapping] | None:
    """What is known without smaps, None where smaps was asked."""
    with processes.Handle(pid) as handle:
        found = mappings.of(handle, ksm.process_counters(handle), pagemap.sight(), countable=True)
    return None if all(m.counted for m in found) else found


def by_smaps(pid: int) -> list[maps.Mapping]:
    with processes.Handle(pid) as handle:
        return maps.read(handle)


def told(m: maps.Mapping) -> tuple[Any, ...]:
    """What a scan goes by."""
    return (
        m.start, m.end, m.perms, m.name, why_not(m.vm_flags, m.name), "lo" in m.vm_flags,
        "mg" in m.vm_flags, "ht" in m.vm_flags,
    )  # fmt: skip


def sizes(m: maps.Mapping) -> tuple[Any, ...]:
    return m.anonymous_bytes, m.anon_huge_bytes, m.swap_bytes, m.resident_bytes, m.ksm_bytes


def like_smaps(found: list[maps.Mapping], pid: int) -> None:
    real = by_smaps(pid)
    assert [told(m) for m in found] == [told(m) for m in real]
    for m, r in zip(found, real, strict=True):
        if m.counted:
            assert sizes(m) == sizes(r), m
            assert m.shared_bytes is None
        else:
            assert r.anonymous_bytes == r.resident_bytes <= m.anonymous_bytes == m.end - m.start
            assert (r.anon_huge_bytes, r.swap_bytes, r.ksm_bytes) == (0, 0, 0)


def scanned(pid: int) -> Scan:
    return scan_pids([pid], Plan(Options(seed=1), passes=1))


def visible(region: Region) -> Region:
    """What reports show of a region."""
    return region._replace(vm_flags=frozenset(), shared_bytes=0)


def same_scan(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan says the same as one that goes by smaps."""
    found = scanned(pid)
    with monkeypatch.context() as m:
        m.setattr(mappings, "LEAST_BYTES", 1 << 60)
        real = scanned(pid)
    assert found.prediction == real.prediction
    assert [visible(r) for r in found.pages.regions] == [visible(r) for r in real.pages.regions]


def same(target: Target, monkeypatch: pytest.MonkeyPatch, *children: int) -> list[maps.Mapping]:
    """What is known without smaps is the same, and so is a scan by it."""
    with at_rest([target.pid, *children]):
        found = without_smaps(target.pid)
        assert found is not None
        like_smaps(found, target.pid)
        same_scan(target.pid, monkeypatch)
    return found


def test_a_plain_process(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    target.do("fill", name="main", at=10, count=500, what="alike")
    same(target, monkeypatch)


@pytest.mark.parametrize("file", ["", "memory"])
def test_shared_memory_is_refused_for_the_same_reason(
    target: Target, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = SHARED if file else SHARED | ANONYMOUS
    target.do("map", name="open", pages=20, flags=flags, file=file)
    target.do("map", name="read", pages=20, flags=flags, file=file)
    target.do("protect", name="read", how="r")
    same(target, monkeypatch)


def test_pages_written_in_a_file_s_mapping(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    target.do("map", name="file", pages=40, flags=PRIVATE, file="some")
    target.do("touch", name="file", at=0, count=20)
    target.do("put", name="file", at=5, what=["one", "one", "two"])
    same(target, monkeypatch)


@pytest.mark.parametrize("name", ["a\rb", "a\r7000-8000 rw-p 00000000 00:00 0 ", "a\nb c\\"])
def test_any_name_of_a_file(
    target: Target, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / name
    file.write_bytes(os.urandom(10 * PAGE))
    target.do("map", name="file", pages=10, flags=PRIVATE, path=str(file))
    target.do("put", name="file", at=5, what=["one", "two"])
    same(target, monkeypatch)


@pytest.mark.parametrize("flags", [PRIVATE, SHARED])
def test_a_device_is_left_to_smaps_wherever_its_node_lies(
    target: Target, tmp_path: Path, flags: int
) -> None:
    node = tmp_path / "device"
    os.mknod(node, stat.S_IFCHR | 0o600, os.stat("/dev/zero").st_rdev)
    target.do("map", name="device", pages=10, flags=flags, path=str(node))
    found = without_smaps(target.pid)
    # A shared mapping of /dev/zero is memory of another file.
    assert found is None if flags == PRIVATE else found is not None


def test_a_long_hole_behind_a_page_takes_no_time(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.do("map", name="sparse", pages=1 << 32, flags=PRIVATE | ANONYMOUS | NORESERVE)
    target.do("put", name="sparse", at=5, what=["one"])
    target.do("protect", name="sparse", how="none")
    begin = time.monotonic()
    assert without_smaps(target.pid) is not None
    assert time.monotonic() - begin < 1, "8 million calls take some 6 s"
    same(target, monkeypatch)


def test_memory_without_access(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    target.do("map", name="closed", pages=300)
    target.do("fill", name="closed", at=7, count=200, what="alike")
    target.do("protect", name="closed", how="none")
    same(target, monkeypatch)


def test_zero_pages_and_holes_are_not_counted(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.do("map", name="holes", pages=600)
    target.do("touch", name="holes", at=0, count=50)
    target.do("fill", name="holes", at=40, count=400, what="zero")
    same(target, monkeypatch)


def test_some_huge_pages_shared_with_a_child(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.do("map", name="huge", pages=512, align=HUGE)
    target.do("advise", name="huge", what="hugepage")
    target.do("fill", name="huge", at=0, count=512, what="unique")
    target.do("fill", name="main", at=0, count=300, what="alike")
    child = target.do("fork")
    target.do("fill", name="huge", child=(0,), at=0, count=1, what="unique")
    found = same(target, monkeypatch, child)
    assert sum(m.anon_huge_bytes for m in found) == HUGE
    assert sum(m.anon_huge_bytes for m in by_smaps(target.pid)) == HUGE, "the scan did no harm"


def test_many_huge_pages_are_left_to_smaps(target: Target) -> None:
    target.do("map", name="huge", pages=4096, align=HUGE)
    target.do("advise", name="huge", what="hugepage")
    target.do("fill", name="huge", at=0, count=4096, what="unique")
    assert without_smaps(target.pid) is None


def test_memory_full_of_holes_is_left_to_smaps(target: Target) -> None:
    target.do("map", name="holes", pages=10 * PAGES)
    assert without_smaps(target.pid) is None


@pytest.mark.parametrize(
    "what",
    [
        {"flags": DROPPABLE | ANONYMOUS},
        {"flags": PRIVATE, "file": "memfd"},
        {"flags": SHARED, "file": "memfd"},
    ],
    ids=["droppable", "private memfd", "shared memfd"],
)
def test_what_only_smaps_tells(target: Target, what: dict[str, Any]) -> None:
    target.do("map", name="other", pages=20, **what)
    target.do("put", name="other", at=3, what=["one", "two"])
    assert without_smaps(target.pid) is None


@pytest.mark.parametrize("how", ["mergeable", "lock"])
def test_marks_that_only_smaps_tells(target: Target, how: str) -> None:
    target.do("map", name="marked", pages=20)
    target.do("fill", name="marked", at=0, count=20, what="unique")
    if how == "lock":
        target.do("lock", name="marked", at=2, count=3)
    else:
        target.do("advise", name="marked", what=how)
    assert without_smaps(target.pid) is None


def test_memory_given_back_lazily(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    target.do("map", name="free", pages=300)
    target.do("fill", name="free", at=0, count=300, what="alike")
    target.do("advise", name="free", what="free")
    with at_rest([target.pid]):
        found = without_smaps(target.pid)
        if found is not None:  # else its pages look like droppable ones
            like_smaps(found, target.pid)
        same_scan(target.pid, monkeypatch)


def test_too_many_are_left_to_smaps_at_once(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is searched for in their text."""
    monkeypatch.setattr(mappings, "MOST_MAPPINGS", 3)
    monkeypatch.setattr(mappings, "_ANONYMOUS", None)
    assert without_smaps(target.pid) is None


def test_what_is_shown_twice_is_left_to_smaps(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mapping is that grew meanwhile."""
    real = processes.Handle.read

    def read(self: processes.Handle, name: str, *args: Any) -> bytes:
        text = real(self, name, *args)
        lines = text.splitlines(keepends=True)
        twice = b"".join(line * (1 + line.endswith(b"[stack]\n")) for line in lines)
        return twice if name == "maps" else text

    assert without_smaps(target.pid)
    monkeypatch.setattr(processes.Handle, "read", read)
    assert without_smaps(target.pid) is None


def test_not_where_nobody_counts(target: Target) -> None:
    with processes.Handle(target.pid) as handle:
        counters = ksm.process_counters(handle)
        found = mappings.of(handle, counters, pagemap.sight(), countable=False)
    assert found == by_smaps(target.pid)


def test_every_process_of_this_host() -> None:
    """Whatever runs here: what is known without smaps is what smaps says."""
    checked = 0
    for pid in processes.pids():
        try:
            with processes.Handle(pid) as handle:
                if handle.info.kernel_thread:
                    continue
                counters = ksm.process_counters(handle)
                before = maps.read(handle)
                found = mappings.of(handle, counters, pagemap.sight(), countable=True)
                after = maps.read(handle)
        except DedupError:
            continue  # it has ended, or nobody may read it
        if before == after:
            checked += 1
            assert [told(m) for m in found] == [told(m) for m in after]
    assert checked


@pytest.mark.parametrize("countable", [True, False])
def test_only_what_reaches_into_a_span(target: Target, *, countable: bool) -> None:
    """The same mappings as of the whole, by either way."""
    with at_rest([target.pid]), processes.Handle(target.pid) as handle:
        counters, sight = ksm.process_counters(handle), pagemap.sight()
        every = mappings.of(handle, counters, sight, countable=countable)
        main = max(every, key=lambda m: m.anonymous_bytes)
        first, last = every[1], every[-2]
        for low, high in (
            (main.start + PAGE, main.end - PAGE), (first.start, first.start + 1),
            (main.start, main.end + 1), (first.end, last.start), (last.end - 1, 1 << 63),
        ):  # fmt: skip
            wanted = [m for m in every if m.end > low and m.start < high]
            found = mappings.of(handle, counters, sight, countable=countable, within=(low, high))
            assert [told(m) for m in found] == [told(m) for m in wanted]
            for one, other in zip(found, wanted, strict=True):
                # Of little memory smaps is asked, which counts everything.
                assert one.counted != other.counted or sizes(one) == sizes(other)
