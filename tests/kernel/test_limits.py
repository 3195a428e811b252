"""Settings in /proc/sys, and swap."""

from __future__ import annotations

from pathlib import Path

from dedup.kernel import limits
from dedup.kernel.limits import Limits


def test_nothing_told(tmp_path: Path) -> None:
    assert limits.read(tmp_path) == Limits(None, None, ())


def test_figures(tmp_path: Path) -> None:
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/vm").mkdir()
    (tmp_path / "sys/kernel/randomize_va_space").write_text("1\n")
    (tmp_path / "sys/vm/max_map_count").write_text("1000\n")
    (tmp_path / "swaps").write_text(
        "Filename\tType\tSize\tUsed\tPriority\n"
        "/dev/zram0 partition 1000 0 100\n/sw\\040ap file 9 0 -2\n"
    )
    assert limits.read(tmp_path) == Limits(1, 1000, ("/dev/zram0", "/sw\\040ap"))


def test_here() -> None:
    found = limits.read()
    assert found.randomize_va_space in {0, 1, 2}
    assert len(found.swaps) == len(Path("/proc/swaps").read_text().splitlines()) - 1
