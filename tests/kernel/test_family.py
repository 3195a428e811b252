"""Descendants of a real tree, by the kernel's list of children and by everybody's parent."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from dedup.kernel import family

TREE = """
import subprocess, sys, threading
def start():
    # A thread's children are listed with that thread.
    p = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; exec cat >/dev/null"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    print(p.pid, p.stdout.readline().strip(), flush=True)
    sys.stdin.read()
threading.Thread(target=start).start()
"""


@pytest.mark.parametrize("listed", [True, False])
def test_descendants(monkeypatch: pytest.MonkeyPatch, listed: bool) -> None:
    if listed and not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("this kernel lists no children")
    monkeypatch.setattr(family, "_lists_children", lambda _proc: listed)
    with subprocess.Popen(
        [sys.executable, "-c", TREE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child, sleeper = map(int, process.stdout.readline().split())
        try:
            assert sorted(family.descendants(process.pid)) == sorted([child, sleeper])
            assert {process.pid, child, sleeper} <= set(family.descendants(os.getpid()))
            assert family.descendants(sleeper) == []
        finally:
            os.kill(sleeper, 9)
            process.communicate("", timeout=20)
    assert family.descendants(process.pid) == []


def test_sessions_environments_and_programs() -> None:
    with subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, start_new_session=True, env={"WORD": "a=b", "PATH": "/bin"}
    ) as process:
        pid = process.pid
        assert family.session(pid) == pid != family.session(os.getpid())
        assert family.program(pid) == Path("/bin/cat").resolve().name
        assert family.environment_has(pid, "WORD=a=b")
        assert not family.environment_has(pid, "WORD=a")
        process.communicate()
    assert family.session(pid) is None
    assert family.program(pid) == ""
    assert not family.environment_has(pid, "WORD=a=b")


def test_what_processes_use() -> None:
    code = (
        "import os, sys, time\nkept = os.urandom(32 << 20)\nwhile time.process_time() < 0.5: pass\n"
        "print(flush=True); sys.stdin.read()"
    )
    with (
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process,
        subprocess.Popen(["true"]) as zombie,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        found = family.use([process.pid, zombie.pid])
        assert found.pids == {process.pid}
        assert 32 << 20 < found.anonymous_bytes < 64 << 20
        assert 0.4 < found.cpu_seconds < 2
        process.communicate()
    assert family.use([process.pid, zombie.pid]) == family.Use(frozenset(), 0, 0.0)


def test_a_child_dies_with_its_parent() -> None:
    code = (
        "import os, subprocess, sys\n"
        "from dedup.kernel import family\n"
        "me = os.getpid()\n"
        "p = subprocess.Popen(['sleep', '60'], preexec_fn=lambda: family.die_with_parent(me))\n"
        "print(p.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        pidfd = os.pidfd_open(child)
        process.kill()
        assert select.select([pidfd], [], [], 20)[0]
        os.close(pidfd)


def test_whether_children_are_listed() -> None:
    me = os.getpid()
    assert family._lists_children(family.PROC) is Path(f"/proc/{me}/task/{me}/children").exists()


def test_the_environment_we_were_started_with() -> None:
    code = (
        "import os; os.environ['B'] = '2'; os.environ['A'] = '3'\n"
        "from dedup.kernel.family import starting_environment\n"
        "expected = {'A': '\\udcff=1', 'PYTHONPATH': os.environ['PYTHONPATH']}\n"
        "print(starting_environment() == expected)"
    )
    given = {b"A": b"\xff=1", b"PYTHONPATH": os.fsencode(os.pathsep.join(sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_adopted_orphans() -> None:
    code = (
        "import subprocess, os\n"
        "from dedup.kernel import family\n"
        "family.adopt_orphans()\n"
        # In the background it would have /dev/null for its stdin, and end before its parent.
        "words = ['sh', '-c', 'exec 3<&0; (cat <&3 & echo $!)']\n"
        "p = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
        "orphan = int(p.stdout.readline()); p.wait()\n"
        "print(family.descendants(os.getpid()) == [orphan])\n"
        "p.stdin.close(); print(os.waitpid(-1, 0)[0] == orphan)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "True\nTrue\n", done.stderr
