"""What some processes would save if they alone were mergeable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dedup.pages import FRAME_MASK, Flag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.pages import I64, Groups, Owners, Pages


def savings_alone(pages: Pages, groups: Groups, labels: Sequence[int]) -> I64:
    """Frames that each label's processes would free if they alone were mergeable.

    Parameters
    ----------
    pages, groups
        As for `predict`.
    labels : sequence of int
        Label of each process, 0 to the number of labels less one.

    Returns
    -------
    int64 array
        Frames by label, by the count of distinct contents (`max_page_sharing` aside).
    """
    label = np.asarray(labels, np.int64)
    total = np.zeros(int(label.max()) + 1 if len(label) else 0, np.int64)
    owners = pages.owners()
    for piece in groups.pieces():
        _add_alone(total, pages, piece, label, owners)
    return total


def _add_alone(total: I64, pages: Pages, groups: Groups, label: I64, owners: Owners) -> None:
    index, sizes = groups.of(np.ones(len(groups.offsets) - 1, bool))
    if not len(index):
        return
    word = pages.frames[index]
    frame = (word & FRAME_MASK).astype(np.int64)
    hidden = (word & Flag.HIDDEN) != 0
    frame[hidden] = -1 - index[hidden].astype(np.int64)
    group = np.repeat(np.arange(len(sizes)), sizes)
    mine = label[owners.of(index)]
    order = np.lexsort((frame, group, mine))
    m, g, f = mine[order], group[order], frame[order]
    new_pair = np.ones(len(m), bool)
    new_pair[1:] = (m[1:] != m[:-1]) | (g[1:] != g[:-1])
    new_frame = new_pair.copy()
    new_frame[1:] |= f[1:] != f[:-1]
    np.add.at(total, m[new_frame], 1)
    np.add.at(total, m[new_pair], -1)
