"""Options that several commands share: which processes, and how to speak."""

from __future__ import annotations

import functools
import math
import shlex
from typing import TYPE_CHECKING, Any, Final

import click

from dedup.cli.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable

    from dedup.kernel.processes import Choice

    Callback = Callable[..., Any]


class Seconds(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic since 8.5
    """A number of seconds, above 0; with `auto`, that word too, which gives None."""

    name = "seconds"

    def __init__(self, *, auto: bool = False) -> None:
        self.auto = auto

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | None:
        """Seconds of the word, None for `auto`."""
        if self.auto and value == "auto":
            return None
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            also = ", or auto" if self.auto else ""
            self.fail(f"{value!r} is not a number of seconds above 0{also}", param, ctx)
        return seconds


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


class Percent(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic since 8.5
    """Per cent, `10` or `10%`; gives the share.

    Parameters
    ----------
    headroom : bool
        From 0 to below 100, for what is to stay free; else above 0 and up to 100.
    """

    name = "percent"

    def __init__(self, *, headroom: bool = False) -> None:
        self.headroom = headroom

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The share."""
        try:
            percent = float(str(value).removesuffix("%"))
        except ValueError:
            percent = math.nan
        if self.headroom:
            within, words = 0 <= percent < 100, "from 0 to below 100"
        else:
            within, words = 0 < percent <= 100, "above 0 and up to 100"
        if not within:
            self.fail(f"{value!r} is not a number of per cent {words}", param, ctx)
        return percent / 100


class Rate(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic since 8.5
    """A part of the whole: 0.1 or 10%."""

    name = "rate"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The part, above 0 and up to 1."""
        word = str(value)
        try:
            rate = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
        except ValueError:
            rate = math.nan
        if not 0 < rate <= 1:
            self.fail(f"{value!r} is no part of the memory: 0.1 or 10%", param, ctx)
        return rate


DIGITS: Final = 10
"""Of the largest tunable."""


class Tunable(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic since 8.5
    """NAME=VALUE of a tunable of KSM that decides what merges, when, or at what price."""

    name = "tunable"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """Name and value."""
        if isinstance(value, tuple):
            return value
        from dedup.scanning import ASSUMABLE

        name, _, number = str(value).partition("=")
        if name not in ASSUMABLE:
            self.fail(f"{name!r} is none of {', '.join(ASSUMABLE)}", param, ctx)
        low, high = ASSUMABLE[name]
        if not (
            number.isascii()
            and number.isdigit()
            and len(number) <= DIGITS
            and low <= int(number) <= high
        ):
            self.fail(f"{name} takes a whole number from {low} to {high}", param, ctx)
        return name, int(number)


def chooses_processes(f: Callback) -> Callback:
    """Add the options that choose processes; the function gets `choice` (kernel.processes).

    `dedup.scanning.choose(choice)` makes pids of it, and has the errors.
    """

    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        from dedup.kernel.processes import Choice

        for field in ("names", "users", "cgroups", "containers"):
            if "" in kwargs[field]:
                raise click.UsageError(f"--{field[:-1]} is empty (an unset variable?)")
        parts = {
            field: kwargs.pop(field)
            for field in ("pids", "names", "users", "cgroups", "containers", "trees", "all")
        }
        return f(*args, choice=Choice(**parts), **kwargs)

    pid = click.IntRange(min=1)
    options = [
        click.option("--pid", "pids", type=pid, multiple=True, metavar="N", help="This process."),
        click.option("--name", "names", multiple=True, metavar="GLOB",
                     help="Processes of this name, as `ps -o comm` has it: 'redis*'."),
        click.option("--user", "users", multiple=True, metavar="NAME", help="Of this user."),
        click.option("--cgroup", "cgroups", multiple=True, metavar="PATH",
                     help="In this cgroup or below it: /system.slice/redis.service."),
        click.option("--container", "containers", multiple=True, metavar="NAME",
                     help="In this container, by name or id."),
        click.option("--tree", "trees", type=pid, multiple=True, metavar="PID",
                     help="This process with its descendants."),
        click.option("--all", "all", is_flag=True, help="All processes."),
    ]  # fmt: skip
    return _add(call, options)


def words_of(choice: Choice) -> str:
    """The options that make this choice, as one types them."""
    words = []
    for option, values in (
        ("--pid", choice.pids),
        ("--name", choice.names),
        ("--user", choice.users),
        ("--cgroup", choice.cgroups),
        ("--container", choice.containers),
        ("--tree", choice.trees),
    ):
        for value in values:
            words += [option, str(value)]
    return shlex.join([*words, *(["--all"] if choice.all else [])])


def reports(f: Callback) -> Callback:
    """Add `--json`, `--color` and `--ascii`; the function gets `output` (cli.output.Output)."""

    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        parts = {field: kwargs.pop(field) for field in ("json", "color", "ascii")}
        return f(*args, output=Output(**parts), **kwargs)

    options = [
        click.option("--json", "json", is_flag=True, help="One JSON object on stdout."),
        click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto",
                     show_default=True, help="Colours; NO_COLOR is respected."),
        click.option("--ascii", "ascii", is_flag=True, help="Nothing but ASCII."),
    ]  # fmt: skip
    return _add(call, options)


def _add(f: Callback, options: list[Callback]) -> Callback:
    for option in reversed(options):
        f = option(f)
    return f
