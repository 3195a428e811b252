"""smaps of real processes, and hostile names."""

from __future__ import annotations

import itertools
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


GROWING = """
import ctypes
libc = ctypes.CDLL(None)
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_long]
print("ready", flush=True)
while True:
    for _ in range(500):
        libc.sbrk(4096)
    libc.sbrk(-500 * 4096)
"""


def test_a_heap_that_grows_meanwhile() -> None:
    """The kernel shows it twice then, by some of the readings."""
    command = [sys.executable, "-c", GROWING]
    twice = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout
            child.stdout.readline()
            with Handle(child.pid) as handle:
                for _ in range(3_000):
                    text = handle.read("smaps", maps.SMAPS_BYTES)
                    twice += text.count(b"[heap]") > 1
                    found = maps.parse(text)
                    assert sum(m.name == "[heap]" for m in found) == 1
                    assert all(a.end <= b.start for a, b in itertools.pairwise(found))
                    if twice > 3:
                        break
        finally:
            child.kill()
    assert twice


def test_of_mappings_that_overlap_the_later_one_holds() -> None:
    """As where one was split elsewhere between two calls, and where several became one."""

    def shown(*spans: tuple[int, int]) -> list[tuple[int, int]]:
        text = "".join(
            f"{a:x}-{b:x} rw-p 00000000 00:00 0 \nRss: 4 kB\nVmFlags: rd wr \n" for a, b in spans
        )
        return [(m.start, m.end) for m in maps.parse(text.encode())]

    assert shown((1, 3), (3, 5), (1, 9), (9, 10)) == [(1, 9), (9, 10)]
    assert shown((1, 3), (3, 5), (4, 9)) == [(1, 3), (3, 4), (4, 9)]
    assert shown((1, 3), (3, 5), (2, 9)) == [(1, 2), (2, 9)]
    assert shown((1, 3), (3, 5), (7, 9)) == [(1, 3), (3, 5), (7, 9)]


def test_name_that_looks_like_a_head() -> None:
    """Where a call begins in the midst of one, mappings behind it are read on."""
    part = "f" * 200 + "-f r"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, *[part] * 18)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * mmap.PAGESIZE)
        with path.open("rb") as f, Handle(os.getpid()) as handle:
            several = [mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) for _ in range(8)]
            stack = next(m for m in maps.read(handle) if m.name == "[stack]")
            found = maps.read(handle, (stack.start, stack.end))
            for one in several:
                one.close()
    assert [m.name for m in found] == ["[stack]"]


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


FLAGS = st.frozensets(st.sampled_from(["rd", "wr", "mg", "sh", "lo", "??"]))
SIZES = st.integers(0, 2**40).map(lambda n: n // 1024 * 1024)
HEADS = ("Size:", "VmFlags:", "Anonymous:     4 kB", "7f00-7f01 rw-p 0 0:0 0", "[heap]", "\xff")
FILE_NAMES = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(HEADS)
).map(" ".join)


@st.composite
def mappings(draw: st.DrawFn) -> maps.Mapping:
    start = draw(st.integers(0, 2**47)) // 4096 * 4096
    return maps.Mapping(
        start=start,
        end=start + draw(st.integers(1, 2**20)) * 4096,
        perms=draw(st.sampled_from(["rw-p", "r--s", "---p"])),
        # The kernel pads before a name; what follows its first letter is the name's own.
        name=draw(FILE_NAMES).lstrip(" "),
        vm_flags=draw(FLAGS),
        anonymous_bytes=draw(SIZES),
        anon_huge_bytes=draw(SIZES),
        swap_bytes=draw(SIZES),
        resident_bytes=draw(SIZES),
        shared_bytes=draw(SIZES),
        ksm_bytes=draw(SIZES | st.none()),
    )


def smaps_of(m: maps.Mapping) -> str:
    """As fs/proc/task_mmu.c prints it, with fields that we don't read between."""
    resident = m.resident_bytes // 1024
    assert m.shared_bytes is not None
    shared = m.shared_bytes // 1024
    lines = [
        f"{m.start:08x}-{m.end:08x} {m.perms} 00000000 00:00 0".ljust(73) + m.name,
        f"Size:           {(m.end - m.start) // 1024:8} kB",
        f"Rss:            {resident - resident // 2:8} kB",
        f"Shared_Clean:   {shared - shared // 3:8} kB",
        f"Shared_Dirty:   {shared // 3:8} kB",
        f"Private_Clean:  {321:8} kB",
        f"Anonymous:      {m.anonymous_bytes // 1024:8} kB",
        *([] if m.ksm_bytes is None else [f"KSM:            {m.ksm_bytes // 1024:8} kB"]),
        f"LazyFree:       {123:8} kB",
        f"AnonHugePages:  {m.anon_huge_bytes // 1024:8} kB",
        f"ShmemPmdMapped: {456:8} kB",
        f"Shared_Hugetlb: {resident // 2 - resident // 4:8} kB",
        f"Private_Hugetlb: {resident // 4:7} kB",
        f"Swap:           {m.swap_bytes // 1024:8} kB",
        f"SwapPss:        {789:8} kB",
        "THPeligible:           0",
        "VmFlags: " + " ".join(sorted(m.vm_flags)) + " ",
    ]
    return "\n".join(lines) + "\n"


@given(st.lists(mappings(), max_size=12))
def test_what_is_printed_is_read(some: list[maps.Mapping]) -> None:
    ends = [0, *itertools.accumulate(m.end for m in some)]
    wanted = [
        m._replace(start=m.start + end, end=m.end + end) for m, end in zip(some, ends, strict=False)
    ]
    text = "".join(map(smaps_of, wanted)).encode()
    assert maps.parse(text) == wanted
