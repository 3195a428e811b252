"""What looks find: volatile, new and gone pages; forks; processes that end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dedup import grouping
from dedup.errors import NoMemory, NoSuchProcess, ProcessGone
from dedup.pages import Flag, Pages
from dedup.scanning import Plan, Scan, scan_pids
from dedup.sources.live import LiveSource, Options
from tests.kernel_fixtures import Target

if TYPE_CHECKING:
    from collections.abc import Iterator


def scan(*pids: int, **plan: Any) -> Scan:
    plan.setdefault("interval_seconds", 0.1)
    return scan_pids(list(pids), Plan(**plan))


def words(pages: Pages, start: int, count: int, pid: int) -> dict[int, int]:
    """Frame word of each page of a range, by its number in the range."""
    found = {}
    process = next(i for i, p in enumerate(pages.processes) if p.id.pid == pid)
    owner = pages.process_of_region()[pages.run_region]
    for r in np.flatnonzero(owner == process).tolist():
        for i in range(int(pages.run_count[r])):
            at = (int(pages.run_start[r]) - start) // pages.page_size + i
            if 0 <= at < count:
                found[at] = int(pages.frames[int(pages.run_first[r]) + i])
    return found


def test_volatile_pages_are_exactly_those_rewritten(target: Target) -> None:
    start = target.do("map", name="a", pages=400)
    target.do("fill", name="a", at=0, count=400, what="unique")
    written = list(range(7, 400, 9))
    target.send("keep_writing", name="a", pages=written)
    assert target.answer() == "started"
    source = LiveSource([target.pid], Options())
    source.first_look()
    time.sleep(0.3)
    pages = source.look_again()
    rounds = target.stop()
    assert rounds > 100, "each page changed between the looks"
    found = words(pages, start, 400, target.pid)
    assert sorted(i for i, w in found.items() if w & int(Flag.VOLATILE)) == written


def test_pages_that_come_and_go(target: Target) -> None:
    a = target.do("map", name="a", pages=100)
    target.do("fill", name="a", at=0, count=60, what="unique")
    source = LiveSource([target.pid], Options())
    source.first_look()
    target.do("advise", name="a", what="dontneed", at=10, count=20)
    target.do("fill", name="a", at=60, count=15, what="unique")
    target.do("put", name="a", at=40, what=["other"])
    b = target.do("map", name="b", pages=30)
    target.do("fill", name="b", at=0, count=30, what="same")
    pages = source.look_again()
    found = words(pages, a, 100, target.pid)
    assert sorted(i for i, w in found.items() if w & int(Flag.GONE)) == list(range(10, 30))
    assert sorted(i for i, w in found.items() if w & int(Flag.NEW)) == list(range(60, 75))
    assert [i for i, w in found.items() if w & int(Flag.VOLATILE)] == [40]
    # The target's allocator may have had memory there at the first look.
    fresh = int(Flag.NEW | Flag.VOLATILE)
    assert all(w & fresh for w in words(pages, b, 30, target.pid).values())
    # At the third look the new ones are known, the gone stay gone.
    pages = source.look_again()
    found = words(pages, a, 100, target.pid)
    assert not any(w & int(Flag.NEW) for w in found.values())
    assert sorted(i for i, w in found.items() if w & int(Flag.GONE)) == list(range(10, 30))
    assert len(grouping.group(pages).order) >= 30


def test_the_arrays_grow_where_a_target_does(target: Target) -> None:
    """Many more pages at the second look than room was made for."""
    target.do("map", name="a", pages=200_000)
    source = LiveSource([target.pid], Options(threads=2))
    first = source.first_look()
    room = len(first.hashes)
    target.do("fill", name="a", at=0, count=200_000, what="same")
    pages = source.look_again()
    assert int(pages.present.sum()) >= room + 200_000
    zero = pages.frames[pages.present & ((pages.frames & Flag.NEW) != 0)]
    assert len(zero) >= 200_000
    hashes, counts = np.unique(pages.hashes[pages.present], return_counts=True)
    # The target may hold one or two more of it, where it made the page.
    assert 200_000 <= counts.max() <= 200_002
    assert len(hashes) < 10_000


@pytest.mark.ksm
@pytest.mark.root
def test_a_frame_that_several_map_is_one(target: Target) -> None:
    """Parent and three children share 100 pages: no merge, one frame each."""
    target.do("map", name="a", pages=100)
    target.do("put", name="a", at=0, what=[f"fork {i}" for i in range(100)])
    target.do("advise", name="a", what="mergeable")
    children = [target.do("fork") for _ in range(3)]
    found = scan(target.pid, *children, options=Options(scope="advised")).prediction
    assert (found.pages_shared, found.pages_sharing) == (0, 0)
    assert (found.pages_unshared, found.pages_volatile) == (100, 300)
    assert found.frames_freed == 0
    with Target() as other:
        other.do("map", name="a", pages=100)
        other.do("put", name="a", at=0, what=[f"fork {i}" for i in range(100)])
        other.do("advise", name="a", what="mergeable")
        found = scan(target.pid, *children, other.pid, options=Options(scope="advised")).prediction
        assert (found.pages_shared, found.pages_sharing, found.frames_freed) == (100, 400, 100)
        # Scanned without its children, the parent's frames stay mapped by them.
        alone = scan(target.pid, other.pid, options=Options(scope="advised")).prediction
        assert alone.pages_sharing == 100
        low, high = alone.bounds.get("frames_freed", (alone.frames_freed, alone.frames_freed))
        assert low is not None
        assert high is not None
        assert low <= 100 <= high


def test_protected_pages_are_read(target: Target) -> None:
    start = target.do("map", name="a", pages=64)
    target.do("fill", name="a", at=0, count=64, what="equal")
    target.do("protect", name="a", how="none")
    found = scan(target.pid)
    assert found.complete
    if found.pages.frames_known:
        group = words(found.pages, start, 64, target.pid)
        assert all(w & int(Flag.DUPLICATE) for w in group.values())


def test_private_file_pages_count_once_written(target: Target) -> None:
    start = target.do("map", name="a", pages=20, file="memfd")
    target.do("touch", name="a", at=0, count=20)
    target.do("put", name="a", at=3, what=["x", "x", "x"])
    found = scan(target.pid)
    assert sorted(words(found.pages, start, 20, target.pid)) == [3, 4, 5]


def test_a_process_that_ends_during_the_scan() -> None:
    with Target() as short:
        source = LiveSource([short.pid], Options())
        source.first_look()
        short.kill()
        with pytest.raises((ProcessGone, NoSuchProcess, NoMemory)):
            source.look_again()


def test_one_of_several_ends_during_the_scan(target: Target) -> None:
    target.do("map", name="a", pages=50)
    target.do("fill", name="a", at=0, count=50, what="equal")
    with Target() as short:
        short.do("map", name="a", pages=50)
        short.do("fill", name="a", at=0, count=50, what="equal")
        source = LiveSource([target.pid, short.pid], Options())
        source.first_look()
        short.kill()
        pages = source.look_again()
    assert [s.pid for s in pages.skipped] == [short.pid]
    owner = pages.process_of_region()[pages.region_of(np.flatnonzero(pages.present))]
    assert {pages.processes[p].id.pid for p in np.unique(owner).tolist()} == {target.pid}


def test_processes_that_end_while_they_are_read() -> None:
    """Killed at random moments of one long scan after another: a result or a typed error."""
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02, 0.04):
        with Target() as short:
            short.do("map", name="a", pages=60_000)
            short.do("fill", name="a", at=0, count=60_000, what="equal")
            timer = threading.Timer(delay, short.kill)
            timer.start()
            try:
                found = scan(short.pid, passes=1)
                assert found.scanned_pages >= 0
            except (NoSuchProcess, NoMemory):
                pass
            timer.join()


def test_many_small_pieces_of_memory(target: Target) -> None:
    """Every other page present: as many runs as pages."""
    start = target.do("map", name="a", pages=6000)
    for i in range(0, 6000, 2):
        target.do("put", name="a", at=i, what=["x"])
    found = scan(target.pid)
    assert sorted(words(found.pages, start, 6000, target.pid)) == list(range(0, 6000, 2))


@pytest.mark.ksm
@pytest.mark.root
def test_bounds_without_root_hold_the_truth(target: Target) -> None:
    """The same memory scanned by root and by its own user, who sees no frame numbers."""
    code = (
        "import json, os, sys, dedup.scanning, dedup.sources.live, dedup.merging, pwd, xxhash\n"
        "from dedup.kernel.memory import load_hash; load_hash(4096)\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "import ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\n"
        "s = dedup.scanning.scan_pids(\n"
        "    [int(p) for p in sys.argv[1:]], dedup.scanning.Plan(interval_seconds=0.1,\n"
        "    options=dedup.sources.live.Options(scope='advised')))\n"
        "p = s.prediction\n"
        "print(json.dumps({n: p.bounds.get(n, [getattr(p, n)] * 2) for n in\n"
        "      ('pages_shared', 'pages_sharing', 'pages_unshared', 'frames_freed')}))\n"
    )
    import json

    with Target(user=65534) as mine:
        mine.do("map", name="a", pages=300)
        mine.do("put", name="a", at=0, what=[f"c {i % 100}" for i in range(200)])
        mine.do("fill", name="a", at=200, count=100, what="zero")
        mine.do("advise", name="a", what="mergeable")
        child = mine.do("fork")
        pids = [mine.pid, child]
        truth = scan(*pids, options=Options(scope="advised")).prediction
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, pids)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        bounds = json.loads(done.stdout)
    for name, (low, high) in bounds.items():
        assert low <= getattr(truth, name) <= high, name


def test_own_pid() -> None:
    found = scan(os.getpid(), passes=1)
    assert found.scanned_pages > 1000


def test_one_address_space_is_scanned_once() -> None:
    """A thread's number, the same pid again, and a vfork child before its exec."""
    code = (
        "import os, subprocess, sys, threading, time\n"
        "t = threading.Thread(target=time.sleep, args=(60,), daemon=True); t.start()\n"
        "print(t.native_id, flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        thread = int(process.stdout.readline())
        once = scan(process.pid, passes=1)
        again = scan(process.pid, thread, process.pid, passes=1)
        assert [p.id.pid for p in again.pages.processes] == [process.pid]
        assert abs(again.scanned_pages - once.scanned_pages) < 20
        assert [p.id.pid for p in scan(thread, passes=1).pages.processes] == [process.pid]
        process.communicate("\n")


@pytest.fixture
def execing() -> Iterator[subprocess.Popen[str]]:
    """A process that starts another program when `start_another` says so."""
    code = "import os\nprint('ready', flush=True)\ninput()\nos.execlp('sleep', 'sleep', '60')\n"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def start_another(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    while b"sleep" not in Path(f"/proc/{process.pid}/comm").read_bytes():
        time.sleep(0.01)


def test_an_exec_between_looks_is_said(execing: subprocess.Popen[str]) -> None:
    source = LiveSource([execing.pid], Options())
    source.first_look()
    start_another(execing)
    with pytest.raises(ProcessGone, match="another program"):
        source.look_again()


@pytest.mark.parametrize("before", ["the files are opened", "they are read"])
def test_an_exec_amid_the_only_look_is_said(
    target: Target, execing: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """What is read is nothing, or memory that the mappings are not of: no figures of that."""
    from dedup.kernel import memory

    where, name = (memory, "look") if before == "they are read" else (memory.Target, "open")
    real = getattr(where, name)
    done: list[str] = []

    def after_an_exec(first: Any, *args: Any, **words: Any) -> Any:
        if not done and (name == "look" or first.handle.pid == execing.pid):
            done.append(name)
            start_another(execing)
        return real(first, *args, **words)

    monkeypatch.setattr(where, name, after_an_exec)
    found = scan(target.pid, execing.pid, passes=1)
    assert [(s.pid, "another program" in s.what) for s in found.pages.skipped] == [
        (execing.pid, True)
    ]
    assert not found.complete


def test_an_exec_amid_the_only_look_at_one(
    execing: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dedup.kernel import memory

    real = memory.look

    def after_an_exec(*args: Any, **words: Any) -> memory.Look:
        start_another(execing)
        return real(*args, **words)

    monkeypatch.setattr(memory, "look", after_an_exec)
    with pytest.raises(ProcessGone, match="another program"):
        scan(execing.pid, passes=1)


def test_a_process_that_ends_before_it_is_read_is_left_out(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends between the look at its mappings and the reading: the others are scanned."""
    from dedup.kernel import memory

    with Target() as ending:
        ending.do("map", name="a", pages=50)
        ending.do("fill", name="a", at=0, count=50, what="unique")
        real = memory.look

        def after_its_end(*args: Any, **words: Any) -> memory.Look:
            ending.kill()
            return real(*args, **words)

        monkeypatch.setattr(memory, "look", after_its_end)
        found = scan(target.pid, ending.pid, passes=1)
    assert [s.pid for s in found.pages.skipped] == [ending.pid]
    assert found.scanned_pages > 0
