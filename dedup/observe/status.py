"""KSM on this host now: what it saves, what it costs, and for whom. Nothing is changed.

Source: mm/ksm.c (general_profit_show, ksm_process_profit), Documentation/admin-guide/mm/ksm.rst.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from dedup.change.tunables import changed_for_now, others_at_the_knobs
from dedup.errors import Unsupported
from dedup.kernel import ksm as interface
from dedup.kernel import vmstat
from dedup.kernel.ksm import DEFAULTS, PAGE_BYTES, RMAP_ITEM_BYTES, RUN_MERGE, Ksm
from dedup.kernel.ksmd import PROC, Ksmd
from dedup.kernel.lock import STATE
from dedup.model.prediction import STABLE_NODE_BYTES
from dedup.sources.live import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from dedup.kernel.ksm import Counters, Use, Uses

By = Literal["process", "user", "cgroup", "unit", "name"]

SCANS_LEAST: Final = 3
"""Full scans seen in a sample whose mean is their time; fewer are too rough a measure."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What happened between two readings."""

    seconds: float
    ksmd_cpu_seconds: float | None
    """None where ksmd is out of sight."""
    full_scans: int
    pages_scanned: int
    pages_skipped: int
    cow_ksm: int | None
    """Merged pages broken, by writes or by their being unmerged; None where not counted."""
    ksm_swpin_copy: int | None

    @property
    def ksmd_cores(self) -> float | None:
        """Share of a core that ksmd takes."""
        return None if self.ksmd_cpu_seconds is None else self.ksmd_cpu_seconds / self.seconds


@dataclass(frozen=True, slots=True)
class Status:
    """KSM as it is."""

    kernel: str
    tunables: dict[str, int | str]
    counters: Counters
    uses: Uses
    ksmd_cpu_seconds: float | None
    """Since boot; None where ksmd is out of sight."""
    uptime_seconds: float
    sample: Sample | None
    others: tuple[str, ...]
    """Who else turns the knobs: a sentence each."""
    changed_for_now: tuple[str, ...]
    """What another run of ours will put back."""

    @property
    def running(self) -> bool:
        """Whether ksmd merges."""
        return self.tunables.get("run") == RUN_MERGE

    @property
    def stale(self) -> bool:
        """Whether counters stand where ksmd's last visit left them, while memory went on."""
        return not self.running and bool(self.counters.rmap_items or self.counters.ksm_zero_pages)

    @property
    def freed_bytes(self) -> int:
        """Frames that merged mappings do without, had each one of its own before.

        `pages_shared` is not in it: those are the frames kept. Mappings that a fork has shared
        anyway are in it, which the counters can't tell.
        """
        return (self.counters.pages_sharing + self.counters.ksm_zero_pages) * PAGE_BYTES

    @property
    def rmap_items_bytes(self) -> int:
        """What ksmd keeps of each page that it follows, merged or not."""
        return self.counters.rmap_items * RMAP_ITEM_BYTES

    @property
    def stable_nodes_bytes(self) -> int:
        """What it keeps of each merged frame, and of each chain; `general_profit` leaves it out."""
        return (self.counters.pages_shared + self.counters.stable_node_chains) * STABLE_NODE_BYTES

    @property
    def saved_bytes(self) -> int:
        """Memory saved, at the most: less than 0 where KSM costs more than it saves."""
        return self.freed_bytes - self.rmap_items_bytes - self.stable_nodes_bytes

    @property
    def sharing_per_shared(self) -> float | None:
        """Further mappings that a kept frame serves; None where nothing is merged."""
        c = self.counters
        return c.pages_sharing / c.pages_shared if c.pages_shared else None

    @property
    def unshared_share(self) -> float | None:
        """Of the pages that ksmd follows, those that have no copy."""
        c = self.counters
        return c.pages_unshared / c.rmap_items if c.rmap_items else None

    @property
    def skipped_share(self) -> float | None:
        """Of ksmd's visits since boot, those that smart scan left out."""
        c = self.counters
        visits = c.pages_scanned + c.pages_skipped
        return c.pages_skipped / visits if visits else None

    @property
    def full_scan_seconds(self) -> float | None:
        """Time of a full scan: seen, or by the pace seen; None where neither is."""
        s = self.sample
        if s is None or not self.running or not self.counters.rmap_items:
            return None
        if s.full_scans >= SCANS_LEAST:
            return s.seconds / s.full_scans
        visits = s.pages_scanned + s.pages_skipped
        return self.counters.rmap_items * s.seconds / visits if visits else None

    @property
    def changed_tunables(self) -> dict[str, tuple[int | str, int | str]]:
        """Value and the kernel's default of each tunable that differs; `run` left out."""
        advised = self.tunables.get("advisor_mode", "none") != "none"
        return {
            name: (value, DEFAULTS[name])
            for name, value in self.tunables.items()
            # The advisor's own.
            if name in DEFAULTS and value != DEFAULTS[name]
            and not (advised and name == "pages_to_scan")
        }  # fmt: skip

    @property
    def process_profit(self) -> int:
        """ksm_process_profit of all processes in sight, in bytes.

        A merged page counts in each process that maps it, the frame that stays included: of all
        processes it is `general_profit` and `pages_shared` pages more.
        """
        return sum(use.counters.ksm_process_profit for use in self.uses.found)


