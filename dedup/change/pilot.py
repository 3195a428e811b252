"""A pilot: a few copies of a program started here, scanned once they are settled, and stopped.

Nothing on the host is changed, and KSM is not touched: what would merge is predicted.
"""

from __future__ import annotations

import re
import secrets
import shlex
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

from dedup import scanning
from dedup.change.copies import Copies, CopyEnded, KeeperGone
from dedup.errors import CheckFailed, NotPermitted, Refused, Usage
from dedup.estimate import fingerprints, settings, split
from dedup.estimate.key import KEY_BYTES, Key
from dedup.kernel import family, meminfo
from dedup.sources.live import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dedup.change.copies import Running
    from dedup.estimate.fingerprints import Instance
    from dedup.estimate.settings import Setting, Start
    from dedup.kernel.family import Use
    from dedup.scanning import Scan

    Progress = Callable[[str, int, int], None]

LIMIT_SECONDS: Final = 120.0
STAGGER_SECONDS: Final = 1.1
"""Between starts: those of one second have clocks in their memory alike, more than others have."""
TURN_SECONDS: Final = 0.1
QUIET_SECONDS: Final = 2.0
"""So long the size of the memory must have stood still."""
BUSY_QUIET_SECONDS: Final = 6.0
"""And so long where the copies compute meanwhile."""
BUSY_CORES: Final = 0.1
"""Of each copy."""
STILL_SHARE: Final = 0.002
STILL_BYTES: Final = 1 << 16
"""By so much it may change, of a copy's own, whichever is more."""
LEFT_SHARE: Final = 0.03
"""Of the host's memory must stay available."""
CONNECT_SECONDS: Final = 0.2
PORT_MOST: Final = 65535


class NotReady(CheckFailed):
    """A copy did not get ready in time."""

    code = "not-ready"
    default_hint = "give it more time with --limit, or another sign of being ready with --ready"


@dataclass(frozen=True, slots=True)
class Ready:
    """How a copy shows that it is ready; then it only has to settle.

    Parameters
    ----------
    kind : str
        `settled`: by that alone.
    value : str
        A regular expression in its output, a TCP port on this host, or seconds.
    """

    kind: Literal["settled", "pattern", "port", "seconds"] = "settled"
    value: str = ""

    def port(self, word: str) -> int:
        """The port of a copy with this number."""
        return int(self.value.replace("{n}", word))


def parse_ready(text: str) -> Ready:
    """The words of `--ready`: `7000` or `70{n}` is a port, `5s` a time, all else a pattern.

    Raises
    ------
    ValueError
    """
    if found := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?s", text):
        return Ready("seconds", found[1])
    if re.fullmatch(r"(?:[0-9]|\{n\})+", text):
        if not 0 < int(text.replace("{n}", "1")) <= PORT_MOST:
            raise ValueError(f"{text!r} is no port: those go up to {PORT_MOST}")
        return Ready("port", text)
    if not text:
        raise ValueError("an empty pattern is in every output")
    try:
        re.compile(text)
    except re.error as e:
        raise ValueError(f"{text!r} is no regular expression: {e}") from e
    return Ready("pattern", text)


def parse_command(text: str) -> tuple[str, ...]:
    """The words of `--pilot`, as a shell takes them apart; no shell runs.

    Raises
    ------
    ValueError
    """
    try:
        words = tuple(shlex.split(text))
    except ValueError as e:
        raise ValueError(f"the command can't be taken apart: {str(e).lower()}") from e
    if not words or not words[0]:
        raise ValueError("the command is empty")
    if "\0" in text:
        raise ValueError("the command has a zero byte in it")
    return words


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for."""

    words: tuple[str, ...]
    copies: int = 3
    ready: Ready = field(default_factory=Ready)
    limit_seconds: float = LIMIT_SECONDS
    """For being ready and settled, for each setting."""
    settings: tuple[Setting, ...] = (settings.AS_IS,)
    label: str = ""
    assumed: Mapping[str, int] = field(default_factory=dict)
    """Tunables that the prediction is for."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The copies under one setting."""

    setting: Setting
    start: Start
    scan: Scan
    instances: list[Instance]
    ready_seconds: list[float]
    """Of each copy, from its start."""
    settled: bool
    """Whether size and contents stood still, before the time was over."""
    seconds: float
    programs: tuple[str, ...]
    """Names of the files that its processes run."""


