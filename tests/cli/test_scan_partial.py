"""`dedup scan --partial-passes`, against a scan of the same process that reads everything."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from .conftest import Dedup, on_terminal

if TYPE_CHECKING:
    import subprocess

TARGET = """
import mmap, sys
PAGE = mmap.PAGESIZE
memory = mmap.mmap(-1, 10_000 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for i in range(10_000):
    memory[i * PAGE : i * PAGE + 16] = b"%16d" % (i if i < 8_000 else i // 2)
print("ready", flush=True)
sys.stdin.read()
"""
LOOKS = ("--interval", "0.05", "--partial-passes")
UNREAD = {"pages_unshared", "pages_volatile"}


def test_json(dedup: Dedup, process: subprocess.Popen[str]) -> None:
    args = ("scan", "--pid", str(process.pid), "--json")
    full = dedup(*args, "--interval", "0.05").json
    result = dedup(*args, *LOOKS)
    assert (result.status, result.err) == (0, "")
    part = result.json
    assert (full["scan"]["partial_passes"], full["scan"]["read_again_pages"]) == (False, None)
    assert part["scan"]["partial_passes"] is True
    again = part["scan"]["read_again_pages"]
    assert 2_000 <= again < 4_000
    page = part["host"]["page_size"]
    assert part["scan"]["reader"]["read_bytes"] == (part["scan"]["pages"] + again) * page
    assert part["scan"]["passes"] == 2
    assert part["scan"]["drifting"] is None
    for name, value in full["prediction"].items():
        if name == "bounds":
            assert part["prediction"][name].keys() == UNREAD
        elif name in UNREAD:
            assert part["prediction"][name] is None
            low, high = part["prediction"]["bounds"][name]
            assert low <= value <= high
        else:
            assert part["prediction"][name] == value, name
    assert part["processes"] == full["processes"]
    assert all(r["pages_volatile"] is None for r in part["regions"])
    words = {p["code"]: p["words"] for p in part["why_not_more"]}
    assert "mostly at the first look" in words["unique"]
    assert part["cost"]["full_scan_seconds"] == full["cost"]["full_scan_seconds"]
    assert part["smart_scan"] == full["smart_scan"]


def test_text(dedup: Dedup, process: subprocess.Popen[str]) -> None:
    result = dedup("scan", "--pid", str(process.pid), *LOOKS)
    assert (result.status, result.err) == (0, "")
    words = " ".join(result.out.split())
    assert "pages again, what would merge (--partial-passes)" in words
    assert re.search(r"pages_unshared [\d,]+ to [\d,]+ ", words)
    assert re.search(r"pages_volatile [\d,]+ to [\d,]+ ", words)
    assert "order in which ksmd comes by" not in words
    whole = dedup("scan", "--pid", str(process.pid), "--interval", "0.05").out
    assert "--partial-passes" not in whole


@pytest.mark.parametrize("columns", [40, 80])
def test_terminal(process: subprocess.Popen[str], columns: int) -> None:
    args = ["scan", "--pid", str(process.pid), *LOOKS, "-v", "--color", "never"]
    shown = on_terminal(args, columns)
    assert shown.status == 0
    assert max(map(len, shown.lines)) <= columns


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--passes", "1"), "--passes 1 takes no other"),
        (("--sample", "10%"), "does not go with a sample"),
        (("--within", "3"), "does not go with a sample"),
        (("--save", "/nowhere/x"), "--save does not go with --partial-passes"),
    ],
)
def test_what_does_not_go(
    dedup: Dedup, process: subprocess.Popen[str], options: tuple[str, ...], words: str
) -> None:
    args = ("scan", "--pid", str(process.pid), "--partial-passes", *options)
    result = dedup(*args)
    assert (result.status, result.out) == (2, "")
    assert words in " ".join(result.err.split())
    assert "leave out" in " ".join(result.err.split())
    assert dedup(*args, "--json").json["error"]["code"] == "usage"


def test_files_alone(dedup: Dedup) -> None:
    result = dedup("scan", "--core", "/nowhere/core", "--partial-passes")
    assert (result.status, result.out) == (2, "")
    assert "files are looked at once" in " ".join(result.err.split())
