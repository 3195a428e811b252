"""The doctor's findings, shown."""

from __future__ import annotations

import os
from io import StringIO

import jsonschema
import pytest
from rich.console import Console

from dedup import schema
from dedup.observe.doctor import Check, Finding
from dedup.report import doctor as report

CHECKS = [
    Check("Kernel", "ksm", Finding("ok", "in this kernel")),
    Check(
        "Kernel",
        "ksmd",
        Finding("limited", "stopped\x1b[2J", "nothing merges", "`echo 1 > /sys/kernel/mm/ksm/run`"),
    ),
    Check("Else", "map_count", Finding("cannot", "a long word or two", "that", "`dedup restore`")),
    Check("Else", "swap", Finding("note", "on", "so")),
    Check("Else", "yama", Finding("note", "on", "so")),
]


def shown(width: int = 80, *, verbose: bool = True) -> str:
    out = StringIO()
    console = Console(file=out, width=width, highlight=False, markup=False, emoji=False)
    for part in report.view(CHECKS, width=width, plain=True, verbose=verbose):
        console.print(part)
    return out.getvalue()


def test_json() -> None:
    data = report.doctor_object(CHECKS, "6.18", 4096, {})
    jsonschema.Draft202012Validator(schema.load()).validate(data)
    assert data["counts"] == {"ok": 1, "limited": 1, "cannot": 1, "note": 2}
    assert data["host"]["ksm"] is None


@pytest.mark.parametrize("width", [40, 80])
def test_it_fits_and_is_safe(width: int) -> None:
    text = shown(width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert text.endswith("1 ok, 1 limited, 1 can't, 2 notes.\n")


def test_what_is_well_can_be_left_out() -> None:
    assert "in this kernel" in shown()
    assert "in this kernel" not in shown(verbose=False)
    assert "1 ok" in shown(verbose=False)


def test_commands_as_one_must_type_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert report.way_out(CHECKS[1]) == "`sudo sh -c 'echo 1 > /sys/kernel/mm/ksm/run'`"
    assert report.way_out(CHECKS[2]).startswith("`sudo ")
    assert report.way_out(CHECKS[2]).endswith("dedup restore`")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert report.way_out(CHECKS[2]) == "`dedup restore`"
