"""Make chosen processes mergeable, wait for ksmd, and hold its counters against the prediction."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from dedup.change import plan as planning
from dedup.change import verify, wait
from dedup.change.act import Marks
from dedup.change.plan import Wish
from dedup.change.planfile import OLD_SECONDS
from dedup.change.tunables import Tunables, host_locked, others_at_the_knobs
from dedup.errors import KsmNotRunning, Usage
from dedup.kernel import ksm as ksm_interface
from dedup.kernel import meminfo
from dedup.kernel.ksm import RUN_MERGE, RUN_STOP, Ksm
from dedup.kernel.processes import Handle
from dedup.model import merge, steady
from dedup.pages import Skipped
from dedup.scanning import Scan, rules_of, scan_pids

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dedup.change.act import Failed, Marked
    from dedup.change.journal import Restored
    from dedup.change.plan import Plan
    from dedup.change.planfile import Given
    from dedup.kernel.ksm import Counters, ProcessCounters
    from dedup.scanning import Plan as ScanPlan

TIMEOUT_SECONDS: Final = 600.0
PACE_RATIO: Final = 1.25
STILL_FRACTION: Final = 2000
"""A running program moves a page in so many all the time; ksmd has converged all the same."""

DECIDING: Final = ("max_page_sharing", "use_zero_pages", "merge_across_nodes")
"""Tunables that decide what merges."""
OURS: Final = ("run", "smart_scan")
"""Tunables that we change ourselves."""

SUMMED: Final = ("ksm_rmap_items", "ksm_zero_pages", "ksm_merging_pages", "ksm_process_profit")


@dataclass(slots=True)
class ProcessOutcome:
    """One process, predicted and counted."""

    pid: int
    name: str
    comparison: verify.Comparison | None
    """None where the process ended, or its counters are hidden."""


@dataclass(slots=True)
class Application:
    """What an application predicted, and what the kernel's counters say."""

    plan: Plan
    marked: list[Marked]
    """Processes made mergeable."""
    failed: list[Failed]
    """Processes that could not be."""
    scan: Scan
    """Of all that is mergeable now."""
    comparison: verify.Comparison
    by_process: bool
    """Others use KSM on this host: the comparison is the sum over the processes."""
    processes: list[ProcessOutcome]
    full_scans: int
    broken_pages: float | None
    """Merged pages that were written to in a full scan, at the end; None where not known."""
    seconds: float
    memory_before: meminfo.Memory
    memory_after: meminfo.Memory
    tolerance_pages: int
    smart_scan: bool
    """Whether smart scan was on: unshared and volatile then count as one."""
    restored: list[Restored] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether the prediction holds within the tolerance."""
        return self.comparison.holds(self.tolerance_pages, self.scan.pages.page_size)


def apply(
    pids: Sequence[int],
    scan_plan: ScanPlan,
    wish: Wish | None = None,
    *,
    start_ksmd: bool = False,
    keep_tunables: bool = False,
    tolerance_pages: int | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    progress: Callable[[str, int, int], None] | None = None,
    step: Callable[[str], None] = lambda _: None,
    given: Given | None = None,
) -> Application:
    """Plan, make mergeable, wait for ksmd, compare.

    What was made mergeable stays so, until `dedup.change.undo.undo`. An error takes it back.

    Parameters
    ----------
    pids : sequence of int
    scan_plan : dedup.scanning.Plan
        With scope `advised` nothing is made mergeable that is not so already.
    wish : Wish, optional
    start_ksmd : bool
        Let ksmd run for the time of the call where it rests.
    keep_tunables : bool
        Change no tunable, smart scan neither.
    tolerance_pages : int, optional
        Pages by which a counter may differ; by default those seen volatile.
    timeout_seconds : float
    progress : callable, optional
        Told what is under way, done and total.
    step : callable, optional
        Told the name of each step before it.
    given : Given, optional
        A plan made before.

    Raises
    ------
    Refused, NotMergeable, NoSuchProcess, NoMemory
        See `dedup.change.plan.make`.
    KsmNotRunning
        ksmd rests and `start_ksmd` was not given.
    CheckFailed
        ksmd does not converge in time, or somebody else changes the tunables.
    NotPermitted, Busy, NotStopped
    """
    wish = wish or Wish()
    ksm = Ksm()
    ksm.require()
    if not start_ksmd and not ksm.running:
        raise KsmNotRunning("ksmd is not running, so nothing would merge")
    with ExitStack() as stack:
        tunables: Tunables | None = None
        step("lock")
        if not keep_tunables or start_ksmd:
            tunables = stack.enter_context(Tunables(ksm))
        else:
            stack.enter_context(host_locked())
        before = meminfo.read()
        plan = planning.make(pids, scan_plan, wish, step, given)
        _require_time(plan.scan, ksm, timeout_seconds)
        alone, merged = _alone(ksm, plan.pids), ksm.counters()
        marks = stack.enter_context(Marks(suspend_seccomp=wish.suspend_seccomp, step=step))
        if plan.chosen:
            marks.mark(plan.chosen, plan.ranges)
        scan = _of_marked(plan, marks, scan_plan)
        step("tunables")
        if tunables is not None:
            if not keep_tunables and "smart_scan" in ksm.tunables():
                tunables.set("smart_scan", 0)
            tunables.set("run", RUN_MERGE)
        tolerance = _tolerance(scan) if tolerance_pages is None else tolerance_pages
        followed = [p.id.pid for p in scan.pages.processes]
        step("wait")
        done = wait.converge(
            ksm,
            timeout_seconds,
            _shown(progress, scan, ksm),
            slack_pages=max(tolerance, scan.scanned_pages // STILL_FRACTION),
            settled=None if alone else lambda: _settled(followed),
            least_scans=_least_scans(scan, smart=bool(ksm.tunables().get("smart_scan", 0))),
        )
        observed = done.seconds / done.full_scans if done.full_scans else 0.0
        warnings = _age(given)
        if _other_pace(scan, observed):
            step("scan again")
            warnings.append(_pace_words(scan, observed))
            scan = _scan_marked(plan, marks, replace(scan_plan, full_scan_seconds=observed))
            tolerance = _tolerance(scan) if tolerance_pages is None else tolerance_pages
        step("verify")
        if tunables is not None:
            tunables.require_unchanged()
            # A scan under way moves the counters: at rest they are whole.
            tunables.set("run", RUN_STOP)
        counted = _read_all(followed)
        now, alone = ksm.tunables(), alone and _alone(ksm, followed)
        warnings += [*others_at_the_knobs(), *_changed(scan.tunables, now)]
        scan = _rewritten(_under_both(scan, now), done.broken_pages)
        if ksm.running:
            # Each page that ksmd visits is in neither tree for a moment.
            tolerance = max(tolerance, 1)
        result = Application(
            plan=plan,
            marked=marks.marked,
            failed=marks.failed,
            scan=scan,
            comparison=_compare(scan, ksm, merged) if alone else _compare_sums(scan, counted),
            by_process=not alone,
            processes=_outcomes(scan, counted),
            full_scans=done.full_scans,
            broken_pages=done.broken_pages,
            seconds=done.seconds,
            memory_before=before,
            memory_after=meminfo.read(),
            tolerance_pages=tolerance,
            smart_scan=bool(now.get("smart_scan", 0)),
            warnings=warnings,
        )
    step("end")
    if tunables is not None:
        result.restored = tunables.restored
    return result


def _of_marked(plan: Plan, marks: Marks, scan_plan: ScanPlan) -> Scan:
    """The scan of what has really become mergeable.

    That of the plan, unless some could not be marked.
    """
    if not marks.failed and not any(m.missing_bytes for m in marks.marked):
        return plan.scan
    if not marks.marked and not plan.already:
        raise marks.failed[0].error
    return _scan_marked(plan, marks, scan_plan)


def _scan_marked(plan: Plan, marks: Marks, scan_plan: ScanPlan) -> Scan:
    """Look again at what is mergeable now."""
    gone = {f.id.pid for f in marks.failed}
    pids = [pid for pid in plan.pids if pid not in gone]
    scan = scan_pids(pids, replace(scan_plan, options=replace(scan_plan.options, scope="advised")))
    scan.pages.skipped += plan.left_out
    scan.pages.skipped += [Skipped(f.id.pid, f.error.message, f.error.code) for f in marks.failed]
    return scan


def _age(given: Given | None) -> list[str]:
    if given is None or given.age_seconds < OLD_SECONDS:
        return []
    return [
        f"the plan is {given.age_seconds / 3600:.1f} h old: it may not be what pays best any more"
    ]


def _other_pace(scan: Scan, observed: float) -> bool:
    """Whether ksmd's full scan took another time than the prediction of changing memory is for."""
    if not _tolerance(scan) or not observed:
        return False
    ratio = observed / scan.full_scan_seconds if scan.full_scan_seconds else 1.0
    # Looks nearer to each other than this see nothing different.
    slow = max(observed, scan.full_scan_seconds) * steady.STEADY_FACTOR
    return not 1 / PACE_RATIO < ratio < PACE_RATIO and slow > steady.INTERVAL_LEAST_SECONDS


