"""Room for dedup itself: how much memory it may take, and the words for its being refused.

`ulimit -v` limits the address space, of which much is never used: stacks, libraries, buffers. NumPy
and scipy take some 80 MiB of it each. Where that is refused, the BLAS inside ends the process by
itself, or hangs; so it is asked for beforehand.

Source: getrlimit(2), mmap(2), proc_meminfo(5).
"""

from __future__ import annotations

import mmap
import resource
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from dedup.errors import DedupError, OutOfMemory, is_refusal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

MIB: Final = 1 << 20
LIMITS: Final = {"ulimit -v": resource.RLIMIT_AS, "ulimit -d": resource.RLIMIT_DATA}
"""What refuses memory to one process, by the command that sets it."""
NEEDED_BYTES: Final = {"numpy": 96 * MIB, "scipy": 160 * MIB}
"""For NumPy and our own modules; for scipy, with highspy and what that takes to solve."""
KEEPS_LESS_FROM: Final = 512 * MIB
"""Below such a limit most of it goes to libraries and stacks, not to what a scan keeps."""
LEAST_MIB: Final = 128
"""For `--memory`."""
SPARE_BYTES: Final = 4 * MIB
"""For the modules with which an error is told."""


def limits() -> dict[str, int]:
    """Bytes of each limit that is set."""
    found = {name: resource.getrlimit(number)[0] for name, number in LIMITS.items()}
    return {name: n for name, n in found.items() if n != resource.RLIM_INFINITY}


def for_import(package: str) -> None:
    """See to it that a package (`NEEDED_BYTES`) can be imported.

    Raises
    ------
    OutOfMemory
    """
    if package not in sys.modules:
        with _taken(NEEDED_BYTES[package], f"load {package}"):
            pass


def spare() -> AbstractContextManager[None]:
    """Keep what it takes to tell of an error until the context is left.

    Raises
    ------
    OutOfMemory
    """
    return _taken(SPARE_BYTES, "start")


@contextmanager
def _taken(size: int, doing: str) -> Iterator[None]:
    """Take so much of what the limits leave, where any is set; it is never touched."""
    if not limits():
        yield
        return
    with needed(doing):
        room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with room:
        yield


@contextmanager
def needed(doing: str) -> Iterator[None]:
    """Make `OutOfMemory` of memory that is refused meanwhile.

    Parameters
    ----------
    doing : str
        As in "no memory to ...".
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, DedupError) or not is_refusal(e):
            raise
        raise refusal(doing) from e


def refusal(doing: str) -> OutOfMemory:
    """The error: what failed, why, and the way out."""
    fewer = "scan fewer processes"
    if found := limits():
        set_to = " and ".join(f"{n / MIB:,.0f} MiB (`{name}`)" for name, n in found.items())
        more = " and ".join(f"`{name} unlimited`" for name in found)
        if (least := min(found.values())) >= KEEPS_LESS_FROM:
            fewer = f"let the scan keep less (`--memory {least // 2 // MIB}M`), or {fewer}"
        return OutOfMemory(
            f"no memory to {doing}: this process is limited to {set_to}",
            f"allow more: {more}; or {fewer}",
        )
    from dedup.kernel import meminfo

    free = meminfo.available_bytes() // MIB
    keep = max(LEAST_MIB, free // 2)
    return OutOfMemory(
        f"no memory to {doing}: the host has {free:,} MiB left",
        f"let the scan keep less (`--memory {keep}M`), or {fewer}",
    )
