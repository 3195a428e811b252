from __future__ import annotations

import os
import pwd
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import EQUAL_PAGES, NOBODY, REPOSITORY, Dedup, Start, end, environment, on_terminal

PAGE = os.sysconf("SC_PAGESIZE")
QUICK = ("--interval", "0.05")


def biggest(scan: dict[str, Any]) -> dict[str, Any]:
    """The region with most copies."""
    found: dict[str, Any] = max(scan["regions"], key=lambda r: r["duplicate_pages"])
    return found


def test_one_process(dedup: Dedup, target: subprocess.Popen[str]) -> None:
    result = dedup("scan", "--pid", str(target.pid), *QUICK, "--json")
    assert result.status == 0
    assert result.err == ""
    scan = result.json
    assert scan["scan"]["complete"] is True
    assert scan["scan"]["passes"] == 2
    assert 0.05 <= scan["scan"]["interval_seconds"] < 1
    assert [p["pid"] for p in scan["processes"]] == [target.pid]
    region = biggest(scan)
    assert region["pages"] == region["duplicate_pages"] == EQUAL_PAGES
    assert region["pages_volatile"] == 0
    assert region["eligible"]
    assert not region["advised"]
    assert scan["scan"]["pages"] == sum(r["pages"] for r in scan["regions"])
    assert scan["scan"]["bytes"] == scan["scan"]["pages"] * PAGE


def test_text_on_a_pipe(dedup: Dedup, target: subprocess.Popen[str]) -> None:
    result = dedup("scan", "--pid", str(target.pid), *QUICK)
    assert result.status == 0
    assert result.err == ""
    lines = result.out.splitlines()
    assert lines[0].startswith("KSM would free ")
    assert max(map(len, lines)) <= 80
    assert result.out.isprintable() is False
    for word in ("zero pages", "within a process", "across processes", "KSM's own records"):
        assert word in result.out
    for word in ("pages_shared", "pages_sharing", "general_profit", str(target.pid)):
        assert word in result.out


@pytest.mark.parametrize("columns", [40, 57, 80])
def test_narrow_terminal(target: subprocess.Popen[str], columns: int) -> None:
    args = ["scan", "--pid", str(target.pid), *QUICK, "--by", "name", "-v", "--color", "never"]
    shown = on_terminal(args, columns)
    assert shown.status == 0
    shown_lines = shown.lines
    assert max(map(len, shown_lines)) <= columns
    assert "Next:" in shown.screen


def test_one_look(dedup: Dedup, target: subprocess.Popen[str]) -> None:
    scan = dedup("scan", "--pid", str(target.pid), "--passes", "1", "--json").json
    assert scan["prediction"]["pages_volatile"] is None
    assert scan["scan"]["interval_seconds"] is None
    assert all(r["pages_volatile"] is None for r in scan["regions"])
    assert "One look" in dedup("scan", "--pid", str(target.pid), "--passes", "1").out


def test_interval_auto_goes_by_the_full_scan(dedup: Dedup, target: subprocess.Popen[str]) -> None:
    args = ("scan", "--pid", str(target.pid), "--full-scan", "0.25", "--json")
    scan = dedup(*args).json["scan"]
    assert scan["full_scan_seconds"] == 0.25
    assert 0.25 < scan["interval_seconds"] <= 0.5


def test_the_same_seed_gives_the_same_figures(dedup: Dedup, target: subprocess.Popen[str]) -> None:
    args = ("scan", "--pid", str(target.pid), "--passes", "1", "--json", "--threads", "1", "--seed")
    one, two, other = (dedup(*args, seed).json for seed in ("7", "7", "8"))
    assert one["scan"]["seed"] == two["scan"]["seed"] == 7
    assert one["scan"]["reader"]["threads"] == 1
    assert one["regions"] == two["regions"] == other["regions"]


def test_scope_advised(dedup: Dedup, target: subprocess.Popen[str]) -> None:
    scan = dedup("scan", "--pid", str(target.pid), *QUICK, "--scope", "advised", "--json").json
    assert scan["scan"]["scope"] == "advised"
    assert scan["scan"]["pages"] == 0
    assert not any(r["scanned"] for r in scan["regions"])
    result = dedup("scan", "--pid", str(target.pid), *QUICK, "--scope", "advised")
    assert result.status == 0
    assert "Nothing to merge" in result.out
    assert "not marked mergeable" in " ".join(result.out.split())


