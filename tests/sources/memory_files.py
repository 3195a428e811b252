"""Files of memory as tests want them: ELF cores, CRIU images; and what a scan has of such files."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from dedup.pages import Flag, Pages
from dedup.scanning import Plan, Scan, scan_files
from dedup.sources.live import Options

PAGE = 4096
SEED = 77
ZERO = bytes(PAGE)


def page(word: str) -> bytes:
    """A page, the same for the same word."""
    return random.Random(word).randbytes(PAGE)


def digest(content: bytes) -> int:
    """What the documented Python call gives."""
    return xxhash.xxh3_64_intdigest(content, SEED)


def scan(*named: tuple[str, Path | str], pids: tuple[int, ...] = (), **options: object) -> Scan:
    """Scan files with the tests' seed, for the kernel's defaults, whatever the host has."""
    plan = Plan(
        options=Options(seed=SEED, **options),  # type: ignore[arg-type]
        assumed={"max_page_sharing": 256, "use_zero_pages": 0},
    )
    return scan_files([(kind, str(path)) for kind, path in named], pids, plan)


def contents(pages: Pages, process: int = 0) -> dict[int, int]:
    """Hash of each page of a process by its address."""
    owner = pages.process_of_region()[pages.run_region]
    found = {}
    for r in np.flatnonzero(owner == process).tolist():
        start, first = int(pages.run_start[r]), int(pages.run_first[r])
        for i in range(int(pages.run_count[r])):
            found[start + i * pages.page_size] = int(pages.hashes[first + i])
    return found


def flags(pages: Pages, address: int) -> int:
    """The frame word of a page."""
    every = pages.address_of(np.arange(len(pages.hashes)))
    return int(pages.frames[np.flatnonzero(every == address)[0]])


def is_zero(pages: Pages, address: int) -> bool:
    return bool(flags(pages, address) & int(Flag.ZERO))


# -- ELF cores -------------------------------------------------------------------------------------


@dataclass
class Load:
    """A PT_LOAD."""

    address: int
    content: bytes = b""
    memory: int | None = None
    """Bytes in memory; None: as in the file."""
    flags: int = 6
    physical: int = 0
    hole: int = 0
    """Bytes without content behind it, a hole of the file."""


@dataclass
class Elf:
    """An ELF file."""

    loads: list[Load]
    notes: list[tuple[str, int, bytes]] = field(default_factory=list)
    bits: int = 64
    order: str = "<"
    kind: int = 4
    shift: int = 0
    """Bytes by which the segments miss the alignment to pages."""
    xnum: bool = False
    """Say the number of program headers in section header 0."""

    def write(self, path: Path) -> Path:
        wide, order = self.bits == 64, self.order
        header_size, entry = (64, 56) if wide else (52, 32)
        section = 64 if wide else 40
        count = len(self.loads) + bool(self.notes)
        table = header_size + (section if self.xnum else 0)
        ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
        long = "Q" if wide else "I"
        header = ident + struct.pack(
            f"{order}HHI3{long}I6H", self.kind, 62, 1, 0, table,
            header_size if self.xnum else 0, 0, header_size, entry,
            0xFFFF if self.xnum else count, section if self.xnum else 0, int(self.xnum), 0,
        )  # fmt: skip
        raw = b"".join(self._note(*n) for n in self.notes)
        at = table + count * entry
        rows = []
        if self.notes:
            rows.append(self._entry(4, 0, at, 0, 0, len(raw), 0))
        at = -(-(at + len(raw)) // PAGE) * PAGE + self.shift
        places = []
        for load in self.loads:
            size = len(load.content) + load.hole
            memory = size if load.memory is None else load.memory
            places.append((at, load))
            rows.append(self._entry(1, load.flags, at, load.address, load.physical, size, memory))
            at += size
        with path.open("wb") as file:
            file.write(header)
            if self.xnum:
                info = bytearray(section)
                struct.pack_into(f"{order}I", info, 44 if wide else 28, count)
                file.write(info)
            file.write(b"".join(rows) + raw)
            for place, load in places:
                file.seek(place)
                file.write(load.content)
            file.truncate(at)
        return path

    def _entry(
        self,
        kind: int,
        flags: int,
        offset: int,
        address: int,
        physical: int,
        size: int,
        memory: int,
    ) -> bytes:
        if self.bits == 64:
            return struct.pack(
                f"{self.order}2I6Q", kind, flags, offset, address, physical, size, memory, PAGE
            )
        return struct.pack(
            f"{self.order}8I", kind, offset, address, physical, size, memory, flags, PAGE
        )

    def _note(self, owner: str, kind: int, body: bytes) -> bytes:
        name = owner.encode() + b"\0"
        parts = struct.pack(f"{self.order}3I", len(name), len(body), kind)
        return parts + name + bytes(-len(name) % 4) + body + bytes(-len(body) % 4)


def prpsinfo(pid: int, name: str) -> tuple[str, int, bytes]:
    body = bytearray(136)
    struct.pack_into("<i", body, 24, pid)
    body[40 : 40 + len(name)] = name.encode()
    return "CORE", 3, bytes(body)


def auxv(**values: int) -> tuple[str, int, bytes]:
    keys = {"page_size": 6, "vdso": 33}
    words = [w for name, value in values.items() for w in (keys[name], value)]
    return "CORE", 6, struct.pack(f"<{len(words) + 2}Q", *words, 0, 0)


def file_note(*mapped: tuple[int, int, str]) -> tuple[str, int, bytes]:
    body = struct.pack("<2Q", len(mapped), 1)
    body += b"".join(struct.pack("<3Q", start, end, 0) for start, end, _ in mapped)
    return "CORE", 0x46494C45, body + b"".join(name.encode() + b"\0" for *_, name in mapped)


# -- CRIU images -----------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while True:
        out.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(out)


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protobuf message."""
    out = b""
    for number, value in fields:
        if isinstance(value, bytes):
            out += varint(number << 3 | 2) + varint(len(value)) + value
        else:
            out += varint(number << 3) + varint(value)
    return out


