"""`dedup restore`: put back what an interrupted run of ours left changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dedup.cli.options import reports
from dedup.cli.root import Exemplified
from dedup.errors import DedupError, Partial

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
    """Put back what an interrupted run of ours left changed.

    That is settings, and processes made mergeable by an application that did not come to its end.
    Each was written to a journal before it was changed. A setting that somebody else has changed
    since stays as it is. What a finished `dedup apply` did stays too: `dedup apply --undo`.
    """
    from dedup.change import tunables
    from dedup.change.applied import Applied
    from dedup.change.undo import undo
    from dedup.kernel.ksm import Ksm
    from dedup.report import applied, planned

    restored = tunables.planned_restore() if dry_run else tunables.restore(Ksm())
    try:
        with tunables.host_locked(dry_run=dry_run):
            undone = undo(Applied(), interrupted_only=True, dry_run=dry_run)
    except DedupError:
        if not output.json:
            output.show("\n".join(applied.restored_lines(restored)))
        raise
    if output.json:
        output.result(applied.restore_object(restored, undone.processes))
    else:
        lines = applied.restored_lines(restored) if restored or not undone.processes else []
        if undone.processes:
            lines += planned.undo_lines(undone, dry_run=dry_run)
        output.show("\n".join(lines))
    failed = any(r.outcome == "failed" for r in restored) or not undone.complete
    return Partial.exit_status if failed else 0
