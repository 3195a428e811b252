"""Apply, or undo, and die by SIGKILL at a named step: ``python -m tests.killed STEP HOW PID...``.

``HOW`` is `whole`, `ranges` or `undo`. It ends with status 3 where the step does not come.
"""

from __future__ import annotations

import os
import signal
import sys

from dedup.change.applied import Applied
from dedup.change.apply import apply
from dedup.change.plan import Wish
from dedup.change.undo import undo
from dedup.kernel.lock import HostLock
from dedup.scanning import Plan
from dedup.sources.live import Options

APPLY_STEPS = ("lock", "choose", "scan", "begin", "record", "mark", "marked", "tunables", "wait",
               "verify", "finish", "end")  # fmt: skip
"""Of `whole`; with `ranges` there are some more between `scan` and `begin`."""
RANGES_STEPS = ("ranges", "scan ranges")
UNDO_STEPS = ("undo: record", "undo: process", "undo: recorded")


def main(wanted: str, how: str, pids: list[int]) -> int:
    """Do it."""

    def step(name: str) -> None:
        if name == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    if how == "undo":
        with HostLock():
            undo(Applied(), step=step)
        return 3
    plan = Plan(options=Options(), interval_seconds=0.05)
    wish = Wish(how="whole" if how == "whole" else "ranges")
    apply(pids, plan, wish, start_ksmd=True, step=step)
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], [int(word) for word in sys.argv[3:]]))
