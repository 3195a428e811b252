"""Standing set-ups, for people and as JSON."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from dedup.report.jsonout import envelope
from dedup.report.names import lossless, safe
from dedup.report.text import count, size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dedup.change.standing import Outcome, Target
    from dedup.kernel.systemd import Systemd

KINDS = {
    "service": "service",
    "user-service": "service of a user",
    "scope": "scope",
    "container": "container",
    "guest": "QEMU guest, pid",
    "none": "no unit",
}
DONE = {
    "written": "written: {path}",
    "unchanged": "there already: {path}",
    "removed": "removed: {path}",
    "absent": "not there: {path}",
    "refused": "left alone: {path} ({why})",
}
WOULD = {
    "written": "would be written: {path}",
    "removed": "would be removed: {path}",
}


def standing_object(
    targets: Sequence[Target], outcomes: Mapping[int, Outcome], systemd: Systemd, *, dry_run: bool
) -> dict[str, Any]:
    """What was found and done; `outcomes` by the target's index."""
    return envelope(
        "standing",
        systemd={
            "version": systemd.version or None,
            "running": systemd.running,
            "knows_memory_ksm": systemd.knows_memory_ksm,
        },
        dry_run=dry_run,
        targets=[_target(t, outcomes.get(i)) for i, t in enumerate(targets)],
    )


def _target(t: Target, outcome: Outcome | None) -> dict[str, Any]:
    return {
        "kind": t.kind,
        "name": lossless(t.name),
        "processes": [{"pid": p.id.pid, "name": lossless(p.name)} for p in t.processes],
        "drop_in": None
        if t.drop_in is None
        else {"path": lossless(str(t.drop_in.path)), "text": lossless(t.drop_in.text)},
        "commands": [lossless(c) for c in t.commands],
        "notes": [lossless(n) for n in t.notes],
        "guest": None
        if t.guest is None
        else {
            "state": t.guest.state,
            "words": t.guest.words,
            "ram_bytes": t.guest.ram_bytes,
            "mappings": t.guest.mappings,
        },
        "outcome": None if outcome is None else outcome.outcome,
        "why": "" if outcome is None else outcome.why,
    }


def standing_lines(
    targets: Sequence[Target],
    outcomes: Mapping[int, Outcome],
    *,
    undo: bool,
    dry_run: bool,
    width: int,
) -> list[str]:
    """A paragraph a target. What people copy, files and commands, is not broken into lines."""
    lines: list[str] = []
    for i, t in enumerate(targets):
        if lines:
            lines.append("")
        lines.append(_head(t))
        if t.guest is not None:
            lines.append(f"  {t.guest.words}")
        outcome = outcomes.get(i)
        if outcome is not None:
            words = (WOULD if dry_run else {}).get(outcome.outcome, DONE[outcome.outcome])
            lines.append("  " + words.format(path=safe(str(outcome.path)), why=outcome.why))
        if not undo:
            if t.drop_in is not None and (outcome is None or dry_run):
                lines.append(f"  {safe(str(t.drop_in.path))}")
                lines += [f"    {safe(line)}" for line in t.drop_in.text.splitlines()]
            for note in t.notes:
                lines += textwrap.wrap(
                    safe(note), width, initial_indent="  - ", subsequent_indent="    ",
                    break_long_words=False, break_on_hyphens=False,
                )  # fmt: skip
        if t.commands and (outcome is None or outcome.outcome in {"written", "removed"}):
            lines += ["  then:", *(f"    {safe(c)}" for c in t.commands)]
    return lines


def _head(t: Target) -> str:
    names = sorted({safe(p.name) for p in t.processes})
    who = f": {count(len(t.processes), 'process', 'processes')} ({', '.join(names[:3])}" if names \
        else ""  # fmt: skip
    if names:
        who += ", ...)" if len(names) > 3 else ")"
    name = f" {safe(t.name)}" if t.name else ""
    ram = f", memory {size(t.guest.ram_bytes)}" if t.guest and t.guest.ram_bytes else ""
    return f"{KINDS[t.kind]}{name}{who}{ram}"