@dataclass(frozen=True, slots=True)
class Omitted:
    """A setting under which nothing was started."""

    setting: Setting
    why: str


@dataclass(frozen=True, slots=True)
class Pilot:
    """All that was tried."""

    wish: Wish
    trials: list[Trial]
    omitted: list[Omitted]
    left: list[int]
    """Processes that could not be ended."""


def run(wish: Wish, progress: Progress | None = None) -> Pilot:
    """Start, scan and stop copies under each setting.

    Raises
    ------
    NotStarted, CopyEnded, NotReady
    Refused
        The copies would take all of the host's memory.
    Usage
        A port is taken before anything is started.
    NotPermitted, OutputFailed, KeeperGone
    """
    trials: list[Trial] = []
    omitted: list[Omitted] = []
    with Copies(wish.copies) as copies:
        key = Key(secrets.token_bytes(KEY_BYTES))
        for setting in wish.settings:
            programs = trials[0].programs if trials else ()
            start = settings.apply(setting, wish.words, programs)
            if isinstance(start, settings.NotApplicable):
                omitted.append(Omitted(setting, start.why))
                continue
            try:
                trials.append(_Trying(wish, setting, start, copies, key, progress).run())
            except NotPermitted as e:
                if not trials:
                    raise
                omitted.append(Omitted(setting, e.message))
            copies.stop()
    return Pilot(wish, trials, omitted, copies.left)


