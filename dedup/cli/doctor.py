"""`dedup doctor`: what this host, kernel and user can and can't do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dedup.cli.options import reports
from dedup.cli.root import Exemplified
from dedup.errors import CheckFailed

if TYPE_CHECKING:
    from dedup.cli.output import Output


@click.command(
    cls=Exemplified,
    examples=[
        ("dedup doctor", "what is limited here for you, and the way out"),
        ("sudo dedup doctor -q", "for root; nothing of what is well"),
        ("dedup doctor --strict --json", "for programs, with a status"),
    ],
)
@click.option("--quiet", "-q", is_flag=True, help="Leave out what is well.")
@click.option("--strict", is_flag=True, help="Exit status 1 when something can't be done here.")
@reports
def command(output: Output, quiet: bool, strict: bool) -> int:
    """Say what this host, kernel and user can and can't do, and the way out of each "can't".

    Each check is "ok"; "limited": it works, but less well or only in part; "can't": something
    can't be done here, or by this user; or a "note". All is probed, nothing is changed.

    The exit status is 0 whatever is found, since finding it is what was asked for; with --strict,
    it is 1 when there is a "can't".
    """
    import platform

    from dedup.kernel.ksm import PAGE_BYTES, Ksm
    from dedup.observe.doctor import examine
    from dedup.report import doctor as report

    checks = examine()
    if output.json:
        ksm = Ksm()
        tunables = ksm.tunables() if ksm.present else {}
        output.result(report.doctor_object(checks, platform.release(), PAGE_BYTES, tunables))
    else:
        output.show(*report.view(checks, width=output.width, plain=output.plain, verbose=not quiet))
    return CheckFailed.exit_status if strict and report.counts(checks)["cannot"] else 0
