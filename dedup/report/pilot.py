"""A pilot beside its capacity plan, for people and as JSON."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from dedup.estimate import settings
from dedup.report.names import lossless, safe, shorten
from dedup.report.table import Column, fitting
from dedup.report.text import count, span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from dedup.change.pilot import Pilot, Trial
    from dedup.estimate.capacity import Plan

COMMAND_COLUMNS: Final = 48
MERGED: Final = ("pages_sharing", "ksm_zero_pages")
COLUMNS: Final = (
    Column("Started", 9, right=False),
    Column("Merge", 3),
    Column("Frames each more", 2),
    Column("Fit", 1),
)


def further_frames(plan: Plan) -> int:
    """Frames that one instance more needs, beyond those that were seen."""
    seen = len(plan.instances)
    return plan.curve[seen].frames - plan.curve[seen - 1].frames


def merged(trial: Trial) -> tuple[int, int]:
    """Pages that merge among the copies, the lowest and the highest number."""
    p = trial.scan.prediction
    low = high = 0
    for name in MERGED:
        value = getattr(p, name)
        a, b = (value, value) if value is not None else p.bounds[name]
        low, high = low + a, high + b
    return low, high


# -- JSON ------------------------------------------------------------------------------------------


def pilot_object(found: Pilot, plans: Sequence[Plan]) -> dict[str, Any]:
    """What was tried, each with what follows from it; `plans` go with `found.trials`."""
    wish = found.wish
    return {
        "command": [lossless(word) for word in wish.words],
        "copies": wish.copies,
        "ready": {"kind": wish.ready.kind, "value": lossless(wish.ready.value) or None},
        "setting": found.trials[0].setting.name,
        "trials": [_trial(t, p) for t, p in zip(found.trials, plans, strict=True)],
        "omitted": [{"setting": o.setting.name, "why": lossless(o.why)} for o in found.omitted],
        "left_running": found.left,
    }


def _trial(trial: Trial, plan: Plan) -> dict[str, Any]:
    p = trial.scan.prediction
    return {
        "setting": trial.setting.name,
        "arguments": list(trial.start.arguments),
        "environment": trial.start.environment,
        "programs": [lossless(name) for name in trial.programs],
        "ready_seconds": trial.ready_seconds,
        "settled": trial.settled,
        "seconds": trial.seconds,
        "pages": trial.scan.scanned_pages,
        "pages_sharing": p.pages_sharing,
        "ksm_zero_pages": p.ksm_zero_pages,
        "bounds": {n: list(p.bounds[n]) for n in MERGED if n in p.bounds},
        "further_frames": further_frames(plan),
        "fits": {
            "without_ksm": plan.fits.without_ksm, "with_ksm": plan.fits.with_ksm,
            "low": plan.fits.low, "high": plan.fits.high, "safe": plan.fits.safe,
            "worst": plan.fits.worst,
        },
        "risks": _risks(trial),
        "warnings": [
            {"code": code, "message": lossless(words)} for code, words in _cautions(trial, plan)
        ],
    }  # fmt: skip


# -- text ------------------------------------------------------------------------------------------


def lines(found: Pilot, plans: Sequence[Plan], width: int, *, plain: bool) -> list[RenderableType]:
    """What was started, what merges among that, and the settings side by side."""
    wish, first = found.wish, found.trials[0]
    words = shorten(shlex.join(wish.words), COMMAND_COLUMNS, plain=plain)
    out: list[RenderableType] = [
        Text(""),
        Text(
            f"{count(wish.copies, 'copy', 'copies')} of `{words}` "
            f"{'was' if wish.copies == 1 else 'were'} started here and stopped again: "
            f"{span(*merged(first))} of {count(first.scan.scanned_pages, 'page')} merge."
        ),
    ]
    if len(wish.settings) == 1:
        return out
    rows = []
    for trial, plan in zip(found.trials, plans, strict=True):
        f = plan.fits
        between = f" ({f.low:,} to {f.high:,})" if f.low != f.high else ""
        rows.append(
            [trial.setting.title, span(*merged(trial)), f"{further_frames(plan):,}",
             f"{f.with_ksm:,}{between}"]
        )  # fmt: skip
    out += [fitting(COLUMNS, rows, width, plain=plain, flexible=0), Text("")]
    for trial in found.trials:
        added = [f"{n}={v}" for n, v in trial.start.environment.items()]
        if added or trial.start.arguments:
            out.append(Text("Fixed seeds: " + " ".join([*added, *trial.start.arguments])))
    out += [Text(risk) for trial in found.trials for risk in _risks(trial)]
    out += [
        Text(f"Not tried ({o.setting.title}): {safe(o.why, plain=plain)}.") for o in found.omitted
    ]
    return out


def warnings(found: Pilot, plans: Sequence[Plan]) -> list[str]:
    """What the figures don't say by themselves, each once, for the first setting that has it."""
    said: set[str] = set()
    out = []
    for trial, plan in zip(found.trials, plans, strict=True):
        whose = "" if trial is found.trials[0] else f"{trial.setting.title}, "
        out += [whose + words for code, words in _cautions(trial, plan) if code not in said]
        said |= {code for code, _ in _cautions(trial, plan)}
    if found.left:
        out.append(f"these processes could not be ended: {', '.join(map(str, found.left))}")
    return out


def _cautions(trial: Trial, plan: Plan) -> list[tuple[str, str]]:
    """Warnings of a trial and of its plan: code and words."""
    out = [(w.code, w.message) for w in plan.warnings]
    if not trial.settled:
        words = (
            "the copies still changed when the time was over: the figures are of a moment; give "
            "more with --limit, or tell by --ready when they are ready"
        )
        out.append(("unsettled", words))
    seeded = settings.seeded(trial.programs)
    if seeded and not trial.setting.randomized and not trial.setting.seeds_fixed:
        names = " and ".join(runtime.name for runtime in seeded)
        words = (
            f"{names} seeds its hashes anew at each start, so what merges differs much from one "
            "start to the next, and the range does not tell; fix the seeds, or take more --copies"
        )
        out.append(("random-seeds", words))
    return out


def _risks(trial: Trial) -> list[str]:
    return [words for words in (trial.setting.risk, trial.start.also) if words]
