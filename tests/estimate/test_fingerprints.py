"""Fingerprints of real processes whose memory is laid out for it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dedup.estimate import fingerprints, store
from dedup.estimate.fingerprints import CONSTANT, ZERO, Instance
from dedup.estimate.key import Key
from dedup.model.merge import predict
from dedup.model.prediction import Rules
from dedup.pages import Flag
from dedup.scanning import Plan, Scan, scan_files, scan_pids
from dedup.sources.live import Options
from tests.kernel_fixtures import Target

KEY = Key(b"t" * 32)
PAGES = 60


@pytest.fixture
def target() -> Iterator[Target]:
    with Target() as one:
        one.do("map", name="a", pages=PAGES)
        one.do("put", name="a", at=0, what=["same"] * 10 + ["zero"] * 5)
        one.do("put", name="a", at=15, what=["unique"] * (PAGES - 15))
        yield one


def scanned(*pids: int, key: Key = KEY) -> Scan:
    plan = Plan(Options(seed=key.seed), interval_seconds=0.1)
    return scan_pids(list(pids), plan)


def rows(i: Instance) -> dict[int, tuple[int, int, int]]:
    c = i.contents
    return {
        int(n): (int(m), int(f), int(g))
        for n, m, f, g in zip(c.fingerprint, c.mappings, c.frames, c.flags, strict=True)
    }


def test_contents_of_a_process(target: Target) -> None:
    scan = scanned(target.pid)
    found = fingerprints.of_scan(scan, KEY, "service")
    f = found.facts
    assert f.label == "service"
    assert (f.processes, f.looks, f.page_size) == (1, 2, os.sysconf("SC_PAGESIZE"))
    assert f.scanned_pages == scan.scanned_pages
    assert int(found.contents.mappings.sum()) + f.volatile_pages == f.scanned_pages
    counts = list(rows(found).values())
    assert (10, 10, 0) in counts
    (zero,) = (row for row in counts if row[2] & ZERO)
    assert zero[0] >= 5
    assert zero[2] == ZERO | CONSTANT
    assert f.file_bytes
    assert f.page_table_bytes
    assert (f.source, f.guest_bytes) == ("live", 0)
    assert f.user is not None
    assert f.cgroup is not None


def test_two_scans_of_one_key_agree_and_of_two_do_not(target: Target) -> None:
    first, second = (fingerprints.of_scan(scanned(target.pid), KEY) for _ in range(2))
    assert first.facts.instance == second.facts.instance
    same = rows(first).keys() & rows(second).keys()
    assert len(same) > 0.9 * len(rows(first))
    other = Key(b"o" * 32)
    third = fingerprints.of_scan(scanned(target.pid, key=other), other)
    assert not rows(first).keys() & rows(third).keys()
    assert third.facts.instance != first.facts.instance
    # Nor does the file hold the hashes of the scan.
    scan = scanned(target.pid)
    assert not np.isin(scan.pages.hashes, first.contents.fingerprint).any()
    with pytest.raises(ValueError, match="seed"):
        fingerprints.of_scan(replace(scan, seed=1), KEY)
    with pytest.raises(ValueError, match="partial passes"):
        fingerprints.of_scan(replace(scan, read_again_pages=5), KEY)


@pytest.mark.root
def test_frames_that_fork_shares(target: Target) -> None:
    target.do("fork")
    children = Path(f"/proc/{target.pid}/task/{target.pid}/children").read_text().split()
    child = int(children[0])
    both = fingerprints.of_scan(scanned(target.pid, child), KEY)
    c = both.contents
    # The 10 equal pages are 20 mappings of 10 frames, and nobody else has them.
    assert ((c.mappings == 20) & (c.frames == 10) & (c.outside == 0)).any()
    one = fingerprints.of_scan(scanned(child), KEY).contents
    assert ((one.mappings == 10) & (one.frames == 10) & (one.outside == 10)).any()


@pytest.mark.root
def test_frames_are_those_that_the_model_counts(target: Target) -> None:
    """Alone, an instance needs its frames less those that the scan's prediction frees."""
    from dedup.estimate.instances import Incidence
    from dedup.estimate.rules import Rules as Kept

    scan = scanned(target.pid)
    found = fingerprints.of_scan(scan, KEY)
    freed = predict(scan.pages, scan.groups, Rules()).frames_freed
    curve = Incidence([found], Kept()).curve(1)
    frames = int(found.contents.frames.sum()) + found.facts.volatile_frames
    assert curve[0].frames == frames - (freed or 0)


