"""Contents of several instances side by side: which have each, counted in one pass.

The files are sorted by fingerprint, so a piece of each, up to the same fingerprint, holds whole
contents. A piece is merged, counted and let go: besides the files' own columns it takes memory for
what differs, not for what there is. Nothing here is a Python object for a content.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from dedup.estimate.fingerprints import ZERO
from dedup.estimate.rules import Counts, kept

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dedup.estimate.fingerprints import Contents, Instance
    from dedup.estimate.rules import F64, Rules
    from dedup.pages import I64, U64, Bool

PIECE_ROWS: Final = 1 << 18
"""Rows of all files that are merged at a time: they stay in the cache."""
PATTERNS_MOST: Final = 1 << 18
"""Patterns kept apart before equal ones are put together."""


class Special(NamedTuple):
    """Contents whose frames depend on how many have them: the rows of each, one after another."""

    start: I64
    """First row of each content."""
    which: I64
    """Instance of each row."""
    mappings: F64
    own: F64
    outside: F64
    huge: F64
    zero: Bool
    """Of each content."""


class Patterns(NamedTuple):
    """Contents that all instances of a service have, and all-zero ones, alike ones together."""

    mappings: F64
    """Shape (patterns, services): in all instances of each service together."""
    own: F64
    huge: F64
    outside: F64
    """Shape (patterns,), as all that follows."""
    zero: Bool
    certain: Bool
    """All of two instances or more have it, or it is all zero."""
    times: F64

    def only(self, which: Bool) -> Patterns:
        """Some of them."""
        return Patterns(
            self.mappings[which], self.own[which], self.huge[which], self.outside[which],
            self.zero[which], self.certain[which], self.times[which],
        )  # fmt: skip


@dataclass(slots=True)
class Joined:
    """What the pass has counted; K instances of S services.

    `private` and `exclusive` leave all-zero contents out: whoever has such pages has the same.
    """

    private: F64
    """Frames kept by what each instance has alone, shape (K,)."""
    private_within: F64
    """The same, among the instances of its own service."""
    exclusive: F64
    """Frames kept by what one service alone has, by how many of its instances: (S, K + 1)."""
    own_frames: F64
    """Frames of each instance alone, before anything merges, shape (K,)."""
    outside_each: F64
    """Frames of each that processes outside of it map too."""
    nodes_alone: F64
    """Stable nodes of all instances by themselves, shape (S,)."""
    nodes_private: F64
    """Of these, those of what an instance has alone."""
    nodes_service: F64
    """Stable nodes of each service by itself."""
    forked: F64
    """Mappings, but for one of each frame, of frames that nothing but fork shares, (S,)."""
    zero_mappings: F64
    """Of all-zero pages, of all instances of each service."""
    zero_frames: F64
    zero_huge: F64
    nodes: float = 0.0
    """Stable nodes of all together."""
    outside_frames: float = 0.0
    """Frames that instances share with others by fork."""
    masks: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Sets of instances, a bit each, that have contents of one frame."""
    mask_contents: F64 = field(default_factory=lambda: np.zeros(0))
    special: Special | None = None
    patterns: Patterns | None = None


def join(instances: Sequence[Instance], service: I64, rules: Rules) -> Joined:
    """Count the contents of instances.

    Parameters
    ----------
    instances : sequence of Instance
        64 at the most.
    service : int64 array
        Of each instance, ascending from 0.
    rules : Rules
    """
    pass_ = _Pass(len(instances), service, rules)
    for starts, ends in _pieces([i.contents.fingerprint for i in instances]):
        pass_.add([i.contents for i in instances], starts, ends)
    return pass_.done()


