"""What a source yields: arrays a page, a table of runs for the addresses, regions, processes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    U64 = NDArray[np.uint64]
    I64 = NDArray[np.int64]
    U32 = NDArray[np.uint32]
    Index = U32 | I64
    Bool = NDArray[np.bool_]

FRAME_MASK: Final = np.uint64((1 << 48) - 1)
"""The frame number in a frame word; the flags stand above it."""
NO_FLAG: Final = np.uint64(0)

PIECE_GROUPS: Final = 1 << 13
PIECE_PAGES: Final = 1 << 15
"""Groups, and pages of groups, worked on at a time."""
PARTS: Final = 16
"""Of pages that are worked on by frame number, at the least this part at a time."""
HINT_PAGES: Final = 64
"""Pages that share a hint (`Owners`); a test holds it against the core's."""

NOT_DUMPED: Final = "not-dumped"
"""Code of what the maker of a file left out of it."""


class Flag:
    """Flags of a frame word. `_core` sets them; a test holds both tables against each other."""

    EXCLUSIVE: Final = np.uint64(1 << 48)
    KSM: Final = np.uint64(1 << 49)
    THP: Final = np.uint64(1 << 50)
    ZERO: Final = np.uint64(1 << 51)
    CONSTANT: Final = np.uint64(1 << 52)
    VOLATILE: Final = np.uint64(1 << 53)
    GONE: Final = np.uint64(1 << 54)
    NEW: Final = np.uint64(1 << 55)
    SEEN: Final = np.uint64(1 << 56)
    UNREAD: Final = np.uint64(1 << 57)
    DUPLICATE: Final = np.uint64(1 << 58)
    LOCKED: Final = np.uint64(1 << 59)
    HIDDEN: Final = np.uint64(1 << 60)
    OUTSIDE: Final = np.uint64(1 << 61)


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process: a pid alone may be used again, with its start time it is one."""

    pid: int
    start_time: int
    """Clock ticks after boot (field 22 of /proc/PID/stat)."""


@dataclass(slots=True)
class Stored:
    """A file, or a folder of files, that memory was taken from."""

    kind: str
    """`core`, `image` or `criu`, as the option that named it."""
    path: str
    file_bytes: int
    """Of the files read."""
    hole_pages: int = 0
    """Pages in holes of the files: they count as all-zero pages."""


@dataclass(frozen=True, slots=True)
class Process:
    """What is known of a scanned process besides its pages."""

    id: ProcessId
    name: str
    user: str = ""
    cgroup: str = ""
    unit: str = ""
    ksm_zero_pages: int = 0
    """Pages that KSM has mapped to the shared zero page already."""
    ksm_rmap_items: int = 0
    """Pages that ksmd follows already."""
    pinned_bytes: int = 0
    """Memory pinned for devices and io_uring (VmPin); which pages it is can't be seen."""
    stored: int | None = None
    """Where its memory lies (`Pages.stored`); None for a live process."""


class Region(NamedTuple):
    """A mapping of a process, and whether KSM would accept it.

    Sizes are bytes, as smaps gives them at the first look. A named tuple: a process may have
    65,530, and these are made fastest.
    """

    process: int
    """Index of the process in `Pages.processes`."""
    start: int
    end: int
    perms: str
    name: str
    vm_flags: frozenset[str]
    eligible: bool
    why: str
    """Why it is not eligible, empty when it is."""
    advised: bool
    """Marked mergeable now (`mg`)."""
    scanned: bool
    """In the scope of this scan."""
    anonymous_bytes: int = 0
    anon_huge_bytes: int = 0
    swap_bytes: int = 0
    ksm_bytes: int = 0
    resident_bytes: int | None = None
    """All that is mapped, pages of files included; None where the source does not tell."""
    advised_known: bool = True
    guest: bool = False
    """Memory of a guest that this QEMU runs."""
    shared_bytes: int = 0
    """Of the resident bytes, pages that others map too."""

    @property
    def shared_throughout(self) -> bool:
        """Whether others mapped every page of it, too."""
        return 0 < self.shared_bytes == self.resident_bytes