def test_pages_on_the_shared_zero_page_count(target: Target) -> None:
    found = fingerprints.of_scan(scanned(target.pid), KEY)
    zero = fingerprints._zero(found.facts.page_size, KEY)
    c = found.contents
    at = int(np.searchsorted(c.fingerprint, zero))
    assert c.fingerprint[at] == zero
    assert c.flags[at] & ZERO
    before = int(c.mappings[at])
    more = fingerprints._with_zeros(c, 7, zero)
    assert more.mappings[at] == before + 7
    without = fingerprints.Contents(*(np.delete(getattr(c, name), at) for name in store.COLUMNS))
    added = fingerprints._with_zeros(without, 7, zero)
    assert (added.fingerprint == c.fingerprint).all()
    assert (added.mappings[at], added.frames[at], added.flags[at]) == (7, 7, ZERO | CONSTANT)


def test_a_file_holds_no_bytes_of_pages(target: Target, tmp_path: Path) -> None:
    target.do("put", name="a", at=20, what=["zero"])
    path = tmp_path / "x.dedup"
    store.save(fingerprints.of_scan(scanned(target.pid), KEY), path)
    data = path.read_bytes()
    assert b"same" * 2 not in data
    assert KEY.secret not in data
    assert str(target.pid).encode() not in data


def scanned_files(*named: tuple[str, Path], key: Key = KEY) -> Scan:
    plan = Plan(Options(seed=key.seed))
    return scan_files([(kind, str(path)) for kind, path in named], plan=plan)


@pytest.mark.root
def test_a_core_has_the_contents_of_the_process(target: Target, tmp_path: Path) -> None:
    if shutil.which("gcore") is None:
        pytest.skip("needs gcore: apt install gdb")
    os.kill(target.pid, signal.SIGSTOP)
    try:
        live = scanned(target.pid)
        subprocess.run(
            ["gcore", "-o", str(tmp_path / "core"), str(target.pid)],
            check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
    finally:
        os.kill(target.pid, signal.SIGCONT)
    core = scanned_files(("core", tmp_path / f"core.{target.pid}"))
    ours, theirs = (rows(fingerprints.of_scan(scan, KEY)) for scan in (live, core))
    # Read-only mappings of files are not eligible in a core, and zeros are there in any number.
    pages = live.pages
    every = np.arange(len(pages.hashes))
    in_core = np.isin(
        pages.address_of(every), core.pages.address_of(np.arange(len(core.pages.hashes)))
    )
    zero = (pages.frames & Flag.ZERO) != 0
    known = KEY.fingerprints(pages.hashes[in_core & ~zero])
    assert len(known) > 0.9 * np.count_nonzero(pages.present & ~zero)
    names, counts = np.unique(known, return_counts=True)
    for name, count in zip(names.tolist(), counts.tolist(), strict=True):
        assert theirs[name][0] >= count
    # All that is ours but in those mappings is there.
    assert ours.keys() - theirs.keys() <= set(KEY.fingerprints(pages.hashes[~in_core]).tolist())
    assert any(row[:2] == (10, 10) for row in theirs.values())


def test_what_files_do_not_tell(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    size = os.sysconf("SC_PAGESIZE")
    path.write_bytes(bytes(size) * 3 + b"a" * size + (b"a" * (size - 1) + b"b") * 2)
    found = fingerprints.of_scan(scanned_files(("image", path)), KEY)
    f = found.facts
    assert (f.label, f.source, f.guest_bytes, f.kernel, f.tunables) == (
        "ram",
        "image",
        6 * size,
        "",
        {},
    )
    assert not f.frames_known
    for fact in (f.file_bytes, f.shared_memory_bytes, f.page_table_bytes, f.kernel_bytes,
                 f.swap_bytes, f.user, f.cgroup):  # fmt: skip
        assert fact is None
    assert f.randomized == "unknown"
    assert sorted(rows(found).values()) == [(1, 1, CONSTANT), (2, 2, 0), (3, 3, ZERO | CONSTANT)]
    # The same memory is the same instance, whatever its file is called.
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    again = fingerprints.of_scan(scanned_files(("image", copy)), KEY)
    assert again.facts.instance == f.instance
    copy.write_bytes(path.read_bytes() + b"c" * size)
    other = fingerprints.of_scan(scanned_files(("image", copy)), KEY)
    assert other.facts.instance != f.instance
    store.save(found, tmp_path / "ram.dedup")
    assert store.load(tmp_path / "ram.dedup").facts == f


def test_files_beside_processes(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(b"a" * os.sysconf("SC_PAGESIZE"))
    plan = Plan(Options(seed=KEY.seed), passes=1)
    f = fingerprints.of_scan(scan_files([("image", str(path))], [target.pid], plan), KEY).facts
    assert (f.source, f.processes, f.user) == ("mixed", 2, None)
    assert f.kernel == os.uname().release
    assert f.file_bytes
