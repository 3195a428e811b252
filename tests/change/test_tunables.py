"""Tunables of the real kernel, changed and put back: after an error, a signal, a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dedup.change.journal import Entry, Journal
from dedup.change.tunables import (
    Tunables,
    others_at_the_knobs,
    planned_restore,
    read_setting,
    restore,
)
from dedup.errors import Busy, CheckFailed, NotPermitted, Unsupported
from dedup.kernel.ksm import Ksm
from dedup.kernel.lock import HostLock

pytestmark = [pytest.mark.ksm, pytest.mark.root]

CHANGER = """
import sys, time
from pathlib import Path
from dedup.change.tunables import Tunables
from dedup.kernel.ksm import Ksm
with Tunables(Ksm(), Path(sys.argv[1])) as t:
    t.set("smart_scan", 0)
    t.set("pages_to_scan", 321)
    t.set("sleep_millisecs", 7)
    print("changed", flush=True)
    time.sleep(60)
"""


@contextmanager
def changer(state: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has changed tunables and goes on."""
    with subprocess.Popen(
        [sys.executable, "-c", CHANGER, str(state)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "changed\n"
            yield process
        finally:
            process.kill()


@contextmanager
def self_test(until: str) -> Iterator[subprocess.Popen[str]]:
    """A self-test in the middle of its work."""
    with subprocess.Popen(
        [sys.executable, "-m", "dedup", "apply", "--self-test"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            while not process.stdout.readline().startswith(until):
                assert process.poll() is None
            yield process
        finally:
            process.kill()


def test_put_back_after_an_error(tmp_path: Path) -> None:
    ksm = Ksm()
    before = ksm.tunables()
    with pytest.raises(ZeroDivisionError), Tunables(ksm, tmp_path) as t:
        t.set("pages_to_scan", 222)
        assert ksm.tunables()["pages_to_scan"] == 222
        raise ZeroDivisionError
    assert ksm.tunables() == before
    assert not (tmp_path / "journal").exists()


def test_put_back_after_ctrl_c(tmp_path: Path) -> None:
    before = Ksm().tunables()
    with changer(tmp_path) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(10) != 0
    assert Ksm().tunables() == before


def test_restore_after_sigkill(tmp_path: Path) -> None:
    ksm = Ksm()
    before = ksm.tunables()
    with changer(tmp_path) as process:
        process.kill()
    assert ksm.tunables()["pages_to_scan"] == 321
    assert {r.outcome for r in planned_restore(tmp_path)} == {"restored"}
    assert ksm.tunables()["pages_to_scan"] == 321
    assert {r.outcome for r in restore(ksm, tmp_path)} == {"restored"}
    assert ksm.tunables() == before
    assert restore(ksm, tmp_path) == []


def test_the_next_run_puts_back_what_a_killed_one_left(tmp_path: Path) -> None:
    ksm = Ksm()
    before = ksm.tunables()
    with changer(tmp_path) as process:
        process.kill()
    with Tunables(ksm, tmp_path) as t:
        assert {r.outcome for r in t.leftover} == {"restored"}
        assert ksm.tunables() == before


def test_one_of_us_at_a_time(tmp_path: Path) -> None:
    with changer(tmp_path) as process:
        with pytest.raises(Busy, match=str(process.pid)):
            Tunables(Ksm(), tmp_path).__enter__()
        with pytest.raises(Busy):
            restore(Ksm(), tmp_path)
        process.send_signal(signal.SIGINT)
        process.wait()
    with HostLock(tmp_path):
        pass


def test_somebody_else_at_the_knobs_is_noticed(tmp_path: Path) -> None:
    ksm = Ksm()
    before = ksm.tunables()
    with Tunables(ksm, tmp_path) as t:
        t.set("pages_to_scan", 222)
        t.require_unchanged()
        ksm.write("pages_to_scan", 333)
        with pytest.raises(CheckFailed, match="somebody else"):
            t.require_unchanged()
    assert [r.outcome for r in t.restored] == ["left"]
    ksm.write("pages_to_scan", before["pages_to_scan"])


def test_the_advisor_and_the_number_it_holds_come_back(tmp_path: Path) -> None:
    ksm = Ksm()
    if "advisor_mode" not in ksm.tunables():
        pytest.skip("this kernel has no advisor")
    ksm.write("advisor_mode", "scan-time")
    try:
        with pytest.raises(Unsupported, match="advisor"):
            ksm.write("pages_to_scan", 5)
        with Tunables(ksm, tmp_path) as t:
            t.set("advisor_mode", "none")
            t.set("pages_to_scan", 777)
        assert ksm.tunables()["advisor_mode"] == "scan-time"
        assert not (tmp_path / "journal").exists()
    finally:
        ksm.write("advisor_mode", "none")


def test_without_a_right_to_write(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from pathlib import Path\n"
        "from dedup.change.tunables import Tunables\n"
        "from dedup.errors import NotPermitted\n"
        "from dedup.kernel.ksm import Ksm\n"
        "try: Tunables(Ksm(), Path(sys.argv[1])).__enter__()\n"
        "except NotPermitted as e: print('refused', e.exit_status)\n"
    )
    # Loaded as root, since nobody may not read the checkout everywhere.
    preload = "import dedup.change.tunables, dedup.selftest.run\n"
    done = subprocess.run(
        [sys.executable, "-c", preload + code, str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "refused 4\n"
    assert issubclass(NotPermitted, Exception)


def test_self_test_killed_then_restored() -> None:
    """SIGKILL in the middle of the self-test: `dedup restore` brings all back."""
    ksm = Ksm()
    before = ksm.tunables()
    with self_test("equal  mixed") as process:
        process.kill()
    assert ksm.tunables() != before
    done = subprocess.run(
        [sys.executable, "-m", "dedup", "restore", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(r["outcome"] != "failed" for r in json.loads(done.stdout)["restored"])
    assert ksm.tunables() == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_self_test_interrupted(number: signal.Signals, status: int) -> None:
    ksm = Ksm()
    before = ksm.tunables()
    with self_test("equal  257") as process:
        # A second one at the same time is refused.
        second = subprocess.run(
            [sys.executable, "-m", "dedup", "apply", "--self-test"], capture_output=True, text=True
        )
        assert second.returncode == 9, second.stderr
        assert str(process.pid) in second.stderr
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert ksm.tunables() == before
    assert not Path("/run/dedup/journal").exists()
    # Its processes are gone too.
    deadline = time.monotonic() + 10
    while b"dedup.selftest.subject" in b"".join(
        p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_read_setting_gives_the_chosen_word() -> None:
    path = "/sys/kernel/mm/ksm/advisor_mode"
    if os.path.exists(path):
        assert read_setting(path) in {"none", "scan-time"}
    assert read_setting("/sys/kernel/mm/ksm/run") in {"0", "1", "2"}


def test_journal_entry_for_another_file_is_put_back_too(tmp_path: Path) -> None:
    path = "/proc/sys/vm/nr_hugepages"
    before = Path(path).read_text().strip()
    Journal(tmp_path).record(Entry(path, before, before))
    assert [r.outcome for r in restore(Ksm(), tmp_path)] == ["unchanged"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_burst_of_signals_stops_no_restore(number: signal.Signals) -> None:
    before = Ksm().tunables()
    for _ in range(3):
        with self_test("equal  2 equal") as process:
            for _ in range(12):
                process.send_signal(number)
                time.sleep(0.001)
            _, errors = process.communicate(timeout=20)
        assert process.returncode == 128 + number, errors
        assert "Traceback" not in errors
        assert Ksm().tunables() == before
        assert not Path("/run/dedup/journal").exists()


def test_a_hostile_name_of_a_process_breaks_nothing() -> None:
    code = (
        "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff\\x1b[', 0, 0, 0)\n"
        "print('ready', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert isinstance(others_at_the_knobs(), list)
        for words in (["scan", "--pid", str(process.pid), "--passes", "1"],
                      ["apply", "--self-test", "--case", "3 equal pages"]):  # fmt: skip
            done = subprocess.run([sys.executable, "-m", "dedup", *words], capture_output=True)
            assert done.returncode == 0, done.stderr
        process.communicate(b"\n")
