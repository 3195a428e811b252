"""Run the layouts: predict, merge, count, compare, unmerge."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from dedup.change import verify, wait
from dedup.change.tunables import NR_HUGEPAGES, Tunables, others_at_the_knobs
from dedup.errors import OutputFailed
from dedup.kernel import ksm as ksm_interface
from dedup.kernel import maps, pagemap
from dedup.kernel.ksm import RUN_MERGE, RUN_STOP, RUN_UNMERGE, Ksm
from dedup.kernel.processes import Handle
from dedup.scanning import Plan, scan_pids
from dedup.selftest.cases import Case, all_cases
from dedup.sources.live import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from dedup.change.journal import Restored
    from dedup.selftest.cases import SubjectSpec

TIMEOUT_SECONDS: Final = 120.0
ANSWER_SECONDS: Final = 60.0
QUIET_SECONDS: Final = 0.2
QUIET_WITHIN_SECONDS: Final = 3.0
"""A ksmd without work is quiet for so long, within so long."""
SLEEP_MILLISECS: Final = 4
WRITER_SLEEP_MILLISECS: Final = 100
"""Between scans while pages are rewritten: much longer than a round of the writer."""
WRITER_TRIES: Final = 5


@dataclass(slots=True)
class ProcessResult:
    """One process of a case."""

    pid: int
    comparison: verify.Comparison


@dataclass(slots=True)
class CaseResult:
    """A case, or one step of it."""

    name: str
    comparison: verify.Comparison | None
    """Global counters; None where others use KSM, so that only the processes' count."""
    processes: list[ProcessResult]
    note: str = ""
    skipped: str = ""
    failure: str = ""
    """What else went wrong."""

    @property
    def equal(self) -> bool:
        """Whether every figure is one number and as predicted."""
        every = [p.comparison for p in self.processes]
        if self.comparison is not None:
            every.append(self.comparison)
        return not self.failure and all(c.holds() and c.exact for c in every)


