"""Limits of memory that are too small: an error by the contract, whatever is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from .conftest import REPOSITORY, Dedup, environment

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
PAGES = 262_144
TARGET = f"""
import mmap, sys
PAGE = mmap.PAGESIZE
memory = mmap.mmap(-1, {PAGES} * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for i in range(0, {PAGES} * PAGE, PAGE):
    memory[i] = 1 + i // PAGE % 50
print("ready", flush=True)
sys.stdin.read()
"""


def limited(mib: float, kind: str = "as") -> tuple[str, ...]:
    return ("prlimit", f"--{kind}={int(mib * MIB)}")


def held(pid: int) -> list[str]:
    """What a scan must leave as it is."""
    lines = ("Anonymous:", "Pss_Anon:", "AnonHugePages:", "Swap:", "KSM:")
    with open(f"/proc/{pid}/smaps_rollup") as f:
        return [line for line in f if line.startswith(lines)]


# Python itself needs some 16 MiB, with ours 20, more in later versions; NumPy 80 more, and the rest
# is for the pages.
@pytest.mark.parametrize("mib", [26, 40, 70, 90, 100, 110])
def test_too_little_to_start(dedup: Dedup, mib: int) -> None:
    """Of any size: never a traceback, nor BLAS's own end."""
    result = dedup("scan", "--pid", "1", prefix=limited(mib))
    assert (result.status, result.out) == (10, "")
    words = " ".join(result.err.split())
    assert words.startswith("dedup: no memory to ")
    assert "`ulimit -v unlimited`" in words
    told = dedup("scan", "--pid", "1", "--json", prefix=limited(mib))
    assert (told.status, told.err) == (10, "")
    assert told.json["error"]["code"] == "out-of-memory"


@pytest.mark.parametrize("options", [("--threads", "1"), ("--passes", "1"), ("--memory", "80M")])
def test_every_limit_tells_or_does(
    dedup: Dedup, process: subprocess.Popen[str], options: tuple[str, ...]
) -> None:
    """From too little to start to enough: nothing but the error and the result."""
    args = ("scan", "--pid", str(process.pid), "--interval", "0.01", *options)
    before, seen = held(process.pid), set()
    for mib in range(112, 172, 10):
        result = dedup(*args, prefix=limited(mib))
        assert result.status in {0, 10}, result.err
        if result.status == 10:
            assert result.out == ""
            assert f"limited to {mib} MiB (`ulimit -v`)" in " ".join(result.err.split())
        seen.add(result.status)
    assert 10 in seen
    assert dedup(*args).status == 0
    assert held(process.pid) == before


def test_a_limit_of_data(dedup: Dedup, process: subprocess.Popen[str]) -> None:
    result = dedup("scan", "--pid", str(process.pid), prefix=limited(30, "data"))
    assert result.status == 10
    assert "limited to 30 MiB (`ulimit -d`); allow more: `ulimit -d unlimited`" in " ".join(
        result.err.split()
    )


@pytest.mark.parametrize("mib", [150, 200, 220, 250])
def test_a_sample_takes_scipy(dedup: Dedup, process: subprocess.Popen[str], mib: int) -> None:
    """Whose BLAS would hang, and whose absence is another error."""
    pytest.importorskip("scipy")
    args = ("--pid", str(process.pid), "--passes", "1", "--sample", "20%", "--threads", "1")
    result = dedup("scan", *args, prefix=limited(mib))
    assert result.status == 10
    assert "no memory to " in result.err


def test_other_commands(dedup: Dedup, tmp_path: Path) -> None:
    for words in (["status"], ["doctor"], ["capacity", str(tmp_path / "x.dedup")], ["restore"]):
        result = dedup(*words, prefix=limited(60))
        assert (result.status, result.out) == (10, "")
        assert "no memory to load numpy" in " ".join(result.err.split())
    run = dedup("run", "true", prefix=limited(60))
    assert run.status == 125
    assert dedup("scan", "--help", prefix=limited(60)).status == 0


def python(program: str, *words: str, mib: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*limited(mib), sys.executable, "-c", program, *words], capture_output=True, text=True,
        env=environment(OPENBLAS_NUM_THREADS="1"), cwd=REPOSITORY, timeout=60, check=False,
    )  # fmt: skip


# How far it comes with more hangs together with NumPy's version.
@pytest.mark.parametrize(("mib", "doing"), [(60, "load numpy"), (124, "load numpy|read the pages")])
def test_in_python(process: subprocess.Popen[str], mib: int, doing: str) -> None:
    """An error of ours that is a MemoryError, too; what comes after it has room again."""
    program = """
import sys
import dedup
from dedup.errors import OutOfMemory
try:
    dedup.scan(pids=[int(sys.argv[1])])
except MemoryError as e:
    assert isinstance(e, OutOfMemory) and isinstance(e, dedup.DedupError)
    print(e.message, "|", e.hint)
"""
    done = python(program, str(process.pid), mib=mib)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(f"no memory to ({doing}): this process is limited to {mib} MiB", done.stdout)
