"""A folder of CRIU's images: the memory of checkpointed processes, by page.

Sources: CRIU's images/*.proto (pagemap, mm, vma, core), criu/include/magic.h and image.h (image
versions 3 and 4 differ in the number of pages: field 2 of 32 bits, then field 5 of 64), and
https://criu.org/Images for the frame around the entries: magics, then (length, entry).
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from dedup.errors import BadInput
from dedup.pages import NOT_DUMPED, Region, Skipped
from dedup.sources.files import ADDRESS_END, Extent, File, extents_of, failure

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMON: Final = 0x54564319
PAGEMAP, MM, CORE = 0x56084025, 0x57492820, 0x55053847
"""Magics: of every image of a process, and of each kind."""
IMAGE_MOST_BYTES: Final = 1 << 28
"""Of an image other than pages: far more than any has."""
PARENTS_MOST: Final = 256
"""One after the other: as many as the interpreter's stack has room for."""

IN_PARENT, LAZY, PRESENT = 1, 2, 4
"""PE_PARENT, PE_LAZY, PE_PRESENT."""
FILE_PRIVATE, FILE_SHARED, ANON_SHARED, ANON_PRIVATE = 1 << 6, 1 << 7, 1 << 8, 1 << 9
STACK, VSYSCALL, VDSO, HEAP, VVAR = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 12
"""VMA_AREA_* of a mapping's status."""
NAMES: Final = {
    STACK: "[stack]",
    VSYSCALL: "[vsyscall]",
    VDSO: "[vdso]",
    HEAP: "[heap]",
    VVAR: "[vvar]",
    FILE_PRIVATE: "[file]",
    FILE_SHARED: "[shared file]",
    ANON_SHARED: "[shared memory]",
}
MADV_MERGEABLE: Final = 12
WHY: Final = {
    "[vsyscall]": "the vsyscall page: no mapping of the process's own",
    "[vdso]": "special mapping of the kernel or a driver (VM_DONTEXPAND)",
    "[vvar]": "special mapping of the kernel or a driver (VM_DONTEXPAND)",
    "[shared file]": "shared between processes (VM_SHARED): its pages are no private copies",
    "[shared memory]": "shared between processes (VM_SHARED): its pages are no private copies",
}

Fields = dict[int, list[int | bytes]]


def fields_of(raw: bytes) -> Fields:
    """Fields of a protobuf message by number: integers, and bytes of what has a length.

    Raises
    ------
    ValueError
        It is damaged.
    """
    found: Fields = {}
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        number, kind = key >> 3, key & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(raw, at)
        elif kind == 2:
            size, at = _varint(raw, at)
            value, at = raw[at : at + size], at + size
        elif kind in {1, 5}:
            size = 8 if kind == 1 else 4
            value, at = int.from_bytes(raw[at : at + size], "little"), at + size
        else:
            raise ValueError(f"wire type {kind}")
        if at > len(raw):
            raise ValueError("a field ends beyond its message")
        found.setdefault(number, []).append(value)
    return found


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            break
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & ((1 << 64) - 1), at
    raise ValueError("a number does not end")


def number(message: Fields, which: int, default: int = 0) -> int:
    """The last integer of a field.

    Raises
    ------
    ValueError
        It is none.
    """
    value = message.get(which, [default])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {which} is no number")
    return value


def _messages(message: Fields, which: int) -> list[Fields]:
    values = message.get(which, [])
    if not all(isinstance(v, bytes) for v in values):
        raise ValueError(f"field {which} is no message")
    return [fields_of(v) for v in values if isinstance(v, bytes)]


def entries(path: str, magic: int) -> list[Fields]:
    """Entries of an image.

    Raises
    ------
    BadInput
    NotPermitted
    """
    file = File.open(path)
    try:
        if file.size > IMAGE_MOST_BYTES:
            raise BadInput(f"{path} has {file.size} bytes, which no image of its kind has")
        raw = file.read(0, file.size, "its entries")
    finally:
        file.close()
    if len(raw) < 8 or struct.unpack_from("<2I", raw) != (COMMON, magic):
        raise BadInput(f"{path} is no image of CRIU's of its kind: it begins with other magics")
    found = []
    at = 8
    try:
        while at < len(raw):
            size = int.from_bytes(raw[at : at + 4], "little")
            if at + 4 + size > len(raw):
                raise ValueError("an entry ends beyond the file")
            found.append(fields_of(raw[at + 4 : at + 4 + size]))
            at += 4 + size
    except ValueError as e:
        raise BadInput(f"{path} is damaged: {e}") from e
    return found


@dataclass(frozen=True, slots=True)
class Piece:
    """Pages one after another: where they lie."""

    start: int
    end: int
    file: File | None
    """None: in no image here (lazy pages)."""
    offset: int


@dataclass(frozen=True, slots=True)
class _Vma:
    start: int
    end: int
    perms: str
    name: str
    why: str
    advised: bool | None
    """None where it is not known."""


