"""From a few instances of a service to many: which contents they have in common.

Incidence is nearly two-peaked: a content is in all instances or in one. What lies between decides
how what is new in the n-th instance gets less (`heaps`), and whether the instances are of several
classes that share within themselves only.

Several services go together: what one has in common with another is counted once, and each grows
by what it alone has.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.errors import Usage
from dedup.estimate.join import Patterns, Special, join
from dedup.estimate.rules import Counts, Rules, kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.estimate.fingerprints import Instance
    from dedup.estimate.rules import F64
    from dedup.pages import I64, Bool

__all__ = ["Counts", "Frames", "Incidence", "Rules", "kept"]

INSTANCES_MOST: Final = 64
"""A bit each."""
SUBSETS_MOST: Final = 2048
"""Subsets of the instances that are looked at one by one; more are drawn at random."""
SUBSETS_LEAST: Final = 16
"""So many are drawn where each takes long."""
MASKS_MOST: Final = 1 << 24
"""Of subsets by sets of instances that have something in common, all that are looked at."""
CELLS_MOST: Final = 1 << 20
"""Of a table of contents by subsets or by numbers, at a time."""
GROWTH_MOST: Final = 1 << 26
"""Of the table of what all have by numbers of instances; beyond it some numbers are left out."""
INTERVAL_SHARE: Final = 0.01
"""By so much of all frames the interval is widened on both sides."""
CLASSES_SHARE: Final = 0.02
CLASSES_PAGES: Final = 20
"""Two instances share more than two others by so much of an instance's contents, and by so many:
a sign of classes. Less than that is within what the interval has for chance."""
LEAST: Final = 3
"""Instances that can tell the shared, the partly shared and classes apart."""
CONFIDENCE: Final = 0.95
NORMAL: Final = 1.959964
"""Of the normal distribution, 95 % lie so many standard deviations around the mean."""


STUDENT: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for 95 %, both sides, from 1 degree of freedom on."""


def student(freedom: int) -> float:
    """Student's t for 95 %, both sides; from the table, or a series good to 0.003 beyond it."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames for some number of instances."""

    frames: float
    low: float
    high: float
    lin: float
    """As if what is new in an instance stayed the same."""
    worst: float
    """As if all that were not seen shared with nobody: kinds that no sign tells of."""


