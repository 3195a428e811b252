"""Reading memory without harming it: the hash, the readers, the threads.

`process_vm_readv` breaks sharing in its target: it pins, and a pin on a page that is not
exclusive makes the kernel copy it (mm/gup.c, gup_must_unshare). So it is used over pages alone
that pagemap calls exclusive and that are no KSM page; /proc/PID/mem serves all others.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from dedup import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dedup.kernel.pagemap import Sight
    from dedup.kernel.processes import Handle
    from dedup.pages import I64, U64, Bool


@cache
def _kernels_own() -> frozenset[int]:
    return frozenset(os.stat(path).st_dev for path in ("/proc", "/sys") if os.path.exists(path))


def made_up(device: int) -> bool:
    """Whether a device (`st_dev`) is procfs or sysfs, whose files have no size to go by."""
    return device in _kernels_own()


@cache
def load_hash(page_size: int) -> str:
    """Load XXH3 and say which symbol is in use.

    The xxhash package's own compiled symbols come first, then the system's libxxhash, then the
    package's Python call for each page: the same values from each, the last one slowly.
    """
    import xxhash

    compiled = importlib.import_module("xxhash._xxhash")
    candidates = [
        (str(compiled.__file__), "xxhash-package"),
        # By soname: ctypes.util.find_library would start other programs.
        ("libxxhash.so.0", "libxxhash"),
    ]
    return _core.load_hash(candidates, xxhash.xxh3_64_intdigest, page_size)


def default_threads() -> int:
    """Cores that we may use: the affinity mask and the cgroup's CPU limit."""
    cores = len(os.sched_getaffinity(0))
    try:
        path = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip()
        folder = Path("/sys/fs/cgroup") / path.lstrip("/")
        for part in (folder, *folder.parents):
            if part == Path("/sys/fs"):
                break
            limit = part / "cpu.max"
            if limit.exists():
                quota, period = limit.read_text().split()
                if quota != "max":
                    cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup limit in sight: the affinity mask alone
    return max(1, cores)


def fast_path() -> str:
    """Why process_vm_readv can't be used here; empty where it works."""
    try:
        _core.probe_process_vm_readv()
    except OSError as e:
        return os.strerror(e.errno or 0)
    return ""


class Ranges(NamedTuple):
    """Address ranges to look at, ascending, apart from each other."""

    start: U64
    end: U64
    flags: I64
    """`_core.RANGE_*`."""
    region: I64
    """Index of the region that each belongs to."""

    @classmethod
    def of(cls, some: Sequence[tuple[int, int, int, int]]) -> Ranges:
        """Ranges from start, end, flags and region of each."""
        start, end, flags, region = np.array(some, np.int64).reshape(-1, 4).T.copy()
        return cls(start.astype(np.uint64), end.astype(np.uint64), flags, region)


@dataclass(slots=True)
class Target:
    """A process to read, or our own memory, and the address ranges wanted."""

    handle: Handle
    fast: bool
    """process_vm_readv allowed over exclusive pages."""
    in_place: bool = False
    """Our own memory, hashed where it lies."""
    ranges: Ranges = field(default_factory=lambda: Ranges.of([]))
    files: tuple[int, int] | None = None
    """Descriptors of its mem and pagemap, while it is open."""

    def open(self) -> None:
        """Open what a look reads, so that a process that ends from here on is only found dead.

        Raises
        ------
        dedup.errors.ProcessGone, dedup.errors.NotPermitted
        """
        mem = self.handle.open("mem")
        try:
            self.files = mem, self.handle.open("pagemap")
        except BaseException:
            os.close(mem)
            raise

    def close(self) -> None:
        """Close it again."""
        for fd in self.files or ():
            os.close(fd)
        self.files = None


@dataclass(slots=True)
class Prior:
    """The runs of an earlier look for these targets, ascending by (target, address)."""

    target: I64
    start: I64
    count: I64
    first: I64


@dataclass(slots=True)
class Store:
    """The growing arrays of a scan: `used` entries are taken.

    Untouched room costs no memory, so it may be generous.
    """

    hashes: U64
    frames: U64
    used: int = 0

    @classmethod
    def of(cls, pages: int) -> Store:
        """Room for `pages` pages."""
        return cls(np.empty(pages, np.uint64), np.empty(pages, np.uint64))

    def grow(self, pages: int) -> None:
        """Make room for at least `pages` more."""
        size = max(self.used + pages, int(self.hashes.shape[0] * 1.5))
        for name in ("hashes", "frames"):
            old = getattr(self, name)
            new = np.empty(size, np.uint64)
            new[: self.used] = old[: self.used]
            setattr(self, name, new)


