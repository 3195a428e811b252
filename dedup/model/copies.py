"""The mappings of contents as arrays, and what is asked of such arrays again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.pages import Flag

if TYPE_CHECKING:
    from dedup.pages import I64, U64, Bool, Index

UNSTABLE: Final = Flag.VOLATILE | Flag.NEW
"""Flags of pages that ksmd follows, but does not merge yet."""
ABSENT: Final = Flag.GONE | Flag.UNREAD
NOT_STABLE: Final = UNSTABLE | ABSENT
"""Flags of pages that take no part in merging."""

CHUNK_PAGES: Final = 1 << 16
"""Pages of contents added up in one go: what is needed a page lives no longer."""

_INT64_BITS: Final = 63
"""Of a number above 0."""


@dataclass(slots=True)
class Copies:
    """The mappings of some contents, content after content."""

    groups: int
    processes: int
    """Processes of the scan, whether they have any of these or not."""
    index: Index
    group: I64
    word: U64
    frame: I64
    """Frame number; a number of its own for each mapping where it is hidden."""
    process: I64
    thp: Bool
    ksm: Bool
    zero: Bool
    maybe_shared: Bool
    """Hidden and not exclusive: the same frame as another mapping, or not."""
    maybe_ksm: Bool
    """Hidden, and in a region with KSM pages."""

    @property
    def alone(self) -> Bool:
        """Frames with this one mapping, by pagemap; a KSM page can be called so too.

        Of a huge page mapped as one, pagemap calls all pages exclusive where its first one is.
        """
        return np.asarray(((self.word & Flag.EXCLUSIVE) != 0) & ~self.ksm & ~self.thp)

    def count(self, which: Bool | None = None) -> I64:
        """How many of these mappings each process has."""
        process = self.process if which is None else self.process[which]
        return np.bincount(process, minlength=self.processes).astype(np.int64)

    def take(self, which: Bool | I64 | slice) -> Copies:
        """Some of them."""
        return Copies(
            self.groups,
            self.processes,
            self.index[which],
            self.group[which],
            self.word[which],
            self.frame[which],
            self.process[which],
            self.thp[which],
            self.ksm[which],
            self.zero[which],
            self.maybe_shared[which],
            self.maybe_ksm[which],
        )


def joined(a: Copies, b: Copies) -> Copies:
    """The contents of both, those of `b` numbered after those of `a`."""
    names = [n for n in Copies.__slots__ if n not in {"groups", "processes", "group"}]
    parts = {n: np.concatenate((getattr(a, n), getattr(b, n))) for n in names}
    group = np.concatenate((a.group, b.group + a.groups))
    return Copies(a.groups + b.groups, a.processes, group=group, **parts)


def starts(ascending: I64) -> Bool:
    """Where a value stands for the first time."""
    first = np.ones(len(ascending), bool)
    first[1:] = ascending[1:] != ascending[:-1]
    return first


def sorted_values(numbers: I64) -> I64:
    """Distinct values, ascending: quickly where they ascend in long pieces, as frames do."""
    ascending = np.sort(numbers, kind="stable")
    return ascending[starts(ascending)]


def values(numbers: I64) -> list[int]:
    """Distinct values, by a table where that is possible: sorting takes many times as long."""
    if len(numbers) and int(numbers.min()) >= 0:
        return np.flatnonzero(np.bincount(numbers)).tolist()
    return [int(n) for n in np.unique(numbers)]


def distinct(group: I64, frame: I64, groups: int, alone: Bool | None = None) -> I64:
    """Distinct frames of each group; those of `alone` are known to have one mapping each."""
    if alone is not None:
        rest = ~alone
        others = distinct(group[rest], frame[rest], groups)
        return np.asarray(others + np.bincount(group[alone], minlength=groups))
    return np.bincount(_mappings(group, frame)[0], minlength=groups)


def _mappings(group: I64, frame: I64) -> tuple[I64, I64]:
    """Each frame of each group once: its group, ascending, and how many mappings it has."""
    if not len(group):
        return group, group
    least = int(frame.min())
    bits = (int(frame.max()) - least).bit_length()
    if int(group.max()).bit_length() + bits < _INT64_BITS:
        # One number for both, as numbers are sorted many times as fast as pairs.
        pair = (group << bits) | (frame - least)
        pair.sort()
        at = np.flatnonzero(starts(pair))
        of = pair[at] >> bits
    else:
        order = np.lexsort((frame, group))
        g, f = group[order], frame[order]
        at = np.flatnonzero(starts(g) | starts(f))
        of = g[at]
    return of, np.diff(np.append(at, len(group)))
