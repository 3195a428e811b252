"""Exit statuses: every way that a command can end, in one place."""

from __future__ import annotations

import errno
import os
import signal
import traceback
from typing import TYPE_CHECKING, Final

import click

from dedup.cli import output, root
from dedup.errors import DedupError, Interrupted, NotPermitted, OutputFailed, Told, Usage
from dedup.kernel import shortage

if TYPE_CHECKING:
    from types import FrameType

DEFECT: Final = 70
RUN_FAILED: Final = 125
"""Status of `dedup run` for failures of its own, as `env` and `timeout` have it."""

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command."""

OUTPUT_ERRNOS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def run(argv: list[str]) -> int:
    """Run the command line `argv` and give the exit status.

    Raises
    ------
    MemoryError, ImportError
        There is not even the memory to say so.
    """
    _catch_signals()
    try:
        status = _run(argv)
        output.flush()
        too_late_to_interrupt()
    except (DedupError, Interrupted) as e:
        return _failed(e, argv)
    return status


def _run(argv: list[str]) -> int:
    try:
        with shortage.needed("go on"), shortage.spare():
            status = root.command.main(argv, prog_name="dedup", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message())
        return Usage.exit_status
    except click.ClickException as e:
        return _failed(_usage(e), argv)
    except (click.Abort, KeyboardInterrupt):
        return _failed(Interrupted("interrupted"), argv)
    except (DedupError, Interrupted) as e:
        return _failed(e, argv)
    except BrokenPipeError:
        output.drop_stdout()
        return 0
    except OSError as e:
        if e.errno in OUTPUT_ERRNOS:
            return _failed(OutputFailed(f"writing failed: {e.strerror}"), argv)
        return _defect(e, argv)
    except Exception as e:  # noqa: BLE001 - whatever it is, the user gets a word and a status
        ended = _interruption(e)
        return _failed(ended, argv) if ended else _defect(e, argv)
    return status if isinstance(status, int) else 0


def _interruption(e: BaseException | None) -> Interrupted | None:
    """The signal behind an exception: an import that it ends may say so in words of its own."""
    while e is not None and not isinstance(e, Interrupted):
        e = e.__cause__
    return e


def _usage(e: click.ClickException) -> Usage:
    """The words of click, as an error of ours."""
    message = e.format_message().strip().rstrip(".")
    message = message[:1].lower() + message[1:]
    ctx = e.ctx if isinstance(e, click.UsageError) else None
    return Usage(message, f"see `{ctx.command_path if ctx else 'dedup'} --help`")


def _failed(e: Told, argv: list[str]) -> int:
    """Tell of an error and give its status."""
    words = argv[: argv.index("--")] if "--" in argv else argv
    running = next((w for w in words if not w.startswith("-")), "") == "run"
    status = e.exit_status
    if isinstance(e, Interrupted):
        status = 128 + e.signal_number
    elif running:
        status = getattr(e, "run_status", RUN_FAILED)
    from dedup.report.hints import typable

    hint = e.hint
    if isinstance(e, NotPermitted) and hint == e.default_hint and os.geteuid() == 0:
        hint = "root may not either: a container or a security module forbids it, see `dmesg`"
    output.error(e, typable(hint), json="--json" in words and not running)
    return status


def _defect(e: Exception, argv: list[str]) -> int:
    """Tell of an exception that nobody expected."""
    if os.environ.get("DEDUP_TRACEBACK") == "1":
        traceback.print_exception(e)
    where = traceback.extract_tb(e.__traceback__)[-1]
    place = f"{os.path.basename(where.filename)}:{where.lineno}"
    error = DedupError(
        f"this is a defect of dedup, not of yours: {type(e).__name__} in {place}: {e}",
        "please report it with the output of the same command under DEDUP_TRACEBACK=1",
    )
    _failed(error, argv)
    return DEFECT


def too_late_to_interrupt() -> None:
    """From here on a signal ends nothing: what is done is done, and only said any more."""
    for number in ENDING:
        # Python would give it its deadly default back on its way out.
        signal.signal(number, signal.SIG_IGN)


def _catch_signals() -> None:
    """The first of SIGINT, SIGTERM and SIGHUP unwinds, so that what was changed is put back.

    Those that follow must not stop that half-way: putting back takes milliseconds.
    """
    ending = False

    def interrupt(number: int, _frame: FrameType | None) -> None:
        nonlocal ending
        if ending:
            return
        ending = True
        too_late_to_interrupt()
        raise Interrupted(
            "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}",
            number,
        )

    for number in ENDING:
        # What nohup made ignored stays so.
        if signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}:
            signal.signal(number, interrupt)