class Incidence:
    """Contents of k instances by which of them have each.

    Parameters
    ----------
    instances : sequence of Instance
        Of one service, or of several, one service after another.
    rules : Rules
    sizes : sequence of int, optional
        Instances of each service; None: all are of one.

    Raises
    ------
    Usage
        There are more than `INSTANCES_MOST`.
    """

    def __init__(
        self, instances: Sequence[Instance], rules: Rules, sizes: Sequence[int] | None = None
    ) -> None:
        k = len(instances)
        if not 1 <= k <= INSTANCES_MOST:
            raise Usage(f"{k} instances are too many at once", f"give {INSTANCES_MOST} at the most")
        self.k, self.rules = k, rules
        self.sizes = np.array([k] if sizes is None else sizes, np.int64)
        """Instances seen of each service."""
        self.services = len(self.sizes)
        self.service = np.repeat(np.arange(self.services), self.sizes)
        facts = [i.facts for i in instances]
        self.volatile_pages = np.array([f.volatile_pages for f in facts], np.float64)
        self.volatile_frames = np.array([f.volatile_frames for f in facts], np.float64)
        self.scanned_pages = np.array([f.scanned_pages for f in facts], np.float64)
        self._joined = found = join(instances, self.service, rules)
        self.own_frames = found.own_frames + self.volatile_frames
        """Frames of each instance alone, before anything merges."""
        self.outside_frames = found.outside_frames
        """Frames that they share by fork."""
        self.private = found.private
        """Frames kept by what an instance has alone, for each."""
        self.alone_frames = self._kept_by(np.eye(k, dtype=bool)) + self.volatile_frames
        """Frames that each instance keeps by itself."""
        self._common, self._in_all = self._count_common()
        self._contents = np.diagonal(self._common)
        self._seen_before: dict[tuple[int, ...], Frames] = {}

    # -- of each service ---------------------------------------------------------------------------

    def mean(self, values: F64) -> F64:
        """The mean over the instances of each service."""
        return np.bincount(self.service, values, self.services) / self.sizes

    def of(self, values: F64, service: int) -> F64:
        """Those of one service's instances."""
        return np.asarray(values[self.service == service])

    def numbers(self, n: I64) -> I64:
        """Numbers of instances, shape (points, services)."""
        return np.asarray(n, np.int64).reshape(len(n), self.services)

    def zero_mean(self, *, huge: bool) -> F64:
        """All-zero pages of an instance of each service, or those of them in huge pages."""
        found = self._joined.zero_huge if huge else self._joined.zero_mappings
        return np.asarray(found / self.sizes)

    def zero_frames_mean(self) -> F64:
        """Frames of all-zero pages that an instance of each service has for itself."""
        return np.asarray(self._joined.zero_frames / self.sizes)

    def private_within(self, service: int) -> F64:
        """Frames kept by what each instance has alone among those of its service."""
        return self.of(self._joined.private_within, service)

    # -- what was seen -----------------------------------------------------------------------------

    def nodes(self, n: I64) -> F64:
        """Stable nodes for so many instances each, about: between those counted on a line."""
        n, j, k = self.numbers(n), self._joined, self.sizes
        alone = j.nodes_alone / k
        seen = np.minimum(n, k)
        between = alone + (seen - 1) * (j.nodes_service - alone) / np.maximum(k - 1, 1)
        # What several services merge together is less, or more, than what each merges.
        together = (seen / k).prod(axis=1) * (j.nodes - j.nodes_service.sum())
        one = np.where(k == 1, alone, j.nodes_private / k)
        beyond = ((n - seen) * one).sum(axis=1)
        return np.asarray(between.sum(axis=1) + together + beyond + self._growth(n, certain=True))

    def fork_shared(self, n: I64) -> F64:
        """Mappings of frames that nothing but fork shares, but for one of each frame."""
        n, c = self.numbers(n), self._joined.patterns
        out = n @ (self._joined.forked / self.sizes)
        if c is None or self.sizes.max() == 1:
            return np.asarray(out)
        one = (c.own.sum(axis=1) == 0) & (c.outside == 1) & c.certain
        mean = (c.mappings[one] / self.sizes).T @ c.times[one]
        return np.asarray(out + np.maximum(0, n @ mean - c.times[one].sum()))

    def subsets(self, seen: Sequence[int]) -> Bool:
        """Subsets with so many instances of each service, shape (subsets, k).

        All, or some where there are many.
        """
        most = int(np.clip(MASKS_MOST // (self.k * max(1, len(self._joined.masks))),
                           SUBSETS_LEAST, SUBSETS_MOST))  # fmt: skip
        ways = [(np.flatnonzero(self.service == s), n) for s, n in enumerate(seen)]
        if math.prod(math.comb(len(of), n) for of, n in ways) <= most:
            each = [itertools.combinations(of.tolist(), n) for of, n in ways]
            chosen = [list(itertools.chain(*parts)) for parts in itertools.product(*each)]
        else:
            random = np.random.default_rng(list(seen))
            chosen = [
                [i for of, n in ways for i in random.permutation(of)[:n].tolist()]
                for _ in range(most)
            ]
        out = np.zeros((len(chosen), self.k), bool)
        for row, members in zip(out, chosen, strict=True):
            row[members] = True
        return out

    def _kept_by(self, subsets: Bool) -> F64:
        """Frames that the contents of each subset keep, volatile pages left out; exact."""
        j = self._joined
        weights = np.uint64(1) << np.arange(self.k, dtype=np.uint64)
        bits = (subsets * weights).sum(axis=1, dtype=np.uint64)
        out = np.array([float(j.mask_contents[(j.masks & b) != 0].sum()) for b in bits])
        if j.special is not None:
            step = max(1, CELLS_MOST // max(self.k, len(subsets)))
            for at in range(0, len(j.special.start), step):
                out += self._kept_special(j.special, at, at + step, subsets)
        return out

    def _kept_special(self, s: Special, first: int, end: int, subsets: Bool) -> F64:
        start = s.start[first:end]
        rows = slice(int(start[0]), int(s.start[end]) if end < len(s.start) else len(s.which))
        content = np.repeat(
            np.arange(len(start)), np.diff(np.append(start - start[0], rows.stop - rows.start))
        )
        tables = {}
        for name in ("mappings", "own", "outside", "huge"):
            table = np.zeros((len(start), self.k))
            table[content, s.which[rows]] = getattr(s, name)[rows]
            tables[name] = table
        inside = subsets.T.astype(np.float64)
        outside = np.stack([tables["outside"][:, x].max(axis=1, initial=0) for x in subsets], 1)
        counts = Counts(
            tables["mappings"] @ inside, tables["own"] @ inside, outside, tables["huge"] @ inside,
            np.broadcast_to(s.zero[first:end, None], outside.shape),
        )  # fmt: skip
        return np.asarray(kept(counts, self.rules).sum(axis=0))

    def _count_common(self) -> tuple[F64, F64]:
        """Contents that each two instances have in common, (k, k), and all of each service."""
        j, s = self._joined, self.services
        common, in_all = np.zeros((self.k, self.k)), np.zeros(s)

        def add(has: F64, times: F64) -> None:
            nonlocal common
            common += (has * times[:, None]).T @ has
            for one in range(s):
                of = has[:, self.service == one].sum(axis=1) == self.sizes[one]
                in_all[one] += float(times[of].sum())

        step = max(1, CELLS_MOST // self.k)
        bits = np.arange(self.k, dtype=np.uint64)
        for at in range(0, len(j.masks), step):
            masks = j.masks[at : at + step, None]
            add(
                ((masks >> bits) & np.uint64(1)).astype(np.float64), j.mask_contents[at : at + step]
            )
        if j.special is not None:
            c = j.special
            ends = np.append(c.start, len(c.which))
            for at in range(0, len(c.start), step):
                end = min(at + step, len(c.start))
                has = np.zeros((end - at, self.k))
                content = np.repeat(np.arange(end - at), np.diff(ends[at : end + 1]))
                has[content, c.which[ends[at] : ends[end]]] = 1
                add(has, (~c.zero[at:end]).astype(np.float64))
        return common, in_all

    def rarefied(self, j: int, service: int = 0) -> float:
        """Frames kept by what is in j of a service's instances, the mean over all such subsets.

        In closed form, each content at what it costs with all of them. What other services have as
        well does not count.
        """
        k = int(self.sizes[service])
        total = math.comb(k, j)
        missing = np.array([math.comb(k - q, j) / total for q in range(k + 1)])
        return float(self._joined.exclusive[service, : k + 1] @ (1 - missing))

    # -- what was not ------------------------------------------------------------------------------

    def suspected(self, service: int) -> bool:
        """Whether the instances of a service look as if they were of several kinds.

        Two of one kind then have much more in common than two of different ones. How much an
        instance has of its own is no such sign: it differs by size as well, and not at all where
        two are of each kind.
        """
        if self.sizes[service] < LEAST:
            return False
        few, many, chance = self.pairs(service)
        least = CLASSES_PAGES + CLASSES_SHARE * float(self.of(self._contents, service).mean())
        return many - few > least + chance

    def pairs(self, service: int) -> tuple[float, float, float]:
        """Contents that two instances of a service have in common, all-zero ones left out.

        Returns
        -------
        few, many : float
            Of the two that share the least, and the most.
        chance : float
            By so much they may differ where each content that some have came to them by itself:
            the counts spread by their square root, and the more pairs the wider.
        """
        first, second = np.triu_indices(int(self.sizes[service]), 1)
        common = self._common_of(service)[first, second]
        # What all have is the same for all pairs.
        some = float(common.mean()) - self._in_all[service]
        deviations = 2 * (1 + math.sqrt(2 * math.log(len(common))))
        return float(common.min()), float(common.max()), deviations * math.sqrt(max(0.0, some))

    def kinds(self, service: int) -> list[list[int]]:
        """The instances of a service by kind, the largest kind first, if several are suspected.

        Alike are those that share more than the middle between the least and the most that two do.
        """
        few, many, _ = self.pairs(service)
        near = self._common_of(service) > (few + many) / 2
        np.fill_diagonal(near, val=True)
        left, found = set(range(len(near))), []
        while left:
            like = left & set(np.flatnonzero(near[min(left)]).tolist())
            found.append(sorted(like))
            left -= like
        return sorted(found, key=lambda kind: (-len(kind), kind))

    def _common_of(self, service: int) -> F64:
        members = np.flatnonzero(self.service == service)
        return np.asarray(self._common[np.ix_(members, members)])

    @property
    def classes_suspected(self) -> bool:
        """Whether those of any service do."""
        return any(self.suspected(s) for s in range(self.services))

    @property
    def class_share(self) -> float:
        """So large a share of a service's instances may be of a kind not seen, at most (95 %)."""
        return float(1 - (1 - CONFIDENCE) ** (1 / int(self.sizes.min())))

    def bounded(self, service: int) -> bool:
        """Whether what was seen bounds the unseen; else the worst case is the upper bound."""
        return bool(self.sizes[service] >= LEAST) and not self.suspected(service)

    @property
    def certain(self) -> bool:
        """Whether that is so for all services."""
        return all(self.bounded(s) for s in range(self.services))

    def exponent(self, service: int = 0) -> float:
        """By which what is new gets less with each instance; 0 where it does not."""
        k = int(self.sizes[service])
        if k < 2:
            return 0.0
        new = self.rarefied(k, service) - self.rarefied(k - 1, service)
        before = self.rarefied(k - 1, service) - self.rarefied(k - 2, service)
        if before <= 0:
            return 0.0
        if new <= 0:
            return math.inf
        return max(0.0, -math.log(new / before) / math.log(k / (k - 1)))

    def without_ksm(self, n: I64) -> F64:
        """Frames of so many instances each, nothing merged."""
        return np.asarray(self.numbers(n) @ self.mean(self.own_frames) + self.outside_frames)

    def apart(self, n: I64) -> F64:
        """Frames of so many instances each, where each merges with itself alone."""
        mapped = self.own_frames + self._joined.outside_each
        saved = self.mean(mapped - self.alone_frames)
        return np.asarray(self.without_ksm(n) - self.numbers(n) @ saved)

    def curve(self, most: int) -> list[Frames]:
        """Frames for 1, 2, … `most` instances of each service, once ksmd has converged."""
        return self.at(np.repeat(np.arange(1, most + 1)[:, None], self.services, axis=1))

    def at(self, n: I64) -> list[Frames]:
        """Frames for so many instances of each service, once ksmd has converged.

        Up to the number seen they are exact: the mean over all subsets of that many, and the range
        over them. With one instance only what is certain is counted as merged: within it, and its
        all-zero pages; the low bound is that of instances alike.

        Parameters
        ----------
        n : int64 array, shape (points, services)
            Ascending in each service.
        """
        n = self.numbers(n)
        known = np.minimum(n, self.sizes)
        seen = np.array([self._columns(self._seen(tuple(row))) for row in known.tolist()])
        frames, low, high, lin, worst = seen.T
        more = n - known
        # Volatile pages take a frame each, wherever they are.
        volatile = more @ self.mean(self.volatile_frames)
        certain = alike = self._growth(n, certain=True)
        if self.sizes.min() == 1:
            alike = self._growth(n, certain=False)
        frames, high, lin, worst = (
            column + volatile + certain for column in (frames, high, lin, worst)
        )
        low = low + volatile + alike
        # Whatever further ones have: those seen are among all.
        least = (1 - INTERVAL_SHARE) * low
        widened = np.zeros(len(n), bool)
        for s in range(self.services):
            grown = self._grown(s, n[:, s])
            frames, low, high, lin, worst = (
                a + b for a, b in zip((frames, low, high, lin, worst), grown, strict=True)
            )
            widened |= (more[:, s] > 0) & bool(self.sizes[s] >= LEAST)
        wider = INTERVAL_SHARE * frames * widened
        low = np.where(widened, np.maximum(low - wider, least), low)
        low, high = np.minimum(low, frames), np.maximum(high + wider, frames)
        beyond = (more > 0).any(axis=1)
        high[beyond] = np.maximum.accumulate(high[beyond])
        worst = np.maximum(worst, high)
        columns = np.stack([frames, low, high, lin, worst], axis=1)
        return [Frames(*map(float, row)) for row in columns]

    @staticmethod
    def _columns(f: Frames) -> tuple[float, float, float, float, float]:
        return f.frames, f.low, f.high, f.lin, f.worst

    def needed(self, subsets: Bool) -> F64:
        """Frames that each subset needs once ksmd has converged; exact."""
        return np.asarray(self._kept_by(subsets) + subsets @ self.volatile_frames)

    def _seen(self, seen: tuple[int, ...]) -> Frames:
        found = self._seen_before.get(seen)
        if found is None:
            total = self.needed(self.subsets(seen))
            mean, most = float(total.mean()), float(total.max())
            found = Frames(mean, float(total.min()), most, mean, most)
            self._seen_before[seen] = found
        return found

    def _growth(self, n: I64, *, certain: bool) -> F64:
        """Frames more that need those contents that all have: by chains, with all seen or more."""
        c, seen = self._joined.patterns, np.minimum(n, self.sizes)
        beyond = np.flatnonzero((n > seen).any(axis=1))
        out = np.zeros(len(n))
        if c is None or not len(beyond):
            return out
        if certain:
            c = c.only(c.certain)
        # More patterns than any service has: some of the points, and lines between them.
        step = max(1, -(-len(beyond) * len(c.times) // GROWTH_MOST))
        at = beyond[np.unique(np.append(np.arange(0, len(beyond), step), len(beyond) - 1))]
        grown = self._kept_common(c, n[at]) - self._kept_common(c, seen[at])
        out[beyond] = np.interp(beyond, at, grown)
        return out

    def _kept_common(self, c: Patterns, n: I64) -> F64:
        """Frames that contents of these patterns keep with so many instances each."""
        out = np.zeros(len(n))
        means = [column / self.sizes for column in (c.mappings, c.own, c.huge)]
        step = max(1, CELLS_MOST // max(1, len(n)))
        for at in range(0, len(c.times), step):
            part = slice(at, at + step)
            mappings, own, huge = (n @ mean[part].T for mean in means)
            counts = Counts(
                mappings, own, np.broadcast_to(c.outside[part], mappings.shape), huge,
                np.broadcast_to(c.zero[part], mappings.shape),
            )  # fmt: skip
            out += kept(counts, self.rules) @ c.times[part]
        return out

    def _grown(self, s: int, n: I64) -> tuple[F64, F64, F64, F64, F64]:
        """Frames more than those seen, by the columns of `Frames`."""
        k = int(self.sizes[s])
        more = np.maximum(n - k, 0).astype(np.float64)
        private = self.of(self.private, s)
        mean = float(private.mean())
        # Whoever shares with nobody needs all that an instance needs by itself.
        alone = self.of(self.alone_frames - self.volatile_frames, s)
        worst = more * float(alone.mean())
        if k == 1:
            # What is certain: within the instance, and all-zero pages; or all of them are alike.
            own = more * float(alone[0] - self._zero_kept(s))
            return own, 0 * more, own, own, worst
        lin, heaps = more * mean, mean * self._heaps(s, n)
        if k < LEAST:
            return lin, heaps, np.maximum(worst, lin), lin, worst
        # What further ones have alone, on average: as far from the mean of those seen as chance
        # makes it. Of three, the least and the most hold it in three of four cases only.
        chance = self._chance(private, more)
        worst = worst + self._chance(alone, more)
        low = np.maximum(0, np.minimum(heaps, np.minimum(more * private.min(), lin - chance)))
        high = np.maximum(more * private.max(), lin + chance)
        frames = heaps
        if self.suspected(s):
            # New kinds have no law. Further ones are of those seen, and bring what one brings
            # whose like was there before; whoever was the first of its kind is no measure.
            like = [i for kind in self.kinds(s) if len(kind) > 1 for i in kind]
            frames, high = more * float(private[like].mean()), np.maximum(high, worst)
        return frames, low, high, lin, worst

    def size_chance(self, n: I64) -> F64:
        """Frames by which chance may make so many instances larger than those seen, 95 %.

        Of a service of which less than `LEAST` were seen nothing is known of that.
        """
        n = self.numbers(n)
        out = np.zeros(len(n))
        for s, k in enumerate(self.sizes.tolist()):
            if k >= LEAST:
                more = np.maximum(n[:, s] - k, 0).astype(np.float64)
                out += self._chance(self.of(self.own_frames, s), more)
        return out

    @staticmethod
    def _chance(seen: F64, more: F64) -> F64:
        """How far chance takes the sum over so many more from what the mean of those seen says."""
        k = len(seen)
        spread = 1 / k + np.divide(1, more, out=np.zeros(len(more)), where=more > 0)
        return np.asarray(more * student(k - 1) * float(seen.std(ddof=1)) * np.sqrt(spread))

    def _zero_kept(self, s: int) -> float:
        """Frames that the all-zero contents of a service's one instance keep by themselves."""
        j = self._joined
        if j.special is None:
            return 0.0
        chosen = (self.service == s)[None, :]
        zeros = np.flatnonzero(j.special.zero).tolist()
        return float(sum(self._kept_special(j.special, z, z + 1, chosen)[0] for z in zeros))

    def _heaps(self, s: int, n: I64) -> F64:
        """Sum of (j / k) ** -alpha for j from k + 1 to each n."""
        exponent, k = self.exponent(s), int(self.sizes[s])
        if math.isinf(exponent):
            return np.zeros(len(n))
        steps = (np.arange(k + 1, max(k, int(n[-1])) + 1) / k) ** -exponent
        total = np.concatenate((np.zeros(1), np.cumsum(steps)))
        return np.asarray(total[np.maximum(n - k, 0)])
