"""The bad day: many merged pages are written to at once, and each takes a frame again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.estimate.curve import Point, Service
    from dedup.estimate.host import Memory
    from dedup.model.cost import Cost

USUAL: Final = 0.1
"""Of the merged pages, written to before ksmd comes by again."""

AGAIN_SCANS: Final = 2
"""Full scans until what changed, or a new instance's pages, have merged."""


@dataclass(frozen=True, slots=True)
class Day:
    """So large a share of the merged pages is written to at once."""

    name: str
    share: float
    frames: int
    bytes: int
    fits: bool
    instances: int
    """So many fit on such a day."""
    swap_bytes: int
    """What has no room in the memory that the instances may take."""
    fits_in_swap: bool
    merged_again_seconds: float | None
    """Until ksmd has merged it again, at the most, should it be as before; None: it scans nothing.
    """


def worst_bytes(service: Service, points: Sequence[Point]) -> list[int]:
    """Memory for the upper bound of the frames, on the worse of the two milder bad days."""
    share = max(USUAL, service.volatile_share)
    frames = _frames(service, points, share, [p.high_frames for p in points])
    return [
        p.high_bytes + max(0, f - p.high_frames) * service.page_size
        for p, f in zip(points, frames, strict=True)
    ]


def days(
    service: Service,
    points: Sequence[Point],
    instances: int,
    memory: Memory,
    price: Cost | None,
) -> list[Day]:
    """Bad days with so many instances: as many change as were seen to, a tenth, all.

    Parameters
    ----------
    service : Service
    points : sequence of Point
        The curve as far as instances fit.
    instances : int
    memory : Memory
    price : Cost, optional
        ksmd's, for so many instances.
    """
    out, budget_bytes = [], memory.budget_bytes
    # A page whose stable node is still there merges at the next visit, others at the second.
    again = None if price is None else AGAIN_SCANS * price.full_scan_seconds
    for name, share in (("measured", service.volatile_share), ("tenth", USUAL), ("all", 1.0)):
        frames = _frames(service, points, share, [p.frames for p in points])
        need = [
            p.bytes + (f - p.frames) * service.page_size
            for p, f in zip(points, frames, strict=True)
        ]
        fits = next((i for i, b in enumerate(need) if b > budget_bytes), len(points))
        at = instances - 1
        beyond = max(0, need[at] - budget_bytes)
        out.append(
            Day(
                name, share, frames[at], need[at], not beyond, fits, beyond,
                beyond <= memory.swap_bytes, again,
            )
        )  # fmt: skip
    return out


def _frames(
    service: Service, points: Sequence[Point], share: float, frames: Sequence[int]
) -> list[int]:
    """Each page written to takes a frame, as long as its copies have less than without KSM."""
    most = [max(f, p.without_ksm_frames) for p, f in zip(points, frames, strict=True)]
    if share >= 1:  # all of them written: no frame is saved any more
        return most
    written = share * service.merged(points)
    return [min(m, round(f + w)) for m, f, w in zip(most, frames, written.tolist(), strict=True)]
