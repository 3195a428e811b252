"""`dedup tune`: what ksmd's work costs on this host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dedup.cli.options import reports
from dedup.cli.root import Exemplified
from dedup.errors import Usage

if TYPE_CHECKING:
    from dedup.cli.output import Output


@click.command(
    cls=Exemplified,
    examples=[
        ("sudo dedup tune --calibrate", "measure what ksmd's work costs here, for all prices"),
        ("sudo dedup tune --calibrate --dry-run", "what that would change for some seconds"),
    ],
)
@click.option(
    "--calibrate", "wants_calibration", is_flag=True,
    help="Measure the CPU of ksmd's visits and store it: some seconds, once for each host.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show what would be done; change nothing.")
@reports
def command(output: Output, wants_calibration: bool, dry_run: bool) -> int:
    """Measure what ksmd's work costs on this host: prices of merging come from it.

    Where nobody uses KSM, ksmd runs on memory of our own for some seconds, and all tunables are
    put back, whatever happens. Where others use it, nothing is changed: ksmd's own scans are
    watched, which gives a mean for that mix and wider ranges.
    """
    if not wants_calibration:
        raise Usage(
            "nothing to do: `dedup tune` can calibrate", "type `sudo dedup tune --calibrate`"
        )
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
