"""A process with memory as a test wants it; commands are JSON lines on stdin, answers on stdout.

It imports the standard library alone and touches only the memory that it is told to. A command
with ``"child": [i, j]`` goes to child j of child i.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import random
import sys
import tempfile
import time
from typing import Any

PAGE = mmap.PAGESIZE
PRIVATE_ANONYMOUS = 0x22
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
for _name in ("munmap", "mlock"):
    getattr(LIBC, _name).argtypes = [ctypes.c_void_p, ctypes.c_size_t]
for _name in ("madvise", "mprotect"):
    getattr(LIBC, _name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PROTECTION = {"rw": 3, "r": 1, "none": 0}
# x86-64 and arm64; those of io_uring are the same everywhere.
SYSTEM_CALLS = {"vmsplice": (278, 75), "userfaultfd": (323, 282)}
IO_URING_SETUP, IO_URING_REGISTER = 425, 427
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
ADVICE = {
    "dontneed": 4,
    "free": 8,
    "mergeable": 12,
    "unmergeable": 13,
    "hugepage": 14,
    "nohugepage": 15,
    "pageout": 21,
}


class Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def check(result: int | None, what: str) -> int:
    """Raise OSError for a failed call."""
    if result is None or result in {-1, 2**64 - 1}:
        e = ctypes.get_errno()
        raise OSError(e, f"{what}: {os.strerror(e)}")
    return result


def content(what: str) -> bytes:
    """A page: zero, unique, or the same for the same word in every process."""
    if what == "zero":
        return bytes(PAGE)
    if what == "unique":
        return os.urandom(PAGE)
    return random.Random(what).randbytes(PAGE)


class Target:
    """The mappings, by name, and the children."""

    def __init__(self) -> None:
        self.start: dict[str, int] = {}
        self.size: dict[str, int] = {}
        self.children: list[tuple[int, int, int]] = []  # pid, pipe to it, pipe from it

    def map(
        self,
        name: str,
        pages: int,
        flags: int = PRIVATE_ANONYMOUS,
        align: int = 0,
        file: str = "",
        path: str = "",
    ) -> int:
        """Map private anonymous memory, or with `file` a file ("memfd" for one in memory).

        With `path` it is that one, as it is.
        """
        fd = -1
        if path:
            fd = os.open(path, os.O_RDWR)
        elif file == "memfd":
            fd = os.memfd_create("target")
        elif file:
            fd, name_of_it = tempfile.mkstemp(prefix="target-")
            os.unlink(name_of_it)
        if fd >= 0 and not path:
            os.write(fd, random.Random(file).randbytes(pages * PAGE))
        if fd >= 0:
            flags &= ~0x20
        room = pages * PAGE + align
        at = check(LIBC.mmap(None, room, 3, flags, fd, 0), "mmap")
        if align:
            # Cut to the alignment, so that the mapping is exactly the pages asked for.
            begin = -(-at // align) * align
            if begin > at:
                LIBC.munmap(at, begin - at)
            if at + room > begin + pages * PAGE:
                LIBC.munmap(begin + pages * PAGE, at + room - begin - pages * PAGE)
            at = begin
        if fd >= 0:
            os.close(fd)
        self.start[name], self.size[name] = at, pages * PAGE
        return at

    def put(self, name: str, at: int, what: list[str]) -> None:
        """Write pages from page `at` on."""
        for i, w in enumerate(what):
            ctypes.memmove(self.start[name] + (at + i) * PAGE, content(w), PAGE)

    def fill(self, name: str, at: int, count: int, what: str) -> None:
        """Write one content to many pages, or unique ones."""
        data = content(what)
        for i in range(at, at + count):
            page = os.urandom(PAGE) if what == "unique" else data
            ctypes.memmove(self.start[name] + i * PAGE, page, PAGE)

    def touch(self, name: str, at: int, count: int) -> None:
        """Read a byte of each page."""
        for i in range(at, at + count):
            ctypes.string_at(self.start[name] + i * PAGE, 1)

    def advise(self, name: str, what: str, at: int = 0, count: int = 0) -> None:
        """madvise a mapping, or `count` pages of it."""
        size = count * PAGE if count else self.size[name] - at * PAGE
        check(LIBC.madvise(self.start[name] + at * PAGE, size, ADVICE[what]), "madvise")

    def digest(self, name: str) -> str:
        """Checksum of a mapping."""
        return hashlib.sha256(ctypes.string_at(self.start[name], self.size[name])).hexdigest()

    def protect(self, name: str, how: str) -> None:
        """mprotect a mapping."""
        check(LIBC.mprotect(self.start[name], self.size[name], PROTECTION[how]), "mprotect")

    def lock(self, name: str, at: int, count: int) -> None:
        """mlock pages."""
        check(LIBC.mlock(self.start[name] + at * PAGE, count * PAGE), "mlock")

    def _pieces(self, name: str, pages: list[int]) -> Any:
        pieces = [Vector(self.start[name] + p * PAGE, PAGE) for p in pages]
        return (Vector * len(pieces))(*pieces)

    def register_buffers(self, name: str, pages: list[int]) -> int:
        """Pin pages as buffers of an io_uring; gives its descriptor, `close` unpins them."""
        parameters = ctypes.create_string_buffer(120)
        ring = check(LIBC.syscall(IO_URING_SETUP, 1, parameters), "io_uring_setup")
        pieces = self._pieces(name, pages)
        check(LIBC.syscall(IO_URING_REGISTER, ring, 0, pieces, len(pieces)), "io_uring_register")
        return ring

    def splice(self, name: str, pages: list[int]) -> int:
        """Pin pages by vmsplice to a pipe; gives its end to read."""
        read_end, write_end = os.pipe()
        number = SYSTEM_CALLS["vmsplice"][os.uname().machine != "x86_64"]
        pieces = self._pieces(name, pages)
        done = check(LIBC.syscall(number, write_end, pieces, len(pieces), 0), "vmsplice")
        if done != len(pages) * PAGE:
            raise OSError(0, f"vmsplice took {done} bytes")
        return read_end

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def watch_faults(self, name: str, mode: int) -> None:
        """Register a mapping with userfaultfd: mode 1 for missing pages, 2 for write protection."""
        number = SYSTEM_CALLS["userfaultfd"][os.uname().machine != "x86_64"]
        fd = check(LIBC.syscall(number, 1), "userfaultfd")  # UFFD_USER_MODE_ONLY
        api = (ctypes.c_uint64 * 3)(0xAA, 0, 0)
        check(LIBC.ioctl(fd, ctypes.c_ulong(UFFDIO_API), api), "UFFDIO_API")
        area = (ctypes.c_uint64 * 4)(self.start[name], self.size[name], mode, 0)
        check(LIBC.ioctl(fd, ctypes.c_ulong(UFFDIO_REGISTER), area), "UFFDIO_REGISTER")

    def move(self, name: str) -> int:
        """mremap a mapping to another place; gives the address."""
        LIBC.mremap.restype = ctypes.c_void_p
        LIBC.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int,
                                ctypes.c_void_p]  # fmt: skip
        place = check(LIBC.mmap(None, self.size[name], 0, PRIVATE_ANONYMOUS, -1, 0), "mmap")
        self.start[name] = check(
            LIBC.mremap(self.start[name], self.size[name], self.size[name], 3, place), "mremap"
        )
        return self.start[name]

    def unmap(self, name: str) -> None:
        """munmap a mapping."""
        check(LIBC.munmap(self.start.pop(name), self.size.pop(name)), "munmap")

    def fork(self) -> int:
        """Fork a child that answers to commands too."""
        down, up = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(down[0], 0)
            os.dup2(up[1], 1)
            for fd in {*down, *up} | {f for c in self.children for f in c[1:]}:
                os.close(fd)
            self.children = []
            serve(self)
            os._exit(0)
        os.close(down[0])
        os.close(up[1])
        self.children.append((pid, down[1], up[0]))
        return pid

    def kill_child(self, index: int) -> None:
        """End a child; what it shared is the parent's alone then."""
        pid, to, back = self.children[index]
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(to)
        os.close(back)

    def keep_writing(self, name: str, pages: list[int], *, same: bool = False) -> int:
        """Rewrite pages until a line comes in, with the bytes they have or others; the rounds."""
        places = [ctypes.c_uint64.from_address(self.start[name] + p * PAGE) for p in pages]
        rounds = 0
        for _ in until_a_line():
            rounds += 1
            for p in places:
                p.value = p.value if same else rounds
        return rounds

    def keep_forking(self, name: str, pages: int, live_seconds: float) -> int:
        """Fork children that write some pages and live a little, until a line comes in."""
        total = self.size[name] // PAGE
        chooser = random.Random(1)
        forks = 0
        alive: list[int] = []
        for _ in until_a_line():
            chosen = chooser.sample(range(total), pages)
            pid = os.fork()
            if pid == 0:
                for p in chosen:
                    ctypes.c_uint64.from_address(self.start[name] + p * PAGE + 8).value = forks
                time.sleep(live_seconds)
                os._exit(0)
            forks += 1
            alive.append(pid)
            if len(alive) > 2:
                os.waitpid(alive.pop(0), 0)
        for pid in alive:
            os.waitpid(pid, 0)
        return forks


def until_a_line() -> Any:
    """Say "started", then go round until stdin has something."""
    os.set_blocking(0, False)
    say({"ok": "started"})
    try:
        while True:
            yield
            try:
                os.read(0, 4096)
            except BlockingIOError:
                continue
            return
    finally:
        os.set_blocking(0, True)


def say(answer: Any) -> None:
    """Answer on stdout."""
    os.write(1, json.dumps(answer).encode() + b"\n")


def serve(target: Target) -> None:
    """Do as told until stdin ends."""
    buffer = b""
    while part := os.read(0, 1 << 20):
        buffer += part
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            words = json.loads(line)
            way = words.pop("child", [])
            if way:
                _, to, back = target.children[way[0]]
                os.write(to, json.dumps({**words, "child": way[1:]}).encode() + b"\n")
                answer = b""
                while not answer.endswith(b"\n"):
                    answer += os.read(back, 1 << 16) or b'{"error": "the child is gone"}\n'
                os.write(1, answer)
                continue
            try:
                say({"ok": getattr(target, words.pop("do"))(**words)})
            except OSError as e:
                say({"error": str(e), "errno": e.errno})


if __name__ == "__main__":
    say({"ok": "ready"})
    serve(Target())
    sys.exit(0)
