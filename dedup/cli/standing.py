"""`dedup standing`: what makes memory mergeable for good."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

import click

from dedup.cli.options import chooses_processes, reports
from dedup.cli.output import write
from dedup.cli.root import Exemplified
from dedup.errors import NotPermitted, Partial, Unsupported, Usage

if TYPE_CHECKING:
    from dedup.change.standing import Outcome, Target
    from dedup.cli.output import Output
    from dedup.kernel.processes import Choice


@click.command(
    cls=Exemplified,
    examples=[
        ("dedup standing --name redis-server", "what to set, by service, container and guest"),
        ("sudo dedup standing --name redis-server --write", "write the services' drop-ins"),
        ("sudo dedup standing --unit redis-server.service --undo", "remove one again"),
    ],
)
@chooses_processes
@click.option(
    "--unit", "units", multiple=True, metavar="NAME",
    help="This service, whether it runs or not.",
)  # fmt: skip
@click.option("--write", "wants_write", is_flag=True, help="Write the drop-ins of services.")
@click.option("--undo", "wants_undo", is_flag=True, help="Remove the drop-ins that we wrote.")
@click.option("--force", is_flag=True, help="With --write: over a file that is not ours, too.")
@click.option("--dry-run", is_flag=True, help="Show what would be done; change nothing.")
@reports
def command(
    choice: Choice,
    output: Output,
    units: tuple[str, ...],
    wants_write: bool,
    wants_undo: bool,
    force: bool,
    dry_run: bool,
) -> int:
    """Show what makes the memory of the chosen processes mergeable for good.

    A systemd service takes MemoryKSM=yes; where systemd has no such setting, its command is
    started by `dedup run`. Containers and QEMU's guests have ways of their own. Nothing is changed
    without --write, and no service is ever restarted: the commands for that are shown.
    """
    if not choice and not units:
        raise Usage(
            "nothing chosen", "name processes or a service: `dedup standing --name redis-server`"
        )
    if wants_write and wants_undo:
        raise Usage("--write and --undo exclude each other", "see `dedup standing --help`")
    from dedup.change import standing
    from dedup.kernel import processes, systemd
    from dedup.report import standing as shown

    here = systemd.probe()
    if wants_write and not here.version:
        raise Unsupported(
            "there is no systemd here, so there is nothing to write",
            "start the programs with `dedup run -- CMD`",
        )
    ways = standing.Ways(
        systemd=here,
        starts=systemd.starts_with_memory_ksm() if wants_write and not dry_run else None,
        program=_program(),
        unit_text=lambda unit: systemd.unit_text(unit, standing.NAME),
    )
    infos = standing.chosen(processes.choose(choice)) if choice else []
    found = standing.targets(infos, standing.find_guests(infos), ways)
    found += [standing.named(u, ways) for u in units if u not in {t.name for t in found}]
    outcomes: dict[int, Outcome] = {}
    if wants_write or wants_undo:
        _require_some(found)
        for number, target in enumerate(found):
            if target.drop_in is not None:
                outcomes[number] = (
                    standing.write(target, force=force, dry_run=dry_run)
                    if wants_write
                    else standing.undo(target, dry_run=dry_run)
                )
    if output.json:
        output.result(shown.standing_object(found, outcomes, here, dry_run=dry_run))
    else:
        lines = shown.standing_lines(
            found, outcomes, undo=wants_undo, dry_run=dry_run, width=output.width
        )
        # Not by rich, which breaks lines.
        write("\n".join(lines) + "\n")
        if os.geteuid() != 0 and choice and not outcomes:
            output.advise("dedup: QEMU's guests of other users are shown to root alone")
    refused = any(o.outcome == "refused" for o in outcomes.values())
    return Partial.exit_status if refused else 0


def _require_some(found: list[Target]) -> None:
    if not any(t.drop_in for t in found):
        raise Unsupported(
            "none of these has a drop-in that could be written",
            "see what to do instead: leave out --write and --undo",
        )
    if os.geteuid() != 0 and any(t.drop_in and t.uid == 0 for t in found):
        raise NotPermitted("the drop-ins of services are root's")


def _program() -> str:
    """Words that run dedup, by a path that holds in a service."""
    beside = shutil.which("dedup", path=os.path.dirname(sys.executable)) or shutil.which("dedup")
    return os.path.abspath(beside) if beside else f"{sys.executable} -m dedup"
