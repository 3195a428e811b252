"""The running sums of a prediction: each part of the model adds its pages to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dedup.model.copies import ABSENT, NOT_STABLE
from dedup.model.prediction import (
    RMAP_ITEM_BYTES,
    STABLE_NODE_BYTES,
    Breakdown,
    Prediction,
    ProcessPrediction,
    Range,
)

if TYPE_CHECKING:
    from dedup.model.fate import Fate
    from dedup.model.pins import Widening
    from dedup.pages import I64, Bool, Census, Pages


class Totals:
    """The counters so far, each a range: what was added as one number leaves it one.

    Pages that can't merge yet are volatile from the start.

    Parameters
    ----------
    pages : Pages
    census : Census
        Of these pages.
    """

    def __init__(self, pages: Pages, census: Census) -> None:
        self.pages = pages
        n_processes = len(pages.processes)
        self.rmap_items = census.by_process(n_processes, ABSENT)
        """By process, those that leave KSM included."""
        zero = np.array([p.ksm_zero_pages for p in pages.processes], np.int64)
        self.shared, self.sharing, self.unshared, self.volatile = (Range() for _ in range(4))
        self.zero, self.chains, self.dups, self.freed = (Range() for _ in range(4))
        self.zero.add(int(zero.sum()))
        self.volatile.add(int(self.rmap_items.sum()) - census.of(NOT_STABLE))
        self.gone = Range()
        """rmap_items that leave KSM."""
        # By process, a column for the lowest and one for the highest.
        self.gone_by_process = np.zeros((n_processes, 2), np.int64)
        self.zero_by_process = np.repeat(zero[:, None], 2, axis=1)
        self.merging = np.zeros((n_processes, 2), np.int64)
        self.zero_saved = self.within_saved = self.across_saved = 0
        """Frames freed, as `Breakdown` has them."""

    def add_nodes(self, nodes: I64, n: I64, left: I64, mask: Bool) -> None:
        """Add up the contents of `mask`: nodes, mappings and those on no node, of each."""
        self.shared.add(int(nodes[mask].sum()))
        self.sharing.add(int((n - nodes - left)[mask].sum()))
        self.unshared.add(int(left[mask].sum()))
        chained = mask & (nodes >= 2)
        self.chains.add(int(np.count_nonzero(chained)))
        self.dups.add(int(nodes[chained].sum()))

    def add_outcome(self, n: int, outside: int, f: Fate, trees: int = 1) -> int:
        """Add up a content.

        Parameters
        ----------
        n : int
            Its mappings.
        outside : int
            Their frames that are mapped outside the scan too.
        f : Fate
        trees : int
            Stable trees between which they may be spread, one of a NUMA node each.

        Returns
        -------
        int
            Frames freed at the least.
        """
        self.shared.add(*f.nodes)
        self.sharing.add(*f.sharing(n))
        self.unshared.add(*f.unshared)
        self.volatile.add(*f.volatile)
        if trees > 1:
            self.chains.add(0, min(trees, f.nodes[1] // 2))
        else:
            self.chains.add(int(f.nodes[0] >= 2), int(f.nodes[1] >= 2))
        self.dups.add(*(k if k >= 2 else 0 for k in f.nodes))
        # A frame that is mapped outside the scan too stays there, unless it is a node's.
        low = f.freed[0] - outside
        high = max(low, f.freed[1] - max(0, outside - f.nodes[1]))
        if f.freed[0] >= 0:
            low, high = max(0, low), max(0, high)
        self.freed.add(low, high)
        return low

    def add_uncertain_merging(self, mine: I64, may_stay: I64, f: Fate) -> None:
        """Add up mappings by process, and those of them that may be on no node."""
        if f.exact:
            self.merging += (mine - may_stay)[:, None]
            return
        low = np.minimum(may_stay, f.out[1])
        if f.one_frame:
            # A process maps a frame once, unless it is a KSM page.
            low = np.minimum(low, 1)
        if f.out[0] == f.out[1] and np.count_nonzero(may_stay) == 1:
            mine = mine - np.where(may_stay > 0, f.out[0], 0)
            low = np.zeros_like(low)
        self.merging[:, 0] += mine - low
        self.merging[:, 1] += mine

    def widen(self, w: Widening) -> None:
        """Widen the figures by what pinned pages may change."""
        for figure, (down, up) in (
            (self.shared, w.shared), (self.sharing, w.sharing), (self.unshared, w.unshared),
            (self.volatile, w.volatile), (self.chains, w.chains), (self.dups, w.dups),
        ):  # fmt: skip
            figure.low, figure.high = max(0, figure.low - down), figure.high + up
        self.freed.add(-w.freed[0], w.freed[1])
        change = np.array(w.merging, np.int64).reshape(-1, 2)
        self.merging[:, 0] = np.maximum(0, self.merging[:, 0] - change[:, 0])
        self.merging[:, 1] += change[:, 1]

    def prediction(self, thp_split: Range) -> Prediction:
        """What all of it adds up to, with so many huge pages that split."""
        page = self.pages.page_size
        total = int(self.rmap_items.sum())
        rmap_low, rmap_high = total - self.gone.high, total - self.gone.low
        profit = Range()
        profit.add(
            (self.sharing.low + self.zero.low) * page - rmap_high * RMAP_ITEM_BYTES,
            (self.sharing.high + self.zero.high) * page - rmap_low * RMAP_ITEM_BYTES,
        )
        metadata_high = rmap_high * RMAP_ITEM_BYTES + self.shared.high * STABLE_NODE_BYTES
        metadata_low = rmap_low * RMAP_ITEM_BYTES + self.shared.low * STABLE_NODE_BYTES
        saved = Range()
        saved.add(self.freed.low * page - metadata_high, self.freed.high * page - metadata_low)
        ranges = {
            "pages_shared": self.shared,
            "pages_sharing": self.sharing,
            "pages_unshared": self.unshared,
            "pages_volatile": self.volatile,
            "ksm_zero_pages": self.zero,
            "stable_node_chains": self.chains,
            "stable_node_dups": self.dups,
            "general_profit": profit,
            "frames_freed": self.freed,
            "saved_bytes": saved,
            "thp_split": thp_split,
        }
        values = {name: r.value for name, r in ranges.items()}
        bounds = {name: (r.low, r.high) for name, r in ranges.items() if r.value is None}
        if not self.pages.huge_known:
            # Whether a page belongs to a huge page is hidden too.
            values["thp_split"] = None
        if self.pages.looks < 2:
            values["pages_volatile"] = None
        return Prediction(
            **values,
            bounds=bounds,
            processes=self._processes(),
            breakdown=Breakdown(self.zero_saved, self.within_saved, self.across_saved),
            metadata_bytes=metadata_high,
        )

    def _processes(self) -> list[ProcessPrediction]:
        page = self.pages.page_size
        out = []
        for total, gone, zero, merging in zip(
            self.rmap_items.tolist(),
            self.gone_by_process.tolist(),
            self.zero_by_process.tolist(),
            self.merging.tolist(),
            strict=True,
        ):
            items = total - gone[1], total - gone[0]
            spans = {
                "ksm_rmap_items": items,
                "ksm_zero_pages": tuple(zero),
                "ksm_merging_pages": tuple(merging),
                "ksm_process_profit": (
                    (merging[0] + zero[0]) * page - items[1] * RMAP_ITEM_BYTES,
                    (merging[1] + zero[1]) * page - items[0] * RMAP_ITEM_BYTES,
                ),
            }
            out.append(
                ProcessPrediction(
                    **{name: low if low == high else None for name, (low, high) in spans.items()},
                    bounds={
                        name: (low, high) for name, (low, high) in spans.items() if low != high
                    },
                )
            )
        return out


def given_back(frames: I64, outside: I64, nodes: I64) -> tuple[I64, I64]:
    """Frames given back at the least and at the most, of those that merging leaves unused.

    A frame that is mapped outside the scan too stays there, unless it is a node's.
    """
    most = np.maximum(0, frames - np.maximum(0, outside - nodes))
    return np.maximum(0, frames - outside), most
