"""`dedup capacity`: from saved scans of a few instances, or from a pilot, how many fit."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dedup.cli.options import Percent, Seconds, Size, Tunable, reports
from dedup.cli.root import Exemplified
from dedup.errors import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dedup.change.pilot import Ready
    from dedup.cli.output import Output
    from dedup.estimate.capacity import Wish

COPIES = 3
COPIES_MOST = 64
INSTANCES_MOST = 10_000


class ReadySign(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic since 8.5
    """How a copy shows that it is ready: a pattern, a port or seconds."""

    name = "ready"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Ready:
        """The sign."""
        from dedup.change.pilot import Ready, parse_ready

        if isinstance(value, Ready):
            return value
        try:
            return parse_ready(str(value))
        except ValueError as e:
            self.fail(str(e), param, ctx)


def pilots(f: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a pilot; the function gets `pilot`, None where none is asked for."""

    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        names = ("copies", "ready", "limit", "settings")
        given = {name: kwargs.pop(name) for name in names}
        told = [f"--{name}" for name, value in given.items() if value]
        if kwargs["pilot"] is None and told:
            raise Usage(f"{told[0]} needs --pilot", "name a command: `--pilot 'COMMAND'`")
        if kwargs["pilot"] is not None:
            kwargs["pilot"] = {"command": kwargs["pilot"], **given}
        return f(*args, **kwargs)

    options = [
        click.option("--pilot", metavar="COMMAND",
                     help="Start copies of this here, scan them once they are settled, and stop "
                     "them. No shell runs; `{n}` is the copy's number, `{dir}` a folder of its "
                     "own, removed at the end."),
        click.option("--copies", type=click.IntRange(1, COPIES_MOST), metavar="N",
                     help=f"Of the pilot; {COPIES} by default."),
        click.option("--ready", type=ReadySign(), metavar="PATTERN|PORT|SECONDS",
                     help="When a copy is ready to settle: it prints what fits a regular "
                     "expression, accepts on a TCP port (`70{n}`), or has run so long (`5s`)."),
        click.option("--limit", type=Seconds(), metavar="SECONDS",
                     help="For the copies to be ready and settled; 120 by default."),
        click.option("--settings", is_flag=True,
                     help="Try it without address randomisation, and with fixed hash seeds, too."),
    ]  # fmt: skip
    for option in reversed(options):
        call = option(call)
    return call


class Mix(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic since 8.5
    """Services and how many of each, `web=12,worker=30`; a comma in a label is part of it."""

    name = "mix"
    # A comma ends a part only behind its number.
    part = re.compile(r"(.+?)=([0-9]{1,5})(,|\Z)", re.DOTALL)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, int]:
        """Numbers by label."""
        if isinstance(value, dict):
            return value
        found: dict[str, int] = {}
        text, at, more = str(value), 0, ","
        while more:
            part = self.part.match(text, at)
            if part is None:
                self.fail(
                    f"{text[at:]!r} is no service and number: type `--mix web=12`, or of several "
                    "`--mix web=12,worker=30`",
                    param,
                    ctx,
                )
            label, number, more = part.groups()
            if label in found:
                self.fail(f"{label} is there twice: give its number once", param, ctx)
            if not 1 <= int(number) <= INSTANCES_MOST:
                self.fail(f"{label} takes 1 to {INSTANCES_MOST:,} instances", param, ctx)
            found[label] = int(number)
            at = part.end()
        return found


def together(mixes: Sequence[dict[str, int]]) -> dict[str, int] | None:
    """All services of a repeated `--mix`; None where it is not given.

    Raises
    ------
    Usage
        One of them is there twice.
    """
    found: dict[str, int] = {}
    for mix in mixes:
        for label in mix.keys() & found.keys():
            raise Usage(f"--mix names {label} twice", "give its number once")
        found |= mix
    return found or None


