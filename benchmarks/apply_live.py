"""`dedup apply` on redis servers that serve: ``python -m benchmarks.apply_live`` (as root).

Three plain redis-servers with the same keys serve redis-benchmark and a client that checks every
answer. They are made mergeable, verified against the prediction, undone, and their frames looked
at; so many times. Fails if a request failed, a connection broke, or a frame is still shared.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.serving import serving
from dedup.change.tunables import Tunables
from dedup.kernel.ksm import Ksm


def dedup(*words: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "dedup", *words, "--json"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)


def ksm_pages(pid: int) -> int:
    """Pages of a process that are KSM pages."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    return sum(int(kb) for kb in re.findall(r"^KSM: +(\d+) kB", text, re.MULTILINE)) // 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--keys", type=int, default=60_000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--pages-to-scan", type=int, default=1000)
    parser.add_argument("--how", default="whole", choices=["whole", "ranges", "auto"])
    options = parser.parse_args()
    stopped: dict[str, list[float]] = {"made mergeable": [], "undone": []}
    bad = 0
    with ExitStack() as stack:
        # A journal of its own: the command's is the host's.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tunables = stack.enter_context(Tunables(Ksm(), folder))
        tunables.set("pages_to_scan", options.pages_to_scan)
        servers = stack.enter_context(serving(options.servers, options.keys))
        words = [w for pid in servers.pids for w in ("--pid", str(pid))]
        for _ in range(options.times):
            status, done = dedup("apply", *words, "--how", options.how, "--start-ksmd")
            if done["kind"] == "error":
                print(done)
                return 1
            stopped["made mergeable"] += [m["stopped_seconds"] * 1e3 for m in done["marked"]]
            merged = sum(map(ksm_pages, servers.pids))
            predicted, actual = done["predicted"], done["actual"]
            print(
                f"status {status}: pages_sharing predicted {predicted['pages_sharing']} "
                f"{done['bounds'].get('pages_sharing', '')} actual {actual['pages_sharing']}, "
                f"difference {done['difference']['pages_sharing']:+d}, tolerance "
                f"{done['tolerance_pages']}, holds {done['holds']}; "
                f"{merged} KSM pages mapped; {done['seconds']:.1f} s"
            )
            _, undone = dedup("apply", "--undo")
            stopped["undone"] += [p["stopped_seconds"] * 1e3 for p in undone["processes"]]
            left = sum(map(ksm_pages, servers.pids))
            print(f"undone: {left} KSM pages mapped")
            for warning in done["warnings"]:
                print(" ", warning)
            bad += left + (status != 0)
    print(servers.summary())
    for what, times in stopped.items():
        print(
            f"{what}: the longest stop of each {statistics.median(times):.2f} ms in the median, "
            f"{max(times):.2f} ms at the most"
        )
    for problem in servers.problems:
        print("not harmless:", problem)
    return 1 if bad or servers.problems else 0


if __name__ == "__main__":
    sys.exit(main())
