"""Huge pages: transparent ones, by size, and those reserved for hugetlb.

Sources: Documentation/admin-guide/mm/transhuge.rst, Documentation/admin-guide/mm/hugetlbpage.rst.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
MM: Final = Path("/sys/kernel/mm")


@dataclass(frozen=True, slots=True)
class Huge:
    """How this host uses huge pages."""

    enabled: str
    """`always`, `madvise` or `never`; empty where the kernel has no transparent ones."""
    smaller_sizes: tuple[str, ...]
    """Sizes below the PMD's that anonymous memory may get (mTHP), such as `64kB`."""
    in_use_bytes: int
    """AnonHugePages."""
    reserved_bytes: int
    """For hugetlb, of all sizes."""


def read(mm: Path = MM, proc: Path = PROC) -> Huge:
    """Read it; what can't be read counts as none."""
    thp = mm / "transparent_hugepage"
    pmd = int(_text(thp / "hpage_pmd_size") or 0) // 1024
    smaller = []
    for folder in thp.glob("hugepages-*kB"):
        kilobytes = int(folder.name.removeprefix("hugepages-").removesuffix("kB"))
        if kilobytes != pmd and _chosen(_text(folder / "enabled")) not in {"never", ""}:
            smaller.append(kilobytes)
    reserved = 0
    for folder in (mm / "hugepages").glob("hugepages-*kB"):
        kilobytes = int(folder.name.removeprefix("hugepages-").removesuffix("kB"))
        reserved += kilobytes * 1024 * int(_text(folder / "nr_hugepages") or 0)
    in_use = re.search(r"^AnonHugePages: +(\d+)", _text(proc / "meminfo"), re.MULTILINE)
    return Huge(
        enabled=_chosen(_text(thp / "enabled")),
        smaller_sizes=tuple(f"{kilobytes}kB" for kilobytes in sorted(smaller)),
        in_use_bytes=int(in_use[1]) * 1024 if in_use else 0,
        reserved_bytes=reserved,
    )


def _chosen(text: str) -> str:
    """The word in brackets of `always [madvise] never`."""
    found = re.search(r"\[([^]]+)]", text)
    return found[1] if found else ""


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
