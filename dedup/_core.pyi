from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
U32 = NDArray[np.uint32]
Bool = NDArray[np.bool_]
Buffer = bytes | bytearray | memoryview | NDArray[np.uint8]

FLAGS: Final[dict[str, int]]
RANGE_HUGE: Final[int]
RANGE_KSM: Final[int]
RANGE_LOCKED: Final[int]
RANGE_SHARED: Final[int]
RANGE_TORN: Final[int]
COUNTS: Final[tuple[str, ...]]
TARGET_FAST: Final[int]
ONCE_SHARED: Final[int]
ONCE_KSM: Final[int]
TARGET_IN_PLACE: Final[int]
PAGE_IS_WPALLOWED: Final[int]
PAGE_IS_WRITTEN: Final[int]
PAGE_IS_FILE: Final[int]
PAGE_IS_PRESENT: Final[int]
PAGE_IS_SWAPPED: Final[int]
PAGE_IS_PFNZERO: Final[int]
PAGE_IS_HUGE: Final[int]
PAGE_IS_SOFT_DIRTY: Final[int]
LOOK_NONE: Final[int]
LOOK_CHANGED: Final[int]
LOOK_ZERO: Final[int]
LOOK_CONSTANT: Final[int]
LOOK_TEXT: Final[int]
LOOK_BINARY: Final[int]
INJECT_ARCHITECTURE: Final[bool]
INJECT_DONE: Final[int]
INJECT_NOT_STOPPED: Final[int]
INJECT_GONE: Final[int]
INJECT_NOT_SEIZED: Final[int]
INJECT_FOREIGN: Final[int]
INJECT_IN_RSEQ: Final[int]
INJECT_NO_GADGET: Final[int]
INJECT_NO_ROOM: Final[int]
INJECT_DISPATCHED: Final[int]
INJECT_FAULT: Final[int]
INJECT_LEFT: Final[int]
INJECT_STUCK: Final[int]
INJECT_FAILED: Final[int]
INJECT_MAIN_STACK: Final[int]
INJECT_THREAD_STACK: Final[int]
INJECT_SUSPEND_SECCOMP: Final[int]

