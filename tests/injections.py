"""Many injections over programs in every kind of wait: ``python -m tests.injections --count 2000``.

Prints a table by kind of wait. Fails if a program died or saw an interruption.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field

from dedup.kernel import inject
from dedup.kernel.inject import PR_GET_MEMORY_MERGE, PR_SET_MEMORY_MERGE, Stop
from dedup.kernel.processes import Handle
from tests.waits import KINDS, Wait

AT_ONCE = 10
"""Kinds of waits whose programs run at the same time."""


@dataclass
class Outcome:
    """What was done to one kind of wait, and what its programs said."""

    stops: list[Stop] = field(default_factory=list)
    saw: list[str] = field(default_factory=list)


def injections(count: int, timed_ms: int = 2500) -> dict[tuple[str, int], Outcome]:
    """Put `count` calls, in stops of their own, into programs threaded and not; by kind, threads.

    All programs wait at once; mergeable is switched on and off in turn and asked for.
    """
    outcomes: dict[tuple[str, int], Outcome] = defaultdict(Outcome)
    share = -(-count // -(-len(KINDS) // AT_ONCE))
    for first in itertools.cycle(range(0, len(KINDS), AT_ONCE)):
        left = min(share, count - sum(len(o.stops) for o in outcomes.values()))
        if left <= 0:
            return outcomes
        begin = time.monotonic()
        with ExitStack() as stack:
            waits = [
                stack.enter_context(Wait(kind, threads, timed_ms))
                for kind in KINDS[first : first + AT_ONCE]
                for threads in (1, 3)
            ]
            turns = [(w, stack.enter_context(Handle(w.pid)), on) for on in (1, 0) for w in waits]
            # Up to the moment when the first of the timed ones is over.
            for wait, handle, on in itertools.islice(itertools.cycle(turns), left):
                if time.monotonic() - begin > timed_ms / 1000 - 0.5:
                    break
                with inject.Injection(handle, deadline_seconds=5) as injection:
                    calls = [
                        injection.prctl(PR_SET_MEMORY_MERGE, on),
                        injection.prctl(PR_GET_MEMORY_MERGE, 0),
                    ]
                    assert injection.run(calls) == [0, on], (wait.kind, wait.threads)
                    outcomes[wait.kind, wait.threads].stops += injection.stops
            for wait in waits:
                outcomes[wait.kind, wait.threads].saw.append(wait.finish())
    raise AssertionError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    count = parser.parse_args().count
    outcomes = injections(count)
    print(
        f"{'wait':20} {'threads':>7} {'stops':>6} {'median ms':>10} {'most ms':>9} {'healing':>8}"
    )
    bad = []
    for (kind, threads), outcome in sorted(outcomes.items()):
        times = [s.stopped_seconds * 1e3 for s in outcome.stops]
        healing = sum(s.self_healing for s in outcome.stops)
        print(
            f"{kind:20} {threads:7} {len(times):6} {statistics.median(times):10.3f} "
            f"{max(times):9.3f} {healing:4}/{len(times)}"
        )
        bad += [f"{kind}, {threads} threads: {saw}" for saw in outcome.saw if saw != "ok"]
    stops = [s for o in outcomes.values() for s in o.stops]
    times = [s.stopped_seconds * 1e3 for s in stops]
    windows = [s.window_seconds * 1e6 for s in stops if s.window_seconds]
    programs = sum(len(o.saw) for o in outcomes.values())
    print(
        f"{len(stops)} injections into {programs} programs: stopped {statistics.median(times):.3f} "
        f"ms in the median, {max(times):.3f} ms at the most; {len(bad)} programs saw something"
    )
    if windows:
        print(
            f"a window in {len(windows)}: {statistics.median(windows):.0f} us in the median, "
            f"{max(windows):.0f} us at the most"
        )
    print(*bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
