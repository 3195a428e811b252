"""Running processes made mergeable and taken back: exactly, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dedup.change import plan as planning
from dedup.change.act import Chosen, Marks
from dedup.change.applied import Applied
from dedup.change.apply import apply
from dedup.change.plan import Wish
from dedup.change.tunables import restore
from dedup.change.undo import intersection, program_of, undo
from dedup.errors import (
    Busy,
    CheckFailed,
    Interrupted,
    KsmNotRunning,
    NotMergeable,
    OutputFailed,
    ProcessGone,
    Refused,
    Usage,
)
from dedup.kernel import ksm as ksm_interface
from dedup.kernel import maps, processes
from dedup.kernel.ksm import Ksm
from dedup.kernel.lock import STATE, HostLock
from dedup.kernel.processes import Handle
from dedup.scanning import Plan
from dedup.sources.live import Options
from tests.kernel_fixtures import PAGE, Target, frames
from tests.killed import APPLY_STEPS, RANGES_STEPS, UNDO_STEPS
from tests.kinds.hold import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel_fixtures import KsmControl

pytestmark = [pytest.mark.ksm, pytest.mark.root]

PAGES = 300
PLAN = Plan(options=Options(), interval_seconds=0.05)
WHOLE = Wish(how="whole")
RANGES = Wish(how="ranges")


def lay_out(target: Target) -> int:
    """300 pages that the others have too, and as many that nobody has; gives the address."""
    start: int = target.do("map", name="same", pages=PAGES)
    target.do("put", name="same", at=0, what=[f"content {i}" for i in range(PAGES)])
    target.do("map", name="own", pages=PAGES)
    target.do("fill", name="own", at=0, count=PAGES, what="unique")
    return start


def chosen(pid: int) -> Chosen:
    with Handle(pid) as handle:
        return Chosen(handle.id, handle.info.name, program_of(handle.info))


def merges_any(pid: int) -> bool:
    with Handle(pid) as handle:
        counters = ksm_interface.process_counters(handle)
    assert counters is not None
    return bool(counters.ksm_merge_any)


def mergeable(pid: int) -> list[tuple[int, int]]:
    with Handle(pid) as handle:
        return [(m.start, m.end) for m in maps.read(handle) if "mg" in m.vm_flags]


@pytest.fixture
def targets() -> Iterator[list[Target]]:
    with ExitStack() as stack:
        found = [stack.enter_context(Target()) for _ in range(3)]
        for target in found:
            lay_out(target)
        yield found
    Applied().path.unlink(missing_ok=True)


@pytest.fixture
def pids(targets: list[Target]) -> list[int]:
    return [t.pid for t in targets]


def test_whole_processes_are_merged_verified_and_separate_again(ksm: KsmControl) -> None:
    with ExitStack() as stack:
        found = [stack.enter_context(Target()) for _ in range(3)]
        starts = [lay_out(target) for target in found]
        pids = [t.pid for t in found]
        before = [t.do("digest", name="same") for t in found]
        done = apply(pids, PLAN, WHOLE, start_ksmd=True)
        assert not any(done.comparison.difference.values()), done.comparison
        assert done.comparison.actual["pages_sharing"] >= 2 * PAGES
        assert all(merges_any(pid) for pid in pids)
        merged = [frames(pid, start, PAGES) for pid, start in zip(pids, starts, strict=True)]
        assert merged[0] == merged[1] == merged[2]
        assert not ksm.ksm.running

        result = undo(Applied())
        assert [p.outcome for p in result.processes] == ["undone"] * 3
        assert not any(merges_any(pid) or mergeable(pid) for pid in pids)
        apart = [set(frames(pid, start, PAGES)) for pid, start in zip(pids, starts, strict=True)]
        assert len(apart[0] | apart[1] | apart[2]) == 3 * PAGES
        assert [t.do("digest", name="same") for t in found] == before
        assert not Applied().path.exists()


def test_ranges_bring_the_savings_alone(ksm: KsmControl, pids: list[int]) -> None:
    done = apply(pids, PLAN, RANGES, start_ksmd=True)
    assert done.holds
    assert done.comparison.actual["pages_sharing"] >= 2 * PAGES
    assert done.comparison.actual["pages_unshared"] < PAGES
    assert not any(merges_any(pid) for pid in pids)
    undo(Applied())
    assert not any(mergeable(pid) for pid in pids)


def test_a_fifth_of_the_pages_brings_all_the_savings(ksm: KsmControl, target: Target) -> None:
    """256 MiB that nobody has twice, and 64 MiB of four contents in mappings of their own."""
    target.do("map", name="own", pages=65536)
    target.do("fill", name="own", at=0, count=65536, what="unique")
    for i in range(4):
        target.do("map", name=f"same {i}", pages=4096)
        target.do("fill", name=f"same {i}", at=0, count=4096, what=f"content {i}")
    ksm.set(sleep_millisecs=1, pages_to_scan=200_000)
    saved, followed = {}, {}
    for wish in (WHOLE, RANGES, Wish(how="auto")):
        done = apply([target.pid], PLAN, wish, start_ksmd=True)
        assert done.holds
        assert not any(done.comparison.difference.values())
        (process,) = done.processes
        assert process.comparison is not None
        saved[wish.how] = done.comparison.actual["pages_sharing"]
        followed[wish.how] = process.comparison.actual["ksm_rmap_items"]
        undo(Applied())
    assert saved["whole"] >= 16_000
    assert saved["ranges"] >= 0.95 * saved["whole"]
    assert followed["ranges"] <= 0.25 * followed["whole"]
    assert followed["auto"] == followed["ranges"]


def test_ranges_once_more(ksm: KsmControl, pids: list[int]) -> None:
    """Nothing more pays, and what is mergeable counts."""
    apply(pids, PLAN, RANGES, start_ksmd=True)
    before = [mergeable(pid) for pid in pids]
    again = apply(pids, PLAN, RANGES, start_ksmd=True)
    assert again.holds
    assert not any(again.comparison.difference.values())
    undo(Applied())
    assert all(before)
    assert not any(mergeable(pid) for pid in pids)


def test_no_range_is_worth_it() -> None:
    """Which is not to say that KSM would not take the memory."""
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            with Handle(process.pid) as handle:
                wait_until("it starts", 10, lambda: handle.read("comm") == b"sleep\n")
            with pytest.raises(NotMergeable, match="has no copies") as e:
                planning.make([process.pid], PLAN, RANGES)
            assert "--how whole" in e.value.hint
            assert planning.make([process.pid], PLAN, WHOLE).chosen
        finally:
            process.kill()


def test_what_was_moved_since_is_said(ksm: KsmControl, targets: list[Target]) -> None:
    pids = [t.pid for t in targets]
    plan = planning.make(pids, PLAN, RANGES)
    with Marks() as marks:
        marks.mark(plan.chosen, plan.ranges)
    targets[0].do("move", name="same")
    result = {p.pid: p for p in undo(Applied()).processes}
    assert result[pids[0]].elsewhere_bytes >= PAGES * PAGE * 0.9
    assert result[pids[1]].elsewhere_bytes == 0


def test_what_a_program_advised_itself_stays(ksm: KsmControl, targets: list[Target]) -> None:
    first = targets[0]
    first.do("advise", name="own", what="mergeable")
    own = mergeable(first.pid)
    for wish in (WHOLE, RANGES):
        apply([t.pid for t in targets], PLAN, wish, start_ksmd=True)
        assert mergeable(first.pid) != own
        undo(Applied())
        assert mergeable(first.pid) == own
        assert not any(mergeable(t.pid) for t in targets[1:])


def test_children_since_are_taken_back_too(ksm: KsmControl, targets: list[Target]) -> None:
    pids = [t.pid for t in targets]
    apply(pids, PLAN, WHOLE, start_ksmd=True)
    child = targets[0].do("fork")
    assert merges_any(child)
    result = undo(Applied())
    assert (child, pids[0]) in [(p.pid, p.descendant_of) for p in result.processes]
    assert not merges_any(child)
    assert not mergeable(child)
    assert not result.unknown


SLEEPER = "import sys, time; print('ready', flush=True); sys.stdin.read()"
EXECUTES = (
    "import os, sys; print('ready', flush=True); sys.stdin.readline(); "
    f"os.execv(sys.executable, [sys.executable, '-c', {SLEEPER!r}])"
)


def begun(code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def execute(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "ready\n"


def test_a_program_that_forks_all_the_time(ksm: KsmControl, targets: list[Target]) -> None:
    """No child that was begun meanwhile stays mergeable."""
    first = targets[0]
    first.send("keep_forking", name="same", pages=3, live_seconds=0.2)
    try:
        for _ in range(5):
            with Marks() as marks:
                marks.mark([chosen(first.pid)], None)
            time.sleep(0.05)
            assert undo(Applied()).complete
            assert first.pid not in ksm_interface.users()
            family = [i.id.pid for i in processes.every() if i.ppid == first.pid]
            assert not set(family) & set(ksm_interface.users())
    finally:
        first.stop()


FORKS = (
    "import os, signal, sys; print('ready', flush=True); sys.stdin.readline(); "
    "child = os.fork() or (signal.pause(), os._exit(0)); print(child, flush=True); signal.pause()"
)


def test_an_orphan_is_known_by_its_layout(ksm: KsmControl) -> None:
    process = begun(FORKS)
    assert process.stdin is not None
    assert process.stdout is not None
    child = 0
    try:
        with Marks() as marks:
            marks.mark([chosen(process.pid)], None)
        process.stdin.write("\n")
        process.stdin.flush()
        child = int(process.stdout.readline())
        ended(process)
        outcomes = {p.pid: p.outcome for p in undo(Applied()).processes}
        assert outcomes == {process.pid: "ended", child: "undone"}
        assert not merges_any(child)
    finally:
        ended(process)
        if child:
            os.kill(child, signal.SIGKILL)


def test_a_program_begun_by_exec_since_is_taken_back(ksm: KsmControl) -> None:
    process = begun(EXECUTES)
    try:
        with Marks() as marks:
            marks.mark([chosen(process.pid)], None)
        execute(process)
        assert merges_any(process.pid)
        (one,) = undo(Applied()).processes
        assert one.outcome == "undone"
        assert not merges_any(process.pid)
        assert not mergeable(process.pid)
    finally:
        ended(process)


def test_an_unrelated_mergeable_process_is_named_and_left(
    ksm: KsmControl, targets: list[Target]
) -> None:
    with Marks() as marks:
        marks.mark([chosen(targets[0].pid)], None)
    with Target() as other:
        other.do("map", name="a", pages=10)
        other.do("advise", name="a", what="mergeable")
        result = undo(Applied())
        assert len(mergeable(other.pid)) == 1
    assert any(f"process {other.pid} " in u for u in result.unknown)


def test_a_pid_used_again_is_refused(ksm: KsmControl, targets: list[Target]) -> None:
    from dataclasses import replace

    real = chosen(targets[0].pid)
    older = replace(real, id=replace(real.id, start_time=real.id.start_time - 1))
    with Marks() as marks:
        marks.mark([older], None)
    (failed,) = marks.failed
    assert isinstance(failed.error, ProcessGone)
    assert not merges_any(targets[0].pid)


def test_an_exec_between_plan_and_act_is_refused(ksm: KsmControl) -> None:
    process = begun(EXECUTES)
    try:
        planned = chosen(process.pid)
        execute(process)
        with Marks() as marks:
            marks.mark([planned], None)
        (failed,) = marks.failed
        assert "another program" in failed.error.message
        assert not merges_any(process.pid)
    finally:
        ended(process)


def test_ranges_unmapped_since_the_plan_are_missing(ksm: KsmControl, targets: list[Target]) -> None:
    plan = planning.make([t.pid for t in targets], PLAN, RANGES)
    assert plan.ranges is not None
    targets[0].do("unmap", name="same")
    with Marks() as marks:
        marks.mark(plan.chosen, plan.ranges)
    missing = {m.id.pid: m.missing_bytes for m in marks.marked}
    assert missing[targets[0].pid] >= PAGES * PAGE * 0.9
    assert missing[targets[1].pid] == 0
    undo(Applied())


def test_a_stopped_process_is_marked_and_stays_stopped(
    ksm: KsmControl, targets: list[Target]
) -> None:
    pid = targets[0].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        with Marks() as marks:
            marks.mark([chosen(pid)], None)
        assert merges_any(pid)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state == "T"
        undo(Applied())
        assert not merges_any(pid)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_one_that_ends_meanwhile_leaves_the_others(ksm: KsmControl, targets: list[Target]) -> None:
    def step(name: str) -> None:
        if name == "begin":
            targets[0].kill()

    done = apply([t.pid for t in targets], PLAN, WHOLE, start_ksmd=True, step=step)
    assert [f.id.pid for f in done.failed] == [targets[0].pid]
    assert not done.scan.complete
    assert done.comparison.actual["pages_sharing"] >= PAGES
    assert done.holds
    undo(Applied())


@pytest.mark.parametrize("step", ["marked", "tunables", "wait", "verify"])
def test_an_error_takes_everything_back(ksm: KsmControl, pids: list[int], step: str) -> None:
    before = ksm.ksm.tunables()

    def fail(name: str) -> None:
        if name == step:
            raise CheckFailed("as a test has it")

    with pytest.raises(CheckFailed, match="taken back"):
        apply(pids, PLAN, WHOLE, start_ksmd=True, step=fail)
    assert not any(mergeable(pid) or merges_any(pid) for pid in pids)
    assert ksm.ksm.tunables() == before
    assert not Applied().path.exists()


@pytest.mark.parametrize("at", ["record", "mark", "marked"])
def test_a_signal_amid_the_marking_ends_it(ksm: KsmControl, pids: list[int], at: str) -> None:
    """It is not one process's failure, after which the others are still marked."""
    seen = []

    def step(name: str) -> None:
        seen.append(name)
        if name == at:
            raise Interrupted("interrupted")

    with pytest.raises(Interrupted):
        apply(pids, PLAN, WHOLE, start_ksmd=True, step=step)
    assert seen[-1] == at
    assert not any(mergeable(pid) or merges_any(pid) for pid in pids)
    assert not Applied().path.exists()


