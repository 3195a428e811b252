"""maps, smaps and VmFlags.

Source: fs/proc/task_mmu.c, Documentation/filesystems/proc.rst.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from dedup.errors import Unsupported

if TYPE_CHECKING:
    from dedup.kernel.processes import Handle


class Mapping(NamedTuple):
    """One mapping as smaps shows it. Sizes are bytes.

    A named tuple: a process may have 65,530, and these are made fastest.
    """

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
    shared_bytes: int | None
    """Pages that others map too, of files or since a fork; None where smaps was not asked."""
    ksm_bytes: int | None
    """Bytes of KSM pages mapped, None where the kernel does not tell (before Linux 6.6)."""
    counted: bool = True
    """False: the sizes are what they may be at the most, and a look has to count the pages."""


EVERYWHERE: Final = (0, 1 << 64)
"""All addresses: the first, and the one behind the last."""
_END: Final = b"\nVmFlags:"
"""The last line of each mapping. Names hold no line break: the kernel writes \\012 for it."""
_WANTED: Final = (
    b"Anonymous", b"AnonHugePages", b"Swap", b"Rss", b"Shared_Hugetlb", b"Private_Hugetlb",
    b"Shared_Clean", b"Shared_Dirty", b"KSM",
)  # fmt: skip
SMAPS_BYTES: Final = 2048
"""Asked for by one call. A mapping whose text has no room left in the kernel's page for a call is
shown anew by the next one, and its pages are walked a second time (fs/seq_file.c). Asked for so
little, the kernel ends a call before that page is full."""
_HEAD: Final = re.compile(rb"\n([0-9a-f]+)-[0-9a-f]+ ")
"""The first line of a mapping, behind another one's: its first address. What a call begins with
may be the rest of anything, of a name as well."""
_KNOWN: Final = 1024
"""Texts remembered: the same sizes, names and flags come again and again."""


def read(handle: Handle, within: tuple[int, int] = EVERYWHERE) -> list[Mapping]:
    """All mappings of a process, ascending by address.

    Parameters
    ----------
    handle : Handle
    within : pair of int, optional
        First address and the one behind the last: only mappings that reach into it.

    Raises
    ------
    ProcessGone, NotPermitted
    Unsupported
        The kernel shows no VmFlags (it lacks CONFIG_PROC_PAGE_MONITOR).
    """
    if within == EVERYWHERE:
        return parse(handle.read("smaps", SMAPS_BYTES))

    def enough(part: bytes) -> bool:
        # A head that is cut in two is missed; the next one serves.
        heads = _HEAD.findall(part)
        return bool(heads) and int(heads[-1], 16) >= within[1]

    return parse(handle.read("smaps", SMAPS_BYTES, enough), within)


def parse(text: bytes, within: tuple[int, int] = EVERYWHERE) -> list[Mapping]:
    """Mappings from the text of smaps; `within` as of `read`.

    A mapping that grew between two calls, as a heap does, is shown anew with what it had before
    (fs/proc/task_mmu.c, proc_get_vma): of mappings that overlap, the later one holds.

    Raises
    ------
    Unsupported
        It has mappings without VmFlags.
    """
    mappings: list[Mapping] = []
    low, high = within
    shown = 0
    head, *ends = text.split(_END)
    for end in ends:
        line, _, fields = head.partition(b"\n")
        where, perms, _, _, _, name = line.split(b" ", 5)
        first, _, last = where.partition(b"-")
        flags, _, head = end.partition(b"\n")
        from_, to = int(first, 16), int(last, 16)
        if to <= low or from_ >= high:
            continue
        if from_ < shown:
            _cut(mappings, from_)
        shown = to
        mappings.append(
            Mapping(
                from_,
                to,
                _text(perms),
                _text(name.lstrip(b" ")),
                _flags(flags),
                *_sizes(fields),
            )
        )
    if text and not ends:
        raise Unsupported("this kernel shows no VmFlags in /proc/PID/smaps", "")
    return mappings


def _cut(mappings: list[Mapping], start: int) -> None:
    """Take away what the last mappings have from an address on."""
    while mappings and mappings[-1].start >= start:
        mappings.pop()
    if mappings and mappings[-1].end > start:
        mappings[-1] = mappings[-1]._replace(end=start)


def mapping(start: int, end: int, perms: bytes, name: bytes, vm_flags: frozenset[str]) -> Mapping:
    """A mapping as /proc/PID/maps shows it, with what VmFlags are known otherwise; sizes 0."""
    return Mapping(start, end, _text(perms), _text(name), vm_flags, 0, 0, 0, 0, None, 0)


@lru_cache(_KNOWN)
def _text(text: bytes) -> str:
    return text.decode(errors="surrogateescape")


@lru_cache(_KNOWN)
def _flags(text: bytes) -> frozenset[str]:
    return frozenset(text.decode().split())


@lru_cache(_KNOWN)
def _sizes(fields: bytes) -> tuple[int, int, int, int, int, int | None]:
    """The sizes of a `Mapping`, from the lines between its head and its flags."""
    words = fields.split()
    places = _places(fields.translate(None, b"0123456789 "))
    anonymous, huge, swap, rss, shared_tlb, private_tlb, clean, dirty, ksm = (
        int(words[i]) << 10 if i else 0 for i in places
    )
    return (
        anonymous,
        huge,
        swap,
        rss + shared_tlb + private_tlb,
        clean + dirty,
        ksm if places[-1] else None,
    )


@lru_cache(_KNOWN)
def _places(fields: bytes) -> list[int]:
    """Which word is the number of each field wanted, 0 where it is not there.

    Parameters
    ----------
    fields : bytes
        The lines without numbers and spaces: the same for nearly all mappings.
    """
    places, at = {}, 0
    for line in fields.split(b"\n"):
        name, _, unit = line.partition(b":")
        places[name] = at + 1
        at += 3 if unit else 2
    return [places.get(name, 0) for name in _WANTED]
