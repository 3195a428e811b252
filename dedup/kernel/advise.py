"""madvise and prctl on ourselves.

Source: madvise(2), prctl(2) PR_SET_MEMORY_MERGE (Linux 6.4).
"""

from __future__ import annotations

import errno
from typing import Final

from dedup import _core
from dedup.errors import NotPermitted, Unsupported

MADV_MERGEABLE: Final = 12
MADV_UNMERGEABLE: Final = 13
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15


def mergeable(start: int, length: int) -> None:
    """Mark our own pages mergeable; both in bytes, page aligned.

    The kernel answers "done" for memory that it then does not merge (shared, hugetlb): check
    VmFlags for `mg`.

    Raises
    ------
    Unsupported
        The kernel has no KSM.
    """
    _advise(start, length, MADV_MERGEABLE)


def unmergeable(start: int, length: int) -> None:
    """Unmark our own pages; merged ones get a frame of their own again.

    Raises
    ------
    Unsupported
        The kernel has no KSM.
    """
    _advise(start, length, MADV_UNMERGEABLE)


def _advise(start: int, length: int, advice: int) -> None:
    try:
        _core.madvise(start, length, advice)
    except OSError as e:
        if e.errno == errno.EINVAL:
            raise Unsupported(
                "the kernel refuses madvise(MADV_MERGEABLE): it has no KSM", ""
            ) from e
        raise


def set_merge_any(on: bool) -> None:
    """Make all compatible memory of this process mergeable, future and children's included.

    Raises
    ------
    Unsupported
        No such prctl (before Linux 6.4, or without KSM).
    NotPermitted
        A seccomp filter forbids it.
    """
    try:
        _core.prctl_memory_merge(int(on))
    except OSError as e:
        if e.errno == errno.EINVAL:
            raise Unsupported(
                "this kernel has no prctl(PR_SET_MEMORY_MERGE): it needs Linux 6.4 with KSM",
                "have the program call madvise(MADV_MERGEABLE) itself",
            ) from e
        if e.errno in {errno.EPERM, errno.EACCES}:
            raise NotPermitted(
                "prctl(PR_SET_MEMORY_MERGE) is forbidden here (a seccomp filter?)", ""
            ) from e
        raise


def merge_any() -> bool | None:
    """Whether all memory of this process is mergeable; None where the kernel has no such prctl.

    It asks, and changes nothing.

    Raises
    ------
    NotPermitted
        A seccomp filter forbids it.
    """
    try:
        return bool(_core.prctl_get_memory_merge())
    except OSError as e:
        if e.errno == errno.EINVAL:
            return None
        raise NotPermitted(f"prctl(PR_GET_MEMORY_MERGE) is forbidden here: {e.strerror}", "") from e
