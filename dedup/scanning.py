"""One scan from end to end: looks, groups, prediction."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from dedup import grouping
from dedup.errors import Unsupported, Usage
from dedup.kernel import processes
from dedup.kernel.ksm import Ksm
from dedup.model import merge
from dedup.sources.live import LiveSource, Options, Span, mark_outside, wait_between_looks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dedup.kernel.memory import Tally
    from dedup.model.merge import Prediction, Rules
    from dedup.pages import Groups, Pages

INTERVAL_MOST_SECONDS: Final = 5.0
INTERVAL_LEAST_SECONDS: Final = 0.1
STEADY_FACTOR: Final = 1.6
"""Looks this many full scans apart see as volatile what ksmd does in the steady state."""


@dataclass(slots=True)
class Plan:
    """What to scan and how.

    Parameters
    ----------
    options : Options
    passes : int
        Looks; pages whose content differs between two are volatile.
    interval_seconds : float, optional
        Between looks; None takes it from ksmd's full scan, at most 5 s.
    full_scan_seconds : float, optional
        ksmd's full scan, where other tunables than the present ones are intended.
    order_known : bool
        ksmd comes by the processes in the order given.
    """

    options: Options = field(default_factory=Options)
    passes: int = 2
    interval_seconds: float | None = None
    full_scan_seconds: float | None = None
    order_known: bool = False


@dataclass(slots=True)
class Scan:
    """A finished scan: the fields of the JSON, and the pages as arrays."""

    kernel: str
    tunables: dict[str, int | str]
    pages: Pages
    groups: Groups
    prediction: Prediction
    rules: Rules
    tally: Tally
    seed: int
    seconds: float
    interval_seconds: float
    full_scan_seconds: float
    passes: int
    scope: str
    pagemap_scan: bool

    @property
    def complete(self) -> bool:
        """Whether nothing chosen was left out."""
        return not self.pages.skipped and not self.tally.unread_pages

    @property
    def scanned_pages(self) -> int:
        """Mappings of pages there at the last look."""
        return int(self.pages.present.sum())


def full_scan_seconds(rmap_items: int, tunables: dict[str, int | str]) -> float:
    """Time of ksmd's sleeps in a full scan at these tunables; its own work comes on top.

    Source: mm/ksm.c, ksm_scan_thread(): a batch of `pages_to_scan`, then a sleep that the timer
    rounds up by a tick.
    """
    batch = int(tunables.get("pages_to_scan", 100)) or 1
    sleep = int(tunables.get("sleep_millisecs", 20)) / 1000
    return (rmap_items // batch + 1) * sleep


def scan_pids(pids: Sequence[int], plan: Plan | None = None) -> Scan:
    """Scan live processes.

    Raises
    ------
    NoSuchProcess, NoMemory, NotPermitted, ProcessGone
        The only process chosen, or all of them, can't be scanned; where some can, the others are
        in `Scan.pages.skipped`.
    """
    plan = plan or Plan()
    return _run(LiveSource(list(pids), plan.options), plan)


def scan_spans(spans: Sequence[Span], plan: Plan | None = None) -> Scan:
    """Scan pieces of our own memory, hashed where they lie; each page once."""
    plan = plan or Plan()
    apart: list[Span] = []
    for span in sorted(spans, key=lambda s: s.start):
        end = apart[-1].start + apart[-1].length if apart else 0
        start = max(span.start, end)
        if start < span.start + span.length:
            apart.append(Span(start, span.start + span.length - start))
    return _run(LiveSource([os.getpid()], plan.options, spans=apart), plan)


def choose(choice: processes.Choice) -> list[int]:
    """Pids of a choice.

    Raises
    ------
    Usage
        Nothing is chosen.
    NoSuchProcess
    """
    if not choice:
        raise Usage(
            "nothing chosen to scan",
            "name processes: `dedup scan --pid 1234`, `--name 'redis*'`, `--user www-data`, "
            "`--all`",
        )
    return processes.choose(choice)


def _tunables() -> dict[str, int | str]:
    ksm = Ksm()
    try:
        return ksm.tunables()
    except Unsupported:
        return {}  # no KSM here: the prediction is for a kernel with the defaults


def rules_of(tunables: dict[str, int | str], *, order_known: bool = False) -> Rules:
    """The rules that the tunables make."""
    return merge.Rules(
        max_page_sharing=int(tunables.get("max_page_sharing", 256)),
        use_zero_pages=bool(tunables.get("use_zero_pages", 0)),
        order_known=order_known,
        merge_across_nodes=bool(tunables.get("merge_across_nodes", 1)),
    )


def _run(source: LiveSource, plan: Plan) -> Scan:
    if plan.passes < 1:
        raise Usage("--passes takes a number from 1 on")
    begin = time.monotonic()
    tunables = _tunables()
    pages = source.first_look()
    full = plan.full_scan_seconds
    if full is None:
        full = full_scan_seconds(len(pages.hashes), tunables)
    interval = plan.interval_seconds
    if interval is None:
        interval = min(INTERVAL_MOST_SECONDS, max(INTERVAL_LEAST_SECONDS, STEADY_FACTOR * full))
    for _ in range(plan.passes - 1):
        wait_between_looks(interval, plan.options.progress)
        pages = source.look_again()
    rules = rules_of(tunables, order_known=plan.order_known)
    groups = grouping.group(pages, source.tally.threads)
    mark_outside(pages, groups, source.sight)
    return Scan(
        kernel=platform.release(),
        tunables=tunables,
        pages=pages,
        groups=groups,
        prediction=merge.predict(pages, groups, rules),
        rules=rules,
        tally=source.tally,
        seed=source.seed,
        seconds=time.monotonic() - begin,
        interval_seconds=interval if plan.passes > 1 else 0.0,
        full_scan_seconds=full,
        passes=plan.passes,
        scope=plan.options.scope,
        pagemap_scan=source.sight.pagemap_scan,
    )
