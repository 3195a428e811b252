"""`dedup restore`: put back what an interrupted run of ours left changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dedup.cli.options import reports
from dedup.cli.root import Exemplified
from dedup.errors import Partial

if TYPE_CHECKING:
    from dedup.cli.output import Output


@click.command(
    cls=Exemplified,
    examples=[
        ("sudo dedup restore", "after a run of ours was killed"),
        ("sudo dedup restore --dry-run", "only show what it would put back"),
    ],
)
@click.option("--dry-run", is_flag=True, help="Show what would be put back; change nothing.")
@reports
def command(output: Output, dry_run: bool) -> int:
    """Put back the settings that an interrupted run of ours left changed.

    Each setting was written to a journal before it was changed. One that somebody else has changed
    since stays as it is.
    """
    from dedup.change import tunables
    from dedup.kernel.ksm import Ksm
    from dedup.report import applied

    restored = tunables.planned_restore() if dry_run else tunables.restore(Ksm())
    if output.json:
        output.result(applied.restore_object(restored))
    else:
        output.show("\n".join(applied.restored_lines(restored)))
    failed = any(r.outcome == "failed" for r in restored)
    return Partial.exit_status if failed else 0
