"""ksmd's scan, spelt out: an oracle for `dedup.model`, sharing no code with it.

Everything is an object that the kernel has too: frames, huge pages, mappings with their rmap_item,
stable nodes, the two trees. A scan walks all mappings in order and does to each what
cmp_and_merge_page() of mm/ksm.c does; scans go on until nothing moves. Slow, and meant to be.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ZERO = 0
"""The content of an all-zero page; all other contents are other numbers."""

PAGE = 4096
ITEM_BYTES = 64


@dataclass(eq=False)
class HugePage:
    """A huge page: split as a whole or not at all."""

    frames: list[Frame] = field(default_factory=list)
    is_split: bool = False

    @property
    def pinned(self) -> bool:
        """A reference to one page is one to the whole."""
        return any(f.pinned for f in self.frames)


@dataclass(eq=False)
class Frame:
    """A frame of physical memory; its content never changes here."""

    content: int
    huge: HugePage | None = None
    node: Node | None = None
    """Its stable node: set means that it is a KSM page."""
    pinned: bool = False
    """It has references besides its mappings."""
    numa: int = 0
    """Its NUMA node, where nodes merge apart."""

    @property
    def key(self) -> tuple[int, int]:
        """What it must share with another page to merge."""
        return self.numa, self.content

    @property
    def compound(self) -> HugePage | None:
        """The huge page that it belongs to still."""
        return self.huge if self.huge is not None and not self.huge.is_split else None


SHARED_ZERO = Frame(ZERO)
"""The shared zero page: no anonymous page, so no candidate."""


@dataclass(eq=False)
class Node:
    """A node of the stable tree, or one of the duplicates in a chain."""

    frame: Frame
    items: set[Mapping] = field(default_factory=set)


@dataclass(eq=False)
class Mapping:
    """A page table entry, and its rmap_item."""

    process: int
    address: int
    frame: Frame
    volatile: bool = False
    """Rewritten between any two visits."""
    locked: bool = False
    followed: bool = False
    """There is an rmap_item."""
    checksum: int | None = None
    node: Node | None = None


@dataclass(frozen=True)
class ProcessCounts:
    """/proc/PID/ksm_stat."""

    ksm_rmap_items: int
    ksm_zero_pages: int
    ksm_merging_pages: int
    ksm_process_profit: int


@dataclass(frozen=True)
class Counts:
    """/sys/kernel/mm/ksm, and what the counters don't say."""

    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    pages_volatile: int
    ksm_zero_pages: int
    stable_node_chains: int
    stable_node_dups: int
    general_profit: int
    frames_freed: int
    thp_split: int
    processes: list[ProcessCounts]


