"""ELF cores: the kernel's own, gdb's `gcore`, QEMU's `dump-guest-memory`.

Sources: the ELF specification (program headers, notes; PN_XNUM for 65,535 headers and more),
fs/binfmt_elf.c (which notes a core has, what is left out), include/uapi/linux/elfcore.h and
elf.h, man 5 core (coredump_filter), QEMU's dump/dump.c (physical addresses, note "QEMU").
"""

from __future__ import annotations

import importlib
import io
import mmap
import os
import struct
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from dedup.errors import BadInput, Unsupported
from dedup.pages import NOT_DUMPED, Region, Skipped
from dedup.sources.files import ADDRESS_END, Extent, File, extents_of, mistaken

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from numpy.typing import NDArray

ELF_MAGIC: Final = b"\x7fELF"
IDENT_BYTES: Final = 16
CLASSES: Final = {1: 32, 2: 64}
ORDERS: Final[dict[int, Literal["<", ">"]]] = {1: "<", 2: ">"}
"""e_ident[EI_CLASS] and e_ident[EI_DATA]."""
PN_XNUM: Final = 0xFFFF
PT_LOAD, PT_NOTE = 1, 4
PF_W: Final = 2
SECTION_INFO: Final = {32: 28, 64: 44}
"""Offset of sh_info in a section header."""
SEGMENTS_MOST: Final = 1 << 22
NOTES_MOST_BYTES: Final = 1 << 28

NT_PRSTATUS, NT_PRPSINFO, NT_AUXV, NT_FILE = 1, 3, 6, 0x46494C45
PRSTATUS_PID: Final = {32: 24, 64: 32}
"""Offset of pr_pid in struct elf_prstatus."""
PRPSINFO: Final = {136: (24, 40), 124: (12, 28), 128: (16, 32)}
"""Offsets of pr_pid and pr_fname by the size of struct elf_prpsinfo: 64 bits; 32 bits with
user numbers of 16 bits, and of 32."""
NAME_BYTES: Final = 16
AT_PAGESZ, AT_SYSINFO_EHDR = 6, 33

VSYSCALL: Final = 0xFFFFFFFFFF600000
VVAR_MOST_PAGES: Final = 64
SHARED_NAMES: Final = ("/memfd:", "/dev/zero (deleted)", "/SYSV", "/dev/shm/", "/dev/zero")
"""How files are called whose mappings are shared memory, nearly always."""
WHY_SHARED: Final = "shared memory by its name: its pages are no private copies"
WHY_FILE: Final = (
    "mapping of a file, not writable: in a core, unchanged pages of the file can't be told from "
    "private copies"
)
WHY_SPECIAL: Final = "special mapping of the kernel or a driver (VM_DONTEXPAND)"
WHY_KERNEL: Final = "an address of the kernel: no mapping of the process's own"


def _elftools(name: str) -> ModuleType:
    """A module of pyelftools.

    Raises
    ------
    Unsupported
        It is not installed.
    """
    try:
        return importlib.import_module(f"elftools.{name}")
    except ModuleNotFoundError as e:
        raise Unsupported(
            "reading ELF cores needs pyelftools, which is not installed",
            "`pip install 'dedup-ksm[files]'`",
        ) from e


@dataclass(frozen=True, slots=True)
class Segment:
    """A PT_LOAD: addresses of memory, and as much of it as the file has."""

    start: int
    memory_bytes: int
    offset: int
    file_bytes: int
    flags: int


@dataclass(slots=True)
class _Facts:
    """What the notes say."""

    pid: int = 0
    name: str = ""
    vdso: int = -1
    page_size: int = 0
    guest: bool = False
    """Of QEMU: the memory of a guest, not of a process."""
    files: list[tuple[int, int, str]] = field(default_factory=list)
    """Start, end and path of file mappings, ascending."""


