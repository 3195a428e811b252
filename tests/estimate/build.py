"""Instances laid out by hand, and what they need by counting alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dedup.estimate.fingerprints import ZERO, Contents, Facts, Instance
from dedup.estimate.rules import Rules

Row = tuple[int, int]
"""Mappings, and distinct frames, of a content."""

FACTS = Facts(
    label="web", instance="0", key_id="key", kernel="6.1", page_size=4096,
    tunables={"max_page_sharing": 256, "use_zero_pages": 0}, processes=1, looks=2,
    scanned_pages=0, volatile_pages=0, volatile_frames=0, single_pages=0, frames_known=True,
    complete=True, drifting=False, extrapolated=False, other_anonymous_bytes=0, file_bytes=0,
    shared_memory_bytes=0, page_table_bytes=0, kernel_bytes=None, swap_bytes=0, randomized="all",
    taken="2026-01-01T00:00:00+00:00",
)  # fmt: skip


def fingerprint(content: int) -> int:
    """That of a numbered content, which no compression makes shorter."""
    digest = hashlib.blake2b(content.to_bytes(8), digest_size=8).digest()
    return int.from_bytes(digest)


def instance(
    number: int,
    rows: Mapping[int, Row],
    zero: int | None = None,
    outside: Mapping[int, int] | None = None,
    huge: Mapping[int, int] | None = None,
    volatile: int = 0,
) -> Instance:
    """An instance with these contents, by number; `zero` is the all-zero one."""
    names = sorted(rows, key=fingerprint)
    outside, huge = outside or {}, huge or {}
    contents = Contents(
        np.array([fingerprint(n) for n in names], np.uint64),
        np.array([rows[n][0] for n in names], np.uint32),
        np.array([rows[n][1] for n in names], np.uint32),
        np.array([outside.get(n, 0) for n in names], np.uint32),
        np.array([huge.get(n, 0) for n in names], np.uint32),
        np.array([ZERO if n == zero else 0 for n in names], np.uint8),
    )
    pages = sum(r[0] for r in rows.values()) + volatile
    facts = replace(
        FACTS, instance=str(number), scanned_pages=pages, volatile_pages=volatile,
        volatile_frames=volatile,
    )  # fmt: skip
    return Instance(facts, contents, f"web-{number}.dedup")


def counted(instances: Sequence[Instance], rules: Rules) -> int:
    """Frames that these instances keep: content by content, by the rules of mm/ksm.c."""
    mappings: dict[int, int] = {}
    frames: dict[int, int] = {}
    zeros = set()
    total = 0
    for i in instances:
        total += i.facts.volatile_frames
        c = i.contents
        for name, m, f, flag in zip(
            c.fingerprint.tolist(), c.mappings.tolist(), c.frames.tolist(), c.flags.tolist(),
            strict=True,
        ):  # fmt: skip
            mappings[name] = mappings.get(name, 0) + m
            frames[name] = frames.get(name, 0) + f
            if flag & ZERO:
                zeros.add(name)
    for name, n in mappings.items():
        if name in zeros and rules.use_zero_pages:
            continue
        total += min(frames[name], math.ceil(n / rules.max_page_sharing))
    return total