def _pace_words(scan: Scan, observed: float) -> str:
    return (
        f"ksmd took {observed:.1f} s for a full scan, not {scan.full_scan_seconds:.1f} s as "
        "expected, and this memory changes: it was looked at again, and the prediction compared "
        "is for that pace"
    )


def _require_time(scan: Scan, ksm: Ksm, timeout_seconds: float) -> None:
    """Refuse to wait where ksmd can't be done in time, before anything is changed.

    Raises
    ------
    Usage
    """
    if scan.cost is None:
        raise Usage(
            "ksmd looks at no pages (pages_to_scan is 0), so nothing would merge",
            f"`echo 100 > {ksm.root}/pages_to_scan` as root",
        )
    low = scan.cost.bounds.get("full_scan_seconds", (scan.cost.full_scan_seconds, 0.0))[0]
    least = low * (wait.LEAST_SCANS + wait.STILL_SCANS)
    if least > timeout_seconds:
        raise Usage(
            f"at ksmd's present pace this takes at least {least:,.0f} s, longer than the "
            f"{timeout_seconds:g} s allowed",
            f"let it work faster (`dedup tune --within {timeout_seconds / 4:.0f}`), or give it "
            f"time: `--timeout {2 * least:.0f}`",
        )


def _shown(
    progress: Callable[[str, int, int], None] | None, scan: Scan, ksm: Ksm
) -> Callable[[Counters], None] | None:
    """How far ksmd is: pages scanned, of those of all the full scans to wait for."""
    if progress is None:
        return None
    p = scan.prediction
    expected = [v for v in (p.pages_sharing, p.ksm_zero_pages) if v is not None]
    of = f" of {sum(expected):,}" if len(expected) == 2 else ""
    begin = ksm.counters().pages_scanned
    total = scan.scanned_pages * (wait.LEAST_SCANS + wait.STILL_SCANS + 1)

    def show(now: Counters) -> None:
        merged = now.pages_sharing + now.ksm_zero_pages
        scanned = min(total, now.pages_scanned - begin)
        progress(f"merging: {merged:,}{of} pages", scanned, total)

    return show