class Ksmd:
    """The scanner.

    Parameters
    ----------
    mappings
        In the order in which it comes by.
    processes
        How many.
    max_page_sharing, use_zero_pages
        The tunables.
    zero_pages
        Pages of each process on the shared zero page already.
    """

    def __init__(
        self,
        mappings: list[Mapping],
        processes: int,
        max_page_sharing: int,
        *,
        use_zero_pages: bool,
        zero_pages: list[int] | None = None,
    ) -> None:
        self.mappings = mappings
        self.limit = max_page_sharing
        self.use_zero_pages = use_zero_pages
        self.zero_pages = list(zero_pages or [0] * processes)
        self.stable: dict[tuple[int, int], list[Node]] = {}
        self.unstable: dict[tuple[int, int], Mapping] = {}
        self.frames_before = self._frames()
        self.huge_before = {f.compound for f in self.frames_before} - {None}
        for m in mappings:
            node = m.frame.node
            if node is not None:
                # Merged in earlier scans: its rmap_item hangs on the node.
                m.followed, m.node = True, node
                node.items.add(m)
                nodes = self.stable.setdefault(m.frame.key, [])
                if node not in nodes:
                    nodes.append(node)

    def _frames(self) -> set[Frame]:
        return {m.frame for m in self.mappings} - {SHARED_ZERO}

    # -- scans -----------------------------------------------------------------------------------

    def run(self) -> Counts:
        """Scan until two scans in a row change nothing."""
        before: list[object] = []
        still = 0
        for _ in range(10 * len(self.mappings) + 10):
            self.scan()
            mapped: dict[Frame, int] = {}
            for m in self.mappings:
                mapped[m.frame] = mapped.get(m.frame, 0) + 1
            # Not the frame itself: a merge that fails half way gives a new one in each scan.
            now: list[object] = [(*self._state(m), mapped[m.frame]) for m in self.mappings]
            still = still + 1 if now == before else 0
            if still == 2:
                return self.counts()
            before = now
        raise AssertionError("ksmd does not come to rest")

    def _state(self, m: Mapping) -> tuple[object, ...]:
        f = m.frame
        return (f is SHARED_ZERO, f.compound, f.pinned, m.node, m.followed, self._in_tree(m))

    def _in_tree(self, m: Mapping) -> bool:
        return self.unstable.get(m.frame.key) is m

    def scan(self) -> None:
        """One full scan."""
        self.unstable = {}
        for m in self.mappings:
            if m.frame is SHARED_ZERO:
                m.followed, m.node = False, None
                continue
            m.followed = True
            self.visit(m)

    def visit(self, m: Mapping) -> None:
        """cmp_and_merge_page()."""
        page = m.frame
        if page.node is not None:
            if m.node is page.node:
                return
        else:
            if m.volatile or m.checksum != page.content:
                m.checksum = page.content
                return
            if self.use_zero_pages and page.content == ZERO and self.merge_one(m, SHARED_ZERO):
                self.zero_pages[m.process] += 1
                return
        node = page.node or self.find_stable(page)
        if node is not None:
            if self.merge_one(m, node.frame, page):
                self.append(m, node)
            return
        other = self.unstable.get(page.key)
        if other is None:
            self.unstable[page.key] = m
            return
        tree_page = other.frame
        if tree_page is SHARED_ZERO or tree_page is page:
            return
        self.merge_two(m, page, other, tree_page)

    def find_stable(self, page: Frame) -> Node | None:
        """stable_tree_search(): a node that may take one more."""
        for node in self.stable.get(page.key, []):
            if 0 < len(node.items) < self.limit:
                return node
        return None

    def append(self, m: Mapping, node: Node) -> None:
        """stable_tree_append()."""
        m.node = node
        node.items.add(m)

    # -- merging ---------------------------------------------------------------------------------

    def merge_one(
        self,
        m: Mapping,
        onto: Frame | None,
        page: Frame | None = None,
        *,
        held: Frame | None = None,
    ) -> bool:
        """try_to_merge_one_page(): map `m` to the frame `onto`; None makes its own a KSM page.

        `held` is another frame to which ksmd holds a reference at this time.
        """
        page = page or m.frame
        if page is onto:
            return True  # a KSM page, forked
        huge = page.compound
        if huge is not None:
            if held is not None and held.compound is huge:
                return False  # two references to the same huge page: it can't be split
            if huge.pinned:
                return False
            self.split(huge)
        if m.frame is not page or page.pinned:
            return False  # gone to the shared zero page by the split; or other references
        if onto is not None:
            m.frame = onto
        return True

    def merge_two(self, m: Mapping, page: Frame, other: Mapping, tree_page: Frame) -> None:
        """try_to_merge_two_pages(), and what follows it."""
        same_huge = page.compound is not None and page.compound is tree_page.compound
        if self.merge_one(m, None, page, held=tree_page):
            if self.merge_one(other, page, tree_page, held=page):
                node = Node(page)
                page.node = node
                self.stable.setdefault(page.key, []).append(node)
                del self.unstable[page.key]
                self.append(other, node)
                self.append(m, node)
                return
            # break_cow(). The old frame stays marked a KSM page without a node: for the others
            # who map it, page_address_in_vma() fails ever after, and so does every merge.
            page.pinned = True
            m.frame = Frame(page.content, numa=page.numa)
        elif same_huge and page.compound is not None and not page.compound.pinned:
            self.split(page.compound)

    def split(self, huge: HugePage) -> None:
        """split_huge_page(): unused subpages are mapped to the shared zero page.

        Not those of a huge page that anyone has locked: PG_mlocked is the folio's.
        """
        huge.is_split = True
        inside = [m for m in self.mappings if m.frame.huge is huge]
        if any(m.locked for m in inside):
            return
        for m in inside:
            if m.frame.content == ZERO:
                m.frame = SHARED_ZERO

    # -- counting --------------------------------------------------------------------------------

    def counts(self) -> Counts:
        """The counters as they stand."""
        nodes = [n for several in self.stable.values() for n in several if n.items]
        on_nodes = sum(len(n.items) for n in nodes)
        followed = sum(m.followed for m in self.mappings)
        unshared = sum(m.followed and m.node is None for m in self.unstable.values())
        chains = [n for n in self.stable.values() if len(n) > 1]
        zero = sum(self.zero_pages)
        return Counts(
            pages_shared=len(nodes),
            pages_sharing=on_nodes - len(nodes),
            pages_unshared=unshared,
            pages_volatile=followed - on_nodes - unshared,
            ksm_zero_pages=zero,
            stable_node_chains=len(chains),
            stable_node_dups=sum(len(n) for n in chains),
            general_profit=(on_nodes - len(nodes) + zero) * PAGE - followed * ITEM_BYTES,
            frames_freed=len(self.frames_before) - len(self._frames()),
            thp_split=sum(h.is_split for h in self.huge_before if h is not None),
            processes=[self._process(p) for p in range(len(self.zero_pages))],
        )

    def _process(self, p: int) -> ProcessCounts:
        mine = [m for m in self.mappings if m.process == p]
        items = sum(m.followed for m in mine)
        merging = sum(m.node is not None for m in mine)
        zero = self.zero_pages[p]
        return ProcessCounts(items, zero, merging, (merging + zero) * PAGE - items * ITEM_BYTES)
