"""`dedup apply` as it is typed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dedup.change.applied import Applied
from dedup.kernel.ksm import process_counters
from dedup.kernel.processes import Handle
from tests.cli.conftest import NOBODY, REPOSITORY, environment, on_terminal, wait_for

if TYPE_CHECKING:
    from tests.cli.conftest import Dedup, Start
    from tests.kernel_fixtures import KsmControl

QUICK = ("--interval", "0.05")


def merges_any(pid: int) -> bool:
    with Handle(pid) as handle:
        counters = process_counters(handle)
    assert counters is not None
    return bool(counters.ksm_merge_any)


def pid_words(*processes: subprocess.Popen[str]) -> list[str]:
    return [w for p in processes for w in ("--pid", str(p.pid))]


@pytest.mark.ksm
@pytest.mark.root
def test_plan_apply_undo(ksm: KsmControl, dedup: Dedup, start: Start, tmp_path: Path) -> None:
    words = pid_words(start(), start())
    plan = dedup("apply", *words, *QUICK, "--dry-run", "--json")
    assert plan.status == 0
    assert plan.json["kind"] == "apply_plan"
    assert plan.json["prediction"]["pages_sharing"] >= 599
    assert len(plan.json["marks"]) == 2
    assert not any(merges_any(m["pid"]) for m in plan.json["marks"])
    file = tmp_path / "plan.json"
    file.write_text(plan.out)

    refused = dedup("apply", *words)
    assert (refused.status, "--start-ksmd" in refused.err) == (6, True)

    done = dedup("apply", "--plan", str(file), *QUICK, "--start-ksmd", "--json")
    assert done.status == 0, done.out + done.err
    data = done.json
    assert data["holds"]
    assert data["marks"] == plan.json["marks"]
    assert data["actual"]["pages_sharing"] >= 599
    assert all(m["self_healing"] for m in data["marked"])

    shown = dedup("apply", "--undo", "--dry-run")
    assert "would be not mergeable" in shown.out
    undone = dedup("apply", "--undo", "--json")
    assert undone.status == 0
    assert [p["outcome"] for p in undone.json["processes"]] == ["undone"] * 2
    assert "nothing to undo" in dedup("apply", "--undo").out


@pytest.mark.ksm
@pytest.mark.root
def test_words_for_people(ksm: KsmControl, dedup: Dedup, start: Start) -> None:
    words = pid_words(start(), start())
    shown = dedup("apply", *words, *QUICK, "--how", "whole", "--dry-run")
    assert "2 processes, whole" in " ".join(shown.out.split())
    assert "nothing was changed" in shown.out
    done = dedup("apply", *words, *QUICK, "--how", "whole", "--start-ksmd")
    assert "made mergeable" in done.out
    assert "stopped for" in done.out
    assert "the prediction holds" in done.out
    assert "merging, predicted" in done.out
    assert all(re.search(rf"{pid} +[\d,]+ +[\d,]+ +0 +python", done.out) for pid in words[1::2])
    again = dedup("apply", *words, *QUICK, "--start-ksmd")
    assert "mergeable already: 2 processes" in again.out
    one = words[1]
    assert f"{one} (" in dedup("apply", "--undo", "--pid", one).out
    assert not merges_any(int(one))
    assert merges_any(int(words[3]))
    assert dedup("apply", "--undo").status == 0


@pytest.mark.ksm
@pytest.mark.root
def test_a_plan_whose_processes_are_gone(
    ksm: KsmControl, dedup: Dedup, start: Start, tmp_path: Path
) -> None:
    process = start()
    plan = dedup("apply", *pid_words(process), *QUICK, "--dry-run", "--json")
    data = plan.json
    other = start()
    data["marks"][0]["pid"] = other.pid
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data))
    refused = dedup("apply", "--plan", str(file), "--start-ksmd")
    assert refused.status == 5
    assert "was not chosen" in " ".join(refused.err.split())
    assert not merges_any(other.pid)
    data["boot_id"] = "another"
    file.write_text(json.dumps(data))
    refused = dedup("apply", "--plan", str(file), "--start-ksmd")
    assert (refused.status, "before this boot" in refused.err) == (8, True)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"kind": "scan", "schema_version": 1}', "\x00\xff", "[" * 100_000,
     '{"kind": "apply_plan", "schema_version": 1, "marks": [{"pid": "x"}]}',
     ('{"kind": "apply_plan", "schema_version": 1, "boot_id": "", "made_at": 0, '
     '"already_mergeable": [], "marks": [{"pid": 1, "start_time": 1, "name": "", "program": [], '
     '"ranges": [["0x1", "0x3"]]}]}')],
)  # fmt: skip
def test_a_file_that_is_no_plan(dedup: Dedup, tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(text.encode("latin-1"))
    refused = dedup("apply", "--plan", str(file), "--start-ksmd")
    assert refused.status == 7
    assert "is no plan" in refused.err


@pytest.mark.ksm
@pytest.mark.root
def test_two_users(ksm: KsmControl, dedup: Dedup, start: Start) -> None:
    words = pid_words(start(), start(prefix=NOBODY, python="/usr/bin/python3"))
    refused = dedup("apply", *words, *QUICK, "--start-ksmd", "--json")
    assert refused.status == 8
    assert refused.json["error"]["code"] == "refused"
    assert "2 trust domains" in refused.json["error"]["message"]
    assert "--accept-side-channels" in refused.json["error"]["hint"]
    done = dedup("apply", *words, *QUICK, "--start-ksmd", "--accept-side-channels", "--json")
    assert done.status == 0, done.out
    assert len(done.json["domains"]) == 2
    assert dedup("apply", "--undo").status == 0


@pytest.mark.ksm
@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_takes_everything_back(
    ksm: KsmControl, start: Start, number: signal.Signals
) -> None:
    """While it waits: ksmd is so slow that it waits for long."""
    processes = [start(), start()]
    before = ksm.ksm.tunables()
    ksm.set(pages_to_scan=100, sleep_millisecs=100)
    command = subprocess.Popen(
        [sys.executable, "-m", "dedup", "apply", *pid_words(*processes), *QUICK, "--start-ksmd"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env=environment(),
    )  # fmt: skip
    wait_for(lambda: ksm.ksm.running)
    assert Applied().applications()
    command.send_signal(number)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 128 + number
    assert "taken back" in " ".join(err.split())
    assert "Traceback" not in err
    for process in processes:
        with Handle(process.pid) as handle:
            counters = process_counters(handle)
        assert counters is not None
        assert not counters.ksm_mergeable
        assert not counters.ksm_merge_any
    assert not Applied().path.exists()
    ksm.set(pages_to_scan=before["pages_to_scan"], sleep_millisecs=before["sleep_millisecs"])
    assert ksm.ksm.tunables() == before


@pytest.mark.ksm
@pytest.mark.root
def test_following(ksm: KsmControl, dedup: Dedup, start: Start) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "dedup", "apply", "--name", "dedup-later", "--follow",
         "--start-ksmd"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env=environment(),
    )  # fmt: skip
    assert process.stdout is not None
    assert "following" in process.stdout.readline()
    later = start(name="dedup-later")
    assert f"{later.pid} dedup-later: is mergeable now" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "1 that appeared later" in out
    assert "Traceback" not in err
    assert merges_any(later.pid)
    assert dedup("apply", "--undo").status == 0
    assert not merges_any(later.pid)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing chosen"),
        (("--follow", "--pid", "1", "--how", "ranges"), "whole processes"),
        (("--follow", "--pid", "1"), "later processes can fit"),
        (("--follow", "--name", "x", "--json"), "no result"),
        (("--undo", "--self-test"), "does not go with"),
        (("--plan", "/dev/null", "--pid", "1"), "choose none with it"),
        (("--plan", "/no/such/file"), "does not exist"),
        (("--pid", "0"), "range"),
        (("--how", "much"), "not one of"),
    ],
)
def test_wrong_words(dedup: Dedup, words: tuple[str, ...], said: str) -> None:
    done = dedup("apply", *words)
    assert done.status == 2
    assert said in " ".join((done.err + done.out).split())


def test_no_such_process(dedup: Dedup, dead_pid: int) -> None:
    assert dedup("apply", "--pid", str(dead_pid), "--dry-run").status == 5


@pytest.mark.root
def test_without_root(dedup_nobody: Dedup) -> None:
    done = dedup_nobody("apply", "--pid", str(os.getpid()), "--dry-run")
    assert done.status == 4
    assert "sudo" in done.err


@pytest.mark.ksm
@pytest.mark.root
def test_on_a_narrow_terminal(ksm: KsmControl, start: Start) -> None:
    words = pid_words(start(), start())
    shown = on_terminal(["apply", *words, *QUICK, "--dry-run"], columns=40)
    assert shown.status == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.screen.replace("\r", ""))
    assert max(map(len, text.splitlines())) <= 40
