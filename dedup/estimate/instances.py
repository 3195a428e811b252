"""From a few instances of a service to many: which contents they have in common.

Incidence is nearly two-peaked: a content is in all instances or in one. What lies between decides
how what is new in the n-th instance gets less (`heaps`), and whether the instances are of several
classes that share within themselves only.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from dedup.errors import Usage
from dedup.estimate.fingerprints import ZERO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dedup.estimate.fingerprints import Instance
    from dedup.pages import I64, U64, Bool

    F64 = NDArray[np.float64]

INSTANCES_MOST: Final = 64
"""A bit each."""
SUBSETS_MOST: Final = 2048
"""Subsets of the instances that are looked at one by one; more are drawn at random."""
CELLS_MOST: Final = 1 << 24
"""Of the table of contents by subsets, at a time."""
INTERVAL_SHARE: Final = 0.01
"""By so much of all frames the interval is widened on both sides."""
CLASSES_RATIO: Final = 1.2
CLASSES_PAGES: Final = 20
"""Private contents: so many times the fewest, and so many more, is a sign of classes."""
LEAST: Final = 3
"""Instances that can tell the shared, the partly shared and classes apart."""
CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Rules:
    """What decides how many frames a content keeps (mm/ksm.c)."""

    max_page_sharing: int = 256
    use_zero_pages: bool = False


class Counts(NamedTuple):
    """Mappings and frames of contents, arrays of one shape."""

    mappings: F64
    own: F64
    """Frames of the instances alone."""
    outside: F64
    """Frames that instances and others share by fork."""
    huge: F64
    """Mappings in huge pages; asked of all-zero contents alone."""
    zero: Bool


def kept(c: Counts, rules: Rules) -> F64:
    """Frames that contents keep once ksmd has converged.

    One; several where mappings are more than `max_page_sharing`; an all-zero one gives the
    mappings in huge pages back when these split, and all with `use_zero_pages`.
    """
    frames = c.own + c.outside
    # A fraction where mappings are means: rounding must not make one more of it.
    nodes = np.ceil(np.round(c.mappings / rules.max_page_sharing, 9))
    out = np.minimum(nodes, frames)
    if not c.zero.any():
        return out
    small = np.maximum(c.mappings - c.huge, 0)
    split = np.minimum(np.ceil(np.round(small / rules.max_page_sharing, 9)), frames)
    zero = np.where(frames >= 2, split, out) if not rules.use_zero_pages else np.zeros_like(out)
    return np.where(c.zero, zero, out)


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames for some number of instances."""

    frames: float
    low: float
    high: float
    lin: float
    """As if what is new in an instance stayed the same."""


@dataclass(frozen=True, slots=True)
class _Common:
    """Contents that all instances have, by alike ones: mean of each, and how many there are."""

    mappings: F64
    own: F64
    outside: F64
    huge: F64
    zero: Bool
    times: F64

    def kept(self, n: F64, rules: Rules) -> F64:
        """Frames that they keep with so many instances each."""
        m = n[:, None]
        counts = Counts(
            m * self.mappings, m * self.own, self.outside[None, :] + 0 * m, m * self.huge,
            np.broadcast_to(self.zero, (len(n), len(self.zero))),
        )  # fmt: skip
        return np.asarray(kept(counts, rules) @ self.times)