@dataclass(slots=True)
class Task:
    """One process of a dump."""

    pid: int
    name: str
    page_size: int
    vmas: list[_Vma]
    pieces: list[Piece]
    """Ascending by address."""
    forks: bool = True

    def regions(self) -> list[Region]:
        """Its mappings."""
        found = []
        for v in self.vmas:
            pages = sum(e.pages for e in self._extents(v, holes=False))
            size = pages * self.page_size
            found.append(
                Region(
                    process=0,
                    start=v.start,
                    end=v.end,
                    perms=v.perms,
                    name=v.name,
                    vm_flags=frozenset({"mg"} if v.advised else ()),
                    eligible=not v.why,
                    why=v.why,
                    advised=bool(v.advised),
                    advised_known=v.advised is not None,
                    scanned=not v.why,
                    anonymous_bytes=0 if v.why else size,
                    resident_bytes=size if v.why else None,
                )
            )
        return found

    def extents(self, number: int) -> Iterator[Extent]:
        """The pages of a mapping."""
        yield from self._extents(self.vmas[number], holes=True)

    def _extents(self, v: _Vma, *, holes: bool) -> Iterator[Extent]:
        for piece in _from(self.pieces, v.start):
            if piece.start >= v.end:
                return
            start, end = max(piece.start, v.start), min(piece.end, v.end)
            if start >= end or piece.file is None:
                continue
            offset, pages = piece.offset + start - piece.start, (end - start) // self.page_size
            if holes:
                yield from extents_of(piece.file, offset, start, pages, self.page_size)
            else:
                yield Extent(start, pages, piece.file, offset)


@dataclass(slots=True)
class Dump:
    """A folder of images."""

    path: str
    page_size: int
    kind: str = "criu"
    files: list[File] = field(default_factory=list)
    memories: list[Task] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    _known: dict[tuple[str, int], tuple[int, File]] = field(default_factory=dict)
    """Process and file by folder and number of the pages."""

    def close(self) -> None:
        """Close the files of pages."""
        for file in self.files:
            file.close()

    def read(self) -> None:
        """Read the images of all processes."""
        folder = _folder(self.path)
        for pid in _pids(folder):
            pieces = self._pieces([folder], pid)
            lazy = sum(p.end - p.start for p in pieces if p.file is None) // self.page_size
            if lazy:
                words = f"{self.path}: {lazy} pages of process {pid} are in no image (lazy pages)"
                self.skipped.append(Skipped(pid, words, NOT_DUMPED, lazy))
            core, mm = (os.path.join(folder, f"{kind}-{pid}.img") for kind in ("core", "mm"))
            name = _command(core) if os.path.lexists(core) else ""
            vmas = _vmas(mm, self.page_size) if os.path.lexists(mm) else _unnamed(pieces)
            task = Task(pid, name or os.path.basename(folder), self.page_size, vmas, pieces)
            there = sum(p.end - p.start for p in pieces if p.file is not None)
            if there != sum(r.anonymous_bytes + (r.resident_bytes or 0) for r in task.regions()):
                raise BadInput(f"{mm} is damaged: process {pid} has pages outside its mappings")
            self.memories.append(task)

    def _pieces(self, folders: list[str], pid: int) -> list[Piece]:
        """Where the pages of a process lie, those in parents' images included."""
        folder = folders[-1]
        path = os.path.join(folder, f"pagemap-{pid}.img")
        found = entries(path, PAGEMAP)
        if not found:
            raise BadInput(f"{path} has no entries")
        pieces: list[Piece] = []
        parent: list[Piece] | None = None
        try:
            head, rest = found[0], found[1:]
            if 1 not in head:
                raise ValueError("it names no file of pages")
            pages_id, offset, last = number(head, 1), 0, 0
            for entry in rest:
                start, pages, flags = _entry(entry)
                end = start + pages * self.page_size
                if start % self.page_size or not pages or end > ADDRESS_END:
                    raise ValueError(f"{pages} pages at {start:#x} can't be")
                if start < last:
                    raise ValueError(f"its pages at {start:#x} overlap those before")
                last = end
                if flags & IN_PARENT:
                    if parent is None:
                        parent = self._pieces([*folders, _parent(folders)], pid)
                    pieces += _cut(parent, start, end, path)
                elif flags & PRESENT:
                    file = self._pages(folder, pages_id, pid)
                    if offset + end - start > file.size:
                        raise ValueError(
                            f"it has pages beyond the end of {file.path} ({file.size} bytes)"
                        )
                    pieces.append(Piece(start, end, file, offset))
                    offset += end - start
                else:
                    pieces.append(Piece(start, end, None, 0))
        except ValueError as e:
            raise BadInput(f"{path} is damaged: {e}") from e
        return pieces

    def _pages(self, folder: str, pages_id: int, pid: int) -> File:
        key = (folder, pages_id)
        if key not in self._known:
            file = File.open(os.path.join(folder, f"pages-{pages_id}.img"))
            self.files.append(file)
            self._known[key] = pid, file
        owner, file = self._known[key]
        if owner != pid:
            raise ValueError(f"its pages are those of process {owner}: {file.path}")
        return file


