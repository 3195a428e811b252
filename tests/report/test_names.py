from __future__ import annotations

import os
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from dedup.report.names import lossless, safe, shorten

raw_names = st.binary(max_size=60).map(os.fsdecode) | st.text(max_size=60)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"redis-server", "redis-server"),
        ("größe 文".encode(), "größe 文"),
        (b"a\x1b]0;pwned\x07b", "a\\x1b]0;pwned\\x07b"),
        (b"a\nb\tc\r", "a\\x0ab\\x09c\\x0d"),
        (b"\x7f\xc2\x9b31m", "\\x7f\\x9b31m"),
        (b"\xff\xfe", "\\xff\\xfe"),
        ("\u202eexe.txt\u2066".encode(), "\\u202eexe.txt\\u2066"),
        ("a\u200bb\u2028c\ue000".encode(), "a\\u200bb\\u2028c\\ue000"),
        ("\U000e0041".encode(), "\\U000e0041"),
        (b"[bold]x[/bold]", "[bold]x[/bold]"),
    ],
)
def test_safe(raw: bytes, shown: str) -> None:
    assert safe(os.fsdecode(raw)) == shown


@given(raw_names)
def test_safe_leaves_nothing_that_a_terminal_obeys(name: str) -> None:
    for plain in (False, True):
        text = safe(name, plain=plain)
        assert all(unicodedata.category(c)[0] != "C" for c in text)
        text.encode()  # no surrogates
        assert text.isascii() or not plain


@given(raw_names, st.integers(4, 80), st.booleans())
def test_shorten_fits(name: str, columns: int, plain: bool) -> None:
    text = shorten(name, columns, plain=plain)
    assert cell_len(text) <= columns
    if cell_len(safe(name, plain=plain)) <= columns:
        assert text == safe(name, plain=plain)


def test_shorten_keeps_both_ends() -> None:
    text = shorten("/usr/lib/x86_64-linux-gnu/libcrypto.so.3", 24)
    assert text.startswith("/usr/")
    assert text.endswith("libcrypto.so.3")
    assert "…" in text
    assert "..." in shorten("/usr/lib/x86_64-linux-gnu/libcrypto.so.3", 24, plain=True)
    assert cell_len(shorten("文" * 40, 21)) <= 21


@given(st.binary(max_size=60))
def test_lossless_gives_the_bytes_back(raw: bytes) -> None:
    text = lossless(os.fsdecode(raw))
    text.encode()  # valid Unicode
    back = re.sub(
        rb"\\(\\|x([0-9a-f]{2}))",
        lambda m: bytes([int(m[2], 16)]) if m[2] else b"\\",
        text.encode(),
    )
    assert back == raw
