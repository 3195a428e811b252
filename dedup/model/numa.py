"""Contents on hosts with several NUMA nodes, where KSM merges on each node apart."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dedup.pages import FRAME_MASK

if TYPE_CHECKING:
    from dedup.pages import I64, U32, Groups, Index, Nodes, Pages


def by_node(pages: Pages, groups: Groups, nodes: Nodes) -> tuple[Groups, Index]:
    """Divide contents by NUMA node, as KSM does with `merge_across_nodes` 0.

    Source: mm/ksm.c, get_kpfn_nid(): each node has its own trees.

    Returns
    -------
    tuple of Groups and array
        Contents with two copies or more on one node; pages that are alone on theirs.
    """
    kept, counts, lonely = zip(
        *(_piece_by_node(pages, piece, nodes) for piece in groups.pieces()), strict=True
    )
    offsets = np.concatenate(([0], np.cumsum(np.concatenate(counts))))
    order = np.concatenate(kept)
    return replace(groups, order=order, offsets=offsets.astype(np.int64)), np.concatenate(lonely)


def _piece_by_node(pages: Pages, groups: Groups, nodes: Nodes) -> tuple[U32, I64, U32]:
    """The pages of contents with copies on one node, how many each has, and the lonely pages."""
    order, sizes = groups.of(np.ones(len(groups.offsets) - 1, bool))
    group = np.repeat(np.arange(len(sizes)), sizes)
    node = nodes.of((pages.frames[order] & FRAME_MASK).astype(np.int64))
    by_node = np.lexsort((node, group))
    index, group, node = order[by_node], group[by_node], node[by_node]
    first = np.ones(len(index), bool)
    first[1:] = (group[1:] != group[:-1]) | (node[1:] != node[:-1])
    counts = np.diff(np.append(np.flatnonzero(first), len(index)))
    several = np.repeat(counts >= 2, counts)
    return index[several], counts[counts >= 2], index[~several]