@dataclass(slots=True)
class SelfTest:
    """The result of a self-test."""

    cases: list[CaseResult] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    """Who else uses KSM on this host: then the processes' own counters are what is compared."""
    warnings: list[str] = field(default_factory=list)
    leftover: list[Restored] = field(default_factory=list)
    restored: list[Restored] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all cases that ran hold, and at least one ran."""
        ran = [c for c in self.cases if not c.skipped]
        return bool(ran) and all(c.equal for c in ran)


class Subject:
    """A running subject process."""

    def __init__(self, spec: SubjectSpec, huge_bytes: int) -> None:
        self.spec = spec
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dedup.selftest.subject"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A Ctrl-C is ours to handle: the subject ends with its pipe.
            start_new_session=True,
        )
        self.pids = [int(self._answer()["pid"])]
        self.problem = ""
        for region in spec.regions:
            answer = self.tell(
                "region", kind=region.kind, pages=region.pages, huge_bytes=huge_bytes
            )
            self.problem = self.problem or str(answer.get("error", ""))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def tell(self, verb: str, **words: object) -> dict[str, Any]:
        """Tell it to do something, and wait for the answer."""
        self.send({"do": verb, **words})
        return self._answer()

    def send(self, words: dict[str, object] | None) -> None:
        """Send a line; an empty one for None."""
        pipe = self.process.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps(words).encode() + b"\n" if words else b"\n")
            pipe.flush()
        except BrokenPipeError as e:
            raise OutputFailed("a process of the self-test ended early", "") from e

    def _answer(self) -> dict[str, Any]:
        pipe = self.process.stdout
        assert pipe is not None
        if not select.select([pipe], [], [], ANSWER_SECONDS)[0]:
            raise OutputFailed(
                f"a process of the self-test gave no answer in {ANSWER_SECONDS:.0f} s", ""
            )
        # One answer at a time is under way, so nothing hides in the buffer behind select.
        line = pipe.readline()
        if not line:
            raise OutputFailed(
                "a process of the self-test ended early", "is there memory left? see `dmesg`"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(self) -> None:
        """Mark the memory mergeable, fork the children."""
        self.tell("advise", on=True)
        for rewrite in self.spec.forks:
            self.pids.append(int(self.tell("fork", rewrite=rewrite)["pid"]))

    def stop_merging(self) -> None:
        """Unmark the memory, in the children too."""
        self.tell("advise", on=False)
        self.tell("unadvise_children")

    def close(self) -> None:
        """End it and its children, whatever it does."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Runner:
    """Runs cases with ksmd at our command."""

    def __init__(self, ksm: Ksm, tunables: Tunables) -> None:
        self.ksm, self.tunables = ksm, tunables
        self.alone = False
        self.sight = pagemap.sight()

    def find_others(self) -> list[str]:
        """Who else uses KSM; nobody, and only then, means that all of it may be unmerged.

        Processes of other pid namespaces are out of sight. But ksmd has nothing to scan where no
        memory is registered, and stands still (mm/ksm.c, ksm_do_scan).
        """
        others = [f"{name} (pid {pid})" for pid, name in ksm_interface.users().items()]
        if not others and self._scans_something():
            others = ["a process out of sight (in another pid namespace?)"]
        self.alone = not others
        return others

    def _scans_something(self) -> bool:
        self.tunables.set("run", RUN_MERGE)
        end = time.monotonic() + QUIET_WITHIN_SECONDS
        last, since = self._scanned(), time.monotonic()
        # Memory of processes that just ended takes a scan or two to go.
        while time.monotonic() < end:
            time.sleep(wait.POLL_SECONDS)
            now = self._scanned()
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > QUIET_SECONDS:
                return False
        return True

    def _scanned(self) -> tuple[int, int]:
        counters = self.ksm.counters()
        return counters.full_scans, counters.pages_scanned

    def prepare(self) -> None:
        """Fast scans, every page in each, smart scan off."""
        names = self.ksm.tunables()
        if "advisor_mode" in names:
            self.tunables.set("advisor_mode", "none")
        if "smart_scan" in names:
            self.tunables.set("smart_scan", 0)
        self.tunables.set("pages_to_scan", 100_000)
        self.tunables.set("sleep_millisecs", SLEEP_MILLISECS)

    def run(self, case: Case) -> list[CaseResult]:
        """One case: a result for it and for each later step."""
        if case.only_alone and not self.alone:
            why = "others' zero pages would merge with the one here"
            return [CaseResult(case.name, None, [], skipped=why)]
        for attempt in range(1, WRITER_TRIES + 1):
            results, proven = self._once(case)
            if proven:
                return results
            results[0].failure = (
                f"in {attempt} tries the writer stood still for longer than a full scan: "
                "the machine is too busy for this case"
            )
        return results

    def _once(self, case: Case) -> tuple[list[CaseResult], bool]:
        self._rest()
        zero = int(case.use_zero_pages)
        if "use_zero_pages" in self.ksm.tunables():
            self.tunables.set("use_zero_pages", zero)
        elif zero:
            return [CaseResult(case.name, None, [], skipped="no use_zero_pages here")], True
        with contextlib.ExitStack() as stack:
            if any(r.kind == "hugetlb" for s in case.subjects for r in s.regions) and (
                why := self._reserve_hugetlb()
            ):
                return [CaseResult(case.name, None, [], skipped=why)], True
            subjects = [stack.enter_context(self._subject(s)) for s in case.subjects]
            if problem := next((s.problem for s in subjects if s.problem), ""):
                return [CaseResult(case.name, None, [], skipped=problem)], True
            for s in subjects:
                s.start()
            writers = [s for s in subjects if s.spec.keeps_writing is not None]
            for s in writers:
                s.tell("keep_writing", region=s.spec.keeps_writing)
            self.tunables.set(
                "sleep_millisecs", WRITER_SLEEP_MILLISECS if writers else SLEEP_MILLISECS
            )
            everyone = [p for s in subjects for p in s.pids]
            results = [self._measure(case.name, everyone, case.note)]
            proven = all(self._writer_proof(s) for s in writers)
            for i, step in enumerate(case.writes, 1):
                subjects[0].tell("write", region=0, page=step.page, what=step.content)
                results.append(
                    self._measure(f"{case.name.partition(',')[0]}: {i} written", everyone)
                )
            results[-1].failure = self._unmerge(subjects, everyone)
            for s in subjects:
                s.tell("end")
        return results, proven

    def _subject(self, spec: SubjectSpec) -> Subject:
        return Subject(spec, self.sight.huge_bytes)

    def _rest(self) -> None:
        """Ksmd at rest; alone, all that it ever merged is undone, so that counting begins at 0."""
        if self.alone:
            self.tunables.set("run", RUN_UNMERGE)
        self.tunables.set("run", RUN_STOP)

    def _measure(self, name: str, everyone: Sequence[int], note: str = "") -> CaseResult:
        plan = Plan(
            options=Options(scope="advised"),
            interval_seconds=0.05,
            order_known=True,
        )
        scan = scan_pids(everyone, plan)
        self.tunables.set("run", RUN_MERGE)
        wait.converge(
            self.ksm,
            TIMEOUT_SECONDS,
            settled=None if self.alone else lambda: self._settled(everyone),
        )
        self.tunables.set("run", RUN_STOP)
        self.tunables.require_unchanged()
        prediction = scan.prediction
        counters = self.ksm.counters()
        processes = []
        for process, predicted in zip(scan.pages.processes, prediction.processes, strict=True):
            with Handle(process.id.pid) as handle:
                actual = ksm_interface.process_counters(handle)
            if actual is not None:
                processes.append(
                    ProcessResult(process.id.pid, verify.compare_process(predicted, actual))
                )
        return CaseResult(
            name,
            verify.compare(prediction, counters) if self.alone else None,
            processes,
            note,
        )

    def _settled(self, everyone: Sequence[int]) -> tuple[int, ...]:
        figures: list[int] = []
        for pid in everyone:
            with Handle(pid) as handle:
                c = ksm_interface.process_counters(handle)
            if c is not None:
                figures += (c.ksm_rmap_items, c.ksm_merging_pages, c.ksm_zero_pages)
        return tuple(figures)

    def _writer_proof(self, subject: Subject) -> bool:
        """Whether each page changed between any two visits of ksmd."""
        subject.send(None)
        answer = subject._answer()  # noqa: SLF001 - the answer to the empty line
        return float(answer["longest_seconds"]) < WRITER_SLEEP_MILLISECS / 1000

    def _unmerge(self, subjects: Sequence[Subject], everyone: Sequence[int]) -> str:
        """Unmark all; what is not back then, empty when all is."""
        for s in subjects:
            s.stop_merging()
        self.tunables.set("sleep_millisecs", SLEEP_MILLISECS)
        self.tunables.set("run", RUN_MERGE)
        end = time.monotonic() + TIMEOUT_SECONDS
        while any(self._settled(everyone)) or (self.alone and self.ksm.counters().rmap_items):
            if time.monotonic() > end:
                return "after unmerging, the counters did not come back to 0"
            time.sleep(wait.POLL_SECONDS)
        self.tunables.set("run", RUN_STOP)
        for pid in everyone:
            with Handle(pid) as handle:
                if any(m.ksm_bytes for m in maps.read(handle)):
                    return f"after unmerging, process {pid} still maps KSM pages"
        return ""

    def _reserve_hugetlb(self) -> str:
        """Make sure of a hugetlb page; why not, empty when there is one."""
        try:
            with open("/proc/meminfo") as f:
                free = next((int(w.split()[1]) for w in f if w.startswith("HugePages_Free:")), None)
            if free is None:
                return "this kernel has no hugetlb pages"
            if not free:
                with open(NR_HUGEPAGES) as f:
                    wanted = int(f.read()) + 1
                self.tunables.set_path(NR_HUGEPAGES, str(wanted))
                with open(NR_HUGEPAGES) as f:
                    if int(f.read()) < wanted:
                        return "no memory in one piece for a hugetlb page"
        except OSError as e:
            return f"no hugetlb page: {e.strerror}"
        return ""


