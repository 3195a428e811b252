from __future__ import annotations

import os
import unicodedata
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from dedup.cli.output import Output
from dedup.model import steady
from dedup.pages import Skipped
from dedup.report import text

from .scans import TUNABLES, ZERO, make, region

if TYPE_CHECKING:
    from collections.abc import Callable

    from dedup.scanning import Scan

HOSTILE = os.fsdecode(b"\x1b[2J\xff\xe2\x80\xae[red]" + b"x" * 200 + "文字".encode() * 30)


def render(
    scan: Scan, monkeypatch: pytest.MonkeyPatch, width: int = 80, **options: Any
) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    view = text.View(scan, width=width, **options)
    output = Output(color="never", ascii=options.get("plain", False))
    return output._render((*view.result(), *view.advice()), None).splitlines()


def flat(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def drifting() -> Scan:
    scan = make([[1] * 5, [2, 3]])
    scan.drifting = True
    scan.prediction = replace(
        scan.prediction, frames_freed=None, pages_sharing=None,
        bounds={"frames_freed": (1, 4), "pages_sharing": (1, 4)},
    )  # fmt: skip
    return scan


def extrapolated() -> Scan:
    scan = make([[1] * 5], full_scan_seconds=300)
    scan.extrapolated, scan.passes, scan.looks_seconds = True, 3, [0.0, 1.25, 5.0]
    return scan


def partial_passes() -> Scan:
    scan = make([[1] * 5, [2, 3]])
    scan.read_again_pages = 5
    scan.prediction = steady.not_read_again(scan.prediction, 2)
    return scan


SCANS: dict[str, Callable[[], Scan]] = {
    "plain": lambda: make([[1, 1, 2, ZERO, ZERO], [1, 3, ZERO]]),
    "many": lambda: make([[1, 2, p + 10] for p in range(40)]),
    "big": lambda: make([[1] * 3_000_000]),
    "nothing": lambda: make([[]]),
    "unlike": lambda: make([[1, 2, 3]]),
    "hidden": lambda: make([[1, 1, 2], [1, 3]], frames_known=False, shared=True),
    "one look": lambda: make([[1, 1]], looks=1),
    "no ksm": lambda: make([[1, 1]], tunables={}),
    "leftover": lambda: make([[1] * 100, [1] * 100, [1] * 57]),
    "hostile": lambda: make([[1, 1], [1]], name=HOSTILE, region_name=HOSTILE, user=HOSTILE),
    "partial": lambda: make(
        [[1, 1], [2]],
        skipped=tuple(Skipped(p, f"may not read {HOSTILE}", "not-permitted") for p in range(30)),
    ),
    "refused": lambda: make(
        [[1, 1]],
        extra_regions=(
            region(0, 99, 5, "/dev/shm/x", eligible=False, scanned=False, why="shared: " + "w" * 9),
            region(0, 200, 1, "[vdso]", eligible=False, scanned=False, why="special"),
        ),
    ),
    "drifting": drifting,
    "extrapolated": extrapolated,
    "partial passes": partial_passes,
    "swap": lambda: make([[1, 1]], extra_regions=(region(0, 99, 5, swap_bytes=8 << 20),)),
}


@pytest.mark.parametrize("width", [40, 53, 80, 100])
@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("verbose", [False, True])
def test_it_fits_and_is_safe(
    name: str, width: int, verbose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.cells import cell_len

    scan = SCANS[name]()
    for by in (None, "name"):
        lines = render(scan, monkeypatch, width, verbose=verbose, by=by)
        assert max(map(cell_len, lines)) <= width
        whole = "".join(lines)
        assert all(unicodedata.category(c)[0] != "C" for c in whole)


@pytest.mark.parametrize("name", SCANS)
def test_plain_is_ascii(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = render(SCANS[name](), monkeypatch, plain=True, verbose=True, by="user")
    assert "".join(lines).isascii()


def test_the_gain_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = render(SCANS["plain"](), monkeypatch)
    assert lines[0] == (
        "KSM would free 16.0 KiB (4 pages), 50% of the 32.0 KiB scanned in 2 processes."
    )
    rows = {line.strip().rsplit("  ", 2)[0].strip(): line.split()[-3:] for line in lines[1:6]}
    assert rows["zero pages"] == ["8.0", "KiB", "2"]
    assert rows["within a process"] == ["4.0", "KiB", "1"]
    assert rows["across processes"] == ["4.0", "KiB", "1"]


def test_nothing_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert render(SCANS["unlike"](), monkeypatch)[0] == (
        "KSM would free nothing in the 12.0 KiB (3 pages) scanned."
    )
    assert render(SCANS["nothing"](), monkeypatch)[0].startswith("Nothing to merge")


def test_ranges_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = flat(render(SCANS["hidden"](), monkeypatch))
    assert "KSM would free 0 B to 8.0 KiB (0 to 2 pages)" in hidden
    assert "Frame numbers are hidden" in hidden
    assert "sudo" in hidden
    leftover = flat(render(SCANS["leftover"](), monkeypatch))
    assert "99 to 100" in leftover
    assert "order in which ksmd comes by" in leftover


def test_memory_that_drifts(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = flat(render(drifting(), monkeypatch))
    assert "This memory is still changing its nature: no steady state can be given" in lines
    assert "KSM would free 4.0 KiB to 16.0 KiB (1 to 4 pages)" in lines
    assert "changing its nature" not in flat(render(make([[1, 1]]), monkeypatch))


def test_partial_passes_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = flat(render(partial_passes(), monkeypatch))
    assert "Later looks read 5 pages again, what would merge (--partial-passes)" in lines
    assert "pages_unshared 0 to 2" in lines
    assert "pages_volatile 0 to 2" in lines
    assert "KSM would free 16.0 KiB (4 pages)" in lines
    assert "unique: no other page was like it when it was read" in lines


def test_an_extrapolation_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        "ksmd's full scan takes 300 s; looks were 3.75 s apart at the most; the steady state is "
        "extrapolated from three looks."
    ) in flat(render(extrapolated(), monkeypatch))


def test_why_not_more(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = render(SCANS["plain"](), monkeypatch)
    at = lines.index("Why not more? Where 32.0 KiB of memory go")
    assert lines[at + 1 : at + 5] == [
        "  8.0 KiB  25%  copies of other pages: merged and freed",
        "  8.0 KiB  25%  all-zero pages: merged and freed",
        "  8.0 KiB  25%  the one copy of each content that stays for all to share",
        "  8.0 KiB  25%  unique: no other page is like it",
    ]
    extra = region(0, 99, 5, "/dev/shm/x", perms="rw-s", eligible=False, scanned=False, why="shm")
    assert "unknown shm" in flat(render(make([[1]], extra_regions=(extra,)), monkeypatch))


def test_why_of_each_region(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = flat(render(make([[1, 1, 2], [3]], region_name="a"), monkeypatch, verbose=True))
    assert "100 10000 a: duplicate 4.0 KiB, kept 4.0 KiB, unique 4.0 KiB" in lines
    assert "101 1010000 a: unique 4.0 KiB" in lines
    assert "10000 a: dup" not in flat(render(make([[1, 1]], region_name="a"), monkeypatch))


def test_top_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = make([[ZERO, ZERO, 1, 1], [ZERO], [1]], region_name="[heap]", name="redis")
    lines = render(scan, monkeypatch)
    at = lines.index("Top contents: what frees the most")
    assert [line.split() for line in lines[at + 1 : at + 4]] == [
        ["#", "COPIES", "FRAMES", "FREED", "LOOKS", "WHERE"],
        ["1", "3", "3", "8.0", "KiB", "zero", "2x", "redis:", "[heap]"],
        ["2", "3", "3", "8.0", "KiB", "has", "ended", "2x", "redis:", "[heap]"],
    ]
    assert "Top contents" not in flat(render(scan, monkeypatch, top=0))
    assert "1 1,000,000" not in flat(render(make([[1, 2]]), monkeypatch))


def test_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "2 looks, 0.2 s apart" in flat(render(make([[1, 1]]), monkeypatch))
    longer = flat(render(make([[1, 1]], full_scan_seconds=30), monkeypatch))
    assert "full scan takes longer, 30 s" in longer
    assert "`--interval 48`" in longer
    one = flat(render(SCANS["one look"](), monkeypatch))
    assert "pages_volatile unknown" in one
    assert "--passes 2" in one


def test_the_rest_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = flat(render(SCANS["many"](), monkeypatch))
    assert "and 32 more: 96 pages, 64 merging" in lines
    verbose = flat(render(SCANS["many"](), monkeypatch, verbose=True))
    assert "more:" not in verbose
    assert all(str(100 + p) in verbose for p in range(40))


def test_services(monkeypatch: pytest.MonkeyPatch) -> None:
    # s0: processes 0 and 2, s1: process 1, whose pages are in s0 too.
    lines = flat(render(make([[1] * 90, [2, 3], [1, 2, 3]]), monkeypatch, by="unit"))
    assert "By unit: what each would save alone" in lines
    assert "2 372.0 KiB 360.0 KiB 354.2 KiB s0" in lines
    assert "1 8.0 KiB 0 B -128 B s1" in lines
    assert "1 of 2 save more than they cost; merging between groups gives 8.0 KiB more." in lines


def test_what_is_left_alone_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = flat(render(SCANS["refused"](), monkeypatch))
    assert "1 mapping, 20.0 KiB: shared: wwwwwwwww" in lines
    assert "special" not in lines  # every process has those of the kernel
    assert "8.0 MiB are swapped out" in flat(render(SCANS["swap"](), monkeypatch))


def test_what_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = flat(render(SCANS["partial"](), monkeypatch))
    assert "30 processes, not permitted: 0, 1, 2, 3, 4, 5, 6, 7, ..." in lines
    assert text.partial(SCANS["partial"]()) == "30 processes not permitted"


@pytest.mark.parametrize(
    ("scan", "steps"),
    [
        (lambda: make([[1] * 99]), ["dedup run -- COMMAND", "echo 1 > /sys/kernel/mm/ksm/run"]),
        (lambda: make([[1] * 99], advised=True), ["dedup apply --pid N --start-ksmd"]),
        (
            lambda: make([[1] * 99], advised=True, tunables={**TUNABLES, "run": 1}),
            ["dedup apply --pid N"],
        ),
        (lambda: make([[1, 2]]), ["dedup scan --all --by name"]),
        (lambda: make([[1] * 99], tunables={}), ["grep KSM /boot/config-$(uname -r)"]),
    ],
)
def test_next_steps(scan: Any, steps: list[str]) -> None:
    found = [line for _, line in text.View(scan()).next_steps()]
    assert len(found) == len(steps)
    for line, wanted in zip(found, steps, strict=True):
        assert wanted in line


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (-(5 << 20), "-5.0 MiB"),
        (1 << 50, "1024.0 TiB"),
    ],
)
def test_sizes(n: int, words: str) -> None:
    assert text.size(n) == words