@dataclass(frozen=True, slots=True)
class Nodes:
    """Which NUMA node a frame belongs to: range i goes from frame ``start[i]`` to the next one's.

    Frames below the first range count to it.
    """

    start: I64
    """Ascending."""
    node: I64

    def __len__(self) -> int:
        return len(np.unique(self.node))

    def of(self, frame: I64) -> I64:
        """Node of each frame."""
        at = np.searchsorted(self.start, frame, side="right") - 1
        return np.asarray(self.node[np.maximum(at, 0)])


@dataclass(slots=True)
class Origin:
    """Where pages lie in files: from page ``first[i]`` on, one after another.

    Pages below the first, and those behind a piece's last, lie in none.
    """

    first: I64
    """Ascending."""
    count: I64
    offset: I64
    """Bytes."""
    path: I64
    """Index in `paths`."""
    paths: list[str]

    def of(self, page: int) -> tuple[str, int, int] | None:
        """Path, offset of the piece and number in it of a page; None for one that lies in none."""
        at = int(np.searchsorted(self.first, page, side="right")) - 1
        if at < 0 or page - int(self.first[at]) >= int(self.count[at]):
            return None
        return self.paths[int(self.path[at])], int(self.offset[at]), page - int(self.first[at])


@dataclass(slots=True)
class Skipped:
    """Something that a scan left out, and why."""

    pid: int | None
    what: str
    code: str
    pages: int | None = None

    @property
    def amiss(self) -> bool:
        """Whether something chosen is missing, other than what a file's maker never put in."""
        return self.code != NOT_DUMPED


class Owners(NamedTuple):
    """Which process pages belong to, by stretches of pages that lie one after another."""

    start: I64
    """First page of each stretch, ascending."""
    process: I64
    hint: U32
    """The stretch that each `HINT_PAGES`-th page lies in."""

    def of(self, index: Index) -> I64:
        """Process of each page."""
        return np.asarray(self.process[np.searchsorted(self.start, index, side="right") - 1])