def test_ways_of_choosing(dedup: Dedup, start: Start) -> None:
    name = "dedup-chosen"
    both = [start(name=name), start(name=name)]
    pids = {p.pid for p in both}
    user = pwd.getpwuid(os.geteuid()).pw_name
    cgroup = Path(f"/proc/{both[0].pid}/cgroup").read_text().rpartition("0::")[2].strip()
    for args in (
        ["--name", "dedup-ch*"],
        ["--pid", str(both[0].pid), "--pid", str(both[1].pid)],
        ["--tree", str(both[0].pid), "--tree", str(both[1].pid)],
    ):
        scan = dedup("scan", *args, "--passes", "1", "--json").json
        assert {p["pid"] for p in scan["processes"]} == pids
        assert {p["name"] for p in scan["processes"]} == {name}
    for args in (["--user", user], ["--cgroup", cgroup or "/"], ["--tree", str(os.getpid())]):
        scan = dedup("scan", *args, "--passes", "1", "--json").json
        assert pids <= {p["pid"] for p in scan["processes"]}


def test_by_name(dedup: Dedup, start: Start) -> None:
    for name in ("service-a", "service-b"):
        start(name=name)
    args = ("scan", "--name", "service-[ab]", *QUICK, "--by", "name")
    scan = dedup(*args, "--json").json
    assert scan["by"] == "name"
    assert {g["name"] for g in scan["groups"]} == {"service-a", "service-b"}
    for group in scan["groups"]:
        assert group["processes"] == 1
        assert group["frames_freed_alone"] >= EQUAL_PAGES - 1
    text = dedup(*args).out
    assert "By name: what each would save alone" in text
    assert "service-a" in text


def test_unknown_container_fits_nothing(dedup: Dedup) -> None:
    result = dedup("scan", "--container", "no-such-container")
    assert result.status == 5
    assert "no process fits" in result.err


def test_all_by_user(dedup: Dedup, target: subprocess.Popen[str]) -> None:
    result = dedup("scan", "--all", "--by", "user", "--passes", "1", "--json")
    assert result.status in {0, 3}
    scan = result.json
    assert target.pid in {p["pid"] for p in scan["processes"]}
    assert pwd.getpwuid(os.geteuid()).pw_name in {g["name"] for g in scan["groups"]}
    assert scan["scan"]["complete"] is (result.status == 0)


# -- bad input ---------------------------------------------------------------------------------


def test_pid_that_does_not_exist(dedup: Dedup, dead_pid: int) -> None:
    result = dedup("scan", "--pid", str(dead_pid))
    assert (result.status, result.out) == (5, "")
    assert f"there is no process {dead_pid}" in result.err
    assert "`ps -e`" in result.err
    error = dedup("scan", "--pid", str(dead_pid), "--json")
    assert (error.status, error.err) == (5, "")
    assert error.json["error"]["code"] == "no-such-process"
    assert dedup("scan", "--tree", str(dead_pid)).status == 5
    assert dedup("scan", "--pid", "9" * 30).status == 5


