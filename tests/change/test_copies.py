"""Copies under their keeper, and what a pilot does where the host is too small."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from dedup.change import keeper, pilot
from dedup.change.copies import Copies, CopyEnded, KeeperGone, last_lines
from dedup.errors import Interrupted, Refused
from dedup.estimate.settings import Start
from dedup.kernel import family

WAITS = Start((sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def running(marker: str) -> list[int]:
    """Descendants of ours with this word in their command line."""
    mine = family.descendants(os.getpid())
    return [p for p in mine if marker.encode() in Path(f"/proc/{p}/cmdline").read_bytes()]


def test_started_stopped_and_started_again() -> None:
    with Copies(2) as copies:
        pids: list[int] = []
        for _ in range(2):
            pids += [copies.start(number, WAITS, "^up$").pid for number in (1, 2)]
            while not all(c.pattern_seen for c in copies.running.values()):
                copies.look(0.1)
            assert copies.processes() == {1: [pids[-2]], 2: [pids[-1]]}
            copies.stop()
            assert not any(map(alive, pids))
            assert not copies.running
        assert len(set(pids)) == 4
        assert copies.left == []
    # Its own parent has nothing left to wait for.
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_numbers_of_one_length() -> None:
    with Copies(9) as few, Copies(12) as many:
        assert [few.filled("{n}", 3), many.filled("a{n}b{n}", 3)] == ["3", "a03b03"]
        assert len(many.filled("{dir}", 3)) == len(many.filled("{dir}", 12))


def test_a_copy_that_ends_is_told_of_with_its_last_lines() -> None:
    code = (
        "import sys; print('x' * 9999); sys.stderr.write('a\\n' * 99 + 'b\\nc\\n\\n'); sys.exit(3)"
    )
    with Copies(1) as copies:
        copies.start(1, Start((sys.executable, "-c", code)))
        with pytest.raises(
            CopyEnded, match=r"copy 1 has ended with status 3, saying: a \| a \| b \| c$"
        ):
            copies.look(20)


def test_the_keeper_gone() -> None:
    with Copies(1) as copies:
        pid = copies.start(1, WAITS).pid
        assert copies._keeper is not None
        os.kill(copies._keeper, 9)
        with pytest.raises(KeeperGone):
            copies.look(20)
    assert not alive(pid)


def test_an_error_of_ours_ends_them() -> None:
    pid = 0
    with pytest.raises(ZeroDivisionError), Copies(1) as copies:
        pid = copies.start(1, WAITS).pid
        raise ZeroDivisionError
    assert not alive(pid)


@pytest.mark.parametrize(
    "moment", ["starting", "waiting until they are ready", "waiting until they are settled",
               "waiting for the next look"],
)  # fmt: skip
def test_a_signal_at_any_moment_ends_them(moment: str, tmp_path: Path) -> None:
    marker = str(tmp_path)
    words = (*WAITS.words, marker)

    def progress(what: str, done: int, _total: int) -> None:
        what = "waiting for the next look" if what == "waiting" else what
        # The first copy is there when the second is started.
        if what.startswith(moment) and (moment != "starting" or done):
            assert len(running(marker)) == (1 if done and moment == "starting" else 2)
            raise Interrupted("interrupted")

    with pytest.raises(Interrupted):
        pilot.run(
            pilot.Wish(
                words, copies=2, ready=pilot.Ready("seconds", "1.5"),
                # So that there is a wait, whatever ksmd's pace here is.
                assumed={"pages_to_scan": 100, "sleep_millisecs": 20},
            ),
            progress,
        )  # fmt: skip
    assert not running(marker)


def test_one_that_ignores_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "TERM_SECONDS", 0.3)
    code = (
        "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    )
    with Copies(1) as copies:
        copy = copies.start(1, Start((sys.executable, "-c", code)), "up")
        while not copy.pattern_seen:
            copies.look(0.1)
        copies.stop()
        assert not alive(copy.pid)


def test_a_stopped_one_ends_in_its_own_way(tmp_path: Path) -> None:
    code = (
        "import signal, sys\n"
        "def end(*_): open(sys.argv[1], 'w').close(); sys.exit()\n"
        "signal.signal(15, end); print('up', flush=True)\n"
        "while True: signal.pause()"
    )
    path = tmp_path / "ended"
    with Copies(1) as copies:
        copy = copies.start(1, Start((sys.executable, "-c", code, str(path))), "up")
        while not copy.pattern_seen:
            copies.look(0.1)
        os.kill(copy.pid, signal.SIGSTOP)
        copies.stop()
    assert path.exists()


def test_a_host_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot, "LEFT_SHARE", 1.0)
    with pytest.raises(Refused, match="take this host's memory"):
        pilot.run(pilot.Wish(WAITS.words, copies=1))


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("7000", "port", "7000"), ("70{n}", "port", "70{n}"), ("{n}", "port", "{n}"),
     ("5s", "seconds", "5"), ("0.5 s", "seconds", "0.5"), ("listening on 70{n}", "pattern", None),
     ("5 steps", "pattern", None), ("^7000$", "pattern", None)],
)  # fmt: skip
def test_signs_of_being_ready(text: str, kind: str, value: str | None) -> None:
    found = pilot.parse_ready(text)
    assert (found.kind, found.value) == (kind, text if value is None else value)


def test_last_lines() -> None:
    assert last_lines("") == last_lines(" \n\n") == ""
    assert last_lines("1\n2\n3\n 4  x\n\n5\n") == "2 | 3 | 4 x | 5"
    assert len(last_lines("x" * 100_000)) == 400
