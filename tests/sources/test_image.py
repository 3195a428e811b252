"""Raw memory: pages, holes, the end; and a guest's memory as QEMU saves it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dedup.errors import BadInput
from dedup.estimate import fingerprints
from dedup.estimate.key import Key
from dedup.report import jsonout, text
from dedup.scanning import Plan, scan_files, scan_pids
from dedup.sources.files import MAGICS
from dedup.sources.live import Options
from tests.sources.memory_files import (
    PAGE,
    SEED,
    ZERO,
    Elf,
    Load,
    contents,
    digest,
    is_zero,
    page,
    scan,
)


def test_pages_from_address_0_on(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(page("a") + ZERO + page("a") + page("b"))
    found = scan(("image", path))
    pages = found.pages
    assert contents(pages) == {
        0: digest(page("a")),
        PAGE: digest(ZERO),
        2 * PAGE: digest(page("a")),
        3 * PAGE: digest(page("b")),
    }
    assert is_zero(pages, PAGE)
    assert (found.prediction.pages_shared, found.prediction.frames_freed) == (1, 1)
    assert pages.stored[0].hole_pages == 0
    assert found.complete


def test_guests_have_frames_of_their_own(tmp_path: Path) -> None:
    """Equal pages at the same address are copies, not one frame since a fork."""
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(page("a") + page(name))
    found = scan(("image", tmp_path / "one"), ("image", tmp_path / "two")).prediction
    assert (found.pages_shared, found.pages_sharing, found.frames_freed) == (1, 1, 1)


@pytest.mark.parametrize("cut", [False, True])
def test_holes_are_zeros(tmp_path: Path, cut: bool) -> None:
    """Written out or not, a hole is the same zeros."""
    path = tmp_path / "ram"
    with path.open("wb") as file:
        file.seek(100 * PAGE)
        file.write(page("a") + page("b"))
        file.seek(300 * PAGE)
        file.write(page("c"))
        file.truncate(400 * PAGE)
    if cut:
        full = path.read_bytes()
        path = tmp_path / "full"
        path.write_bytes(full)
    found = scan(("image", path))
    have = contents(found.pages)
    assert sorted(have) == [i * PAGE for i in range(400)]
    assert have[300 * PAGE] == digest(page("c"))
    assert sum(h == digest(ZERO) for h in have.values()) == 397
    assert found.prediction.breakdown.zero_pages == 397 - 2  # two stable nodes at 256 each
    holes = found.pages.stored[0].hole_pages
    assert holes == 0 if cut else 300 < holes <= 397


def test_figures_go_from_those_without_zeros_to_those_with_them(tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(page("a") * 3 + ZERO * 10 + page("b"))
    p = scan(("image", tmp_path / "ram")).prediction
    assert p.bounds["pages_shared"] == (1, 2)
    assert p.bounds["pages_sharing"] == (2, 11)
    assert p.bounds["frames_freed"] == (2, 11)
    assert p.pages_unshared == 1
    assert p.processes[0].bounds["ksm_rmap_items"] == (4, 14)
    assert p.breakdown.zero_pages == 9
    # Zeros of live processes are known to be there.
    from tests.kernel_fixtures import Target

    with Target() as target:
        target.do("map", name="a", pages=300)
        target.do("fill", name="a", at=0, count=300, what="zero")
        both = scan(("image", tmp_path / "ram"), pids=(target.pid,)).prediction
    low, high = both.bounds["pages_sharing"]
    assert low > 290
    assert high - low in range(8, 12)


def test_all_of_it_is_a_hole(tmp_path: Path) -> None:
    (tmp_path / "ram").touch()
    os.truncate(tmp_path / "ram", 1000 * PAGE)
    found = scan(("image", tmp_path / "ram"))
    assert set(contents(found.pages).values()) == {digest(ZERO)}
    assert found.tally.bytes_read == 0


def test_a_hole_beyond_all_measure(tmp_path: Path) -> None:
    """A file that takes no room must not take memory."""
    (tmp_path / "ram").touch()
    os.truncate(tmp_path / "ram", 1 << 42)
    with pytest.raises(BadInput, match="bytes of holes"):
        scan(("image", tmp_path / "ram"))


def test_bytes_at_the_end_that_make_no_page(tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(page("a") + b"rest")
    found = scan(("image", tmp_path / "ram"))
    assert contents(found.pages) == {0: digest(page("a"))}
    assert not found.complete
    assert [(s.code, "4 bytes" in s.what) for s in found.pages.skipped] == [("part-of-page", True)]


def test_what_is_no_image(tmp_path: Path) -> None:
    Elf([Load(PAGE, page("a"))]).write(tmp_path / "core")
    (tmp_path / "small").write_bytes(b"small")
    (tmp_path / "disk").write_bytes(b"QFI\xfb" + bytes(PAGE))
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    for name, words in (
        ("core", "is an ELF file"),
        ("small", "less than a page"),
        ("disk", "qcow2"),
        ("empty", "is empty"),
        ("fifo", "a FIFO"),
        ("/dev/zero", "a character device"),
        (".", "a directory"),
    ):
        with pytest.raises(BadInput, match=words):
            scan(("image", tmp_path / name))


@settings(
    max_examples=100, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(raw=st.binary(min_size=1), times=st.integers(1, 9000))
def test_any_bytes(tmp_path: Path, raw: bytes, times: int) -> None:
    (tmp_path / "ram").write_bytes(raw * times)
    whole = [(raw * times)[i : i + PAGE] for i in range(0, len(raw) * times, PAGE)]
    try:
        found = scan(("image", tmp_path / "ram"))
    except BadInput:
        known = (b"\x7fELF", *(magic for magic, _, _ in MAGICS))
        assert len(raw * times) < PAGE or (raw * times).startswith(known)
        return
    assert list(contents(found.pages).values()) == [digest(p) for p in whole if len(p) == PAGE]


def test_a_copy_in_a_live_process_and_in_a_file(tmp_path: Path) -> None:
    """Both in one scan: a file stays as it is from look to look, and is a process of its own."""
    from tests.kernel_fixtures import Target

    with Target() as target:
        start = target.do("map", name="a", pages=20)
        target.do("put", name="a", at=0, what=["shared content"] * 20)
        from tests.target import content

        (tmp_path / "ram").write_bytes(content("shared content") + page("b"))
        found = scan(("image", tmp_path / "ram"), pids=(target.pid,))
        assert found.passes >= 2
        pages = found.pages
        assert [p.stored for p in pages.processes] == [None, 0]
        mine, other = contents(pages, 0), contents(pages, 1)
        assert other == {0: digest(content("shared content")), PAGE: digest(page("b"))}
        assert mine[start] == other[0]
        of_file = pages.process_of_region()[pages.run_region] == 1
        first = int(pages.run_first[of_file][0])
        assert bool(pages.present[first])
        # The file's copy merges with those of the process.
        assert found.prediction.processes[1].ksm_merging_pages == 1


# -- a guest of QEMU's -----------------------------------------------------------------------------

MIB = 64


class Guest:
    """A machine that runs its firmware, with a monitor."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-accel", "tcg", "-m", str(MIB), "-display", "none",
             "-nodefaults", "-monitor", "stdio"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.pid = self.process.pid
        self._in: IO[bytes] = self.process.stdin
        self._out: IO[bytes] = self.process.stdout
        self._answer()
        # The first prompt comes before the guest has memory; an answer only after it.
        self.do("gpa2hva 0")

    def _answer(self) -> str:
        got = b""
        while not got.endswith(b"\n(qemu) "):
            part = os.read(self._out.fileno(), 65536)
            assert part, got
            got += part
        return got.decode()

    def do(self, command: str) -> str:
        self._in.write(command.encode() + b"\n")
        self._in.flush()
        return self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._in.close()
        self._out.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("needs qemu-system-x86_64")
    machine = Guest()
    yield machine
    machine.close()


