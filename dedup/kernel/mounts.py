"""Which file system a device number belongs to.

Source: Documentation/filesystems/proc.rst (mountinfo).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dedup.kernel.processes import Handle


def file_systems(handle: Handle) -> dict[tuple[int, int], str]:
    """Types of the file systems that a process sees mounted, by major and minor number.

    Raises
    ------
    dedup.errors.ProcessGone, dedup.errors.NotPermitted
    """
    found = {}
    # Not splitlines: of what may stand in a path the kernel writes \n, but not \r, as an octal.
    for line in handle.read("mountinfo").split(b"\n")[:-1]:
        head, _, tail = line.partition(b" - ")
        words = head.split(b" ", 3)
        major, _, minor = words[2].partition(b":")
        found[int(major), int(minor)] = tail.partition(b" ")[0].decode(errors="replace")
    return found