def read(path: str, page_size: int = mmap.PAGESIZE) -> Dump:
    """Open a folder of images.

    Raises
    ------
    BadInput
        No folder, no images of processes in it, images that are damaged, files of pages that are
        missing or too short, parents in a circle.
    NotPermitted
    """
    dump = Dump(path, page_size)
    try:
        dump.read()
    except BaseException:
        dump.close()
        raise
    return dump


def _folder(path: str) -> str:
    """The real path, by which circles of parents are told."""
    if not os.path.isdir(path):
        try:
            os.stat(path)
        except (OSError, ValueError) as e:
            raise failure(path, e) from e
        raise BadInput(f"{path} is no directory", "name the one that `criu dump -D DIR` wrote to")
    return os.path.realpath(path)


def _pids(folder: str) -> list[int]:
    try:
        names = os.listdir(folder)
    except OSError as e:
        raise failure(folder, e) from e
    found = sorted(int(m[1]) for n in names if (m := re.fullmatch(r"pagemap-(\d{1,10})\.img", n)))
    if not found:
        raise BadInput(
            f"{folder} has no images of processes (pagemap-PID.img)",
            "name the directory that `criu dump -D DIR` wrote to",
        )
    return found


def _parent(folders: list[str]) -> str:
    folder = folders[-1]
    link = os.path.join(folder, "parent")
    if not os.path.lexists(link):
        raise BadInput(
            f"{folder} has pages in a parent's images, but no link `parent` to them",
            "keep the directories of all dumps side by side",
        )
    parent = _folder(link)
    if parent in folders:
        raise BadInput(f"the parents of {folders[0]} go in a circle, by way of {parent}")
    if len(folders) > PARENTS_MOST:
        raise BadInput(f"{folders[0]} has more than {PARENTS_MOST} parents")
    return parent


def _entry(entry: Fields) -> tuple[int, int, int]:
    """Address, pages and flags."""
    if 1 not in entry:
        raise ValueError("an entry has no address")
    pages = number(entry, 5) or number(entry, 2)
    # Before there were flags, all was present that did not say otherwise.
    flags = number(entry, 4) if 4 in entry else IN_PARENT if number(entry, 3) else PRESENT
    return number(entry, 1), pages, flags


def _from(pieces: list[Piece], start: int) -> Iterator[Piece]:
    """Pieces from the one on that an address may lie in."""
    first = max(0, bisect_right(pieces, start, key=lambda p: p.start) - 1)
    return map(pieces.__getitem__, range(first, len(pieces)))


def _cut(pieces: list[Piece], start: int, end: int, path: str) -> Iterator[Piece]:
    """The parts of pieces in a range, which they must fill."""
    at = start
    for p in _from(pieces, start):
        if p.end <= at:
            continue
        if p.start > at or at >= end:
            break
        stop = min(p.end, end)
        yield Piece(at, stop, p.file, p.offset + at - p.start)
        at = stop
    if at < end:
        raise BadInput(f"{path} has pages at {at:#x} in its parent, which has none there")


def _command(path: str) -> str:
    """The name of a process (core_entry.tc.comm)."""
    found = entries(path, CORE)
    try:
        for task in (t for e in found for t in _messages(e, 3)):
            for name in task.get(6, []):
                if isinstance(name, bytes):
                    return os.fsdecode(name)
    except ValueError as e:
        raise BadInput(f"{path} is damaged: {e}") from e
    return ""


def _vmas(path: str, page_size: int) -> list[_Vma]:
    """Mappings (mm_entry.vmas), ascending."""
    found = entries(path, MM)
    vmas = []
    try:
        for v in (v for e in found for v in _messages(e, 14)):
            start, end = number(v, 1), number(v, 2)
            if start >= end or start % page_size or end % page_size:
                raise ValueError(f"a mapping from {start:#x} to {end:#x} can't be")
            vmas.append(_vma(start, end, number(v, 5), number(v, 7), number(v, 9)))
    except ValueError as e:
        raise BadInput(f"{path} is damaged: {e}") from e
    vmas.sort(key=lambda v: v.start)
    for a, b in pairwise(vmas):
        if b.start < a.end:
            raise BadInput(f"{path} is damaged: mappings overlap at {b.start:#x}")
    return vmas


def _vma(start: int, end: int, protection: int, status: int, advice: int) -> _Vma:
    name = next((name for bit, name in NAMES.items() if status & bit), "")
    shared = bool(status & (FILE_SHARED | ANON_SHARED)) and not status & (
        FILE_PRIVATE | ANON_PRIVATE
    )
    letters = "".join(c if protection & bit else "-" for c, bit in (("r", 1), ("w", 2), ("x", 4)))
    why = WHY.get(name, "")
    return _Vma(
        start, end, letters + ("s" if shared else "p"), name, why,
        bool(advice >> MADV_MERGEABLE & 1),
    )  # fmt: skip


def _unnamed(pieces: list[Piece]) -> list[_Vma]:
    """Mappings by the pages alone, where their image is not there."""
    found: list[_Vma] = []
    for p in pieces:
        if found and found[-1].end == p.start:
            found[-1] = _Vma(found[-1].start, p.end, "rw-p", "", "", advised=None)
        else:
            found.append(_Vma(p.start, p.end, "rw-p", "", "", advised=None))
    return found
