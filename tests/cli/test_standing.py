from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import Dedup

UNIT = "dedup-test-standing.service"
NEEDS_SYSTEMD = pytest.mark.skipif(not shutil.which("systemctl"), reason="needs systemctl")


def test_nothing_chosen(dedup: Dedup) -> None:
    assert dedup("standing").status == 2
    assert dedup("standing", "--unit", "x", "--write", "--undo").status == 2
    assert dedup("standing", "--name", "no-such-name-here").status == 5


def test_a_process(dedup: Dedup, target: subprocess.Popen[str]) -> None:
    data = dedup("standing", "--pid", str(target.pid), "--json").json
    (found,) = data["targets"]
    assert [p["pid"] for p in found["processes"]] == [target.pid]
    assert found["outcome"] is None
    assert "dedup run" in " ".join(dedup("standing", "--pid", str(target.pid)).out.split())


def test_nothing_to_write(dedup: Dedup) -> None:
    result = dedup("standing", "--unit", "dedup-no-such.service", "--undo")
    if result.status == 6:
        assert "leave out" in " ".join(result.err.split())
    else:  # this systemd knows the setting
        assert "not there" in result.out


@NEEDS_SYSTEMD
@pytest.mark.root
def test_write_and_undo(dedup: Dedup) -> None:
    unit = Path("/run/systemd/system", UNIT)
    made = [p for p in (unit.parent, unit.parent.parent) if not p.exists()]
    path = Path(f"/etc/systemd/system/{UNIT}.d/50-dedup-ksm.conf")
    if made:
        # systemd does not run here, and a folder of this name would say that it does.
        unit = Path("/etc/systemd/system", UNIT)
    long = "/bin/sleep " + "9" * 150
    unit.write_text(f"[Service]\nExecStart={long}\n")
    try:
        shown = dedup("standing", "--unit", UNIT, "--write", "--dry-run")
        assert (shown.status, path.exists()) == (0, False)
        if "MemoryKSM=yes" not in shown.out:
            # What people copy is not broken into lines.
            assert f" run -- {long}\n" in shown.out
        data = dedup("standing", "--unit", UNIT, "--write", "--json").json
        assert data["targets"][0]["outcome"] == "written"
        assert path.read_text() == data["targets"][0]["drop_in"]["text"]
        assert data["targets"][0]["commands"] == [
            "systemctl daemon-reload", f"systemctl restart {UNIT}"
        ]  # fmt: skip
        assert "there already" in dedup("standing", "--unit", UNIT, "--write").out
        path.write_text("[Service]\n")
        result = dedup("standing", "--unit", UNIT, "--write")
        assert (result.status, path.read_text()) == (3, "[Service]\n")
        assert dedup("standing", "--unit", UNIT, "--write", "--force").status == 0
        assert "removed" in dedup("standing", "--unit", UNIT, "--undo").out
        assert not path.parent.exists()
    finally:
        unit.unlink()
        shutil.rmtree(path.parent, ignore_errors=True)


@pytest.mark.skipif(not shutil.which("redis-server"), reason="needs redis-server")
def test_showing_needs_no_root(dedup_nobody: Dedup, target: subprocess.Popen[str]) -> None:
    assert dedup_nobody("standing", "--unit", "redis-server").status == 0
    assert dedup_nobody("standing", "--pid", str(target.pid)).status == 0
    if os.geteuid() == 0:
        assert dedup_nobody("standing", "--unit", "redis-server", "--write").status == 4