@click.command(
    cls=Exemplified,
    examples=[
        ("sudo dedup scan --pid 101 --save web-1.dedup", "first: save a few instances, one by one"),
        ("dedup capacity web-*.dedup", "how many fit in this host's memory"),
        ("dedup capacity web-*.dedup --ram 64G --reserve 4G", "in another's"),
        ("dedup capacity web-*.dedup -n 40", "what 40 instances need"),
        ("dedup capacity *.dedup --mix web=12,worker=30", "services together"),
        ("dedup capacity web-*.dedup --tunable use_zero_pages=1", "with another tunable of KSM"),
        ("sudo dedup capacity --pilot 'python3 worker.py'", "from copies started here"),
        (
            "sudo dedup capacity --pilot 'redis-server --port 700{n} --dir {dir}' --ready 700{n}",
            "each with a port and a folder",
        ),
        (
            "sudo dedup capacity --pilot 'node app.js' --ready listening --settings",
            "with fixed addresses and seeds, too",
        ),
    ],
)
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--label", metavar="NAME", help="Only the files of this service.")
@click.option(
    "--ram", type=Size(), metavar="SIZE", help="Memory of the host; this one's by default."
)
@click.option(
    "--reserve", type=Size(), default=0, metavar="SIZE", help="For whatever else runs there."
)
@click.option(
    "--headroom", type=Percent(headroom=True), default="10", metavar="PERCENT", show_default=True,
    help="Of the rest, to stay free.",
)  # fmt: skip
@click.option(
    "--instances", "-n", type=click.IntRange(1, INSTANCES_MOST), metavar="N",
    help="Show what so many need, too.",
)  # fmt: skip
@click.option(
    "--mix", "mixes", type=Mix(), multiple=True, metavar="NAME=N,...",
    help="Services, by the labels of their files, and how many instances of each go together: "
    "separated by commas, or each with a --mix of its own. A label may have commas.",
)  # fmt: skip
@click.option(
    "--swap", type=Size(), metavar="SIZE",
    help="For a bad day; by default this host's, and none with --ram.",
)  # fmt: skip
@click.option(
    "--tunable", "assumed", type=Tunable(), multiple=True, metavar="NAME=VALUE",
    help="For another value of a tunable of KSM: use_zero_pages=1, pages_to_scan=5000.",
)  # fmt: skip
@pilots
@reports
def command(
    output: Output,
    files: tuple[Path, ...],
    pilot: dict[str, Any] | None,
    label: str | None,
    ram: int | None,
    reserve: int,
    headroom: float,
    instances: int | None,
    mixes: tuple[dict[str, int], ...],
    swap: int | None,
    assumed: tuple[tuple[str, int], ...],
) -> int:
    """How many instances of a service fit in a host's memory.

    From scans of a few instances (`dedup scan --save`), three at the least: what they have in
    common, what each has alone, and from that the frames of any number of them once ksmd has
    converged. It reads the files alone and changes nothing.

    With --pilot there is nothing to save: a few copies of a command are started here, scanned, and
    stopped again with all that they started, whatever happens meanwhile. KSM is not touched.
    """
    from dedup.estimate import capacity
    from dedup.report import capacity as report
    from dedup.report.names import safe

    if pilot is not None and files:
        raise Usage("a plan is from files or from a pilot", "leave out the files, or --pilot")
    if pilot is None and not files:
        raise Usage(
            "no files of fingerprints given",
            "save some instances, each with `dedup scan --pid N --save web-1.dedup`, then "
            "`dedup capacity web-*.dedup`; or try a command: `dedup capacity --pilot 'COMMAND'`",
        )
    if ram == 0:
        raise Usage("--ram takes the memory of a host, above 0", "such as `--ram 64G`")
    if ram is not None and reserve >= ram:
        raise Usage("--reserve takes all of --ram", "give more memory, or reserve less of it")
    mix = together(mixes)
    if mix is not None and label is not None:
        raise Usage("--mix names the services already", "leave out `--label`")
    if mix is not None and pilot is not None:
        raise Usage("a pilot is of one service, no mix", "leave out `--mix`")
    wish = capacity.Wish(
        label=label, ram_bytes=ram, reserve_bytes=reserve, headroom=headroom,
        instances=instances, assumed=dict(assumed), mix=mix, swap_bytes=swap,
    )  # fmt: skip
    if pilot is not None:
        return _pilot(output, wish, **pilot)
    found = capacity.plan(files, wish)
    if output.json:
        output.result(report.capacity_object(found))
        return 0
    output.show(*report.lines(found, output.width, plain=output.plain))
    for warning in found.warnings:
        output.note(f"Warning: {safe(warning.message, plain=output.plain)}")
    if all(f.randomized == "all" for f in found.service.facts):
        output.advise(
            "What they have in common without address randomisation, or with fixed hash seeds, "
            "can't be told from these: try `dedup capacity --pilot 'COMMAND' --settings`"
        )
    return 0


def _pilot(
    output: Output,
    wish: Wish,
    *,
    command: str,
    copies: int | None,
    ready: Ready | None,
    limit: float | None,
    settings: bool,
) -> int:
    """Plan from copies started here."""
    from dedup.change import pilot
    from dedup.estimate import capacity
    from dedup.estimate import settings as ways
    from dedup.report import capacity as report
    from dedup.report import pilot as pilot_report

    try:
        words = pilot.parse_command(command)
    except ValueError as e:
        raise Usage(str(e), "see `dedup capacity --help`") from e
    with output.progress() as progress:
        found = pilot.run(
            pilot.Wish(
                words=words,
                copies=copies or COPIES,
                ready=ready or pilot.Ready(),
                limit_seconds=limit or pilot.LIMIT_SECONDS,
                settings=ways.SETTINGS if settings else (ways.AS_IS,),
                label=wish.label or "",
                assumed=wish.assumed,
            ),
            progress,
        )
    plans = [capacity.of_instances(trial.instances, wish) for trial in found.trials]
    if output.json:
        data = report.capacity_object(plans[0])
        output.result({**data, "pilot": pilot_report.pilot_object(found, plans)})
        return 0
    output.show(
        *report.lines(plans[0], output.width, plain=output.plain),
        *pilot_report.lines(found, plans, output.width, plain=output.plain),
    )
    for warning in pilot_report.warnings(found, plans):
        output.note(f"Warning: {warning}")
    return 0
