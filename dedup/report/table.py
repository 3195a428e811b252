"""Tables that fit: names shortened, columns left out where it is narrow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dedup.report.names import shorten

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

NAME_LEAST: Final = 14
"""Columns that a name gets before others are left out for it."""


def indented(words: str, style: str = "") -> RenderableType:
    """A line below a title."""
    return Padding(Text(words, style), (0, 0, 0, 2))


@dataclass(slots=True)
class Column:
    """A column of a table; those with the lowest `keep` go first where it is narrow."""

    header: str
    keep: int
    right: bool = True


def fitting(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    width: int,
    *,
    plain: bool = False,
    flexible: int = -1,
) -> RenderableType:
    """A table that fits some columns.

    The column `flexible` holds names, unsafe as they are.
    """
    flexible %= len(columns)
    table = [[c.header for c in columns], *([*row] for row in rows)]
    shown = list(range(len(columns)))
    room = width - 2

    def rest() -> int:
        fixed = [i for i in shown if i != flexible]
        return room - sum(max(len(row[i]) for row in table) + 2 for i in fixed)

    while rest() < NAME_LEAST and len(shown) > 2:
        shown.remove(min((i for i in shown if i != flexible), key=lambda i: columns[i].keep))
    out = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i in shown:
        right = columns[i].right
        out.add_column(columns[i].header, justify="right" if right else "left", no_wrap=True)
    for row in table[1:]:
        row[flexible] = shorten(row[flexible], max(4, rest()), plain=plain)
        out.add_row(*(Text(row[i]) for i in shown))
    return Padding(out, (0, 0, 0, 2))
