"""`dedup tune`: tunables of ksmd for a wish, and what its work costs on this host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dedup.cli.options import Percent, Seconds, chooses_processes, reports, words_of
from dedup.cli.root import Exemplified
from dedup.errors import NotPermitted, Partial, Usage

if TYPE_CHECKING:
    from dedup.cli.output import Output
    from dedup.kernel.processes import Choice


@click.command(
    cls=Exemplified,
    examples=[
        ("sudo dedup tune --calibrate", "first, once: measure what ksmd's work costs here"),
        ("sudo dedup tune --name 'redis*' --within 60", "merged within a minute"),
        ("sudo dedup tune --name 'redis*' --cpu 10%", "at most a tenth of a core"),
        ("sudo dedup tune --cpu 5", "for what KSM follows already"),
        ("sudo dedup tune --cpu 5 --apply", "and set the tunables, to stay"),
        ("sudo dedup tune --undo", "put them back"),
    ],
)
@chooses_processes
@click.option(
    "--within", type=Seconds(), metavar="SECONDS",
    help="Wish: so long after ksmd's start all is merged that merges.",
)  # fmt: skip
@click.option(
    "--cpu", "cores", type=Percent(), metavar="PERCENT",
    help="Wish: ksmd takes at most so much of a core, while it merges and later on.",
)  # fmt: skip
@click.option("--apply", "applies", is_flag=True, help="Set the tunables; they stay.")
@click.option(
    "--advisor", is_flag=True,
    help="With --apply: let the kernel's own advisor choose pages_to_scan, within limits.",
)  # fmt: skip
@click.option("--start-ksmd", is_flag=True, help="With --apply: let ksmd run, too.")
@click.option("--undo", "undoes", is_flag=True, help="Put back what --apply has set.")
@click.option(
    "--calibrate", "wants_calibration", is_flag=True,
    help="Measure the CPU of ksmd's visits and store it: some seconds, once for each host.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show what would be done; change nothing.")
@reports
def command(
    choice: Choice,
    output: Output,
    within: float | None,
    cores: float | None,
    applies: bool,
    advisor: bool,
    start_ksmd: bool,
    undoes: bool,
    wants_calibration: bool,
    dry_run: bool,
) -> int:
    """Find the tunables of ksmd that keep a wish, their price, and set them.

    The wish is for the chosen processes' memory, as far as KSM would take it, or for what KSM
    follows on this host now. It needs a calibration: where nobody uses KSM, ksmd runs on memory of
    our own for some seconds, and all tunables are put back, whatever happens; where others use it,
    nothing is changed, and ksmd's own scans are watched.

    What --apply sets stays until --undo, or the next boot.
    """
    wished = within is not None or cores is not None
    if undoes + wants_calibration + wished > 1:
        raise Usage(
            "--calibrate, --undo and a wish are three things", "give one of them: see `--help`"
        )
    if (applies and not wished) or ((advisor or start_ksmd) and not applies):
        raise Usage(
            "--apply needs a wish, --advisor and --start-ksmd need --apply",
            "for example `sudo dedup tune --within 60 --apply --start-ksmd`",
        )
    if not wished and choice:
        raise Usage("no wish for these processes", "add `--within 60` or `--cpu 10%`")
    if wants_calibration:
        return _calibrate(output, dry_run=dry_run)
    if undoes:
        return _undo(output, dry_run=dry_run)
    if not wished:
        raise Usage(
            "nothing to do without a wish",
            "add `--within 60` or `--cpu 10%`; `sudo dedup tune --calibrate` comes first",
        )
    from dedup import scanning, tuning
    from dedup.change import tune
    from dedup.change.tunables import changed_for_now
    from dedup.kernel.ksm import RUN_MERGE, Ksm
    from dedup.model.wish import ADVISOR, FIXED, Wish
    from dedup.report import text, tuned
    from dedup.sources.live import Options

    if applies and not dry_run:
        Ksm().require()
        if not Ksm().writable():
            raise NotPermitted("--apply writes KSM's tunables")
    pids = scanning.choose(choice) if choice else None
    with output.progress() as progress:
        plan = scanning.Plan(options=Options(progress=progress))
        found = tuning.tune(Wish(within, cores), pids, plan)
    planned = None
    if applies:
        planned = dict(found.named(ADVISOR if advisor else FIXED).tunables)
        if start_ksmd:
            planned["run"] = RUN_MERGE
    applied = tune.apply(planned) if planned is not None and not dry_run else None
    words = words_of(choice)
    if output.json:
        output.result(tuned.tuning_object(found, words, planned, applied))
    else:
        output.show(tuned.head(found), "", tuned.table(found), "")
        output.show("\n".join(tuned.lines(found, words, planned, applied)))
        for warning in changed_for_now():
            output.note(f"dedup: warning: {warning}")
    if found.scan is None or found.scan.complete:
        return 0
    output.note(f"dedup: done in part: {text.partial(found.scan)}")
    return Partial.exit_status


def _undo(output: Output, *, dry_run: bool) -> int:
    from dedup.change import tunables, tune
    from dedup.report import tuned

    restored = tunables.planned_undo() if dry_run else tune.undo()
    if output.json:
        output.result(tuned.undo_object(restored))
    else:
        output.show("\n".join(tuned.undo_lines(restored)))
    return 0


def _calibrate(output: Output, *, dry_run: bool) -> int:
    from dedup import calibration
    from dedup.change.tunables import others_at_the_knobs
    from dedup.observe import calibrate
    from dedup.report import calibrated

    path = calibration.PATH
    if dry_run:
        plan = calibrate.plan()
        if output.json:
            output.result(calibrated.plan_object(plan, path))
        else:
            output.show("\n".join(calibrated.plan_lines(plan, path)))
        return 0
    with output.progress() as progress:
        result = calibrate.calibrate(path, progress=progress)
    if output.json:
        output.result(calibrated.calibration_object(result, path))
    else:
        if result.calibration.measured:
            output.show(calibrated.measured_table(result.calibration.measured), "")
        output.show("\n".join(calibrated.calibration_lines(result, path)))
    for warning in others_at_the_knobs():
        output.note(f"dedup: warning: {warning}")
    return 0
