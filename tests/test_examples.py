"""The examples run and say what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.ksm
@pytest.mark.root
def test_three_zero_pages() -> None:
    lines = run("three_zero_pages.py").splitlines()[1:]
    figures = [tuple(int(w.rstrip(",)")) for w in line.split(": ")[1].split() if w[0].isdigit())
               for line in lines]  # fmt: skip
    assert figures == [
        (1, 1, 2, 2, 0, 0),
        (1, 1, 1, 1, 1, 1),
        (1, 1, 0, 0, 2, 2),
        (0, 0, 0, 0, 3, 3),
    ]


@pytest.mark.ksm
@pytest.mark.root
def test_merge_arrays() -> None:
    text = run("merge_arrays.py")
    assert "as they were: True" in text
    assert "refused: the array is not contiguous" in text


def test_own_memory() -> None:
    assert "would free 2" in run("own_memory.py")


def test_scan_service() -> None:
    name = Path(f"/proc/{os.getpid()}/comm").read_text().strip()
    assert f"(pid {os.getpid()})" in run("scan_service.py", name)
