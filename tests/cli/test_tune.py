from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dedup import calibration
from dedup.kernel.ksm import Ksm
from dedup.kernel.lock import HostLock
from tests.kernel_fixtures import KsmControl, Target

from .conftest import Dedup


@pytest.fixture
def stored() -> Iterator[Path]:
    """The host's calibration; it is afterwards as it was."""
    path = calibration.PATH
    folder, before = path.parent.exists(), path.read_bytes() if path.exists() else None
    yield path
    if before is not None:
        path.write_bytes(before)
        return
    path.unlink(missing_ok=True)
    if not folder:
        with suppress(FileNotFoundError):
            path.parent.rmdir()


def test_help_begins_with_an_example(dedup: Dedup) -> None:
    result = dedup("tune", "--help")
    assert result.status == 0
    assert result.out.startswith("Examples:\n  sudo dedup tune --calibrate")


@pytest.mark.parametrize("args", [[], ["--dry-run"]])
def test_what_it_can_do_is_named(dedup: Dedup, args: list[str]) -> None:
    result = dedup("tune", *args)
    assert result.status == 2
    assert "tune --calibrate" in " ".join(result.err.split())
    assert dedup("tune", *args, "--json").json["error"]["code"] == "usage"


def test_without_root(dedup_nobody: Dedup) -> None:
    if not Ksm().present:
        pytest.skip("no KSM here")
    result = dedup_nobody("tune", "--calibrate")
    assert result.status == 4
    assert "as root" in result.err


@pytest.mark.ksm
@pytest.mark.root
def test_a_calibration(ksm: KsmControl, dedup: Dedup, stored: Path) -> None:
    ksm.alone()
    before = ksm.ksm.tunables()
    planned = dedup("tune", "--calibrate", "--dry-run", "--json").json
    assert planned["kind"] == "calibration_plan"
    assert planned["tunables"]["smart_scan"] == 0
    assert "put back" in dedup("tune", "--calibrate", "--dry-run").out
    stored.unlink(missing_ok=True)
    result = dedup("tune", "--calibrate", "--json")
    assert result.status == 0
    data = result.json
    assert data["kind"] == "calibration"
    assert data["stored"] == str(stored)
    found = calibration.load().calibration
    assert found is not None
    assert found.to_json() == data["calibration"]
    assert ksm.ksm.tunables() == before
    text = dedup("tune", "--calibrate").out
    for m in found.measured:
        assert m.name in text
    assert str(stored) in text
    assert calibration.load().calibration != found


@pytest.mark.ksm
@pytest.mark.root
def test_busy(ksm: KsmControl, dedup: Dedup) -> None:
    ksm.alone()
    with HostLock():
        result = dedup("tune", "--calibrate")
    assert result.status == 9
    assert str(os.getpid()) in result.err


@pytest.mark.ksm
@pytest.mark.root
def test_others_use_ksm(ksm: KsmControl, dedup: Dedup, stored: Path) -> None:
    with Target() as other:
        other.do("map", name="a", pages=2000)
        other.do("put", name="a", at=0, what=["unique"] * 2000)
        other.do("advise", name="a", what="mergeable")
        for more in ([], ["--dry-run"]):
            result = dedup("tune", "--calibrate", *more)
            assert result.status == 6
            assert "echo 1 > /sys/kernel/mm/ksm/run" in " ".join(result.err.split())
        ksm.set(pages_to_scan=500, sleep_millisecs=20)
        ksm.start()
        assert "would watch ksmd" in dedup("tune", "--calibrate", "--dry-run").out
        text = dedup("tune", "--calibrate").out
    assert "watched ksmd" in text
    assert "wide" in text
    assert stored.exists()
