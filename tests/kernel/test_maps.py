"""smaps of real processes, and hostile names."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import pytest

from dedup.errors import DedupError, Unsupported
from dedup.kernel import maps
from dedup.kernel.processes import Handle, pids


def test_every_process_in_sight() -> None:
    """As many mappings as the kernel's own list has, for all that can be read."""
    read = 0
    for pid in pids():
        try:
            with Handle(pid) as handle:
                before = handle.read("maps")
                found = maps.read(handle)
                after = handle.read("maps")
        except DedupError:
            continue
        if before == after:
            assert len(found) == before.count(b"\n"), pid
            read += 1
    assert read


def test_flags_and_sizes() -> None:
    with mmap.mmap(-1, 64 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory.madvise(mmap.MADV_MERGEABLE)
        memory[: 10 * mmap.PAGESIZE] = b"x" * (10 * mmap.PAGESIZE)
        with Handle(os.getpid()) as handle:
            mine = [m for m in maps.read(handle) if "mg" in m.vm_flags]
        assert [m.anonymous_bytes for m in mine] == [10 * mmap.PAGESIZE]
        assert mine[0].perms == "rw-p"
        assert mine[0].end - mine[0].start == 64 * mmap.PAGESIZE


@pytest.mark.parametrize("name", ["plain", "two  spaces ", "VmFlags: mg", "new\nline", "\x1b[31m"])
def test_names_of_files(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(b"x" * mmap.PAGESIZE)
        with path.open("r+b") as f, mmap.mmap(f.fileno(), 0, mmap.MAP_PRIVATE) as memory:
            memory[0] = 1
            with Handle(os.getpid()) as handle:
                found = [m for m in maps.read(handle) if folder in m.name]
        assert len(found) == 1
        assert found[0].name == str(path).replace("\n", "\\012").rstrip("\n")
        assert found[0].anonymous_bytes == mmap.PAGESIZE
        assert "mg" not in found[0].vm_flags


def test_text_without_flags_is_said() -> None:
    with pytest.raises(Unsupported, match="VmFlags"):
        maps.parse(b"00400000-00401000 r--p 00000000 00:00 0\nSize: 4 kB\n")
    assert maps.parse(b"") == []
