"""What a wish for ksmd comes to on this host: its load, its price, its kernel."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from dedup import calibration, scanning
from dedup.errors import NotCalibrated, Unsupported, Usage
from dedup.kernel import ksmd
from dedup.kernel.ksm import PAGE_BYTES, Ksm
from dedup.model import wish as wishes
from dedup.model.cost import Load, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.kernel.ksm import Counters
    from dedup.model.wish import Alternative, Price, Wish
    from dedup.scanning import Plan, Scan

ADVISOR_FILES: Final = ("advisor_mode", *(f"advisor_{f}" for f in wishes.Advisor._fields))


@dataclass(slots=True)
class Tuning:
    """A wish, and the ways to keep it."""

    kernel: str
    tunables: dict[str, int | str]
    """The host's now; empty where it has no KSM."""
    wish: Wish
    load: Load
    page_size: int
    present: Price | None
    """With the tunables as they are; None where ksmd would scan nothing (`pages_to_scan` 0)."""
    alternatives: list[Alternative] = field(default_factory=list)
    """Fixed tunables first, then the kernel's advisor, where it has one."""
    scan: Scan | None = None
    """None where the load is what KSM follows already."""
    busy: bool = False
    """Whether ksmd has a scan under way."""

    @property
    def smart_scan(self) -> bool:
        """Whether smart scan is on; it stays as it is."""
        return bool(int(self.tunables.get("smart_scan", 0)))

    def named(self, name: str) -> Alternative:
        """An alternative by its name.

        Raises
        ------
        Unsupported
        """
        for alternative in self.alternatives:
            if alternative.name == name:
                return alternative
        raise Unsupported("this kernel has no advisor for KSM", "leave out `--advisor`")


def tune(wish: Wish, pids: Sequence[int] | None, plan: Plan | None = None) -> Tuning:
    """Find tunables that keep a wish.

    Parameters
    ----------
    wish : Wish
    pids : sequence of int, optional
        Processes whose memory ksmd shall merge; None for what it follows now on this host.
    plan : Plan, optional
        How to scan them.

    Raises
    ------
    NotCalibrated
        What ksmd's visits cost here is not known.
    Usage
        KSM follows nothing here.
    CheckFailed
        The wish can't be kept; the message has what can.
    Unsupported
        No KSM, and nothing chosen.
    NoSuchProcess, NoMemory, NotPermitted, ProcessGone
    """
    stored = calibration.load()
    if stored.calibration is None:
        why = stored.why or "what ksmd's work costs on this host is not known"
        raise NotCalibrated(f"{why}, and a guess would not do for a wish")
    ksm = Ksm()
    scan = None
    if pids is None:
        counters = ksm.counters()
        tunables = ksm.tunables()
        load = followed(counters, tunables)
        page_size = PAGE_BYTES
    else:
        scan = scanning.scan_pids(pids, plan)
        assert scan.load is not None
        load, tunables, page_size = scan.load, scan.tunables, scan.pages.page_size
        if not load.candidates:
            raise Usage(
                "the chosen processes have no memory that KSM would take",
                "see why with `dedup scan -v`",
            )
    tick = ksmd.tick_seconds()
    now = Settings.of(tunables, tick)
    by = wishes.fixed(wish, load, stored.calibration, tick, smart_scan=now.smart_scan)
    if tunables.get("advisor_mode") == "scan-time":
        by = replace(by, tunables={"advisor_mode": "none", **by.tunables})
    found = Tuning(
        kernel=platform.release(),
        tunables=tunables,
        wish=wish,
        load=load,
        page_size=page_size,
        present=wishes.of(load, now, stored.calibration) if now.pages_to_scan else None,
        alternatives=[by],
        scan=scan,
        busy=bool(ksm.present and ksm.running and ksm.counters().rmap_items),
    )
    if all(name in tunables for name in ADVISOR_FILES):
        used = _ksmd_cpu_seconds()
        if used is not None:
            found.alternatives.append(
                wishes.advised(wish, by, load, stored.calibration, now, tunables, used)
            )
    return found


def followed(counters: Counters, tunables: dict[str, int | str]) -> Load:
    """The load that KSM has now.

    With smart scan the unique pages that it passes over count as volatile; ksmd searches for them
    when it comes by.

    Raises
    ------
    Usage
        There is none.
    """
    if not counters.rmap_items + counters.ksm_zero_pages:
        raise Usage(
            "KSM follows no memory on this host: there is nothing to wish for",
            "name processes, `dedup tune --name 'redis*' --within 10`, or start some with "
            "`dedup run -- CMD`",
        )
    passed_over = counters.pages_volatile if int(tunables.get("smart_scan", 0)) else 0
    return Load(
        pages_shared=counters.pages_shared,
        pages_sharing=counters.pages_sharing,
        pages_unshared=counters.pages_unshared + passed_over,
        pages_volatile=counters.pages_volatile - passed_over,
        ksm_zero_pages=counters.ksm_zero_pages,
    )


def _ksmd_cpu_seconds() -> float | None:
    """CPU of ksmd since boot; None where it is out of sight."""
    try:
        return ksmd.Ksmd().cpu_ns() / 1e9
    except Unsupported:
        return None
