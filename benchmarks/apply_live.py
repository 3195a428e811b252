"""`dedup apply` on redis servers that serve: ``python -m benchmarks.apply_live`` (as root).

Three plain redis-servers with the same keys serve redis-benchmark and a client that checks every
answer. They are made mergeable, verified against the prediction, undone, and their frames looked
at; so many times. Fails if a request failed, a connection broke, or a frame is still shared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving import serving
from dedup.change.tunables import Tunables
from dedup.kernel.ksm import Ksm

FRAME = (1 << 55) - 1
PAGE = 4096
KPF_KSM = 21


def dedup(*words: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "dedup", *words, "--json"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)


def ksm_frames(pid: int) -> int:
    """Pages of a process whose frame is still a KSM page."""
    found = 0
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap, \
            open("/proc/kpageflags", "rb", buffering=0) as kpageflags:  # fmt: skip
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            if line.endswith("[vsyscall]"):
                continue
            pagemap.seek(start // PAGE * 8)
            words = np.frombuffer(pagemap.read((end - start) // PAGE * 8), np.uint64)
            for word in words[(words >> np.uint64(63)) == 1].tolist():
                kpageflags.seek((word & FRAME) * 8)
                found += int.from_bytes(kpageflags.read(8), "little") >> KPF_KSM & 1
    return found


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
            merged = sum(map(ksm_frames, servers.pids))
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
            left = sum(map(ksm_frames, servers.pids))
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
