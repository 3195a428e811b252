"""Tunables that stay: what a wish came to, set until it is undone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dedup.change.tunables import DEFAULT_PAGES_TO_SCAN, Tunables
from dedup.errors import Unsupported
from dedup.kernel.ksm import Ksm
from dedup.kernel.lock import STATE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dedup.change.journal import Entry, Restored

ADVISOR_MODE = "advisor_mode"


@dataclass(slots=True)
class Applied:
    """What was set."""

    changed: list[Entry] = field(default_factory=list)
    """In the order of the changes; empty where all had its value already."""
    running: bool = False
    """Whether ksmd merges now."""
    leftover: list[Restored] = field(default_factory=list)
    """What an earlier, killed run had left changed; put back before."""


def apply(wanted: Mapping[str, int | str], state: Path = STATE) -> Applied:
    """Set tunables to stay: all of them, or none.

    Parameters
    ----------
    wanted : mapping
        Tunables by name, in this order: those of the advisor before `advisor_mode`, `run` last.
    state : Path, optional

    Raises
    ------
    Busy, NotPermitted, Unsupported, OutputFailed
    CheckFailed
        Somebody else changes them at the same time.
    """
    ksm = Ksm()
    tunables = Tunables(ksm, state)
    with tunables:
        there = ksm.tunables()
        if missing := [name for name in wanted if name not in there]:
            raise Unsupported(f"this kernel has no {', '.join(missing)}", "leave out `--advisor`")
        advised = wanted.get(ADVISOR_MODE) == "scan-time"
        if ADVISOR_MODE in there:
            # It holds pages_to_scan, and starts anew only where it was off.
            tunables.set(ADVISOR_MODE, "none")
        if advised:
            # The value that the kernel goes back to by itself: it can be told from others' then.
            tunables.set("pages_to_scan", DEFAULT_PAGES_TO_SCAN)
        for name, value in wanted.items():
            tunables.set(name, value)
        if not advised:
            tunables.require_unchanged()
        changed = tunables.keep()
    return Applied(changed, ksm.running, tunables.leftover)


def undo(state: Path = STATE) -> list[Restored]:
    """Put back what `apply` has set, however often; what others have changed since stays.

    Raises
    ------
    Busy, NotPermitted, Unsupported, OutputFailed
    """
    with Tunables(Ksm(), state) as tunables:
        return tunables.undo()
