"""What an application would do: to which processes, to how much of them, and with what outcome."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from dedup import calibration
from dedup.change import trust
from dedup.change.act import Chosen, same_process
from dedup.change.undo import program_of, total
from dedup.errors import DedupError, NoSuchProcess, NotMergeable, Refused
from dedup.kernel import inject, ksm, limits, processes
from dedup.model import ranges as model_ranges
from dedup.pages import Skipped
from dedup.scanning import Scan, scan_pids

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dedup.change.planfile import Given
    from dedup.change.trust import Domain, Member
    from dedup.model.ranges import Choice
    from dedup.scanning import Plan as ScanPlan

How = Literal["auto", "whole", "ranges"]

SPARE_MAPPINGS: Final = 1000
"""Left to the program, of those that it may have."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be made mergeable, and what is allowed."""

    how: How = "auto"
    domain: Domain = "user"
    accept_side_channels: bool = False
    secret_holders: bool = False
    """Likely holders of secrets, too."""
    suspend_seccomp: bool = False


@dataclass(slots=True)
class Plan:
    """What would be done."""

    scan: Scan
    """Of what is mergeable then: its prediction is that of the plan."""
    chosen: list[Chosen]
    """To be marked."""
    already: list[int]
    """Chosen processes, by pid, all of whose memory is mergeable already."""
    ranges: dict[int, list[tuple[int, int]]] | None
    """By pid, where ranges are to be marked; None for the whole of each process."""
    choice: Choice | None
    """What ranges would bring beside the whole; None where nothing is to be marked."""
    members: list[Member]
    left_out: list[Skipped] = field(default_factory=list)
    """Processes chosen and not taken, and why."""

    @property
    def pids(self) -> list[int]:
        """Processes of which the prediction is, in the order in which they become mergeable."""
        return [p.id.pid for p in self.scan.pages.processes]

    @property
    def marked_bytes(self) -> int:
        """Of the mappings to be marked."""
        wanted = {c.id for c in self.chosen}
        if self.ranges is not None:
            return sum(total(r) for r in self.ranges.values())
        of = self.scan.pages.processes
        return sum(
            r.end - r.start
            for r in self.scan.pages.regions
            if r.eligible and not r.advised and of[r.process].id in wanted
        )


def make(
    pids: Sequence[int],
    scan_plan: ScanPlan,
    wish: Wish,
    step: Callable[[str], None] = lambda _: None,
    given: Given | None = None,
) -> Plan:
    """Plan an application: look, choose, predict. Nothing is changed.

    The prediction is of all that will be mergeable on this host then: the chosen processes, and
    what others have mergeable already.

    Parameters
    ----------
    pids : sequence of int
    scan_plan : dedup.scanning.Plan
        With scope `advised` nothing is to be marked.
    wish : Wish
    step : callable, optional
        Told the name of each step before it.
    given : Given, optional
        A plan made before: its processes are `pids`, and its choice of ranges stands. The
        prediction is made anew.

    Raises
    ------
    Refused
        Several trust domains, or nothing but holders of secrets.
    NotMergeable
        Nothing of it is, or could be made, mergeable.
    NoSuchProcess, NoMemory, NotPermitted, Unsupported
        The only process can't be taken, or all of them.
    """
    step("choose")
    already, chosen, left_out = _sorted_out(
        pids, wish, given, marks=scan_plan.options.scope != "advised"
    )
    members = trust.members([*already, *(c.id.pid for c in chosen)], wish.domain)
    if not wish.accept_side_channels:
        trust.require_one(members, wish.domain)
    users = [m.pid for m in members if not m.chosen]
    marked: dict[int, list[tuple[int, int]]] = {pid: [] for pid in (*users, *already)}
    step("scan")
    # Those that ksmd knows already come first, then ours as they are marked.
    order = [*users, *already, *(c.id.pid for c in chosen)]
    # ksmd's list is in the order of marking, where it is empty now.
    alone = not ksm.uses().found and not ksm.Ksm().running
    scan_plan = replace(scan_plan, order_known=alone)
    scan = _scan(order, scan_plan, marked)
    # Of several that run in one address space one is there.
    found = {p.id for p in scan.pages.processes}
    chosen = [c for c in chosen if c.id in found]
    choice = None
    ranges = None
    if chosen:
        step("ranges")
        choice = _choice(scan, {c.id.pid for c in chosen})
        if given is not None:
            ranges = given.ranges
        elif wish.how == "ranges" or (wish.how == "auto" and choice.pays):
            ranges = _by_pid(scan, choice, chosen)
        if ranges is not None:
            # One of which nothing more pays may have mergeable memory all the same.
            wanted = {c.id.pid: ranges.get(c.id.pid, []) for c in chosen}
            chosen = [c for c in chosen if wanted[c.id.pid]]
            ranges = {c.id.pid: wanted[c.id.pid] for c in chosen}
            step("scan ranges")
            scan = _scan([*users, *already, *wanted], scan_plan, {**marked, **wanted})
    _require_mergeable(scan, set(users), by_ranges=ranges is not None)
    scan.pages.skipped += left_out
    return Plan(scan, chosen, already, ranges, choice, members, left_out)


