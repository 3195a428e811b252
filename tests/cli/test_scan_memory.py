"""`dedup scan --memory`, against full scans of the same processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import dedup as package
from dedup.errors import Refused, Usage
from dedup.model.prediction import FIELDS
from dedup.report.sampled import part_of
from dedup.sampling import Sampled
from dedup.scanning import Scan

from .conftest import REPOSITORY, Dedup, end, environment, on_terminal, start_program

if TYPE_CHECKING:
    from collections.abc import Iterator

# Whatever the host has at the moment.
DEFAULTS = ("--tunable", "max_page_sharing=256", "--tunable", "use_zero_pages=0",
            "--interval", "0.05")  # fmt: skip
PAGES = 90_000
# With a locked page, so that the model may need arrays: else everything fits into the least budget.
TARGET = f"""
import ctypes, mmap, random, sys
PAGE = mmap.PAGESIZE
locked = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
locked[:6] = b"locked"
address = ctypes.addressof(ctypes.c_char.from_buffer(locked))
assert "unlocked" in sys.argv or ctypes.CDLL(None).mlock(ctypes.c_void_p(address), PAGE) == 0
memory = mmap.mmap(-1, {PAGES} * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
mine = int(sys.argv[1]) * 10_000_000
# Unique, in both processes, twice, thrice in each, few heavy ones, one with a tenth; zeros.
names = [*(mine + n for n in range(30_000)), *range(1_000_000, 1_010_000),
         *(2_000_000 + mine + n // 2 for n in range(12_000)),
         *(3_000_000 + n // 3 for n in range(9_000)), *(4_000_000 + n % 20 for n in range(8_000)),
         *([5_000_000] * 9_000), *([-1] * 12_000)]
random.Random(1).shuffle(names)
for i, name in enumerate(names):
    memory[i * PAGE : i * PAGE + 16] = b"%16d" % name if name >= 0 else bytes(16)
print("ready", flush=True)
if "write" in sys.argv:
    n = 0
    while True:
        n += 1
        for i in range(0, {PAGES}, 10):
            memory[i * PAGE + 64 : i * PAGE + 72] = n.to_bytes(8, "little")
sys.stdin.read()
"""
PEAK = """
import sys
from pathlib import Path
from dedup.__main__ import main
done = main()
status = Path("/proc/self/status").read_text()
print("VmHWM", status.partition("VmHWM:")[2].split()[0], file=sys.stderr)
sys.exit(done)
"""


@pytest.fixture(scope="module")
def chosen() -> Iterator[tuple[str, ...]]:
    """Two processes with 90,000 pages each: the words that choose them."""
    started = [start_program(TARGET, "1"), start_program(TARGET, "2")]
    yield tuple(word for p in started for word in ("--pid", str(p.pid)))
    for p in started:
        end(p)


@pytest.fixture(scope="module")
def least(chosen: tuple[str, ...]) -> int:
    """The smallest budget, MiB, as it is told."""
    done = subprocess.run(
        [sys.executable, "-m", "dedup", "scan", *chosen, "--memory", "1M"],
        capture_output=True, text=True, env=environment(), cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    words = " ".join(done.stderr.split())
    assert "1M is too little memory for this scan, even for a sample" in words
    found = re.search(r"`--memory (\d+)M` at the least", words)
    assert found
    return int(found[1])


def held(sample: dict[str, Any], full: dict[str, Any]) -> None:
    """Every field of a full scan is in the sample's range, made twice as wide.

    The range itself holds 95 of 100; `benchmarks.budget` counts how often.
    """
    for name in FIELDS:
        value = full["prediction"][name]
        mine = sample["prediction"][name]
        low, high = sample["prediction"]["bounds"].get(name, (mine, mine))
        beyond = (high - low) / 2
        assert low - beyond <= value <= high + beyond, name
        assert (mine is None) == (name in sample["prediction"]["bounds"])
        if mine is None:
            assert low <= sample["scan"]["sample"]["point"][name] <= high


def test_the_range_holds_the_full_scan(dedup: Dedup, chosen: tuple[str, ...], least: int) -> None:
    args = ("scan", *chosen, "--json", *DEFAULTS)
    result = dedup(*args, "--memory", f"{least + 1}M", "--seed", "4")
    assert (result.status, result.err) == (0, "")
    sample, full = result.json, dedup(*args).json
    held(sample, full)
    part = sample["scan"]["sample"]
    assert part["by"] == "content"
    assert part["memory_bytes"] == (least + 1) << 20
    assert part["within_seconds"] is None
    assert 0 < part["frame_rate"] < part["rate"] < 1
    assert part["pages"] < sample["scan"]["pages"] / 2
    # Everything at the first look, what was kept at the second; before it a pilot.
    read = sample["scan"]["reader"]["read_bytes"] // sample["host"]["page_size"]
    assert abs(read - sample["scan"]["pages"] - part["pages"]) < 100
    assert abs(sample["scan"]["pages"] - full["scan"]["pages"]) < 40
    assert sum(p["pages"] for p in sample["processes"]) == sample["scan"]["pages"]
    assert sample["regions"] == sample["top_contents"] == sample["why_not_more"] == []
    assert sample["smart_scan"] is None
    low, high = sample["prediction"]["bounds"]["frames_freed"]
    assert high - low < 0.05 * sample["scan"]["pages"]
    assert sample["cost"]["full_scan_seconds"] > 0


def test_all_zero_pages_and_heavy_contents_are_counted(
    dedup: Dedup, chosen: tuple[str, ...], least: int
) -> None:
    """They alone make 42,000 of 180,000 pages: whether the sample has them does not show."""
    middles = []
    for seed in range(3):
        scan = dedup(
            "scan", *chosen, "--memory", f"{least}M", "--seed", str(seed), "--json", "--passes",
            "1", *DEFAULTS,
        ).json  # fmt: skip
        assert scan["prediction"]["pages_volatile"] is None
        assert "pages_volatile" not in scan["prediction"]["bounds"]
        middles.append(scan["scan"]["sample"]["point"]["pages_sharing"])
    assert max(middles) - min(middles) < 0.02 * 2 * PAGES


def test_pages_told_by_their_frames_fit_sooner(dedup: Dedup, least: int) -> None:
    started = [start_program(TARGET, "1", "unlocked"), start_program(TARGET, "2", "unlocked")]
    chosen = [word for p in started for word in ("--pid", str(p.pid))]
    try:
        result = dedup("scan", *chosen, "--memory", f"{least}M", "--json", *DEFAULTS)
        full = dedup("scan", *chosen, "--json", *DEFAULTS)
    finally:
        for p in started:
            end(p)
    assert "sample" not in result.json
    assert result.json["prediction"] == full.json["prediction"]


def test_text(dedup: Dedup, chosen: tuple[str, ...], least: int) -> None:
    result = dedup("scan", *chosen, "--memory", f"{least}M", "--passes", "1")
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("KSM would free about ")
    assert max(map(len, lines)) <= 80
    words = " ".join(result.out.split())
    assert re.search(
        r"kept (1 of [\d.]+|[\d.]+% of the) contents, with all their copies, so that it fits into ",
        words,
    )
    assert f"it fits into {least}.0 MiB" in words
    assert "each range holds with 95%" in words
    assert f"`dedup scan {' '.join(chosen)}` keeps everything" in words


@pytest.mark.parametrize("columns", [40, 57])
def test_narrow_terminal(chosen: tuple[str, ...], least: int, columns: int) -> None:
    args = ["scan", *chosen, "--memory", f"{least}M", "--passes", "1", "-v", "--color", "never"]
    shown = on_terminal(args, columns)
    assert shown.status == 0
    assert max(map(len, shown.lines)) <= columns
    assert re.search(r"thp_split +(0 +)?0, exact", shown.screen), "a figure, however narrow"


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (1.0, "all"),
        (0.996, "99.6% of the"),
        (0.5, "1 of 2"),
        (0.03, "1 of 33.3"),
        (1 / 1500, "1 of 1,500"),
    ],
)
def test_how_much_is_kept(rate: float, words: str) -> None:
    assert part_of(rate) == words


def test_everything_where_it_fits(dedup: Dedup, chosen: tuple[str, ...]) -> None:
    args = ("scan", *chosen, "--passes", "1", "--seed", "7")
    result = dedup(*args, "--memory", "2G", "--by", "name", "--top", "3")
    assert result.status == 0
    words = " ".join(result.err.split())
    assert "everything is kept: that fits into the memory allowed" in words
    mine, full = dedup(*args, "--memory", "2G", "--json").json, dedup(*args, "--json").json
    assert mine["scan"]["sample"] is None
    same = {"pages_shared", "pages_sharing", "frames_freed"}
    for name in same:
        assert mine["prediction"][name] == pytest.approx(full["prediction"][name], abs=20)


@pytest.mark.parametrize("over", [0, 12])
def test_its_memory_stays_within(chosen: tuple[str, ...], least: int, over: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "scan", *chosen, "--memory", f"{least + over}M", *DEFAULTS],
        capture_output=True, text=True, env=environment(), cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert int(done.stderr.rpartition("VmHWM")[2]) / 1024 <= least + over


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sample", "10%"), "--sample and --within do not go with --memory"),
        (("--within", "3"), "--sample and --within do not go with --memory"),
        (("--core", "/nowhere/x"), "do not go with --memory"),
        (("--save", "SAVE"), "--save needs all pages to be kept"),
        (("--by", "name"), "--by needs all pages to be kept"),
        (("--top", "3"), "--top needs all pages to be kept"),
        (("--partial-passes",), "--partial-passes needs all pages to be kept"),
    ],
)
def test_what_does_not_go(
    dedup: Dedup,
    chosen: tuple[str, ...],
    least: int,
    tmp_path: Path,
    options: tuple[str, ...],
    words: str,
) -> None:
    given = [str(tmp_path / "x.dedup") if o == "SAVE" else o for o in options]
    # With what writes fingerprints, there is more to begin with.
    budget = least + 31 * ("--save" in options)
    args = ("scan", *chosen, "--memory", f"{budget}M", *given)
    result = dedup(*args)
    assert (result.status, result.out) == (2, "")
    told = " ".join(result.err.split())
    assert words in told
    if "needs" in words:
        assert re.search(rf"`--memory \d+M`, or leave out `{options[0]}`", told)
    assert dedup(*args, "--json").json["kind"] == "error"


@pytest.mark.parametrize("size", ["0", "much", "5Q", "-1M"])
def test_no_size(dedup: Dedup, size: str) -> None:
    result = dedup("scan", "--pid", str(os.getpid()), "--memory", size)
    assert result.status == 2


def test_volatile_pages(dedup: Dedup) -> None:
    """Pages of any content, counted ones and zeros too, that are written to all the time."""
    writers = [start_program(TARGET, n, "write", busy=True) for n in ("1", "2")]
    chosen = [word for p in writers for word in ("--pid", str(p.pid))]
    try:
        told = dedup("scan", *chosen, "--memory", "1M").err
        found = re.search(r"--memory\s+(\d+)M", told)
        assert found
        scan = dedup(
            "scan", *chosen, "--memory", f"{found[1]}M", "--json", *DEFAULTS, "--interval", "1.5"
        ).json
    finally:
        for p in writers:
            end(p)
    low, high = scan["prediction"]["bounds"]["pages_volatile"]
    assert low <= 2 * PAGES // 10 + 200
    assert high >= 2 * PAGES // 10 - 200
    assert high - low < 0.05 * scan["scan"]["pages"]


def test_in_python(chosen: tuple[str, ...]) -> None:
    pids = [int(word) for word in chosen[1::2]]
    with pytest.raises(Usage, match="too little memory") as e:
        package.scan(pids, memory=1, passes=1)
    found = re.search(r"--memory (\d+)M", e.value.hint)
    assert found
    sample = package.scan(pids, memory=f"{found[1]}M", passes=1, seed=3)
    assert isinstance(sample, Sampled)
    assert (sample.by, sample.memory_bytes) == ("content", int(found[1]) << 20)
    full = package.scan(pids, memory=1 << 40, passes=1, seed=3)
    assert isinstance(full, Scan)
    low, high = sample.prediction.bounds["frames_freed"]
    assert full.prediction.frames_freed is not None
    assert low <= full.prediction.frames_freed <= high
    for wrong in ("much", -5, 0):
        with pytest.raises(Usage):
            package.scan(pids, memory=wrong)
    with pytest.raises(Usage, match="does not go with arrays"):
        package.scan(arrays=[bytearray(1 << 20)], memory="1G")


def test_pinned_memory_is_refused(chosen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from dedup import budget
    from dedup.sources.live import LiveSource

    look = LiveSource.first_look

    def pinned(self: LiveSource) -> Any:
        pages = look(self)
        pages.processes[:] = [replace(p, pinned_bytes=4096) for p in pages.processes]
        return pages

    monkeypatch.setattr(LiveSource, "first_look", pinned)
    pids = [int(word) for word in chosen[1::2]]
    with pytest.raises(Usage) as e:
        budget.scan_pids(pids, 1)
    least = int(e.value.hint.split("`")[1].split()[1].removesuffix("M")) << 20
    with pytest.raises(Refused, match="pinned memory"):
        budget.scan_pids(pids, least)


def test_a_lower_rate_where_there_is_no_room(
    chosen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More is there than the pilot made one expect: it looks again, at half the rate."""
    from dedup import budget

    pids = [int(word) for word in chosen[1::2]]
    monkeypatch.setattr(budget, "MARGIN", 1.7)
    with pytest.raises(Usage) as e:
        budget.scan_pids(pids, 1)
    least = int(e.value.hint.split("`")[1].split()[1].removesuffix("M")) << 20
    found = budget.scan_pids(pids, least)
    assert isinstance(found, Sampled)
    assert found.rate < 0.5
    monkeypatch.setattr(budget, "TRIES", 1)
    with pytest.raises(Refused, match="changes too fast"):
        budget.scan_pids(pids, least)
