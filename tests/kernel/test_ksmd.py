"""The kernel thread ksmd: which one it is, and its CPU time."""

from __future__ import annotations

import os
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest

from dedup.errors import Unsupported
from dedup.kernel import ksmd
from dedup.kernel.ksmd import Ksmd
from tests.kernel_fixtures import KsmControl, Target


def add(proc: Path, pid: int, name: str, parent: int, ticks: tuple[int, int] = (0, 0)) -> Path:
    folder = proc / str(pid)
    folder.mkdir()
    middle = " ".join(["0"] * 9)
    (folder / "stat").write_text(f"{pid} ({name}) S {parent} {middle} {ticks[0]} {ticks[1]} 0 0\n")
    return folder


def test_a_program_of_that_name_is_not_it(tmp_path: Path) -> None:
    add(tmp_path, 7, "ksmd", 1)
    with pytest.raises(Unsupported, match="ksmd is not among"):
        Ksmd(tmp_path)
    add(tmp_path, 8, "kswapd0", 2)
    add(tmp_path, 39, "ksmd", 2)
    assert Ksmd(tmp_path).pid == 39


def test_cpu_time_of_schedstat_and_without(tmp_path: Path) -> None:
    folder = add(tmp_path, 39, "ksmd", 2, ticks=(3, 4))
    assert Ksmd(tmp_path).waited_ns() is None
    assert Ksmd(tmp_path).cpu_ns() == 7 * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    (folder / "schedstat").write_text("123456789 5 6\n")
    thread = Ksmd(tmp_path)
    assert (thread.cpu_ns(), thread.waited_ns()) == (123456789, 5)
    (folder / "schedstat").unlink()
    with pytest.raises(Unsupported, match="can't be read"):
        thread.cpu_ns()


def test_the_tick_is_that_of_the_kernel() -> None:
    tick = ksmd.tick_seconds()
    assert round(1 / tick) in {100, 250, 300, 1000}
    steps: list[float] = []
    # A late tick makes one step longer, and the kernel's setting of the clock another shorter; of a
    # busy host we see every second or third tick, and two in a row sooner or later.
    for _ in range(100):
        times = sorted({time.clock_gettime_ns(6) for _ in range(200_000)})
        steps += [(b - a) / tick / 1e9 for a, b in pairwise(times)]
        if len(steps) >= 20 and min(steps) < 1.5:
            break
    assert len(steps) >= 20, "the coarse clock stands still"
    whole = [round(s) for s in steps if abs(s - round(s)) < 0.1]
    assert len(whole) > len(steps) / 2
    assert min(whole) == 1


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC 7B13\nflags\t: fpu\n", "AMD EPYC 7B13"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n", "0x41 0xd0c"),
        ("processor\t: 0\ncpu\t\t: POWER9, altivec supported\n", "POWER9, altivec supported"),
        ("", os.uname().machine),
    ],
)
def test_the_processors_name(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert ksmd.cpu_model(tmp_path) == name


@pytest.mark.ksm
@pytest.mark.root
def test_its_work_takes_cpu_time(ksm: KsmControl, target: Target) -> None:
    thread = Ksmd()
    assert re.match(r"ksmd\s", Path(f"/proc/{thread.pid}/comm").read_text())
    target.do("map", name="a", pages=2000)
    target.do("fill", name="a", at=0, count=2000, what="x")
    target.do("advise", name="a", what="mergeable")
    before, begin = thread.cpu_ns(), time.monotonic_ns()
    ksm.converge()
    used = thread.cpu_ns() - before
    assert 2000 * 100 < used < time.monotonic_ns() - begin


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("flags\t\t: fpu sse2 avx2 avx512f", "AVX-512"),
        ("flags\t\t: fpu sse2 avx2", "AVX2"),
        ("Features\t: fp asimd", "NEON"),
        ("flags\t\t: fpu xavx2", ""),
        ("other : avx2", ""),
    ],
)
def test_vectors(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert ksmd.cpu_vectors(tmp_path) == words
