"""Which mappings KSM accepts: our word against the kernel's mark."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from typing import Any

import pytest

from dedup.kernel import advise, maps
from dedup.kernel.processes import Handle
from dedup.model.eligibility import why_not

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
SIZE = 2 << 20
PRIVATE, SHARED, ANONYMOUS = 2, 1, 0x20
HUGETLB, DROPPABLE = 0x40000, 8
READ, WRITE = 1, 2


def file_descriptor(kind: str) -> int:
    if kind == "memfd":
        fd = os.memfd_create("test")
    else:
        fd, path = tempfile.mkstemp()
        os.unlink(path)
    os.ftruncate(fd, SIZE)
    return fd


KINDS: dict[str, tuple[int, int, str, bool]] = {
    # protection, flags, file, whether KSM accepts it
    "anonymous": (READ | WRITE, PRIVATE | ANONYMOUS, "", True),
    "read only": (READ, PRIVATE | ANONYMOUS, "", True),
    "no access": (0, PRIVATE | ANONYMOUS, "", True),
    "private file": (READ | WRITE, PRIVATE, "file", True),
    "private memfd": (READ | WRITE, PRIVATE, "memfd", True),
    "shared anonymous": (READ | WRITE, SHARED | ANONYMOUS, "", False),
    "shared file": (READ | WRITE, SHARED, "file", False),
    "shared memfd": (READ | WRITE, SHARED, "memfd", False),
    "hugetlb": (READ | WRITE, PRIVATE | ANONYMOUS | HUGETLB | 0x4000, "", False),
    "droppable": (READ | WRITE, DROPPABLE | ANONYMOUS, "", False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_our_word_is_the_kernels(kind: str) -> None:
    protection, flags, file, accepted = KINDS[kind]
    fd = file_descriptor(file) if file else -1
    start: Any = LIBC.mmap(None, SIZE, protection, flags, fd, 0)
    if fd >= 0:
        os.close(fd)
    if start in {None, 2**64 - 1}:
        pytest.skip(f"this kernel gives no {kind} memory: {os.strerror(ctypes.get_errno())}")
    try:
        advise.mergeable(start, SIZE)
        with Handle(os.getpid()) as handle:
            (mapping,) = [m for m in maps.read(handle) if m.start <= start < m.end]
        marked = "mg" in mapping.vm_flags
        assert marked == accepted
        assert (why_not(mapping.vm_flags, mapping.name) == "") == marked
    finally:
        LIBC.munmap(ctypes.c_void_p(start), ctypes.c_size_t(SIZE))


def test_special_mappings_of_every_process() -> None:
    with Handle(os.getpid()) as handle:
        found = {m.name: m for m in maps.read(handle)}
    for name, mapping in found.items():
        if name in {"[vdso]", "[vvar]", "[vsyscall]", "[vvar_vclock]"}:
            assert why_not(mapping.vm_flags, name), name
        if name in {"[heap]", "[stack]"}:
            assert not why_not(mapping.vm_flags, name), name


def test_reasons_name_the_flag() -> None:
    assert "VM_SHARED" in why_not(frozenset({"rd", "sh"}), "")
    assert "hugetlb" in why_not(frozenset({"ht", "de"}), "")
    assert why_not(frozenset({"rd", "wr", "mg"}), "") == ""
    assert mmap.PAGESIZE