@dataclass(slots=True)
class Pages:
    """The pages of a scan.

    Arrays have one entry a page, in no order; `runs` give the addresses: run r holds the pages
    ``run_first[r] … run_first[r] + run_count[r] - 1`` from address ``run_start[r]`` on, in region
    ``run_region[r]``. Runs ascend by (process, address).
    """

    page_size: int
    hashes: U64
    frames: U64
    run_start: I64
    run_count: I64
    run_first: I64
    run_region: I64
    regions: list[Region]
    processes: list[Process]
    looks: int = 1
    frames_known: bool = True
    huge_known: bool = True
    huge_pages: int = 512
    """Pages in a PMD-mapped huge page."""
    nodes: Nodes | None = None
    """None where the host has one NUMA node."""
    skipped: list[Skipped] = field(default_factory=list)
    stored: list[Stored] = field(default_factory=list)
    """Files that processes were taken from."""
    origin: Origin | None = None

    @property
    def present(self) -> Bool:
        """Pages there at the last look and readable, shape (n,)."""
        return np.asarray((self.frames & (Flag.GONE | Flag.UNREAD)) == 0)

    def region_of(self, index: Index) -> I64:
        """Region of each page in `index`."""
        order = np.argsort(self.run_first, kind="stable")
        run = np.searchsorted(self.run_first[order], index, side="right") - 1
        return np.asarray(self.run_region[order[run]], dtype=np.int64)

    def process_of_region(self) -> I64:
        """Process of each region."""
        return np.array([r.process for r in self.regions], dtype=np.int64)

    def owners(self) -> Owners:
        """The process of all pages."""
        order = np.argsort(self.run_first, kind="stable")
        process = self.process_of_region()[self.run_region[order]]
        changes = np.flatnonzero(np.diff(process, prepend=-1))
        start, process = self.run_first[order[changes]], process[changes]
        if len(start):
            start[0] = 0
        hint = np.searchsorted(start, np.arange(0, len(self.frames), HINT_PAGES), side="right") - 1
        return Owners(start, process, hint.astype(np.uint32))

    def address_of(self, index: Index) -> I64:
        """Virtual address of each page in `index`."""
        order = np.argsort(self.run_first, kind="stable")
        run = order[np.searchsorted(self.run_first[order], index, side="right") - 1]
        offset = (index - self.run_first[run]) * self.page_size
        return np.asarray(self.run_start[run] + offset, dtype=np.int64)

    def scan_order(self, index: Index) -> I64:
        """Rank of each page in `index` as ksmd would come by: process, then address.

        Between processes the order is that of `processes`; ksmd's own is the order in which they
        became mergeable, which can't be seen from outside.
        """
        order = np.argsort(self.run_first, kind="stable")
        run = order[np.searchsorted(self.run_first[order], index, side="right") - 1]
        before = np.concatenate(([0], np.cumsum(self.run_count)))[:-1]
        return np.asarray(before[run] + index - self.run_first[run], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Census:
    """Pages counted by process and flags, once for all who ask for a number.

    Taken when they were grouped: `OUTSIDE` is not known yet.
    """

    process: I64
    flags: U64
    count: I64

    def of(self, mask: np.uint64, value: np.uint64 = NO_FLAG) -> int:
        """Pages whose flags of `mask` are `value`."""
        return int(self.count[(self.flags & mask) == value].sum())

    def by_process(self, processes: int, mask: np.uint64, value: np.uint64 = NO_FLAG) -> I64:
        """The same for each process."""
        some = (self.flags & mask) == value
        total = np.zeros(processes, np.int64)
        np.add.at(total, self.process[some], self.count[some])
        return total


class Sums(NamedTuple):
    """Sums for each group of pages, all arrays of the same length."""

    some: U64
    """Flags that any of the pages has."""
    every: U64
    """Flags that all of them have."""
    ksm: I64
    """KSM pages among them."""
    ksm_frames: I64
    """Frames of these."""
    room: I64
    """What those frames lack, all in all, of the limit of mappings."""
    frames: I64
    """Frames of the other pages; a page whose frame is hidden counts as one."""
    outside: I64
    """Frames with `OUTSIDE`."""


class Passes(Protocol):
    """Passes over pages that need compiled code: `dedup._core` has them, and says what they do.

    They come with the groups, so that what works with those needs no compiled module itself.
    """

    def count(self, frames: U64, mask: np.uint64, value: np.uint64, /) -> int:
        """Count words by flags."""

    def select(self, frames: U64, mask: np.uint64, value: np.uint64, /) -> I64:
        """Find words by flags."""

    def all_apart(self, frames: U64, mask: np.uint64, value: np.uint64, /) -> bool:
        """Tell whether such words have a frame each."""

    def sums(
        self,
        frames: U64,
        order: U32,
        offsets: I64,
        skip: np.uint64,
        mask: np.uint64,
        value: np.uint64,
        limit: int,
        /,
    ) -> tuple[U64, U64, I64]:
        """Add up each group."""

    def by_process(
        self,
        frames: U64,
        order: U32,
        offsets: I64,
        which: NDArray[np.uint8],
        mask: np.uint64,
        value: np.uint64,
        start: I64,
        process: I64,
        hint: U32,
        processes: int,
        /,
    ) -> tuple[I64, I64]:
        """Count mappings of groups by process."""

    def frame_parts(
        self, frames: U64, mask: np.uint64, value: np.uint64, most: int, size: int, /
    ) -> I64:
        """Divide the frame numbers of such words into parts."""

    def between(
        self, frames: U64, mask: np.uint64, value: np.uint64, low: int, high: int, /
    ) -> U64:
        """Find such words in one part, ascending by frame."""

    def by_block(
        self,
        frames: U64,
        mask: np.uint64,
        value: np.uint64,
        flag: np.uint64,
        size: int,
        /,
    ) -> tuple[I64, I64, I64, I64]:
        """Count such words by block of frames, and find those in none."""

    def blocks_of(
        self,
        frames: U64,
        order: U32,
        offsets: I64,
        which: NDArray[np.uint8],
        mask: np.uint64,
        value: np.uint64,
        size: int,
        /,
    ) -> I64:
        """Find the blocks of frames that groups lie in."""

    def any_in_one_block(
        self,
        frames: U64,
        order: U32,
        offsets: I64,
        skip: np.uint64,
        mask: np.uint64,
        value: np.uint64,
        size: int,
        /,
    ) -> bool:
        """Tell whether any group lies in one block."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Contents with two mappings or more, as `_core.group` finds them.

    Group g is ``order[offsets[g]:offsets[g + 1]]``, indices of pages; `considered` counts all
    pages that took part, so ``considered - len(order)`` contents are there once.
    """

    order: U32
    offsets: I64
    considered: int
    census: Census
    passes: Passes

    def sums(
        self, frames: U64, limit: int, own: tuple[np.uint64, np.uint64], skip: np.uint64 = NO_FLAG
    ) -> Sums:
        """Sums for each group.

        Parameters
        ----------
        frames : uint64 array
            Frame words of the pages.
        limit : int
            Mappings of a frame, for `Sums.room`.
        own : (mask, value)
            Pages with this value of these flags are known to have a frame of their own.
        skip : int
            Groups whose first page has any of these flags are passed by: their sums are 0, their
            flags those of the first page.
        """
        some, every, sums = self.passes.sums(frames, self.order, self.offsets, skip, *own, limit)
        return Sums(some, every, *sums)

    def pieces(self) -> Iterator[Groups]:
        """All groups, some thousand at a time: so arrays of one entry a group or page stay small.

        Larger ones come from the kernel anew each time, and are touched for the first time. There
        is one piece at the least.
        """
        if len(self.offsets) <= 1:
            yield self
        for low, high in self.batches(PIECE_PAGES, PIECE_GROUPS):
            yield replace(self, offsets=self.offsets[low : high + 1])

    def of(self, which: Bool) -> tuple[U32, I64]:
        """Pages of some groups, group after group, and how many each has."""
        sizes = np.diff(self.offsets)[which]
        if len(sizes) == len(which):
            return self.order[self.offsets[0] : self.offsets[-1]], sizes
        at = np.repeat(self.offsets[:-1][which] - np.cumsum(sizes) + sizes, sizes)
        at += np.arange(len(at))
        return self.order[at], sizes

    def by_frame(
        self, frames: U64, mask: np.uint64, value: np.uint64, size: int = 1
    ) -> Iterator[tuple[I64, I64]]:
        """Pages that have `value` of the flags in `mask`, ascending by frame, part by part.

        Yields frame numbers and indices. Mappings of one frame, and of one block of `size` frames,
        come together.
        """
        most = max(PIECE_PAGES, self.passes.count(frames, mask, value) // PARTS)
        for low, high in self.passes.frame_parts(frames, mask, value, most, size).tolist():
            found = self.passes.between(frames, mask, value, low, high)
            for begin, end in _slices(found, size):
                index = (found[begin:end] & np.uint64(0xFFFFFFFF)).view(np.int64)
                frame = (found[begin:end] >> np.uint64(32)).view(np.int64)
                frame += low
                yield frame, index

    def batches(self, pages: int, groups: int | None = None) -> Iterator[tuple[int, int]]:
        """Groups [first, last), so many at a time that they have `pages` pages at the most.

        A larger one comes alone. No more than `groups`, where that is given.
        """
        offsets, group, stop = self.offsets, 0, len(self.offsets) - 1
        while group < stop:
            end = int(np.searchsorted(offsets, offsets[group] + pages, "right")) - 1
            end = min(max(group + 1, end), stop, group + groups if groups else stop)
            yield group, end
            group = end


def _slices(found: U64, size: int) -> Iterator[tuple[int, int]]:
    """Divide ascending words with a frame above 32 bits so that no block of frames is divided."""
    begin, n = 0, len(found)
    while begin < n:
        end = begin + PIECE_PAGES
        if end < n:
            block = int(found[end - 1] >> np.uint64(32)) // size
            last = min((1 << 64) - 1, ((block + 1) * size << 32) - 1)
            end = int(np.searchsorted(found, np.uint64(last), side="right"))
        yield begin, min(end, n)
        begin = end
