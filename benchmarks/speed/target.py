"""The memory that is scanned, and processes that hold it.

Of mixed memory 30 % are zero pages, 20 % pages of a few contents (Zipf), 50 % unique ones. Of
mergeable memory each content is there four times, far apart.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = mmap.PAGESIZE
HUGE: Final = 2 << 20
MADV_MERGEABLE: Final = 12
COPIES: Final = 4
CONTENTS: Final = 512
STEP: Final = 4096
"""Pages filled at a time."""


class Memory:
    """Anonymous memory of small or huge pages.

    Parameters
    ----------
    size : int
        Bytes, a multiple of `HUGE`.
    huge : bool
    """

    def __init__(self, size: int, *, huge: bool) -> None:
        self._map = mmap.mmap(-1, size + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        whole: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(self._map, np.uint8)
        begin = -whole.__array_interface__["data"][0] % HUGE
        self.pages = whole[begin : begin + size].reshape(-1, PAGE)
        self.start = int(self.pages.__array_interface__["data"][0])
        self.size = size

    def close(self) -> None:
        """Give it back."""
        del self.pages
        self._map.close()

    def fill_mixed(self) -> None:
        """Zero, repeated and unique pages."""
        rng = np.random.default_rng(1)
        kinds = rng.random(len(self.pages))
        pool = rng.integers(0, 256, (CONTENTS, PAGE), dtype=np.uint8)
        for i in range(0, len(self.pages), STEP):
            part, kind = self.pages[i : i + STEP], kinds[i : i + STEP]
            unique = kind >= 0.5
            part[kind < 0.3] = 0
            some = (kind >= 0.3) & ~unique
            part[some] = pool[np.minimum(rng.zipf(1.3, int(some.sum())) - 1, CONTENTS - 1)]
            part[unique] = rng.integers(0, 256, (int(unique.sum()), PAGE), dtype=np.uint8)

    def fill_unlike(self) -> None:
        """Unique pages alone."""
        rng = np.random.default_rng(1)
        for i in range(0, len(self.pages), STEP):
            part = self.pages[i : i + STEP]
            part[:] = rng.integers(0, 256, part.shape, dtype=np.uint8)

    def fill_copies(self) -> None:
        """Each content `COPIES` times."""
        self._map.madvise(MADV_MERGEABLE)
        contents = len(self.pages) // COPIES
        rng = np.random.default_rng(1)
        for i in range(0, contents, STEP):
            some = rng.integers(0, 256, (min(STEP, contents - i), PAGE), dtype=np.uint8)
            for copy in range(COPIES):
                at = copy * contents + i
                self.pages[at : at + len(some)] = some


@contextmanager
def process(size: int, pages: str, what: str = "mixed") -> Iterator[tuple[int, int]]:
    """A process with so much to scan: its pid, and where that begins.

    Parameters
    ----------
    size : int
        Bytes.
    pages : {"small", "huge"}
    what : {"mixed", "unlike", "fork", "copies"}
        Exclusive memory, mixed or of unique pages alone; mixed, shared with a child; mergeable.
    """
    with subprocess.Popen(
        [sys.executable, __file__, str(size), pages, what],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as started:  # fmt: skip
        assert started.stdout is not None
        line = started.stdout.readline()
        assert line, "the target could not start"
        yield started.pid, int(line)
        # Left, its input ends: then it ends.


def main(size: str, pages: str, what: str) -> None:
    """Hold the memory until the input ends."""
    memory = Memory(int(size), huge=pages == "huge")
    if what == "copies":
        memory.fill_copies()
    elif what == "unlike":
        memory.fill_unlike()
    else:
        memory.fill_mixed()
    if what == "fork" and os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
    print(memory.start, flush=True)
    sys.stdin.read()
    if what == "fork":
        os.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
