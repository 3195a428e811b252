"""A wish and what keeps it, for people and as JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from dedup.report.applied import restored_lines, restored_object
from dedup.report.hints import as_root, typable
from dedup.report.jsonout import envelope, host_object
from dedup.report.names import lossless
from dedup.report.price import duration, percent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from dedup.change.journal import Restored
    from dedup.change.tune import Applied
    from dedup.model.wish import Alternative, Price, Wish
    from dedup.tuning import Tuning

MIB: Final = 1 << 20
RUN_MERGE: Final = 1
TIMES: Final = (
    "Times run from ksmd's start, all memory registered and nothing of it merged, until the "
    "counters of merged pages stand at their final values."
)


def wish_words(wish: Wish) -> str:
    """The wish, as a part of a sentence."""
    parts = []
    if wish.within_seconds is not None:
        parts.append(f"merged within {wish.within_seconds:g} s")
    if wish.cores is not None:
        parts.append(f"at most {percent(wish.cores)} of a core")
    return ", ".join(parts)


def wish_options(wish: Wish) -> str:
    """The wish, as it is typed."""
    parts = []
    if wish.within_seconds is not None:
        parts.append(f"--within {wish.within_seconds:g}")
    if wish.cores is not None:
        parts.append(f"--cpu {wish.cores * 100:.6g}")
    return " ".join(parts)


def command(tuning: Tuning, alternative: Alternative, choice: str) -> str:
    """What to type, as root, to get an alternative set."""
    words = ["dedup tune", choice, wish_options(tuning.wish), "--apply"]
    if alternative.name == "advisor":
        words.append("--advisor")
    if tuning.tunables.get("run") != RUN_MERGE:
        words.append("--start-ksmd")
    return " ".join(w for w in words if w)


def notes(tuning: Tuning) -> list[str]:
    """What the figures do not say by themselves."""
    found = [TIMES]
    if tuning.busy:
        found.append(
            "ksmd has a scan under way: what becomes mergeable now is merged up to one full scan "
            "later than that."
        )
    if tuning.smart_scan:
        found.append(
            "Smart scan is on, and stays so: the time holds for memory that becomes mergeable "
            "together. Copies of older pages that found no partner may take many scans, or never "
            "merge."
        )
    found += [_of_advisor(a.price) for a in tuning.alternatives if a.name == "advisor"]
    return found


def _of_advisor(price: Price) -> str:
    return (
        "The kernel's advisor sets pages_to_scan after each full scan, from whole seconds. It "
        "takes all of ksmd's CPU since boot for that of its first scan, so it starts slowly "
        f"({duration(price.converge_seconds)} here); memory that comes later is merged within "
        f"{duration(price.later_seconds)} and what was left of a scan."
    )


def advice(tuning: Tuning) -> str:
    """What to do, in one sentence."""
    a = tuning.alternatives[0]
    p = a.price
    low, high = p.bounds["converge_seconds"]
    if tuning.present is not None and tuning.present.keeps(tuning.wish):
        now = tuning.present
        if now.most_cores <= p.most_cores and now.converge_seconds <= p.converge_seconds:
            return "The present tunables keep the wish already, and no others do it cheaper."
        return (
            "The present tunables keep the wish already; "
            f"pages_to_scan {a.pages_to_scan:,} with sleeps of {a.tunables['sleep_millisecs']} ms "
            f"{'is cheaper' if p.most_cores < now.most_cores else 'merges sooner'}."
        )
    return (
        f"pages_to_scan {a.pages_to_scan:,} with sleeps of {a.tunables['sleep_millisecs']} ms "
        f"merges all in {duration(p.converge_seconds)} ({duration(low)} to {duration(high)}) for "
        f"{duration(p.cpu_seconds)} of CPU, and ksmd takes {percent(p.steady_cores)} of a core "
        "later on."
    )


# -- JSON ------------------------------------------------------------------------------------------


def _price_object(price: Price | None) -> dict[str, Any] | None:
    if price is None:
        return None
    bounds = {name: [low, high] for name, (low, high) in price.bounds.items()}
    return {**dataclasses.asdict(price), "bounds": bounds}


def tuning_object(
    tuning: Tuning,
    choice: str,
    planned: Mapping[str, int | str] | None,
    applied: Applied | None,
) -> dict[str, Any]:
    """A wish whole; with what was set, or would be."""
    load = {**dataclasses.asdict(tuning.load), "candidates": tuning.load.candidates}
    return envelope(
        "tune",
        host=host_object(tuning.kernel, tuning.page_size, tuning.tunables),
        wish=dataclasses.asdict(tuning.wish),
        load=load,
        present=_price_object(tuning.present),
        alternatives=[
            {
                "name": a.name,
                "tunables": a.tunables,
                "pages_to_scan": a.pages_to_scan,
                "keeps": a.keeps,
                "price": _price_object(a.price),
                "command": lossless(f"sudo {command(tuning, a, choice)}"),
            }
            for a in tuning.alternatives
        ],
        advice=advice(tuning),
        notes=notes(tuning),
        planned=planned,
        applied=None
        if applied is None
        else {
            "changed": [dataclasses.asdict(e) for e in applied.changed],
            "ksmd_running": applied.running,
            "restored": restored_object(applied.leftover),
        },
    )


def undo_object(restored: Sequence[Restored]) -> dict[str, Any]:
    """What went back."""
    return envelope("tune_undo", restored=restored_object(restored))


# -- for people ------------------------------------------------------------------------------------


def head(tuning: Tuning) -> str:
    """The first line."""
    size = tuning.load.candidates * tuning.page_size / MIB
    what = "the chosen memory" if tuning.scan is not None else "what KSM follows here now"
    return (
        f"Wish: {wish_words(tuning.wish)}; for {what}, {tuning.load.candidates:,} pages "
        f"({size:,.1f} MiB)"
    )


def table(tuning: Tuning) -> Table:
    """The present tunables and the alternatives, side by side."""
    from rich.table import Table

    shown: list[tuple[str, str, str, Price | None]] = [
        (
            "now",
            f"{int(tuning.tunables.get('pages_to_scan', 100)):,}",
            str(tuning.tunables.get("sleep_millisecs", 20)),
            tuning.present,
        )
    ]
    shown += [
        (a.name, f"{a.pages_to_scan:,}", str(a.tunables["sleep_millisecs"]), a.price)
        for a in tuning.alternatives
    ]
    found = Table(box=None, pad_edge=False, show_edge=False)
    found.add_column("")
    for name, *_ in shown:
        found.add_column(name, justify="right")
    found.add_row("pages_to_scan", *(batch for _, batch, _, _ in shown))
    found.add_row("sleep_millisecs", *(sleep for _, _, sleep, _ in shown))

    def row(label: str, field: str, words: Any) -> None:
        prices = (p for *_, p in shown)
        found.add_row(label, *("never" if p is None else words(getattr(p, field)) for p in prices))

    row("merged within", "converge_seconds", duration)
    row("CPU until then", "cpu_seconds", duration)
    row("core, merging", "merging_cores", percent)
    row("full scan", "full_scan_seconds", duration)
    row("core, later", "steady_cores", percent)
    return found


def lines(
    tuning: Tuning,
    choice: str,
    planned: Mapping[str, int | str] | None,
    applied: Applied | None,
) -> list[str]:
    """What stands below the table."""
    found = []
    if planned is None or "advisor_mode" not in planned or planned["advisor_mode"] == "none":
        found.append(advice(tuning))
    if applied is not None:
        found += _applied_lines(applied)
    elif planned is not None:
        wanted = ", ".join(f"{name}={value}" for name, value in planned.items())
        found.append(f"would set {wanted}; they would stay until `sudo dedup tune --undo`")
    else:
        typed = as_root(command(tuning, tuning.alternatives[0], choice))
        found.append(f"Make it so: {typed}")
    return [typable(line) for line in [*found, "", *notes(tuning)]]


def _applied_lines(applied: Applied) -> list[str]:
    found = [
        f"set {e.path.rpartition('/')[2]} to {e.after} (was {e.before})" for e in applied.changed
    ]
    if not found:
        return ["nothing to set: all is so already"]
    found.append("they stay until `sudo dedup tune --undo`, or the next boot")
    if not applied.running:
        found.append("ksmd is not running, so nothing merges: add --start-ksmd")
    return found


def undo_lines(restored: Sequence[Restored]) -> list[str]:
    """What went back."""
    if not restored:
        return ["nothing to undo: `dedup tune --apply` has set nothing since boot"]
    return restored_lines(restored)
