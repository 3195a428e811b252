"""What remains where not everything may merge: zero pages alone, or within trust domains only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.estimate.curve import Point, Service
    from dedup.estimate.fingerprints import Facts
    from dedup.estimate.rules import F64

ZERO_PAGES: Final = "zero_pages"
INSTANCE: Final = "instance"
LABEL: Final = "label"
USER: Final = "user"
CGROUP: Final = "cgroup"


@dataclass(frozen=True, slots=True)
class Domain:
    """So much is needed where pages merge within these alone; None: the scans don't tell."""

    name: str
    frames: int | None
    bytes: int | None
    fits: bool | None
    instances: int | None
    """So many fit."""


def domains(
    service: Service, parts: Sequence[Service], points: Sequence[Point], at: int, budget_bytes: int
) -> list[Domain]:
    """Figures for `at` instances, or mixes.

    Parameters
    ----------
    service : Service
    parts : sequence of Service
        Each service of a mix by itself.
    points : sequence of Point
        The curve as far as instances fit.
    at : int
    budget_bytes : int
    """
    n = np.array([p.instances for p in points], np.int64)
    i = service.incidence
    numbers = service.numbers(n)
    every = np.array([p.frames for p in points], np.float64)
    plain = np.array([p.without_ksm_frames for p in points], np.float64)
    apart = np.asarray(i.apart(numbers))
    labels = every
    if len(parts) > 1:
        labels = np.sum([[f.frames for f in s.incidence.at(s.numbers(n))] for s in parts], axis=0)
    zero = plain - numbers @ i.zero_frames_mean()
    found: list[tuple[str, F64 | None]] = [(ZERO_PAGES, zero), (INSTANCE, apart), (LABEL, labels)]
    for name in (USER, CGROUP):
        ways = {INSTANCE: apart, LABEL: labels, "": every}
        way = _boundaries(name, service.facts)
        found.append((name, None if way is None else ways[way]))
    out = []
    for name, needed in found:
        if needed is None:
            out.append(Domain(name, None, None, None, None))
            continue
        # The fewer may merge the more is needed, whatever was rounded.
        frames = np.clip(needed, np.minimum(every, plain), plain)
        need = [
            p.bytes + round(f - p.frames) * service.page_size
            for p, f in zip(points, frames.tolist(), strict=True)
        ]
        fits = next((k for k, b in enumerate(need) if b > budget_bytes), len(points))
        here = need[at - 1]
        out.append(Domain(name, round(frames[at - 1]), here, here <= budget_bytes, fits))
    return out


def _boundaries(name: str, facts: Sequence[Facts]) -> str | None:
    """Where the users or cgroups of the instances seen draw the line.

    Around each instance, around each service, or around all (empty); None: it can't be told, as
    where an instance has several, or one instance of a service is all that was seen.
    """
    tags: dict[str, list[str]] = {}
    for f in facts:
        tag = getattr(f, name)
        if tag is None:
            return None
        tags.setdefault(f.label, []).append(tag)
    every = [tag for of in tags.values() for tag in of]
    if any(len(of) == 1 for of in tags.values()):
        return None
    if len(set(every)) == 1:
        return ""
    if len(set(every)) == len(every):
        return INSTANCE
    if all(len(set(of)) == 1 for of in tags.values()) and len(set(every)) == len(tags):
        return LABEL
    return None
