"""KSM as it is, shown: what it says, and whether it fits."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from dedup import schema
from dedup.kernel.ksm import Uses
from dedup.observe.status import Status, groups
from dedup.report import status as report
from tests.observe.test_status import COUNTERS, SAMPLE, USES, make, use

VALIDATOR = jsonschema.Draft202012Validator(schema.load())
NOTHING = replace(COUNTERS, pages_shared=0, pages_sharing=0, pages_unshared=0, pages_volatile=0,
                  ksm_zero_pages=0, stable_node_chains=0, general_profit=0)  # fmt: skip
STOPPED: dict[str, int | str] = {"run": 0, "pages_to_scan": 100, "sleep_millisecs": 20}
STATES = {
    "plain": make(),
    "stopped": make(tunables=STOPPED),
    "unmerged": make(tunables={**STOPPED, "run": 2}, counters=NOTHING),
    "nothing": make(counters=NOTHING, uses=Uses((), 0, True)),
    "hidden": make(uses=Uses((), 412, True)),
    "old kernel": make(uses=Uses((), 0, False), ksmd_cpu_seconds=None, sample=None),
    "losing": make(
        counters=replace(COUNTERS, pages_sharing=1, ksm_zero_pages=0, pages_unshared=9000),
        uses=Uses(tuple(use(n, f"x{n}\x1b[2J", 0, 0, 100) for n in range(10, 18)), 0, True),
    ),
    "others": make(others=("ksmtuned (pid 7) changes KSM's tunables as it sees fit",)),
    "swap": make(sample=replace(SAMPLE, ksm_swpin_copy=8)),
}


def text(status: Status, by: Any = "process", width: int = 80, top: int = 10) -> str:
    out = StringIO()
    console = Console(file=out, width=width, highlight=False, markup=False, emoji=False)
    ranked = groups(status.uses.found, by)
    view = report.View(status, by=by, groups=ranked, top=top, width=width, plain=True)
    for part in (*view.result(), *view.advice()):
        console.print(part)
    return out.getvalue()


def words(status: Status, **more: Any) -> str:
    return " ".join(text(status, **more).split())


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("by", ["process", "user", "cgroup", "unit", "name"])
def test_the_json_fits_the_schema(name: str, by: Any) -> None:
    status = STATES[name]
    ranked = groups(status.uses.found, by)
    VALIDATOR.validate(report.status_object(status, by, ranked, 2))


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("width", [40, 80, 100])
def test_it_fits_and_is_safe(name: str, width: int) -> None:
    for by in ("process", "cgroup"):
        shown = text(STATES[name], by=by, width=width)
        assert max(map(len, shown.splitlines())) <= width
        assert "\x1b" not in shown
        assert shown.isascii()


def test_figures() -> None:
    data = report.status_object(make(), "user", groups(USES, "user"), 1)
    assert data["saved"]["saved_bytes"] == make().saved_bytes
    assert data["ratios"] == {
        "sharing_per_shared": 9.0, "unshared_share": 0.3, "skipped_share": 0.25
    }  # fmt: skip
    assert data["ksmd"]["full_scan_seconds"] == 4.0
    assert data["sample"]["ksmd_cores"] == 0.25
    assert data["sample"]["cow_ksm"] == 6
    assert [g["name"] for g in data["groups"]] == ["nobody"]
    assert data["processes"]["groups"] == 2
    assert [p["pid"] for p in data["processes"]["losing"]] == [7]


def test_what_it_says() -> None:
    said = words(make())
    assert "KSM saves 366.8 KiB at most" in said
    assert "a kept frame stands for 9.0 others" in said
    assert "30% of the 200 pages followed have no copy" in said
    assert "25% of a core now; 12 s since boot, 1.0% of a core" in said
    assert "50 pages/s, 40% of them skipped by smart scan" in said
    assert "3 merged pages/s" in said
    assert "a fork copies ksm_zero_pages" in said
    assert "costs more than it saves in idle (pid 7, -640 B)" in said


def test_what_it_says_in_other_states() -> None:
    assert "ksmd is stopped: its counters stand" in words(STATES["stopped"])
    assert "ksmd is stopped" not in words(STATES["plain"])
    assert "no memory here is mergeable" in words(STATES["nothing"])
    assert "echo 1 > /sys/kernel/mm/ksm/run" in words(STATES["stopped"])
    hidden = words(STATES["hidden"])
    assert "412 processes are hidden from you" in hidden
    assert "none in sight is mergeable" in hidden
    old = words(STATES["old kernel"])
    assert "no /proc/PID/ksm_stat" in old
    assert "ksmd is out of sight" in old
    losing = words(STATES["losing"])
    assert "KSM costs 562.4 KiB more than it saves" in losing
    assert "and 3 more" in losing
    assert "Ksmtuned (pid 7) changes" in words(STATES["others"])
    assert "unmerged everything" in words(STATES["unmerged"])
    assert "4 merged pages/s came back" in words(STATES["swap"])


def test_the_most_profit_first_and_the_rest_in_a_line() -> None:
    said = text(make(), top=1)
    assert said.index(" 6 ") < said.index("and 2 more")
    assert "--top 3" in said
    assert "Processes, by profit" in text(make(), top=0)
