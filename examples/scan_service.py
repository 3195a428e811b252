"""A running service scanned: ``python examples/scan_service.py NAME`` (default: python3).

Without root it can scan your own processes; frame numbers are hidden then, so that some figures
are ranges.
"""

from __future__ import annotations

import sys

import dedup
from dedup.kernel.processes import Choice
from dedup.scanning import choose


def main(name: str = "python3*") -> int:
    """Scan all processes of a name."""
    try:
        scan = dedup.scan(choose(Choice(names=(name,))))
    except dedup.DedupError as e:
        print(f"{e}; {e.hint}", file=sys.stderr)
        return e.exit_status
    p = scan.prediction
    for process, figures in zip(scan.pages.processes, p.processes, strict=True):
        print(
            f"{process.name} (pid {process.id.pid}): {figures.ksm_rmap_items} pages, "
            f"{figures.ksm_merging_pages} would merge"
        )
    freed = p.frames_freed if p.frames_freed is not None else p.bounds["frames_freed"]
    print(f"together KSM would free {freed} frames")
    for skipped in scan.pages.skipped:
        print(f"left out: {skipped.what}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
