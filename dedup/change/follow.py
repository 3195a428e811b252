"""Make processes mergeable that appear later, as in a container that starts others."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from dedup.change import trust
from dedup.change.act import Chosen, Marks
from dedup.change.tunables import host_locked
from dedup.change.undo import program_of
from dedup.errors import Busy, DedupError, NoSuchProcess
from dedup.kernel import inject, ksm
from dedup.kernel.arrivals import Arrivals
from dedup.kernel.processes import Handle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dedup.change.plan import Wish
    from dedup.kernel.processes import Info

INTERVAL_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Followed:
    """A process that appeared."""

    pid: int
    name: str
    outcome: Literal["marked", "already", "left"]
    why: str = ""
    """Why it was left."""


def follow(
    find: Callable[[], list[int]],
    already: Iterable[Info],
    wish: Wish,
    tell: Callable[[Followed], None],
    *,
    interval_seconds: float = INTERVAL_SECONDS,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Make whole each process that `find` newly gives, until told to stop.

    Forks of marked ones are mergeable already. One that would bring a second trust domain is left,
    as is a likely holder of secrets. Each is recorded as by `dedup apply`: `--undo` takes it back.

    Parameters
    ----------
    find : callable
        See `dedup.kernel.arrivals`.
    already : iterable of Info
        Processes that are no news.
    wish : Wish
    tell : callable
        Told of each process.
    interval_seconds : float
    stop : callable, optional
        Asked before each look.

    Raises
    ------
    NotPermitted, OutputFailed
        The record can't be written.
    """
    arrivals = Arrivals(find, already)
    waiting: list[Info] = []
    while not stop():
        waiting += [a.info for a in arrivals.poll()]
        waiting = [info for info in waiting if not _mark(info, wish, tell)]
        time.sleep(interval_seconds)


def _mark(info: Info, wish: Wish, tell: Callable[[Followed], None]) -> bool:
    """Mark one; False where another dedup is at work and it has to wait."""

    def left(why: str) -> bool:
        tell(Followed(info.id.pid, info.name, "left", why))
        return True

    try:
        with host_locked(), Handle(info.id.pid) as handle:
            if handle.id != info.id:
                return True  # ended, and its pid is another's: that one is an arrival, too
            chosen = Chosen(handle.id, handle.info.name, program_of(handle.info))
            counters = ksm.process_counters(handle)
            if counters is not None and counters.ksm_merge_any:
                tell(Followed(info.id.pid, info.name, "already"))
                return True
            if (what := trust.secrets_of(handle.info.name)) and not wish.secret_holders:
                return left(f"it likely holds secrets ({what})")
            if not wish.accept_side_channels:
                trust.require_one(trust.members([handle.pid], wish.domain), wish.domain)
            inject.require_possible(handle, suspend_seccomp=wish.suspend_seccomp)
            with Marks(suspend_seccomp=wish.suspend_seccomp) as marks:
                marks.mark([chosen], None)
    except Busy:
        return False
    except NoSuchProcess:
        return True  # ended meanwhile
    except DedupError as e:
        return left(e.message)
    if marks.failed:
        return left(marks.failed[0].error.message)
    tell(Followed(info.id.pid, info.name, "marked"))
    return True
