"""An estimate from a sample for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dedup.report import price, summary
from dedup.report.hints import typable
from dedup.report.names import safe
from dedup.report.table import Column, fitting, indented
from dedup.report.text import COUNTERS, LEFT_OUT_WORDS, count, size, span

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dedup.sampling import Sampled

FIGURES: Final = ("frames_freed", *COUNTERS, "thp_split")
IN_BYTES: Final = ("saved_bytes", "general_profit")
WIDE: Final = 0.05
"""Part of the memory from which on a range is worth a larger sample."""
MOST: Final = 0.5
"""Of a sample by content, the rate up to which it is one of so many."""
TOP: Final = 8
"""Processes shown."""


def part_of(rate: float) -> str:
    """A chance as one of so many; where that is nearly all, as a percentage."""
    if rate >= 1:
        return "all"
    if rate > MOST:
        return f"{rate:.1%} of the"
    # Not 1.5e+03.
    return f"1 of {1 / rate:.3g}" if 1 / rate < 1000 else f"1 of {1 / rate:,.0f}"


@dataclass(slots=True)
class SampleView:
    """The terminal view of a scan of a sample.

    Parameters
    ----------
    scan : Sampled
    verbose : bool
        All processes.
    width : int
        Columns.
    plain : bool
        Nothing but ASCII.
    choice : str
        The options that chose these processes, for commands to type next.
    """

    scan: Sampled
    verbose: bool = False
    width: int = 80
    plain: bool = False
    choice: str = "--pid N"

    def _figure(self, name: str) -> tuple[int, int, int] | None:
        """Lowest, likeliest and highest value; None where nothing is known."""
        value = getattr(self.scan.prediction, name)
        if value is not None:
            return value, value, value
        if name not in self.scan.prediction.bounds:
            return None
        low, high = self.scan.prediction.bounds[name]
        return low, self.scan.estimate.point[name], high

    def result(self) -> list[RenderableType]:
        """The parts of the view, in order."""
        return [
            *self._headline(),
            Text(),
            *self._counters(),
            Text(),
            *self._processes(),
            Text(),
            *self._notes(),
        ]

    def _headline(self) -> list[RenderableType]:
        page = self.scan.pages.page_size
        total = self.scan.present.pages
        low, point, high = self._figure("frames_freed") or (0, 0, 0)
        text = Text()
        if not high:
            text.append("KSM would free nothing", "bold")
        elif low == high:
            text.append(f"KSM would free {size(point * page)}", "bold green")
        else:
            text.append(f"KSM would free about {size(point * page)}", "bold green")
            text.append(f", {span(low * page, high * page, in_bytes=True)}")
        shares = dict.fromkeys(f"{n / max(1, total):.1%}" for n in (low, high))
        text.append(f": {' to '.join(shares)} of the {size(total * page)} here.")
        kept, holds = len(self.scan.pages.hashes), f"{self.scan.estimate.confidence:.0%}"
        if self.scan.memory_bytes is not None:
            words = (
                f"An estimate: kept {part_of(self.scan.rate)} contents, with all their copies, so "
                f"that it fits into {size(self.scan.memory_bytes)} ({count(kept, 'page')} kept of "
                f"{total:,}); each range holds with {holds}."
            )
        else:
            words = (
                f"An estimate from {self.scan.rate:.1%} of the memory ({count(kept, 'page')} read "
                f"of {total:,}); each range holds with {holds}."
            )
        return [text, Text(words)]

    def _counters(self) -> list[RenderableType]:
        rows = []
        for name in (*FIGURES, *IN_BYTES):
            figure = self._figure(name)
            words = size if name in IN_BYTES else "{:,}".format
            if figure is None:
                rows.append([name, "unknown", ""])
                continue
            low, point, high = figure
            # With its figure: a narrow terminal has no room for the column before.
            exact = f"{words(low)}, exact"
            between = exact if low == high else f"{words(low)} to {words(high)}"
            rows.append([name, words(point), between])
        columns = [
            Column("COUNTER", 9, right=False),
            Column("ABOUT", 3),
            Column("RANGE", 5, right=False),
        ]
        title = Text("The kernel's counters, once ksmd has converged", "bold")
        return [title, fitting(columns, rows, self.width, plain=self.plain, flexible=0)]

    def _processes(self) -> list[RenderableType]:
        found = sorted(
            zip(self.scan.pages.processes, self.scan.by_process.tolist(), strict=True),
            key=lambda row: (-row[1], row[0].id.pid),
        )
        shown = found if self.verbose else found[:TOP]
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(justify="right")
        grid.add_column(justify="right")
        grid.add_column()
        for process, pages in shown:
            grid.add_row(str(process.id.pid), f"{pages:,}", safe(process.name, plain=self.plain))
        title = Text("Processes, by pages (exact)", "bold")
        parts: list[RenderableType] = [title, Padding(grid, (0, 0, 0, 2))]
        if len(found) > len(shown):
            rest = sum(pages for _, pages in found[len(shown) :])
            more = f"  and {len(found) - len(shown)} more: {rest:,} pages (-v shows all)"
            parts.append(Text(more, "dim"))
        return parts

    def _notes(self) -> list[RenderableType]:
        scan = self.scan
        exact = typable(f"`dedup scan {safe(self.choice, plain=self.plain)}`")
        does = "reads everything" if scan.memory_bytes is None else "keeps everything"
        words = [f"{exact} {does}: exact figures, and processes, regions and contents besides."]
        low, _, high = self._figure("frames_freed") or (0, 0, 0)
        if high - low > WIDE * scan.present.pages:
            words.append(
                "The range is wide: many contents are there a few times each, and a sample rarely "
                "meets those twice. A larger one narrows it most."
                if scan.memory_bytes is None
                else "The range is wide: more memory (`--memory`) narrows it most."
            )
        if not scan.estimate.solved:
            words.append(
                "The programme that estimates had no solution: the ranges are what is certain."
            )
        if not scan.pages.frames_known:
            words.append(
                "Frame numbers are hidden from you: pages that processes share since a fork can't "
                "be told from copies, which widens the ranges. Root sees them."
            )
        words.append(self._looks())
        parts: list[RenderableType] = [Text("Notes", "bold")]
        parts += [indented(w) for w in (*words, *self._left_out())]
        return parts

    def _looks(self) -> str:
        scan = self.scan
        if scan.interval_seconds is None:
            return (
                "One look: what changes all the time can't be told from what stays, so "
                "pages_volatile is unknown and savings may be less. `--passes 2` tells."
            )
        words = f"{scan.pages.looks} looks, {scan.interval_seconds:.3g} s apart"
        full = price.duration(scan.full_scan_seconds)
        if scan.full_scan_seconds > scan.interval_seconds:
            return (
                f"{words}; ksmd's full scan takes longer, {full}: "
                "what changes more slowly than the looks counts as stable here."
            )
        return f"{words}; ksmd's full scan takes {full}."

    def _left_out(self) -> list[str]:
        left = summary.left_out(self.scan.pages.skipped)
        words = [
            f"Left out: {count(len(e.pids), 'process', 'processes')}, "
            f"{LEFT_OUT_WORDS.get(e.code, e.code)}"
            if len(e.pids) > 1
            else f"Left out: {safe(e.example, plain=self.plain)}"
            for e in left
        ]
        if self.scan.tally.unread_pages:
            words.append(f"{count(self.scan.tally.unread_pages, 'page')} could not be read")
        return words
