"""Which node a frame belongs to: by the memory blocks, else by the zones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dedup.errors import Unsupported
from dedup.kernel import numa
from dedup.pages import Nodes

BLOCK = 128 << 20
PAGES = BLOCK // 4096

ZONEINFO = """\
Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 13515
  pages free     2816
        spanned  4095
        present  3998
  start_pfn:           1
Node 0, zone   Normal
  pages free     5077820
        present  1000000
  start_pfn:           1048576
Node 0, zone  Movable
  pages free     0
        present  0
Node 1, zone   Normal
  pages free     77
        present  500000
  start_pfn:           2097152
"""


def host(root: Path, blocks: dict[int, list[int]]) -> Path:
    """A /sys/devices/system with these memory blocks by node."""
    (root / "memory").mkdir()
    (root / "memory" / "block_size_bytes").write_text(f"{BLOCK:x}\n")
    (root / "node").mkdir()
    (root / "node" / "possible").write_text("0-1\n")
    for node, numbers in blocks.items():
        (root / "node" / f"node{node}").mkdir()
        (root / "node" / f"node{node}" / "memory_failure").mkdir()
        for n in numbers:
            (root / "node" / f"node{node}" / f"memory{n}").mkdir()
    return root


def of(found: object, *frames: int) -> list[int]:
    assert isinstance(found, Nodes)
    return [int(n) for n in found.of(np.array(frames))]


def test_one_node_is_none(tmp_path: Path) -> None:
    assert numa.nodes(host(tmp_path, {0: [0, 1, 2]}), tmp_path, 4096) is None


def test_memory_blocks(tmp_path: Path) -> None:
    """Blocks interleaved, with a hole, numbers of several digits."""
    devices = host(tmp_path, {0: [0, 1, 2, 8], 1: [3, 9, 10]})
    found = numa.nodes(devices, tmp_path, 4096)
    assert of(found, 0, 3 * PAGES - 1, 3 * PAGES, 8 * PAGES, 9 * PAGES, 10 * PAGES + 5) == [
        0, 0, 1, 0, 1, 1,
    ]  # fmt: skip
    assert found is not None
    assert len(found) == 2
    assert found.start.tolist() == [0, 3 * PAGES, 8 * PAGES, 9 * PAGES]


def test_zones_where_there_are_no_blocks(tmp_path: Path) -> None:
    devices = host(tmp_path, {0: [], 1: []})
    (tmp_path / "zoneinfo").write_text(ZONEINFO)
    found = numa.nodes(devices, tmp_path, 4096)
    assert of(found, 0, 1, 1048576, 2097151, 2097152, 9_999_999) == [0, 0, 0, 0, 1, 1]


def test_zones_where_a_block_is_of_two_nodes(tmp_path: Path) -> None:
    devices = host(tmp_path, {0: [0, 1], 1: [1, 2]})
    (tmp_path / "zoneinfo").write_text(ZONEINFO)
    assert of(numa.nodes(devices, tmp_path, 4096), 2 * PAGES) == [0]


def test_several_nodes_and_nothing_to_tell_them_by(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="2 NUMA nodes"):
        numa.nodes(host(tmp_path, {0: [], 1: []}), tmp_path, 4096)


def test_this_host() -> None:
    """The zones of this host start where the blocks have them, on the same nodes."""
    blocks = numa.nodes()
    by_zone = numa._zones(numa.PROC)
    assert by_zone, "no zones in /proc/zoneinfo"
    expected = [node for _, node in by_zone]
    if blocks is None:
        assert set(expected) == {0}
    else:
        assert of(blocks, *(start for start, _ in by_zone)) == expected
