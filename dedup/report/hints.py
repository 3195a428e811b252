"""Commands that hints tell people to type: as they must be typed here."""

from __future__ import annotations

import os
import shutil

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def typable(text: str) -> str:
    """Hints with `sudo dedup`, made to work where dedup lies outside of sudo's path."""
    if "`sudo dedup" not in text:
        return text
    here = shutil.which("dedup")
    if here is None or shutil.which("dedup", path=SYSTEM_PATH):
        return text
    return text.replace("`sudo dedup", f"`sudo {here}")


def as_root(line: str) -> str:
    """A line of shell, for root or for those who must become root."""
    if os.geteuid() == 0:
        return line
    if ">" in line:
        return f"sudo sh -c '{line}'"
    return typable(f"`sudo {line}`").strip("`")
