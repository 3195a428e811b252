"""The arrays of a scan: which region, address and place in ksmd's order each page has."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dedup.pages import FRAME_MASK, Flag
from tests.model.layouts import PAGE, Layout, layouts


@given(layouts(), st.integers(0, 2**32))
def test_each_page_has_its_place(layout: Layout, seed: int) -> None:
    """Wherever it lies in the arrays, drawn anew by the seed."""
    pages = layout.pages(seed=seed)
    wanted = [(p, m.address * PAGE) for p, part in enumerate(layout.processes) for m in part]
    everyone = np.arange(len(pages.hashes))
    process = pages.process_of_region()[pages.region_of(everyone)]
    found = list(zip(process.tolist(), pages.address_of(everyone).tolist(), strict=True))
    assert sorted(found) == wanted
    rank = pages.scan_order(everyone)
    assert [found[i] for i in np.argsort(rank).tolist()] == wanted
    assert sorted(rank.tolist()) == everyone.tolist()


@given(layouts(), st.data())
def test_a_part_is_as_the_whole(layout: Layout, data: st.DataObject) -> None:
    pages = layout.pages(seed=3)
    n = len(pages.hashes)
    some = data.draw(st.lists(st.integers(0, n - 1))) if n else []
    part = np.array(some, np.int64)
    everyone = np.arange(n)
    for of in (pages.region_of, pages.address_of, pages.scan_order):
        assert of(part).tolist() == of(everyone)[part].tolist()


def test_gone_and_unread_pages_are_not_present() -> None:
    layout = Layout()
    p = layout.process()
    for _ in range(6):
        layout.page(p, 1)
    pages = layout.pages()
    for page, flag in enumerate([Flag.GONE, Flag.UNREAD, Flag.VOLATILE, Flag.NEW, Flag.HIDDEN]):
        pages.frames[page] |= flag
    assert pages.present.tolist() == [False, False, True, True, True, True]


def test_no_flag_reaches_into_the_frame_number() -> None:
    flags = [int(v) for name, v in vars(Flag).items() if name.isupper()]
    assert not any(v & int(FRAME_MASK) for v in flags)
    assert len(set(flags)) == len(flags)
    assert all(v.bit_count() == 1 for v in flags)
