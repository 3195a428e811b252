"""The order-exact simulators: ksmd's scan, mapping by mapping.

`simulate` for one content where order decides: frames shared by fork beyond `max_page_sharing`,
pinned pages. `Scanner` for several that huge pages tie together.
Source: mm/ksm.c, cmp_and_merge_page().
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

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


ON_ZERO_PAGE: Final = -1
"""The frame of what is mapped to the shared zero page."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Mappings of several contents, in scan order; huge pages tie them together."""

    content: Sequence[int]
    frame: Sequence[int]
    huge: Sequence[int]
    """The huge page of each, -1 where it is in none."""
    is_ksm: Sequence[bool]
    zero: frozenset[int]
    """Contents that are all zero."""
    locked: frozenset[int]
    """Huge pages whose zero pages a split leaves in place (mlock)."""


@dataclass(slots=True)
class Ending:
    """Where everything is, once scans change nothing more."""

    frame: list[int]
    """Frame of each mapping, `ON_ZERO_PAGE` for the shared zero page; others may be new ones."""
    on_node: list[bool]
    placed: list[bool]
    """Mapped to the shared zero page by ksmd itself, and counted."""
    nodes: dict[int, list[int]]
    """Frames of the stable nodes, by content."""
    in_tree: set[int]
    """Mappings in the unstable tree."""
    split: set[int]
    """Huge pages that were split."""
    cut: bool
    """A page in the unstable tree went to the shared zero page."""


class Scanner:
    """ksmd's scan of `Memory`, mapping by mapping, splits of huge pages with it.

    Sources: mm/ksm.c, cmp_and_merge_page, try_to_merge_one_page, try_to_merge_two_pages;
    mm/migrate.c, try_to_map_unused_to_zeropage.

    Parameters
    ----------
    memory : Memory
    max_page_sharing : int
    use_zero_pages : bool
    """

    def __init__(self, memory: Memory, max_page_sharing: int, *, use_zero_pages: bool) -> None:
        self.content, self.huge = memory.content, list(memory.huge)
        self.zero, self.locked = memory.zero, memory.locked
        self.limit, self.use_zero_pages = max_page_sharing, use_zero_pages
        self.frame = list(memory.frame)
        n = len(self.frame)
        self.placed = [False] * n
        self.split: set[int] = set()
        self.huge_of = {f: h for f, h in zip(self.frame, self.huge, strict=True) if h >= 0}
        self.zero_inside: dict[int, list[int]] = {}
        for m, h in enumerate(self.huge):
            if h >= 0 and self.content[m] in self.zero:
                self.zero_inside.setdefault(h, []).append(m)
        self.length: dict[int, int] = {}
        self.nodes: dict[int, list[int]] = {}
        self.on: list[int | None] = [None] * n
        for m, (f, k) in enumerate(zip(self.frame, memory.is_ksm, strict=True)):
            if k:
                if f not in self.length:
                    self.nodes.setdefault(self.content[m], []).append(f)
                self._append(m, f)
        self.room = {content: list(nodes) for content, nodes in self.nodes.items()}
        # A merge that failed half way leaves a frame marked, and so never to be merged.
        self.spoilt: set[int] = set()
        self.tree: dict[int, int] = {}
        self.changed = False
        # ksmd gives a search up where it comes by a page in the tree that is none any more
        # (get_mergeable_page): so it goes for all contents beyond it, till the scan ends.
        self.cut = False
        self._fresh = min(-2, *self.frame, 0) if n else -2

    def run(self) -> Ending:
        """Scan until two scans in a row change nothing."""
        still = 0
        while still < 2:
            tree = self.tree
            self.scan()
            still = 0 if self.changed or self.tree != tree else still + 1
        return Ending(
            self.frame,
            [n is not None for n in self.on],
            self.placed,
            self.nodes,
            set(self.tree.values()),
            self.split,
            self.cut,
        )

    def scan(self) -> None:
        """One full scan; the first of all, which only remembers checksums, has been."""
        self.changed = False
        self.tree = {}
        length, frame = self.length, self.frame
        for m, f in enumerate(frame):
            if f == ON_ZERO_PAGE:
                continue
            if f in length:
                if self.on[m] is None:
                    self._append(m, f)
                continue
            self._visit(m, f, self.content[m])

    def _visit(self, m: int, f: int, content: int) -> None:
        if self.use_zero_pages and content in self.zero and self._to_zero_page(m, f):
            return
        node = self._node_with_room(content)
        if node is not None:
            if self._movable(m, f):
                self.frame[m] = node
                self._append(m, node)
            return
        other = self.tree.get(content)
        if other is None:
            self.tree[content] = m
            self.cut |= self.frame[m] == ON_ZERO_PAGE
            return
        partner = self.frame[other]
        if partner not in {ON_ZERO_PAGE, f}:
            self._pair(m, f, other, partner, content)

    def _node_with_room(self, content: int) -> int | None:
        nodes = self.room.get(content)
        while nodes:
            if self.length[nodes[-1]] < self.limit:
                return nodes[-1]
            nodes.pop()  # full for good: nobody leaves
        return None

    def _append(self, m: int, node: int) -> None:
        self.on[m] = node
        self.length[node] = self.length.get(node, 0) + 1
        self.changed = True

    def _to_zero_page(self, m: int, f: int) -> bool:
        if not self._movable(m, f):
            return False
        self.frame[m] = ON_ZERO_PAGE
        self.placed[m] = self.changed = True
        return True

    def _whole(self, f: int) -> int | None:
        """The huge page of a frame, if it is whole."""
        huge = self.huge_of.get(f)
        return None if huge is None or huge in self.split else huge

    def _movable(self, m: int, f: int, held: int | None = None) -> bool:
        """try_to_merge_one_page(): whether frame f of mapping m can be merged.

        Splits its huge page; not with `held` in it, a frame to which ksmd has a reference too.
        """
        huge = self._whole(f)
        if huge is not None:
            if held is not None and self._whole(held) == huge:
                return False
            self._split(huge)
        return self.frame[m] == f and f not in self.spoilt

    def _split(self, huge: int) -> None:
        self.split.add(huge)
        self.changed = True
        if huge not in self.locked:
            for m in self.zero_inside.get(huge, ()):
                if self.huge_of.get(self.frame[m]) == huge:
                    self.frame[m] = ON_ZERO_PAGE
                    self.cut |= self.tree.get(self.content[m]) == m

    def _pair(self, m: int, f: int, other: int, partner: int, content: int) -> None:
        """try_to_merge_two_pages(): both on a new node, whose frame is that of page m."""
        if not self._movable(m, f, held=partner):
            huge = self._whole(f)
            if huge is not None and huge == self._whole(partner):
                self._split(huge)
            return
        if self._movable(other, partner, held=f):
            self.nodes.setdefault(content, []).append(f)
            self.room.setdefault(content, []).append(f)
            self.frame[other] = f
            del self.tree[content]
            self._append(other, f)
            self._append(m, f)
            return
        # break_cow(): page m gets a new frame; whoever else maps the old one never merges again.
        self.spoilt.add(f)
        self._fresh -= 1
        self.frame[m] = self._fresh
