"""`dedup scan --sample` and `--within`, against full scans of the same process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from dedup import sampling, scanning
from dedup.errors import Refused
from dedup.model.prediction import FIELDS
from dedup.sources import speed

from .conftest import Dedup, end, on_terminal, start_program

if TYPE_CHECKING:
    import subprocess

pytest.importorskip("scipy")
pytest.importorskip("highspy")

TARGET = """
import mmap, os, random, sys
PAGE = mmap.PAGESIZE
memory = mmap.mmap(-1, 60_000 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
names = [*range(30_000), *(n // 2 for n in range(80_000, 92_000)),
         *(n % 20 for n in range(200_000, 208_000)), *([-1] * 10_000)]
names = [n + 1_000_000 * (i >= 30_000) for i, n in enumerate(names)]
random.Random(1).shuffle(names)
for i, name in enumerate(names):
    memory[i * PAGE : i * PAGE + 16] = b"%16d" % name if name != 999_999 else bytes(16)
print("ready", flush=True)
sys.stdin.read()
"""
# Whatever the host has at the moment.
DEFAULTS = ("--tunable", "max_page_sharing=256", "--tunable", "use_zero_pages=0")


def held(sample: dict[str, Any], full: dict[str, Any]) -> None:
    """Every field of a full scan is in the sample's range."""
    for name in FIELDS:
        value = full["prediction"][name]
        mine = sample["prediction"][name]
        low, high = sample["prediction"]["bounds"].get(name, (mine, mine))
        assert low <= value <= high, name
        assert (mine is None) == (name in sample["prediction"]["bounds"])
        if mine is None:
            assert low <= sample["scan"]["sample"]["point"][name] <= high


@pytest.mark.parametrize("rate", ["15%", "0.25"])
def test_the_range_holds_the_full_scan(
    dedup: Dedup, process: subprocess.Popen[str], rate: str
) -> None:
    args = ("scan", "--pid", str(process.pid), "--interval", "0.05", "--json", *DEFAULTS)
    result = dedup(*args, "--sample", rate, "--seed", "3")
    assert (result.status, result.err) == (0, "")
    sample, full = result.json, dedup(*args).json
    assert full["scan"]["sample"] is None
    held(sample, full)
    part = sample["scan"]["sample"]
    assert part["rate"] == (0.15 if rate == "15%" else 0.25)
    assert abs(part["pages"] - part["rate"] * sample["scan"]["pages"]) < 1_000
    read = sample["scan"]["reader"]["read_bytes"]
    assert read == 2 * part["pages"] * sample["host"]["page_size"]
    assert abs(sample["scan"]["pages"] - full["scan"]["pages"]) < 20
    assert sample["processes"][0]["pages"] == sample["scan"]["pages"]
    assert sample["regions"] == sample["top_contents"] == sample["why_not_more"] == []
    low, high = sample["prediction"]["bounds"]["frames_freed"]
    assert high - low < 0.25 * sample["scan"]["pages"]
    assert sample["cost"]["full_scan_seconds"] > 0


def test_text(dedup: Dedup, process: subprocess.Popen[str]) -> None:
    result = dedup("scan", "--pid", str(process.pid), "--sample", "20%", "--passes", "1")
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("KSM would free about ")
    assert max(map(len, lines)) <= 80
    words = " ".join(result.out.split())
    assert "An estimate from 20.0% of the memory" in words
    assert "each range holds with 95%" in words
    assert f"`dedup scan --pid {process.pid}` reads everything" in words
    assert "One look" in words
    assert "pages_volatile" in words


@pytest.mark.parametrize("columns", [40, 57])
def test_narrow_terminal(process: subprocess.Popen[str], columns: int) -> None:
    args = ["scan", "--pid", str(process.pid), "--sample", "20%", "--passes", "1", "-v",
            "--color", "never"]  # fmt: skip
    shown = on_terminal(args, columns)
    assert shown.status == 0
    assert max(map(len, shown.lines)) <= columns


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--sample", "0"), 2, "no part of the memory"),
        (("--sample", "120%"), 2, "no part of the memory"),
        (("--sample", "much"), 2, "no part of the memory"),
        (("--within", "0"), 2, "not a number of seconds"),
        (("--sample", "0.2%"), 8, "`--sample 1%` at the least"),
        (("--sample", "2%"), 8, "too small a sample"),
        (("--sample", "10%", "--within", "3"), 2, "leave out one of them"),
        (("--sample", "10%", "--save", "/nowhere/x"), 2, "--save does not go with a sample"),
        (("--sample", "10%", "--by", "name"), 2, "--by does not go with a sample"),
        (("--sample", "10%", "--top", "3"), 2, "--top does not go with a sample"),
        (("--sample", "10%", "--core", "/nowhere/x"), 2, "do not go with a sample"),
        (("--within", "3", "--interval", "4"), 2, "do not fit into 3 s"),
        (("--within", "0.2"), 8, "0.2 s are too short"),
    ],
)  # fmt: skip
def test_what_does_not_go(
    dedup: Dedup,
    process: subprocess.Popen[str],
    options: tuple[str, ...],
    status: int,
    words: str,
) -> None:
    result = dedup("scan", "--pid", str(process.pid), *options)
    assert result.status == status
    assert result.out == ""
    assert words in " ".join(result.err.split())
    error = dedup("scan", "--pid", str(process.pid), *options, "--json")
    assert error.status == status
    assert error.json["kind"] == "error"


