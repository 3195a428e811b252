"""Page faults on KSM pages, by /proc/vmstat."""

from __future__ import annotations

from pathlib import Path

import pytest

from dedup.kernel.vmstat import Events, events
from tests.kernel_fixtures import KsmControl, Target


def test_a_kernel_that_counts_one_of_them_or_none(tmp_path: Path) -> None:
    assert events(tmp_path) == Events(None, None)
    (tmp_path / "vmstat").write_text("nr_free_pages 7\nnot_cow_ksm 3\ncow_ksm 12\n")
    assert events(tmp_path) == Events(12, None)


@pytest.mark.ksm
@pytest.mark.root
def test_writes_to_merged_pages_and_unmerging_are_counted(ksm: KsmControl, target: Target) -> None:
    target.do("map", name="a", pages=60)
    target.do("fill", name="a", at=0, count=60, what="x")
    target.do("advise", name="a", what="mergeable")
    counters = ksm.converge()
    assert counters.pages_sharing == 59

    def broken() -> int:
        count = events().cow_ksm
        assert count is not None
        return count

    before = broken()
    target.do("put", name="a", at=0, what=["unique"] * 25)
    assert broken() - before == 25
    target.do("advise", name="a", what="unmergeable")
    assert broken() - before == 60
