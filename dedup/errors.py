"""The tree of errors: message, code, exit status and the next step live on the class."""

from __future__ import annotations

import errno
from typing import ClassVar, Final

UNLOADABLE: Final = ("failed to map segment", "cannot map zero-fill pages", "allocate memory:")
"""How the dynamic loader says that a library found no memory."""


class Told(BaseException):
    """Base of all that ends a command with a word and a status.

    Parameters
    ----------
    message : str
        What failed and why, one short sentence or two.
    hint : str, optional
        What to type or do next; the class has a default.
    """

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 70
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint


class DedupError(Told, Exception):
    """Base of all errors that users meet."""


class CheckFailed(DedupError):
    """Prediction and counters differ beyond the tolerance, or a gate failed."""

    code = "check-failed"
    exit_status = 1


class Usage(DedupError):
    """The words of the command don't fit together."""

    code = "usage"
    exit_status = 2
    default_hint = "see `dedup --help`"


class Partial(DedupError):
    """Done in part; the message says which part and why."""

    code = "partial"
    exit_status = 3


class NotPermitted(DedupError):
    """The user may not do this."""

    code = "not-permitted"
    exit_status = 4
    default_hint = "run it as root: `sudo dedup ...`"


class NoSuchProcess(DedupError):
    """No process has this pid, or none fits the choice."""

    code = "no-such-process"
    exit_status = 5
    default_hint = "list the processes with `ps -e`"


class ProcessGone(NoSuchProcess):
    """The process ended, or its pid now belongs to another one."""

    code = "process-gone"


class NoMemory(NoSuchProcess):
    """The process has no memory of its own: a zombie or a kernel thread."""

    code = "no-memory"
    default_hint = "choose a process that runs a program: `ps -eo pid,stat,comm`"


class Unsupported(DedupError):
    """The kernel here can't do it."""

    code = "unsupported"
    exit_status = 6


class KsmNotRunning(Unsupported):
    """Ksmd is not running, so nothing merges."""

    code = "ksm-not-running"
    default_hint = "add `--start-ksmd`, or `echo 1 > /sys/kernel/mm/ksm/run` as root"


class NotCalibrated(Unsupported):
    """What ksmd's work costs on this host was not measured yet, so no wish can be met."""

    code = "not-calibrated"
    default_hint = "measure it, which takes some seconds: `sudo dedup tune --calibrate`"


class Busy(DedupError):
    """Another run of ours holds the lock."""

    code = "busy"
    exit_status = 9


class NotStopped(Busy):
    """A process is in a wait that nothing interrupts, so that no call can be put into it."""

    code = "not-stopped"
    default_hint = "see its state with `ps -o pid,stat,wchan:32 -p PID`, and run it again later"


class BadInput(DedupError):
    """A file that was given to read is not what it should be."""

    code = "bad-input"
    exit_status = 7


class Refused(DedupError):
    """It could be tried, but might harm the process: refused by policy."""

    code = "refused"
    exit_status = 8


class OutputFailed(DedupError):
    """Reading or writing of a file of ours failed."""

    code = "io"
    exit_status = 10


class OutOfMemory(DedupError, MemoryError):
    """Memory for dedup itself was refused, by a limit or by the host."""

    code = "out-of-memory"
    exit_status = 10


class Interrupted(Told):
    """A signal ended the run; everything was put back.

    As KeyboardInterrupt it is no Exception: whoever goes on after the error of one process must
    not go on after this.
    """

    code = "interrupted"
    exit_status = 130
    default_hint = ""

    def __init__(self, message: str, signal_number: int = 2, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.signal_number = signal_number


class NotMergeable(Unsupported):
    """KSM does not, or would not, take this memory."""

    code = "not-mergeable"
    default_hint = "start the program with `dedup run -- CMD`: all its memory is mergeable then"


def is_refusal(e: BaseException | None) -> bool:
    """Whether memory was refused behind an exception."""
    while e is not None:
        if isinstance(e, MemoryError) or (isinstance(e, OSError) and e.errno == errno.ENOMEM):
            return True
        if isinstance(e, ImportError) and any(words in str(e).lower() for words in UNLOADABLE):
            return True
        e = e.__cause__
    return False