def test_everything_where_that_is_as_quick(dedup: Dedup, process: subprocess.Popen[str]) -> None:
    args = ("scan", "--pid", str(process.pid), "--passes", "1")
    result = dedup(*args, "--sample", "60%")
    assert result.status == 0
    assert "everything is read: above 25% a sample is no quicker" in " ".join(result.err.split())
    scan = dedup(*args, "--sample", "60%", "--json").json
    assert scan["scan"]["sample"] is None
    assert scan["scan"]["reader"]["read_bytes"] == scan["scan"]["bytes"]


def test_within_reads_everything_that_fits(dedup: Dedup, process: subprocess.Popen[str]) -> None:
    args = ("scan", "--pid", str(process.pid), "--within", "20")
    result = dedup(*args, "--interval", "0.05")
    assert result.status == 0
    assert "everything is read: that fits into 20 s" in " ".join(result.err.split())
    scan = dedup(*args, "--passes", "1", "--json").json["scan"]
    assert scan["sample"] is None


@pytest.mark.parametrize(("allowed", "full_scan", "most"), [("600", "1e6", 5.0), ("4", "1e6", 1.5),
                                                           ("600", "0.1", 0.16)])  # fmt: skip
def test_looks_are_no_further_apart_than_without(
    dedup: Dedup, process: subprocess.Popen[str], allowed: str, full_scan: str, most: float
) -> None:
    """However much time is given, ksmd's full scan decides, and 5 s are the most."""
    args = ("scan", "--pid", str(process.pid), "--within", allowed, "--full-scan", full_scan)
    scan = dedup(*args, "--json").json["scan"]
    assert scan["sample"] is None
    assert scan["interval_seconds"] == pytest.approx(most, abs=0.6)


def test_within_goes_by_memory_and_time(process: subprocess.Popen[str]) -> None:
    """As if there were a thousand such processes: 230 GiB."""
    pids, plan = [process.pid] * 1_000, scanning.Plan(passes=1)
    assert sampling.rate_within(pids, plan, 10_000) is None
    with pytest.raises(Refused, match="are too short for"):
        sampling.rate_within(pids, plan, 1.1)


def test_a_rate_from_the_speed() -> None:
    found = speed.Speed(found=1e-7, read=4e-7, alone=1e-6)
    assert found.seconds(1_000_000) == pytest.approx(0.5)
    assert found.seconds(1_000_000, 0.1) == pytest.approx(0.2)
    assert found.rate(1_000_000, 0.2) == pytest.approx(0.1)
    overhead = sampling.OVERHEAD_SECONDS + sampling.ESTIMATE_SECONDS
    for pages in (20_000_000, 100_000_000):
        for looks in (1, 2):
            # Time for 8 % of them, and then for all.
            some = overhead + looks * found.seconds(pages, 0.08) / sampling.CAUTION
            assert sampling.rate_at(found, pages, looks, some) == pytest.approx(0.08)
            every = overhead + looks * found.seconds(pages) / sampling.CAUTION
            assert sampling.rate_at(found, pages, looks, every) is None
            # As if everything took a little less than it does: a quarter at the most.
            assert sampling.rate_at(found, pages, looks, 0.98 * every - overhead) == 0.25
            with pytest.raises(Refused) as e:
                sampling.rate_at(found, pages, looks, 1.5)
            least = float(e.value.hint.split("`")[1].split()[1])
            rate = sampling.rate_at(found, pages, looks, least)
            assert rate is not None
            assert 0.01 <= rate < 0.02


def test_volatile_pages(dedup: Dedup) -> None:
    """Pages that are written to all the time, by their share in the sample."""
    program = """
import mmap, os, sys, threading
PAGE = mmap.PAGESIZE
memory = mmap.mmap(-1, 50_000 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for i in range(50_000):
    memory[i * PAGE : i * PAGE + 16] = b"%16d" % i
print("ready", flush=True)
n = 0
while True:
    n += 1
    for i in range(0, 50_000, 10):
        memory[i * PAGE + 64 : i * PAGE + 72] = n.to_bytes(8, "little")
"""
    writer = start_program(program, busy=True)
    try:
        scan = dedup(
            "scan", "--pid", str(writer.pid), "--sample", "20%", "--interval", "0.3", "--json"
        ).json
    finally:
        end(writer)
    low, high = scan["prediction"]["bounds"]["pages_volatile"]
    # The range holds 95 of 100 samples; twice as wide it does not depend on chance.
    beyond = (high - low) / 2
    assert low - beyond <= 5_000 + 100
    assert high + beyond >= 5_000
    assert high - low < 1_500


@pytest.mark.skipif(os.geteuid() != 0, reason="frame numbers are hidden without root anyway")
def test_frames_are_known_without_reading(dedup: Dedup, process: subprocess.Popen[str]) -> None:
    args = ("scan", "--pid", str(process.pid), "--passes", "1", "--json")
    sample, full = dedup(*args, "--sample", "10%").json["scan"], dedup(*args).json["scan"]
    assert sample["frames"] is not None
    assert abs(sample["frames"] - full["frames"]) < 20