@dataclass(slots=True)
class _Trying:
    """One setting, from the start to the scan."""

    wish: Wish
    setting: Setting
    start: Start
    copies: Copies
    key: Key
    progress: Progress | None
    began: float = field(default_factory=time.monotonic)
    ready: dict[int, float] = field(default_factory=dict)
    """Seconds, by the copy's number."""
    deadline: float = 0.0

    def run(self) -> Trial:
        """Do it."""
        self.deadline = self.began + self.wish.limit_seconds
        self._ports_are_free()
        numbers = range(1, self.wish.copies + 1)
        for number in numbers:
            pattern = None
            if self.wish.ready.kind == "pattern":
                pattern = self.wish.ready.value.replace("{n}", self.copies.word(number))
            self._say("starting copies", number - 1)
            self.copies.start(number, self.start, pattern)
            self._wait_for(STAGGER_SECONDS if number < self.wish.copies else 0.0)
        self.deadline += STAGGER_SECONDS * (self.wish.copies - 1)
        while len(self.ready) < self.wish.copies:
            if time.monotonic() > self.deadline:
                raise self._not_ready()
            self._wait_for(TURN_SECONDS)
            self._say("waiting until they are ready", len(self.ready))
        scan, pids, settled = self._settled_scan()
        return Trial(
            setting=self.setting,
            start=self.start,
            scan=scan,
            instances=[
                self._instance(scan, pids[n], self.copies.word(n)) for n in numbers
            ],
            ready_seconds=[self.ready[n] for n in numbers],
            settled=settled,
            seconds=time.monotonic() - self.began,
            programs=tuple(sorted({family.program(p) for some in pids.values() for p in some})),
        )  # fmt: skip

    def _say(self, what: str, done: int) -> None:
        if self.progress is not None:
            self.progress(f"{what} ({self.setting.title})", done, self.wish.copies)

    def _instance(self, scan: Scan, pids: Sequence[int], word: str) -> Instance:
        one = fingerprints.of_scan(split.part(scan, set(pids)), self.key, self.wish.label)
        return replace(one, name=f"copy {word}")

    # -- ready -------------------------------------------------------------------------------------

    def _ports_are_free(self) -> None:
        if self.wish.ready.kind != "port":
            return
        for number in range(1, self.wish.copies + 1):
            port = self.wish.ready.port(self.copies.word(number))
            if port > PORT_MOST:
                raise Usage(
                    f"copy {number} would have port {port}, and they go up to {PORT_MOST}",
                    "take fewer digits: ten copies or more have numbers of two, as 01",
                )
            if _accepts(port):
                raise Usage(
                    f"port {port} is taken already, so it can't tell when a copy is ready",
                    "end whoever listens there, or choose another port",
                )

    def _wait_for(self, seconds: float) -> None:
        """Note what happens for so long: who is ready, and that nobody has ended."""
        until = time.monotonic() + seconds
        while True:
            self.copies.look(min(TURN_SECONDS, max(0.0, until - time.monotonic())))
            for copy in self.copies.running.values():
                if copy.number not in self.ready and self._is_ready(copy):
                    self.ready[copy.number] = time.monotonic() - copy.began
            self._memory_is_left()
            if time.monotonic() >= until:
                return

    def _is_ready(self, copy: Running) -> bool:
        ready = self.wish.ready
        if ready.kind == "pattern":
            return copy.pattern_seen
        if ready.kind == "port":
            return _accepts(ready.port(self.copies.word(copy.number)))
        return ready.kind == "settled" or time.monotonic() - copy.began >= float(ready.value)

    def _memory_is_left(self) -> None:
        total, left = meminfo.total_bytes(), meminfo.available_bytes()
        if left < LEFT_SHARE * total:
            raise Refused(
                f"the copies take this host's memory: {left >> 20:,} MiB of {total >> 20:,} are "
                "left",
                "start fewer with --copies, or smaller ones",
            )

    def _not_ready(self) -> NotReady:
        ready = self.wish.ready
        late = min(n for n in self.copies.running if n not in self.ready)
        word = self.copies.word(late)
        sign = {
            "pattern": f"has not printed anything that fits '{ready.value}'",
            "port": f"does not accept on port {ready.value.replace('{n}', word)}",
        }.get(ready.kind, "is not ready")
        said = ""
        with suppress(KeeperGone):  # busy with a pattern that takes for ever
            said = self.copies.output(late)
        return NotReady(
            f"copy {word} {sign} after {self.wish.limit_seconds:.0f} s"
            f"{f'; the last that it printed: {said}' if said else ' and has printed nothing'}"
        )

    # -- settled -----------------------------------------------------------------------------------

    def _settled_scan(self) -> tuple[Scan, dict[int, list[int]], bool]:
        """Scan once sizes stand still, again while contents change their nature."""
        while True:
            still = self._stands_still()
            pids = self.copies.processes()
            plan = scanning.Plan(
                Options(seed=self.key.seed, progress=self.progress), assumed=self.wish.assumed
            )
            scan = scanning.scan_pids([p for some in pids.values() for p in some], plan)
            # One that has ended meanwhile is told of by its last words.
            self.copies.look()
            there = {p.id.pid for p in scan.pages.processes}
            for number, some in pids.items():
                if not there & set(some):
                    raise CopyEnded(
                        f"copy {self.copies.word(number)} has no memory to look at: its processes "
                        f"come and go; {self.copies.output(number)}"
                    )
            settled = still and not scan.drifting
            if settled or time.monotonic() > self.deadline:
                return scan, pids, settled

    def _stands_still(self) -> bool:
        """Wait until the memory of all copies keeps its size; False when the time is over."""
        first, since = self._use(), time.monotonic()
        while time.monotonic() < self.deadline:
            self._wait_for(TURN_SECONDS)
            now, seconds = self._use(), time.monotonic() - since
            if any(not _alike(first[n], now[n]) for n in first):
                first, since = now, time.monotonic()
                continue
            cores = max((now[n].cpu_seconds - first[n].cpu_seconds) / seconds for n in first)
            if seconds >= (QUIET_SECONDS if cores < BUSY_CORES else BUSY_QUIET_SECONDS):
                return True
            if self.progress is not None:
                share = min(1.0, seconds / QUIET_SECONDS)
                words = f"waiting until they are settled ({self.setting.title})"
                self.progress(words, round(100 * share), 100)
        return False

    def _use(self) -> dict[int, Use]:
        return {n: family.use(pids) for n, pids in self.copies.processes().items()}


def _alike(before: Use, now: Use) -> bool:
    change = abs(now.anonymous_bytes - before.anonymous_bytes)
    allowed = max(STILL_BYTES, STILL_SHARE * before.anonymous_bytes)
    return before.pids == now.pids and change <= allowed


def _accepts(port: int) -> bool:
    """Whether somebody on this host takes connections to a TCP port."""
    for family_of, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with suppress(OSError), socket.socket(family_of, socket.SOCK_STREAM) as link:
            link.settimeout(CONNECT_SECONDS)
            link.connect((host, port))
            # A connection to oneself: a free port of the range that outgoing ones are taken from.
            if link.getsockname() != link.getpeername():
                return True
    return False
