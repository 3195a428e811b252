"""Huge pages, by sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dedup.kernel import huge
from dedup.kernel.huge import Huge
from dedup.kernel.memory import default_threads
from tests.kernel_fixtures import Target

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_a_kernel_without(tmp_path: Path) -> None:
    assert huge.read(tmp_path, tmp_path) == Huge("", (), 0, 0)


def test_sizes(tmp_path: Path) -> None:
    thp = tmp_path / "transparent_hugepage"
    for size, words in {
        64: "always inherit madvise [never]",
        128: "always [inherit] madvise never",
        2048: "always [inherit] madvise never",
    }.items():
        (thp / f"hugepages-{size}kB").mkdir(parents=True)
        (thp / f"hugepages-{size}kB" / "enabled").write_text(words + "\n")
    (thp / "enabled").write_text("[always] madvise never\n")
    (thp / "hpage_pmd_size").write_text("2097152\n")
    for size, count in {2048: 3, 1048576: 1}.items():
        (tmp_path / "hugepages" / f"hugepages-{size}kB").mkdir(parents=True)
        (tmp_path / "hugepages" / f"hugepages-{size}kB" / "nr_hugepages").write_text(f"{count}\n")
    found = huge.read(tmp_path, tmp_path)
    assert found == Huge("always", ("128kB",), 0, (3 << 21) + (1 << 30))


@pytest.mark.skipif(not THP.exists(), reason="this kernel has no huge pages")
def test_here(target: Target) -> None:
    assert f"[{huge.read().enabled}]" in THP.read_text()
    if huge.read().enabled == "never":
        return
    before = huge.read().in_use_bytes
    target.do("map", name="a", pages=(8 << 21) // 4096, align=1 << 21)
    target.do("advise", name="a", what="hugepage")
    target.do("fill", name="a", at=0, count=(8 << 21) // 4096, what="x")
    # The counter is kept by each processor, and folded in batches.
    assert huge.read().in_use_bytes - before >= (8 << 21) - default_threads() * (2 << 21)
