"""What the scan is held against: the machine's limits in C, `dd`, and plain Python loops."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import subprocess
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import xxhash

if TYPE_CHECKING:
    from collections.abc import Callable

    from dedup.pages import I64, U64

PAGE: Final = mmap.PAGESIZE
PYTHON_READ: Final = 1 << 20
CHUNK: Final = 2 << 20
MOST_SPANS: Final = 512
"""As in peers.c."""
WHAT: Final = {"readv": 0, "mem": 1, "sum": 2, "memcpy": 3}
FLAGS: Final = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")


class Chunks(NamedTuple):
    """Memory, in pieces that a thread takes at a time."""

    spans: U64
    """Start and bytes of each: shape (n, 2)."""
    first: U64
    """The first span of each chunk, and their number."""


@cache
def _compiled() -> Callable[..., float]:
    """The peers of peers.c, built for this machine's own vector units."""
    source = Path(__file__).with_name("peers.c")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "peers.so"
        subprocess.run(["cc", *FLAGS, "-o", built, source], check=True)
        # Loaded, it needs its file no more.
        function = ctypes.CDLL(str(built)).peer
    function.restype = ctypes.c_double
    function.argtypes = [
        ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64,
    ]  # fmt: skip
    return function


def chunks(start: I64, length: I64) -> Chunks:
    """Cut spans of memory (bytes each) into what a thread of a peer takes at a time."""
    spans: list[tuple[int, int]] = []
    first = [0]
    room = CHUNK
    for begin, size in zip(start.tolist(), length.tolist(), strict=True):
        done = 0
        while done < size:
            if room == 0 or len(spans) - first[-1] == MOST_SPANS:
                first.append(len(spans))
                room = CHUNK
            part = min(size - done, room)
            spans.append((begin + done, part))
            done += part
            room -= part
    return Chunks(np.array(spans, np.uint64), np.array([*first, len(spans)], np.uint64))


def whole(start: int, size: int) -> Chunks:
    """One span of memory, cut."""
    return chunks(np.array([start]), np.array([size]))


def _peer(
    what: str, some: Chunks, threads: int, *, pid: int = 0, fd: int = -1, to: int = 0,
    to_size: int = 0,
) -> float:  # fmt: skip
    spans, first = some
    seconds = float(
        _compiled()(
            WHAT[what], pid, fd, spans.ctypes.data, first.ctypes.data, len(first) - 1, threads,
            to, to_size,
        )
    )  # fmt: skip
    if seconds < 0:
        raise OSError(-int(seconds), f"{what}: {os.strerror(-int(seconds))}")
    return seconds


def readv(pid: int, some: Chunks, threads: int) -> float:
    """`process_vm_readv` alone, 2 MiB at a time into a buffer that stays in the cache; seconds."""
    return _peer("readv", some, threads, pid=pid)


def proc_mem(pid: int, some: Chunks, threads: int) -> float:
    """Reading /proc/PID/mem alone, in the same way; seconds."""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        return _peer("mem", some, threads, fd=fd)
    finally:
        os.close(fd)


def read_only_sum(start: int, size: int, threads: int) -> float:
    """Sum of all words of our own memory; seconds."""
    result = ctypes.c_uint64()
    return _peer("sum", whole(start, size), threads, to=ctypes.addressof(result), to_size=8)


def memcpy(start: int, size: int, threads: int, to: int, to_size: int) -> float:
    """Copy our own memory to another place in it, larger than the caches; seconds."""
    return _peer("memcpy", whole(start, size), threads, to=to, to_size=to_size)


def dd(pid: int, start: int, size: int) -> float:
    """`dd bs=1M` of /proc/PID/mem to /dev/null; seconds."""
    begin = time.perf_counter()
    subprocess.run(
        [
            "dd", f"if=/proc/{pid}/mem", "of=/dev/null", "bs=1M", f"skip={start >> 20}",
            f"count={size >> 20}", "status=none",
        ],
        check=True,
    )  # fmt: skip
    return time.perf_counter() - begin


def plain_python(pid: int, start: int, size: int) -> float:
    """The best plain loop: 1 MiB reads of /proc/PID/mem, xxhash, a Counter; seconds."""
    return _python(pid, start, size, xxhash.xxh3_64_intdigest)


def as_written(pid: int, start: int, size: int) -> float:
    """The loop as one writes it at first: a read, a slice and a count for each page; seconds."""
    begin = time.perf_counter()
    seen: Counter[int] = Counter()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        file.seek(start)
        left = size
        while left:
            part = memoryview(file.read(min(PYTHON_READ, left)))
            for i in range(0, len(part), PAGE):
                seen[xxhash.xxh3_64_intdigest(part[i : i + PAGE])] += 1
            left -= len(part)
    return time.perf_counter() - begin


def sha1(pid: int, start: int, size: int) -> float:
    """Page by page, as scripts on the net do: a read, a sha1 and a count for each; seconds."""
    return _python(pid, start, size, lambda page: hashlib.sha1(page).digest(), read=PAGE)


def _python(
    pid: int, start: int, size: int, digest: Callable[[memoryview], object], read: int = PYTHON_READ
) -> float:
    begin = time.perf_counter()
    seen: Counter[object] = Counter()
    # One buffer for all reads, one view a page: nothing is allocated but the digests.
    buffer = bytearray(read)
    pages = [memoryview(buffer)[i : i + PAGE] for i in range(0, read, PAGE)]
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for at in range(start, start + size, read):
            got = os.preadv(file.fileno(), [buffer], at)
            seen.update(map(digest, pages[: got // PAGE]))
    return time.perf_counter() - begin