def _pieces(columns: list[U64]) -> Iterator[tuple[list[int], list[int]]]:
    """Where pieces begin and end in each column: whole contents, some rows at a time."""
    at = [0] * len(columns)
    step = max(1, PIECE_ROWS // len(columns))
    while True:
        left = [i for i, c in enumerate(columns) if at[i] < len(c)]
        if not left:
            return
        last = min(columns[i][min(at[i] + step, len(columns[i])) - 1] for i in left)
        ends = list(at)
        for i in left:
            part = columns[i][at[i] : at[i] + step]
            ends[i] = at[i] + int(np.searchsorted(part, last, "right"))
        yield at, ends
        at = ends


class _Pass:
    """One pass over all contents."""

    def __init__(self, k: int, service: I64, rules: Rules) -> None:
        self.k, self.service, self.rules = k, service, rules
        self.services = int(service[-1]) + 1
        self.size = np.bincount(service, minlength=self.services)
        s, z = self.services, np.zeros
        self.out = Joined(
            z(k), z(k), z((s, k + 1)), z(k), z(k), z(s), z(s), z(s), z(s), z(s), z(s), z(s)
        )  # fmt: skip
        self.masks: list[tuple[U64, I64]] = []
        self.rows: list[tuple[I64, ...]] = []
        self.zeros: list[Bool] = []
        self.special_contents = 0
        self.patterns: list[tuple[I64, I64]] = []
        self.patterns_kept = 0

    def add(self, columns: Sequence[Contents], starts: list[int], ends: list[int]) -> None:
        """Count a piece."""
        cut = [slice(a, b) for a, b in zip(starts, ends, strict=True)]
        sizes = [b - a for a, b in zip(starts, ends, strict=True)]

        def column(name: str) -> I64:
            return np.concatenate([getattr(c, name)[s] for c, s in zip(columns, cut, strict=True)])

        fingerprint = column("fingerprint")
        # A merge sort takes the sorted pieces as they are.
        order = np.argsort(fingerprint, kind="stable")
        fingerprint = fingerprint[order]
        first = np.ones(len(order), bool)
        first[1:] = fingerprint[1:] != fingerprint[:-1]
        mappings, frames, outside, huge = (
            column(name)[order].astype(np.int64)
            for name in ("mappings", "frames", "outside", "huge")
        )
        which = np.repeat(np.arange(self.k), sizes)[order]
        zero = (column("flags")[order][first] & ZERO) != 0
        p = _Piece(which, np.flatnonzero(first), mappings, frames, outside, huge, zero)
        self._count(p)

    def _count(self, p: _Piece) -> None:
        out, rules, s = self.out, self.rules, self.services
        counts = p.counts(p.own, p.outside)
        odd = (counts.mappings > rules.max_page_sharing) | p.zero
        cost = _cost(counts, odd, rules)
        inside = p.incidence(self.service, s)
        total = p.rows
        bits = np.uint64(1) << p.which.astype(np.uint64)
        mask = np.bitwise_or.reduceat(bits, p.start)
        self.masks.append(np.unique(mask[~odd], return_counts=True))
        if odd.any():
            self._keep_special(p, odd)
        alone = (total == 1) & ~p.zero
        out.private += np.bincount(p.which[p.start[alone]], cost[alone], self.k)
        for one in range(s):
            only = (inside[one] == total) & ~p.zero
            out.exclusive[one] += np.bincount(inside[one][only], cost[only], self.k + 1)
        out.own_frames += np.bincount(p.which, p.own, self.k)
        out.outside_each += np.bincount(p.which, p.outside, self.k)
        out.outside_frames += float(counts.outside.sum())
        out.nodes += float(cost[counts.own + counts.outside >= 2].sum())
        single = (counts.own + counts.outside == 1) & (total == 1)
        out.forked += np.bincount(
            self.service[p.which[p.start[single]]], counts.mappings[single] - 1, s
        )
        self._count_rows(p, alone, inside)
        for one in range(s):
            mine = self.service[p.which] == one if s > 1 else np.ones(len(p.which), bool)
            part = counts if s == 1 else p.counts(p.own * mine, p.outside * mine, mine)
            merged = part.own + part.outside >= 2
            if s == 1:
                out.nodes_service[one] += float(cost[merged].sum())
            else:
                out.nodes_service[one] += float(_cost(part, odd, rules)[merged].sum())
            zeros = mine & p.zero[p.content]
            out.zero_mappings[one] += float(p.mappings[zeros].sum())
            out.zero_frames[one] += float(p.own[zeros].sum())
            out.zero_huge[one] += float(p.huge[zeros].sum())
        self._keep_patterns(p, counts, inside)

    def _count_rows(self, p: _Piece, alone: Bool, inside: list[I64]) -> None:
        """What instances keep by themselves."""
        out, s = self.out, self.services
        zero = p.zero[p.content]
        counts = Counts(
            p.mappings.astype(np.float64), (p.own + p.outside).astype(np.float64),
            np.zeros(len(zero)), p.huge.astype(np.float64), zero,
        )  # fmt: skip
        cost = _cost(counts, (p.mappings > self.rules.max_page_sharing) | zero, self.rules)
        merged = p.own + p.outside >= 2
        service = self.service[p.which]
        out.nodes_alone += np.bincount(service[merged], cost[merged], s)
        private = merged & alone[p.content]
        out.nodes_private += np.bincount(service[private], cost[private], s)
        if s == 1:
            within = alone[p.content]
        else:
            within = np.zeros(len(zero), bool)
            for one in range(s):
                within |= (service == one) & (inside[one] == 1)[p.content] & ~zero
        out.private_within += np.bincount(p.which[within], cost[within], self.k)

    def _keep_special(self, p: _Piece, odd: Bool) -> None:
        at = np.flatnonzero(odd[p.content])
        names = np.cumsum(odd) - 1 + self.special_contents
        self.rows.append(
            (names[p.content[at]], p.which[at], p.mappings[at], p.own[at], p.outside[at],
             p.huge[at])
        )  # fmt: skip
        self.zeros.append(p.zero[odd])
        self.special_contents += int(np.count_nonzero(odd))

    def _keep_patterns(self, p: _Piece, whole: Counts, inside: list[I64]) -> None:
        every, certain = p.zero.copy(), p.zero.copy()
        for one, size in enumerate(self.size.tolist()):
            every |= inside[one] == size
            if size >= 2:
                certain |= inside[one] == size
        at = np.flatnonzero(every)
        if not len(at):
            return
        columns: list[I64] = []
        for one in range(self.services):
            part = whole
            if self.services > 1:
                mine = self.service[p.which] == one
                part = p.counts(p.own * mine, p.outside * mine, mine)
            huge = np.where(p.zero, part.huge, 0)
            columns += [c[at].astype(np.int64) for c in (part.mappings, part.own, huge)]
        columns += [whole.outside[at].astype(np.int64), p.zero[at].astype(np.int64),
                    certain[at].astype(np.int64)]  # fmt: skip
        self.patterns.append(_alike(columns, np.ones(len(at), np.int64)))
        self.patterns_kept += len(self.patterns[-1][1])
        if self.patterns_kept > PATTERNS_MOST:
            self._put_together()

    def _put_together(self) -> None:
        """Patterns of several pieces; twice as many may come until the next time."""
        if len(self.patterns) > 1:
            tables, times = zip(*self.patterns, strict=True)
            self.patterns = [_alike([*np.concatenate(tables, axis=1)], np.concatenate(times))]
        self.patterns_kept = 0

    def done(self) -> Joined:
        """All that was counted."""
        out, s = self.out, self.services
        if self.masks:
            masks = np.concatenate([m for m, _ in self.masks])
            counted = np.concatenate([n for _, n in self.masks])
            out.masks, inverse = np.unique(masks, return_inverse=True)
            out.mask_contents = np.bincount(inverse, counted, len(out.masks)).astype(np.float64)
        if self.rows:
            name, which, mappings, own, outside, huge = map(
                np.concatenate, zip(*self.rows, strict=True)
            )
            out.special = Special(
                np.flatnonzero(np.diff(name, prepend=-1)), which,
                mappings.astype(np.float64), own.astype(np.float64), outside.astype(np.float64),
                huge.astype(np.float64), np.concatenate(self.zeros),
            )  # fmt: skip
        self._put_together()
        if self.patterns:
            table, times = self.patterns[0]
            of = table[: 3 * s].reshape(s, 3, -1).astype(np.float64)
            shared, zeros, certain = table[3 * s :]
            out.patterns = Patterns(
                of[:, 0].T, of[:, 1].T, of[:, 2].T, shared.astype(np.float64), zeros != 0,
                certain != 0, times.astype(np.float64),
            )  # fmt: skip
        return out


class _Piece:
    """Rows of a piece, in order of their contents."""

    def __init__(
        self, which: I64, start: I64, mappings: I64, frames: I64, outside: I64, huge: I64,
        zero: Bool,
    ) -> None:  # fmt: skip
        self.which, self.start, self.zero = which, start, zero
        self.mappings, self.outside, self.huge = mappings, outside, huge
        self.own = frames - outside
        self.rows = np.diff(np.append(start, len(which)))
        """Of each content: in so many instances it is."""
        self.content = np.repeat(np.arange(len(start)), self.rows)

    def counts(self, own: I64, outside: I64, mine: Bool | None = None) -> Counts:
        """Counts of each content, over the rows of `mine` alone where it is given."""

        def added(values: I64) -> F64:
            if mine is not None:
                values = values * mine
            return np.add.reduceat(values, self.start).astype(np.float64)

        return Counts(
            added(self.mappings), added(own),
            np.maximum.reduceat(outside, self.start).astype(np.float64), added(self.huge),
            self.zero,
        )  # fmt: skip

    def incidence(self, service: I64, services: int) -> list[I64]:
        """In how many instances of each service each content is."""
        if services == 1:
            return [self.rows]
        of = service[self.which]
        return [
            np.add.reduceat((of == one).astype(np.int64), self.start) for one in range(services)
        ]


def _cost(c: Counts, odd: Bool, rules: Rules) -> F64:
    """Frames kept; those that are not `odd` keep one."""
    out = np.ones(len(odd))
    if odd.any():
        some = Counts(c.mappings[odd], c.own[odd], c.outside[odd], c.huge[odd], c.zero[odd])
        out[odd] = kept(some, rules)
    return out


def _alike(columns: list[I64], times: I64) -> tuple[I64, I64]:
    """Columns of equal rows but once, and how many there are; no value is negative."""
    code = np.zeros(len(times), np.int64)
    span = 1
    for column in columns:
        most = int(column.max()) + 1
        if most == 1:
            continue
        if span > (1 << 62) // most:
            _, code = np.unique(code, return_inverse=True)
            span = int(code.max()) + 1
        if span > (1 << 62) // most:
            values, place = np.unique(column, return_inverse=True)
            code = code * len(values) + place
            span *= len(values)
        else:
            code = code * most + column
            span *= most
    _, index, inverse = np.unique(code, return_index=True, return_inverse=True)
    added = np.bincount(inverse, times, len(index)).astype(np.int64)
    return np.stack([c[index] for c in columns]), added
