"""A plan kept in a file: what `dedup apply --dry-run --json` printed, for `dedup apply --plan`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dedup.change.act import Chosen
from dedup.errors import BadInput, OutputFailed, Refused
from dedup.kernel import processes
from dedup.kernel.ksm import PAGE_BYTES
from dedup.pages import ProcessId

if TYPE_CHECKING:
    from pathlib import Path

OLD_SECONDS: Final = 3600.0
"""The memory of a plan of this age has likely changed: what pays is another thing by then."""
MOST_BYTES: Final = 1 << 26


@dataclass(frozen=True, slots=True)
class Given:
    """What a plan's file says."""

    marks: dict[int, Chosen]
    """By pid."""
    ranges: dict[int, list[tuple[int, int]]] | None
    """By pid; None for whole processes."""
    already: tuple[int, ...]
    age_seconds: float

    @property
    def pids(self) -> list[int]:
        """All processes of the plan."""
        return [*self.already, *self.marks]


def read(path: Path) -> Given:
    """Read a plan.

    Raises
    ------
    BadInput
        It is none.
    Refused
        It was made before this boot: no process of it is there any more.
    OutputFailed
        The file can't be read.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except OSError as e:
        raise OutputFailed(f"{path} can't be read: {e.strerror}", "") from e
    try:
        if len(text) > MOST_BYTES:
            raise ValueError("it is too long")
        data = json.loads(text)
        if data["kind"] != "apply_plan" or data["schema_version"] != 1:
            raise ValueError(f"it is of kind {data['kind']!r}")
        marks, ranges = {}, {}
        for mark in data["marks"]:
            pid = int(mark["pid"])
            marks[pid] = Chosen(
                ProcessId(pid, int(mark["start_time"])), str(mark["name"]), tuple(mark["program"])
            )
            if mark["ranges"] is not None:
                ranges[pid] = [_range(*pair) for pair in mark["ranges"]]
        if ranges and set(ranges) != set(marks):
            raise ValueError("some of its processes have ranges, others have none")
        boot, made = str(data["boot_id"]), float(data["made_at"])
        already = tuple(int(p) for p in data["already_mergeable"])
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise BadInput(
            f"{path} is no plan of dedup: {_words(e)}",
            "make one: `dedup apply --name NAME --dry-run --json > plan.json`",
        ) from e
    if boot != processes.boot_id():
        raise Refused(
            f"the plan {path} was made before this boot: none of its processes is there any more",
            "plan anew: `dedup apply --name NAME --dry-run --json`",
        )
    return Given(marks, ranges or None, already, max(0.0, time.time() - made))


def _range(start: str, end: str) -> tuple[int, int]:
    low, high = int(start, 16), int(end, 16)
    if not 0 <= low < high or (low | high) % PAGE_BYTES:
        raise ValueError(f"{start} to {end} is no range of pages")
    return low, high


def _words(e: Exception) -> str:
    return f"{e} is missing" if isinstance(e, KeyError) else str(e) or type(e).__name__
