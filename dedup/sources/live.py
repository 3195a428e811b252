"""Pages of live processes, in one look or several.

A scan never changes its target: only present pages are read, sharing stays, nothing stops.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from dedup import _core
from dedup.errors import (
    DedupError,
    NoSuchProcess,
    NotPermitted,
    OutputFailed,
    ProcessGone,
)
from dedup.kernel import family, maps, memory, numa, pagemap, processes, shortage
from dedup.kernel import ksm as ksm_interface
from dedup.model import guests
from dedup.model.eligibility import why_not
from dedup.pages import FRAME_MASK, Flag, Pages, Process, Region, Skipped
from dedup.sources import mappings, ranges, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from dedup.kernel.pagemap import Sight
    from dedup.kernel.processes import Handle
    from dedup.pages import I64, Bool, Groups
    from dedup.sources.files import Source

Scope = Literal["compatible", "advised"]

BATCH_PROCESSES: Final = 128
BATCH_BYTES: Final = 4 << 30


@dataclass(slots=True)
class Options:
    """How to scan."""

    scope: Scope = "compatible"
    threads: int = 0
    """0: the cores that we may use."""
    seed: int | None = None
    """Of the hash; None draws one, so that collisions can't be prepared in advance."""
    marked: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict)
    """Processes by pid of which, whatever the scope, only mergeable mappings count and these
    ranges: first address and the one behind the last, page aligned."""
    sample: float | None = None
    """Part of the frames to read, above 0 and below 1; None reads all."""
    content: memory.Content | None = None
    """Of a sample by content, what the first look keeps besides `sample`, of all that it reads."""
    progress: Callable[[str, int, int], None] | None = None
    """Called with what is under way, done and total."""
    meanwhile: Callable[[], None] | None = None
    """Called while the first look reads, if it does in threads."""


@dataclass(slots=True)
class Span:
    """A piece of our own memory to scan: bytes, page aligned."""

    start: int
    length: int


