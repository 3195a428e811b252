"""Where the calibration is kept."""

from __future__ import annotations

import os
import platform
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from dedup import calibration
from dedup.errors import NotPermitted, OutputFailed
from dedup.model.cost import Calibration, Costs, Machine

COSTS = Costs(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)


@pytest.fixture
def here() -> Calibration:
    return Calibration(COSTS, calibration.machine(), "2026-01-01T00:00:00+00:00", 0.05)


def test_it_comes_back_and_everybody_may_read_it(tmp_path: Path, here: Calibration) -> None:
    path = tmp_path / "dedup" / "calibration.json"
    assert calibration.load(path) == (None, "")
    before = os.umask(0o077)
    try:
        calibration.save(here, path)
    finally:
        os.umask(before)
    assert calibration.load(path) == (here, "")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    calibration.save(replace(here, spread=0.1), path)
    assert [p.name for p in path.parent.iterdir()] == ["calibration.json"]
    found = calibration.load(path).calibration
    assert found is not None
    assert found.spread == 0.1


def test_this_machine() -> None:
    machine = calibration.machine()
    assert machine.kernel == platform.release()
    assert machine.cpu
    assert 0.0001 < machine.tick_seconds <= 0.01


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kernel": "5.0"}, "another kernel (5.0, here "),
        ({"cpu": "an abacus"}, "another processor (an abacus, here "),
        ({"tick_seconds": 0.01}, "another timer tick (0.01, here "),
    ],
)
def test_another_machines_is_refused(
    tmp_path: Path, here: Calibration, change: dict[str, object], why: str
) -> None:
    path = tmp_path / "calibration.json"
    if change.get("tick_seconds") == here.machine.tick_seconds:
        change = {"tick_seconds": 0.001}
        why = why.replace("0.01", "0.001")
    other = Machine(**{**here.to_json()["machine"], **change})
    calibration.save(replace(here, machine=other), path)
    found = calibration.load(path)
    assert found.calibration is None
    assert why in found.why
    assert calibration.load(path, other).calibration is not None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 9}', '{"version": 1}'])
def test_what_can_not_be_read_is_said(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    found = calibration.load(path)
    assert found.calibration is None
    assert str(path) in found.why


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    found = calibration.load(tmp_path)
    assert found.calibration is None
    assert "can't be read" in found.why


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, here: Calibration) -> None:
    path = tmp_path / "calibration.json"
    path.mkdir()
    with pytest.raises(OutputFailed, match="writing"):
        calibration.save(here, path)
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.json"]
    with pytest.raises(OutputFailed):
        calibration.save(here, Path("/dev/null/calibration.json"))


def test_without_a_right_to_write(tmp_path: Path, here: Calibration) -> None:
    if os.geteuid() == 0:
        where = Path("/proc/sys/calibration.json")  # not even root makes files there
        expected: type[Exception] = OutputFailed
    else:
        where, expected = Path("/calibration.json"), NotPermitted
    with pytest.raises((expected, NotPermitted)):
        calibration.save(here, where)


@pytest.mark.parametrize("data", ["[" * 60_000, "x" * 70_000])
def test_a_file_that_is_none(tmp_path: Path, data: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(data)
    found = calibration.load(path)
    assert found.calibration is None
    assert found.why


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    os.mkfifo(path)
    assert "no regular file" in calibration.load(path).why
