"""Raw memory: QEMU's `pmemsave`, a snapshot; page after page, from address 0 on."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dedup.errors import BadInput
from dedup.pages import Region, Skipped
from dedup.sources.files import Extent, File, extents_of, mistaken

if TYPE_CHECKING:
    from collections.abc import Iterator

ELF_CORE: Final = b"\x7fELF"
PART_OF_PAGE: Final = "part-of-page"
"""Code of bytes that make no whole page."""


@dataclass(frozen=True, slots=True)
class Image:
    """One guest's memory, or any other run of pages."""

    file: File
    page_size: int
    kind: str = "image"
    pid: int = 0
    forks: bool = False
    """Guests have frames of their own."""

    @property
    def path(self) -> str:
        """As it was given."""
        return self.file.path

    @property
    def name(self) -> str:
        """The file's."""
        return os.path.basename(self.path)

    @property
    def files(self) -> list[File]:
        """The one."""
        return [self.file]

    @property
    def memories(self) -> list[Image]:
        """Itself: it is one address space."""
        return [self]

    @property
    def skipped(self) -> list[Skipped]:
        """Bytes at the end that make no page."""
        rest = self.file.size % self.page_size
        if not rest:
            return []
        words = f"{self.path}: the last {rest} bytes, less than a page of {self.page_size}"
        return [Skipped(None, words, PART_OF_PAGE)]

    def regions(self) -> list[Region]:
        """One, of all whole pages."""
        size = self.file.size // self.page_size * self.page_size
        return [
            Region(
                process=0,
                start=0,
                end=size,
                perms="rw-p",
                name=self.name,
                vm_flags=frozenset(),
                eligible=True,
                why="",
                advised=False,
                advised_known=False,
                scanned=True,
                anonymous_bytes=size,
            )
        ]

    def extents(self, number: int) -> Iterator[Extent]:  # noqa: ARG002 - there is one region
        """All pages."""
        yield from extents_of(self.file, 0, 0, self.file.size // self.page_size, self.page_size)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read(path: str, page_size: int = mmap.PAGESIZE) -> Image:
    """Open an image.

    Raises
    ------
    BadInput
        No regular file, less than a page, or something else than raw memory.
    NotPermitted
    """
    file = File.open(path)
    try:
        if file.size < page_size:
            raise BadInput(f"{path} has {file.size} bytes, less than a page of {page_size}")
        begin = file.read(0, 16, "its beginning")
        if begin.startswith(ELF_CORE):
            raise BadInput(f"{path} is an ELF file, not raw memory", f"try `--core {path}`")
        wrong = mistaken(path, begin)
        if wrong is not None:
            raise wrong
    except BaseException:
        file.close()
        raise
    return Image(file, page_size)