def test_zombie(dedup: Dedup) -> None:
    zombie = subprocess.Popen(["true"])
    stat = Path(f"/proc/{zombie.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    result = dedup("scan", "--pid", str(zombie.pid))
    assert result.status == 5
    assert "zombie" in result.err
    assert dedup("scan", "--pid", str(zombie.pid), "--json").json["error"]["code"] == "no-memory"
    zombie.wait()


def test_kernel_thread(dedup: Dedup) -> None:
    if Path("/proc/2/comm").read_text() != "kthreadd\n":
        pytest.skip("no kernel threads in sight (a container)")
    result = dedup("scan", "--pid", "2")
    assert result.status == 5
    assert "kernel thread" in result.err


def test_another_users_process(dedup_nobody: Dedup, target: subprocess.Popen[str]) -> None:
    pid = target.pid if os.geteuid() == 0 else 1
    result = dedup_nobody("scan", "--pid", str(pid))
    assert result.status == 4
    assert "may not read" in result.err
    assert "sudo" in result.err
    error = dedup_nobody("scan", "--pid", str(pid), "--json")
    assert error.status == 4
    assert error.json["error"]["code"] == "not-permitted"


@pytest.mark.root
def test_own_process_without_privilege(dedup_nobody: Dedup, start: Start) -> None:
    process = start(NOBODY, "/usr/bin/python3")
    result = dedup_nobody("scan", "--pid", str(process.pid), *QUICK)
    assert result.status == 0
    assert "Frame numbers are hidden" in result.out
    scan = dedup_nobody("scan", "--pid", str(process.pid), *QUICK, "--json").json
    assert scan["scan"]["frames"] is None
    assert scan["scan"]["reader"]["sharing_lost_pages"] is None
    assert biggest(scan)["duplicate_pages"] == EQUAL_PAGES


@pytest.mark.root
def test_all_without_privilege_is_partial(dedup_nobody: Dedup, start: Start) -> None:
    process = start(NOBODY, "/usr/bin/python3")
    result = dedup_nobody("scan", "--all", "--passes", "1", "--json")
    assert result.status == 3
    scan = result.json
    assert process.pid in {p["pid"] for p in scan["processes"]}
    assert "not-permitted" in {s["code"] for s in scan["scan"]["skipped"]}
    text = dedup_nobody("scan", "--all", "--passes", "1")
    assert text.status == 3
    assert text.err.startswith("dedup: done in part: ")
    assert "Left out" in text.out


def test_one_of_several_is_gone(dedup: Dedup, target: subprocess.Popen[str], dead_pid: int) -> None:
    args = ("scan", "--pid", str(target.pid), "--pid", str(dead_pid), *QUICK)
    result = dedup(*args)
    assert result.status == 3
    assert f"there is no process {dead_pid}" in result.out
    assert result.err.startswith("dedup: done in part: ")
    with_json = dedup(*args, "--json")
    assert with_json.status == 3
    assert with_json.err == ""
    scan = with_json.json["scan"]
    assert scan["complete"] is False
    assert [(s["pid"], s["code"]) for s in scan["skipped"]] == [(dead_pid, "no-such-process")]


def test_all_of_several_are_gone(dedup: Dedup, dead_pid: int) -> None:
    result = dedup("scan", "--pid", str(dead_pid), "--pid", "2", "--json")
    assert result.status == 5
    assert result.json["kind"] == "error"


def scan_while_one_ends(ending: subprocess.Popen[str], *args: str) -> tuple[int, str, str]:
    """Scan with a second look after two seconds; meanwhile a process ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dedup", "scan", "--interval", "2.5", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
    )
    time.sleep(1.5)
    end(ending)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, out, err


def test_a_process_ends_during_the_scan(start: Start) -> None:
    staying, ending = start(), start()
    status, out, err = scan_while_one_ends(
        ending, "--pid", str(staying.pid), "--pid", str(ending.pid)
    )
    assert status == 3
    assert f"process {ending.pid}" in out
    assert err.startswith("dedup: done in part: ")
    assert out.startswith("KSM would free ")


def test_the_only_process_ends_during_the_scan(start: Start) -> None:
    ending = start()
    status, out, err = scan_while_one_ends(ending, "--pid", str(ending.pid))
    assert status == 5
    assert out == ""
    assert f"process {ending.pid}" in err


@pytest.mark.root
def test_without_ksm_in_the_kernel(dedup: Dedup, target: subprocess.Popen[str]) -> None:
    """KSM's folder in sysfs is hidden behind an empty one, for the command alone."""
    hidden = 'mount -t tmpfs none /sys/kernel/mm/ksm && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", hidden, "sh")
    result = dedup("scan", "--pid", str(target.pid), *QUICK, "--json", prefix=prefix)
    assert result.status == 0
    assert result.json["host"]["ksm"] is None
    text = dedup("scan", "--pid", str(target.pid), *QUICK, prefix=prefix)
    assert text.status == 0
    assert "This kernel has no KSM" in text.out


@pytest.mark.root
@pytest.mark.parametrize("words", [("scan", "--passes", "1"), ("apply", "--dry-run")])
def test_the_proc_of_another_pid_namespace(
    dedup: Dedup, target: subprocess.Popen[str], words: tuple[str, ...]
) -> None:
    """Its numbers mean other processes to the system calls that read memory or stop a process."""
    prefix = ("unshare", "--pid", "--fork")
    result = dedup(*words, "--pid", str(target.pid), prefix=prefix)
    assert result.status == 6
    assert "another pid namespace" in result.err
    assert "nsenter" in result.err
    own = ("unshare", "--pid", "--fork", "--mount-proc")
    assert dedup("scan", "--pid", "1", *QUICK, prefix=own).status == 0


def test_hostile_names(dedup: Dedup, start: Start) -> None:
    target = start(name=os.fsdecode(b"\x1b[31m\xff\xe2\x80\xae"))
    text = dedup("scan", "--pid", str(target.pid), *QUICK).out
    assert "\\x1b[31m\\xff\\u202e" in text
    assert "\x1b" not in text
    scan = dedup("scan", "--pid", str(target.pid), *QUICK, "--json").json
    assert scan["processes"][0]["name"] == "\x1b[31m\\xff\u202e"


def test_top_contents(dedup: Dedup, start: Start) -> None:
    processes = [start(name="top-target"), start(name="top-target")]
    args = ("scan", "--name", "top-target", *QUICK)
    scan = dedup(*args, "--json", "--top", "3").json
    assert len(scan["top_contents"]) == 3
    best = max(scan["top_contents"], key=lambda c: c["mappings"])
    assert best["mappings"] == 2 * EQUAL_PAGES
    assert {p["pid"] for p in best["processes"]} == {p.pid for p in processes}
    assert best["looks_like"] == "binary"  # nine letters alone are no text
    text = dedup(*args, "--top", "1").out
    assert "Top contents: what frees the most" in text
    assert "binary" in text
    assert "2x top-target" in text
    assert "Top contents" not in dedup(*args, "--top", "0").out
    assert dedup("scan", "--pid", "1", "--top", "-1").status == 2


def test_why_not_more(dedup: Dedup, target: subprocess.Popen[str]) -> None:
    scan = dedup("scan", "--pid", str(target.pid), *QUICK, "--json").json
    parts = {p["code"]: p["pages"] for p in scan["why_not_more"]}
    # What was scanned is all there, each page once; memory itself is in bytes by KSM's terms.
    elsewhere = {"swapped", "out_of_scope", "not_eligible", "file", "zero_page", "gone", "left_out"}
    assert sum(n for code, n in parts.items() if code not in elsewhere) == scan["scan"]["pages"]
    assert scan["processes"][0]["pages_by_fate"].keys() >= parts.keys() - {"not_eligible"}
    assert "Why not more?" in dedup("scan", "--pid", str(target.pid), *QUICK).out


def test_other_tunables_can_be_assumed(dedup: Dedup, target: subprocess.Popen[str]) -> None:
    args = ("scan", "--pid", str(target.pid), *QUICK, "--json")
    present = dedup(*args).json
    other = dedup(*args, "--tunable", "use_zero_pages=1", "--tunable", "pages_to_scan=7").json
    assert present["scan"]["assumed_tunables"] == {}
    assert other["scan"]["assumed_tunables"] == {"use_zero_pages": 1, "pages_to_scan": 7}
    assert other["prediction"]["ksm_zero_pages"] > 0
    assert other["cost"]["converge_seconds"] > present["cost"]["converge_seconds"]
    assert [p["tunables"]["pages_to_scan"] for p in other["cost"]["proposals"]] == [
        1000, 5000, 20_000,
    ]  # fmt: skip
    assert other["cost"]["calibrated"] == (other["cost"]["cpu_seconds"] is not None)


@pytest.mark.parametrize(
    "assumed", ["pages_to_scan", "run=1", "use_zero_pages=2", "max_page_sharing=1", "x=y"]
)
def test_a_tunable_that_means_nothing(dedup: Dedup, assumed: str) -> None:
    result = dedup("scan", "--pid", "1", "--tunable", assumed)
    assert result.status == 2
    assert "Traceback" not in result.err
