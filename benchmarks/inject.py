"""Redis servers made mergeable while they serve: ``python -m benchmarks.inject`` (as root).

Each server has redis-benchmark at work, and a client that checks every answer over one connection.
Prints how long the servers were stopped; fails if a request failed or a connection broke.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack

from benchmarks.serving import serving
from dedup.kernel import inject
from dedup.kernel.processes import Handle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--times", type=int, default=30, help="on and off again so many times")
    options = parser.parse_args()
    stopped: list[float] = []
    plain = 0
    with serving(options.servers) as servers, ExitStack() as stack:
        handles = [stack.enter_context(Handle(pid)) for pid in servers.pids]
        for _ in range(options.times):
            for on in (True, False):
                for handle in handles:
                    for stop in inject.merge_any(handle, on, deadline_seconds=10):
                        stopped.append(stop.stopped_seconds * 1e3)
                        plain += not stop.self_healing
    print(servers.summary())
    print(
        f"{len(stopped)} stops of {statistics.median(stopped):.3f} ms in the median, "
        f"{max(stopped):.3f} ms at the most; {plain} not self-healing"
    )
    for problem in servers.problems:
        print("not harmless:", problem)
    return 1 if servers.problems else 0


if __name__ == "__main__":
    sys.exit(main())