@dataclass
class Core:
    """One core file."""

    file: File
    page_size: int
    bits: int
    segments: list[Segment]
    facts: _Facts
    kind: str = "core"

    @property
    def path(self) -> str:
        """As it was given."""
        return self.file.path

    @property
    def pid(self) -> int:
        """The process's, as the notes have it; 0 for a guest."""
        return self.facts.pid

    @property
    def name(self) -> str:
        """The program's, else the file's."""
        return self.facts.name or os.path.basename(self.path)

    @property
    def forks(self) -> bool:
        """Processes do; guests have frames of their own."""
        return not self.facts.guest

    @property
    def files(self) -> list[File]:
        """The one."""
        return [self.file]

    @property
    def memories(self) -> list[Core]:
        """Itself: it is one address space."""
        return [self]

    @property
    def skipped(self) -> list[Skipped]:
        """What its maker left out."""
        empty = sum(not s.file_bytes for s in self.segments)
        partial = sum(0 < s.file_bytes < s.memory_bytes for s in self.segments)
        if not empty and not partial:
            return []
        missing = sum(s.memory_bytes - s.file_bytes for s in self.segments)
        words = (
            f"{self.path}: of {len(self.segments)} segments {empty} are empty and {partial} there "
            "in part (untouched memory, pages of files, what coredump_filter and MADV_DONTDUMP "
            "leave out)"
        )
        return [Skipped(self.pid or None, words, NOT_DUMPED, missing // self.page_size)]

    def regions(self) -> list[Region]:
        """A region for each segment."""
        return [self._region(s) for s in self.segments]

    def _region(self, s: Segment) -> Region:
        first, pages, _ = self._pages(s)
        size = pages * self.page_size
        name, why = self._what(s)
        kept = not why
        letters = "".join(c if s.flags & bit else "-" for c, bit in (("r", 4), ("w", 2), ("x", 1)))
        return Region(
            process=0,
            start=first if size else s.start,
            end=first + size if size else s.start + s.memory_bytes,
            # QEMU gives the memory of its guests no flags.
            perms="rw-p" if self.facts.guest else letters + ("s" if why == WHY_SHARED else "p"),
            name=name,
            vm_flags=frozenset(),
            eligible=kept,
            why=why,
            advised=False,
            advised_known=False,
            scanned=kept,
            anonymous_bytes=size if kept else 0,
            resident_bytes=None if kept else size,
        )

    def _what(self, s: Segment) -> tuple[str, str]:
        """Name of a segment's mapping, and why KSM would refuse it."""
        if s.start >= ADDRESS_END or s.start + s.memory_bytes > ADDRESS_END:
            return ("[vsyscall]" if s.start == VSYSCALL else ""), WHY_KERNEL
        if self.facts.guest:
            return "guest memory", ""
        if s.start in self._kernels_own:
            return self._kernels_own[s.start], WHY_SPECIAL
        at = bisect_right(self.facts.files, (s.start, ADDRESS_END * 2, "")) - 1
        if at < 0 or s.start >= self.facts.files[at][1]:
            return "", ""
        path = self.facts.files[at][2]
        if path.startswith(SHARED_NAMES):
            return path, WHY_SHARED
        return path, "" if s.flags & PF_W else WHY_FILE

    @cached_property
    def _kernels_own(self) -> dict[int, str]:
        """Segments of the vdso and of what the kernel keeps right below it for it."""
        found: dict[int, str] = {}
        below = -1
        for s in reversed(self.segments):
            if s.start <= self.facts.vdso < s.start + s.memory_bytes:
                found[s.start] = "[vdso]"
            elif (
                s.start + s.memory_bytes == below
                and not s.flags & PF_W
                and s.memory_bytes <= VVAR_MOST_PAGES * self.page_size
            ):
                found[s.start] = "[vvar]"
            else:
                continue
            below = s.start
        return found

    def _pages(self, s: Segment) -> tuple[int, int, int]:
        """Address of the first whole page that the file has, how many, and where in the file."""
        first = -(-s.start // self.page_size) * self.page_size
        skip = first - s.start
        return first, max(0, s.file_bytes - skip) // self.page_size, s.offset + skip

    def extents(self, number: int) -> Iterator[Extent]:
        """The pages of a region."""
        s = self.segments[number]
        first, pages, offset = self._pages(s)
        # What a process could not even read is room that it reserved: the holes are no pages.
        holes = bool(s.flags) or self.facts.guest
        yield from extents_of(self.file, offset, first, pages, self.page_size, holes=holes)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read(path: str, page_size: int = mmap.PAGESIZE) -> Core:
    """Open a core file.

    Raises
    ------
    BadInput
        No regular file, no ELF core, damaged or cut, or of a machine with other pages.
    NotPermitted
    Unsupported
        pyelftools is not installed.
    """
    structs, utils = _elftools("elf.structs"), _elftools("common.utils")
    file = File.open(path)
    try:
        return _Reader(file, page_size, structs, utils).read()
    except BaseException:
        file.close()
        raise


class _Reader:
    def __init__(self, file: File, page_size: int, structs: Any, utils: Any) -> None:
        self.file, self.page_size = file, page_size
        self.structs, self.utils = structs, utils
        self.bits = 64
        self.order: Literal["<", ">"] = "<"

    def bad(self, what: str, hint: str = "") -> BadInput:
        return BadInput(f"{self.file.path} {what}", hint)

    def read(self) -> Core:
        header = self._header()
        table = self._program_headers(header)
        facts = self._facts(table[table["type"] == PT_NOTE])
        if facts.page_size not in {0, self.page_size}:
            raise self.bad(
                f"is of a machine with pages of {facts.page_size} bytes; here they have "
                f"{self.page_size}",
                "analyse it on a machine of its kind",
            )
        segments = self._segments(table[table["type"] == PT_LOAD], facts)
        return Core(self.file, self.page_size, self.bits, segments, facts)

    def _header(self) -> Any:
        ident = self.file.read(0, min(self.file.size, IDENT_BYTES), "its beginning")
        if not ident.startswith(ELF_MAGIC):
            raise mistaken(self.file.path, ident) or self.bad(
                "is not an ELF file", "raw memory goes with `--image`"
            )
        if len(ident) < IDENT_BYTES or ident[4] not in CLASSES or ident[5] not in ORDERS:
            raise self.bad("is an ELF file of no known class or byte order")
        self.bits, self.order = CLASSES[ident[4]], ORDERS[ident[5]]
        structs = self.structs.ELFStructs(little_endian=self.order == "<", elfclass=self.bits)
        structs.create_basic_structs()
        size = structs.Elf_Ehdr.sizeof()
        begin = io.BytesIO(self.file.read(0, size, "its ELF header"))
        header = self.utils.struct_parse(structs.Elf_Ehdr, begin)
        if header["e_type"] != "ET_CORE":
            kind = str(header["e_type"]).removeprefix("ET_").lower()
            raise self.bad(
                f"is an ELF file, but no core (its type is {kind})",
                "make one of a process with `gcore PID`",
            )
        return header

    def _program_headers(self, header: Any) -> NDArray[np.void]:
        kind = self._header_type()
        if header["e_phentsize"] != kind.itemsize:
            raise self.bad(f"has program headers of {header['e_phentsize']} bytes, which none are")
        count = int(header["e_phnum"])
        if count == PN_XNUM:
            at = int(header["e_shoff"]) + SECTION_INFO[self.bits]
            word = self.file.read(at, 4, "the number of its program headers")
            count = int(struct.unpack(f"{self.order}I", word)[0])
        if not count or count > SEGMENTS_MOST:
            raise self.bad(f"has {count} program headers, where 1 to {SEGMENTS_MOST} can be")
        raw = self.file.read(
            int(header["e_phoff"]), count * kind.itemsize, f"its {count} program headers"
        )
        return np.frombuffer(raw, kind)

    def _header_type(self) -> np.dtype[np.void]:
        word, long = f"{self.order}u4", f"{self.order}u{self.bits // 8}"
        fields = [("type", word)]
        rest = [(n, long) for n in ("offset", "address", "physical", "in_file", "in_memory")]
        flags = ("flags", word)
        fields += [flags, *rest] if self.bits == 64 else [*rest, flags]
        return np.dtype([*fields, ("align", long)])

    def _segments(self, loads: NDArray[np.void], facts: _Facts) -> list[Segment]:
        """The memory of the file: nothing beyond its end, nothing twice."""
        if not len(loads):
            raise self.bad("has no memory: no program header of type LOAD")
        # QEMU gives guest memory without paging its physical addresses alone.
        address = "address"
        if facts.guest and not loads["address"].any():
            address = "physical"
        columns = (address, "in_memory", "offset", "in_file", "flags")
        rows = zip(*(loads[c].tolist() for c in columns), strict=True)
        segments = sorted((Segment(*row) for row in rows), key=lambda s: s.start)
        last, total = 0, 0
        for s in segments:
            where = f"a segment at {s.start:#x}"
            if s.file_bytes > s.memory_bytes:
                raise self.bad(f"has {where} with more bytes in the file than in memory")
            if s.file_bytes and s.offset + s.file_bytes > self.file.size:
                raise self.bad(
                    f"was cut: {where} ends at byte {s.offset + s.file_bytes}, the file at "
                    f"{self.file.size}",
                    "make it anew: a full disk and `ulimit -c` cut core files",
                )
            if s.start + s.memory_bytes > 1 << self.bits:
                raise self.bad(f"has {where} beyond the end of all addresses")
            if s.memory_bytes and s.start < last:
                raise self.bad(f"has {where} that overlaps the one before")
            last = max(last, s.start + s.memory_bytes)
            total += s.file_bytes
        if total > self.file.size:
            raise self.bad("has segments that take the same bytes of the file")
        return [s for s in segments if s.memory_bytes]

    def _facts(self, notes: NDArray[np.void]) -> _Facts:
        facts = _Facts()
        if int(notes["in_file"].astype(object).sum()) > min(self.file.size, NOTES_MOST_BYTES):
            raise self.bad("has more notes than a core can have")
        for offset, size in zip(notes["offset"].tolist(), notes["in_file"].tolist(), strict=True):
            for owner, kind, body in self._notes(self.file.read(offset, size, "its notes")):
                self._learn(facts, owner, kind, body)
        if facts.guest:
            facts = replace(facts, pid=0, name="")
        return facts

    def _notes(self, raw: bytes) -> Iterator[tuple[bytes, int, bytes]]:
        """Owner, type and content of each note."""
        at = 0
        while at + 12 <= len(raw):
            owner_bytes, size, kind = struct.unpack_from(f"{self.order}3I", raw, at)
            body = at + 12 + -(-owner_bytes // 4) * 4
            end = body + size
            if end > len(raw):
                raise self.bad("has damaged notes: one ends beyond them all")
            yield raw[at + 12 : at + 12 + owner_bytes].rstrip(b"\0"), kind, raw[body:end]
            at = body + -(-size // 4) * 4

    def _learn(self, facts: _Facts, owner: bytes, kind: int, body: bytes) -> None:
        if owner == b"QEMU":
            facts.guest = True
        if owner != b"CORE":
            return
        if kind == NT_PRPSINFO and len(body) in PRPSINFO:
            at, name = PRPSINFO[len(body)]
            facts.pid = self._pid(body, at)
            facts.name = os.fsdecode(body[name : name + NAME_BYTES].partition(b"\0")[0])
        elif kind == NT_PRSTATUS and not facts.pid and len(body) >= PRSTATUS_PID[self.bits] + 4:
            facts.pid = self._pid(body, PRSTATUS_PID[self.bits])
        elif kind == NT_AUXV:
            words = self._words(body, 2).reshape(-1, 2).tolist()
            found = {int(key): int(value) for key, value in words}
            facts.vdso = found.get(AT_SYSINFO_EHDR, -1)
            facts.page_size = found.get(AT_PAGESZ, 0)
        elif kind == NT_FILE:
            facts.files = self._mapped(body)

    def _pid(self, body: bytes, at: int) -> int:
        return max(0, int(struct.unpack_from(f"{self.order}i", body, at)[0]))

    def _words(self, raw: bytes, multiple: int) -> NDArray[np.unsignedinteger[Any]]:
        size = self.bits // 8 * multiple
        return np.frombuffer(raw[: len(raw) // size * size], f"{self.order}u{self.bits // 8}")

    def _mapped(self, body: bytes) -> list[tuple[int, int, str]]:
        """File mappings by NT_FILE: count, page size, (start, end, offset) each, then the names."""
        word = self.bits // 8
        head = self._words(body[: 2 * word], 2)
        count = int(head[0]) if len(head) else 0
        names_at = (2 + 3 * count) * word
        if not len(head) or names_at > len(body):
            raise self.bad("has a damaged list of file mappings (NT_FILE)")
        ranges = self._words(body[2 * word : names_at], 3).reshape(-1, 3).tolist()
        names = body[names_at:].split(b"\0")
        found = [
            (start, end, os.fsdecode(name))
            for (start, end, _), name in zip(ranges, names, strict=False)
        ]
        return sorted(found)
