"""The order-exact simulator: ksmd's scan of one content, mapping by mapping.

For contents where order decides: frames shared by fork beyond `max_page_sharing`, pinned pages.
Source: mm/ksm.c, cmp_and_merge_page().
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one content ends, once scans change nothing more."""

    nodes: int
    """Stable nodes."""
    merged: list[bool]
    """For each mapping, whether it is on a stable node."""
    unshared: int
    """Mappings in the unstable tree: 0 or 1."""
    volatile: int
    """Mappings in neither."""


def simulate(
    frames: Sequence[int],
    is_ksm: Sequence[bool],
    max_page_sharing: int,
    pinned: frozenset[int] = frozenset(),
) -> Outcome:
    """Scan the mappings of one content until nothing changes.

    Parameters
    ----------
    frames : sequence of int
        Frame of each mapping, in scan order.
    is_ksm : sequence of bool
        Whether that frame is a KSM page already.
    max_page_sharing : int
        Mappings that a stable node takes by merging. A fork of a merged page goes beyond.
    pinned : frozenset of int, optional
        Frames with references besides their mappings: merging fails on them.

    Returns
    -------
    Outcome
    """
    frame = list(frames)
    on: list[int | None] = [None] * len(frame)  # the node (by its frame) of each mapping
    length: dict[int, int] = {}
    # KSM pages count all their mappings from the start: ksmd appends those of a fork in a first
    # scan, in which it only remembers the checksums of the others.
    for m, (f, k) in enumerate(zip(frame, is_ksm, strict=True)):
        if k:
            on[m] = f
            length[f] = length.get(f, 0) + 1
    ksm = set(length)
    room = [f for f, n in length.items() if n < max_page_sharing]
    in_tree: int | None = None
    changed = True
    while changed:
        changed = False
        in_tree = None
        for m, f in enumerate(frame):
            if f in ksm:
                if on[m] is None:
                    # Its page table points to a KSM page already: appended, whatever its length.
                    on[m] = f
                    length[f] += 1
                    changed = True
                continue
            while room and length[room[-1]] >= max_page_sharing:
                room.pop()
            if room:
                node = room[-1]
                if f not in pinned:
                    frame[m], on[m] = node, node
                    length[node] += 1
                    changed = True
                continue
            if in_tree is None:
                in_tree = m
                continue
            partner = frame[in_tree]
            if partner == f or f in pinned or partner in pinned:
                continue
            # Both become a new node, whose frame is that of the page being scanned.
            ksm.add(f)
            length[f] = 2
            room.append(f)
            on[m] = on[in_tree] = f
            frame[in_tree] = f
            in_tree = None
            changed = True
    merged = [n is not None for n in on]
    unshared = int(in_tree is not None)
    return Outcome(
        nodes=len(length),
        merged=merged,
        unshared=unshared,
        volatile=len(frame) - sum(merged) - unshared,
    )