def image(path: Path, magic: int, *messages: bytes) -> None:
    frames = b"".join(struct.pack("<I", len(m)) + m for m in messages)
    path.write_bytes(struct.pack("<2I", 0x54564319, magic) + frames)


@dataclass
class Dumped:
    """A process to dump: pages by address, in the pages file, in the parent, or lazy."""

    pid: int
    pages: list[tuple[int, list[bytes] | int, int]]
    """Address, contents (or only their number), flags."""
    vmas: list[tuple[int, int, int, int, int]] | None = None
    """Start, end, protection, status, madv; None: no such image."""
    name: str = ""
    pages_id: int = 1


def dump(folder: Path, *processes: Dumped, version: int = 4, parent: str = "") -> Path:
    """A folder of images."""
    folder.mkdir(exist_ok=True)
    for p in processes:
        entries = [message((1, p.pages_id))]
        raw = bytearray()
        for address, what, how in p.pages:
            n = what if isinstance(what, int) else len(what)
            raw += b"" if isinstance(what, int) else b"".join(what)
            count = [(2, n)] if version == 3 else [(2, 0), (5, n)]
            entries.append(message((1, address), count[0], (4, how), *count[1:]))
        image(folder / f"pagemap-{p.pid}.img", 0x56084025, *entries)
        if raw:
            (folder / f"pages-{p.pages_id}.img").write_bytes(raw)
        if p.vmas is not None:
            rows = [
                message(
                    (1, start), (2, end), (5, prot), (7, status), *([(9, madv)] if madv else [])
                )
                for start, end, prot, status, madv in p.vmas
            ]
            image(folder / f"mm-{p.pid}.img", 0x57492820, message(*((14, r) for r in rows)))
        if p.name:
            tc = message((1, 1), (6, p.name.encode()))
            image(folder / f"core-{p.pid}.img", 0x55053847, message((1, 1), (3, tc)))
    if parent:
        (folder / "parent").symlink_to(parent)
    return folder
