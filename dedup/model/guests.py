"""QEMU's guests: which mapping is the guest's memory, and whether KSM may merge it.

Source: QEMU's -m, -machine mem-merge and memory-backend-* (properties share, hugetlb; merge=off
of a backend has no effect while the machine's mem-merge is on), by
`qemu-system-x86_64 -machine pc,help` and `-object memory-backend-ram,help` of QEMU 7.2; the flags
of the mappings were looked at with the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.pages import Region

DEFAULT_BYTES: Final = 128 << 20
"""Of `-m`, where it is not given."""
UNITS: Final = {"k": 10, "m": 20, "g": 30, "t": 40}
NAMES: Final = ("kvm", "qemu-kvm")
PREFIX: Final = "qemu-system-"

ADVISED: Final = "advised"
NOT_ADVISED: Final = "not-advised"
SHARED: Final = "shared"
HUGETLB: Final = "hugetlb"
UNKNOWN: Final = "unknown"

WORDS: Final = {
    ADVISED: "the guest's memory is mergeable already: nothing to do",
    NOT_ADVISED: "the guest's memory is not advised (mem-merge=off)",
    SHARED: "the guest's memory is a shared mapping (share=on), which KSM never merges",
    HUGETLB: "the guest's memory is hugetlb, which KSM never merges",
    UNKNOWN: "no mapping has the size of the guest's memory",
}
WAYS_OUT: Final = {
    ADVISED: (),
    NOT_ADVISED: (
        "QEMU: leave out mem-merge=off: -machine mem-merge=on is the default",
        "libvirt: remove <nosharepages/> from <memoryBacking>",
    ),
    SHARED: (
        "QEMU: -object memory-backend-ram,share=off in place of a shared memfd or file",
        "libvirt: <access mode='private'/> in <memoryBacking>",
        "vhost-user and virtiofs need shared memory: a guest has either them or KSM",
    ),
    HUGETLB: (
        "QEMU: a memory-backend-ram in place of hugetlb=on or a -mem-path in hugetlbfs",
        "libvirt: remove <hugepages/> from <memoryBacking>",
    ),
    UNKNOWN: ("look at it with `dedup scan --pid PID -v`",),
}
"""What to change. Each takes effect when QEMU starts the guest anew."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest's memory, and whether it may merge."""

    state: str
    """One of the constants above; where a guest has several memories, the worst of them."""
    ram_bytes: int
    """Of the mappings found."""
    mappings: int

    @property
    def words(self) -> str:
        """What it is, in one sentence."""
        return WORDS[self.state]

    @property
    def ways_out(self) -> tuple[str, ...]:
        """What to change, empty where nothing."""
        return WAYS_OUT[self.state]


def is_qemu(name: str) -> bool:
    """Whether a process of this name (cut to 15 characters, as `ps -o comm` has it) is QEMU."""
    return name.startswith(PREFIX) or name in NAMES


def sizes(words: Sequence[str]) -> list[int]:
    """Bytes of the guest's memories, by QEMU's command line: its backends', else that of `-m`."""
    backends = []
    total = DEFAULT_BYTES
    for word, value in zip(words, [*words[1:], ""], strict=True):
        option = word.removeprefix("-") if word.startswith("--") else word
        if option == "-m":
            total = _size(_fields(value, first="size").get("size", "")) or total
        elif option == "-object" and value.startswith(("memory-backend-", "qom-type=memory-")):
            backends.append(_size(_fields(value, first="").get("size", ""), unit="") or 0)
    return [b for b in backends if b] or [total]


def memories(regions: Sequence[Region], words: Sequence[str]) -> list[Region]:
    """QEMU's mappings that are its guest's memory, none where no one fits.

    Parameters
    ----------
    regions : sequence of Region
        Of one process.
    words : sequence of str
        Its command line.
    """
    wanted = sizes(words)
    found = [r for r in regions if r.end - r.start in wanted and r.perms.startswith("rw-")]
    if not found:
        # A memory in parts, as NUMA policies and ballooning make them: the biggest tells.
        found = sorted(
            (r for r in regions if r.perms.startswith("rw-")), key=lambda r: r.start - r.end
        )[:1]
        if not found or 2 * (found[0].end - found[0].start) < max(wanted):
            return []
    return found


def guest(regions: Sequence[Region], words: Sequence[str]) -> Guest:
    """Find a guest's memory among QEMU's mappings; parameters as of `memories`."""
    found = memories(regions, words)
    if not found:
        return Guest(UNKNOWN, 0, 0)
    states = [_state(r) for r in found]
    worst = next(s for s in (HUGETLB, SHARED, NOT_ADVISED, ADVISED) if s in states)
    return Guest(worst, sum(r.end - r.start for r in found), len(found))


def _state(region: Region) -> str:
    if "ht" in region.vm_flags:
        return HUGETLB
    if "sh" in region.vm_flags or "ms" in region.vm_flags:
        return SHARED
    return ADVISED if "mg" in region.vm_flags else NOT_ADVISED


def _fields(value: str, first: str) -> dict[str, str]:
    """`a,b=c` as QEMU reads it; the first word may lack its name."""
    found = {}
    for at, part in enumerate(value.split(",")):
        name, separator, text = part.partition("=")
        if separator:
            found[name] = text
        elif at == 0 and first:
            found[first] = part
    return found


def _size(text: str, unit: str = "m") -> int | None:
    """Bytes of `512`, `2G`, `1.5g`; None where it is none. Without a letter: the unit."""
    text = text.lower().removesuffix("b")
    if text and text[-1] in UNITS:
        text, unit = text[:-1], text[-1]
    try:
        return int(float(text) * (1 << UNITS.get(unit, 0)))
    except (ValueError, OverflowError):
        return None
