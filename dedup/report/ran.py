"""What a command saved, for people and as JSON."""

from __future__ import annotations

import shlex
import signal as signals
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dedup.report.jsonout import envelope
from dedup.report.names import lossless, safe, shorten
from dedup.report.text import count, size

if TYPE_CHECKING:
    from dedup.change.saved import Figures, Saved

COMMAND_COLUMNS = 40


@dataclass(frozen=True, slots=True)
class Run:
    """A command that has ended."""

    words: list[str]
    pid: int
    status: int | None
    signal: int | None
    randomized: bool
    started_ksmd: bool
    saved: Saved
    left_running: int
    """Descendants that go on."""


def run_object(run: Run) -> dict[str, Any]:
    """A run whole."""
    s = run.saved
    return envelope(
        "run",
        command=[lossless(w) for w in run.words],
        pid=run.pid,
        status=run.status,
        signal=run.signal,
        randomized=run.randomized,
        started_ksmd=run.started_ksmd,
        seconds=s.seconds,
        readings=s.readings,
        processes={
            "seen": s.processes_seen,
            "most": s.processes_most,
            "hidden": s.hidden,
            "left_running": run.left_running,
        },
        alone=s.alone,
        peak=_figures(s.peak),
        mean=_figures(s.mean),
        last={**_figures(s.last), "seconds_before_end": s.last_seconds_before_end},
        ksmd_cpu_seconds=s.ksmd_cpu_seconds,
    )


def _figures(f: Figures) -> dict[str, Any]:
    low, high = round(f.saved_low_bytes), round(f.saved_high_bytes)
    return {
        "ksm_merging_pages": round(f.ksm_merging_pages),
        "ksm_zero_pages": round(f.ksm_zero_pages),
        "ksm_rmap_items": round(f.ksm_rmap_items),
        "ksm_process_profit": round(f.ksm_process_profit),
        "records_bytes": round(f.records_bytes),
        "saved_bytes": low if low == high else None,
        "bounds": {} if low == high else {"saved_bytes": [low, high]},
    }


def run_lines(run: Run) -> list[str]:
    """What is said at the end."""
    s = run.saved
    who = shorten(shlex.join(run.words), COMMAND_COLUMNS)
    lived = f"{who}: {s.seconds:.1f} s"
    if s.processes_seen:
        lived += f", {count(s.processes_seen, 'process', 'processes')}"
    if s.processes_most < s.processes_seen:
        lived += f" ({s.processes_most:,} at a time)"
    if run.signal is not None:
        lived += f", ended by {_name(run.signal)}"
    if run.left_running:
        lived += f"; {count(run.left_running, 'process goes', 'processes go')} on"
    lines = [f"dedup: {lived}"]
    if s.hidden:
        lines.append(
            f"dedup: the counters of {count(s.hidden, 'process', 'processes')} are hidden from "
            "us (another user's, or this kernel has no ksm_stat): the figures lack them"
        )
    if not s.peak.ksm_rmap_items:
        lines.append(
            "dedup: ksmd came by none of its pages: it did not run, or the command ended first"
        )
        return lines
    lines.append(
        f"dedup: saved {_saved(s.peak)} at most, {_saved(s.mean)} on average, "
        f"{_saved(s.last)} at last"
    )
    peak = s.peak
    lines.append(
        f"dedup: at most {peak.ksm_merging_pages:,} pages on merged frames, "
        f"{peak.ksm_zero_pages:,} on the zero page; KSM's own records "
        f"{size(peak.records_bytes)} (taken off)"
    )
    if s.ksmd_cpu_seconds is not None:
        whose = "" if s.alone else " for everybody who uses KSM"
        lines.append(f"dedup: ksmd used {s.ksmd_cpu_seconds:.2f} s of CPU{whose}")
    return lines


def _saved(f: Figures) -> str:
    return " to ".join(dict.fromkeys((size(f.saved_low_bytes), size(f.saved_high_bytes))))


def _name(number: int) -> str:
    try:
        return safe(signals.Signals(number).name)
    except ValueError:
        return f"signal {number}"
