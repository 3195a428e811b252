"""The model, and the literal simulator that it is held against, against ksmd itself."""

from __future__ import annotations

import itertools
import secrets
from contextlib import ExitStack

import pytest

from dedup.kernel.pagemap import sight
from tests.kernel_fixtures import KsmControl, process_numbers
from tests.model.layouts import UNIQUE
from tests.model.simulator import ZERO
from tests.model.twin import Figure, Twin
from tests.random_layouts import numbers, run


def require_equal(figures: list[Figure]) -> None:
    """As predicted, and as simulated."""
    assert not [str(f) for f in figures if not f.equal or f.counted != f.simulated]


def huge_mapped(twin: Twin) -> int:
    """KiB of huge pages, by smaps."""
    return sum(process_numbers(p, "smaps_rollup")["AnonHugePages"] for p in twin.pids)


@pytest.mark.ksm
def test_random_layouts(ksm: KsmControl) -> None:
    """New ones at each run; every counter, of the whole and of each process, and the frames."""
    seed = secrets.randbelow(10**9)
    print(f"python -m tests.random_layouts --seed {seed} --count 20")
    compared = 0
    for number in itertools.islice(numbers(seed), 60):
        result = run(ksm, number)
        assert not result.wrong, (number, [str(f) for f in result.wrong])
        compared += not result.chance
        if compared == 20:
            return
    pytest.fail(f"seed {seed}: {compared} of 60 layouts in which ksmd does the same every time")


@pytest.mark.ksm
def test_a_merge_that_fails_half_way_costs_a_forked_page_its_chance(ksm: KsmControl) -> None:
    """An all-zero page in a huge page, then one shared by fork: that one never merges."""
    ksm.set(max_page_sharing=256, use_zero_pages=0)
    with ExitStack() as stack:
        twin = Twin(stack, 2)
        twin.huge(0, [ZERO], locked=False)
        twin.pages(1, [ZERO])
        twin.fork(1)
        require_equal(twin.compare(ksm))
        counters = ksm.ksm.counters()
        assert (counters.pages_shared, counters.pages_volatile) == (0, 1)


@pytest.mark.ksm
def test_a_volatile_page_shows_however_long_a_look_takes(ksm: KsmControl) -> None:
    """It is written between the two looks, that take some ms each with so many huge pages."""
    ksm.set(max_page_sharing=256, use_zero_pages=0)
    with ExitStack() as stack:
        twin = Twin(stack, 1)
        for _ in range(8):
            twin.huge(0, [], locked=False)
        twin.pages(0, [UNIQUE], volatile=True)
        require_equal(twin.compare(ksm))
        assert ksm.ksm.counters().pages_volatile == 1


@pytest.mark.ksm
def test_one_zero_page_alone_keeps_its_huge_page(ksm: KsmControl) -> None:
    """The first that ksmd comes to stays whole, the others split as they meet it."""
    ksm.set(max_page_sharing=256, use_zero_pages=0)
    with ExitStack() as stack:
        twin = Twin(stack, 1)
        for zeros in ([ZERO, ZERO], [ZERO], [ZERO]):
            twin.huge(0, zeros, locked=False)
        before = huge_mapped(twin)
        require_equal(twin.compare(ksm))
        assert twin.simulate(ksm).thp_split == 2
        assert before - huge_mapped(twin) == 2 * sight().huge_bytes // 1024
