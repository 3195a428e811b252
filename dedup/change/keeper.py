"""The process between us and programs that we start for a while: whoever ends, they end too.

It is their parent, and that of their orphans (PR_SET_CHILD_SUBREAPER), in a session of its own.
The other end of its socket is ours: when that closes, by our end or by SIGKILL, it ends all of them
and then itself. Should it be killed, the kernel kills those that it started (PR_SET_PDEATHSIG), and
what these had started comes to us, to be ended. What they print goes through it, so that no full
pipe ever holds them up; the last of it is kept.

Messages on the socket are lines of JSON.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn

from dedup.errors import DedupError
from dedup.kernel import family, personality

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TERM_SECONDS: Final = 5.0
"""From SIGTERM to SIGKILL."""
KILL_SECONDS: Final = 5.0
"""From the first SIGKILL until those that are still there are told of."""
TURN_SECONDS: Final = 0.05
TAIL_BYTES: Final = 4096
"""Of what a program prints, kept for an error."""
LINE_MOST: Final = 1 << 16
"""Characters of a line in which the pattern is looked for."""
FIRST_FREE: Final = 3
IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP,
                  signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGPIPE)  # fmt: skip
"""By the keeper, which must outlive those that it keeps."""


@dataclass(slots=True)
class Stream:
    """What a program prints, on stdout or on stderr."""

    copy: Copy
    pipe: IO[bytes]
    tail: bytearray = field(default_factory=bytearray)
    line: str = ""
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )


@dataclass(slots=True)
class Copy:
    """A program started."""

    number: int
    process: subprocess.Popen[bytes]
    pattern: re.Pattern[str] | None
    """Still to be seen in what it prints."""
    streams: list[Stream] = field(default_factory=list)

    @property
    def output(self) -> str:
        """The last that it printed: on stderr, else on stdout."""
        out, errors = (s.tail.decode(errors="replace").strip() for s in self.streams)
        return errors or out


def start(link: socket.socket, folder: Path, environment: Mapping[str, str]) -> int:
    """Fork the keeper; gives its pid.

    Parameters
    ----------
    link : socket
        The keeper's end; no other process may have the other one but us.
    folder : Path
        Removed by the keeper at its end.
    environment : mapping
        Of what it starts.
    """
    ours = os.getpid()
    # No handler of ours may run in it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = os.fork()
    if pid == 0:
        _be(link, folder, environment, before, ours)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _be(
    link: socket.socket, folder: Path, environment: Mapping[str, str], mask: set[Any], ours: int
) -> NoReturn:
    """In the keeper: never comes back."""
    try:
        kept: dict[int, Any] = {}
        for number in IGNORED:
            handler = signal.getsignal(number)
            kept[number] = signal.SIG_DFL if callable(handler) else handler
            signal.signal(number, signal.SIG_IGN)
        # Python ignores it, and a program that we start must not.
        kept[signal.SIGPIPE] = signal.SIG_DFL
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        family.adopt_orphans()
        # Away from 0 to 2, where they are when ours are closed; nobody waits for our output's end.
        end = os.dup(link.fileno())
        while end < FIRST_FREE:
            end = os.dup(end)
        null = os.open(os.devnull, os.O_RDWR)
        for standard in range(FIRST_FREE):
            os.dup2(null, standard)
        os.closerange(FIRST_FREE, end)
        os.closerange(end + 1, os.sysconf("SC_OPEN_MAX"))
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if os.getppid() == ours:
            Keeper(socket.socket(fileno=end), environment, kept).run()
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:  # noqa: BLE001 - a second copy of us must not live on
        os._exit(1)
    os._exit(0)


class Keeper:
    """What the keeper does until its link to us is gone and all are ended.

    Parameters
    ----------
    link : socket
    environment : mapping
    signals : mapping
        How the signals that are ignored here were handled before; so what is started has them.
    """

    def __init__(
        self, link: socket.socket, environment: Mapping[str, str], signals: Mapping[int, Any]
    ) -> None:
        self._link, self._environment, self._signals = link, environment, signals
        self._selector = selectors.DefaultSelector()
        self._selector.register(link, selectors.EVENT_READ, None)
        self._copies: dict[int, Copy] = {}
        """By pid."""
        self._received = b""
        self._connected = True
        self._stopping: float | None = None
        """Since when."""

    def run(self) -> None:
        """Until there is nobody left to keep."""
        while self._connected or self._stopping is not None:
            for key, _ in self._selector.select(TURN_SECONDS):
                if key.data is None:
                    self._receive()
                else:
                    self._read(key.data)
            self._reap()
            if not self._connected and self._stopping is None:
                self._stop()
            if self._stopping is not None:
                self._go_on_stopping()

    # -- messages ----------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            part = self._link.recv(1 << 16)
        except OSError:
            part = b""
        if not part:
            self._connected = False
            self._selector.unregister(self._link)
            return
        *lines, self._received = (self._received + part).split(b"\n")
        for line in lines:
            self._obey(json.loads(line))

    def _obey(self, message: dict[str, Any]) -> None:
        if message["do"] == "start":
            self._start(message)
        elif message["do"] == "output":
            found = [c.output for c in self._copies.values() if c.number == message["number"]]
            self._tell(output=found[0] if found else "")
        else:
            self._stop()

    def _tell(self, **message: Any) -> None:
        with suppress(OSError):
            self._link.sendall(json.dumps(message).encode() + b"\n")

    # -- copies ------------------------------------------------------------------------------------

    def _start(self, message: dict[str, Any]) -> None:
        number, words = message["number"], message["words"]
        me = os.getpid()

        def prepare() -> None:
            for signal_number, handler in self._signals.items():
                signal.signal(signal_number, handler)
            family.die_with_parent(me)

        addresses = nullcontext() if message["randomized"] else personality.not_randomized()
        try:
            with addresses:
                process = subprocess.Popen(
                    words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    env={**self._environment, **message["environment"]}, bufsize=0,
                    preexec_fn=prepare, start_new_session=True,  # noqa: PLW1509 - one thread only
                )  # fmt: skip
        except DedupError as e:
            self._tell(refused=number, code=e.code, message=e.message, hint=e.hint)
            return
        except (OSError, ValueError, subprocess.SubprocessError) as e:
            why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            self._tell(refused=number, code="", message=why, hint="")
            return
        pattern = message["pattern"]
        copy = Copy(number, process, None if pattern is None else re.compile(pattern, re.MULTILINE))
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            copy.streams.append(Stream(copy, pipe))
            self._selector.register(pipe, selectors.EVENT_READ, copy.streams[-1])
        self._copies[process.pid] = copy
        self._tell(started=number, pid=process.pid)

    def _read(self, stream: Stream) -> bool:
        """Take some of what it printed; whether there may be more."""
        try:
            part = os.read(stream.pipe.fileno(), LINE_MOST)
        except BlockingIOError:
            return False
        except OSError:
            part = b""
        if not part:
            self._selector.unregister(stream.pipe)
            stream.pipe.close()
            return False
        stream.tail += part
        del stream.tail[:-TAIL_BYTES]
        copy = stream.copy
        if copy.pattern is not None:
            stream.line += stream.decoder.decode(part)
            if copy.pattern.search(stream.line):
                copy.pattern = None
                self._tell(ready=copy.number)
            stream.line = stream.line.rpartition("\n")[2][-LINE_MOST:]
        return True

    def _reap(self) -> None:
        """Wait for all that has ended; orphans among them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            copy = self._copies.pop(pid, None)
            if copy is None:
                continue
            copy.process.returncode = code = os.waitstatus_to_exitcode(status)
            for stream in copy.streams:
                # What others of the copy print, they may print for ever.
                for _ in range(16):
                    if stream.pipe.closed or not self._read(stream):
                        break
            self._tell(ended=copy.number, code=code, output=copy.output)

    def _stop(self) -> None:
        self._stopping = time.monotonic()
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def _go_on_stopping(self) -> None:
        assert self._stopping is not None
        left = family.descendants(os.getpid())
        seconds = time.monotonic() - self._stopping
        if left and seconds < TERM_SECONDS + KILL_SECONDS:
            if seconds >= TERM_SECONDS:
                self._signal(signal.SIGKILL)
            return
        self._stopping = None
        self._tell(stopped=left)

    def _signal(self, number: int) -> None:
        for pid in family.descendants(os.getpid()):
            # One that became another user's: only root may.
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
