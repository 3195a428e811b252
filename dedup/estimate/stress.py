"""The bad day: many merged pages are written to at once, and each takes a frame again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.estimate.curve import Point, Service

USUAL: Final = 0.1
"""Of the merged pages, written to before ksmd comes by again."""


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


def worst_bytes(service: Service, p: Point) -> int:
    """Memory for the upper bound of the frames, on the worse of the two milder bad days."""
    share = max(USUAL, service.volatile_share)
    frames = _frames(service, p, share, p.high_frames)
    return max(p.high_bytes, p.high_bytes + (frames - p.high_frames) * service.page_size)


def days(service: Service, points: Sequence[Point], instances: int, budget_bytes: int) -> list[Day]:
    """Bad days with so many instances: as many change as were seen to, a tenth, all.

    Parameters
    ----------
    service : Service
    points : sequence of Point
        The curve as far as instances fit.
    instances : int
    budget_bytes : int
    """
    out = []
    for name, share in (("measured", service.volatile_share), ("tenth", USUAL), ("all", 1.0)):

        def need(p: Point, share: float = share) -> tuple[int, int]:
            frames = _frames(service, p, share, p.frames)
            return frames, p.bytes + (frames - p.frames) * service.page_size

        frames, all_bytes = need(points[instances - 1])
        fits = next((p.instances - 1 for p in points if need(p)[1] > budget_bytes), len(points))
        out.append(Day(name, share, frames, all_bytes, all_bytes <= budget_bytes, fits))
    return out


def _frames(service: Service, p: Point, share: float, frames: int) -> int:
    """Each page written to takes a frame, as long as its copies have less than without KSM."""
    load = service.load(p)
    written = share * (load.pages_shared + load.pages_sharing)
    # All of them written: no frame is saved any more.
    most = max(frames, p.without_ksm_frames)
    return most if share >= 1 else min(most, round(frames + written))
