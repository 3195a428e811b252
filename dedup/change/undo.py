"""Take back what was made mergeable in other processes: that, and no more.

`prctl(PR_SET_MEMORY_MERGE, 0)` also unmarks what a program has marked itself (mm/ksm.c,
ksm_disable_merge_any), so that is marked again right after. Children inherit their parent's marks:
those alive are undone with it. What can't be known is listed.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from dedup.errors import DedupError, NoMemory, NoSuchProcess, NotPermitted, OutputFailed
from dedup.kernel import inject, ksm, maps, processes
from dedup.kernel.processes import Handle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from dedup.change.applied import Application, Applied, Mark
    from dedup.kernel.inject import Stop
    from dedup.kernel.processes import Info
    from dedup.pages import ProcessId

Outcome = Literal["undone", "nothing", "ended", "failed"]

GENERATIONS: Final = 20
"""So often is a family looked at anew, where it goes on growing."""


@dataclass(slots=True)
class Undone:
    """What became of one process."""

    pid: int
    name: str
    outcome: Outcome
    """`nothing`: what we did there is gone already."""
    why: str = ""
    descendant_of: int | None = None
    bytes: int = 0
    """Of the mappings that were mergeable and are not any more."""
    stopped_seconds: float = 0.0
    """The longest stop."""
    elsewhere_bytes: int = 0
    """Mergeable at other addresses than we marked: moved there (mremap), or marked by the program
    itself since. That stays."""


@dataclass(slots=True)
class Result:
    """An undoing."""

    processes: list[Undone]
    unknown: list[str]
    """What could not be known: a sentence each."""

    @property
    def complete(self) -> bool:
        """Whether all could be taken back."""
        return not any(p.outcome == "failed" for p in self.processes)


def undo(
    applied: Applied,
    wanted: Callable[[ProcessId], bool] = lambda _: True,
    *,
    interrupted_only: bool = False,
    suspend_seccomp: bool = False,
    dry_run: bool = False,
    tidy: bool = True,
    unrecorded: bool = False,
    step: Callable[[str], None] = lambda _: None,
) -> Result:
    """Take back what is in the record, the newest application first.

    Parameters
    ----------
    applied : Applied
    wanted : callable, optional
        Whether a recorded process is to be undone.
    interrupted_only : bool
        Only applications that did not come to their end.
    suspend_seccomp : bool
        See `dedup.kernel.inject.Injection`.
    dry_run : bool
        Say what would be done.
    tidy : bool
        Remove the record once nothing in it is left to undo.
    unrecorded : bool
        Go on where the record can't be written, as on a full disk.
    step : callable, optional
        Told the name of each step before it.

    Raises
    ------
    NotPermitted, OutputFailed
        The record can't be read or written.
    """
    result = Result([], [])
    infos = {i.id: i for i in processes.every()}
    seen: set[ProcessId] = set()
    touched: list[Application] = []
    for application in reversed(applied.applications()):
        if interrupted_only and application.finished:
            continue
        undone = False
        for mark in reversed(application.marks):
            if not wanted(mark.id):
                continue
            undone = True
            if not dry_run:
                step("undo: record")
                with contextlib.suppress(*([OutputFailed] if unrecorded else [])):
                    applied.undoing(mark)
            outcomes: list[Undone] = []
            family = [mark.id]
            for _ in range(GENERATIONS):
                family += [d for d in _descendants(mark, application, infos) if d not in family]
                todo = family[len(outcomes) :]
                for process in todo:
                    step("undo: process")
                    outcomes.append(_process(process, mark, suspend_seccomp, dry_run=dry_run))
                if not todo or dry_run:
                    break
                # Those forked before their parent was undone are mergeable, too.
                infos = {i.id: i for i in processes.every()}
            seen |= set(family)
            result.processes += outcomes
            if not dry_run and not any(o.outcome == "failed" for o in outcomes):
                step("undo: recorded")
                try:
                    applied.undone(mark)
                except OutputFailed:
                    if not unrecorded:
                        raise
                    applied.forget(mark)
        if undone:
            touched.append(application)
    for application in touched:
        result.unknown += _unknown(application, seen, infos)
    if tidy and not dry_run:
        applied.tidy()
    result.unknown = list(dict.fromkeys(result.unknown))
    return result


def _process(process: ProcessId, mark: Mark, suspend_seccomp: bool, *, dry_run: bool) -> Undone:
    descendant_of = None if process == mark.id else mark.id.pid
    out = Undone(process.pid, mark.name, "undone", descendant_of=descendant_of)
    try:
        with Handle(process.pid) as handle:
            if handle.id != process:
                raise NoSuchProcess("its pid is another one's now")
            handle.require_memory()
            out.name = handle.info.name
            _take_back(handle, mark, out, suspend_seccomp, dry_run=dry_run)
    except NoMemory:
        out.outcome, out.why = "ended", "it has ended"
    except NoSuchProcess as e:
        out.outcome, out.why = "ended", e.message
    except DedupError as e:
        out.outcome = "failed"
        out.why = f"{e.message}; {e.hint}" if e.hint else e.message
    return out


def _take_back(
    handle: Handle, mark: Mark, out: Undone, suspend_seccomp: bool, *, dry_run: bool
) -> None:
    same = mark.program == program_of(handle.info)
    counters = ksm.process_counters(handle)
    if counters is None:
        raise NotPermitted(f"may not read ksm_stat of process {handle.pid}")
    any_merges = counters.ksm_merge_any
    if any_merges is None:
        any_merges = inject.merges_any(handle, suspend_seccomp=suspend_seccomp)
    marked = [(m.start, m.end) for m in maps.read(handle) if "mg" in m.vm_flags]
    if mark.way == "whole":
        if not any_merges and not (mark.undoing and same):
            out.outcome, out.why = "nothing", "it is not mergeable any more"
            return
        own = intersection(mark.own, _mapped(handle)) if same else []
        if any_merges:
            out.bytes = total(marked) - total(intersection(own, marked))
            if not dry_run:
                _told(
                    out,
                    inject.merge_any(handle, False, again=own, suspend_seccomp=suspend_seccomp),
                )
        elif not dry_run and own:
            # An undoing of ours that ended half-way.
            _told(out, inject.advise(handle, own, True, suspend_seccomp=suspend_seccomp).stops)
        return
    if not same:
        out.outcome, out.why = "nothing", "it runs another program now (exec)"
        return
    if any_merges:
        out.outcome = "nothing"
        out.why = "all its memory was made mergeable since, by another than us"
        return
    ours = intersection(mark.ranges, marked)
    elsewhere = total(marked) - total(ours) - total(intersection(mark.own, marked))
    if elsewhere > 0:
        out.elsewhere_bytes = elsewhere
    out.bytes = total(ours)
    if not ours:
        out.outcome, out.why = "nothing", "none of what we marked is there any more"
    elif not dry_run:
        _told(out, inject.advise(handle, ours, False, suspend_seccomp=suspend_seccomp).stops)


def _told(out: Undone, stops: Iterable[Stop]) -> None:
    out.stopped_seconds = max((s.stopped_seconds for s in stops), default=0.0)


def _mapped(handle: Handle) -> list[tuple[int, int]]:
    return [(m.start, m.end) for m in maps.read(handle)]


def total(ranges: Iterable[tuple[int, int]]) -> int:
    """Bytes in ranges without overlaps."""
    return sum(end - start for start, end in ranges)


def program_of(info: Info) -> tuple[str, ...]:
    """`Info.program` as the record has it."""
    return tuple(p.decode() for p in info.program)


def intersection(
    a: Iterable[tuple[int, int]], b: Iterable[tuple[int, int]]
) -> list[tuple[int, int]]:
    """What lies in both of two sets of ranges, each without overlaps."""
    found = []
    others = sorted(b)
    at = 0
    for start, end in sorted(a):
        while at < len(others) and others[at][1] <= start:
            at += 1
        k = at
        while k < len(others) and others[k][0] < end:
            found.append((max(start, others[k][0]), min(end, others[k][1])))
            k += 1
    return found


def _descendants(
    mark: Mark, application: Application, infos: Mapping[ProcessId, Info]
) -> list[ProcessId]:
    """Processes alive that a marked one has begotten since: by parents, or by its own layout.

    A fork has code, stack and arguments where its parent has them; address randomisation makes
    that as good as unique, also once the parent is gone.
    """
    recorded = {m.id for m in application.marks} | set(application.mergeable_before)
    young = [
        i for i in infos.values()
        if i.id.start_time >= application.began_ticks and i.id not in recorded
    ]  # fmt: skip
    family = {mark.id.pid} if mark.id in infos else set()
    found: dict[ProcessId, None] = {}
    grew = True
    while grew:
        grew = False
        for info in young:
            if info.id in found or not (info.ppid in family or _same_layout(info, mark)):
                continue
            found[info.id] = None
            family.add(info.id.pid)
            grew = True
    return list(found)


def _same_layout(info: Info, mark: Mark) -> bool:
    return program_of(info) == mark.program and processes.randomized(info.id.pid)


def _unknown(
    application: Application, done: set[ProcessId], infos: Mapping[ProcessId, Info]
) -> list[str]:
    """Processes that are mergeable, began after the application, and may come from it."""
    known = done | set(application.mergeable_before) | {m.id for m in application.marks}
    found = []
    for pid, name in ksm.users().items():
        info = next((i for i in infos.values() if i.id.pid == pid), None)
        if info is None or info.id in known or info.id.start_time < application.began_ticks:
            continue
        found.append(
            f"process {pid} ({name}) is mergeable and began later; whether it descends from one "
            "of these can't be known"
        )
    return found
