"""Frames that contents keep, by counts of their mappings and frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dedup.pages import Bool

    F64 = NDArray[np.float64]


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