class Job:
    def __init__(
        self,
        page_size: int,
        seed: int,
        pids: I64,
        mem_fds: I64,
        pagemap_fds: I64,
        target_flags: I64,
        range_start: U64,
        range_end: U64,
        range_target: I64,
        range_flags: I64,
        hashes: U64,
        frames: U64,
        used: int,
        zero_frame: int,
        kpageflags_fd: int,
        huge_bytes: int,
        every_folio: bool,
        prior: tuple[I64, I64, I64, I64] | None = None,
        below: int = 0,
        only: Bool | None = None,
        content_below: int = 0,
        counted_hashes: U64 | None = None,
        once: int = 0,
    ) -> None: ...
    @property
    def page_size(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def pages_looked(self) -> int: ...
    @property
    def overflowed(self) -> bool: ...
    @property
    def fast_pages(self) -> int: ...
    @property
    def slow_pages(self) -> int: ...
    @property
    def changed_pages(self) -> int: ...
    @property
    def unread_pages(self) -> int: ...
    @property
    def known_pages(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def counts(self) -> I64: ...
    def counted_pages(self) -> I64: ...
    def dead_targets(self) -> I64: ...
    def range_pages(self) -> I64: ...
    def forked_targets(self) -> I64: ...
    def cancel(self) -> None: ...
    def grow(self, hashes: U64, frames: U64, used: int) -> None: ...
    def runs(self) -> tuple[I64, I64, I64, I64]: ...
    def run(self) -> None: ...

def load_hash(
    candidates: Iterable[tuple[str, str]],
    reference: Callable[[bytes, int], int],
    page_size: int,
) -> str: ...
def hash_bytes(data: Buffer, seed: int) -> int: ...
def group(
    hashes: U64,
    frames: U64,
    skip: int,
    first: I64,
    count: I64,
    process: I64,
    threads: int = 1,
) -> tuple[U32, I64, int, I64]: ...
def count(frames: U64, mask: int | np.uint64, value: int | np.uint64, /) -> int: ...
def select(frames: U64, mask: int | np.uint64, value: int | np.uint64, /) -> I64: ...
def put(
    frames: U64, mask: int | np.uint64, value: int | np.uint64, flags: int | np.uint64, /
) -> None: ...
def put_in_runs(
    frames: U64,
    first: I64,
    count: I64,
    mask: int | np.uint64,
    value: int | np.uint64,
    flags: int | np.uint64,
    /,
) -> None: ...
def block_heads(
    frames: U64,
    first: I64,
    count: I64,
    mask: int | np.uint64,
    value: int | np.uint64,
    size: int,
    /,
) -> I64: ...
def all_apart(frames: U64, mask: int | np.uint64, value: int | np.uint64, /) -> bool: ...
def sums(
    frames: U64,
    order: U32,
    offsets: I64,
    skip: int | np.uint64,
    mask: int | np.uint64,
    value: int | np.uint64,
    limit: int,
    /,
) -> tuple[U64, U64, I64]: ...
def by_block(
    frames: U64,
    mask: int | np.uint64,
    value: int | np.uint64,
    flag: int | np.uint64,
    size: int,
    /,
) -> tuple[I64, I64, I64, I64]: ...
def blocks_of(
    frames: U64,
    order: U32,
    offsets: I64,
    which: NDArray[np.uint8],
    mask: int | np.uint64,
    value: int | np.uint64,
    size: int,
    /,
) -> I64: ...
def by_process(
    frames: U64,
    order: U32,
    offsets: I64,
    which: NDArray[np.uint8],
    mask: int | np.uint64,
    value: int | np.uint64,
    start: I64,
    process: I64,
    hint: U32,
    processes: int,
    /,
) -> tuple[I64, I64]: ...
def frame_parts(
    frames: U64, mask: int | np.uint64, value: int | np.uint64, most: int, size: int, /
) -> I64: ...
def between(
    frames: U64, mask: int | np.uint64, value: int | np.uint64, low: int, high: int, /
) -> U64: ...
def any_in_one_block(
    frames: U64,
    order: U32,
    offsets: I64,
    skip: int | np.uint64,
    mask: int | np.uint64,
    value: int | np.uint64,
    size: int,
    /,
) -> bool: ...
def pagemap_scan(fd: int, start: int, end: int, inverted: int, mask: int, returned: int) -> U64: ...
def read_words(fd: int, indices: I64) -> U64: ...
def first_present(
    fd: int, starts: U64, ends: U64, huge_bytes: int, page_size: int
) -> tuple[U64, Bool]: ...
def look_like(
    mem_fd: int, pagemap_fd: int, address: int, page_size: int, seed: int, digest: int
) -> int: ...
def hash_file(
    fd: int,
    page_size: int,
    seed: int,
    offset: I64,
    count: I64,
    first: I64,
    hashes: U64,
    frames: U64,
    word: int,
) -> int: ...
def look_like_in_file(fd: int, offset: int, page_size: int, seed: int, digest: int) -> int: ...
def address_of(data: Buffer) -> int: ...
def madvise(start: int, length: int, advice: int) -> None: ...
def kcmp_vm(pid: int, other: int) -> int: ...
def child_subreaper() -> None: ...
def parent_death_signal(number: int) -> None: ...
def personality(persona: int) -> int: ...
def prctl_memory_merge(on: int) -> None: ...
def prctl_get_memory_merge() -> int: ...
def probe_process_vm_readv() -> None: ...
def inject(
    pid: int,
    tid: int,
    dir_fd: int,
    mem_fd: int,
    options: int,
    gadget: int,
    restorer: int,
    allow_plain: bool,
    stacks: U64,
    calls: I64,
    results: I64,
    stop_seconds: float,
    call_seconds: float,
    budget_seconds: float,
) -> tuple[int, int, int, bool, int, float, float]: ...
