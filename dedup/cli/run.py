"""`dedup run`: start a command with all its memory mergeable."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, ClassVar, NoReturn

import click

from dedup.cli.output import Output
from dedup.cli.root import SETTINGS, Exemplified
from dedup.errors import DedupError


class RunFailed(DedupError):
    """The command could not be started."""

    code = "run-failed"
    run_status: ClassVar[int] = 125


class NotExecutable(RunFailed):
    """The command is there, and can't be executed."""

    code = "not-executable"
    run_status = 126


class NotFound(RunFailed):
    """There is no such command."""

    code = "not-found"
    run_status = 127
    default_hint = "give its full path, or look at PATH"


@click.command(
    cls=Exemplified,
    examples=[
        ("dedup run -- redis-server --port 7000", ""),
        ("dedup run python3 worker.py", ""),
    ],
    context_settings={**SETTINGS, "allow_interspersed_args": False},
)
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND...")
def command(words: tuple[str, ...]) -> NoReturn:
    """Start COMMAND with all its memory mergeable.

    Everything that KSM would accept counts, what the command maps later included, and so do its
    children, unless they switch it off. dedup is gone then: the command takes its place, with its
    pid, its files and its signals.

    Nothing merges before ksmd runs: `echo 1 > /sys/kernel/mm/ksm/run` as root.

    The exit status is the command's own. Where it can't be started: 127 not found, 126 not
    executable, 125 anything else.
    """
    from dedup.kernel.advise import set_merge_any
    from dedup.kernel.ksm import Ksm

    set_merge_any(True)
    ksm = Ksm()
    if ksm.present and not ksm.running:
        Output().advise(
            "dedup: ksmd is not running, so nothing merges yet: "
            "`echo 1 | sudo tee /sys/kernel/mm/ksm/run`"
        )
    _execute(list(words))


def _execute(words: list[str]) -> NoReturn:
    # Python ignores these two, and what is ignored stays so in the command.
    kept: dict[int, Any] = {
        number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGPIPE, signal.SIGXFSZ)
    }
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    try:
        os.execvp(words[0], words)
    except (FileNotFoundError, NotADirectoryError) as e:
        error: RunFailed = NotFound(f"there is no command '{words[0]}'")
        if os.path.exists(words[0]) and "/" in words[0]:
            error = NotExecutable(f"'{words[0]}': its interpreter is missing", "see its first line")
        raise error from e
    except OSError as e:
        raise NotExecutable(
            f"'{words[0]}' can't be executed: {e.strerror}", f"see `ls -l {words[0]}`"
        ) from e
    except ValueError as e:
        raise RunFailed(f"the command's words can't be passed on: {e}", "") from e
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