@dataclass(frozen=True, slots=True)
class Content:
    """Of a sample by content: what the first look keeps of the pages that it reads."""

    below: int
    """Pages whose hash's mixed number (`mixed`) lies below this, of 2**64."""
    counted: U64
    """Contents that are counted, and kept by frame alone."""
    room: int
    """Pages that may be kept at the most."""

    def chosen(self, hashes: U64) -> Bool:
        """Whether pages with these hashes are kept by their content."""
        chosen = np.empty(len(hashes), np.bool_)
        for low in range(0, len(hashes), CHUNK):
            some = hashes[low : low + CHUNK]
            chosen[low : low + CHUNK] = mixed(some) < np.uint64(self.below)
        return chosen & ~np.isin(hashes, self.counted)


class Full(Exception):
    """More pages are to be kept than there is room for."""


CHUNK: Final = 1 << 16


def mixed(number: U64) -> U64:
    """The permutation of 64 bits by which pages are chosen: `_mix64` of the core."""
    x = number + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def zero_hash(page_size: int, seed: int) -> int:
    """Hash of an all-zero page."""
    load_hash(page_size)
    return _core.hash_bytes(bytes(page_size), seed)


@dataclass(slots=True)
class Tally:
    """What the readers did, for the JSON and `doctor`."""

    hash_source: str = ""
    threads: int = 0
    process_vm_readv_pages: int = 0
    proc_mem_pages: int = 0
    in_place_pages: int = 0
    same_frame_pages: int = 0
    """Not read: their frame had been read already, through another mapping of it."""
    unread_pages: int = 0
    sharing_lost_pages: int | None = 0
    """Pages that were exclusive before a fast read and on another frame after it: at the most so
    many lost their sharing by our read. None where frame numbers are hidden."""
    forking_processes: int = 0
    """Processes seen to fork while they were read the fast way; they went on the slow way."""
    bytes_read: int = 0


@dataclass(slots=True)
class Look:
    """What one look found: runs in no order, and targets out of reach."""

    start: I64
    count: I64
    first: I64
    region: I64
    target: I64
    dead: list[int]
    counts: I64
    """Of a sample, `_core.COUNTS` of all pages present: shape (targets, 4)."""
    counted: I64
    """Of a sample by content, pages of each content that is counted."""
    present: tuple[I64, I64]
    """A region and its present pages, read or not, for each range looked at."""


def look(
    targets: Sequence[Target],
    store: Store,
    seed: int,
    threads: int,
    sight: Sight,
    tally: Tally,
    prior: Prior | None = None,
    progress: Callable[[int, int], None] | None = None,
    rate: float | None = None,
    only: Bool | None = None,
    content: Content | None = None,
    *,
    ksmd_rests: bool = False,
    meanwhile: Callable[[], None] | None = None,
) -> Look:
    """Read, test and hash the present anonymous pages of some targets.

    With `prior` it is a later look: pages known are compared and overwritten in place, and only
    pages not known before are in the result's runs. With `rate`, above 0 and below 1, only a
    sample of the frames is read, the same at every look: a mapping is in it if its frame is
    (where frames are hidden, each mapping for itself), and a later look reads what the first
    has read. With `only`, which goes by the places in the store, a later look reads these pages
    alone; of the others it notes whether they are there, and new ones have no hash. With
    `content` a first look reads all, and keeps what that and `rate` say.

    But for samples, a frame that several of the targets share since a fork is read once, and so is
    a KSM page where `ksmd_rests`: a running ksmd might make another page of a frame meanwhile.
    While threads read, `meanwhile` is called, once at the most.

    Raises
    ------
    Full
        Of a sample by content more is to be kept than there is room for.
    MemoryError
    dedup.errors.ProcessGone, dedup.errors.NotPermitted
        From opening a target's files.
    """
    tally.hash_source = load_hash(sight.page_size)
    tally.threads = threads
    with ExitStack() as stack:
        for t in targets:
            if t.files is None:
                t.open()
                stack.callback(t.close)
        files = [t.files or (-1, -1) for t in targets]
        kpageflags = -1
        if sight.kpageflags:
            kpageflags = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, kpageflags)
        per_target = [len(t.ranges.start) for t in targets]
        range_target = np.repeat(np.arange(len(targets), dtype=np.int64), per_target)
        range_region = np.concatenate([t.ranges.region for t in targets])
        job = _core.Job(
            sight.page_size,
            seed,
            np.array([t.handle.pid for t in targets], np.int64),
            np.array([f[0] for f in files], np.int64),
            np.array([f[1] for f in files], np.int64),
            np.array(
                [
                    (_core.TARGET_FAST if t.fast else 0)
                    | (_core.TARGET_IN_PLACE if t.in_place else 0)
                    for t in targets
                ],
                np.int64,
            ),
            np.concatenate([t.ranges.start for t in targets]),
            np.concatenate([t.ranges.end for t in targets]),
            range_target,
            np.concatenate([t.ranges.flags for t in targets]),
            store.hashes,
            store.frames,
            store.used,
            sight.zero_frame,
            kpageflags,
            sight.huge_bytes or sight.page_size,
            sight.every_folio,
            None if prior is None else _prior_arrays(prior, len(targets)),
            0 if rate is None else max(1, int(rate * (1 << 64))),
            only,
            0 if content is None else content.below,
            None if content is None else content.counted,
            # The table of frames is as large as for all pages: too much beside a sample.
            0 if rate or content is not None else _once(targets, sight, ksmd_rests=ksmd_rests),
        )
        total = sum(int((t.ranges.end - t.ranges.start).sum()) for t in targets) // sight.page_size
        while True:
            _run_threads(job, threads, total, progress, meanwhile)
            meanwhile = None
            store.used = job.used
            if not job.overflowed:
                break
            if content is not None:
                raise Full
            store.grow(max(65536, total - job.pages_looked))
            job.grow(store.hashes, store.frames, store.used)
        in_place = any(t.in_place for t in targets)
        tally.process_vm_readv_pages += job.fast_pages
        tally.proc_mem_pages += job.slow_pages
        tally.unread_pages += job.unread_pages
        tally.same_frame_pages += job.known_pages
        tally.bytes_read += job.bytes
        if in_place:
            tally.in_place_pages += job.bytes // sight.page_size
        tally.forking_processes += len(job.forked_targets())
        if not sight.frames:
            tally.sharing_lost_pages = None
        elif tally.sharing_lost_pages is not None:
            tally.sharing_lost_pages += job.changed_pages
        start, count, first, which = job.runs()
        return Look(
            start,
            count,
            first,
            range_region[which] if len(which) else which,
            range_target[which] if len(which) else which,
            [int(i) for i in job.dead_targets()],
            job.counts(),
            job.counted_pages(),
            (range_region, job.range_pages()),
        )


