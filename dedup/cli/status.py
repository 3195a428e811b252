"""`dedup status`: KSM on this host now."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import click

from dedup.cli.options import reports
from dedup.cli.root import Exemplified

if TYPE_CHECKING:
    from dedup.cli.output import Output

BAR_SECONDS: Final = 3.0


def _seconds(_ctx: click.Context, _param: click.Parameter, value: float) -> float:
    if not 0 <= value < math.inf:
        raise click.BadParameter(f"{value} is not a number of seconds from 0 on")
    return value


@click.command(
    cls=Exemplified,
    examples=[
        ("dedup status", "what KSM saves and costs now"),
        ("sudo dedup status --by user", "for whom, all processes in sight"),
        ("dedup status --no-sample --json", "the counters at once, for programs"),
    ],
)
@click.option(
    "--by", type=click.Choice(["process", "user", "cgroup", "unit", "name"]), default="process",
    show_default=True, help="Add up the processes' counters by this.",
)  # fmt: skip
@click.option(
    "--top", type=click.IntRange(min=0), default=10, show_default=True, metavar="N",
    help="Of those, how many to show, the most profit first.",
)  # fmt: skip
@click.option(
    "--interval", type=float, default=1.0, show_default=True, metavar="SECONDS",
    callback=_seconds, help="Watch ksmd so long for what it does a second; 0 for not at all.",
)  # fmt: skip
@click.option("--no-sample", is_flag=True, help="As --interval 0: figures at once, no rates.")
@reports
def command(output: Output, by: Any, top: int, interval: float, no_sample: bool) -> int:
    """Show what KSM saves and costs on this host now; nothing is changed.

    What is saved is pages_sharing and ksm_zero_pages, less KSM's own records of 64 bytes for each
    page that it follows and each frame that it keeps. pages_shared are the frames kept: not saved.
    It is an upper bound, since memory that a fork had shared anyway counts too; and while ksmd is
    stopped, the counters stand still.

    The kernel shows a process's counters to its user and to root alone.
    """
    from dedup.observe.status import collect, groups
    from dedup.report import status as report

    seconds = 0.0 if no_sample else interval
    with output.progress() as progress:
        # A bar for a moment only flickers.
        status = collect(seconds, progress=progress if seconds > BAR_SECONDS else None)
    ranked = groups(status.uses.found, by)
    if output.json:
        output.result(report.status_object(status, by, ranked, top))
    else:
        view = report.View(
            status, by=by, groups=ranked, top=top, width=output.width, plain=output.plain
        )
        output.show(*view.result())
        output.advise(*view.advice())
    return 0
