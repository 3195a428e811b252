"""A scan for people: read at a glance, in 80 columns and down to 40."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dedup.report import price, summary
from dedup.report.hints import as_root, typable
from dedup.report.names import ANONYMOUS, safe, shorten
from dedup.report.table import Column, fitting, indented
from dedup.report.why import FREED_CODES, KERNELS_OWN, NO_MEMORY, Why

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

    from dedup.model.prediction import ProcessPrediction
    from dedup.pages import Process, Region
    from dedup.report.summary import By, RegionPages
    from dedup.report.why import Top
    from dedup.scanning import Scan

TOP: Final = 8
TOP_LEAST: Final = 3
"""Rows of a table, and of one in which nothing would merge."""
TOP_CONTENTS: Final = 5
COUNTERS: Final = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "ksm_zero_pages",
    "stable_node_chains",
    "stable_node_dups",
)
"""The kernel's, in pages and nodes, as they are listed."""
TWO_COLUMNS_FROM: Final = 72
NAMES: Final = 2
"""Names listed, where there are many."""
DRIFTING: Final = (
    "This memory is still changing its nature: no steady state can be given. "
    "The figures are ranges."
)
NUMBERS: Final = {2: "two", 3: "three", 4: "four", 5: "five"}
UNREAD_FIELDS: Final = frozenset({"pages_unshared", "pages_volatile"})
"""Fields that depend on pages that partial passes do not read again."""
RUN_FILE: Final = "/sys/kernel/mm/ksm/run"
LEFT_OUT_WORDS: Final = {
    "no-such-process": "no such process",
    "process-gone": "ended meanwhile",
    "no-memory": "no memory of their own",
    "not-permitted": "not permitted",
}


