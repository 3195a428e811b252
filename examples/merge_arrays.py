"""Arrays merged, and the merge held against the kernel's own counters.

``sudo python examples/merge_arrays.py``; without root it works where ksmd runs already.
"""

from __future__ import annotations

import numpy as np

import dedup


def main() -> None:
    """Merge two copies of a table for the time of a block."""
    table = np.random.default_rng().integers(0, 256, (5000, 4096), dtype=np.uint8)
    copy = table.copy()
    with dedup.merge(table, copy) as merged:
        print("predicted ", merged.predicted)
        print("actual    ", merged.actual)
        print("difference", merged.difference)
        print(f"ksmd took {merged.full_scans} full scans, {merged.seconds:.2f} s")
        copy[0, 0] ^= 1  # a write gives that page its own frame back
    print("unmerged again; the arrays are as they were:", bool((table[1:] == copy[1:]).all()))

    try:
        dedup.merge(table[:, ::2]).__enter__()
    except dedup.DedupError as e:
        print(f"refused: {e} ({e.hint})")


if __name__ == "__main__":
    main()
