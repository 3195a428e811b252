from __future__ import annotations

import mmap
import os
from pathlib import Path

from dedup.kernel import footprint
from dedup.kernel.processes import Handle

STAT = "anon 1\nkernel 5000000\npagetables 1000000\nsock 3\n"


def test_shared_memory_and_files() -> None:
    with Handle(os.getpid()) as handle:
        before = footprint.read(handle)
        assert before.file_bytes > 1 << 20
        assert before.page_table_bytes > 0
        memory = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        for at in range(0, 8 << 20, mmap.PAGESIZE):
            memory[at] = 1
        more = footprint.read(handle).shared_memory_bytes - before.shared_memory_bytes
    assert more == 8 << 20
    memory.close()


def cgroup(folder: Path, pids: str, stat: str = STAT) -> Path:
    (folder / "a").mkdir(parents=True)
    (folder / "a/cgroup.procs").write_text(pids)
    (folder / "a/memory.stat").write_text(stat)
    return folder


def test_the_kernels_memory_for_a_cgroup(tmp_path: Path) -> None:
    root = cgroup(tmp_path, "12\n13\n")
    assert footprint.kernel_bytes("/a", [12, 13, 14], root) == 4_000_000
    # Others in it: nothing to tell of ours.
    assert footprint.kernel_bytes("/a", [12], root) is None
    assert footprint.kernel_bytes("/b", [12], root) is None


def test_kernels_that_do_not_tell(tmp_path: Path) -> None:
    root = cgroup(tmp_path, "12\n", "anon 1\n")
    assert footprint.kernel_bytes("/a", [12], root) is None
    (root / "cgroup.procs").write_text("12\n")
    (root / "memory.stat").write_text(STAT)
    assert footprint.kernel_bytes("/", [12], root) is None
