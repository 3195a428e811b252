"""The root command: it finds the others without importing them."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any, Final

import click

from dedup.errors import Usage
from dedup.kernel import shortage

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS: Final = {
    "scan": "Predict what KSM would merge in live processes.",
    "apply": "Make memory mergeable, wait for ksmd, compare its counters with the prediction.",
    "run": "Start a command with all its memory mergeable.",
    "standing": "Show, or set, what makes memory mergeable for good.",
    "capacity": "From saved scans of a few instances, or a pilot: how many fit, at what risk.",
    "tune": "Find the tunables of ksmd for a wished time or CPU, and set them.",
    "status": "Show what KSM saves and costs on this host now.",
    "doctor": "Say what this host, kernel and user can't do, and the way out.",
    "restore": "Put back what an interrupted run of ours left changed.",
}
"""Commands with a line of help each; the module is `dedup.cli.<name>`, its object `command`."""

SETTINGS: Final[dict[str, Any]] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}
"""Context settings that every command takes."""


class Exemplified(click.Command):
    """A command whose help begins with examples.

    Parameters
    ----------
    examples : sequence of (str, str)
        What to type, and what it does.
    """

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", SETTINGS)
        super().__init__(*args, **kwargs)
        self.examples = examples

    def invoke(self, ctx: click.Context) -> Any:
        """Run it, where there is room for what it imports."""
        if not isinstance(self, click.Group):
            shortage.for_import("numpy")
        return super().invoke(ctx)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples first, then what click writes."""
        if self.examples:
            with formatter.section("Example" if len(self.examples) == 1 else "Examples"):
                formatter.write_dl(self.examples, col_max=48)
            formatter.write_paragraph()
        super().format_help(ctx, formatter)


class Root(Exemplified, click.Group):
    """The group: a command's module is imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names in the order of their use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"dedup.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or say which one may be meant."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            meant = f"`dedup {near[0]}` is close; " if near else ""
            raise Usage(f"there is no command {name!r}", f"{meant}see `dedup --help`")
        return super().resolve_command(ctx, args)

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002
        formatter: click.HelpFormatter,
    ) -> None:
        """The commands, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"dedup {version('dedup-ksm')}")
    except PackageNotFoundError:
        click.echo("dedup (not installed)")
    ctx.exit()


@click.command(
    cls=Root,
    no_args_is_help=True,
    examples=[
        ("dedup scan --pid 1234", "what KSM would merge in a process"),
        ("dedup scan --all --by name", "which services are worth it"),
        ("dedup run -- redis-server", "start a program with mergeable memory"),
        ("sudo dedup apply --self-test", "make the kernel prove the prediction"),
    ],
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version,
    help="Show the version.",
)  # fmt: skip
def command() -> None:
    """Predict what Linux's kernel samepage merging (KSM) would save, and make it so."""