def _compare(scan: Scan, ksm: Ksm, before: Counters) -> verify.Comparison:
    counters = ksm.counters()
    if scan.smart_scan is not None and ksm.tunables().get("smart_scan", 0):
        return verify.compare_smart(scan.smart_scan, counters)
    return verify.compare(scan.prediction, counters, before)


def _changed(before: Mapping[str, int | str], now: Mapping[str, int | str]) -> list[str]:
    """Tunables that somebody else changed since the scan, and what that means: a sentence each."""
    found = []
    for name, value in now.items():
        if name in OURS or before.get(name) == value:
            continue
        effect = (
            "pages merged before and after follow different rules, so the prediction is a range"
            if name in DECIDING
            else "it changes the time, not the outcome"
        )
        found.append(f"{name} changed from {before.get(name)} to {value} meanwhile: {effect}")
    return found


def _under_both(scan: Scan, now: Mapping[str, int | str]) -> Scan:
    """The scan, predicted for the tunables before and after where somebody changed them."""
    if all(scan.tunables.get(name) == now.get(name) for name in DECIDING):
        return scan
    after = merge.predict(scan.pages, scan.groups, rules_of(dict(now)))
    both = steady.seen([scan.prediction, after])
    # By smart scan's forecast too, since that has one number for the old rules alone.
    return replace(scan, prediction=both, smart_scan=None)


