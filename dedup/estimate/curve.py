"""Frames and bytes for every number of instances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.estimate.instances import Incidence, Rules
from dedup.model.cost import Load
from dedup.model.merge import RMAP_ITEM_BYTES, STABLE_NODE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.estimate.fingerprints import Facts, Instance
    from dedup.estimate.instances import F64
    from dedup.pages import I64

LEAST: Final = 16
"""Instances to which a curve goes at the least."""


@dataclass(frozen=True, slots=True)
class Point:
    """So many instances; frames are those of anonymous memory in the scans' scope."""

    instances: int
    frames: int
    low_frames: int
    high_frames: int
    without_ksm_frames: int
    lin_frames: int
    """As if what is new in an instance stayed the same."""
    bytes: int
    """All memory: what else an instance needs, and KSM's own, included."""
    low_bytes: int
    high_bytes: int
    without_ksm_bytes: int


@dataclass(frozen=True, slots=True)
class Rest:
    """Memory besides the scanned pages."""

    each_bytes: float
    """Of each instance: other anonymous memory, shared memory, page tables, the kernel's own."""
    once_bytes: int
    """Of all together: pages of files."""


class Service:
    """Instances of one service, and what many of them need.

    Parameters
    ----------
    instances : sequence of Instance
        With the same page size and key.
    rules : Rules

    Raises
    ------
    Usage
    """

    def __init__(self, instances: Sequence[Instance], rules: Rules) -> None:
        self.facts: list[Facts] = [i.facts for i in instances]
        self.incidence = Incidence(instances, rules)
        self.page_size = self.facts[0].page_size
        self.rest = Rest(
            float(
                np.mean(
                    [f.other_anonymous_bytes + f.shared_memory_bytes + f.page_table_bytes
                     + (f.kernel_bytes or 0) for f in self.facts]
                )
            ),
            max(f.file_bytes for f in self.facts),
        )  # fmt: skip
        zero = self.incidence.whole.zero
        column = (
            self.incidence.whole.mappings if rules.use_zero_pages else self.incidence.whole.huge
        )
        self._gone_each = float(column[zero].sum()) / len(self.facts)

    @property
    def volatile_share(self) -> float:
        """Pages that were seen to change, of all."""
        i = self.incidence
        scanned = float(i.scanned_pages.sum())
        return float(i.volatile_pages.sum()) / scanned if scanned else 0.0

    def curve(self, most: int) -> list[Point]:
        """For 1, 2, … `most` instances."""
        i, n = self.incidence, np.arange(1, most + 1)
        found = i.curve(most)
        without = i.without_ksm(n)
        metadata = self.metadata_bytes(n)
        other = n * self.rest.each_bytes + self.rest.once_bytes
        points = []
        for number, f, plain, own, rest in zip(
            n.tolist(), found, without.tolist(), metadata.tolist(), other.tolist(), strict=True
        ):
            # More than without KSM it can't be, whatever the sizes of the instances.
            high = max(f.frames, min(f.high, max(f.frames, plain)))
            low = min(f.low, f.frames)
            without_frames = max(plain, f.frames)
            points.append(
                Point(
                    instances=number,
                    frames=round(f.frames),
                    low_frames=round(low),
                    high_frames=round(high),
                    without_ksm_frames=round(without_frames),
                    lin_frames=round(f.lin),
                    bytes=round(self.page_size * f.frames + rest + own),
                    low_bytes=round(self.page_size * low + rest + own),
                    high_bytes=round(self.page_size * high + rest + own),
                    without_ksm_bytes=round(self.page_size * without_frames + rest),
                )
            )
        return points

    def metadata_bytes(self, n: I64) -> F64:
        """KSM's own memory: an rmap_item for each page, and the stable nodes."""
        pages = n * float(self.incidence.scanned_pages.mean()) - self._gone(n)
        return np.asarray(RMAP_ITEM_BYTES * pages + STABLE_NODE_BYTES * self.incidence.nodes(n))

    def load(self, point: Point) -> Load:
        """What ksmd has to do for so many instances, about."""
        i, n = self.incidence, np.array([point.instances])
        volatile = point.instances * float(i.volatile_pages.mean())
        changing = point.instances * float(i.volatile_frames.mean())
        nodes, gone, forked = (float(f(n)[0]) for f in (i.nodes, self._gone, i.fork_shared))
        unshared = max(0.0, point.frames - changing - nodes)
        lasting = point.instances * float(i.scanned_pages.mean()) - volatile - gone
        placed = gone if i.rules.use_zero_pages else 0.0
        return Load(
            pages_shared=round(nodes),
            pages_sharing=max(0, round(lasting - nodes - unshared - forked)),
            pages_unshared=round(unshared),
            pages_volatile=round(volatile + forked),
            ksm_zero_pages=round(placed),
            fork_shared=round(forked),
        )

    def _gone(self, n: I64) -> F64:
        """Pages that leave KSM: all-zero ones that the shared zero page replaces."""
        return np.asarray(n * self._gone_each)