def _require_mergeable(scan: Scan, others: set[int], *, by_ranges: bool) -> None:
    """Raise when KSM would take nothing of the chosen memory, or ranges are chosen and none pays.

    Raises
    ------
    NotMergeable
    """
    of = scan.pages.processes
    if any(r.scanned and of[r.process].id.pid not in others for r in scan.pages.regions):
        return
    if scan.scope == "advised":
        raise NotMergeable(
            "none of the chosen processes' memory is mergeable (no mapping has VmFlags `mg`)",
            "make it so: leave out `--scope advised`",
        )
    if by_ranges:
        raise NotMergeable(
            "no range of the chosen processes' memory is worth it: what it holds has no copies",
            "choose more processes, or make them mergeable whole: `--how whole`",
        )
    raise NotMergeable("KSM would take none of the chosen processes' memory", "")


def _scan(
    pids: Sequence[int], plan: ScanPlan, marked: Mapping[int, Sequence[tuple[int, int]]]
) -> Scan:
    return scan_pids(pids, replace(plan, options=replace(plan.options, marked=marked)))


def _sorted_out(
    pids: Sequence[int], wish: Wish, given: Given | None, *, marks: bool
) -> tuple[list[int], list[Chosen], list[Skipped]]:
    """Processes that are mergeable already, those to be marked, those left out."""
    already: list[int] = []
    chosen: list[Chosen] = []
    left_out: list[Skipped] = []
    failures: list[DedupError] = []
    for pid in pids:
        try:
            with processes.of_process(pid) as handle:
                handle.require_memory()
                known = {*already, *(c.id.pid for c in chosen)}
                if handle.pid in known:
                    continue
                if given is not None and handle.pid in given.marks:
                    same_process(handle, given.marks[handle.pid])
                _require_no_secrets(handle, wish)
                counters = ksm.process_counters(handle)
                # What a plan of before would not mark is not marked, whoever has its pid now.
                kept = given is not None and handle.pid not in given.marks
                if not marks or kept or (counters is not None and counters.ksm_merge_any):
                    already.append(handle.pid)
                    continue
                inject.require_possible(handle, suspend_seccomp=wish.suspend_seccomp)
                chosen.append(Chosen(handle.id, handle.info.name, program_of(handle.info)))
        except DedupError as e:
            failures.append(e)
            left_out.append(Skipped(pid, e.message, e.code))
    if not already and not chosen:
        raise failures[0] if failures else NoSuchProcess("no process fits the choice")
    return already, chosen, left_out


def _require_no_secrets(handle: processes.Handle, wish: Wish) -> None:
    what = trust.secrets_of(handle.info.name)
    if what and not wish.secret_holders:
        raise Refused(
            f"process {handle.pid} ({handle.info.name}) likely holds secrets ({what}), which "
            "merging could betray",
            "leave it out, or add `--secret-holders`",
        )


def _choice(scan: Scan, pids: set[int]) -> Choice:
    pages = scan.pages
    mine = [p.id.pid in pids for p in pages.processes]
    free = np.array([r.scanned and not r.advised and mine[r.process] for r in pages.regions])
    most = (limits.read().max_map_count or limits.DEFAULT_MAX_MAP_COUNT) - SPARE_MAPPINGS
    mappings = [0] * len(pages.processes)
    for region in pages.regions:
        mappings[region.process] += 1
    stored = calibration.load().calibration
    return model_ranges.choose(
        pages,
        scan.groups,
        free,
        max_page_sharing=scan.rules.max_page_sharing,
        costs=stored.costs if stored else None,
        mappings_left={i: max(0, most - n) for i, n in enumerate(mappings)},
    )


def _by_pid(
    scan: Scan, choice: Choice, chosen: Sequence[Chosen]
) -> dict[int, list[tuple[int, int]]]:
    wanted = {c.id for c in chosen}
    of = scan.pages.processes
    return {of[i].id.pid: r for i, r in choice.ranges.items() if of[i].id in wanted}
