"""What a prediction is: the rules it follows, and its figures, or ranges of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

RMAP_ITEM_BYTES: Final = 64
STABLE_NODE_BYTES: Final = 64
"""Slab sizes of struct ksm_rmap_item and ksm_stable_node on 64-bit kernels."""

FIELDS: Final = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "ksm_zero_pages",
    "stable_node_chains",
    "stable_node_dups",
    "general_profit",
    "frames_freed",
    "saved_bytes",
    "thp_split",
)
PROCESS_FIELDS: Final = (
    "ksm_rmap_items",
    "ksm_zero_pages",
    "ksm_merging_pages",
    "ksm_process_profit",
)


@dataclass(frozen=True, slots=True)
class Rules:
    """The tunables that decide what merges."""

    max_page_sharing: int = 256
    use_zero_pages: bool = False
    order_known: bool = False
    """Whether ksmd comes by the processes in the order of `Pages.processes`."""
    merge_across_nodes: bool = True
    """Off: only copies on the same NUMA node merge (`Pages.nodes`)."""


@dataclass(slots=True)
class Range:
    """A figure that may not be one number."""

    low: int = 0
    high: int = 0

    def add(self, low: int, high: int | None = None) -> None:
        """Add a number, or a range."""
        self.low += int(low)
        self.high += int(low if high is None else high)

    @property
    def value(self) -> int | None:
        """The number, None where it is a range."""
        return self.low if self.low == self.high else None


@dataclass(frozen=True, slots=True)
class ProcessPrediction:
    """ksm_stat of one process once ksmd has converged; pages, profit in bytes."""

    ksm_rmap_items: int | None
    ksm_zero_pages: int | None
    ksm_merging_pages: int | None
    ksm_process_profit: int | None
    bounds: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Where the frames freed come from: pages, adding up to about `frames_freed`.

    Mappings, where frame numbers are hidden.
    """

    zero_pages: int
    """All-zero pages, those given back by splits of huge pages included."""
    within_processes: int
    """Other copies of a content inside one process."""
    across_processes: int
    """Other copies of a content in different processes."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The kernel's counters once ksmd has converged, smart scan off.

    Pages, but `general_profit` and `saved_bytes` in bytes and `thp_split` in huge pages. None
    where the result is not one number; `bounds` then has the lowest and the highest.
    """

    pages_shared: int | None
    pages_sharing: int | None
    pages_unshared: int | None
    pages_volatile: int | None
    ksm_zero_pages: int | None
    stable_node_chains: int | None
    stable_node_dups: int | None
    general_profit: int | None
    frames_freed: int | None
    saved_bytes: int | None
    thp_split: int | None
    bounds: dict[str, tuple[int, int]]
    processes: list[ProcessPrediction]
    breakdown: Breakdown
    metadata_bytes: int
    """Memory of rmap_items and stable nodes."""