def memory_of(guest: Guest) -> dict[int, int]:
    """Hash of each page there by its physical address."""
    start = int(re.search(r"is (0x[0-9a-f]+)", guest.do("gpa2hva 0"))[1], 16)  # type: ignore[index]
    plan = Plan(options=Options(seed=SEED), passes=1)
    pages = scan_pids([guest.pid], plan).pages
    (ram,) = (r for r in pages.regions if r.guest)
    assert (ram.start, ram.end) == (start, start + (MIB << 20))
    return {at - start: h for at, h in contents(pages).items() if 0 <= at - start < MIB << 20}


def test_a_saved_guest_is_the_live_one(guest: Guest, tmp_path: Path) -> None:
    """Page by page, by `pmemsave` and by `dump-guest-memory`."""
    end = time.monotonic() + 60
    while sum(h != digest(ZERO) for h in memory_of(guest).values()) < 20:
        assert time.monotonic() < end, "the firmware wrote nothing"
        time.sleep(0.05)
    guest.do("stop")
    alive = {at: h for at, h in memory_of(guest).items() if h != digest(ZERO)}
    assert len(alive) >= 20
    guest.do(f'pmemsave 0 {MIB << 20} "{tmp_path}/ram"')
    guest.do(f'dump-guest-memory "{tmp_path}/core"')
    ram = contents(scan(("image", tmp_path / "ram")).pages)
    # Between 640 KiB and 1 MiB the machine has video memory and firmware in place of its memory.
    low, high = 640 << 10, 1 << 20
    alive = {at: h for at, h in alive.items() if not low <= at < high}
    assert {at: ram[at] for at in alive} == alive
    assert len(ram) == (MIB << 20) // PAGE
    zero = {h for at, h in ram.items() if at not in alive and not low <= at < high}
    assert zero == {digest(ZERO)}
    core = scan(("core", tmp_path / "core"))
    dumped = contents(core.pages)
    assert {at: dumped[at] for at in alive} == alive
    assert core.pages.processes[0].name == "core"