@dataclass(slots=True)
class LiveSource:
    """Looks at processes, once or more, into one `Pages`.

    Parameters
    ----------
    pids : sequence of int
    options : Options
    spans : sequence of Span, optional
        Pieces of our own memory, hashed in place; then `pids` is empty.
    sources : sequence of Source, optional
        Memory in files, which stays as it is from look to look.
    """

    pids: Sequence[int]
    options: Options = field(default_factory=Options)
    spans: Sequence[Span] = ()
    sources: Sequence[Source] = ()
    sight: Sight = field(default_factory=pagemap.sight)
    tally: memory.Tally = field(default_factory=memory.Tally)
    pages: Pages | None = None
    seed: int = 0
    counts: dict[int, I64] = field(default_factory=dict)
    """Of a sample, `_core.COUNTS` of all pages present at the last look, by process (index)."""
    counted: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    """Of a sample by content, pages of each content that was counted, at the first look."""
    _store: memory.Store | None = None
    _index: dict[int, int] = field(default_factory=dict)
    _chosen: set[int] = field(default_factory=set)
    _memories: dict[tuple[bytes, ...], list[int]] = field(default_factory=dict)
    """Processes by what those of one address space have in common, in the kernel's order."""
    _programs: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    _known_regions: dict[tuple[int, int], int] = field(default_factory=dict)
    _failures: list[DedupError] = field(default_factory=list)
    _ended: set[int] = field(default_factory=set)
    """Processes (indices) that ended during the scan: none of their pages counts."""
    _runs: list[tuple[I64, I64, I64, I64]] = field(default_factory=list)
    _stored: slice = field(default_factory=lambda: slice(0))
    """Pages that lie in files."""
    _only: Bool | None = None
    """Pages that the look under way reads."""
    _uncounted: list[int] = field(default_factory=list)
    """Regions (indices) whose sizes the look under way tells."""

    @property
    def lost_any(self) -> bool:
        """Whether a process ended since the first look: the looks are not of the same memory."""
        return bool(self._ended)

    @property
    def in_files(self) -> slice:
        """Pages (indices) that lie in files: looked at once."""
        return self._stored

    @property
    def ended(self) -> frozenset[int]:
        """Processes (indices) that ended since the first look."""
        return frozenset(self._ended)

    def require_any(self) -> None:
        """Raise `ProcessGone` where nothing is left: all processes ended since the first look."""
        if self.pages is not None and self._ended and len(self._ended) == len(self.pages.processes):
            raise ProcessGone(
                f"all {len(self._ended)} processes ended during the scan",
                "choose processes that go on, or look once: `--passes 1`",
            )

    @shortage.needed("read the pages")
    def first_look(self) -> Pages:
        """Look for the first time.

        Raises
        ------
        NoSuchProcess, NoMemory, NotPermitted
            The only process chosen, or all of them, can't be scanned.
        """
        self.seed = secrets.randbits(64) if self.options.seed is None else self.options.seed
        pages = Pages(
            page_size=self.sight.page_size,
            hashes=np.empty(0, np.uint64),
            frames=np.empty(0, np.uint64),
            run_start=np.empty(0, np.int64),
            run_count=np.empty(0, np.int64),
            run_first=np.empty(0, np.int64),
            run_region=np.empty(0, np.int64),
            regions=[],
            processes=[],
            frames_known=self.sight.frames,
            huge_known=self.sight.kpageflags or self.sight.pagemap_scan,
            huge_pages=max(1, self.sight.huge_bytes // self.sight.page_size),
            nodes=numa.nodes(),
        )
        self.pages = pages
        self._each_batch(list(self.pids), first=True)
        if not pages.processes and self._failures:
            raise self._failures[0]
        if self.sources:
            self._add_stored(pages)
        self._finish(pages)
        return pages

    def _add_stored(self, pages: Pages) -> None:
        """Add memory in files, as processes behind the live ones."""
        # Of such pages none is known; a model that knows some frames would take them for others.
        pages.frames_known = pages.huge_known = False
        if self._store is None:
            self._store = memory.Store.of(0)
        self.tally.hash_source = memory.load_hash(self.sight.page_size)
        self.tally.threads = self.options.threads or memory.default_threads()
        before = self._store.used
        self._runs.append(
            stored.add(
                self.sources,
                pages,
                self._store,
                self.seed,
                self.tally,
                advised_only=self.options.scope == "advised",
                progress=self.options.progress,
            )
        )
        self._stored = slice(before, self._store.used)

    @shortage.needed("read the pages again")
    def look_again(self, only: Bool | None = None) -> Pages:
        """Look once more: pages whose content differs become volatile.

        Parameters
        ----------
        only : bool array, optional
            Which of the pages known at the first look to read, the same ones at each later look.
            Of the others pagemap tells whether they are there; pages that come are new, and stay
            so, since nobody knows what they hold.

        Raises
        ------
        ProcessGone
            The only process chosen has ended.
        """
        pages = self.pages
        if pages is None or self._store is None:
            raise RuntimeError("look_again before first_look")
        self._only = only
        old = Flag.SEEN if only is not None else Flag.SEEN | Flag.NEW
        self._store.frames[: self._store.used] &= ~old
        self._store.frames[self._stored] |= Flag.SEEN
        self._each_batch([p.id.pid for p in pages.processes if p.stored is None], first=False)
        frames = self._store.frames[: self._store.used]
        unseen = (frames & Flag.SEEN) == 0
        frames[unseen] |= Flag.GONE
        seen = ~unseen
        frames[seen] &= ~Flag.GONE
        pages.looks += 1
        self._finish(pages)
        return pages

    def _finish(self, pages: Pages) -> None:
        """Take over what the store holds, runs in (process, address) order."""
        store = self._store
        if store is None:
            return
        pages.hashes = store.hashes[: store.used]
        pages.frames = store.frames[: store.used]
        if not self._runs:
            return
        start, count, first, region = (np.concatenate(p) for p in zip(*self._runs, strict=True))
        process = pages.process_of_region()[region]
        order = np.lexsort((start, process))
        pages.run_start, pages.run_count = start[order], count[order]
        pages.run_first, pages.run_region = first[order], region[order]
        self._runs = [(pages.run_start, pages.run_count, pages.run_first, pages.run_region)]
        for r in np.flatnonzero(np.isin(process[order], list(self._ended))).tolist():
            first_page = int(pages.run_first[r])
            pages.frames[first_page : first_page + int(pages.run_count[r])] |= Flag.GONE

    def _each_batch(self, pids: list[int], *, first: bool) -> None:
        """Open, look and close, some processes at a time, so that descriptors stay few."""
        if self.spans:
            pids = [os.getpid()]
        pages = self.pages
        assert pages is not None
        if not pids:
            return
        processes.require_own_proc()
        at = 0
        parents = family.Parents(0 if self.spans else len(pids))
        merging = ksm_interface.Ksm().running
        while at < len(pids):
            handles: list[Handle] = []
            size = 0
            try:
                while at < len(pids) and len(handles) < BATCH_PROCESSES and size < BATCH_BYTES:
                    pid = pids[at]
                    at += 1
                    try:
                        handle = processes.of_process(pid)
                    except NoSuchProcess as e:
                        self._leave_out(pid, e)
                        continue
                    if first and self._seen(handle):
                        handle.close()
                        continue
                    handles.append(handle)
                    size += handle.info.anonymous_bytes
                self._batch(handles, parents, merging=merging, first=first)
            finally:
                for handle in handles:
                    handle.close()
            if self.options.progress is not None:
                self.options.progress("processes", at, len(pids))

    def _seen(self, handle: Handle) -> bool:
        """Whether this process's memory is that of another one chosen: a thread's, a vfork's.

        KSM follows an address space once, however many processes run in it.
        """
        info = handle.info
        if handle.pid in self._chosen:
            return True
        self._chosen.add(handle.pid)
        if info.kernel_thread or info.state in {"Z", "X"} or self.spans:
            return False
        return processes.joins(handle.pid, self._memories.setdefault(info.program, []))

    def _batch(
        self, handles: Sequence[Handle], parents: family.Parents, *, merging: bool, first: bool
    ) -> None:
        targets: list[memory.Target] = []
        anonymous = 0
        try:
            for handle in handles:
                try:
                    target, room = self._target(handle, parents, merging=merging, first=first)
                except DedupError as e:
                    self._leave_out(handle.pid, e)
                    continue
                targets.append(target)
                anonymous += room
            self._look(targets, anonymous, merging=merging, first=first)
        finally:
            for target in targets:
                target.close()

    def _look(
        self, targets: Sequence[memory.Target], anonymous: int, *, merging: bool, first: bool
    ) -> None:
        """Look at opened targets, with so many pages to expect."""
        pages = self.pages
        assert pages is not None
        content = self.options.content
        if self._store is None and content is not None:
            self._store = memory.Store.of(content.room)
            self.counted = np.zeros(len(content.counted), np.int64)
        elif self._store is None:
            # Room for this batch and, by a guess, those to come; untouched room is free.
            self._store = memory.Store.of(anonymous + anonymous // 8 + 65536)
        elif not first or content is not None:
            pass
        elif self._store.hashes.shape[0] - self._store.used < anonymous:
            self._store.grow(anonymous + anonymous // 8 + 65536)
        if not targets:
            return
        prior = None if first else self._prior(pages, targets)
        progress = self.options.progress
        found = memory.look(
            targets,
            self._store,
            self.seed,
            self.options.threads or memory.default_threads(),
            self.sight,
            self.tally,
            prior,
            None if progress is None else lambda done, total: progress("pages", done, total),
            self.options.sample,
            self._only,
            content,
            ksmd_rests=not merging,
            meanwhile=self.options.meanwhile if first else None,
        )
        self._tell_sizes(*found.present)
        if first and content is not None:
            self.counted += found.counted
        for i, target in enumerate(targets):
            self.counts[self._index[target.handle.pid]] = found.counts[i]
        for i, target in enumerate(targets):
            if i in found.dead:
                pid = target.handle.pid
                ended = ProcessGone(f"process {pid} ended during the scan")
                self._leave_out(
                    pid, _another_program(target.handle) if target.handle.alive() else ended
                )
        self._runs.append((found.start, found.count, found.first, found.region))

    def _target(
        self, handle: Handle, parents: family.Parents, *, merging: bool, first: bool
    ) -> tuple[memory.Target, int]:
        """The ranges of a process to read, and how many pages to expect."""
        pages = self.pages
        assert pages is not None
        handle.require_memory()
        if not first:
            known = pages.processes[self._index[handle.pid]]
            if known.id != handle.id:
                raise ProcessGone(f"process {handle.pid} ended; its pid is another one's now")
            if self._programs[handle.pid] != handle.info.program:
                raise _another_program(handle)
        counters = ksm_interface.process_counters(handle)
        whole = self.options.scope == "compatible" and handle.pid not in self.options.marked
        within = (
            (min(s.start for s in self.spans), max(s.start + s.length for s in self.spans))
            if self.spans
            else maps.EVERYWHERE
        )
        found = mappings.of(handle, counters, self.sight, countable=whole, within=within)
        advised = any("mg" in m.vm_flags for m in found)
        # A fork or a running ksmd between pagemap and read would cost the target its sharing:
        # no fast path where either is likely.
        fast = not (merging and (advised or bool(counters and counters.ksm_mergeable)))
        fast = fast and handle.pid not in parents and handle.info.reaped_faults == 0
        target = memory.Target(handle, fast, in_place=bool(self.spans))
        process = self._process_index(handle, counters)
        target.open()
        try:
            assert target.files is not None
            if not handle.same_program():
                raise _another_program(handle)  # these files are of its memory, the mappings not
            chooser = ranges.Chooser(self.sight)
            for m, region in self._regions(process, found):
                chooser.add(region, m, self._region_index(region, m))
            target.ranges = chooser.ranges(target.files[1])
            if first and guests.is_qemu(handle.info.name):
                self._mark_guest(handle, process)
        except OSError as e:
            target.close()
            raise self._scan_error(e, handle) from e
        except BaseException:
            target.close()
            raise
        return target, chooser.pages

    def _mark_guest(self, handle: Handle, process: int) -> None:
        """Mark the memory of the guest that a QEMU runs."""
        pages = self.pages
        assert pages is not None
        words = [os.fsdecode(word) for word in handle.read("cmdline").split(b"\0")]
        own = {i: r for i, r in enumerate(pages.regions) if r.process == process}
        found = guests.memories([*own.values()], words)
        for i, region in own.items():
            if any(region is memory for memory in found):
                pages.regions[i] = region._replace(guest=True)

    def _process_index(self, handle: Handle, counters: ksm_interface.ProcessCounters | None) -> int:
        pages = self.pages
        assert pages is not None
        info = handle.info
        if handle.pid in self._index:
            index = self._index[handle.pid]
            pages.processes[index] = replace(pages.processes[index], pinned_bytes=info.pinned_bytes)
            return index
        self._index[handle.pid] = len(pages.processes)
        self._programs[handle.pid] = info.program
        pages.processes.append(
            Process(
                id=handle.id,
                name=info.name,
                user=info.user,
                cgroup=info.cgroup,
                unit=info.unit,
                ksm_zero_pages=counters.ksm_zero_pages if counters else 0,
                ksm_rmap_items=counters.ksm_rmap_items if counters else 0,
                pinned_bytes=info.pinned_bytes,
            )
        )
        return self._index[handle.pid]

    def _regions(
        self, process: int, found: Iterable[maps.Mapping]
    ) -> Iterable[tuple[maps.Mapping, Region]]:
        """The region of each mapping, or, for spans of our own memory, its parts inside them."""
        assert self.pages is not None
        marked = self.options.marked.get(self.pages.processes[process].id.pid)
        all_compatible = self.options.scope == "compatible"
        spans = [(span.start, span.start + span.length) for span in self.spans]
        for m in found:
            why = why_not(m.vm_flags, m.name)
            advised = "mg" in m.vm_flags
            scanned = not why and (advised or all_compatible)
            # By position: for many mappings it counts.
            whole = Region(
                process, m.start, m.end, m.perms, m.name, m.vm_flags, not why, why, advised,
                scanned, m.anonymous_bytes, m.anon_huge_bytes, m.swap_bytes, m.ksm_bytes or 0,
                m.resident_bytes, True, False, m.shared_bytes or 0,
            )  # fmt: skip
            if spans:
                for part in _inside(whole, spans):
                    yield m, part
            elif marked is None or why or advised:
                yield m, whole
            else:
                inside = list(_inside(whole._replace(scanned=True), marked))
                for part in inside or [whole._replace(scanned=False)]:
                    yield m, part

    def _region_index(self, region: Region, m: maps.Mapping) -> int:
        pages = self.pages
        assert pages is not None
        index = self._known_regions.setdefault((region.process, region.start), len(pages.regions))
        if index == len(pages.regions):
            pages.regions.append(region)
            if not m.counted:
                self._uncounted.append(index)
        return index

    def _tell_sizes(self, region: I64, present: I64) -> None:
        """Tell the sizes of regions that the look was the first to count.

        Parameters
        ----------
        region, present : int64 arrays
            A region (index) and its pages, for each range looked at.
        """
        pages = self.pages
        assert pages is not None
        if not self._uncounted:
            return
        found = np.bincount(region, present, len(pages.regions))
        for i in self._uncounted:
            size = int(found[i]) * pages.page_size
            pages.regions[i] = pages.regions[i]._replace(anonymous_bytes=size, resident_bytes=size)
        self._uncounted.clear()

    def _scan_error(self, e: OSError, handle: Handle) -> DedupError:
        if e.errno in {errno.ESRCH, errno.ENOENT} or not handle.alive():
            return ProcessGone(f"process {handle.pid} has ended")
        return OutputFailed(f"PAGEMAP_SCAN of process {handle.pid} failed: {e.strerror}", "")

    def _prior(self, pages: Pages, targets: Sequence[memory.Target]) -> memory.Prior:
        """The runs known for these targets."""
        process = pages.process_of_region()[pages.run_region]
        by_process = {self._index[t.handle.pid]: i for i, t in enumerate(targets)}
        lookup = np.full(len(pages.processes), -1, np.int64)
        for p, i in by_process.items():
            lookup[p] = i
        which = lookup[process] if len(process) else process
        keep = np.flatnonzero(which >= 0)
        keep = keep[np.lexsort((pages.run_start[keep], which[keep]))]
        return memory.Prior(
            which[keep],
            np.ascontiguousarray(pages.run_start[keep]),
            np.ascontiguousarray(pages.run_count[keep]),
            np.ascontiguousarray(pages.run_first[keep]),
        )

    def _leave_out(self, pid: int, e: DedupError) -> None:
        """Note a process that can't be scanned; raise when it is the only one chosen."""
        pages = self.pages
        assert pages is not None
        if not isinstance(e, (NoSuchProcess, NotPermitted)) or len(self.pids) <= 1:
            raise e
        self._failures.append(e)
        if not any(s.pid == pid for s in pages.skipped):
            pages.skipped.append(Skipped(pid, e.message, e.code))
        if pid in self._index:
            self._ended.add(self._index[pid])


def _another_program(handle: Handle) -> ProcessGone:
    return ProcessGone(
        f"process {handle.pid} ({handle.info.name}) started another program during the scan",
        "scan it again",
    )


def _inside(region: Region, ranges: Iterable[tuple[int, int]]) -> Iterable[Region]:
    """The parts of a region that lie in ranges."""
    for first, last in ranges:
        start, end = max(region.start, first), min(region.end, last)
        if start < end:
            yield region._replace(start=start, end=end)


def mark_outside(pages: Pages, groups: Groups, sight: Sight, threads: int = 1) -> None:
    """Mark duplicates whose frame is mapped by processes outside the scan too.

    Such a frame stays when our mappings of it merge elsewhere. Only root can see it.

    Parameters
    ----------
    pages : Pages
    groups : Groups
        Of these pages, just grouped.
    sight : Sight
    threads : int, optional
        That ask the kernel.
    """
    if not sight.kpagecount:
        return
    known = Flag.EXCLUSIVE | Flag.KSM | Flag.HIDDEN
    mask = Flag.DUPLICATE | known
    if not groups.census.of(mask, Flag.DUPLICATE):
        return
    value, frames = Flag.DUPLICATE, pages.frames
    one = len(pages.processes) == 1
    if one and sight.pagemap_scan:
        # Its pages have a frame each, KSM pages apart: what is not exclusive is mapped elsewhere.
        _core.put(frames, mask | Flag.THP, value, Flag.OUTSIDE)
        # The mark of a huge page says less (`ranges.Chooser.add`).
        mask, value = mask | Flag.THP, value | Flag.THP
        if not groups.census.of(mask, value):
            return
        if pages.looks == 1:
            _mark_shared_throughout(pages, mask, value)
            mask |= Flag.OUTSIDE
    # By frame number, so that the frames of a huge page are asked for at once.
    for frame, index in groups.by_frame(frames, mask, value):
        at = np.flatnonzero(np.diff(frame, prepend=-1))
        seen = np.diff(at, append=len(frame))
        outside = pagemap.mappings_of(frame[at], threads=threads) > (1 if one else seen)
        frames[index[np.repeat(outside, seen)]] |= Flag.OUTSIDE


def _mark_shared_throughout(pages: Pages, mask: np.uint64, value: np.uint64) -> None:
    """Mark pages of huge pages in regions all of whose pages others map too, as smaps said.

    To ask for the mappings of each page takes far longer. Asked for is one page of each huge page:
    should any not be shared, smaps is out of date, and nothing is marked.

    Source: fs/proc/task_mmu.c (smaps_account), fs/proc/page.c (get_kpage_count): both go by the
    mappings of the page, or, without CONFIG_PAGE_MAPCOUNT, by those of the huge page.
    """
    through = np.array([r.shared_throughout for r in pages.regions], bool)
    if not through.any():
        return
    runs = through[pages.run_region]
    first, count = pages.run_first[runs], pages.run_count[runs]
    one_of_each = _core.block_heads(pages.frames, first, count, mask, value, pages.huge_pages)
    frame = (pages.frames[one_of_each] & FRAME_MASK).astype(np.int64)
    if (pagemap.mappings_of(frame) > 1).all():
        _core.put_in_runs(pages.frames, first, count, mask, value, Flag.OUTSIDE)


def wait_until(moment: float, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Wait for a moment of the monotonic clock, telling how long it takes."""
    begin = time.monotonic()
    while (left := moment - time.monotonic()) > 0:
        if progress is not None:
            whole = moment - begin
            progress("waiting", int((whole - left) * 10), int(whole * 10))
        time.sleep(min(left, 0.1))