def _once(targets: Sequence[Target], sight: Sight, *, ksmd_rests: bool) -> int:
    """Which frames are read once (`_core.ONCE_*`)."""
    if not sight.frames or any(t.in_place for t in targets):
        return 0
    ksm = ksmd_rests and sight.kpageflags
    ksm = ksm and any(np.any(t.ranges.flags & _core.RANGE_KSM) for t in targets)
    return (_core.ONCE_SHARED if len(targets) > 1 else 0) | (_core.ONCE_KSM if ksm else 0)


LOOKS: Final = {
    _core.LOOK_CHANGED: "changed",
    _core.LOOK_ZERO: "zero",
    _core.LOOK_CONSTANT: "constant",
    _core.LOOK_TEXT: "text",
    _core.LOOK_BINARY: "binary",
}


def look_like(handle: Handle, address: int, page_size: int, seed: int, digest: int) -> str | None:
    """What one page looks like now: a word, its bytes stay in the core.

    Read through /proc/PID/mem, and only if it is present: that harms nothing.

    Parameters
    ----------
    handle : Handle
    address : int
    page_size : int
    seed, digest : int
        Of the scan, and the hash that the page had then.

    Returns
    -------
    str or None
        `zero`; `constant`: 8 bytes repeated throughout; `text`: but for NUL bytes at the end, at
        least 32 bytes, 90 % of them printable ASCII, white space or well-formed UTF-8; `binary`:
        anything else; `changed`: it has not that hash any more; None where it can't be read.

    Raises
    ------
    dedup.errors.ProcessGone, dedup.errors.NotPermitted
    """
    load_hash(page_size)
    with ExitStack() as stack:
        mem = handle.open("mem")
        stack.callback(os.close, mem)
        entries = handle.open("pagemap")
        stack.callback(os.close, entries)
        return LOOKS.get(_core.look_like(mem, entries, address, page_size, seed, digest))


def look_like_in_file(fd: int, offset: int, page_size: int, seed: int, digest: int) -> str | None:
    """What one page of a file looks like, as `look_like` has it of a process."""
    load_hash(page_size)
    return LOOKS.get(_core.look_like_in_file(fd, offset, page_size, seed, digest))


def _prior_arrays(prior: Prior, targets: int) -> tuple[I64, I64, I64, I64]:
    offset = np.searchsorted(prior.target, np.arange(targets + 1)).astype(np.int64)
    return offset, prior.start, prior.count, prior.first


def _run_threads(
    job: _core.Job,
    threads: int,
    total: int,
    progress: Callable[[int, int], None] | None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Run the job in threads; the caller's thread only watches, so that Ctrl-C is heard."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            job.run()
        except BaseException as e:  # noqa: BLE001 - handed to the caller's thread below
            failures.append(e)

    if threads == 1 and progress is None and total < 65536:
        job.run()
        return
    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    try:
        for w in workers:
            _start(w)
        if meanwhile is not None:
            meanwhile()
        shown = time.monotonic()
        for w in workers:
            while w.is_alive():
                w.join(0.1)
                if progress is not None and time.monotonic() - shown > 0.1:
                    shown = time.monotonic()
                    progress(job.pages_looked, total)
    except BaseException:
        job.cancel()
        for w in workers:
            if w.ident is not None:
                w.join()
        raise
    if failures:
        raise failures[0]


def _start(worker: threading.Thread) -> None:
    try:
        worker.start()
    except RuntimeError as e:
        raise MemoryError("no room for the stack of a reading thread") from e
