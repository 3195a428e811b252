"""What is kept of one instance of a service: fingerprints of its contents, and facts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TypedDict

import numpy as np
import xxhash

from dedup.errors import NoSuchProcess, NotPermitted
from dedup.kernel import footprint, pagemap, processes
from dedup.pages import FRAME_MASK, Flag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dedup.estimate.key import Key
    from dedup.pages import I64, U64, Bool
    from dedup.scanning import Scan

    U32 = NDArray[np.uint32]
    U8 = NDArray[np.uint8]

ZERO: Final = np.uint8(1)
"""Class flag: all zero."""
CONSTANT: Final = np.uint8(2)
"""Class flag: one byte value throughout."""
CHANGES: Final = Flag.VOLATILE | Flag.NEW
LIVE: Final = "live"
UNKNOWN: Final = "unknown"
RANDOMIZED: Final = ("all", "some", "none", UNKNOWN)
MIXED: Final = "mixed"
SOURCES: Final = (LIVE, "core", "image", "criu", MIXED)
TUNABLES: Final = ("max_page_sharing", "use_zero_pages", "merge_across_nodes", "smart_scan",
                   "pages_to_scan", "sleep_millisecs")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an instance besides its contents; pages are mappings."""

    label: str
    """The service."""
    instance: str
    """Keyed hash of host, pids and start times: equal for the same instance."""
    key_id: str
    kernel: str
    page_size: int
    tunables: dict[str, int]
    processes: int
    looks: int
    scanned_pages: int
    volatile_pages: int
    """Changed between looks."""
    volatile_frames: int
    single_pages: int
    """Their content is there once."""
    frames_known: bool
    """Frame numbers were to be seen; else each mapping counts as a frame."""
    complete: bool
    drifting: bool
    extrapolated: bool
    """The steady state lay beyond the last look."""
    other_anonymous_bytes: int
    """Anonymous memory out of the scan's scope, and that of hugetlb."""
    file_bytes: int | None
    """None here and below: the source can't tell."""
    shared_memory_bytes: int | None
    page_table_bytes: int | None
    kernel_bytes: int | None
    swap_bytes: int | None
    randomized: str
    """Addresses are random: `all`, `none`, or `some` of the processes; `unknown` of files."""
    taken: str
    """Time, ISO 8601."""
    source: str = LIVE
    """What was scanned: `live`, `core`, `image`, `criu`, or `mixed`."""
    guest_bytes: int = 0
    """Of guests: QEMU's mappings that are their memory, and whole images."""
    user: str | None = None
    """Keyed hash of the user, where it has one alone."""
    cgroup: str | None = None
    """The same of the cgroup."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Contents that lasted, ascending by fingerprint; arrays of one length."""

    fingerprint: U64
    mappings: U32
    frames: U32
    """Distinct frames; of KSM pages each mapping counts as one, as it was before."""
    outside: U32
    """Frames, of these, that processes outside of the instance map too."""
    huge: U32
    """Mappings in huge pages."""
    flags: U8

    def __len__(self) -> int:
        return len(self.fingerprint)


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance: all its processes together."""

    facts: Facts
    contents: Contents
    name: str = ""
    """Of the file it came from."""


def of_scan(scan: Scan, key: Key, label: str = "") -> Instance:
    """Fingerprints of a scan that was made with the key's seed.

    Raises
    ------
    ValueError
        It was made with another, or did not read again what may be volatile.
    """
    if scan.seed != key.seed:
        raise ValueError("the scan was made with another seed than the key's")
    if scan.read_again_pages is not None:
        raise ValueError("of a scan with partial passes it is not known what is volatile")
    pages = scan.pages
    present = pages.present
    changed = present & ((pages.frames & CHANGES) != 0)
    contents = _contents(
        pages.hashes, pages.frames, present & ~changed, _outside(scan, present), key
    )
    placed = sum(p.ksm_zero_pages for p in pages.processes)
    if placed:
        contents = _with_zeros(contents, placed, _zero(pages.page_size, key))
    live = [p for p in pages.processes if p.stored is None]
    own = pages.frames[changed]
    alone = (own & (Flag.EXCLUSIVE | Flag.HIDDEN)) != 0
    shared = np.unique(own[~alone] & FRAME_MASK)
    return Instance(
        Facts(
            label=label or _label(scan),
            instance=key.tag(_identity(scan, contents)),
            key_id=key.id,
            # Files may come from anywhere: this host's kernel and tunables are not theirs.
            kernel=scan.kernel if live else "",
            page_size=pages.page_size,
            tunables={
                n: int(scan.tunables[n]) for n in TUNABLES if live and n in scan.tunables
            },
            processes=len(pages.processes),
            looks=pages.looks,
            scanned_pages=int(np.count_nonzero(present)) + placed,
            volatile_pages=int(np.count_nonzero(changed)),
            volatile_frames=int(np.count_nonzero(alone)) + len(shared),
            single_pages=int(np.count_nonzero(contents.mappings == 1)),
            frames_known=pages.frames_known,
            complete=scan.complete,
            drifting=bool(scan.drifting),
            extrapolated=scan.extrapolated,
            taken=datetime.now(UTC).isoformat(timespec="seconds"),
            source=_source(scan),
            guest_bytes=_guest_bytes(scan),
            user=_only([p.user for p in live], len(pages.processes), key),
            cgroup=_only([p.cgroup for p in live], len(pages.processes), key),
            **_rest(scan),
        ),
        contents,
    )  # fmt: skip


def _identity(scan: Scan, contents: Contents) -> str:
    """What two scans of one instance have alike: its processes, or all contents of its files.

    Pids in files may come from any host, and from containers, where all begin at 1.
    """
    pages = scan.pages
    words = [f"{p.id.pid},{p.id.start_time}" for p in pages.processes if p.stored is None]
    if pages.stored:
        digest = hashlib.blake2b(contents.fingerprint.tobytes(), digest_size=16)
        digest.update(contents.mappings.tobytes())
        words.append(digest.hexdigest())
    return " ".join(
        [processes.boot_id() if len(words) > bool(pages.stored) else "", *sorted(words)]
    )


def _source(scan: Scan) -> str:
    pages = scan.pages
    kinds = {LIVE if p.stored is None else pages.stored[p.stored].kind for p in pages.processes}
    return kinds.pop() if len(kinds) == 1 else MIXED


def _guest_bytes(scan: Scan) -> int:
    pages = scan.pages
    whole = [p.stored is not None and pages.stored[p.stored].kind == "image"
             for p in pages.processes]  # fmt: skip
    return sum(r.end - r.start for r in pages.regions if r.guest or whole[r.process])


def _only(names: Sequence[str], of: int, key: Key) -> str | None:
    """Keyed hash of the name that all have."""
    return key.tag(names[0]) if len(names) == of and len(set(names)) == 1 else None


def _label(scan: Scan) -> str:
    """The name that most of its processes have."""
    names = [p.name for p in scan.pages.processes]
    return max(names, key=names.count)


def _outside(scan: Scan, present: Bool) -> U64:
    """Frames that processes outside of the scan map too, ascending; none where root alone sees."""
    word = scan.pages.frames[present]
    mask = (word & (Flag.EXCLUSIVE | Flag.KSM | Flag.HIDDEN)) == 0
    frames, seen = np.unique(word[mask] & FRAME_MASK, return_counts=True)
    try:
        everywhere = pagemap.mappings_of(frames.astype(np.int64))
    except OSError:
        return frames[:0]
    return np.asarray(frames[everywhere > seen])


def _contents(hashes: U64, frames: U64, lasting: Bool, outside: U64, key: Key) -> Contents:
    digest, word = hashes[lasting], frames[lasting]
    order = np.argsort(digest, kind="stable")
    digest, word = digest[order], word[order]
    first = np.ones(len(digest), bool)
    first[1:] = digest[1:] != digest[:-1]
    content = np.cumsum(first) - 1
    n = int(np.count_nonzero(first))

    def count(mask: Bool | I64) -> I64:
        return np.bincount(content[mask], minlength=n)

    shared = (word & (Flag.EXCLUSIVE | Flag.KSM | Flag.HIDDEN)) == 0
    # Of a frame with several mappings the first one counts.
    at = np.flatnonzero(shared)
    numbers, which = np.unique(word[at] & FRAME_MASK, return_index=True)
    once = at[which]
    also_outside = once[np.isin(numbers, outside, assume_unique=True)]
    fingerprint = key.fingerprints(digest[first])
    ascending = np.argsort(fingerprint)
    zero = count((word & Flag.ZERO) != 0) > 0
    constant = count((word & Flag.CONSTANT) != 0) > 0
    flags = np.where(zero, ZERO, np.uint8(0)) | np.where(constant, CONSTANT, np.uint8(0))

    def column(counts: I64) -> U32:
        return counts[ascending].astype(np.uint32)

    return Contents(
        fingerprint[ascending],
        mappings=column(count(np.ones(len(word), bool))),
        frames=column(count(~shared) + count(once)),
        outside=column(count(also_outside)),
        huge=column(count((word & Flag.THP) != 0)),
        flags=flags[ascending].astype(np.uint8),
    )


def _zero(page_size: int, key: Key) -> np.uint64:
    digest = xxhash.xxh3_64_intdigest(bytes(page_size), key.seed)
    return np.uint64(key.fingerprints(np.array([digest], np.uint64))[0])


def _with_zeros(c: Contents, placed: int, fingerprint: np.uint64) -> Contents:
    """With the pages that KSM has put on the shared zero page: a scan does not find them."""
    at = int(np.searchsorted(c.fingerprint, fingerprint))
    if at == len(c) or c.fingerprint[at] != fingerprint:
        columns = {f.name: getattr(c, f.name) for f in fields(c)}
        c = Contents(**{name: np.insert(a, at, a.dtype.type(0)) for name, a in columns.items()})
        c.fingerprint[at] = fingerprint
        c.flags[at] = ZERO | CONSTANT
    c.mappings[at] += np.uint32(placed)
    c.frames[at] += np.uint32(placed)
    return c


class _Rest(TypedDict):
    other_anonymous_bytes: int
    file_bytes: int | None
    shared_memory_bytes: int | None
    page_table_bytes: int | None
    kernel_bytes: int | None
    swap_bytes: int | None
    randomized: str


def _rest(scan: Scan) -> _Rest:
    """Memory besides, of the live processes as they are now."""
    regions = scan.pages.regions
    live = [p for p in scan.pages.processes if p.stored is None]
    huge = sum(r.resident_bytes or 0 for r in regions if "ht" in r.vm_flags)
    other = huge + sum(r.anonymous_bytes for r in regions if not r.scanned)
    if not live:
        return {
            "other_anonymous_bytes": other, "file_bytes": None, "shared_memory_bytes": None,
            "page_table_bytes": None, "kernel_bytes": None, "swap_bytes": None,
            "randomized": UNKNOWN,
        }  # fmt: skip
    files: dict[str, int] = {}
    shared = tables = 0
    pids = [p.id.pid for p in live]
    random = 0
    for process in live:
        try:
            with processes.Handle(process.id.pid) as handle:
                found = footprint.read(handle)
        except (NoSuchProcess, NotPermitted):
            continue  # the scan has said so
        # Processes of one name map the same files.
        files[process.name] = max(files.get(process.name, 0), found.file_bytes)
        shared += found.shared_memory_bytes
        tables += found.page_table_bytes
        random += processes.randomized(process.id.pid)
    cgroups = {p.cgroup for p in live}
    kernel = [footprint.kernel_bytes(cgroup, pids) for cgroup in cgroups]
    known = [k for k in kernel if k is not None]
    return {
        "other_anonymous_bytes": other,
        "file_bytes": sum(files.values()),
        "shared_memory_bytes": shared,
        "page_table_bytes": tables,
        "kernel_bytes": sum(known) if len(known) == len(kernel) else None,
        "swap_bytes": sum(r.swap_bytes for r in regions),
        "randomized": {len(pids): "all", 0: "none"}.get(random, "some"),
    }
