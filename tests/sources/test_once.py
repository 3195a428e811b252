"""A frame with several mappings is read once, and what is found is the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dedup.kernel import memory
from dedup.pages import Flag
from dedup.scanning import Plan, Scan, scan_pids
from dedup.sources.live import LiveSource, Options
from tests.kernel_fixtures import at_rest

if TYPE_CHECKING:
    from dedup.pages import Pages
    from tests.kernel_fixtures import KsmControl, Target

pytestmark = pytest.mark.root

PAGES = 5000


def scanned(pids: list[int], threads: int = 2) -> Scan:
    return scan_pids(pids, Plan(Options(seed=1, threads=threads), passes=1))


def read_pages(scan: Scan) -> int:
    return scan.tally.process_vm_readv_pages + scan.tally.proc_mem_pages


def by_address(pages: Pages) -> dict[tuple[int, int], tuple[int, int]]:
    """Hash and frame word of each page."""
    found = {}
    rows = zip(
        pages.run_start.tolist(), pages.run_count.tolist(), pages.run_first.tolist(),
        pages.run_region.tolist(), strict=True,
    )  # fmt: skip
    for start, count, first, region in rows:
        for i in range(count):
            key = pages.regions[region].process, start + i * pages.page_size
            found[key] = int(pages.hashes[first + i]), int(pages.frames[first + i])
    return found


def same_as_read_each(pids: list[int], once: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan says what one says that reads every mapping."""
    with monkeypatch.context() as m:
        m.setattr(memory, "_once", lambda *_, **__: 0)
        each = scanned(pids)
    assert each.tally.same_frame_pages == 0
    assert read_pages(each) == read_pages(once) + once.tally.same_frame_pages
    assert each.tally.bytes_read > once.tally.bytes_read
    assert by_address(each.pages) == by_address(once.pages)
    assert each.prediction == once.prediction


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_frames_shared_since_a_fork(
    target: Target, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    target.do("map", name="a", pages=PAGES)
    target.do("fill", name="a", at=0, count=3000, what="unique")
    target.do("fill", name="a", at=3000, count=1000, what="alike")
    target.do("fill", name="a", at=4000, count=1000, what="zero")
    children = [target.do("fork") for _ in range(3)]
    target.do("fill", child=(0,), name="a", at=100, count=700, what="unique")
    target.do("fill", child=(1,), name="a", at=2900, count=200, what="alike")
    pids = [target.pid, *children]
    with at_rest(pids):
        found = scanned(pids, threads)
        same_as_read_each(pids, found, monkeypatch)
    shared = 4 * PAGES - 700 - 200
    # What another thread is just reading is read again.
    assert found.tally.same_frame_pages > (shared - PAGES) * (0.9 if threads == 1 else 0.1)


def test_one_process_has_each_frame_once(target: Target) -> None:
    target.do("map", name="a", pages=PAGES)
    target.do("fill", name="a", at=0, count=PAGES, what="unique")
    target.do("fork")
    assert scanned([target.pid]).tally.same_frame_pages == 0


def test_a_later_look_reads_anew(target: Target) -> None:
    start = target.do("map", name="a", pages=PAGES)
    target.do("fill", name="a", at=0, count=PAGES, what="unique")
    child = target.do("fork")
    source = LiveSource([target.pid, child], Options(seed=1, threads=2))
    source.first_look()
    assert source.tally.same_frame_pages > 0
    target.do("fill", child=(0,), name="a", at=50, count=60, what="later")
    pages = source.look_again()
    found = by_address(pages)
    for who, first, last in ((0, 50, 50), (1, 50, 110)):
        inside = [found[who, start + i * pages.page_size][1] for i in range(PAGES)]
        changed = [i for i, word in enumerate(inside) if word & Flag.VOLATILE]
        assert changed == list(range(first, last))


@pytest.mark.ksm
def test_ksm_pages(ksm: KsmControl, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    target.do("map", name="a", pages=PAGES)
    for i in range(50):
        target.do("fill", name="a", at=i * 100, count=100, what=f"content {i}")
    target.do("advise", name="a", what="mergeable")
    ksm.converge()
    with at_rest([target.pid]):
        found = scanned([target.pid])
        same_as_read_each([target.pid], found, monkeypatch)
    assert found.tally.same_frame_pages > PAGES * 0.9
    target.do("fill", name="a", at=10, count=5, what="other")
    with at_rest([target.pid]):
        again = scanned([target.pid])
        same_as_read_each([target.pid], again, monkeypatch)


@pytest.mark.ksm
def test_ksm_pages_while_ksmd_runs_are_read_each(ksm: KsmControl, target: Target) -> None:
    target.do("map", name="a", pages=PAGES)
    target.do("fill", name="a", at=0, count=PAGES, what="alike")
    target.do("advise", name="a", what="mergeable")
    ksm.converge(stop=False)
    assert scanned([target.pid]).tally.same_frame_pages == 0
