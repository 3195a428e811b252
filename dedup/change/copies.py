"""Copies of a program that run for a while beneath a keeper (`change.keeper`), in our hands."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from dedup.change import keeper
from dedup.errors import DedupError, NotPermitted, OutputFailed, ProcessGone, Usage
from dedup.kernel import family

if TYPE_CHECKING:
    from types import TracebackType

    from dedup.estimate.settings import Start

ANSWER_SECONDS: Final = 10.0
GONE_SECONDS: Final = 0.3
"""For which no process of a copy must be seen until it counts as ended."""
STOP_SECONDS: Final = keeper.TERM_SECONDS + keeper.KILL_SECONDS + 5.0
SHOWN: Final = 4
"""Last lines that an error shows."""
SHOWN_CHARACTERS: Final = 400


class NotStarted(Usage):
    """The command can't be started."""

    code = "not-started"


class CopyEnded(ProcessGone):
    """A copy ended by itself."""

    code = "copy-ended"
    default_hint = "try the command by itself; it must go on until it is stopped"


class KeeperGone(ProcessGone):
    """The process that keeps the copies was killed."""

    code = "keeper-gone"
    default_hint = "run it again"


@dataclass(slots=True)
class Running:
    """A copy that was started."""

    number: int
    pid: int
    began: float
    """By time.monotonic."""
    pattern_seen: bool = False
    code: int | None = None
    """Its exit status, or the negative number of the signal that ended it."""
    output: str = ""
    """The last that it printed, once it has ended."""


