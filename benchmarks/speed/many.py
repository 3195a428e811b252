"""Many processes, much address space, and the time until anything happens at all."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.speed.scans import one_pass
from dedup.kernel.processes import Choice
from dedup.scanning import choose

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROCESSES: Final = 2000
MAPPINGS: Final = 65_530
SPARSE_BYTES: Final = 16 << 40
SPARSE_PAGES: Final = 3

CROWD: Final = """
import subprocess, sys
# All wait for the end of the one input.
some = [subprocess.Popen(["bash", "-c", "read x; :"]) for _ in range(int(sys.argv[1]))]
print("ready", flush=True)
for p in some:
    p.wait()
"""
"""Small processes, each a program of its own."""

PIECES: Final = """
import ctypes, mmap, os, sys
wanted = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
piece = 4 * mmap.PAGESIZE
room = libc.mmap(None, (wanted + 1) * piece, 3, 0x22, -1, 0)
# One page of each piece.
for i in range(wanted):
    ctypes.c_uint64.from_address(room + i * piece).value = i // 2
# Every other piece read-only: each is a mapping of its own, until the kernel allows no more.
for i in range(1, wanted, 2):
    if libc.mprotect(room + i * piece, piece, 1):
        break
print("ready", flush=True)
sys.stdin.read()
"""

SPARSE: Final = """
import ctypes, mmap, sys
size, pages = int(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
room = libc.mmap(None, size, 3, 0x4022, -1, 0)  # MAP_NORESERVE
assert room != ctypes.c_void_p(-1).value, ctypes.get_errno()
for i in range(pages):
    ctypes.c_uint64.from_address(room + i * (size // pages) // 4096 * 4096).value = 1
print("ready", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One case: what it took in the median, and what it may take."""

    name: str
    unit: str
    value: float
    low: float
    high: float
    allowed: float
    rounds: int
    words: str

    @property
    def holds(self) -> bool:
        """Whether it is quick enough."""
        return self.value < self.allowed

    def line(self) -> str:
        """For people."""
        verdict = "holds" if self.holds else "SHORT"
        return (
            f"{self.name}: {self.value:.3g} {self.unit} ({self.low:.3g} to {self.high:.3g}), "
            f"{self.words}; allowed {self.allowed:g}: {verdict}"
        )

    def row(self) -> dict[str, Any]:
        """For the JSON."""
        return {**asdict(self), "holds": self.holds}


def _case(name: str, unit: str, values: list[float], allowed: float, words: str) -> Case:
    return Case(
        name=name,
        unit=unit,
        value=statistics.median(values),
        low=min(values),
        high=max(values),
        allowed=allowed,
        rounds=len(values),
        words=words,
    )


@contextmanager
def _running(program: str, *words: object) -> Iterator[int]:
    """A program that says that it is ready; its pid."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as started:  # fmt: skip
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n", "the target could not start"
        yield started.pid


def _repeated(rounds: int, call: Callable[[], float]) -> list[float]:
    return [call() for _ in range(rounds + 1)][1:]


def processes(rounds: int) -> Case:
    """Two thousand small processes, chosen among all of the host's."""
    with _running(CROWD, PROCESSES) as pid:
        pages = 0

        def scan() -> float:
            nonlocal pages
            begin = time.perf_counter()
            pids = choose(Choice(trees=(pid,)))
            pages = one_pass(pids).pages
            return (time.perf_counter() - begin) / len(pids) * 1e3

        values = _repeated(rounds, scan)
    words = f"one pass over {PROCESSES:,} small processes of {pages // PROCESSES} pages"
    return _case("many processes", "ms each", values, 4.0, words)


def mappings(rounds: int) -> Case:
    """A process with as many mappings as the kernel allows."""
    with _running(PIECES, MAPPINGS) as pid:
        count = Path(f"/proc/{pid}/maps").read_bytes().count(b"\n")
        values = _repeated(rounds, lambda: one_pass([pid]).seconds)
    return _case("many mappings", "s", values, 1.0, f"one pass over {count:,} mappings")


def sparse(rounds: int) -> Case:
    """Much address space with hardly a page in it."""
    with _running(SPARSE, SPARSE_BYTES, SPARSE_PAGES) as pid:
        values = _repeated(rounds, lambda: one_pass([pid]).seconds * 1e3)
    words = f"one pass over {SPARSE_BYTES >> 40} TiB with {SPARSE_PAGES} pages present"
    return _case("sparse address space", "ms", values, 50.0, words)


def start_up(rounds: int) -> list[Case]:
    """`dedup --version` and `--help`, beside a Python that does nothing, in turn."""

    def took(*words: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        return (time.perf_counter() - begin) * 1e3

    more: dict[str, list[float]] = {"--version": [], "--help": []}
    for number in range(2 * rounds + 1):
        bare = took("-c", "pass")
        for word, values in more.items():
            whole = took("-m", "dedup", word)
            if number:
                values.append(whole - bare)
    return [
        _case(f"dedup {word}", "ms", values, 100.0, "more than a bare Python")
        for word, values in more.items()
    ]
