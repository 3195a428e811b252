"""A command started as our child: its signals passed on, its end waited for and passed on.

Terminals send their signals to the whole process group, which the command shares with us, so
those reach it without us. All others that are sent to us are for the command.

Source: credentials(7), sigaction(2) (si_code), waitpid(2), and for the statuses timeout(1).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from dedup.errors import DedupError, NoSuchProcess
from dedup.kernel import family
from dedup.kernel.processes import Handle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAULTS: Final = {
    signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS,
    signal.SIGABRT, signal.SIGKILL, signal.SIGSTOP,
}  # fmt: skip
"""Never held back: they are ours, or nobody can."""
STOPS: Final = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
"""Of job control."""
OURS: Final = {signal.SIGCHLD, signal.SIGCONT, signal.SIGPIPE, signal.SIGXFSZ}
"""Of no use to the command when they were sent to us: what we did caused them."""
SI_KERNEL: Final = 0x80
"""si_code of a terminal's signals (include/uapi/asm-generic/siginfo.h)."""

POLL_SECONDS: Final = 0.05
"""Between two looks at a command that has not reached its exec yet."""


@dataclass(frozen=True, slots=True)
class End:
    """How the command ended: by an exit status or by a signal."""

    status: int | None
    signal: int | None


@contextmanager
def signals_held() -> Iterator[set[int]]:
    """Hold back all signals that can be; gives the mask before. `Child.wait` fetches them.

    What arrives after the command's end is dropped: there is nobody to take it.
    """
    held = _held()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield {int(s) for s in before}
    finally:
        while signal.sigtimedwait(held - set(before), 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Child:
    """A command that runs as our child. All signals must be held (`signals_held`).

    Parameters
    ----------
    prepare : callable
        Called in the child; it ends in exec, or raises `DedupError`.
    mask : set of int
        The signals that it is to have blocked.

    Raises
    ------
    DedupError
        What `prepare` raised, made again by `again`.
    """

    def __init__(
        self,
        prepare: Callable[[], NoReturn],
        mask: set[int],
        again: Callable[[str, str, str], DedupError],
    ) -> None:
        self._asked_to_stop = False
        self._end: End | None = None
        # Where it is ignored, children are never waited for; the command may want that all the
        # same.
        kept = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ours, its = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            signal.signal(signal.SIGCHLD, kept)
            _child(prepare, mask, its)
        os.close(its)
        with os.fdopen(ours, "rb") as pipe:
            # Stopped before its exec it would keep us here: Ctrl-Z and what ends it must come by.
            while self._end is None and not select.select([pipe], [], [], POLL_SECONDS)[0]:
                self._serve(signal.sigtimedwait(_held(), 0))
            failure = pipe.read()
        if failure:
            if self._end is None:
                os.waitpid(self.pid, 0)
            told = json.loads(failure)
            raise again(told["code"], told["message"], told["hint"])

    def wait(self, tick: Callable[[], float | None]) -> End:
        """Wait for its end, and pass signals on meanwhile.

        Parameters
        ----------
        tick : callable
            Called now and then; gives the seconds until it wants to be called again, None for
            never.
        """
        held = _held()
        while self._end is None:
            seconds = tick()
            self._serve(
                signal.sigwaitinfo(held) if seconds is None else signal.sigtimedwait(held, seconds)
            )
        return self._end

    def _serve(self, info: signal.struct_siginfo | None) -> None:
        """Pass a signal on, if there is one, and see what has ended or stopped."""
        if info is not None and info.si_signo != signal.SIGCHLD:
            self._pass_on(info)
        self._end = self._reap()

    def _pass_on(self, info: signal.struct_siginfo) -> None:
        number = info.si_signo
        if number in STOPS:
            self._asked_to_stop = True
        if number == signal.SIGCONT:
            if _stopped(self.pid):
                self._send(signal.SIGCONT)
            return
        if number in OURS or info.si_code == SI_KERNEL or self._from_its_own(info):
            return
        self._send(number)

    def _send(self, number: int) -> None:
        # A setuid command, as sudo is, may have become another user's: only root may end that.
        with contextlib.suppress(PermissionError):
            os.kill(self.pid, number)

    def _from_its_own(self, info: signal.struct_siginfo) -> bool:
        """Whether the command or a descendant sent it: to its group, as `kill 0` does."""
        if info.si_code > 0 or info.si_pid == 0:  # no process, or none in our pid namespace
            return False
        return info.si_pid == self.pid or info.si_pid in family.descendants(os.getpid())

    def _reap(self) -> End | None:
        """Wait for all that has ended; adopted orphans among them."""
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            if pid == 0:
                return None
            if os.WIFSTOPPED(status):
                if pid == self.pid:
                    self._stop_too(os.WSTOPSIG(status))
            elif pid == self.pid:
                if os.WIFSIGNALED(status):
                    return End(None, os.WTERMSIG(status))
                return End(os.WEXITSTATUS(status), None)

    def _stop_too(self, number: int) -> None:
        """Stop as it did, so that the shell sees it; go on with it.

        A SIGSTOP to it alone is a debugger's or a freezer's, who would not wake us.
        """
        if number not in STOPS and not self._asked_to_stop:
            return
        self._asked_to_stop = False
        # Held back, it would wait: for once it may come through. In an orphaned process group the
        # kernel ignores it, for the command as for us.
        for waiting in STOPS & set(signal.sigpending()):
            signal.sigtimedwait({waiting}, 0)
        if number == signal.SIGSTOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            kept = signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
            signal.pthread_sigmask(signal.SIG_BLOCK, {number})
            signal.signal(number, kept)
        if _stopped(self.pid):
            self._send(signal.SIGCONT)


def _child(prepare: Callable[[], NoReturn], mask: set[int], its: int) -> NoReturn:
    """In the child: never comes back."""
    try:
        # Whatever handlers we have are no business of the command; exec would drop them, but
        # until then they must not run.
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        prepare()
    except DedupError as e:
        failure = {"code": e.code, "message": e.message, "hint": e.hint}
        os.write(its, json.dumps(failure).encode())
    except BaseException as e:  # noqa: BLE001 - a second copy of us must not live on
        failure = {"code": "run-failed", "message": f"{type(e).__name__}: {e}", "hint": ""}
        os.write(its, json.dumps(failure).encode())
    os._exit(125)


def _held() -> set[int]:
    return {s for s in signal.valid_signals() if s not in FAULTS}


def _stopped(pid: int) -> bool:
    try:
        with Handle(pid) as handle:
            return handle.info.state == "T"
    except NoSuchProcess:
        return False


def end_by(number: int) -> None:
    """End by the signal that ended the command, as timeout(1) does, without a core of our own.

    The shell, or whoever waits for us, then knows what happened. It comes back where the signal
    does not end a process.
    """
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))
    if number not in {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