class Incidence:
    """Contents of k instances by which of them have each.

    Parameters
    ----------
    instances : sequence of Instance
        Of one service.
    rules : Rules

    Raises
    ------
    Usage
        There are more than `INSTANCES_MOST`.
    """

    def __init__(self, instances: Sequence[Instance], rules: Rules) -> None:
        k = len(instances)
        if not 1 <= k <= INSTANCES_MOST:
            raise Usage(f"{k} instances are too many at once", f"give {INSTANCES_MOST} at the most")
        self.k, self.rules = k, rules
        facts = [i.facts for i in instances]
        self.volatile_pages = np.array([f.volatile_pages for f in facts], np.float64)
        self.volatile_frames = np.array([f.volatile_frames for f in facts], np.float64)
        self.scanned_pages = np.array([f.scanned_pages for f in facts], np.float64)
        columns = [i.contents for i in instances]
        fingerprint = np.concatenate([c.fingerprint for c in columns])
        which = np.repeat(np.arange(k), [len(c) for c in columns])
        # A merge sort takes the sorted files as they are.
        order = np.argsort(fingerprint, kind="stable")
        first = np.ones(len(order), bool)
        first[1:] = fingerprint[order[1:]] != fingerprint[order[:-1]]
        starts = np.flatnonzero(first)
        self._order, self._which = order, which[order]
        self._starts = starts
        self._sizes = np.diff(np.append(starts, len(order)))
        self._content = np.cumsum(first) - 1
        self._table = {
            name: np.concatenate([getattr(c, name) for c in columns])[order].astype(np.int64)
            for name in ("mappings", "frames", "outside", "huge", "flags")
        }
        bits = np.uint64(1) << self._which.astype(np.uint64)
        self.mask: U64 = np.bitwise_or.reduceat(bits, starts) if len(starts) else bits
        self.incidence: I64 = self._sizes
        """In how many instances each content is."""
        self.whole = self._counts()
        self.cost = kept(self.whole, rules)
        self.own_frames = self._own_frames()
        """Frames of each instance alone, before anything merges."""
        self.outside_frames = float(self.whole.outside.sum())
        """Frames that they share by fork."""
        # Their cost is one frame wherever they are; that of the others depends on how many
        # mappings there are.
        self._simple = (self.whole.mappings <= rules.max_page_sharing) & ~self.whole.zero
        self._masks, inverse = np.unique(self.mask[self._simple], return_inverse=True)
        self._mask_cost = np.bincount(inverse, minlength=len(self._masks)).astype(np.float64)
        self.common = self._common()
        self.private = self._private()
        """Frames kept by what an instance has alone, for each."""
        self._nodes = self._count_nodes()
        single = (self.whole.own + self.whole.outside == 1) & (self.incidence == 1)
        self._forked = float((self.whole.mappings[single] - 1).sum()) / k

    # -- what was seen -----------------------------------------------------------------------------

    def _sum(self, name: str) -> F64:
        if not len(self._starts):
            return np.zeros(0)
        return np.add.reduceat(self._table[name], self._starts).astype(np.float64)

    def _counts(self) -> Counts:
        outside = self._table["outside"]
        most = np.maximum.reduceat(outside, self._starts) if len(self._starts) else outside
        zero = (self._table["flags"] & int(ZERO)) != 0
        return Counts(
            self._sum("mappings"),
            self._sum("frames") - self._sum("outside"),
            most.astype(np.float64),
            self._sum("huge"),
            np.asarray(zero[self._starts]),
        )

    def nodes(self, n: I64) -> F64:
        """Stable nodes for so many instances each, about: between those counted on a line."""
        one, alone, every = self._nodes
        if self.k == 1:
            return np.asarray(n * alone)
        growth = self.common.kept(np.append(self.k, n).astype(np.float64), self.rules)
        beyond = every + (n - self.k) * one + growth[1:] - growth[0]
        between = alone + (n - 1) * (every - alone) / (self.k - 1)
        return np.where(n <= self.k, between, beyond)

    def _own_frames(self) -> F64:
        own = self._table["frames"] - self._table["outside"]
        return np.bincount(self._which, own, self.k) + self.volatile_frames

    def _common(self) -> _Common:
        """All-zero contents are among them: whoever has such pages has the same."""
        c = self.whole
        every = (self.incidence == self.k) | c.zero
        rows = np.stack([c.mappings, c.own, c.outside, c.huge, c.zero.astype(np.float64)])
        alike, times = np.unique(rows[:, every], axis=1, return_counts=True)
        mean = alike / self.k
        return _Common(mean[0], mean[1], alike[2], mean[3], alike[4] != 0, times.astype(np.float64))

    def _private(self) -> F64:
        alone = (self.incidence == 1) & ~self.whole.zero
        owner = self._which[self._starts[alone]]
        return np.bincount(owner, self.cost[alone], self.k).astype(np.float64)

    def _count_nodes(self) -> tuple[float, float, float]:
        """Stable nodes, the mean: of what an instance has alone, of all it has; of all together."""
        t = self._table
        zero = self.whole.zero[self._content]
        none = np.zeros(len(zero))
        counts = Counts(
            t["mappings"].astype(np.float64), t["frames"].astype(np.float64), none,
            t["huge"].astype(np.float64), zero,
        )  # fmt: skip
        cost = np.where(t["frames"] >= 2, kept(counts, self.rules), 0)
        private = (self.incidence == 1)[self._content] & ~zero
        merged = self.whole.own + self.whole.outside >= 2
        return (
            float(cost[private].sum()) / self.k,
            float(cost.sum()) / self.k,
            float(self.cost[merged].sum()),
        )

    def fork_shared(self, n: I64) -> F64:
        """Mappings of frames that nothing but fork shares, but for one of each frame."""
        if self.k == 1:
            return np.asarray(n * self._forked)
        c = self.common
        one = (c.own == 0) & (c.outside == 1)
        common = n * float(c.mappings[one] @ c.times[one]) - c.times[one].sum()
        return np.asarray(n * self._forked + np.maximum(0, common))

    def subsets(self, j: int) -> Bool:
        """Subsets of j instances, shape (subsets, k): all, or some where there are many."""
        if math.comb(self.k, j) <= SUBSETS_MOST:
            chosen = list(itertools.combinations(range(self.k), j))
        else:
            random = np.random.default_rng(j)
            chosen = [tuple(random.permutation(self.k)[:j].tolist()) for _ in range(SUBSETS_MOST)]
        out = np.zeros((len(chosen), self.k), bool)
        for row, members in zip(out, chosen, strict=True):
            row[list(members)] = True
        return out

    def kept_by(self, subsets: Bool) -> F64:
        """Frames that the contents of each subset keep, volatile pages left out; exact."""
        weights = np.uint64(1) << np.arange(self.k, dtype=np.uint64)
        bits = (subsets * weights).sum(axis=1, dtype=np.uint64)
        out = np.array([float(self._mask_cost[(self._masks & b) != 0].sum()) for b in bits])
        special = np.flatnonzero(~self._simple)
        step = max(1, CELLS_MOST // max(1, len(subsets)))
        for at in range(0, len(special), step):
            out += self._kept_special(special[at : at + step], subsets)
        return out

    def _kept_special(self, contents: I64, subsets: Bool) -> F64:
        row = np.full(len(self._starts), -1)
        row[contents] = np.arange(len(contents))
        at = np.flatnonzero(row[self._content] >= 0)
        where = row[self._content[at]], self._which[at]
        tables = {}
        for name in ("mappings", "frames", "outside", "huge"):
            table = np.zeros((len(contents), self.k))
            table[where] = self._table[name][at]
            tables[name] = table
        inside = subsets.T.astype(np.float64)
        outside = np.stack([tables["outside"][:, s].max(axis=1, initial=0) for s in subsets], 1)
        counts = Counts(
            tables["mappings"] @ inside,
            (tables["frames"] - tables["outside"]) @ inside,
            outside,
            tables["huge"] @ inside,
            np.broadcast_to(self.whole.zero[contents][:, None], outside.shape),
        )
        return np.asarray(kept(counts, self.rules).sum(axis=0))

    def rarefied(self, j: int) -> float:
        """Frames kept by what is in j of the instances, the mean over all such subsets.

        In closed form, each content at what it costs with all k.
        """
        total = math.comb(self.k, j)
        missing = np.array([math.comb(self.k - q, j) / total for q in range(self.k + 1)])
        counted = ~self.whole.zero
        cost = np.bincount(self.incidence[counted], self.cost[counted], self.k + 1)
        return float(cost @ (1 - missing))

    # -- what was not ------------------------------------------------------------------------------

    @property
    def classes_suspected(self) -> bool:
        """Whether the instances look as if they were of several kinds.

        The number of private contents then differs by more than chance: who is alone in its class
        has all its layout for itself.
        """
        if self.k < LEAST:
            return False
        return bool(self.private.max() > CLASSES_RATIO * self.private.min() + CLASSES_PAGES)

    @property
    def class_share(self) -> float:
        """So large a share of all instances may be of a kind not seen, at the most (95 %)."""
        return float(1 - (1 - CONFIDENCE) ** (1 / self.k))

    @property
    def certain(self) -> bool:
        """Whether what was seen bounds the unseen; else the worst case is the upper bound."""
        return self.k >= LEAST and not self.classes_suspected

    @property
    def heaps_exponent(self) -> float:
        """By which what is new gets less with each instance; 0 where it does not."""
        if self.k < 2:
            return 0.0
        new = self.rarefied(self.k) - self.rarefied(self.k - 1)
        before = self.rarefied(self.k - 1) - self.rarefied(self.k - 2)
        if before <= 0:
            return 0.0
        if new <= 0:
            return math.inf
        return max(0.0, -math.log(new / before) / math.log(self.k / (self.k - 1)))

    def without_ksm(self, n: I64) -> F64:
        """Frames of so many instances each, nothing merged."""
        return np.asarray(n * self.own_frames.mean() + self.outside_frames)

    def curve(self, most: int) -> list[Frames]:
        """Frames for 1, 2, … `most` instances, once ksmd has converged.

        Up to the number seen they are exact: the mean over all subsets of that many, and the range
        over them. With one instance only what is certain is counted as merged: within it, and its
        all-zero pages; the low bound is that of instances alike.
        """
        found = [self._seen(j) for j in range(1, min(self.k, most) + 1)]
        if most > self.k:
            found += self._unseen(np.arange(self.k + 1, most + 1))
        return found

    def _seen(self, j: int) -> Frames:
        subsets = self.subsets(j)
        volatile = subsets @ self.volatile_frames
        all_kept = self.kept_by(subsets) + volatile
        mean = float(all_kept.mean())
        return Frames(mean, float(all_kept.min()), float(all_kept.max()), mean)

    def _unseen(self, n: I64) -> list[Frames]:
        k, more = self.k, (n - self.k).astype(np.float64)
        every = np.ones((1, k), bool)
        base = float(self.kept_by(every)[0]) + n * float(self.volatile_frames.mean())
        common = self.common.kept(np.append(k, n).astype(np.float64), self.rules)
        base = base + common[1:] - common[0]
        alone = self._seen(1).frames
        worst = self._seen(k).frames + more * alone
        mean = float(self.private.mean())
        lin = base + more * mean
        if k == 1:
            # What is certain: within the instance, and all-zero pages; or all of them are alike.
            zeros = _only(self.common, self.common.zero)
            zero = zeros.kept(np.append(k, n).astype(np.float64), self.rules)
            kept_zero = zero[1:]
            lin = self.volatile_frames[0] * n + (alone - self.volatile_frames[0] - zero[0]) * n
            frames = lin + kept_zero
            return _frames(frames, base, frames, frames)
        heaps = base + mean * self._heaps(n)
        if k < LEAST:
            return _frames(lin, heaps, np.maximum(worst, lin), lin)
        low = np.minimum(heaps, base + more * self.private.min())
        high = base + more * self.private.max()
        low, high = low - INTERVAL_SHARE * heaps, high + INTERVAL_SHARE * heaps
        if self.classes_suspected:
            # The next of the commonest kind brings what its like have alone.
            heaps = np.maximum(heaps, base + more * self.private.min())
            high = np.maximum(high, worst)
        return _frames(heaps, low, high, lin)

    def _heaps(self, n: I64) -> F64:
        """Sum of (j / k) ** -alpha for j from k + 1 to each n."""
        exponent = self.heaps_exponent
        if math.isinf(exponent):
            return np.zeros(len(n))
        steps = (np.arange(self.k + 1, int(n[-1]) + 1) / self.k) ** -exponent
        return np.asarray(np.cumsum(steps)[n - self.k - 1])


def _only(c: _Common, which: Bool) -> _Common:
    return _Common(
        c.mappings[which], c.own[which], c.outside[which], c.huge[which], c.zero[which],
        c.times[which],
    )  # fmt: skip


def _frames(frames: F64, low: F64, high: F64, lin: F64) -> list[Frames]:
    low = np.minimum(low, frames)
    high = np.maximum.accumulate(np.maximum(high, frames))
    return [Frames(*map(float, row)) for row in np.stack([frames, low, high, lin], axis=1)]