def run(
    wanted: Callable[[Case], bool] = lambda _: True,
    progress: Callable[[str, int, int], None] | None = None,
    on_result: Callable[[CaseResult], None] | None = None,
) -> SelfTest:
    """Run the self-test; the tunables are put back at the end, whatever happens.

    Raises
    ------
    NotPermitted, Unsupported, Busy
        It can't begin.
    CheckFailed
        Somebody else changes the tunables, or ksmd does not converge.
    """
    begin = time.monotonic()
    ksm = Ksm()
    test = SelfTest()
    tunables = Tunables(ksm)
    with tunables:
        test.leftover = tunables.leftover
        test.warnings = others_at_the_knobs()
        runner = Runner(ksm, tunables)
        runner.prepare()
        test.others = runner.find_others()
        huge = runner.sight.huge_bytes // runner.sight.page_size
        cases = [c for c in all_cases(huge) if wanted(c)]
        for number, case in enumerate(cases):
            if progress is not None:
                progress(case.name, number, len(cases))
            for result in runner.run(case):
                test.cases.append(result)
                if on_result is not None:
                    on_result(result)
        runner._rest()  # noqa: SLF001 - our own counts must not stay behind
    test.restored = tunables.restored
    if any(r.outcome == "left" for r in test.restored):
        test.warnings.append("some tunables were changed by somebody else and left as they are")
    test.seconds = time.monotonic() - begin
    return test
