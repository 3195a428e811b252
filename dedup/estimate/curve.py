"""Frames and bytes for every number of instances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.estimate.instances import Incidence
from dedup.model.cost import Load
from dedup.model.prediction import RMAP_ITEM_BYTES, STABLE_NODE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dedup.estimate.fingerprints import Facts, Instance
    from dedup.estimate.rules import F64, Rules
    from dedup.pages import I64

LEAST: Final = 16
"""Instances to which a curve goes at the least."""
MOST: Final = 10_000
"""Instances of a service to which it goes at the most, where not the least is more."""


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
    worst_frames: int
    """As if those that were not seen shared with nobody."""
    worst_bytes: int


@dataclass(frozen=True, slots=True)
class Rest:
    """Memory besides the scanned pages."""

    each_bytes: float
    """Of each instance: other anonymous memory, shared memory, page tables, the kernel's own."""
    once_bytes: int
    """Of all together: pages of files."""


class Service:
    """Instances of one service, and what many of them need; or a mix of several services.

    Parameters
    ----------
    instances : sequence of Instance
        With the same page size and key.
    rules : Rules
    mix : mapping of str to int, optional
        Instances of each service, by label, that go together: what the curve calls an instance is
        then the whole mix. None: the instances are of one service.

    Raises
    ------
    Usage
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        rules: Rules,
        mix: Mapping[str, int] | None = None,
    ) -> None:
        if mix is None:
            sorted_ = list(instances)
            sizes = [len(sorted_)]
        else:
            sorted_ = [i for label in mix for i in instances if i.facts.label == label]
            sizes = [sum(i.facts.label == label for i in sorted_) for label in mix]
        self.facts: list[Facts] = [i.facts for i in sorted_]
        self.names = [i.name for i in sorted_]
        """Of their files."""
        self.labels = list(mix or [self.facts[0].label])
        self.unit = np.array([1] if mix is None else list(mix.values()), np.int64)
        """Instances of each service that go together."""
        self.incidence = i = Incidence(sorted_, rules, sizes)
        self.page_size = self.facts[0].page_size
        each = [
            f.other_anonymous_bytes + (f.shared_memory_bytes or 0) + (f.page_table_bytes or 0)
            + (f.kernel_bytes or 0)
            for f in self.facts
        ]  # fmt: skip
        files = np.array([f.file_bytes or 0 for f in self.facts], np.float64)
        self.rest = Rest(
            float(self.unit @ i.mean(np.array(each, np.float64))),
            # Of one service they are the same; those of two may be, too.
            round(sum(i.of(files, s).max() for s in range(i.services))),
        )
        self._scanned_each = float(self.unit @ i.mean(i.scanned_pages))
        self._volatile_each = float(self.unit @ i.mean(i.volatile_pages))
        self._gone_each = float(self.unit @ i.zero_mean(huge=not rules.use_zero_pages))

    @property
    def volatile_share(self) -> float:
        """Pages that were seen to change, of all."""
        return self._volatile_each / self._scanned_each if self._scanned_each else 0.0

    @property
    def most(self) -> int:
        """The longest curve."""
        return max(LEAST, MOST // int(self.unit.max()))

    def numbers(self, n: I64) -> I64:
        """Instances of each service in so many mixes, shape (points, services)."""
        return np.asarray(n[:, None] * self.unit)

    def curve(self, most: int) -> list[Point]:
        """For 1, 2, … `most` instances."""
        i, n = self.incidence, np.arange(1, most + 1)
        found = i.at(self.numbers(n))
        without = i.without_ksm(self.numbers(n))
        metadata = self.metadata_bytes(n)
        other = n * self.rest.each_bytes + self.rest.once_bytes
        points = []
        bounds = without + i.size_chance(self.numbers(n))
        for number, f, plain, bound, own, rest in zip(
            n.tolist(), found, without.tolist(), bounds.tolist(), metadata.tolist(),
            other.tolist(), strict=True,
        ):  # fmt: skip
            # More than without KSM it can't be; but further instances may be larger than these.
            high = max(f.frames, min(f.high, bound))
            worst = max(high, min(f.worst, bound))
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
                    worst_frames=round(worst),
                    worst_bytes=round(self.page_size * worst + rest + own),
                )
            )
        return points

    def metadata_bytes(self, n: I64) -> F64:
        """KSM's own memory: an rmap_item for each page, and the stable nodes."""
        pages = n * self._scanned_each - self._gone(n)
        nodes = self.incidence.nodes(self.numbers(n))
        return np.asarray(RMAP_ITEM_BYTES * pages + STABLE_NODE_BYTES * nodes)

    def load(self, point: Point) -> Load:
        """What ksmd has to do for so many instances, about."""
        n = np.array([point.instances])
        found = self._loads(n, np.array([point.frames], np.float64))
        nodes, sharing, unshared, gone, forked = (float(column[0]) for column in found)
        placed = gone if self.incidence.rules.use_zero_pages else 0.0
        return Load(
            pages_shared=round(nodes),
            pages_sharing=max(0, round(sharing)),
            pages_unshared=round(unshared),
            pages_volatile=round(point.instances * self._volatile_each + forked),
            ksm_zero_pages=round(placed),
            fork_shared=round(forked),
        )

    def merged(self, points: Sequence[Point]) -> F64:
        """Merged mappings at each point: `pages_shared` and `pages_sharing`."""
        n = np.array([p.instances for p in points], np.int64)
        frames = np.array([p.frames for p in points], np.float64)
        nodes, sharing, *_ = self._loads(n, frames)
        return np.asarray(np.round(nodes) + np.maximum(0, np.round(sharing)))

    def _loads(self, n: I64, frames: F64) -> tuple[F64, F64, F64, F64, F64]:
        i, numbers = self.incidence, self.numbers(n)
        changing = numbers @ i.mean(i.volatile_frames)
        nodes, gone, forked = i.nodes(numbers), self._gone(n), i.fork_shared(numbers)
        unshared = np.maximum(0.0, frames - changing - nodes)
        lasting = n * (self._scanned_each - self._volatile_each) - gone
        return nodes, lasting - nodes - unshared - forked, unshared, gone, forked

    def _gone(self, n: I64) -> F64:
        """Pages that leave KSM: all-zero ones that the shared zero page replaces."""
        return np.asarray(n * self._gone_each)
