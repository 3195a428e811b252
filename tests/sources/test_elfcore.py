"""ELF cores: what is read of whole ones, that broken ones are refused, and real ones."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dedup.errors import BadInput, NotPermitted
from dedup.pages import Flag
from dedup.scanning import Plan as ScanPlan
from dedup.scanning import Scan, scan_pids
from dedup.sources import elfcore
from dedup.sources.live import LiveSource, Options
from tests.sources.memory_files import (
    PAGE,
    SEED,
    ZERO,
    Elf,
    Load,
    auxv,
    contents,
    digest,
    file_note,
    is_zero,
    page,
    prpsinfo,
    scan,
)

A, B, C = 0x10000, 0x7F0000000000, 0x7F0000400000


# -- whole ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [32, 64])
def test_pages_by_address(tmp_path: Path, bits: int, order: str) -> None:
    """Whatever class and byte order, and at offsets that are no multiple of a page."""
    loads = [Load(A, page("a") + ZERO + page("b")), Load(A + 8 * PAGE, page("a"))]
    path = Elf(loads, bits=bits, order=order, shift=1683).write(tmp_path / "core")
    pages = scan(("core", path)).pages
    assert contents(pages) == {
        A: digest(page("a")),
        A + PAGE: digest(ZERO),
        A + 2 * PAGE: digest(page("b")),
        A + 8 * PAGE: digest(page("a")),
    }
    assert [r.name for r in pages.regions] == ["", ""]
    assert is_zero(pages, A + PAGE)
    assert not is_zero(pages, A)


def test_more_pages_than_a_thread_takes_at_a_time(tmp_path: Path) -> None:
    many = [f"p {i % 40_000}".encode().ljust(PAGE, b".") for i in range(50_000)]
    path = Elf([Load(B, b"".join(many), hole=0)], shift=5).write(tmp_path / "core")
    found = contents(scan(("core", path), threads=2).pages)
    assert [found[B + i * PAGE] for i in range(50_000)] == [digest(p) for p in many]


def test_the_prediction_is_that_of_one_process(tmp_path: Path) -> None:
    loads = [Load(B, page("a") * 5 + page("b") * 2 + page("c"))]
    path = Elf(loads, [prpsinfo(4321, "served")]).write(tmp_path / "core")
    found = scan(("core", path))
    p = found.prediction
    assert (p.pages_shared, p.pages_sharing, p.pages_unshared) == (2, 5, 1)
    assert p.frames_freed == 5
    assert p.pages_volatile is None
    assert p.thp_split is None
    assert (found.pages.processes[0].id.pid, found.pages.processes[0].name) == (4321, "served")


def test_cores_are_processes(tmp_path: Path) -> None:
    """Copies at other addresses are copies; at the same one, maybe one frame since a fork."""
    one = Elf([Load(A, page("a")), Load(B, page("b"))]).write(tmp_path / "one")
    two = Elf([Load(B + PAGE, page("a")), Load(B, page("b"))]).write(tmp_path / "two")
    found = scan(("core", one), ("core", two))
    assert [p.name for p in found.pages.processes] == ["one", "two"]
    assert found.prediction.frames_freed is None
    assert found.prediction.bounds["frames_freed"] == (1, 2)
    exclusive = [bool(int(w) & int(Flag.EXCLUSIVE)) for w in found.pages.frames]
    assert sorted(exclusive) == [False, False, True, True]


def test_a_file_named_twice_is_one(tmp_path: Path) -> None:
    path = Elf([Load(A, page("a"))]).write(tmp_path / "core")
    (tmp_path / "link").symlink_to(path)
    assert len(scan(("core", path), ("core", tmp_path / "link")).pages.processes) == 1


def test_as_many_program_headers_as_only_a_section_can_say(tmp_path: Path) -> None:
    count = 70_000
    loads = [Load(B + 2 * i * PAGE, page("a") if i == count - 1 else b"") for i in range(count)]
    path = Elf(loads, xnum=True).write(tmp_path / "core")
    assert contents(scan(("core", path)).pages) == {loads[-1].address: digest(page("a"))}


def test_empty_and_partial_segments_are_said(tmp_path: Path) -> None:
    loads = [
        Load(A, memory=4 * PAGE),
        Load(B, page("a"), memory=3 * PAGE),
        Load(C, page("b")),
    ]
    found = scan(("core", Elf(loads).write(tmp_path / "core")))
    assert set(contents(found.pages)) == {B, C}
    (skipped,) = found.pages.skipped
    assert skipped.code == "not-dumped"
    assert skipped.pages == 6
    assert "of 3 segments 1 are empty and 1 there in part" in skipped.what
    assert found.complete


def test_what_is_eligible(tmp_path: Path) -> None:
    names = ["", "/bin/x", "/bin/x", "/memfd:m (deleted)", "", "", ""]
    loads = [Load(B + 16 * i * PAGE, page(f"e {i}"), flags=6) for i in range(len(names))]
    loads[1].flags = 5  # text
    vdso = B + 0x1000000
    loads[4] = Load(vdso - 2 * PAGE, page("vvar") * 2, flags=4)
    loads[5] = Load(vdso, page("vdso"), flags=5)
    loads[6] = Load(0xFFFFFFFFFF600000, page("vsyscall"), flags=5)
    mapped = [(x.address, x.address + PAGE, n) for x, n in zip(loads, names, strict=True) if n]
    notes = [auxv(page_size=PAGE, vdso=vdso), file_note(*mapped)]
    pages = scan(("core", Elf(loads, notes).write(tmp_path / "core"))).pages
    kinds = [(r.name, r.eligible, r.perms) for r in pages.regions]
    assert kinds == [
        ("", True, "rw-p"),
        ("/bin/x", False, "r-xp"),
        ("/bin/x", True, "rw-p"),
        ("/memfd:m (deleted)", False, "rw-s"),
        ("[vvar]", False, "r--p"),
        ("[vdso]", False, "r-xp"),
        ("[vsyscall]", False, "r-xp"),
    ]
    assert set(contents(pages)) == {loads[0].address, loads[2].address}
    assert all(r.why for r in pages.regions if not r.eligible)


def test_a_guest_of_qemu_by_its_physical_addresses(tmp_path: Path) -> None:
    loads = [
        Load(0, page("low"), flags=0, physical=0),
        Load(0, page("high") * 2, flags=0, physical=1 << 20, hole=PAGE),
    ]
    notes = [prpsinfo(9, "cpu"), ("QEMU", 0, bytes(432))]
    pages = scan(("core", Elf(loads, notes, shift=452).write(tmp_path / "guest"))).pages
    assert set(contents(pages)) == {0, 1 << 20, (1 << 20) + PAGE, (1 << 20) + 2 * PAGE}
    assert (pages.processes[0].id.pid, pages.processes[0].name) == (0, "guest")


def test_holes_are_zeros_but_not_in_room_that_was_only_reserved(tmp_path: Path) -> None:
    loads = [
        Load(B, page("a"), hole=64 * PAGE),
        Load(C, page("b") * 16, hole=(1 << 34), flags=0),
    ]
    found = scan(("core", Elf(loads).write(tmp_path / "core")))
    have = contents(found.pages)
    assert len(have) == 65 + 16
    assert [have[B + i * PAGE] for i in range(1, 65)] == [digest(ZERO)] * 64
    assert all(is_zero(found.pages, B + i * PAGE) for i in range(1, 65))
    # A block of the file system may be larger than a page.
    assert 0 < found.pages.stored[0].hole_pages <= 64


@pytest.mark.parametrize("shift", [0, 1683, 4095])
def test_a_copy_with_holes_gives_the_same(tmp_path: Path, shift: int) -> None:
    """Holes begin and end inside pages, where those are not aligned in the file."""
    half = [ZERO[:2500] + page(f"h {i}")[2500:] for i in range(4)]
    other = [page(f"o {i}")[:1500] + ZERO[1500:] for i in range(4)]
    some = [*half[:2], ZERO, other[0], ZERO, ZERO, half[2], ZERO, other[1], half[3], ZERO, other[2]]
    path = Elf([Load(B, b"".join(some * 5))], shift=shift).write(tmp_path / "core")
    raw = path.read_bytes()
    with (tmp_path / "holes").open("wb") as file:
        for at in range(0, len(raw), PAGE):
            block = raw[at : at + PAGE]
            if block.strip(b"\0"):
                file.seek(at)
                file.write(block)
        file.truncate(len(raw))
    dense, sparse = scan(("core", path)), scan(("core", tmp_path / "holes"))
    assert contents(sparse.pages) == contents(dense.pages)
    assert [contents(dense.pages)[B + i * PAGE] for i in range(len(some))] == [
        digest(p) for p in some
    ]
    assert sparse.pages.stored[0].hole_pages > 0
    assert dense.pages.stored[0].hole_pages == 0


def test_parts_of_pages_at_the_ends_of_a_segment_are_left(tmp_path: Path) -> None:
    path = Elf([Load(B + 100, page("x") + page("a") + page("y"))]).write(tmp_path / "core")
    raw = (page("x") + page("a") + page("y"))[PAGE - 100 :]
    assert contents(scan(("core", path)).pages) == {
        B + PAGE: digest(raw[:PAGE]),
        B + 2 * PAGE: digest(raw[PAGE : 2 * PAGE]),
    }


# -- broken ones -----------------------------------------------------------------------------------


def patched(path: Path, at: int, form: str, value: int) -> Path:
    raw = bytearray(path.read_bytes())
    struct.pack_into(form, raw, at, value)
    path.write_bytes(raw)
    return path


def whole(tmp_path: Path) -> Path:
    loads = [Load(A, page("a") * 3), Load(B, page("b"))]
    notes = [prpsinfo(1, "x"), auxv(page_size=PAGE), file_note((B, B + PAGE, "/f"))]
    return Elf(loads, notes).write(tmp_path / "core")


PHDR, SIZE = 64, 56
FIRST = PHDR + SIZE  # of the loads; the notes come first
BROKEN = {
    "a class that none is": (4, "<B", 7, "class"),
    "an order that none is": (5, "<B", 9, "order"),
    "an executable": (16, "<H", 2, "no core"),
    "headers beyond the end": (32, "<Q", 1 << 40, "beyond its end"),
    "headers at a huge offset": (32, "<Q", (1 << 64) - 1, "beyond its end"),
    "headers of another size": (54, "<H", 1, "program headers of 1 bytes"),
    "no headers": (56, "<H", 0, "has 0 program headers"),
    "more headers than bytes": (56, "<H", 60_000, "beyond its end"),
    "a number of headers without a section": (56, "<H", 0xFFFF, "program headers"),
    "an offset beyond the end": (FIRST + 8, "<Q", 1 << 50, "was cut"),
    "an offset that wraps": (FIRST + 8, "<Q", (1 << 64) - PAGE, "was cut"),
    "a huge size": (FIRST + 32, "<Q", (1 << 64) - 1, "more bytes in the file than in memory"),
    "addresses that wrap": (FIRST + 16, "<Q", (1 << 64) - PAGE, "end of all addresses"),
    "overlapping addresses": (FIRST + 16, "<Q", B - PAGE, "overlaps"),
    "notes beyond the end": (PHDR + 32, "<Q", 1 << 40, "more notes"),
    "notes at a huge offset": (PHDR + 8, "<Q", 1 << 62, "beyond its end"),
    "a note of a huge size": (PHDR + 3 * SIZE + 4, "<I", (1 << 32) - 1, "damaged notes"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_headers(tmp_path: Path, what: str) -> None:
    at, form, value, words = BROKEN[what]
    path = patched(whole(tmp_path), at, form, value)
    with pytest.raises(BadInput, match=words) as e:
        scan(("core", path))
    assert str(path) in e.value.message


def test_two_segments_of_the_same_bytes(tmp_path: Path) -> None:
    """They would make a small file a long read."""
    loads = [Load(B, page("a") * 100), *(Load(C + i * 200 * PAGE) for i in range(50))]
    path = Elf(loads).write(tmp_path / "core")
    raw = bytearray(path.read_bytes())
    first = raw[PHDR : PHDR + SIZE]
    for i in range(1, 51):
        raw[PHDR + i * SIZE : PHDR + (i + 1) * SIZE] = first
        struct.pack_into("<Q", raw, PHDR + i * SIZE + 16, C + i * 200 * PAGE)
    path.write_bytes(raw)
    with pytest.raises(BadInput, match="same bytes"):
        scan(("core", path))


def test_a_list_of_files_with_a_hostile_count(tmp_path: Path) -> None:
    note = ("CORE", 0x46494C45, struct.pack("<2Q", 1 << 60, 1))
    with pytest.raises(BadInput, match="NT_FILE"):
        scan(("core", Elf([Load(A, page("a"))], [note]).write(tmp_path / "core")))


def test_a_machine_with_other_pages(tmp_path: Path) -> None:
    path = Elf([Load(A, page("a"))], [auxv(page_size=65536)]).write(tmp_path / "core")
    with pytest.raises(BadInput, match="65536"):
        scan(("core", path))


@pytest.mark.parametrize("kept", [0, 500])
def test_cut_while_it_is_read(tmp_path: Path, kept: int) -> None:
    """No signal ends us, as one would who maps the file."""
    path = Elf([Load(B, page("a") * 1000)]).write(tmp_path / "core")
    core = elfcore.read(str(path))
    try:
        os.truncate(path, kept * PAGE)
        with pytest.raises(BadInput, match="was cut while it was read"):
            LiveSource([], Options(seed=SEED), sources=[core]).first_look()
    finally:
        core.close()


def test_cut_files(tmp_path: Path) -> None:
    """Wherever it is cut, it is refused: the last byte of a segment is the last of the file."""
    path = whole(tmp_path)
    raw = path.read_bytes()
    for size in (1, 4, 15, 16, 63, 64, 100, 300, PAGE, 3 * PAGE, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(BadInput):
            scan(("core", path))


def test_what_is_no_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no core at all, but more than sixty-four bytes of words" * 9)
    (tmp_path / "packed").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    for path, words in (
        (tmp_path, "a directory"),
        (fifo, "a FIFO"),
        ("/dev/zero", "a character device"),
        (tmp_path / "empty", "is empty"),
        (tmp_path / "text", "not an ELF file"),
        (tmp_path / "packed", "compressed"),
        (tmp_path / "none", "No such file"),
        ("/proc/self/status", "made up by the kernel"),
        ("a\0b", "no path"),
    ):
        with pytest.raises(BadInput, match=words):
            scan(("core", path))


@pytest.mark.root
def test_without_the_right_to_read(tmp_path: Path) -> None:
    path = whole(tmp_path)
    path.chmod(0o600)
    tmp_path.chmod(0o711)
    child = os.fork()
    if not child:
        os.setgroups([])
        os.setuid(65534)
        try:
            elfcore.read(str(path))
        except (NotPermitted, BadInput) as e:
            os._exit(e.exit_status)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == NotPermitted.exit_status


FUZZ = settings(
    max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, 64 + 3 * 56 + 500),
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from([(1 << 64) - 1, 1 << 63, 1 << 32, 0xFFFF, PAGE]).map(
                    lambda n: n.to_bytes(8, "little")
                ),
            ),
        ),
        min_size=1,
        max_size=6,
    ),
    bits=st.sampled_from([32, 64]),
    order=st.sampled_from("<>"),
    cut=st.one_of(st.none(), st.integers(1, 20_000)),
)
def test_hostile_bytes_give_a_result_or_a_refusal(
    tmp_path: Path, changes: list[tuple[int, bytes]], bits: int, order: str, cut: int | None
) -> None:
    notes = [prpsinfo(1, "x"), auxv(page_size=PAGE), file_note((B, B + PAGE, "/f"))]
    loads = [Load(A, page("a") * 3), Load(1 << 28, page("b"))]
    path = Elf(loads, notes, bits=bits, order=order).write(tmp_path / "core")
    raw = bytearray(path.read_bytes())
    for at, what in changes:
        raw[at : at + len(what)] = what
    path.write_bytes(raw[:cut])
    try:
        found = scan(("core", path))
    except BadInput:
        return
    assert found.scanned_pages <= len(raw) // PAGE


@FUZZ
@given(raw=st.binary(max_size=300))
def test_any_bytes(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "core").write_bytes(b"\x7fELF" + raw)
    with pytest.raises(BadInput):
        scan(("core", tmp_path / "core"))


# -- real ones -------------------------------------------------------------------------------------

PROGRAM = """
import mmap, os, resource, sys
os.chdir(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
memory = mmap.mmap(-1, 500 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for i in range(400):
    memory[i * 4096 : i * 4096 + 8] = b"page%04d" % (i % 40)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def live(pid: int) -> Scan:
    """Its memory, while it is stopped."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    return scan_pids([pid], ScanPlan(options=Options(seed=SEED), passes=1))


def compare(alive: Scan, dead: Scan) -> None:
    """Page by page: all that a core can tell is the same."""
    a, b = contents(alive.pages), contents(dead.pages)
    told = {r.start: r for r in dead.pages.regions if r.eligible}
    spans = [(r.start, r.end) for r in told.values()]
    inside = {at for at in a if any(start <= at < end for start, end in spans)}
    assert len(inside) > 1000
    assert {at: a[at] for at in inside} == {at: b[at] for at in inside if at in b}
    # What the live scan has besides lies in read-only mappings of files.
    for at in set(a) - inside:
        region = next(r for r in alive.pages.regions if r.start <= at < r.end)
        assert region.name.startswith("/")
        assert "w" not in region.perms
    # And the core: memory never touched, which is zeros there, and unchanged pages of files.
    for at in set(b) - set(a):
        region = next(r for r in dead.pages.regions if r.start <= at < r.end)
        assert is_zero(dead.pages, at) or region.name.startswith("/")
    assert (dead.pages.processes[0].id.pid, dead.pages.processes[0].name) == (
        alive.pages.processes[0].id.pid,
        alive.pages.processes[0].name,
    )


def test_gcores_core_is_the_live_process(program: subprocess.Popen[str], tmp_path: Path) -> None:
    if shutil.which("gcore") is None:
        pytest.skip("needs gcore of Debian's gdb")
    alive = live(program.pid)
    subprocess.run(
        ["gcore", "-o", tmp_path / "core", str(program.pid)],
        check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
    )  # fmt: skip
    compare(alive, scan(("core", tmp_path / f"core.{program.pid}")))


@pytest.fixture
def core_pattern() -> Iterator[None]:
    """Cores go to the working directory."""
    pattern = Path("/proc/sys/kernel/core_pattern")
    before = pattern.read_text()
    if before[0] in "|/@":
        if os.geteuid():
            pytest.skip("the kernel's cores go elsewhere (core_pattern), and only root may say")
        pattern.write_text("core")
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("no core may be written here (ulimit -H -c)")
    yield
    if pattern.read_text() != before:
        pattern.write_text(before)


def test_the_kernels_core_is_the_live_process(
    program: subprocess.Popen[str], core_pattern: None, tmp_path: Path
) -> None:
    alive = live(program.pid)
    os.kill(program.pid, signal.SIGABRT)
    os.kill(program.pid, signal.SIGCONT)
    program.wait(60)
    (path,) = tmp_path.glob("core*")
    dead = scan(("core", path))
    compare(alive, dead)
    assert [s.code for s in dead.pages.skipped] == ["not-dumped"]
