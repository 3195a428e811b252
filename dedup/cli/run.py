"""`dedup run`: start a command with all its memory mergeable."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

import click

from dedup.cli.output import Output
from dedup.cli.root import SETTINGS, Exemplified
from dedup.errors import DedupError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import FileIO

    from dedup.change.hold import Hold

KEEP_SECONDS: Final = 0.2
"""How often to look whether another run of ours is done with KSM."""


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
        ("dedup run --report make -j8", "and say at the end what it saved"),
        ("sudo dedup run --start-ksmd ./job", "ksmd runs as long as the job"),
        ("dedup run --no-randomize ./worker", "the same addresses in each copy"),
    ],
    context_settings={**SETTINGS, "allow_interspersed_args": False},
)
@click.option(
    "--report", is_flag=True,
    help="Say on stderr, at the end, what the command and its descendants saved.",
)  # fmt: skip
@click.option(
    "--report-json", "json_file", metavar="FILE", type=click.Path(dir_okay=False),
    help="The same as JSON, to a file.",
)  # fmt: skip
@click.option(
    "--start-ksmd", is_flag=True,
    help="Let ksmd run as long as the command; the last of several puts it back. Needs root.",
)  # fmt: skip
@click.option(
    "--no-randomize", is_flag=True,
    help="Place mappings at the same addresses each time, so that pages with pointers are equal, "
    "too. Whoever finds a hole in the program then knows where everything lies: not for programs "
    "that face strangers. A program that starts itself anew keeps it, a setuid one loses it.",
)  # fmt: skip
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND...")
def command(
    words: tuple[str, ...],
    report: bool,
    json_file: str | None,
    start_ksmd: bool,
    no_randomize: bool,
) -> int:
    """Start COMMAND with all its memory mergeable.

    Everything that KSM would accept counts, what the command maps later included, and so do its
    children, unless they switch it off. dedup is gone then: the command takes its place, with its
    pid, its files and its signals. With --report, --report-json or --start-ksmd dedup stays as its
    parent instead: it passes signals on, stops and goes on with it, and ends as it ends.

    Nothing merges before ksmd runs: `--start-ksmd`, or `echo 1 > /sys/kernel/mm/ksm/run` as root.

    The exit status is the command's own; where a signal ended it, dedup ends by the same one.
    Where it can't be started: 127 not found, 126 not executable, 125 anything else.
    """
    from dedup.kernel import advise, family, personality
    from dedup.kernel.ksm import Ksm

    environment = family.starting_environment()

    def start() -> NoReturn:
        advise.set_merge_any(True)
        if no_randomize:
            personality.no_randomize()
        _execute(list(words), environment)

    ksm = Ksm()
    if ksm.present and not ksm.running and not start_ksmd:
        Output().advise(
            "dedup: ksmd is not running, so nothing merges yet: add `--start-ksmd`, or "
            "`echo 1 | sudo tee /sys/kernel/mm/ksm/run`"
        )
    if not (report or json_file or start_ksmd):
        start()
    return _stay(
        list(words), start, report=report, json_file=json_file, hold=start_ksmd,
        randomized=not no_randomize,
    )  # fmt: skip


def _stay(
    words: list[str],
    start: Callable[[], NoReturn],
    *,
    report: bool,
    json_file: str | None,
    hold: bool,
    randomized: bool,
) -> int:
    """Be the command's parent, until it ends."""
    from dedup.change import launch, saved
    from dedup.change.hold import Hold
    from dedup.kernel import family
    from dedup.kernel.ksm import Ksm
    from dedup.report.jsonout import error_object

    me = os.getpid()
    _flush()
    with ExitStack() as stack:
        # Opened now, since it would be a pity to find out at the end that it can't be.
        file = None if json_file is None else stack.enter_context(_open(json_file))
        mask = stack.enter_context(launch.signals_held())
        holding = stack.enter_context(_putting_back(Hold(Ksm()))) if hold else None
        if holding is not None and holding.waits:
            Output().note(
                "dedup: another run of dedup is changing KSM; ksmd is started when that is done"
            )
        watch = None
        if report or file is not None:
            family.adopt_orphans()
            watch = saved.Watch(me)
        try:
            child = launch.Child(start, mask, _again)
        except DedupError as e:
            if file is not None:
                _write(file, error_object(e))
            raise

        def tick() -> float | None:
            due = []
            if watch is not None:
                watch.look()
                due.append(watch.wait_seconds())
            if holding is not None and holding.waits:
                _keep(holding)
                due.append(KEEP_SECONDS)
            return min(due, default=None)

        end = child.wait(tick)
        if watch is not None:
            from dedup.report import ran

            result = ran.Run(
                words=words, pid=child.pid, status=end.status, signal=end.signal,
                randomized=randomized, started_ksmd=hold, saved=watch.end(),
                left_running=saved.left_running(me),
            )  # fmt: skip
            if file is not None:
                _write(file, ran.run_object(result))
            if report:
                for line in ran.run_lines(result):
                    Output().note(line)
    if end.signal is not None:
        launch.end_by(end.signal)
        return 128 + end.signal
    return end.status or 0


@contextmanager
def _putting_back(hold: Hold) -> Iterator[Hold]:
    """Hold it; a failure to put it back is told, but the status stays the command's."""
    hold.__enter__()
    try:
        yield hold
    finally:
        try:
            hold.__exit__(None, None, None)
        except DedupError as e:
            Output().note(f"dedup: {e.message}; {e.hint}")


def _keep(hold: Hold) -> None:
    """Start ksmd if it can be by now; the command goes on in any case."""
    try:
        hold.keep()
    except DedupError as e:
        hold.waits = False
        Output().note(f"dedup: {e.message}; {e.hint}")


def _open(path: str) -> FileIO:
    try:
        # Without a buffer: closing it can't fail then.
        return open(path, "wb", buffering=0)
    except OSError as e:
        raise RunFailed(f"can't write {path}: {e.strerror}", "give another file") from e


def _write(file: FileIO, data: dict[str, Any]) -> None:
    import json

    left = json.dumps(data, allow_nan=False).encode() + b"\n"
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as e:
        Output().note(f"dedup: writing {file.name} failed: {e.strerror}")


def _again(code: str, message: str, hint: str) -> RunFailed:
    """The error that the child met."""
    kind = {c.code: c for c in (NotFound, NotExecutable)}.get(code, RunFailed)
    return kind(message, hint)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _execute(words: list[str], environment: dict[str, str]) -> NoReturn:
    # Python ignores these two, and what is ignored stays so in the command.
    kept: dict[int, Any] = {
        number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGPIPE, signal.SIGXFSZ)
    }
    _flush()
    try:
        os.execvpe(words[0], words, environment)
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
