"""Our own arrays: madvise, wait, verify; unmerged at exit."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from dedup.change import verify, wait
from dedup.change.tunables import Tunables
from dedup.errors import Busy, KsmNotRunning, NotMergeable, NotPermitted
from dedup.kernel import advise, maps, pagemap, shortage
from dedup.kernel import ksm as ksm_interface
from dedup.kernel.ksm import RUN_MERGE, Ksm
from dedup.kernel.processes import Handle
from dedup.scanning import Plan, Scan, scan_spans
from dedup.sources.live import Options, Span

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from dedup.kernel.ksm import ProcessCounters
    from dedup.kernel.maps import Mapping

PAGES_TO_SCAN: Final = 20_000
SLEEP_MILLISECS: Final = 4
"""Of a ksmd that we start ourselves for the time of the wait."""

FIGURES: Final = ("ksm_rmap_items", "ksm_zero_pages", "ksm_merging_pages")


@dataclass(frozen=True, slots=True)
class Piece:
    """The whole pages of an array: what can merge."""

    span: Span
    left_out_bytes: int
    """At both ends: parts of pages that other data share."""


def piece_of(array: Any) -> Piece:
    """Whole pages of an array or another buffer.

    Raises
    ------
    NotMergeable
        The data is not in one piece, or has no whole page.
    """
    size = pagemap.sight().page_size
    if isinstance(array, np.ndarray):
        if not (array.flags.c_contiguous or array.flags.f_contiguous):
            raise NotMergeable(
                "the array is not contiguous: its bytes lie among others",
                "merge the array that owns the memory (`array.base`), or a copy",
            )
        start, length = array.__array_interface__["data"][0], array.nbytes
    else:
        try:
            flat = np.frombuffer(array, np.uint8)
        except (TypeError, ValueError, BufferError) as e:
            raise NotMergeable(
                f"a {type(array).__name__} is no array or buffer in one piece ({e})",
                "give NumPy arrays, or buffers such as mmap and bytearray",
            ) from e
        start, length = flat.__array_interface__["data"][0], flat.nbytes
    first = -(-start // size) * size
    last = (start + length) // size * size
    if last <= first:
        raise NotMergeable(
            f"the array ({length} bytes) has no whole page of {size} bytes",
            "KSM merges whole pages: use it on arrays of many pages",
        )
    return Piece(Span(first, last - first), length - (last - first))


class Merge:
    """Arrays of ours, made mergeable for the time of a `with` block.

    Parameters
    ----------
    arrays : sequence
        NumPy arrays, or other buffers in one piece. Whole pages inside them take part.
    wait_seconds : float
        For ksmd, at the most.

    Attributes
    ----------
    scan : Scan
        Of the arrays, before.
    predicted, actual, difference : dict of str to int
        Figures of this process's ksm_stat that the arrays account for, in pages.
    left_out_bytes : int
        Parts of pages at the arrays' ends.
    full_scans : int
    seconds : float
        What ksmd took.
    """

    def __init__(self, arrays: Sequence[Any], wait_seconds: float = 60.0) -> None:
        self._arrays = arrays  # kept alive until the end
        self._pieces = [piece_of(a) for a in arrays]
        self._wait_seconds = wait_seconds
        self._advised: list[Span] = []
        self.left_out_bytes = sum(p.left_out_bytes for p in self._pieces)
        self.scan: Scan
        self._comparison: verify.Comparison | None = None
        self.full_scans = 0
        self.seconds = 0.0

    @property
    def comparison(self) -> verify.Comparison:
        """Comparison: predicted and actual figures, once the block is entered."""
        if self._comparison is None:
            raise RuntimeError("nothing is merged before `with dedup.merge(...) as merged:`")
        return self._comparison

    @property
    def predicted(self) -> dict[str, int | None]:
        """dict: figures as predicted."""
        return self.comparison.predicted

    @property
    def actual(self) -> dict[str, int]:
        """dict: figures as counted."""
        return self.comparison.actual

    @property
    def difference(self) -> dict[str, int]:
        """dict: actual less predicted, all 0 where the prediction holds."""
        return self.comparison.difference

    @shortage.needed("merge the arrays")
    def __enter__(self) -> Self:
        ksm = Ksm()
        ksm.require()
        spans = [p.span for p in self._pieces]
        with Handle(os.getpid()) as handle:
            mappings = maps.read(handle)
            before = _own(handle)
        if before.ksm_mergeable or before.ksm_merge_any:
            raise NotMergeable(
                "this process has mergeable memory already, whose pages its counters would count "
                "among the arrays'",
                "merge all arrays at once: `dedup.merge(a, b)`; under `dedup run` all memory is "
                "mergeable without it",
            )
        fresh = [s for piece in spans for s in _mergeable_parts(piece, mappings)]
        with ExitStack() as stack:
            self._ready_ksmd(ksm, stack)
            self.scan = scan_spans(spans, Plan(options=Options(), interval_seconds=0.1))
            try:
                for span in fresh:
                    self._advised.append(span)
                    advise.mergeable(span.start, span.length)
                done = wait.converge(ksm, self._wait_seconds, settled=lambda: _figures(_own()))
            except BaseException:
                self._unmerge()
                raise
            self.full_scans, self.seconds = done.full_scans, done.seconds
        after = _own()
        prediction = self.scan.prediction.processes[0]
        self._comparison = verify.Comparison(
            {
                "ksm_rmap_items": prediction.ksm_rmap_items,
                "ksm_zero_pages": (prediction.ksm_zero_pages or 0) - before.ksm_zero_pages,
                "ksm_merging_pages": prediction.ksm_merging_pages,
            },
            # Nothing else of this process is mergeable; what an earlier merge left is stale.
            {
                "ksm_rmap_items": after.ksm_rmap_items,
                "ksm_zero_pages": after.ksm_zero_pages - before.ksm_zero_pages,
                "ksm_merging_pages": after.ksm_merging_pages,
            },
            prediction.bounds,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._unmerge()
        self._forget()

    def _forget(self) -> None:
        """Have a resting ksmd drop what it noted of our pages, so that its counters are true."""
        ksm = Ksm()
        if not ksm.writable() or ksm.running:
            return
        with ExitStack() as stack:
            try:
                tunables = stack.enter_context(Tunables(ksm))
            except Busy:
                return  # another run of ours has ksmd at work: that one drops it
            _run_quickly(ksm, tunables)
            end = time.monotonic() + self._wait_seconds
            while _own().ksm_rmap_items and time.monotonic() < end:
                time.sleep(wait.POLL_SECONDS)

    def _unmerge(self) -> None:
        while self._advised:
            span = self._advised.pop()
            advise.unmergeable(span.start, span.length)

    def _ready_ksmd(self, ksm: Ksm, stack: ExitStack) -> None:
        """Smart scan off and ksmd running for the time of the wait, where we may."""
        running = ksm.running
        if not ksm.writable():
            if not running:
                raise KsmNotRunning(
                    "ksmd is not running, and we may not start it",
                    "as root: `echo 1 > /sys/kernel/mm/ksm/run`",
                )
            return
        tunables = stack.enter_context(Tunables(ksm))
        if "smart_scan" in ksm.tunables():
            tunables.set("smart_scan", 0)
        if not running:
            _run_quickly(ksm, tunables)


def merge(*arrays: Any, wait_seconds: float = 60.0) -> Merge:
    """Merge arrays of this process for the time of a `with` block.

    Entering predicts, advises the kernel, waits for ksmd and compares; leaving unmerges. Advising
    needs no root. Where ksmd rests, root has it run for the time of the wait, with quick tunables
    that are journalled and put back. Huge pages among the arrays' split where they merge; their
    advice stays as it is.

    Parameters
    ----------
    *arrays : array_like
        NumPy arrays, or other buffers in one piece; only whole pages take part.
    wait_seconds : float
        For ksmd, at the most.

    Returns
    -------
    Merge
        A context manager.

    Raises
    ------
    NotMergeable
        Shared memory, no whole page, not in one piece; on entering: the process has other
        mergeable memory, whose pages can't be told apart.
    KsmNotRunning
        On entering: ksmd rests and we may not start it.
    CheckFailed
        On entering: ksmd did not converge in time.

    Examples
    --------
    >>> with dedup.merge(array) as merged:  # doctest: +SKIP
    ...     merged.difference
    {'ksm_rmap_items': 0, 'ksm_zero_pages': 0, 'ksm_merging_pages': 0}
    """
    if not arrays:
        raise NotMergeable("no array was given", "`dedup.merge(array)`")
    return Merge(arrays, wait_seconds)


def _mergeable_parts(span: Span, mappings: Sequence[Mapping]) -> list[Span]:
    """Parts of a span not mergeable yet; those that are stay so at the end.

    Raises
    ------
    NotMergeable
        KSM would not take it.
    """
    from dedup.model.eligibility import why_not

    end = span.start + span.length
    parts = []
    for m in mappings:
        first, last = max(m.start, span.start), min(m.end, end)
        if first >= last:
            continue
        why = why_not(m.vm_flags, m.name)
        if why:
            raise NotMergeable(
                f"KSM does not take this array's memory: {why}",
                "copy it into an ordinary array first: `array.copy()`",
            )
        if "mg" not in m.vm_flags:
            parts.append(Span(first, last - first))
    return parts


def _run_quickly(ksm: Ksm, tunables: Tunables) -> None:
    if "advisor_mode" in ksm.tunables():
        tunables.set("advisor_mode", "none")
    tunables.set("pages_to_scan", PAGES_TO_SCAN)
    tunables.set("sleep_millisecs", SLEEP_MILLISECS)
    tunables.set("run", RUN_MERGE)


def _own(handle: Handle | None = None) -> ProcessCounters:
    if handle is None:
        with Handle(os.getpid()) as own:
            return _own(own)
    counters = ksm_interface.process_counters(handle)
    if counters is None:
        raise NotPermitted(
            "this kernel does not show /proc/self/ksm_stat", "it needs Linux 6.1 or later"
        )
    return counters


def _figures(c: ProcessCounters) -> tuple[int, ...]:
    return tuple(getattr(c, n) for n in FIGURES)
