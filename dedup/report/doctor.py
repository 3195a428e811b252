"""What this host can and can't do, for people and as JSON."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Final

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dedup.report.hints import as_root, typable
from dedup.report.jsonout import envelope, host_object
from dedup.report.names import lossless, safe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from dedup.observe.doctor import Check

WORDS: Final = {"ok": "ok", "limited": "limited", "cannot": "can't", "note": "note"}
STYLES: Final = {"ok": "green", "limited": "yellow", "cannot": "bold red", "note": "cyan"}
TITLES: Final = {
    "ksm": "KSM", "prctl": "prctl", "ksm_stat": "ksm_stat", "smaps": "smaps", "vmstat": "vmstat",
    "pagemap_scan": "PAGEMAP_SCAN", "process_vm_readv": "process_vm_readv", "hidepid": "hidepid",
    "smart_scan": "smart_scan", "max_page_sharing": "max_page_sharing", "numa": "NUMA",
    "yama": "Yama", "ksmd": "ksmd", "systemd": "systemd",
}  # fmt: skip
"""Names that are not just words."""
WIDE_FROM: Final = 64
NEEDS_ROOT: Final = re.compile(
    r"`((?:echo [^`]* > |sysctl |systemctl stop |dedup (?:restore|tune|apply|scan))[^`]*)`"
)


def counts(checks: Sequence[Check]) -> dict[str, int]:
    """How many there are of each state."""
    return {state: sum(c.finding.state == state for c in checks) for state in WORDS}


def doctor_object(
    checks: Sequence[Check], kernel: str, page_size: int, tunables: Mapping[str, int | str]
) -> dict[str, Any]:
    """All checks."""
    return envelope(
        "doctor",
        host=host_object(kernel, page_size, tunables),
        checks=[
            {
                "topic": c.topic,
                "name": c.name,
                "state": c.finding.state,
                "found": lossless(c.finding.found),
                "meaning": lossless(c.finding.meaning),
                "way_out": lossless(way_out(c)),
            }
            for c in checks
        ],
        counts=counts(checks),
    )


def way_out(check: Check) -> str:
    """What to do, its commands as they must be typed by this user."""
    words = check.finding.way_out
    if os.geteuid():
        words = NEEDS_ROOT.sub(lambda m: f"`{as_root(m[1])}`", words)
    return typable(words)


def view(
    checks: Sequence[Check], *, width: int, plain: bool, verbose: bool = True
) -> list[RenderableType]:
    """The terminal view.

    Parameters
    ----------
    checks : sequence of Check
    width : int
        Columns.
    plain : bool
        Nothing but ASCII.
    verbose : bool
        Show also what is well.
    """
    parts: list[RenderableType] = []
    for topic in dict.fromkeys(c.topic for c in checks):
        shown = [c for c in checks if c.topic == topic and (verbose or c.finding.state != "ok")]
        if shown:
            parts += [Text(topic, "bold"), _table(shown, width, plain=plain), Text()]
    found = counts(checks)
    words = [f"{n} {WORDS[s]}{'s' * (s == 'note' and n > 1)}" for s, n in found.items() if n]
    return [*parts, Text(", ".join(words) + ".", "bold")]


def _table(checks: Sequence[Check], width: int, *, plain: bool) -> RenderableType:
    wide = width >= WIDE_FROM
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    if wide:
        grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    for c in checks:
        title = Text(TITLES.get(c.name, c.name.replace("_", " ")))
        mark = Text(WORDS[c.finding.state], STYLES[c.finding.state])
        lines = _words(c, plain=plain)
        if wide:
            grid.add_row(mark, title, lines)
        else:
            grid.add_row(mark, Text.assemble(title, ": ", lines))
    return Padding(grid, (0, 0, 0, 2))


def _words(check: Check, *, plain: bool) -> Text:
    finding = check.finding
    text = Text(safe(finding.found, plain=plain))
    if finding.meaning:
        text.append(f"\n{safe(finding.meaning, plain=plain)}", "dim")
    if finding.way_out:
        text.append(f"\n-> {safe(way_out(check), plain=plain)}", "cyan")
    return text
