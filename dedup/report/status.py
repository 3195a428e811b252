"""KSM as it is, for people and as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table
from rich.text import Text

from dedup.kernel.ksm import PAGE_BYTES
from dedup.report.hints import as_root
from dedup.report.jsonout import envelope, host_object
from dedup.report.names import lossless, safe, shorten
from dedup.report.price import duration
from dedup.report.table import Column, fitting, indented
from dedup.report.text import TWO_COLUMNS_FROM, count, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from dedup.kernel.ksm import Use
    from dedup.observe.status import By, Group, Status

LOSING: Final = 5
"""Processes named in a note."""
USER_COLUMNS: Final = 12
RUN_FILE: Final = "/sys/kernel/mm/ksm/run"
UNMERGING: Final = 2

RATIO_DIGITS: Final = 4
SMALL_SHARE: Final = 0.001


def share(part: float) -> str:
    """A share for people: 2.8%, 40%, <0.1%."""
    if part < SMALL_SHARE:
        return "<0.1%" if part else "0%"
    return f"{part:.1%}" if part < 0.1 else f"{part:.0%}"


# -- JSON ------------------------------------------------------------------------------------------


def status_object(status: Status, by: By, groups: Sequence[Group], top: int) -> dict[str, Any]:
    """All of it; the groups that profit the most."""
    s = status.sample
    seen = status.uses
    return envelope(
        "status",
        host=host_object(status.kernel, PAGE_BYTES, status.tunables),
        counters=dataclasses.asdict(status.counters),
        saved={
            "saved_bytes": status.saved_bytes,
            "freed_bytes": status.freed_bytes,
            "rmap_items_bytes": status.rmap_items_bytes,
            "stable_nodes_bytes": status.stable_nodes_bytes,
            "at_most": True,
            "stale": status.stale,
        },
        ratios={
            "sharing_per_shared": _rounded(status.sharing_per_shared),
            "unshared_share": _rounded(status.unshared_share),
            "skipped_share": _rounded(status.skipped_share),
        },
        ksmd={
            "running": status.running,
            "cpu_seconds": status.ksmd_cpu_seconds,
            "uptime_seconds": status.uptime_seconds,
            "full_scan_seconds": status.full_scan_seconds,
        },
        sample=None
        if s is None
        else {
            "seconds": s.seconds,
            "full_scans": s.full_scans,
            "ksmd_cpu_seconds": s.ksmd_cpu_seconds,
            "ksmd_cores": s.ksmd_cores,
            "pages_scanned": s.pages_scanned,
            "pages_skipped": s.pages_skipped,
            "cow_ksm": s.cow_ksm,
            "ksm_swpin_copy": s.ksm_swpin_copy,
        },
        changed_tunables=[
            {"name": name, "value": value, "default": default}
            for name, (value, default) in status.changed_tunables.items()
        ],
        others=[lossless(o) for o in status.others],
        changed_for_now=[lossless(o) for o in status.changed_for_now],
        by=by,
        groups=[_group(g, by) for g in groups[:top]],
        processes={
            "known": seen.told,
            "mergeable": len(seen.found),
            "hidden": seen.hidden,
            "ksm_process_profit": status.process_profit,
            "groups": len(groups),
            "losing": [_losing(u) for u in losing(status)],
        },
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, RATIO_DIGITS)


def _group(group: Group, by: By) -> dict[str, Any]:
    first = group.uses[0]
    one: dict[str, Any] = {"name": lossless(group.name), "processes": len(group.uses)}
    if by == "process":
        info = first.info
        one = {
            "name": lossless(info.name),
            "pid": info.id.pid,
            "start_time": info.id.start_time,
            "user": lossless(info.user),
            "cgroup": lossless(info.cgroup),
            "unit": lossless(info.unit),
            "ksm_merge_any": first.counters.ksm_merge_any,
            "ksm_mergeable": first.counters.ksm_mergeable,
            "processes": 1,
        }
    return {
        **one,
        "ksm_rmap_items": group.ksm_rmap_items,
        "ksm_zero_pages": group.ksm_zero_pages,
        "ksm_merging_pages": group.ksm_merging_pages,
        "ksm_process_profit": group.ksm_process_profit,
    }


def _losing(use: Use) -> dict[str, Any]:
    return {
        "pid": use.info.id.pid,
        "name": lossless(use.info.name),
        "ksm_process_profit": use.counters.ksm_process_profit,
    }


def losing(status: Status) -> list[Use]:
    """Processes for which KSM costs more than it saves, the worst first."""
    found = [u for u in status.uses.found if u.counters.ksm_process_profit < 0]
    return sorted(found, key=lambda u: (u.counters.ksm_process_profit, u.info.id.pid))


# -- text ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class View:
    """The terminal view.

    Parameters
    ----------
    status : Status
    by : str
    groups : list of Group
        All, the most profit first.
    top : int
        Of them shown.
    width : int
        Columns.
    plain : bool
        Nothing but ASCII.
    """

    status: Status
    by: By
    groups: Sequence[Group]
    top: int
    width: int = 80
    plain: bool = False

    def result(self) -> list[RenderableType]:
        """The parts of the view, in order."""
        parts: list[RenderableType] = [*self._headline()]
        if self.status.freed_bytes or self.status.counters.rmap_items:
            parts += [self._account(), Text(), *self._counters()]
        parts += [Text(), *self._ksmd()]
        if self.status.uses.told:
            parts += [Text(), *self._groups()]
        if notes := self._notes():
            parts += [Text(), Text("Notes", "bold"), *(indented(n) for n in notes)]
        return parts

    def _headline(self) -> list[Text]:
        status = self.status
        text = Text()
        saved = status.saved_bytes
        followed = status.counters.rmap_items
        if not followed and not status.counters.ksm_zero_pages:
            text.append("KSM saves nothing", "bold")
            text.append(": ksmd runs, but " if status.running else ": ksmd is stopped, and ")
            if n := len(status.uses.found):
                words = count(n, "process is mergeable and has", "processes are mergeable and have")
                text.append(f"{words} no page that it follows yet.")
            elif status.uses.hidden or not status.uses.told:
                text.append("it follows no page.")
            else:
                text.append("no memory here is mergeable.")
        elif saved < 0:
            text.append(f"KSM costs {size(-saved)} more than it saves", "bold yellow")
            text.append(f": it follows {count(followed, 'page')}, and too few have a copy.")
        else:
            text.append(f"KSM saves {size(saved)} at most", "bold green")
            text.append(", after its own records.")
        if status.stale:
            text.append(
                " ksmd is stopped: its counters stand where its last visits left them, whatever "
                "has ended or was written to since."
            )
        return [text]

    def _account(self) -> Table:
        """What counts, what it costs, what is left."""
        status, c = self.status, self.status.counters
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
        for words, pages in (
            ("  pages_sharing", c.pages_sharing),
            ("  ksm_zero_pages", c.ksm_zero_pages),
        ):
            grid.add_row(
                words, size(pages * PAGE_BYTES), f"{pages:,}", style="" if pages else "dim"
            )
        records = -status.rmap_items_bytes - status.stable_nodes_bytes
        grid.add_row("  KSM's own records", size(records), f"{c.rmap_items:,}")
        grid.add_row(Text("  saved, at most", "bold"), Text(size(status.saved_bytes), "bold"), "")
        return grid

    def _counters(self) -> list[RenderableType]:
        c = self.status.counters
        cells = [
            ("pages_shared", f"{c.pages_shared:,}"),
            ("pages_unshared", f"{c.pages_unshared:,}"),
            ("pages_volatile", f"{c.pages_volatile:,}"),
            ("stable_node_chains", f"{c.stable_node_chains:,}"),
            ("stable_node_dups", f"{c.stable_node_dups:,}"),
            ("general_profit", size(c.general_profit)),
        ]
        parts: list[RenderableType] = [
            Text("Counters", "bold"),
            _cells(cells, wide=self.width >= TWO_COLUMNS_FROM),
        ]
        words = []
        if (ratio := self.status.sharing_per_shared) is not None:
            words.append(f"a kept frame stands for {ratio:.1f} others (sharing / shared)")
        if (unshared := self.status.unshared_share) is not None:
            words.append(
                f"{share(unshared)} of the {count(c.rmap_items, 'page')} followed have no copy"
            )
        return [*parts, *([indented("; ".join(words))] if words else [])]

    def _ksmd(self) -> list[RenderableType]:
        status, s = self.status, self.status.sample
        t = status.tunables
        if status.running:
            advised = t.get("advisor_mode", "none") != "none"
            by = ", set by the advisor" if advised else ""
            state = f"runs: {t['pages_to_scan']:,} pages every {t['sleep_millisecs']} ms{by}"
        else:
            state = "unmerged everything (run=2)" if t["run"] == UNMERGING else "stopped (run=0)"
        rows = [("state", state)]
        scans = f"{status.counters.full_scans:,} full scans"
        if (seconds := status.full_scan_seconds) is not None:
            scans += f"; one takes about {duration(seconds)}"
        rows.append(("scans", scans))
        if status.ksmd_cpu_seconds is not None:
            boot = status.ksmd_cpu_seconds / status.uptime_seconds
            words = f"{duration(status.ksmd_cpu_seconds)} since boot, {share(boot)} of a core"
            if s is not None and s.ksmd_cores is not None:
                words = f"{share(s.ksmd_cores)} of a core now; {words}"
            rows.append(("CPU", words))
        if s is not None and status.running:
            words = f"{(s.pages_scanned + s.pages_skipped) / s.seconds:,.0f} pages/s"
            if s.pages_skipped:
                skipped = s.pages_skipped / (s.pages_scanned + s.pages_skipped)
                words += f", {share(skipped)} of them skipped by smart scan"
            rows.append(("visits", words))
        if s is not None and s.cow_ksm is not None:
            rows.append(
                ("broken", f"{s.cow_ksm / s.seconds:,.0f} merged pages/s: written to, or unmerged")
            )
            if s.ksm_swpin_copy:
                back = f"{s.ksm_swpin_copy / s.seconds:,.0f} merged pages/s came back as copies"
                rows.append(("swap", back))
        if changed := status.changed_tunables:
            words = ", ".join(f"{n}={v} (default {d})" for n, (v, d) in changed.items())
            rows.append(("settings", words))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        for name, words in rows:
            grid.add_row(f"  {name}", words)
        over = "" if s is None else f", over {duration(s.seconds)}"
        return [Text(f"ksmd{over}", "bold"), grid]

    def _groups(self) -> list[RenderableType]:
        shown = self.groups[: self.top]
        title = "Processes" if self.by == "process" else f"By {self.by}"
        parts: list[RenderableType] = [Text(f"{title}, by profit", "bold")]
        if not self.groups:
            words = "none in sight is mergeable" if self.status.uses.hidden else "none is mergeable"
            return [*parts, indented(words)]
        columns = [
            Column("MERGING", 6),
            Column("ZERO", 2),
            Column("FOLLOWED", 4),
            Column("PROFIT", 7),
        ]
        rows = [
            [
                f"{g.ksm_merging_pages:,}",
                f"{g.ksm_zero_pages:,}",
                f"{g.ksm_rmap_items:,}",
                size(g.ksm_process_profit),
            ]
            for g in shown
        ]
        if self.by == "process":
            columns = [Column("PID", 8), *columns, Column("ADVISED", 1, right=False),
                       Column("USER", 3, right=False)]  # fmt: skip
            rows = [
                [
                    g.name,
                    *row,
                    "all" if g.uses[0].counters.ksm_merge_any else "part",
                    shorten(g.uses[0].info.user, USER_COLUMNS, plain=self.plain),
                    g.uses[0].info.name,
                ]
                for g, row in zip(shown, rows, strict=True)
            ]
            columns.append(Column("NAME", 9, right=False))
        else:
            columns = [Column("PROCS", 5), *columns, Column(self.by.upper(), 9, right=False)]
            rows = [
                [f"{len(g.uses):,}", *row, g.name or "(none)"]
                for g, row in zip(shown, rows, strict=True)
            ]
        if shown:
            parts.append(fitting(columns, rows, self.width, plain=self.plain))
        rest = self.groups[len(shown) :]
        if rest:
            profit = size(sum(g.ksm_process_profit for g in rest))
            parts.append(
                indented(
                    f"and {len(rest)} more, with {profit} of profit (--top {len(self.groups)})",
                    "dim",
                )
            )
        return parts

    def _notes(self) -> list[str]:
        status, c = self.status, self.status.counters
        words = []
        if status.freed_bytes:
            words.append(
                "At most: memory that a fork had shared anyway counts as saved too"
                + (", and a fork copies ksm_zero_pages" if c.ksm_zero_pages else "")
                + "."
            )
        if status.process_profit and self.groups:
            words.append(
                "Profit is ksm_process_profit: a merged page counts in each process that maps it, "
                "the frame kept included. Of all processes it adds up to general_profit and the "
                f"pages_shared frames; of those in sight, to {size(status.process_profit)}."
            )
        words += self._losing()
        if status.uses.hidden:
            words.append(
                f"{count(status.uses.hidden, 'process is', 'processes are')} hidden from you: "
                f"`{as_root('dedup status')}` shows all. The host's counters are complete."
            )
        if not status.uses.told:
            words.append("This kernel has no /proc/PID/ksm_stat: processes can't be told apart.")
        if status.ksmd_cpu_seconds is None:
            words.append("ksmd is out of sight (in a container?), so its CPU is unknown.")
        words += [f"{o[:1].upper()}{o[1:]}." for o in (*status.others, *status.changed_for_now)]
        return [safe(w, plain=self.plain) for w in words]

    def _losing(self) -> list[str]:
        found = losing(self.status)
        if not found:
            return []
        names = ", ".join(
            f"{u.info.name} (pid {u.info.id.pid}, {size(u.counters.ksm_process_profit)})"
            for u in found[:LOSING]
        )
        if len(found) > LOSING:
            names += f" and {len(found) - LOSING} more"
        undo = as_root("dedup apply --undo")
        words = f"KSM costs more than it saves in {names}."
        return [f"{words} `{undo}` takes back what dedup made mergeable."]

    def advice(self) -> list[RenderableType]:
        """What to type next."""
        status = self.status
        steps = []
        if not status.running and status.uses.found:
            steps.append(("let ksmd merge", as_root(f"echo 1 > {RUN_FILE}")))
        if not status.uses.found and not status.uses.hidden:
            steps.append(("see what is worth merging", as_root("dedup scan --all --by name")))
        parts: list[RenderableType] = []
        for why, line in steps:
            parts += [Text("Next: ", "bold") + Text(why), indented(line, "cyan")]
        return [Text(), *parts] if parts else []


def _cells(cells: Sequence[tuple[str, str]], *, wide: bool) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    half = len(cells) // 2
    for _ in range(2 if wide else 1):
        grid.add_column()
        grid.add_column(justify="right")
    rows = zip(cells[:half], cells[half:], strict=True) if wide else ((c,) for c in cells)
    for row in rows:
        grid.add_row(*(word for cell in row for word in (f"  {cell[0]}", cell[1])))
    return grid
