"""A plan kept in a file: what `dedup apply --dry-run --json` printed, for `dedup apply --plan`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import pairwise
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
ADDRESSES: Final = 1 << 64


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
            pid = _whole(mark["pid"])
            if pid in marks:
                raise ValueError(f"process {pid} is in it twice")
            process = ProcessId(pid, _whole(mark["start_time"]))
            marks[pid] = Chosen(process, str(mark["name"]), tuple(mark["program"]))
            if mark["ranges"] is not None:
                ranges[pid] = _ranges(mark["ranges"])
        if ranges and set(ranges) != set(marks):
            raise ValueError("some of its processes have ranges, others have none")
        boot, made = str(data["boot_id"]), float(data["made_at"])
        already = tuple(_whole(p) for p in data["already_mergeable"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
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


def _whole(value: object) -> int:
    # int() would make one of true, and of 1.5.
    if type(value) is not int:
        raise ValueError(f"{value!r:.40} is no whole number")
    return value


def _ranges(pairs: list[list[str]]) -> list[tuple[int, int]]:
    found = sorted(_range(*pair) for pair in pairs)
    for (_, end), (start, _) in pairwise(found):
        if start < end:
            raise ValueError(f"ranges overlap at {start:#x}")
    return found


def _range(start: str, end: str) -> tuple[int, int]:
    low, high = int(start, 16), int(end, 16)
    if not 0 <= low < high <= ADDRESSES or (low | high) % PAGE_BYTES:
        raise ValueError(f"{start:.40} to {end:.40} is no range of pages")
    return low, high


def _words(e: Exception) -> str:
    return f"{e} is missing" if isinstance(e, KeyError) else str(e) or type(e).__name__