@dataclass(slots=True)
class Copies:
    """Copies of programs; at the end of the `with`, however that comes, none of them is left.

    Each has a session, a folder for what is temporary, and its number: `{n}` in the command and
    DEDUP_COPY in the environment. Numbers have the same length in all, since one character more
    in an argument can move a whole layout.

    Parameters
    ----------
    most : int
        The highest number of a copy.
    """

    most: int
    running: dict[int, Running] = field(default_factory=dict)
    """By number."""
    left: list[int] = field(default_factory=list)
    """Processes that could not be ended."""
    _folder: Path | None = None
    _link: socket.socket | None = None
    _keeper: int | None = None
    _received: bytes = b""
    _sessions: set[int] = field(default_factory=set)
    _generation: int = 0

    def __enter__(self) -> Self:
        try:
            try:
                self._folder = Path(tempfile.mkdtemp(prefix="dedup-pilot-"))
            except OSError as e:
                raise OutputFailed(f"making a temporary folder failed: {e.strerror}", "") from e
            # What a killed keeper leaves comes to us.
            family.adopt_orphans()
            self._link, theirs = socket.socketpair()
            with theirs:
                self._keeper = keeper.start(theirs, self._folder, family.starting_environment())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def word(self, number: int) -> str:
        """A copy's number as it stands in the command."""
        return str(number).zfill(len(str(self.most)))

    def filled(self, text: str, number: int) -> str:
        """A text with `{n}` and `{dir}` filled in for a copy."""
        return text.replace("{n}", self.word(number)).replace("{dir}", str(self._dir(number)))

    def _dir(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._generation}-{self.word(number)}"

    # -- what they do ------------------------------------------------------------------------------

    def start(self, number: int, wanted: Start, pattern: str | None = None) -> Running:
        """Start a copy.

        Raises
        ------
        NotStarted
        NotPermitted
            Randomisation can't be switched off here.
        KeeperGone, OutputFailed
        """
        try:
            self._dir(number).mkdir(mode=0o700)
        except OSError as e:
            raise OutputFailed(f"making a temporary folder failed: {e.strerror}", "") from e
        words = [self.filled(word, number) for word in wanted.words]
        self._send(
            do="start", number=number, words=words, randomized=wanted.randomized, pattern=pattern,
            environment={
                **wanted.environment,
                "DEDUP_COPY": self.word(number), "TMPDIR": str(self._dir(number)),
            },
        )  # fmt: skip
        answer = self._answer("started", "refused")
        if "refused" in answer:
            if answer["code"] == NotPermitted.code:
                raise NotPermitted(answer["message"], "")
            raise NotStarted(
                f"'{words[0]}' can't be started: {answer['message']}",
                "give a command that works when it is typed here, without the words of a shell "
                "such as `&&` and `>`; for those: `sh -c '...'`",
            )
        self._sessions.add(answer["pid"])
        copy = self.running[number] = Running(number, answer["pid"], time.monotonic())
        return copy

    def processes(self) -> dict[int, list[int]]:
        """Pids of each copy by its number, the program itself first where it still runs.

        An orphan is known by its session, and if it has one of its own by its environment.
        """
        assert self._keeper is not None
        found: dict[int, list[int]] = {n: [] for n in self.running}
        by_session = {c.pid: n for n, c in self.running.items()}
        for pid in family.descendants(self._keeper):
            number = by_session.get(family.session(pid) or 0)
            if number is None:
                number = next((n for n in found if self._marked(pid, n)), None)
            if number is not None:
                found[number].append(pid)
        return found

    def _marked(self, pid: int, number: int) -> bool:
        return family.environment_has(pid, f"TMPDIR={self._dir(number)}")

    def look(self, seconds: float = 0.0) -> None:
        """Take what the keeper tells, for so long.

        Raises
        ------
        CopyEnded
            A copy has ended, and nothing of it is left: a server that goes to the background
            leaves a process.
        KeeperGone
        """
        until = time.monotonic() + seconds
        more = True
        while more:
            more = self._message(max(0.0, until - time.monotonic())) is not None
            for copy in self.running.values():
                if copy.code is not None and self._is_over(copy):
                    raise self._ended(copy)

    def _is_over(self, copy: Running) -> bool:
        """Whether nothing of it is left.

        Amid an exec a process shows no environment, and amid a change of parent it is in nobody's
        list: only what stays away is gone.
        """
        until = time.monotonic() + GONE_SECONDS
        while not self.processes()[copy.number]:
            if time.monotonic() > until:
                return True
            time.sleep(keeper.TURN_SECONDS)
        return False

    def output(self, number: int) -> str:
        """The last lines that a copy that runs has printed."""
        self._send(do="output", number=number)
        return last_lines(str(self._answer("output")["output"]))

    def _ended(self, copy: Running) -> CopyEnded:
        assert copy.code is not None
        how = f"status {copy.code}"
        if copy.code < 0:
            with suppress(ValueError):
                how = f"signal {signal.Signals(-copy.code).name}"
        said = last_lines(copy.output)
        hint = None
        if re.search(r"address already in use", copy.output, re.IGNORECASE):
            hint = "give each copy a port of its own, with its number in it: `--port 700{n}`"
        words = f"copy {self.word(copy.number)} has ended with {how}"
        return CopyEnded(f"{words}, saying: {said}" if said else f"{words}, without a word", hint)

    # -- their end ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """End all copies: SIGTERM, then SIGKILL. More can be started then.

        Raises
        ------
        KeeperGone
        """
        self._send(do="stop")
        self.left += self._answer("stopped", seconds=STOP_SECONDS)["stopped"]
        self.running.clear()
        self._generation += 1

    def close(self) -> None:
        """End all copies, the keeper, and what it left."""
        try:
            if self._link is not None and self.running:
                with suppress(DedupError):
                    self.stop()
        finally:
            if self._link is not None:
                self._link.close()
                self._link = None
            self._end_keeper()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _end_keeper(self) -> None:
        """It ends by itself when the link is gone; a killed one leaves copies to us."""
        if self._keeper is None:
            return
        until = time.monotonic() + STOP_SECONDS
        ended = False
        while not ended and time.monotonic() < until:
            ended = self._waited_for(self._keeper)
            time.sleep(0 if ended else keeper.TURN_SECONDS)
        if not ended:
            os.kill(self._keeper, signal.SIGKILL)
        until = time.monotonic() + keeper.KILL_SECONDS
        while (ours := self._adopted()) and time.monotonic() < until:
            for pid in ours:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                self._waited_for(pid)
            time.sleep(keeper.TURN_SECONDS)
        self._waited_for(self._keeper)
        self._keeper = None

    def _adopted(self) -> list[int]:
        """Of our descendants, those that are of a copy."""
        return [
            pid
            for pid in family.descendants(os.getpid())
            if family.session(pid) in self._sessions
            or any(self._marked(pid, n) for n in range(1, self.most + 1))
        ]

    @staticmethod
    def _waited_for(pid: int) -> bool:
        try:
            return os.waitpid(pid, os.WNOHANG)[0] == pid
        except ChildProcessError:
            return True

    # -- messages ----------------------------------------------------------------------------------

    def _send(self, **message: Any) -> None:
        assert self._link is not None
        try:
            self._link.settimeout(ANSWER_SECONDS)
            self._link.sendall(json.dumps(message).encode() + b"\n")
        except OSError as e:
            raise KeeperGone("the process that keeps the copies is gone") from e

    def _answer(self, *kinds: str, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while True:
            message = self._message(max(0.0, until - time.monotonic()))
            if message is None:
                raise KeeperGone("the process that keeps the copies does not answer")
            if any(kind in message for kind in kinds):
                return message

    def _message(self, seconds: float) -> dict[str, Any] | None:
        """The next message, noted if it is news of a copy; None if none comes."""
        assert self._link is not None
        until = time.monotonic() + seconds
        while b"\n" not in self._received:
            self._link.settimeout(max(0.0, until - time.monotonic()))
            try:
                part = self._link.recv(1 << 16)
            except (BlockingIOError, TimeoutError):
                return None
            except OSError:
                part = b""
            if not part:
                raise KeeperGone("the process that keeps the copies is gone")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "ready" in message and message["ready"] in self.running:
            self.running[message["ready"]].pattern_seen = True
        if "ended" in message and message["ended"] in self.running:
            copy = self.running[message["ended"]]
            copy.code, copy.output = message["code"], message["output"]
        return message


def last_lines(text: str) -> str:
    """The last lines of an output, in one."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-SHOWN:])[-SHOWN_CHARACTERS:]