def test_a_signal_amid_an_injection_ends_the_marking(ksm: KsmControl, pids: list[int]) -> None:
    """`except DedupError` must not take it for one process that could not be marked."""
    code = (
        "import os, signal, sys\n"
        "from dedup.cli import guard\n"
        "from dedup.kernel import inject\n"
        "real, calls = inject.merge_any, []\n"
        "def merge_any(*args, **words):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(*args, **words)\n"
        "inject.merge_any = merge_any\n"
        "sys.exit(guard.run(sys.argv[1:]))\n"
    )
    words = [word for pid in pids for word in ("--pid", str(pid))]
    done = subprocess.run(
        [sys.executable, "-c", code, "apply", *words, "--how", "whole", "--start-ksmd"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60,
    )  # fmt: skip
    assert done.returncode == 130, (done.stdout, done.stderr)
    assert not any(mergeable(pid) or merges_any(pid) for pid in pids)
    assert not Applied().path.exists()


def fill(state: Path) -> None:
    """Leave no room for another line of the record."""
    applied = Applied(state)
    line = len(json.dumps({"event": "begin", "application": "", "began_ticks": 0,
                           "mergeable_before": []})) + 1  # fmt: skip
    room = -applied.path.stat().st_size % PAGE
    applied.begin("x" * (room - line), 0, [])
    with suppress(OSError), (state / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(PAGE))


@pytest.mark.parametrize("at", ["record", "marked", "finish"])
def test_a_full_disk_takes_everything_back(
    ksm: KsmControl, targets: list[Target], tmp_path: Path, at: str
) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "none", tmp_path], check=True
    )
    targets[0].do("advise", name="own", what="mergeable")
    own = mergeable(targets[0].pid)
    pids = [t.pid for t in targets]

    def step(name: str) -> None:
        if name == at and merges_any(pids[0]) and not (tmp_path / "ballast").exists():
            fill(tmp_path)

    try:
        with pytest.raises(OutputFailed, match="taken back"), Marks(tmp_path, step=step) as marks:
            marks.mark([chosen(pid) for pid in pids], None)
        assert not any(merges_any(pid) for pid in pids)
        assert mergeable(pids[0]) == own
        assert not Applied(tmp_path).path.exists()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def killed(step: str, how: str, pids: list[int]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", step, how, *map(str, pids)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, (done.returncode, done.stderr)


@pytest.mark.parametrize(
    ("step", "how"),
    [
        *((s, "whole") for s in APPLY_STEPS),
        *((s, "ranges") for s in (*RANGES_STEPS, "mark", "marked", "wait")),
    ],
)
def test_killed_at_a_step_nothing_is_lost(
    ksm: KsmControl, targets: list[Target], step: str, how: str
) -> None:
    ksm.set(smart_scan=1)
    before = ksm.ksm.tunables()
    digests = [t.do("digest", name=n) for t in targets for n in ("same", "own")]
    pids = [t.pid for t in targets]
    killed(step, how, pids)
    assert [t.do("digest", name=n) for t in targets for n in ("same", "own")] == digests

    finished = step == "end"
    restore(Ksm())
    assert ksm.ksm.tunables() == before
    with HostLock():
        result = undo(Applied(), interrupted_only=True)
    assert result.complete
    if finished:
        assert all(merges_any(pid) for pid in pids)
        undo(Applied())
    assert not any(mergeable(pid) or merges_any(pid) for pid in pids)
    assert not Applied().path.exists()
    assert [t.do("digest", name=n) for t in targets for n in ("same", "own")] == digests


@pytest.mark.parametrize("step", UNDO_STEPS)
@pytest.mark.parametrize("how", ["whole", "ranges"])
def test_killed_while_undoing_it_is_undone_the_next_time(
    ksm: KsmControl, targets: list[Target], how: str, step: str
) -> None:
    targets[0].do("advise", name="own", what="mergeable")
    own = mergeable(targets[0].pid)
    pids = [t.pid for t in targets]
    apply(pids, PLAN, WHOLE if how == "whole" else RANGES, start_ksmd=True)
    killed(step, "undo", [])
    assert undo(Applied()).complete
    assert mergeable(pids[0]) == own
    assert not any(mergeable(pid) or merges_any(pid) for pid in pids[1:])
    assert not Applied().path.exists()


def test_half_an_undoing_gives_the_programs_own_marks_back(
    ksm: KsmControl, targets: list[Target]
) -> None:
    """Killed between the two calls of an undoing: all is unmarked, the program's own too."""
    first = targets[0]
    first.do("advise", name="own", what="mergeable")
    own = mergeable(first.pid)
    with Marks() as marks:
        marks.mark([chosen(first.pid)], None)
    (application,) = Applied().applications()
    Applied().undoing(application.marks[0])
    from dedup.kernel import inject

    with Handle(first.pid) as handle:
        inject.merge_any(handle, False)
    assert mergeable(first.pid) == []
    undo(Applied())
    assert mergeable(first.pid) == own


def test_a_program_that_switched_it_off_itself_is_left(
    ksm: KsmControl, targets: list[Target]
) -> None:
    from dedup.kernel import inject

    with Marks() as marks:
        marks.mark([chosen(targets[0].pid)], None)
    with Handle(targets[0].pid) as handle:
        inject.merge_any(handle, False)
    (one,) = undo(Applied()).processes
    assert one.outcome == "nothing"


def test_two_at_once(ksm: KsmControl, pids: list[int]) -> None:
    with HostLock(), pytest.raises(Busy):
        apply(pids, PLAN, WHOLE, start_ksmd=True)
    assert not any(merges_any(pid) for pid in pids)


def test_ksmd_at_rest(ksm: KsmControl, pids: list[int]) -> None:
    with pytest.raises(KsmNotRunning):
        apply(pids, PLAN, WHOLE)
    assert not any(merges_any(pid) for pid in pids)


def test_too_slow_a_ksmd_is_said_before_anything_is_changed(
    ksm: KsmControl, pids: list[int]
) -> None:
    ksm.set(pages_to_scan=1, sleep_millisecs=100)
    with pytest.raises(Usage, match="at least"):
        apply(pids, PLAN, WHOLE, start_ksmd=True, timeout_seconds=10)
    assert not Applied().path.exists()


def test_a_full_disk_under_the_record(ksm: KsmControl, pids: list[int], tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,mode=755", "none", tmp_path], check=True)
    try:
        (tmp_path / "filler").write_bytes(b"x" * 4096)
        with pytest.raises(OutputFailed, match="nothing was changed"), Marks(tmp_path) as marks:
            marks.mark([chosen(pids[0])], None)
        assert not merges_any(pids[0])
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_two_users_are_refused_unless_accepted(ksm: KsmControl) -> None:
    with Target() as ours, Target(user=65534) as theirs:
        for target in (ours, theirs):
            lay_out(target)
        pids = [ours.pid, theirs.pid]
        with pytest.raises(Refused, match="2 trust domains") as refused:
            planning.make(pids, PLAN, WHOLE)
        assert "--accept-side-channels" in refused.value.hint
        assert len(planning.make(pids, PLAN, Wish(accept_side_channels=True)).chosen) == 2
        # One that is mergeable already counts.
        theirs.do("advise", name="same", what="mergeable")
        with pytest.raises(Refused, match="1 mergeable already"):
            planning.make([ours.pid], PLAN, WHOLE)


def test_a_holder_of_secrets_is_left_out_by_name(ksm: KsmControl, targets: list[Target]) -> None:
    code = (
        "import sys; open('/proc/self/comm', 'w').write('ssh-agent'); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    process = begun(code)
    try:
        plan = planning.make([process.pid, targets[0].pid], PLAN, WHOLE)
        assert [c.id.pid for c in plan.chosen] == [targets[0].pid]
        assert "ssh-agent" in plan.left_out[0].what
        with pytest.raises(Refused, match="secrets"):
            planning.make([process.pid], PLAN, WHOLE)
        wish = Wish(how="whole", secret_holders=True)
        assert len(planning.make([process.pid], PLAN, wish).chosen) == 1
    finally:
        ended(process)


def test_those_mergeable_already_are_counted_in(ksm: KsmControl, targets: list[Target]) -> None:
    """The prediction is the host's: what others have merged already takes part."""
    targets[0].do("advise", name="same", what="mergeable")
    done = apply([targets[1].pid], PLAN, WHOLE, start_ksmd=True)
    assert not done.by_process
    assert done.holds
    assert done.comparison.actual["pages_sharing"] >= PAGES
    undo(Applied())


def test_one_that_was_undone_counts_no_more(ksm: KsmControl, targets: list[Target]) -> None:
    """ksmd rests, so that it still has its pages on its list."""
    apply([targets[0].pid], PLAN, WHOLE, start_ksmd=True)
    undo(Applied())
    assert ksm.ksm.counters().rmap_items
    assert targets[0].pid not in ksm_interface.users()
    done = apply([targets[1].pid, targets[2].pid], PLAN, WHOLE, start_ksmd=True)
    assert not done.by_process
    assert not any(done.comparison.difference.values())
    assert [m.pid for m in done.plan.members] == sorted(done.plan.pids)
    undo(Applied())


def test_intersection() -> None:
    assert intersection([(0, 10), (20, 30)], [(5, 25)]) == [(5, 10), (20, 25)]
    assert intersection([(0, 100)], [(10, 20), (30, 40), (90, 120)]) == [
        (10, 20), (30, 40), (90, 100),
    ]  # fmt: skip
    assert intersection([(0, 10)], [(10, 20)]) == []


def test_the_record_is_not_readable_by_others(ksm: KsmControl, targets: list[Target]) -> None:
    with Marks() as marks:
        marks.mark([chosen(targets[0].pid)], None)
    assert (STATE / "applied").stat().st_mode & 0o077 == 0
    undo(Applied())
