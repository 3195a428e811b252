"""Make the memory of running processes mergeable: recorded first, taken back if it goes wrong."""

from __future__ import annotations

import secrets
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from dedup.change.applied import Applied, Mark
from dedup.change.tunables import SIGNALS
from dedup.change.undo import Result, intersection, program_of, total, undo
from dedup.errors import DedupError, NoSuchProcess, Partial, ProcessGone, Told
from dedup.kernel import inject, ksm, maps, processes
from dedup.kernel.lock import STATE
from dedup.kernel.processes import Handle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType

    from dedup.change.applied import Way
    from dedup.kernel.inject import Stop
    from dedup.pages import ProcessId


@dataclass(frozen=True, slots=True)
class Chosen:
    """A process of a plan, as it was when the plan was made."""

    id: ProcessId
    name: str
    program: tuple[str, ...]
    """As `Mark.program`."""


@dataclass(slots=True)
class Marked:
    """A process, made mergeable."""

    id: ProcessId
    name: str
    way: Way
    bytes: int
    """Of its mappings that are mergeable now and were not before."""
    stops: list[Stop]
    missing_bytes: int = 0
    """Of chosen ranges that are not there any more, or that the kernel did not take."""


@dataclass(slots=True)
class Failed:
    """A process that could not be made mergeable, and why."""

    id: ProcessId
    name: str
    error: DedupError


def same_process(handle: Handle, chosen: Chosen) -> None:
    """Refuse another process than the one that was chosen.

    Raises
    ------
    ProcessGone
    """
    if handle.id != chosen.id:
        raise ProcessGone(
            f"process {chosen.id.pid} ({chosen.name}) has ended; another one, "
            f"{handle.info.name}, which was not chosen, has its pid now",
            "choose anew",
        )
    if program_of(handle.info) != chosen.program:
        raise ProcessGone(
            f"process {chosen.id.pid} ({chosen.name}) has begun another program since it was "
            "chosen (exec)",
            "choose anew",
        )


class Marks:
    """What one application marks; leaving the context by an error takes it all back.

    Parameters
    ----------
    state : Path, optional
        Folder of the record.
    suspend_seccomp : bool
        See `dedup.kernel.inject.Injection`.
    step : callable, optional
        Told the name of each step before it.
    """

    def __init__(
        self,
        state: Path = STATE,
        *,
        suspend_seccomp: bool = False,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.applied = Applied(state)
        self.application = secrets.token_hex(8)
        self.suspend_seccomp = suspend_seccomp
        self.step = step
        self.marked: list[Marked] = []
        self.failed: list[Failed] = []
        self.taken_back: Result | None = None
        self._begun = False
        self._recorded: set[ProcessId] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        if not self._begun:
            return
        if e is None:
            self.step("finish")
            try:
                self.applied.finish(self.application)
            except DedupError as failure:
                self._take_back(failure)
                raise
            self.applied.tidy()
            return
        self._take_back(e)

    def _take_back(self, e: BaseException) -> None:
        # A second Ctrl-C must not stop us half-way.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.taken_back = undo(
                self.applied,
                lambda process: process in self._recorded,
                interrupted_only=True,
                unrecorded=True,
                suspend_seccomp=self.suspend_seccomp,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        if isinstance(e, Told) and self._recorded:
            e.message += "; what had been made mergeable is taken back"
            e.args = (e.message,)
        left = [p for p in self.taken_back.processes if p.outcome == "failed"]
        if left:
            names = ", ".join(f"{p.pid} ({p.name}): {p.why}" for p in left)
            raise Partial(
                f"{getattr(e, 'message', e)}, but for {names}",
                "run `sudo dedup restore`",
            ) from e

    def mark(
        self, chosen: Sequence[Chosen], ranges: dict[int, list[tuple[int, int]]] | None
    ) -> None:
        """Make processes mergeable, whole or in ranges.

        What can't be marked is in `failed`.

        Parameters
        ----------
        chosen : sequence of Chosen
        ranges : dict of int to list of (int, int), optional
            By pid. None marks them whole.

        Raises
        ------
        NotPermitted, OutputFailed
            The record can't be written: this process is not changed then.
        """
        self.step("begin")
        self._begun = True
        self.applied.begin(self.application, processes.now_ticks(), _mergeable())
        for process in chosen:
            self._mark(process, None if ranges is None else ranges[process.id.pid])

    def _mark(self, chosen: Chosen, ranges: list[tuple[int, int]] | None) -> None:
        try:
            handle = Handle(chosen.id.pid)
        except NoSuchProcess as e:
            self.failed.append(Failed(chosen.id, chosen.name, e))
            return
        with handle:
            try:
                same_process(handle, chosen)
                before = maps.read(handle)
                if self._whole_already(handle):
                    return
            except DedupError as e:
                self.failed.append(Failed(chosen.id, chosen.name, e))
                return
            own = [(m.start, m.end) for m in before if "mg" in m.vm_flags]
            free = [(m.start, m.end) for m in before if "mg" not in m.vm_flags]
            there = [] if ranges is None else intersection(ranges, free)
            self.step("record")
            self._recorded.add(handle.id)
            self.applied.mark(
                Mark(
                    application=self.application,
                    id=handle.id,
                    name=chosen.name,
                    program=chosen.program,
                    way="whole" if ranges is None else "ranges",
                    ranges=tuple(there),
                    own=tuple(own),
                )
            )
            self.step("mark")
            try:
                stops = self._inject(handle, None if ranges is None else there)
            except DedupError as e:
                self._fail(chosen, e)
                return
            self.step("marked")
            try:
                now = [(m.start, m.end) for m in maps.read(handle) if "mg" in m.vm_flags]
            except DedupError as e:
                self._fail(chosen, e)
                return
        got = intersection(now, free)
        wanted = 0 if ranges is None else total(ranges)
        self.marked.append(
            Marked(
                id=chosen.id,
                name=chosen.name,
                way="whole" if ranges is None else "ranges",
                bytes=total(got),
                stops=stops,
                missing_bytes=max(0, wanted - total(intersection(ranges or [], now))),
            )
        )

    def _fail(self, chosen: Chosen, e: DedupError) -> None:
        """Take back what may have been done: of several calls some were made, perhaps."""
        self.failed.append(Failed(chosen.id, chosen.name, e))
        undo(
            self.applied,
            lambda process: process == chosen.id,
            interrupted_only=True,
            suspend_seccomp=self.suspend_seccomp,
            tidy=False,
        )

    def _whole_already(self, handle: Handle) -> bool:
        """Whether it is mergeable as a whole, where this kernel does not show that to a plan."""
        counters = ksm.process_counters(handle)
        if counters is None or counters.ksm_merge_any is not None:
            return False
        return inject.merges_any(handle, suspend_seccomp=self.suspend_seccomp)

    def _inject(self, handle: Handle, ranges: list[tuple[int, int]] | None) -> list[Stop]:
        if ranges is None:
            return inject.merge_any(handle, True, suspend_seccomp=self.suspend_seccomp)
        return inject.advise(handle, ranges, True, suspend_seccomp=self.suspend_seccomp).stops


def _mergeable() -> list[ProcessId]:
    """Processes that are mergeable now."""
    found = []
    for pid in ksm.users():
        try:
            with Handle(pid) as handle:
                found.append(handle.id)
        except NoSuchProcess:
            continue  # ended meanwhile
    return found