def size(n: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            break
        n /= 1024
    return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"


def count(n: int, one: str, many: str = "") -> str:
    """A number with its noun."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def span(low: int, high: int, *, in_bytes: bool = False) -> str:
    """A number, or from where to where."""
    words = size if in_bytes else "{:,}".format
    # Two sizes that read alike are one to the eye.
    return " to ".join(dict.fromkeys((words(low), words(high))))


@dataclass(slots=True)
class _Row:
    """A line of the table of regions."""

    name: str
    perms: str
    mark: str
    pages: int = 0
    copied: int = 0
    where: str = ""
    pid: str = ""


def partial(scan: Scan) -> str:
    """What a scan left out, in one sentence."""
    parts = [
        f"{count(len(e.pids), 'process', 'processes')} {LEFT_OUT_WORDS.get(e.code, e.code)}"
        if len(e.pids) > 1
        else e.example
        for e in summary.left_out(scan.pages.skipped)
    ]
    if scan.tally.unread_pages:
        parts.append(f"{count(scan.tally.unread_pages, 'page')} could not be read")
    return safe("; ".join(parts))


@dataclass(slots=True)
class View:
    """The terminal view of a scan.

    Parameters
    ----------
    scan : Scan
    by : str, optional
        Rank groups by this.
    verbose : bool
        All processes and regions.
    width : int
        Columns.
    plain : bool
        Nothing but ASCII.
    choice : str
        The options that chose these processes, for commands to type next.
    top : int
        Contents shown.
    """

    scan: Scan
    by: By | None = None
    verbose: bool = False
    width: int = 80
    plain: bool = False
    choice: str = "--pid N"
    top: int = TOP_CONTENTS
    regions: RegionPages = field(init=False)
    why: Why = field(init=False)

    def __post_init__(self) -> None:
        self.regions = summary.by_region(self.scan.pages)
        self.why = Why(self.scan, self.top)

    # -- figures -------------------------------------------------------------------------------

    def _range(self, name: str) -> tuple[int, int] | None:
        """A field of the prediction from lowest to highest; None where it is unknown."""
        value = getattr(self.scan.prediction, name)
        if value is not None:
            return value, value
        return self.scan.prediction.bounds.get(name)

    def _known(self, name: str) -> tuple[int, int]:
        return self._range(name) or (0, 0)

    # -- the whole -----------------------------------------------------------------------------

    def result(self) -> list[RenderableType]:
        """The parts of the view, in order."""
        parts: list[RenderableType] = [self._headline()]
        if self.scan.drifting:
            parts.append(Text(DRIFTING, "bold yellow"))
        if self._known("frames_freed")[1] > 0:
            parts.append(self._account())
        parts += [Text(), *self._counters()]
        if self._known("frames_freed")[1] > 0:
            parts += [Text(), *self._price()]
        parts += [*self._why_not_more(), *self._contents()]
        if self.by is not None:
            parts += [Text(), *self._services(self.by)]
        parts += [Text(), *self._processes(), Text(), *self._regions()]
        parts += [Text(), *self._notes()]
        return parts

    def _headline(self) -> Text:
        scan = self.scan
        page = scan.pages.page_size
        total = scan.scanned_pages
        low, high = self._known("frames_freed")
        text = Text()
        scanned = size(total * page)
        if total == 0:
            text.append("Nothing to merge", "bold")
            text.append(": no page here that KSM would look at.")
        elif high <= 0:
            text.append("KSM would free nothing", "bold")
            text.append(f" in the {scanned} ({count(total, 'page')}) scanned.")
        else:
            text.append(
                f"KSM would free {span(low * page, high * page, in_bytes=True)}", "bold green"
            )
            text.append(f" ({span(low, high)} pages), {self._share(low, high, total)} of the ")
            text.append(f"{scanned} scanned")
            n = len(scan.pages.processes)
            text.append(f" in {n} processes." if n > 1 else ".")
        return text

    @staticmethod
    def _share(low: int, high: int, total: int) -> str:
        shares = [
            f"{n / total:.1%}" if n / total < 0.1 else f"{n / total:.0%}" for n in (low, high)
        ]
        return " to ".join(dict.fromkeys(shares))

    def _account(self) -> Table:
        """Where the memory comes from, what it costs, what is left."""
        page = self.scan.pages.page_size
        b = self.scan.prediction.breakdown
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(min_width=17)
        grid.add_column(justify="right")
        grid.add_column(justify="right")
        if not self.scan.pages.frames_known:
            grid.add_row("  at the most", "", "", style="dim")
        for words, pages in (
            ("  zero pages", b.zero_pages),
            ("  within a process", b.within_processes),
            ("  across processes", b.across_processes),
        ):
            grid.add_row(words, size(pages * page), f"{pages:,}", style="" if pages else "dim")
        grid.add_row("  KSM's own records", size(-self.scan.prediction.metadata_bytes), "")
        low, high = self._known("saved_bytes")
        if low == high:
            grid.add_row(Text("  saved", "bold"), Text(size(low), "bold"), "")
        else:
            grid.add_row(Text("  saved, at least", "bold"), Text(size(low), "bold"), "")
            grid.add_row(Text("  saved, at most", "bold"), Text(size(high), "bold"), "")
        split = self._range("thp_split")
        if split is None:
            grid.add_row("  huge pages split", "unknown", "")
        elif split[1]:
            grid.add_row("  huge pages split", "", span(*split))
        return grid

    def _counters(self) -> list[RenderableType]:
        cells = []
        for name in COUNTERS:
            r = self._range(name)
            cells.append((name, "unknown" if r is None else span(*r)))
        cells.append(("general_profit", span(*self._known("general_profit"), in_bytes=True)))
        title = Text("The kernel's counters, once ksmd has converged", "bold")
        grid = Table.grid(padding=(0, 2, 0, 0))
        wide = self.width >= TWO_COLUMNS_FROM
        half = len(cells) // 2
        for _ in range(2 if wide else 1):
            grid.add_column()
            grid.add_column(justify="right")
        rows = zip(cells[:half], cells[half:], strict=True) if wide else ((c,) for c in cells)
        for row in rows:
            grid.add_row(*(word for cell in row for word in (f"  {cell[0]}", cell[1])))
        return [title, grid]

    # -- why not more --------------------------------------------------------------------------

    def _why_not_more(self) -> list[RenderableType]:
        """Where all memory goes: what is freed, and why the rest is not."""
        page = self.scan.pages.page_size
        total = sum(p.pages or 0 for p in self.why.whole if p.code not in NO_MEMORY)
        if not total:
            return []
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(justify="right", no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
        grid.add_column(ratio=1)
        for part in self.why.whole:
            if part.pages is None and part.code in NO_MEMORY:
                continue
            share = ""
            if part.pages is not None and part.code not in NO_MEMORY:
                share = self._share(part.pages, part.pages, max(1, total))
                share = "<0.1%" if share == "0.0%" else share
            grid.add_row(
                "unknown" if part.pages is None else size(part.pages * page),
                share,
                part.words,
                style="green" if part.code in FREED_CODES else "",
            )
        title = f"Why not more? Where {size(total * page)} of memory go"
        return [Text(), Text(title, "bold"), Padding(grid, (0, 0, 0, 2))]

    def _contents(self) -> list[RenderableType]:
        """The contents that free the most."""
        if not self.why.contents:
            return []
        page = self.scan.pages.page_size
        rows = []
        for number, t in enumerate(self.why.contents, 1):
            low, high = t.content.frames_freed
            frames = t.content.frames
            rows.append(
                [
                    str(number),
                    f"{t.content.mappings:,}",
                    "unknown" if frames is None else f"{frames:,}",
                    span(low * page, high * page, in_bytes=True),
                    t.looks_like or "has ended",
                    self._where(t),
                ]
            )
        columns = [
            Column("#", 1),
            Column("COPIES", 3),
            Column("FRAMES", 0),
            Column("FREED", 6),
            Column("LOOKS", 5, right=False),
            Column("WHERE", 9, right=False),
        ]
        return [Text(), Text("Top contents: what frees the most", "bold"),
                self._table(columns, rows)]  # fmt: skip

    def _where(self, top: Top) -> str:
        """Processes and regions with a content, as unsafe as their names."""
        names = self.why.names_of(top.content)
        words = ", ".join(name or ANONYMOUS for name, _ in names[:NAMES])
        if len(names) > NAMES:
            words += f" and {len(names) - NAMES} more"
        processes = self.scan.pages.processes
        if len(processes) == 1:
            return words
        counts: dict[str, int] = {}
        for p, _ in self.why.processes_of(top.content):
            counts[processes[p].name] = counts.get(processes[p].name, 0) + 1
        most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        who = ", ".join(f"{n}x {name}" if n > 1 else name for name, n in most[:NAMES])
        if len(most) > NAMES:
            who += f" and {sum(n for _, n in most[NAMES:])} more"
        return f"{who}: {words}"

    def _price(self) -> list[RenderableType]:
        """What it costs, at the present pace and at others."""
        found = price.rows(self.scan)
        if not found:
            return [Text("pages_to_scan is 0: ksmd scans nothing, at no price", "bold")]
        calibrated = any(cpu for _, _, cpu, _ in found)
        columns = [Column("PAGES A BATCH", 9), Column("CONVERGED IN", 9, right=False)]
        if calibrated:
            columns += [Column("CPU UNTIL THEN", 2, right=False), Column("CORE LATER", 1)]
        else:
            found = found[:1]
        shown = [list(row[: len(columns)]) for row in found]
        sleep = {**self.scan.tunables, **self.scan.assumed}.get("sleep_millisecs", 20)
        title = f"ksmd's price, from scratch, with sleeps of {sleep} ms"
        return [Text(title, "bold"), self._table(columns, shown, flexible=0)]

    # -- tables --------------------------------------------------------------------------------

    def _table(
        self, columns: Sequence[Column], rows: Iterable[Sequence[str]], *, flexible: int = -1
    ) -> RenderableType:
        """A table that fits this view's width."""
        return fitting(columns, rows, self.width, plain=self.plain, flexible=flexible)

    def _services(self, by: By) -> list[RenderableType]:
        page = self.scan.pages.page_size
        found = summary.services(self.scan, by)
        shown = found if self.verbose else found[: 2 * TOP]
        rows = [
            [
                f"{s.processes:,}",
                size(s.pages * page),
                size(s.frames_freed_alone * page),
                size(s.saved_alone_bytes),
                s.name or "(none)",
            ]
            for s in shown
        ]
        most = "" if self.scan.pages.frames_known else ", at the most"
        parts: list[RenderableType] = [
            Text(f"By {by}: what each would save alone{most}", "bold"),
            self._table(
                [
                    Column("PROCS", 1),
                    Column("MEMORY", 0),
                    Column("FREED", 2),
                    Column("SAVED", 3),
                    Column(by.upper(), 9, right=False),
                ],
                rows,
            ),
        ]
        if len(found) > len(shown):
            parts.append(Text(f"  and {len(found) - len(shown)} more (-v shows all)", "dim"))
        worth = [s for s in found if s.saved_alone_bytes > 0]
        across = self._known("frames_freed")[1] - sum(s.frames_freed_alone for s in found)
        words = f"{len(worth)} of {len(found)} save more than they cost"
        if across > 0 and len(found) > 1:
            words += f"; merging between groups gives {size(across * page)} more"
        parts.append(Text(f"  {words}."))
        return parts

    def _processes(self) -> list[RenderableType]:
        scan = self.scan
        pages = summary.by_process(scan.pages, self.regions.pages).tolist()
        found = sorted(
            zip(scan.pages.processes, pages, scan.prediction.processes, strict=True),
            key=lambda row: (-_merging(row[2])[1], -row[1], row[0].id.pid),
        )
        shown = found if self.verbose else found[:TOP]
        rows = [self._process_row(*row) for row in shown]
        rest = found[len(shown) :]
        parts: list[RenderableType] = [
            Text("Processes, by pages that merge" if len(found) > 1 else "Process", "bold"),
            self._table(
                [
                    Column("PID", 5),
                    Column("PAGES", 1),
                    Column("MERGING", 4),
                    Column("PROFIT", 3),
                    Column("USER", 0, right=False),
                    Column("NAME", 9, right=False),
                ],
                rows,
            ),
        ]
        if rest:
            merging = (sum(_merging(r[2])[0] for r in rest), sum(_merging(r[2])[1] for r in rest))
            parts.append(
                Text(
                    f"  and {len(rest)} more: {sum(r[1] for r in rest):,} pages, "
                    f"{span(*merging)} merging (-v shows all)",
                    "dim",
                )
            )
        return parts

    def _process_row(
        self, process: Process, pages: int, prediction: ProcessPrediction
    ) -> list[str]:
        profit = prediction.ksm_process_profit
        profits = (
            (profit, profit)
            if profit is not None
            else prediction.bounds.get("ksm_process_profit", (0, 0))
        )
        return [
            str(process.id.pid or "-"),
            f"{pages:,}",
            span(*_merging(prediction)),
            span(*profits, in_bytes=True),
            shorten(process.user, 12, plain=self.plain),
            process.name,
        ]

    def _regions(self) -> list[RenderableType]:
        one_process = len(self.scan.pages.processes) == 1
        found = self._each_region() if self.verbose or one_process else self._alike_regions()
        if not self.verbose:
            found = [r for r in found if r.pages]
        found.sort(key=lambda r: (-r.copied, -r.pages))
        matter = max(TOP_LEAST, min(TOP, sum(1 for r in found if r.copied)))
        shown = found if self.verbose else found[:matter]
        each = one_process or self.verbose
        columns = [
            Column("START", 2, right=False) if each else Column("REGIONS", 2),
            Column("PERM", 0, right=False),
            Column("PAGES", 4),
            Column("COPIED", 5),
            Column("ADVISED", 1, right=False),
            Column("REGION", 9, right=False),
        ]
        rows = [[r.where, r.perms, f"{r.pages:,}", f"{r.copied:,}", r.mark, r.name] for r in shown]
        if each and not one_process:
            columns.insert(0, Column("PID", 3))
            rows = [[r.pid, *row] for r, row in zip(shown, rows, strict=True)]
        parts: list[RenderableType] = [Text("Regions, by pages that have a copy", "bold")]
        if rows:
            parts.append(self._table(columns, rows))
        rest = found[len(shown) :]
        if rest:
            parts.append(
                Text(
                    f"  and {len(rest)} more: {sum(r.pages for r in rest):,} pages, "
                    f"{sum(r.copied for r in rest):,} copied (-v shows all)",
                    "dim",
                )
            )
        if self.verbose:
            parts += self._why_of_regions()
        return [*parts, *self._not_scanned()]

    def _why_of_regions(self) -> list[RenderableType]:
        """Where the memory of each region goes, the largest first."""
        pages = self.scan.pages
        most = sorted(
            (-sum(n or 0 for n in parts.values()), i)
            for i, parts in enumerate(self.why.by_region)
            if pages.regions[i].scanned and parts.keys() - {"file"}
        )
        parts: list[RenderableType] = [Text("Where the memory of each region goes", "bold")]
        for _, i in most:
            region = pages.regions[i]
            where = f"{region.start:x} {safe(region_name(region), plain=self.plain)}"
            if len(pages.processes) > 1:
                where = f"{pages.processes[region.process].id.pid} {where}"
            goes = ", ".join(
                f"{code.replace('_', ' ')} {'?' if n is None else size(n * pages.page_size)}"
                for code, n in self.why.by_region[i].items()
            )
            parts.append(indented(f"{where}: {goes}"))
        return parts if most else []

    def _each_region(self) -> list[_Row]:
        pages = self.scan.pages
        return [
            _Row(
                name=region_name(r),
                perms=r.perms,
                mark=self._mark(r),
                pages=n,
                copied=copied,
                where=f"{r.start:x}",
                pid=str(pages.processes[r.process].id.pid),
            )
            for r, n, copied in zip(
                pages.regions,
                self.regions.pages.tolist(),
                self.regions.duplicates.tolist(),
                strict=True,
            )
        ]

    def _alike_regions(self) -> list[_Row]:
        """Regions of the same name and kind in all processes, added up."""
        found: dict[tuple[str, str, str], _Row] = {}
        many: dict[tuple[str, str, str], int] = {}
        for r in self._each_region():
            key = (r.name, r.perms, r.mark)
            row = found.setdefault(key, _Row(r.name, r.perms, r.mark))
            row.pages += r.pages
            row.copied += r.copied
            if r.pages:
                many[key] = many.get(key, 0) + 1
        for key, row in found.items():
            row.where = f"{many.get(key, 0):,}"
        return list(found.values())

    @staticmethod
    def _mark(region: Region) -> str:
        if not region.eligible:
            return "refused"
        if not region.advised_known:
            return "?"
        return "yes" if region.advised else "no"

    def _not_scanned(self) -> list[RenderableType]:
        """Mappings that KSM would refuse, or out of the scope, by reason."""
        sums: dict[str, list[int]] = {}
        for r in self.scan.pages.regions:
            if r.scanned or (r.name in KERNELS_OWN and not self.verbose):
                continue
            reason = r.why or "not marked mergeable (--scope advised)"
            entry = sums.setdefault(reason, [0, 0])
            entry[0] += 1
            entry[1] += r.anonymous_bytes if r.eligible else r.end - r.start
        if not sums:
            return []
        parts: list[RenderableType] = [Text("Left alone", "bold")]
        for reason, (n, total) in sorted(sums.items(), key=lambda item: -item[1][1]):
            parts.append(indented(f"{count(n, 'mapping')}, {size(total)}: {reason}"))
        return parts

    # -- notes and advice ----------------------------------------------------------------------

    def _notes(self) -> list[RenderableType]:
        scan = self.scan
        words = [
            self._looks(),
            *filter(None, [self._read_again(), self._smart(), price.advice(scan)]),
        ]
        if scan.overstated_most_pages:
            words.append(
                f"Up to {count(scan.overstated_most_pages, 'page')} of pages_sharing will be "
                "written to already at any moment: the counter learns of it at ksmd's next visit."
            )
        pinned = sum(p.pinned_bytes for p in scan.pages.processes)
        if pinned:
            words.append(
                f"{size(pinned)} are pinned (VmPin), for io_uring or a device, and will not merge; "
                "which pages they are can't be seen, so figures are ranges."
            )
        swapped = sum(r.swap_bytes for r in scan.pages.regions if r.scanned)
        if swapped:
            words.append(
                f"{size(swapped)} are swapped out: KSM can't merge them, and they stay so."
            )
        if scan.pages.stored:
            words += self._of_files()
        elif not scan.pages.frames_known:
            again = typable(f"`sudo dedup scan {safe(self.choice, plain=self.plain)}`")
            words.append(
                "Frame numbers are hidden from you: pages that processes share since a fork can't "
                f"be told from copies. {again} makes every figure exact."
            )
        elif scan.extrapolated or scan.drifting:
            words.append("Where the pages go, and the contents, are told by the last look.")
        elif any(p.bounds for p in scan.prediction.processes) or self._ordered():
            words.append(
                "Ranges: the order in which ksmd comes by the processes decides, and can't be seen."
            )
        if not scan.tunables:
            words.append("This kernel has no KSM: the figures are for one with the defaults.")
        parts: list[RenderableType] = [Text("Notes", "bold"), *(indented(w) for w in words)]
        if not scan.complete:
            parts += [Text("Left out", "bold yellow")]
            for entry in summary.left_out(scan.pages.skipped):
                parts.append(indented(self._left_out(entry)))
            if scan.tally.unread_pages:
                parts.append(
                    indented(f"{count(scan.tally.unread_pages, 'page')} could not be read")
                )
        return parts

    def _of_files(self) -> list[str]:
        """What files tell and what they don't."""
        scan = self.scan
        page = scan.pages.page_size
        words = []
        for s in summary.sources(scan.pages):
            what = f"{s.stored.kind} {safe(s.stored.path, plain=self.plain)}"
            words.append(
                f"{what}: {count(s.pages, 'page')}, {s.zero_pages:,} of them all zero"
                + (f" ({s.stored.hole_pages:,} in holes)." if s.stored.hole_pages else ".")
            )
        words += [safe(s.what, plain=self.plain) + "." for s in scan.pages.skipped if not s.amiss]
        zeros = scan.prediction.breakdown.zero_pages
        if zeros:
            words.append(
                f"Of what is freed at the most, {size(zeros * page)} are all-zero pages: a file "
                "can't tell them from memory that was never touched, which takes none. The low "
                "ends are without them."
            )
        words.append(
            "Files hold no frame numbers, huge pages or merged pages: figures are those of memory "
            "in small pages of which nothing is merged yet; a range where two processes have the "
            "same content at the same address, which may be one frame since a fork."
        )
        return words

    def _left_out(self, entry: summary.LeftOut) -> str:
        if len(entry.pids) <= 1:
            return safe(entry.example, plain=self.plain)
        listed = ", ".join(str(p) for p in (entry.pids if self.verbose else entry.pids[:TOP]))
        if not self.verbose and len(entry.pids) > TOP:
            listed += ", ..."
        words = LEFT_OUT_WORDS.get(entry.code, entry.code)
        return f"{len(entry.pids)} processes, {words}: {listed}"

    def _smart(self) -> str:
        """What smart scan changes; empty where nothing, or where it is off."""
        smart = self.scan.smart_scan
        if smart is None or not self.scan.tunables.get("smart_scan"):
            return ""
        if "pages_sharing" not in smart.bounds:
            return ""
        low, high = smart.bounds["pages_sharing"]
        words = f"With smart scan on, as here, pages_sharing ends between {low:,} and {high:,}"
        if smart.never_merging_pages is None:
            words += (
                f": {smart.bounds['never_merging_pages'][1]:,} equal pages became mergeable at "
                "different times, and may never be looked at in the same scan"
            )
        return words + ". `echo 0 > /sys/kernel/mm/ksm/smart_scan` merges all."

    def _ordered(self) -> bool:
        """Whether a figure is a range, but for those that partial passes make ranges of."""
        names = self.scan.prediction.bounds.keys()
        return bool(names - UNREAD_FIELDS if self.scan.read_again_pages is not None else names)

    def _read_again(self) -> str:
        """What looks that read only what would merge leave open; empty where they read it all."""
        n = self.scan.read_again_pages
        if n is None:
            return ""
        return (
            f"Later looks read {count(n, 'page')} again, what would merge (--partial-passes): "
            "savings are without those that changed, and without copies that came later; how many "
            "of the others are volatile, not unshared, is not known, nor whether the memory drifts."
        )

    def _looks(self) -> str:
        scan = self.scan
        full = f"{scan.full_scan_seconds:.3g} s"
        if scan.passes == 1 and all(p.stored is not None for p in scan.pages.processes):
            return (
                "Files are the memory of one moment: what changes all the time can't be told from "
                "what stays, so pages_volatile is unknown and savings may be less."
            )
        if scan.passes == 1:
            return (
                "One look: what changes all the time can't be told from what stays, so "
                "pages_volatile is unknown and savings may be less. `--passes 2` tells."
            )
        if scan.extrapolated:
            gaps = [b - a for a, b in pairwise(scan.looks_seconds)]
            return (
                f"ksmd's full scan takes {full}; looks were "
                f"{max(gaps, default=scan.interval_seconds):.3g} s apart at the most; the steady "
                f"state is extrapolated from {NUMBERS.get(scan.passes, str(scan.passes))} looks."
            )
        words = f"{scan.passes} looks, {scan.interval_seconds:.3g} s apart. "
        if scan.full_scan_seconds > scan.interval_seconds:
            longer = math.ceil(scan.full_scan_seconds * 1.6)
            return words + (
                f"ksmd's full scan takes longer, {full}: what changes more slowly than the looks "
                f"counts as stable here. `--interval {longer}` sees it."
            )
        return words + f"ksmd's full scan takes about {full}."

    def advice(self) -> list[RenderableType]:
        """What to type next."""
        parts: list[RenderableType] = [Text()]
        for i, (why, line) in enumerate(self.next_steps()):
            parts.append(Text("Next: " if i == 0 else "Then: ", "bold") + Text(why))
            parts.append(indented(line, "cyan"))
        return parts

    def next_steps(self) -> list[tuple[str, str]]:
        """What to type next, each with its reason."""
        scan = self.scan
        if not scan.tunables:
            return [("see what this kernel was built with", "grep KSM /boot/config-$(uname -r)")]
        guests = {s.kind for s in scan.pages.stored} == {"image"}
        if guests and self._known("saved_bytes")[1] > 0:
            line = "qemu-system-x86_64 -machine mem-merge=on ..."
            return [("start the guests with mergeable memory, QEMU's default", line)]
        if self._known("saved_bytes")[1] <= 0:
            return [("look at more processes together", "dedup scan --all --by name")]
        steps = []
        runs = scan.tunables.get("run") == 1
        copied = dict.fromkeys((True, False), 0)
        for r, n in zip(scan.pages.regions, self.regions.duplicates.tolist(), strict=True):
            copied[r.advised] += n
        if copied[False] > copied[True]:
            steps.append(("start the program with mergeable memory", "dedup run -- COMMAND"))
            if not runs:
                steps.append(("start ksmd, which is not running", as_root(f"echo 1 > {RUN_FILE}")))
        else:
            line = f"dedup apply {safe(self.choice, plain=self.plain)}"
            if not runs:
                line += " --start-ksmd"
            steps.append(("merge, and hold the kernel's counters against this", as_root(line)))
        return steps


def region_name(region: Region) -> str:
    """What a region is called."""
    if region.guest:
        return f"guest RAM of {size(region.end - region.start)}"
    return region.name or ANONYMOUS


def _merging(prediction: ProcessPrediction) -> tuple[int, int]:
    value = prediction.ksm_merging_pages
    if value is not None:
        return value, value
    return prediction.bounds.get("ksm_merging_pages", (0, 0))
