"""What memory in files has in common: how files are opened and read, and what a source gives.

A file may be anything, made to harm too: nothing is read but regular files, and nothing is believed
of sizes and offsets before they are held against the file's own.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from dedup.errors import BadInput, NotPermitted, OutputFailed
from dedup.kernel.memory import made_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from dedup.pages import Region, Skipped

ADDRESS_END: Final = 1 << 63
"""Addresses from here on are the kernel's."""
MAGICS: Final = (
    (b"\x28\xb5\x2f\xfd", "compressed", "unpack it first: `zstd -d FILE`"),
    (b"\x1f\x8b", "compressed", "unpack it first: `gunzip -k FILE`"),
    (b"\xfd7zXZ\0", "compressed", "unpack it first: `xz -dk FILE`"),
    (b"\x04\x22\x4d\x18", "compressed", "unpack it first: `lz4 -d FILE`"),
    (b"QFI\xfb", "a qcow2 disk image", "take the memory by `pmemsave` in QEMU's monitor"),
    (b"KDUMP   ", "a compressed kernel dump", "make an ELF core of it: `makedumpfile -E`"),
)
"""How files begin that are taken for memory, what they are, and what to do."""


@dataclass(slots=True)
class File:
    """An open regular file, read in pieces that lie inside it."""

    path: str
    fd: int
    size: int
    """Bytes, when it was opened."""
    identity: tuple[int, int]
    """Device and inode."""

    @classmethod
    def open(cls, path: str) -> File:
        """Open a file.

        Raises
        ------
        BadInput
            It is not there, no regular file, or empty.
        NotPermitted
        """
        try:
            # Before it is opened: opening a device may already do something.
            _require_regular(path, os.stat(path))
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except (OSError, ValueError) as e:
            raise failure(path, e) from e
        try:
            found = os.fstat(fd)
            _require_regular(path, found)
            if made_up(found.st_dev):
                raise BadInput(
                    f"{path} is made up by the kernel as it is read", "copy it to a file first"
                )
            if not found.st_size:
                raise BadInput(f"{path} is empty")
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, found.st_size, (found.st_dev, found.st_ino))

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)

    def read(self, offset: int, size: int, what: str) -> bytes:
        """Bytes that must be there.

        Raises
        ------
        BadInput
            They lie beyond the end.
        OutputFailed
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise BadInput(
                f"{self.path} has {what} beyond its end: {size} bytes at offset {offset}, where "
                f"it has {self.size} bytes",
                "see whether it is whole: a full disk and `ulimit -c` cut core files",
            )
        parts = []
        while size:
            try:
                part = os.pread(self.fd, size, offset)
            except OSError as e:
                raise failure(self.path, e) from e
            if not part:
                raise cut(self.path)
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(parts)

    def data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Ranges between two offsets that are no holes."""
        while start < end:
            try:
                first = os.lseek(self.fd, start, os.SEEK_DATA)
                hole = os.lseek(self.fd, first, os.SEEK_HOLE) if first < end else end
            except OSError as e:
                if e.errno == errno.ENXIO:
                    if os.fstat(self.fd).st_size < end:
                        raise cut(self.path) from e
                    return
                if e.errno == errno.EINVAL:
                    first, hole = start, end  # this file system doesn't tell
                else:
                    raise failure(self.path, e) from e
            if first >= end:
                return
            yield first, min(hole, end)
            # Another process may change the file: never stay in place.
            start = max(hole, first + 1)


def _require_regular(path: str, found: os.stat_result) -> None:
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    )
    for is_kind, words in kinds:
        if is_kind(found.st_mode):
            raise BadInput(f"{path} is {words}, not a file", "copy the memory to a file first")


def failure(path: str, e: OSError | ValueError) -> BadInput | NotPermitted | OutputFailed:
    """The typed error of a failed call."""
    if not isinstance(e, OSError):
        return BadInput(f"{path!r} is no path of a file")
    if e.errno in {errno.EACCES, errno.EPERM}:
        return NotPermitted(f"may not read {path}")
    if e.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}:
        return BadInput(f"can't open {path}: {os.strerror(e.errno)}", "see `ls -l` of it")
    many = e.errno in {errno.EMFILE, errno.ENFILE}
    return OutputFailed(
        f"reading {path} failed: {e.strerror}", "allow more: `ulimit -n 65536`" if many else None
    )


def cut(path: str) -> BadInput:
    """The error for a file that another process made shorter."""
    return BadInput(f"{path} was cut while it was read", "run it again")


def mistaken(path: str, begin: bytes) -> BadInput | None:
    """The error for a file that begins as something known that holds no plain memory."""
    for magic, what, hint in MAGICS:
        if begin.startswith(magic):
            return BadInput(f"{path} is {what}", hint)
    return None


@dataclass(frozen=True, slots=True)
class Extent:
    """Pages one after another, in memory and in a file."""

    address: int
    pages: int
    file: File | None
    """None: a hole, all zeros."""
    offset: int = 0
    """Bytes; pages need not be aligned there."""


class Memory(Protocol):
    """One address space that lies in files."""

    @property
    def pid(self) -> int:
        """0 where the files don't tell."""
        ...

    @property
    def name(self) -> str:
        """Of the program, else of the file."""
        ...

    @property
    def forks(self) -> bool:
        """Whether it may share frames with another one here, since a fork."""
        ...

    def regions(self) -> Sequence[Region]:
        """Its mappings, ascending by address; those that are scanned don't overlap."""
        ...

    def extents(self, number: int) -> Iterable[Extent]:
        """The pages of a region, by its place in `regions`, ascending by address."""
        ...


class Source(Protocol):
    """What one option names: a file or a folder, with one address space or several."""

    @property
    def kind(self) -> str:
        """The option's word."""
        ...

    @property
    def path(self) -> str:
        """As it was given."""
        ...

    @property
    def files(self) -> Sequence[File]:
        """Files with pages, open."""
        ...

    @property
    def memories(self) -> Sequence[Memory]:
        """Its address spaces."""
        ...

    @property
    def skipped(self) -> Sequence[Skipped]:
        """What it has not, or what was left out of it."""
        ...

    def close(self) -> None:
        """Close its files."""
        ...


def extents_of(
    file: File, offset: int, address: int, pages: int, page_size: int, *, holes: bool = True
) -> Iterator[Extent]:
    """Pages of a range of a file, holes apart: a page is in one if all of it is.

    With `holes` False those are left out.
    """
    end = offset + pages * page_size
    at = 0  # pages given
    for first, last in file.data(offset, end):
        begin = max(at, (first - offset) // page_size)
        stop = -(-(last - offset) // page_size)
        if stop <= begin:
            continue
        if begin > at and holes:
            yield Extent(address + at * page_size, begin - at, None)
        yield Extent(address + begin * page_size, stop - begin, file, offset + begin * page_size)
        at = stop
    if at < pages and holes:
        yield Extent(address + at * page_size, pages - at, None)
