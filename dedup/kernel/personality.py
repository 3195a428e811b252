"""Address space randomisation, switched off for ourselves and for what we start.

Source: personality(2), ADDR_NO_RANDOMIZE; fs/exec.c reads it at each exec.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from dedup import _core
from dedup.errors import NotPermitted

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDR_NO_RANDOMIZE: Final = 0x0040000
ASK: Final = 0xFFFFFFFF


def no_randomize() -> int:
    """Have the kernel place the mappings of the next program, and its children's, without chance.

    Returns
    -------
    int
        The personality before.

    Raises
    ------
    NotPermitted
        A seccomp filter forbids it, as that of most container runtimes does.
    """
    try:
        before = _core.personality(ASK)
        _core.personality(before | ADDR_NO_RANDOMIZE)
        kept = _core.personality(ASK) & ADDR_NO_RANDOMIZE
    except OSError as e:
        raise NotPermitted(
            f"randomisation can't be switched off: {e.strerror} (a seccomp filter?)",
            "leave out --no-randomize, or allow personality(2) in the container's seccomp profile",
        ) from e
    if not kept:
        raise NotPermitted(
            "randomisation can't be switched off: personality(2) had no effect here",
            "leave out --no-randomize",
        )
    return before


@contextmanager
def not_randomized() -> Iterator[None]:
    """The same for what is started meanwhile.

    Raises
    ------
    NotPermitted
    """
    before = no_randomize()
    try:
        yield
    finally:
        _core.personality(before)
