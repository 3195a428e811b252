"""What KSM would save in arrays of this process. Needs no root.

``python examples/own_memory.py``
"""

from __future__ import annotations

import numpy as np

import dedup


def main() -> None:
    """Make three arrays with known duplicates, and scan them in place."""
    rng = np.random.default_rng()
    table = rng.integers(0, 256, (2000, 4096), dtype=np.uint8)
    copy = table.copy()
    blank = np.empty((500, 4096), np.uint8)
    blank[:] = 0
    scan = dedup.scan(arrays=[table, copy, blank], interval_seconds=0.2)
    p = scan.prediction
    mib = scan.pages.page_size / 2**20
    pages = scan.scanned_pages
    print(f"scanned {pages * mib:.1f} MiB ({pages} pages) of our own memory in place")
    freed = p.frames_freed if p.frames_freed is not None else p.bounds["frames_freed"]
    print(f"KSM would free {freed} frames, of which {p.breakdown.zero_pages} of zero pages")
    print(f"pages_shared {p.pages_shared}, pages_sharing {p.pages_sharing}", end="; ")
    print(f"its notes would take {p.metadata_bytes / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
