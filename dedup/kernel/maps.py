"""smaps and VmFlags.

Source: fs/proc/task_mmu.c, Documentation/filesystems/proc.rst.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dedup.errors import Unsupported

if TYPE_CHECKING:
    from dedup.kernel.processes import Handle


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping as smaps shows it. Sizes are bytes."""

    start: int
    end: int
    perms: str
    name: str
    vm_flags: frozenset[str]
    anonymous_bytes: int
    anon_huge_bytes: int
    swap_bytes: int
    resident_bytes: int
    """All that is mapped, pages of files and hugetlb included; not the shared zero page."""
    shared_bytes: int
    """Pages that others map too, of files or since a fork."""
    ksm_bytes: int | None
    """Bytes of KSM pages mapped, None where the kernel does not tell (before Linux 6.6)."""


# One match a mapping: the head line, then only the fields that are wanted.
_MAPPING: Final = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \d+ *(.*)\n"
    rb"((?:[A-Z].*\n)*?)"
    rb"VmFlags:(.*)$",
    re.MULTILINE,
)
_FIELD: Final = re.compile(rb"^([A-Z]\w+): +(\d+)", re.MULTILINE)


def read(handle: Handle) -> list[Mapping]:
    """All mappings of a process, ascending by address.

    Raises
    ------
    ProcessGone, NotPermitted
    Unsupported
        The kernel shows no VmFlags (it lacks CONFIG_PROC_PAGE_MONITOR).
    """
    return parse(handle.read("smaps"))


def parse(text: bytes) -> list[Mapping]:
    """Mappings from the text of smaps.

    Raises
    ------
    Unsupported
        It has mappings without VmFlags.
    """
    mappings = []
    for m in _MAPPING.finditer(text):
        kilobytes = dict(_FIELD.findall(m[5]))
        mappings.append(
            Mapping(
                start=int(m[1], 16),
                end=int(m[2], 16),
                perms=m[3].decode(),
                name=m[4].decode(errors="surrogateescape"),
                vm_flags=frozenset(m[6].decode().split()),
                anonymous_bytes=_bytes(kilobytes, b"Anonymous"),
                anon_huge_bytes=_bytes(kilobytes, b"AnonHugePages"),
                swap_bytes=_bytes(kilobytes, b"Swap"),
                resident_bytes=_bytes(kilobytes, b"Rss", b"Shared_Hugetlb", b"Private_Hugetlb"),
                shared_bytes=_bytes(kilobytes, b"Shared_Clean", b"Shared_Dirty"),
                ksm_bytes=_bytes(kilobytes, b"KSM") if b"KSM" in kilobytes else None,
            )
        )
    if text and not mappings:
        raise Unsupported("this kernel shows no VmFlags in /proc/PID/smaps", "")
    return mappings


def _bytes(kilobytes: dict[bytes, bytes], *names: bytes) -> int:
    return sum(int(kilobytes.get(name, 0)) for name in names) * 1024
