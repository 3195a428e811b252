"""The counters of a converged ksmd, in closed form.

What is `given` are pages, their contents and the rules. Contents are added up, most of them many
at once (`contents`), those for which more than their number decides one at a time (`special`);
all-zero pages have rules of their own (`zero`). The sums stand in `totals`, which huge pages split
in `huge`. Where contents in one huge page decide over each other they are scanned (`linked`), and
where pages may be pinned the ranges become wider (`pins`).

Sources: mm/ksm.c (cmp_and_merge_page, stable_node_dup, try_to_merge_one_page), mm/migrate.c
(try_to_map_unused_to_zeropage, for huge pages that split), Documentation/admin-guide/mm/ksm.rst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.model import pins
from dedup.model.contents import Contents
from dedup.model.copies import CHUNK_PAGES
from dedup.model.given import Given
from dedup.model.huge import HugePages
from dedup.model.linked import Linked
from dedup.model.totals import Totals
from dedup.model.zero import ZeroPages
from dedup.pages import Flag

if TYPE_CHECKING:
    from dedup.model.prediction import Prediction, Rules
    from dedup.pages import Bool, Groups, Pages

DEPENDS: Final = Flag.DUPLICATE | Flag.KSM | Flag.ZERO
"""Flags of pages that savings depend on: a page like no other merges only if it is all zero, with
`use_zero_pages` or by the split of its huge page, or was merged before."""


def predict(pages: Pages, groups: Groups, rules: Rules) -> Prediction:
    """Predict the counters for the pages of a scan.

    Parameters
    ----------
    pages : Pages
        Marked by `dedup.grouping.group`.
    groups : Groups
        From the same call.
    rules : Rules

    Returns
    -------
    Prediction
    """
    given = Given(pages, groups, rules)
    found = _added_up(given)
    exact = not found.bounds and not any(p.bounds for p in found.processes)
    order_known = rules.order_known or len(pages.processes) <= 1
    if exact or given.pinned or not order_known or not pages.frames_known:
        return found
    # Several contents in one huge page decide over each other: one after the other, then.
    return _scanned(given) or found


def matter(pages: Pages) -> Bool:
    """Which pages, marked by `dedup.grouping.group`, the savings depend on (`DEPENDS`)."""
    found = np.empty(len(pages.frames), bool)
    for low in range(0, len(found), CHUNK_PAGES):
        found[low : low + CHUNK_PAGES] = (pages.frames[low : low + CHUNK_PAGES] & DEPENDS) != 0
    return found


def _added_up(given: Given) -> Prediction:
    """Add up each content by itself, whatever else lies in its huge pages."""
    totals, huge = Totals(given.pages, given.census), HugePages(given)
    contents, zero = Contents(given, totals, huge), ZeroPages(given, totals, huge)
    contents.add_singles()
    zeros = zero.find()
    for piece in given.groups.pieces():
        contents.add(contents.rest(piece), cut=zero.cut)
    contents.add_left_over(cut=zero.cut)
    zero.add(zeros)
    if given.pinned:
        pins.widen(given, totals, huge, zeros)
    return totals.prediction(huge.count())


def _scanned(given: Given) -> Prediction | None:
    """The same, but what huge pages tie together is scanned; None where that leaves ranges."""
    totals, huge = Totals(given.pages, given.census), HugePages(given)
    contents = Contents(given, totals, huge, linked=True)
    zero = ZeroPages(given, totals, huge, linked=True)
    contents.add_singles()
    zeros = zero.find()
    left = Linked(given, totals, huge).scan(contents.joined_rest(), zeros)
    if left is None:
        return None
    rest, zeros, cut = left
    contents.add(rest, cut=cut)
    contents.add_left_over(cut=cut)
    zero.add(zeros)
    return totals.prediction(huge.count())
