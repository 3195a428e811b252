"""The one place that makes names safe to print.

Names of processes, files and users are chosen by others: they may hold escape sequences that
drive a terminal, directional marks that make it lie, or bytes that are no text.
"""

from __future__ import annotations

import unicodedata

ANONYMOUS = "(anonymous)"


def lossless(name: str) -> str:
    r"""Valid Unicode from which the bytes can be told: other bytes as ``\xNN``, ``\`` doubled."""
    if "\\" not in name and name.isprintable():
        return name
    return "".join(
        "\\\\" if c == "\\" else f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c
        for c in name
    ).encode("utf-8", "backslashreplace").decode()  # fmt: skip


def safe(name: str, *, plain: bool = False) -> str:
    """Nothing in it that a terminal obeys: control, format and undefined characters escaped."""
    if name.isascii() and name.isprintable():
        return name
    return "".join(c if _harmless(c, plain) else _escape(c) for c in name)


def _harmless(c: str, plain: bool) -> bool:
    # Cc control, Cf format (bidi, zero width), Cs surrogate, Co private, Cn undefined, Zl, Zp.
    if plain and not c.isascii():
        return False
    return c == " " or (unicodedata.category(c)[0] != "C" and c.isprintable())


def _escape(c: str) -> str:
    code = ord(c)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"  # a byte that is no UTF-8
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shorten(name: str, columns: int, *, plain: bool = False) -> str:
    """A safe name that fits some columns: its middle left out, since both ends tell."""
    from rich.cells import cell_len, set_cell_size

    name = safe(name, plain=plain)
    if cell_len(name) <= columns:
        return name
    dots = "..." if plain else "…"
    room = columns - len(dots)
    if room < 2:
        return set_cell_size(name, columns).rstrip()
    head = set_cell_size(name, room // 3).rstrip()
    tail = ""
    for c in reversed(name):
        if cell_len(c + tail) > room - cell_len(head):
            break
        tail = c + tail
    return head + dots + tail
