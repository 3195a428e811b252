"""Plans kept in a file, made by hand or by an enemy."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from dedup.change import plan as planning
from dedup.change import planfile
from dedup.change.act import Chosen
from dedup.change.plan import Wish
from dedup.change.planfile import Given
from dedup.change.undo import program_of
from dedup.errors import BadInput
from dedup.kernel import processes
from dedup.scanning import Plan
from dedup.sources.live import Options
from tests.kernel_fixtures import Target

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kernel_fixtures import KsmControl

MARK: dict[str, Any] = {
    "pid": 100,
    "start_time": 200,
    "name": "redis",
    "program": ["1", "2", "3"],
    "ranges": [["0x3000", "0x5000"], ["0x1000", "0x2000"]],
}


def written(path: Path, **changes: object) -> Path:
    plan = {
        "schema_version": 1,
        "kind": "apply_plan",
        "boot_id": processes.boot_id(),
        "made_at": time.time(),
        "marks": [MARK],
        "already_mergeable": [300],
    }
    path.write_text(json.dumps({**plan, **changes}))
    return path


def test_a_plan_is_read(tmp_path: Path) -> None:
    given = planfile.read(written(tmp_path / "plan"))
    assert given.pids == [300, 100]
    assert given.ranges == {100: [(0x1000, 0x2000), (0x3000, 0x5000)]}


@pytest.mark.parametrize(
    "change",
    [
        *({"marks": [{**MARK, name: value}]} for name, value in [
            ("pid", float("inf")), ("pid", True), ("pid", 1.5), ("pid", "100"),
            ("start_time", float("inf")), ("start_time", None),
            ("ranges", [["0x1000", hex(1 << 80)]]),
            ("ranges", [["0x1000", "0x3000"], ["0x2000", "0x4000"]]),
            ("ranges", [["0x1000", "0x1800"]]),
            ("ranges", [["0x2000", "0x1000"]]),
            ("ranges", [[0, 4096]]),
            ("ranges", [["0x1000"]]),
        ]),
        {"marks": [MARK, MARK]},
        {"marks": [MARK, {**MARK, "ranges": None}]},
        {"made_at": 10**400},
        {"already_mergeable": [float("inf")]},
        {"already_mergeable": "12"},
    ],
    ids=lambda change: f"{change}"[-40:],
)  # fmt: skip
def test_nonsense_is_no_plan(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        planfile.read(written(tmp_path / "plan", **change))


@pytest.mark.ksm
@pytest.mark.root
def test_what_a_plan_would_not_mark_stays_unmarked(ksm: KsmControl, target: Target) -> None:
    target.do("map", name="same", pages=300)
    target.do("put", name="same", at=0, what=["content"] * 300)
    plan = Plan(options=Options(), interval_seconds=0.05)
    with Target() as other:
        with processes.Handle(target.pid) as handle:
            mark = Chosen(handle.id, handle.info.name, program_of(handle.info))
        given = Given({target.pid: mark}, None, (other.pid,), 0.0)
        made = planning.make(given.pids, plan, Wish(how="whole"), given=given)
    assert [c.id.pid for c in made.chosen] == [target.pid]
