"""What the kernel counts of page faults on KSM pages, since boot.

Source: mm/vmstat.c, include/linux/vm_event_item.h (COW_KSM, KSM_SWPIN_COPY).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Events:
    """Pages since boot; None where the kernel does not count them."""

    cow_ksm: int | None
    """Merged pages broken: by a write to them, or by their being unmerged."""
    ksm_swpin_copy: int | None
    """Merged pages that came back from swap as a copy."""


def events(proc: Path = PROC) -> Events:
    """Read the counts; None where they can't be read."""
    try:
        text = (proc / "vmstat").read_text()
    except OSError:
        text = ""
    return Events(_value("cow_ksm", text), _value("ksm_swpin_copy", text))


def _value(name: str, text: str) -> int | None:
    found = re.search(rf"^{name} (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None