def test_fingerprints_of_a_guest(guest: Guest, tmp_path: Path) -> None:
    """Its memory is found in QEMU's, and a saved one has the same contents."""
    key = Key(b"g" * 32)
    end = time.monotonic() + 60
    while sum(h != digest(ZERO) for h in memory_of(guest).values()) < 20:
        assert time.monotonic() < end, "the firmware wrote nothing"
        time.sleep(0.05)
    guest.do("stop")
    plan = Plan(options=Options(seed=key.seed), passes=1)
    live = fingerprints.of_scan(scan_pids([guest.pid], plan), key)
    guest.do(f'pmemsave 0 {MIB << 20} "{tmp_path}/ram"')
    saved = fingerprints.of_scan(scan_files([("image", str(tmp_path / "ram"))], plan=plan), key)
    for one in (live, saved):
        assert one.facts.guest_bytes == MIB << 20
    assert (live.facts.source, saved.facts.source) == ("live", "image")
    assert saved.facts.scanned_pages == (MIB << 20) // PAGE
    # Memory of devices lies in their place between 640 KiB and 1 MiB: 96 pages.
    own = saved.contents.flags == 0
    other = ~np.isin(saved.contents.fingerprint[own], live.contents.fingerprint)
    assert saved.contents.mappings[own][other].sum() <= 96
    assert np.count_nonzero(~other) >= 20


def test_a_guest_is_told_by_its_size(guest: Guest) -> None:
    found = scan_pids([guest.pid], Plan(passes=1))
    (ram,) = (r for r in found.pages.regions if r.guest)
    assert text.region_name(ram) == f"guest RAM of {MIB}.0 MiB"
    assert sum(r["guest"] for r in jsonout.scan_object(found)["regions"]) == 1
