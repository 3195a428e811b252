"""A process with memory of known contents, told what to do over a pipe.

Started as ``python -m dedup.selftest.subject``; it imports the standard library alone, so that
its memory is its layout and little else. Commands are JSON lines on stdin, answers JSON lines on
stdout.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import sys
import time
from typing import Any, Final

PAGE: Final = mmap.PAGESIZE
UNIQUE: Final = "unique"
ZERO: Final = "zero"
MAP_HUGETLB: Final = 0x40000
MADV_MERGEABLE: Final = 12
MADV_UNMERGEABLE: Final = 13
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15


class Subject:
    """The memory and what can be done with it."""

    def __init__(self) -> None:
        self.regions: list[tuple[mmap.mmap, int, int]] = []  # map, offset of page 0, pages
        self.children: list[tuple[int, int, int]] = []  # pid, pipe to it, pipe from it
        self.source = random.Random()
        self.libc = ctypes.CDLL(None, use_errno=True)

    def content(self, what: str) -> bytes:
        """A page: unique, zero, or the same for the same word in every process."""
        if what == ZERO:
            return bytes(PAGE)
        if what == UNIQUE:
            return os.urandom(PAGE)
        return random.Random(f"dedup self-test {what}").randbytes(PAGE)

    def region(self, kind: str, pages: list[list[Any]], huge_bytes: int = 0) -> dict[str, Any]:
        """Make a region: `pages` is a list of [content, how many]."""
        count = sum(n for _, n in pages)
        flags = mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if kind == "shared" else mmap.MAP_PRIVATE)
        room = count * PAGE
        if kind == "hugetlb":
            flags |= MAP_HUGETLB
        if kind == "huge":
            room += huge_bytes
        memory = mmap.mmap(-1, room, flags)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        offset = 0
        if kind == "huge":
            offset = -base % huge_bytes
            memory.madvise(MADV_HUGEPAGE)
        elif kind != "hugetlb":
            memory.madvise(MADV_NOHUGEPAGE)
        at = offset
        for what, n in pages:
            same = None if what == UNIQUE else self.content(what)
            for _ in range(n):
                memory[at : at + PAGE] = self.content(what) if same is None else same
                at += PAGE
        if kind == "locked" and self.libc.mlock(ctypes.c_void_p(base), ctypes.c_size_t(room)):
            return {"error": f"mlock: {os.strerror(ctypes.get_errno())}"}
        self.regions.append((memory, offset, count))
        return {"start": base + offset, "pages": count}

    def advise(self, on: bool) -> dict[str, Any]:
        """Mark all regions mergeable, or not."""
        for memory, offset, count in self.regions:
            advice = MADV_MERGEABLE if on else MADV_UNMERGEABLE
            memory.madvise(advice, offset, count * PAGE)
        return {}

    def fork(self, rewrite: list[list[Any]]) -> dict[str, Any]:
        """Fork a child that shares all; it rewrites pages: [content or "same", first, how many]."""
        read_end, write_end = os.pipe()
        ready_read, ready_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(write_end)
            os.close(ready_read)
            for _, pipe, answer in self.children:
                # Else an elder sister would never see her pipe's end.
                os.close(pipe)
                os.close(answer)
            memory, offset, _ = self.regions[0]
            for what, first, count in rewrite:
                for i in range(first, first + count):
                    at = offset + i * PAGE
                    memory[at : at + PAGE] = (
                        memory[at : at + PAGE] if what == "same" else self.content(what)
                    )
            os.write(ready_write, b"r")
            os.read(read_end, 1)  # until told, or the parent's end
            for part, start, pages in self.regions:
                part.madvise(MADV_UNMERGEABLE, start, pages * PAGE)
            os.write(ready_write, b"u")
            os.read(read_end, 1)
            os._exit(0)
        os.close(read_end)
        os.close(ready_write)
        os.read(ready_read, 1)
        self.children.append((pid, write_end, ready_read))
        return {"pid": pid}

    def write(self, region: int, page: int, what: str) -> dict[str, Any]:
        """Write one page."""
        memory, offset, _ = self.regions[region]
        at = offset + page * PAGE
        memory[at : at + PAGE] = self.content(what)
        return {}

    def keep_writing(self, region: int) -> None:
        """Rewrite each page of a region all the time, until a line comes in.

        Answers with the rounds made and the longest time that a page stood still.
        """
        memory, offset, count = self.regions[region]
        view = memoryview(memory).cast("Q")
        places = [(offset + i * PAGE) // 8 for i in range(count)]
        rounds, longest = 0, 0.0
        os.set_blocking(0, False)
        last = time.monotonic()
        say({"started": True})
        line = b""
        try:
            while True:
                rounds += 1
                for p in places:
                    view[p] = rounds
                now = time.monotonic()
                longest, last = max(longest, now - last), now
                if rounds % 64 == 0:
                    try:
                        line += os.read(0, 4096)
                    except BlockingIOError:
                        continue
                    if line.endswith(b"\n") or not line:
                        break
        finally:
            os.set_blocking(0, True)
            view.release()
        say({"rounds": rounds, "longest_seconds": longest})


def say(answer: dict[str, Any]) -> None:
    """Answer on stdout."""
    os.write(1, json.dumps(answer).encode() + b"\n")


def lines() -> Any:
    """Lines of stdin, unbuffered: a forked child must not share what was read ahead."""
    buffer = b""
    while part := os.read(0, 65536):
        buffer += part
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            yield line


def main() -> None:
    """Serve until stdin ends."""
    subject = Subject()
    say({"pid": os.getpid()})
    for line in lines():
        words = json.loads(line)
        verb = words.pop("do")
        if verb == "region":
            say(subject.region(**words))
        elif verb == "advise":
            say(subject.advise(words["on"]))
        elif verb == "fork":
            say(subject.fork(words["rewrite"]))
        elif verb == "unadvise_children":
            for _, pipe, answer in subject.children:
                os.write(pipe, b"u")
                os.read(answer, 1)
            say({})
        elif verb == "write":
            say(subject.write(**words))
        elif verb == "keep_writing":
            subject.keep_writing(words["region"])
        elif verb == "end":
            for _, pipe, _ in subject.children:
                os.close(pipe)
            for pid, _, _ in subject.children:
                os.waitpid(pid, 0)
            say({})
            return


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(0)
