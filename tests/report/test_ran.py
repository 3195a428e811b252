from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import pytest

from dedup import schema
from dedup.change.saved import Figures, Saved
from dedup.report import ran
from dedup.report.ran import Run

MIB = 1 << 20
ALONE = Figures(2000, 0, 3200, 7987136, 7 * MIB, 7 * MIB)
BESIDE = Figures(2000, 10, 3200, 7987136, 5 * MIB, 7 * MIB)
SAVED = Saved(
    seconds=6.1, readings=40, peak=ALONE, mean=ALONE.over(2), last=ALONE,
    last_seconds_before_end=0.1, processes_seen=5, processes_most=2, hidden=0, alone=True,
    ksmd_cpu_seconds=0.25,
)  # fmt: skip
RUN = Run(["x\x1b[31m", "a b"], 7, 0, None, True, False, SAVED, 0)


def text(run: Run) -> str:
    return "\n".join(ran.run_lines(run))


def test_alone() -> None:
    shown = text(RUN)
    assert "\x1b" not in shown
    assert "6.1 s, 5 processes (2 at a time)" in shown
    assert "saved 7.0 MiB at most, 3.5 MiB on average, 7.0 MiB at last" in shown
    assert "2,000 pages on merged frames, 0 on the zero page" in shown
    assert shown.endswith("ksmd used 0.25 s of CPU")


def test_beside_others() -> None:
    shown = text(replace(RUN, saved=replace(SAVED, peak=BESIDE, alone=False)))
    assert "saved 5.0 MiB to 7.0 MiB at most" in shown
    assert "for everybody who uses KSM" in shown


def test_what_else_happened() -> None:
    shown = text(replace(RUN, status=None, signal=15, left_running=1,
                         saved=replace(SAVED, hidden=3, ksmd_cpu_seconds=None)))  # fmt: skip
    assert "ended by SIGTERM; 1 process goes on" in shown
    assert "counters of 3 processes are hidden" in shown
    assert "ksmd used" not in shown
    nothing = replace(SAVED, peak=Figures(), processes_seen=0, processes_most=0)
    assert "ksmd came by none of its pages" in text(replace(RUN, saved=nothing))
    assert "ended by signal 77" in text(replace(RUN, signal=77))


@pytest.mark.parametrize("figures", [ALONE, BESIDE])
def test_the_schema(figures: Figures) -> None:
    data = ran.run_object(replace(RUN, saved=replace(SAVED, last=figures)))
    jsonschema.Draft202012Validator(schema.load()).validate(json.loads(json.dumps(data)))
    assert data["command"] == ["x\x1b[31m", "a b"]
    low, high = round(figures.saved_low_bytes), round(figures.saved_high_bytes)
    assert data["last"]["saved_bytes"] == (low if low == high else None)
    assert data["last"]["bounds"] == ({} if low == high else {"saved_bytes": [low, high]})
    assert data["last"]["records_bytes"] == 3200 * 64
