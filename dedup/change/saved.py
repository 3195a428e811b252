"""What KSM saves a command and its descendants, by readings of ksm_stat while they live.

Once a process has ended its counters are gone, so the last reading is from before the end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dedup.errors import NoSuchProcess, NotPermitted, OutputFailed, Unsupported
from dedup.kernel import family
from dedup.kernel.ksm import PAGE_BYTES, RMAP_ITEM_BYTES, Ksm, process_counters
from dedup.kernel.ksmd import Ksmd
from dedup.kernel.processes import Handle

if TYPE_CHECKING:
    from dedup.pages import ProcessId

INTERVAL_SECONDS: Final = 0.15
CPU_SHARE: Final = 50
"""The pause after a reading is so many times its CPU at least: 2 % of a core at most."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Sums over the processes; pages, or bytes where the name says so."""

    ksm_merging_pages: float = 0
    ksm_zero_pages: float = 0
    ksm_rmap_items: float = 0
    ksm_process_profit: float = 0
    """Bytes. It counts the frames that stay, too."""
    saved_low_bytes: float = 0
    """Where each merged frame that stays on this host is one of theirs."""
    saved_high_bytes: float = 0
    """Where none is: others would keep them all the same. Equal to the low one when alone."""

    @property
    def records_bytes(self) -> float:
        """Memory of the rmap_items: 64 bytes for each page that ksmd follows."""
        return self.ksm_rmap_items * RMAP_ITEM_BYTES

    def over(self, seconds: float) -> Figures:
        """Each divided by a time."""
        return Figures(*(getattr(self, n) / seconds for n in NAMES))

    def plus(self, other: Figures, times: float = 1) -> Figures:
        """Each with the other's, so many times, added."""
        return Figures(*(getattr(self, n) + getattr(other, n) * times for n in NAMES))


NAMES: Final = tuple(Figures.__slots__)


@dataclass(slots=True)
class Saved:
    """What the readings came to."""

    seconds: float
    """From the first moment to the end."""
    readings: int
    peak: Figures
    """At the reading that saved most."""
    mean: Figures
    """By time: each reading counts until the next one."""
    last: Figures
    last_seconds_before_end: float
    processes_seen: int
    processes_most: int
    """At one time."""
    hidden: int
    """Whose counters the kernel does not show to us."""
    alone: bool
    """Nobody else used KSM at any reading."""
    ksmd_cpu_seconds: float | None
    """ksmd's, for everybody; None where ksmd is not in sight."""


@dataclass(slots=True)
class _Now:
    figures: Figures
    processes: int
    alone: bool


class Watch:
    """Read now and then, and sum up.

    Parameters
    ----------
    root : int
        Whose descendants are meant, itself left out.
    ksm : Ksm, optional
    """

    def __init__(self, root: int, ksm: Ksm | None = None) -> None:
        self._root = root
        self._ksm = Ksm() if ksm is None else ksm
        self._began = self._at = time.monotonic()
        self._due = self._began
        self._last = Figures()
        self._sum = Figures()
        self._peak: Figures | None = None
        self._readings = 0
        self._most = 0
        self._alone = True
        self._seen: set[ProcessId] = set()
        self._hidden: set[ProcessId] = set()
        self._ksmd = _ksmd()
        self._ksmd_began_ns = self._ksmd.cpu_ns() if self._ksmd else 0

    def wait_seconds(self) -> float:
        """How long until the next reading is due."""
        return max(0.0, self._due - time.monotonic())

    def look(self) -> None:
        """Read, if a reading is due."""
        begin = time.monotonic()
        if begin < self._due:
            return
        cpu = time.thread_time()
        now = self._read()
        cpu = time.thread_time() - cpu
        self._due = time.monotonic() + max(INTERVAL_SECONDS, cpu * CPU_SHARE)
        if not now.processes and self._readings:
            return  # all ended: the reading before is the last one
        self._sum = self._sum.plus(self._last, begin - self._at)
        self._at, self._last = begin, now.figures
        self._readings += 1
        self._most = max(self._most, now.processes)
        self._alone = self._alone and now.alone
        if self._peak is None or now.figures.saved_low_bytes > self._peak.saved_low_bytes:
            self._peak = now.figures

    def end(self) -> Saved:
        """The command has ended: what it came to."""
        end = time.monotonic()
        seconds = end - self._began
        whole = self._sum.plus(self._last, end - self._at)
        return Saved(
            seconds=seconds,
            readings=self._readings,
            peak=self._peak or Figures(),
            mean=whole.over(seconds) if seconds else self._last,
            last=self._last,
            last_seconds_before_end=end - self._at,
            processes_seen=len(self._seen),
            processes_most=self._most,
            hidden=len(self._hidden),
            alone=self._alone,
            ksmd_cpu_seconds=(self._ksmd.cpu_ns() - self._ksmd_began_ns) / 1e9
            if self._ksmd
            else None,
        )

    def _read(self) -> _Now:
        merging = zero = items = profit = processes = 0
        before = self._host()
        for pid in family.descendants(self._root):
            try:
                with Handle(pid) as handle:
                    if not handle.alive():
                        continue
                    c = process_counters(handle)
                    self._seen.add(handle.id)
                    if c is None:
                        self._hidden.add(handle.id)
            except (NoSuchProcess, NotPermitted, OutputFailed):
                continue  # ended meanwhile, or hidden from us
            processes += 1
            if c is not None:
                merging += c.ksm_merging_pages
                zero += c.ksm_zero_pages
                items += c.ksm_rmap_items
                profit += c.ksm_process_profit
        after = self._host()
        shared = max(before[0], after[0])
        # ksmd, and processes that end, change the sums while we read them one by one.
        alone = min(before[1], after[1]) <= items
        records = items * RMAP_ITEM_BYTES
        # Of their mappings on merged frames as many are no saving as there are frames.
        low = max(0, merging - shared) + zero
        high = low if alone else merging + zero
        return _Now(
            Figures(
                merging, zero, items, profit,
                low * PAGE_BYTES - records, high * PAGE_BYTES - records,
            ),
            processes,
            alone,
        )  # fmt: skip

    def _host(self) -> tuple[int, int]:
        """Merged frames of the host, and all pages that ksmd follows."""
        if not self._ksm.present:
            return 0, 0
        c = self._ksm.counters()
        return c.pages_shared, c.rmap_items


def _ksmd() -> Ksmd | None:
    try:
        return Ksmd()
    except Unsupported:
        return None


def left_running(root: int) -> int:
    """How many descendants of a process go on, zombies left out."""
    count = 0
    for pid in family.descendants(root):
        try:
            with Handle(pid) as handle:
                count += handle.alive()
        except (NoSuchProcess, NotPermitted):
            continue
    return count
