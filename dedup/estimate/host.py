"""How many instances fit a host's memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dedup.estimate import stress
from dedup.estimate.curve import LEAST

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dedup.estimate.curve import Point, Service

UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class Memory:
    """A host's memory, and what of it the instances may take."""

    ram_bytes: int
    reserve_bytes: int = 0
    """For whatever else runs there."""
    headroom: float = 0.0
    """Share of the rest that is to stay free."""
    swap_bytes: int = 0
    """Where pages can go for which there is no room."""

    @property
    def budget_bytes(self) -> int:
        """What the instances may take."""
        return max(0, int((self.ram_bytes - self.reserve_bytes) * (1 - self.headroom)))


@dataclass(frozen=True, slots=True)
class Fits:
    """Instances that fit.

    `low` and `high` are by the interval; `safe` fit on a bad day, too; `worst`, should all that
    were not seen share with nobody.
    """

    without_ksm: int
    with_ksm: int
    low: int
    high: int
    safe: int
    worst: int


def parse_size(text: str) -> int:
    """Bytes of `64G`, `512 MiB`, `1.5T` or a plain number; units are powers of 1024.

    Raises
    ------
    ValueError
    """
    found = re.fullmatch(
        r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE
    )
    if not found:
        raise ValueError(f"{text!r} is no size such as 64G or 512M")
    return int(float(found[1]) * UNITS[found[2].upper()])


def fit(service: Service, memory: Memory, least: int = LEAST) -> tuple[list[Point], Fits]:
    """How many fit, and the curve that far, or to `least` instances at the least."""
    budget, most = memory.budget_bytes, min(service.most, max(LEAST, least))
    points = service.curve(most)
    while points[-1].low_bytes <= budget and most < service.most:
        most = min(2 * most, service.most)
        points = service.curve(most)

    def largest(need: Iterable[int]) -> int:
        return next((n for n, b in enumerate(need) if b > budget), most)

    found = Fits(
        without_ksm=largest(p.without_ksm_bytes for p in points),
        with_ksm=largest(p.bytes for p in points),
        low=largest(p.high_bytes for p in points),
        high=largest(p.low_bytes for p in points),
        safe=largest(stress.worst_bytes(service, points)),
        worst=largest(p.worst_bytes for p in points),
    )
    return points[: max(LEAST, least, found.with_ksm)], found
