from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from dedup import schema
from dedup.errors import NoSuchProcess
from dedup.pages import Skipped
from dedup.report import jsonout

from .scans import PAGE, ZERO, make, region

if TYPE_CHECKING:
    from dedup.scanning import Scan

VALIDATOR = jsonschema.Draft202012Validator(schema.load())


def checked(data: dict[str, Any]) -> dict[str, Any]:
    """Through text and back, and against the schema."""
    back: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    VALIDATOR.validate(back)
    assert back == data
    return back


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(schema.load())


SCANS = {
    "plain": lambda: make([[1, 1, 2, ZERO], [1, 3, ZERO]]),
    "nothing": lambda: make([[], []]),
    "hidden": lambda: make([[1, 1, 2], [1, 3]], frames_known=False, shared=True),
    "one look": lambda: make([[1, 1]], looks=1),
    "no ksm": lambda: make([[1, 1]], tunables={}),
    "leftover": lambda: make([[1] * 100, [1] * 100, [1] * 57]),
    "partial": lambda: make([[1, 1]], skipped=(Skipped(7, "gone \udcff", "process-gone"),)),
}


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("by", [None, "name", "user", "cgroup", "unit"])
def test_scans_fit_the_schema(name: str, by: Any) -> None:
    data = checked(jsonout.scan_object(SCANS[name](), by))
    assert ("groups" in data) is (by is not None)


def test_figures() -> None:
    data = jsonout.scan_object(make([[1, 1, 2, ZERO], [1, 3, ZERO]]))
    assert data["prediction"]["pages_shared"] == 2
    assert data["prediction"]["pages_sharing"] == 3
    assert data["prediction"]["frames_freed"] == 3
    assert data["prediction"]["breakdown"] == {
        "zero_pages": 1,
        "within_process_pages": 1,
        "across_process_pages": 1,
    }
    assert data["scan"]["pages"] == data["scan"]["frames"] == 7
    assert data["scan"]["bytes"] == 7 * PAGE
    assert [p["pages"] for p in data["processes"]] == [4, 3]
    assert [r["duplicate_pages"] for r in data["regions"]] == [3, 2]
    assert data["cost"]["metadata_bytes"] == 7 * 64 + 2 * 64


def test_ranges_are_null_with_bounds() -> None:
    data = jsonout.scan_object(make([[1] * 100, [1] * 100, [1] * 57]))
    for process in data["processes"]:
        assert process["ksm_merging_pages"] is None
        low, high = process["bounds"]["ksm_merging_pages"]
        assert (low, high) == (process["pages"] - 1, process["pages"])
    hidden = jsonout.scan_object(make([[1, 1], [1]], frames_known=False, shared=True))
    assert hidden["scan"]["frames"] is None
    assert hidden["prediction"]["frames_freed"] is None
    assert hidden["prediction"]["bounds"]["frames_freed"] == [0, 2]


def test_names_are_valid_unicode() -> None:
    name = os.fsdecode(b"\xff\\x")
    scan: Scan = make([[1, 1]], name=name, region_name=name, user=name)
    data = checked(jsonout.scan_object(scan, "name"))
    for found in (
        data["processes"][0]["name"],
        data["processes"][0]["user"],
        data["regions"][0]["name"],
        data["groups"][0]["name"],
    ):
        assert found == "\\xff\\\\x"


def test_regions_say_why() -> None:
    shared = region(0, 0x7F0000000, 3, "/dev/shm/x", eligible=False, why="shared", scanned=False)
    data = checked(jsonout.scan_object(make([[1, 1]], extra_regions=(shared,))))
    last = data["regions"][-1]
    assert (last["start"], last["end"]) == ("0x7f0000000000", "0x7f0000003000")
    assert (last["eligible"], last["why"], last["scanned"], last["pages"]) == (
        False,
        "shared",
        False,
        0,
    )


def test_unread_pages_make_it_partial() -> None:
    scan = make([[1, 1]])
    scan.tally.unread_pages = 3
    data = checked(jsonout.scan_object(scan))
    assert data["scan"]["complete"] is False
    assert data["scan"]["skipped"] == [
        {"pid": None, "what": "pages that could not be read", "code": "unread", "pages": 3}
    ]


def test_errors() -> None:
    data = checked(jsonout.error_object(NoSuchProcess("there is no process 5 \udcff")))
    assert data["error"]["code"] == "no-such-process"
    assert data["error"]["message"] == "there is no process 5 \\xff"
    assert data["error"]["hint"]


def test_looks_in_the_json() -> None:
    scan = make([[1, 1]])
    found = checked(jsonout.scan_object(scan))["scan"]
    assert (found["drifting"], found["extrapolated"], found["looks_seconds"]) == (None, False, [])
    scan.drifting, scan.extrapolated, scan.looks_seconds = True, True, [0.0, 1.5, 5.0]
    found = checked(jsonout.scan_object(scan))["scan"]
    assert (found["drifting"], found["extrapolated"]) == (True, True)
    assert found["looks_seconds"] == [0.0, 1.5, 5.0]


def test_partial_passes_in_the_json() -> None:
    scan = make([[1, 1, 2]])
    found = checked(jsonout.scan_object(scan))
    assert (found["scan"]["partial_passes"], found["scan"]["read_again_pages"]) == (False, None)
    assert found["regions"][0]["pages_volatile"] == 0
    scan.read_again_pages = 2
    found = checked(jsonout.scan_object(scan))
    assert (found["scan"]["partial_passes"], found["scan"]["read_again_pages"]) == (True, 2)
    assert found["regions"][0]["pages_volatile"] is None


HOST = jsonout.host_object("6.18.0", PAGE, {})
RESTORED = [
    {"path": "/sys/kernel/mm/ksm/run", "value": "0", "found": "1", "outcome": "restored", "why": ""}
]
MEMORY = {"anon_pages_bytes": 1, "mem_free_bytes": 2, "per_cpu_bytes": 3, "free_bytes": 5}
FIGURES = {"predicted": {"pages_shared": 1}, "actual": {"pages_shared": 1}}


@pytest.mark.parametrize(
    "data",
    [
        jsonout.envelope(
            "self_test",
            host=HOST,
            passed=True,
            cases=[{"name": "3 pages", **FIGURES, "equal": True}],
            skipped=[{"name": "huge", "skipped": "no huge pages"}],
            restored=RESTORED,
        ),
        jsonout.envelope("self_test_plan", cases=[{"name": "3 pages", "note": ""}]),
        jsonout.envelope(
            "apply",
            host=HOST,
            **FIGURES,
            difference={"pages_shared": 0},
            holds=True,
            full_scans=5,
            seconds=1.5,
            memory={"before": MEMORY, "after": MEMORY},
            restored=[],
        ),
        jsonout.envelope("restore", restored=RESTORED, processes=[]),
    ],
)
def test_other_kinds(data: dict[str, Any]) -> None:
    checked(data)


@pytest.mark.parametrize(
    "missing",
    ["host", "scan", "prediction", "processes", "regions", "cost", "why_not_more", "top_contents"],
)
def test_the_schema_is_strict(missing: str) -> None:
    data = jsonout.scan_object(make([[1, 1]]))
    del data[missing]
    assert not VALIDATOR.is_valid(data)