def _rewritten(scan: Scan, broken_pages: float | None) -> Scan:
    """The scan, with what writes break all the time as a range."""
    if not broken_pages:
        return scan
    size = scan.pages.page_size
    return replace(scan, prediction=steady.rewritten(scan.prediction, broken_pages, size))


def _least_scans(scan: Scan, *, smart: bool) -> int:
    """Full scans to wait for: where pages of different age must meet, until the last of them do."""
    usual = wait.LEAST_SCANS + wait.STILL_SCANS
    if not smart or scan.smart_scan is None:
        return usual
    latest = scan.smart_scan.bounds.get("full_scans", (0, 0))[1]
    return max(usual, latest + wait.STILL_SCANS)


def _tolerance(scan: Scan) -> int:
    """Pages seen volatile: each may be counted here or there."""
    from dedup.pages import Flag

    unstable = scan.pages.present & ((scan.pages.frames & (Flag.VOLATILE | Flag.NEW)) != 0)
    return int(unstable.sum())


def _alone(ksm: Ksm, pids: Sequence[int]) -> bool:
    """Whether these processes are the only ones that KSM works for."""
    known = sum(c.ksm_rmap_items for c in _read_all(pids).values())
    for use in ksm_interface.uses().found:
        if use.info.id.pid in pids:
            continue
        if not use.stale:
            return False
        known += use.counters.ksm_rmap_items
    return ksm.counters().rmap_items <= known


def _read_all(pids: Sequence[int]) -> dict[int, ProcessCounters]:
    from dedup.errors import NoSuchProcess

    found = {}
    for pid in pids:
        try:
            with Handle(pid) as handle:
                counters = ksm_interface.process_counters(handle)
        except NoSuchProcess:
            continue  # ended meanwhile: `skipped` or the comparison tells
        if counters is not None:
            found[pid] = counters
    return found


def _sums(counted: dict[int, ProcessCounters]) -> dict[str, int]:
    return {n: sum(getattr(c, n) for c in counted.values()) for n in SUMMED}


def _settled(pids: Sequence[int]) -> tuple[int, ...]:
    sums = _sums(_read_all(pids))
    return tuple(sums[n] for n in SUMMED if not n.endswith("profit"))


def _compare_sums(scan: Scan, counted: dict[int, ProcessCounters]) -> verify.Comparison:
    predicted: dict[str, int | None] = {}
    bounds: dict[str, tuple[int, int]] = {}
    for name in SUMMED:
        ranges: list[Any] = [
            p.bounds.get(name, (getattr(p, name), getattr(p, name)))
            for p in scan.prediction.processes
        ]
        low, high = sum(r[0] for r in ranges), sum(r[1] for r in ranges)
        predicted[name] = low if low == high else None
        if low != high:
            bounds[name] = (low, high)
    return verify.Comparison(predicted, _sums(counted), bounds)


def _outcomes(scan: Scan, counted: dict[int, ProcessCounters]) -> list[ProcessOutcome]:
    out = []
    for process, predicted in zip(scan.pages.processes, scan.prediction.processes, strict=True):
        pid = process.id.pid
        actual = counted.get(pid)
        comparison = verify.compare_process(predicted, actual) if actual else None
        out.append(ProcessOutcome(pid, process.name, comparison))
    return out
