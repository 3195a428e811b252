"""QEMU's guests: by their mappings' flags, and with a real QEMU."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from dedup.kernel import maps
from dedup.kernel.processes import Handle
from dedup.model import guests
from dedup.pages import Region

MIB = 1 << 20
QEMU = shutil.which("qemu-system-x86_64")


def region(size: int, flags: str, perms: str = "rw-p", start: int = 0x7F0000000000) -> Region:
    return Region(
        0, start, start + size, perms, "", frozenset(flags.split()), True, "", "mg" in flags, True
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qemu-system-x86_64", [128 * MIB]),
        ("q -m 64", [64 * MIB]),
        ("q -m 2G -smp 2", [2048 * MIB]),
        ("q --m 1.5G", [1536 * MIB]),
        ("q -m size=1048576k,slots=2,maxmem=4G", [1024 * MIB]),
        ("q -m 64 -object memory-backend-memfd,id=a,size=64M,share=on", [64 * MIB]),
        ("q -m 3G -object memory-backend-ram,size=1G -object memory-backend-ram,size=2147483648",
         [1024 * MIB, 2048 * MIB]),
        ("q -m nonsense", [128 * MIB]),
        ("q -m", [128 * MIB]),
    ],
)  # fmt: skip
def test_sizes(line: str, expected: list[int]) -> None:
    assert guests.sizes(line.split()) == expected


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("qemu-system-x86", True), ("kvm", True), ("qemu-kvm", True), ("qemu-img", False),
     ("kvm-nx-lpage-re", False)],
)  # fmt: skip
def test_names(name: str, is_one: bool) -> None:
    assert guests.is_qemu(name) is is_one


@pytest.mark.parametrize(
    ("flags", "state"),
    [("rd wr mg hg", "advised"), ("rd wr hg", "not-advised"), ("rd wr sh", "shared"),
     ("rd wr de ht", "hugetlb"), ("rd wr sh ht", "hugetlb")],
)  # fmt: skip
def test_states(flags: str, state: str) -> None:
    # TCG's own buffer and the heap are bigger, or as big, and are none of the guest's.
    others = [region(1024 * MIB, "rd wr ex", "rwxp"), region(80 * MIB, "rd wr mg")]
    found = guests.guest([*others, region(64 * MIB, flags)], ["q", "-m", "64"])
    assert (found.state, found.ram_bytes, found.mappings) == (state, 64 * MIB, 1)
    assert bool(found.ways_out) is (state != "advised")


def test_the_worst_of_several_tells() -> None:
    words = "q -m 96 -object memory-backend-ram,size=64M -object memory-backend-ram,size=32M"
    found = guests.guest(
        [region(64 * MIB, "mg"), region(32 * MIB, "sh", start=0x10000000000)], words.split()
    )
    assert (found.state, found.ram_bytes, found.mappings) == ("shared", 96 * MIB, 2)


def test_parts_and_nothing() -> None:
    assert guests.guest([region(48 * MIB, "mg")], ["q", "-m", "64"]).state == "advised"
    assert guests.guest([region(16 * MIB, "mg")], ["q", "-m", "64"]).state == "unknown"
    assert guests.guest([], ["q"]).state == "unknown"


@pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86_64: apt install qemu-system-x86")
@pytest.mark.parametrize(
    ("options", "state"),
    [
        ("-m 64", "advised"),
        ("-m 64 -machine mem-merge=off", "not-advised"),
        ("-m 64 -object memory-backend-memfd,id=a,size=64M,share=on -machine memory-backend=a",
         "shared"),
        ("-m 64 -object memory-backend-memfd,id=a,size=64M,share=off -machine memory-backend=a",
         "advised"),
        # The machine's mem-merge decides.
        ("-m 64 -object memory-backend-ram,id=a,size=64M,merge=off -machine memory-backend=a",
         "advised"),
    ],
)  # fmt: skip
def test_a_real_qemu(options: str, state: str) -> None:
    words = [str(QEMU), *options.split(), "-accel", "tcg", "-display", "none", "-monitor", "stdio",
             "-nodefaults"]  # fmt: skip
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            assert process.stdout is not None
            # The monitor answers once the machine is made.
            assert process.stdin is not None
            process.stdin.write(b"info status\n")
            process.stdin.flush()
            seen = b""
            deadline = time.monotonic() + 30
            while b"VM status" not in seen:
                part = process.stdout.read1(4096)  # type: ignore[attr-defined]
                assert part, seen
                assert time.monotonic() < deadline
                seen += part
            with Handle(process.pid) as handle:
                regions = [
                    Region(0, m.start, m.end, m.perms, m.name, m.vm_flags, True, "", False, True)
                    for m in maps.read(handle)
                ]
                name = handle.info.name
            assert guests.is_qemu(name)
            found = guests.guest(regions, words)
            assert (found.state, found.ram_bytes) == (state, 64 * MIB)
            assert Path(f"/proc/{process.pid}").exists()
        finally:
            process.kill()
