"""`dedup capacity`: from saved scans of a few instances, how many fit."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dedup.cli.options import Tunable, reports
from dedup.cli.root import Exemplified
from dedup.errors import Usage

if TYPE_CHECKING:
    from dedup.cli.output import Output

INSTANCES_MOST = 10_000


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic since 8.5
    """Bytes, as `64G` or `512 MiB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of the word."""
        if isinstance(value, int):
            return value
        from dedup.estimate.host import parse_size

        try:
            return parse_size(str(value))
        except ValueError as e:
            self.fail(str(e), param, ctx)


class Part(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic since 8.5
    """Per cent, `10` or `10%`, from 0 to less than 100; gives the share."""

    name = "percent"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The share."""
        try:
            percent = float(str(value).removesuffix("%"))
        except ValueError:
            percent = math.nan
        if not 0 <= percent < 100:
            self.fail(f"{value!r} is not a number of per cent from 0 to below 100", param, ctx)
        return percent / 100


class Mix(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic since 8.5
    """Services and how many of each, `web=12,worker=30`."""

    name = "mix"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, int]:
        """Numbers by label."""
        if isinstance(value, dict):
            return value
        found: dict[str, int] = {}
        for part in str(value).split(","):
            label, separator, number = part.rpartition("=")
            if not separator or not label or not re.fullmatch("[0-9]{1,5}", number):
                self.fail(f"{part!r} is no service and number, such as web=12", param, ctx)
            if label in found:
                self.fail(f"{label} is there twice", param, ctx)
            if not 1 <= int(number) <= INSTANCES_MOST:
                self.fail(f"{label} takes 1 to {INSTANCES_MOST:,} instances", param, ctx)
            found[label] = int(number)
        return found


@click.command(
    cls=Exemplified,
    examples=[
        ("sudo dedup scan --pid 101 --save web-1.dedup", "first: save a few instances, one by one"),
        ("dedup capacity web-*.dedup", "how many fit in this host's memory"),
        ("dedup capacity web-*.dedup --ram 64G --reserve 4G", "in another's"),
        ("dedup capacity web-*.dedup -n 40", "what 40 instances need"),
        ("dedup capacity *.dedup --mix web=12,worker=30", "services together"),
        ("dedup capacity web-*.dedup --tunable use_zero_pages=1", "with another tunable of KSM"),
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
    "--headroom", type=Part(), default="10", metavar="PERCENT", show_default=True,
    help="Of the rest, to stay free.",
)  # fmt: skip
@click.option(
    "--instances", "-n", type=click.IntRange(1, INSTANCES_MOST), metavar="N",
    help="Show what so many need, too.",
)  # fmt: skip
@click.option(
    "--mix", type=Mix(), metavar="NAME=N,...",
    help="Services, by the labels of their files, and how many instances of each go together.",
)  # fmt: skip
@click.option(
    "--swap", type=Size(), metavar="SIZE",
    help="For a bad day; by default this host's, and none with --ram.",
)  # fmt: skip
@click.option(
    "--tunable", "assumed", type=Tunable(), multiple=True, metavar="NAME=VALUE",
    help="For another value of a tunable of KSM: use_zero_pages=1, pages_to_scan=5000.",
)  # fmt: skip
@reports
def command(
    output: Output,
    files: tuple[Path, ...],
    label: str | None,
    ram: int | None,
    reserve: int,
    headroom: float,
    instances: int | None,
    mix: dict[str, int] | None,
    swap: int | None,
    assumed: tuple[tuple[str, int], ...],
) -> int:
    """How many instances of a service fit in a host's memory.

    From scans of a few instances (`dedup scan --save`), three at the least: what they have in
    common, what each has alone, and from that the frames of any number of them once ksmd has
    converged. It reads the files alone and changes nothing.
    """
    from dedup.estimate import capacity
    from dedup.report import capacity as report
    from dedup.report.names import safe

    if not files:
        raise Usage(
            "no files of fingerprints given",
            "save some instances, each with `dedup scan --pid N --save web-1.dedup`, then "
            "`dedup capacity web-*.dedup`",
        )
    if ram is not None and reserve >= ram:
        raise Usage("--reserve takes all of --ram", "give more memory, or reserve less of it")
    if mix is not None and label is not None:
        raise Usage("--mix names the services already", "leave out `--label`")
    found = capacity.plan(
        files,
        capacity.Wish(
            label=label, ram_bytes=ram, reserve_bytes=reserve, headroom=headroom,
            instances=instances, assumed=dict(assumed), mix=mix, swap_bytes=swap,
        ),
    )  # fmt: skip
    if output.json:
        output.result(report.capacity_object(found))
        return 0
    output.show(*report.lines(found, output.width, plain=output.plain))
    for warning in found.warnings:
        output.note(f"Warning: {safe(warning.message, plain=output.plain)}")
    return 0
