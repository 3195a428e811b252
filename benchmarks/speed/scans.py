"""The contender: one pass of the real scan, with all that it does."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dedup import scanning
from dedup.scanning import Plan
from dedup.sources.live import LiveSource, Options, Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.pages import I64, Bool, Pages


class Timed(LiveSource):
    """A source that says how long its look took."""

    look_seconds = 0.0

    def first_look(self) -> Pages:
        """Look, with a watch."""
        begin = time.perf_counter()
        pages = super().first_look()
        self.look_seconds = time.perf_counter() - begin
        return pages

    def look_again(self, only: Bool | None = None) -> Pages:
        """Look again, with a watch."""
        begin = time.perf_counter()
        pages = super().look_again(only)
        self.look_seconds = time.perf_counter() - begin
        return pages


@dataclass(frozen=True, slots=True)
class Took:
    """One pass: seconds, those of the look alone, and what it looked at."""

    seconds: float
    look_seconds: float
    pages: int
    threads: int


def one_pass(pids: Sequence[int], threads: int = 0, span: Span | None = None) -> Took:
    """One pass over processes, or over a piece of our own memory in place.

    The same way as `dedup scan --passes 1` and `dedup.scan` go: smaps, pagemap for frames and the
    exclusive bit, the harmless reader where it is needed, the seed, grouping, the model, what
    smart scan changes, ksmd's load and its price.
    """
    source = Timed(
        [os.getpid()] if span else pids, Options(threads=threads), spans=[span] if span else ()
    )
    begin = time.perf_counter()
    scan = scanning._run(source, Plan(source.options, passes=1))
    seconds = time.perf_counter() - begin
    return Took(seconds, source.look_seconds, scan.scanned_pages, scan.tally.threads)


def spans_of(pid: int) -> tuple[I64, I64]:
    """What a scan of a process reads: start and bytes of each span."""
    pages = scanning._run(LiveSource([pid]), Plan(passes=1)).pages
    size = pages.run_count * pages.page_size
    begins = np.flatnonzero(np.append(True, pages.run_start[1:] != (pages.run_start + size)[:-1]))
    return pages.run_start[begins], np.add.reduceat(size, begins)


def two_looks(pid: int, threads: int, *, partial_passes: bool) -> tuple[float, float]:
    """Seconds of `dedup scan --passes 2` without a wait between, and those of the second look."""
    source = Timed([pid], Options(threads=threads))
    plan = Plan(source.options, passes=2, interval_seconds=0, partial_passes=partial_passes)
    begin = time.perf_counter()
    scanning._run(source, plan)
    return time.perf_counter() - begin, source.look_seconds