@dataclass(frozen=True, slots=True)
class Group:
    """Processes that belong together, by the kernel's names; profit in bytes."""

    name: str
    uses: tuple[Use, ...]

    def _sum(self, name: str) -> int:
        return sum(getattr(use.counters, name) for use in self.uses)

    @property
    def ksm_rmap_items(self) -> int:
        """Pages that ksmd follows."""
        return self._sum("ksm_rmap_items")

    @property
    def ksm_zero_pages(self) -> int:
        """Mappings of the shared zero page that KSM made."""
        return self._sum("ksm_zero_pages")

    @property
    def ksm_merging_pages(self) -> int:
        """Mappings of merged pages."""
        return self._sum("ksm_merging_pages")

    @property
    def ksm_process_profit(self) -> int:
        """Bytes."""
        return self._sum("ksm_process_profit")


def groups(uses: Iterable[Use], by: By) -> list[Group]:
    """The processes, or what they add up to, the most profit first."""
    found: dict[str, list[Use]] = {}
    for use in uses:
        found.setdefault(_label(use, by), []).append(use)
    ranked = [Group(name, tuple(members)) for name, members in found.items()]
    return sorted(
        ranked, key=lambda g: (-g.ksm_process_profit, -g.ksm_rmap_items, g.uses[0].info.id.pid)
    )


def _label(use: Use, by: By) -> str:
    info = use.info
    return {
        "process": str(info.id.pid),
        "user": info.user,
        "cgroup": info.cgroup,
        "unit": info.unit,
        "name": info.name,
    }[by]


def collect(
    interval_seconds: float = 1.0,
    ksm: Ksm | None = None,
    proc: Path = PROC,
    state: Path = STATE,
    progress: Callable[[str, int, int], None] | None = None,
) -> Status:
    """Read everything, and again after a while.

    Parameters
    ----------
    interval_seconds : float
        Between two readings, for what happens meanwhile; 0 for one reading.
    ksm : Ksm, optional
    proc, state : Path, optional
        Where processes, and lock and journal, are.
    progress : callable, optional

    Raises
    ------
    Unsupported
        The kernel has no KSM.
    """
    ksm = ksm or Ksm()
    ksm.require()
    try:
        ksmd = Ksmd(proc)
    except Unsupported:
        ksmd = None
    sample = None
    if interval_seconds > 0:
        first = _Reading(ksm, ksmd, proc)
        wait_until(first.at + interval_seconds, progress)
        last = _Reading(ksm, ksmd, proc)
        sample = last.since(first)
    uses = interface.uses(proc)
    counters = last.counters if sample else ksm.counters()
    return Status(
        kernel=platform.release(),
        tunables=ksm.tunables(),
        counters=counters,
        uses=uses,
        ksmd_cpu_seconds=ksmd.cpu_ns() / 1e9 if ksmd else None,
        uptime_seconds=time.clock_gettime(time.CLOCK_BOOTTIME),
        sample=sample,
        others=tuple(others_at_the_knobs(proc, ksm.root)),
        changed_for_now=tuple(changed_for_now(state)),
    )


class _Reading:
    """What moves, at one moment."""

    def __init__(self, ksm: Ksm, ksmd: Ksmd | None, proc: Path) -> None:
        self.at = time.monotonic()
        self.counters = ksm.counters()
        self.cpu_ns = ksmd.cpu_ns() if ksmd else None
        self.events = vmstat.events(proc)

    def since(self, first: _Reading) -> Sample:
        now, then = self.counters, first.counters
        return Sample(
            seconds=self.at - first.at,
            ksmd_cpu_seconds=None
            if self.cpu_ns is None or first.cpu_ns is None
            else (self.cpu_ns - first.cpu_ns) / 1e9,
            # It begins anew after an unmerging.
            full_scans=max(0, now.full_scans - then.full_scans),
            pages_scanned=now.pages_scanned - then.pages_scanned,
            pages_skipped=now.pages_skipped - then.pages_skipped,
            cow_ksm=_more(self.events.cow_ksm, first.events.cow_ksm),
            ksm_swpin_copy=_more(self.events.ksm_swpin_copy, first.events.ksm_swpin_copy),
        )


def _more(now: int | None, then: int | None) -> int | None:
    return None if now is None or then is None else now - then
