"""The experiment that dedup grew out of: three zero pages merge, are written to, unmerge.

Run it as root: ``python examples/three_zero_pages.py``. It starts ksmd for the time of the
experiment and puts every tunable back.

The article that it comes from watched `pages_sharing` and reported 3. The kernel gives 2, and
`pages_shared` gives 1: three mappings share one frame, so one page is *shared*, and two mappings
are *sharing* it beyond the first. Two frames are saved, and 3 is the sum of the two counters.
"""

from __future__ import annotations

import mmap
import os

import dedup
from dedup.change import wait
from dedup.change.tunables import Tunables
from dedup.kernel.ksm import Ksm

PAGE = mmap.PAGESIZE


def main() -> None:
    """Merge, write, count."""
    ksm = Ksm()
    print("KSM on this host:", ksm.tunables())
    with (
        Tunables(ksm) as tunables,
        mmap.mmap(-1, 3 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages,
    ):
        tunables.set("smart_scan", 0)
        tunables.set("use_zero_pages", 0)
        tunables.set("sleep_millisecs", 4)
        pages[:] = bytes(3 * PAGE)
        pages.madvise(mmap.MADV_MERGEABLE)
        for step in range(4):
            if step:
                pages[(step - 1) * PAGE : step * PAGE] = os.urandom(PAGE)
            # ksmd rests while we predict, then merges.
            tunables.set("run", 0)
            prediction = dedup.scan([os.getpid()], scope="advised", interval_seconds=0.1).prediction
            tunables.set("run", 1)
            wait.converge(ksm, timeout_seconds=60)
            tunables.set("run", 0)
            counters = ksm.counters()
            print(
                f"{step} of 3 written to: "
                f"pages_shared {counters.pages_shared} (predicted {prediction.pages_shared}), "
                f"pages_sharing {counters.pages_sharing} (predicted {prediction.pages_sharing}), "
                f"pages_unshared {counters.pages_unshared} "
                f"(predicted {prediction.pages_unshared})"
            )
        pages.madvise(mmap.MADV_UNMERGEABLE)
        tunables.set("run", 1)
        wait.forgotten(ksm, timeout_seconds=60)


if __name__ == "__main__":
    main()
