"""The scan beside the machine's limits and its peers, interleaved, as medians of ratios."""

from __future__ import annotations

import fcntl
import statistics
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.speed import peers, scans
from benchmarks.speed.target import Memory, process
from dedup.sources.live import Span
from tests.conftest import ksm_lock
from tests.kernel_fixtures import ksm_control

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

SHA1_PART: Final = 4
"""sha1 goes over one part in so many of the memory, and its time counts so many times."""
COPY_BYTES: Final = 256 << 20
"""Where memcpy copies to, again and again: much more than the caches hold."""
WHOLE: Final = 0.98
"""Of memory meant to be merged, so much must be."""

Needed = dict[tuple[str, int], tuple[float, float | None]]
NEEDED: Final[dict[str, Needed]] = {
    # (pages, threads): needed, and the aim; no entry for what is only told.
    "process_vm_readv": {
        ("small", 1): (0.75, 0.90), ("small", 2): (0.75, 0.90),
        ("huge", 1): (0.70, 0.90), ("huge", 2): (0.70, 0.90),
    },
    "/proc/PID/mem, KSM pages": {("small", 1): (0.85, 0.95), ("small", 2): (0.85, 0.95)},
    "/proc/PID/mem, fork-shared": {
        ("small", 1): (0.85, 0.95), ("small", 2): (0.85, 0.95),
        ("huge", 1): (0.85, 0.95), ("huge", 2): (0.85, 0.95),
    },
    "read-only sum, in place": {("small", 2): (0.65, 0.75), ("huge", 2): (0.85, 0.95)},
    "plain Python, xxhash": {
        ("small", 1): (2.2, None), ("small", 2): (3.5, None),
        ("huge", 1): (3.0, None), ("huge", 2): (5.0, None),
    },
    "plain Python, sha1": {
        ("small", 1): (10.0, None), ("small", 2): (16.0, None),
        ("huge", 1): (15.0, None), ("huge", 2): (25.0, None),
    },
    "dd bs=1M": {("small", 2): (2.0, None), ("huge", 2): (3.0, None)},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ratio:
    """The scan's speed in terms of a peer's, the median of all rounds."""

    peer: str
    pages: str
    threads: int
    gib: float
    rounds: int
    ratio: float
    low: float
    high: float
    scan_seconds: float
    look_seconds: float
    peer_seconds: float
    needed: float | None
    aim: float | None

    @property
    def holds(self) -> bool | None:
        """Whether it is as fast as it has to be; None where nothing is asked for."""
        return None if self.needed is None else self.ratio >= self.needed

    def line(self) -> str:
        """For people."""
        words = f"{self.pages:>5} pages, {self.threads} threads, {self.gib:.2f} GiB: "
        words += f"{self.ratio:6.2f} of {self.peer} ({self.low:.2f} to {self.high:.2f})"
        if self.needed is not None:
            verdict = "holds" if self.holds else "SHORT"
            if self.aim is not None and self.ratio >= self.aim:
                verdict = "aim reached"
            aim = f", aim {self.aim:g}" if self.aim is not None else ""
            words += f"  needed {self.needed:g}{aim}: {verdict}"
        return words

    def row(self) -> dict[str, Any]:
        """For the JSON."""
        return {**asdict(self), "holds": self.holds}


Took = tuple[float, float]
"""Seconds, and those of the look alone."""


def interleaved(contenders: Mapping[str, Callable[[], Took]], rounds: int) -> dict[str, list[Took]]:
    """Run all in turn, so many rounds after one to warm up.

    Each round begins with another one, so that none always follows the same.
    """
    taken: dict[str, list[Took]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            took = contenders[name]()
            if number:
                taken[name].append(took)
    return taken


def _ratio(
    taken: Mapping[str, Sequence[Took]], scan: str, against: str, peer: str, pages: str,
    threads: int, size: int,
) -> Ratio:  # fmt: skip
    ratios = [b[0] / a[0] for a, b in zip(taken[scan], taken[against], strict=True)]
    needed, aim = NEEDED.get(peer, {}).get((pages, threads), (None, None))
    return Ratio(
        peer=peer,
        pages=pages,
        threads=threads,
        gib=size / 2**30,
        rounds=len(ratios),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        scan_seconds=statistics.median(t[0] for t in taken[scan]),
        look_seconds=statistics.median(t[1] for t in taken[scan]),
        peer_seconds=statistics.median(t[0] for t in taken[against]),
        needed=needed,
        aim=aim,
    )


def _timed(call: Callable[[], float]) -> Took:
    return call(), 0.0


def _pass(pid: int, threads: int, span: Span | None = None) -> Took:
    took = scans.one_pass([pid], threads, span)
    return took.seconds, took.look_seconds


def exclusive(
    size: int, pages: str, threads: Sequence[int], rounds: int, *, limits: bool, python: bool
) -> list[Ratio]:
    """Another process's own memory: beside `process_vm_readv`, and beside what people write."""
    with process(size, pages) as (pid, start):
        contenders: dict[str, Callable[[], Took]] = {}
        # What the scan reads, not its largest part alone.
        some = peers.chunks(*scans.spans_of(pid))
        for t in threads:
            contenders[f"scan {t}"] = partial(_pass, pid, t)
            if limits:
                contenders[f"readv {t}"] = partial(_timed, partial(peers.readv, pid, some, t))
                contenders[f"mem {t}"] = partial(_timed, partial(peers.proc_mem, pid, some, t))
        if python:
            part = size // SHA1_PART // peers.PYTHON_READ * peers.PYTHON_READ
            contenders["xxhash"] = partial(_timed, partial(peers.plain_python, pid, start, size))
            contenders["written"] = partial(_timed, partial(peers.as_written, pid, start, size))
            contenders["sha1"] = partial(_timed, lambda: peers.sha1(pid, start, part) * size / part)
            contenders["dd"] = partial(_timed, partial(peers.dd, pid, start, size))
        taken = interleaved(contenders, rounds)
    rows = []
    for t in threads:
        named = {}
        if limits:
            named = {f"readv {t}": "process_vm_readv", f"mem {t}": "/proc/PID/mem"}
        if python:
            named |= {
                "xxhash": "plain Python, xxhash",
                "written": "plain Python as first written",
                "sha1": "plain Python, sha1",
                "dd": "dd bs=1M",
            }
        rows += [_ratio(taken, f"scan {t}", a, p, pages, t, size) for a, p in named.items()]
    return rows


@contextmanager
def _forked(size: int, pages: str) -> Iterator[tuple[int, int]]:
    with process(size, pages, "fork") as found:
        yield found


@contextmanager
def _merged(size: int, pages: str) -> Iterator[tuple[int, int]]:
    """Memory that ksmd has merged; it rests meanwhile."""
    with ksm_lock(fcntl.LOCK_EX), ksm_control() as ksm, process(size, pages, "copies") as found:
        ksm.converge()
        merged = Path(f"/proc/{found[0]}/ksm_merging_pages").read_text()
        if int(merged) * peers.PAGE < WHOLE * size:
            raise RuntimeError(f"ksmd merged {merged.strip()} of {size // peers.PAGE} pages only")
        yield found


def shared(size: int, pages: str, threads: Sequence[int], rounds: int) -> list[Ratio]:
    """Another process's shared memory, beside reading /proc/PID/mem alone."""
    rows = []
    kinds = {"/proc/PID/mem, fork-shared": _forked}
    if pages == "small":  # merging splits huge pages
        kinds["/proc/PID/mem, KSM pages"] = _merged
    for peer, memory in kinds.items():
        with memory(size, pages) as (pid, _):
            contenders: dict[str, Callable[[], Took]] = {}
            some = peers.chunks(*scans.spans_of(pid))
            for t in threads:
                contenders[f"scan {t}"] = partial(_pass, pid, t)
                contenders[f"mem {t}"] = partial(_timed, partial(peers.proc_mem, pid, some, t))
            taken = interleaved(contenders, rounds)
        rows += [_ratio(taken, f"scan {t}", f"mem {t}", peer, pages, t, size) for t in threads]
    return rows


def passes(size: int, pages: str, threads: Sequence[int], rounds: int) -> list[Ratio]:
    """Two looks of which the second reads what would merge, beside two that read everything."""
    rows = []
    for what in ("mixed", "unlike"):
        with process(size, pages, what) as (pid, _):
            contenders: dict[str, Callable[[], Took]] = {}
            for t in threads:
                for name, partly in (("part", True), ("full", False)):
                    contenders[f"{name} {t}"] = partial(
                        scans.two_looks, pid, t, partial_passes=partly
                    )
            taken = interleaved(contenders, rounds)
        second = {name: [(look, look) for _, look in each] for name, each in taken.items()}
        for t in threads:
            for times, looks in ((taken, "two full looks"), (second, "a second full look")):
                peer = f"{looks}, {what} pages"
                rows.append(_ratio(times, f"part {t}", f"full {t}", peer, pages, t, size))
    return rows


def own(size: int, pages: str, threads: Sequence[int], rounds: int) -> list[Ratio]:
    """Our own memory, hashed where it lies, beside a sum over it and memcpy from it."""
    memory = Memory(size, huge=pages == "huge")
    copy = Memory(min(COPY_BYTES, size), huge=pages == "huge")
    try:
        memory.fill_mixed()
        copy.pages[:] = 1
        span = Span(memory.start, size)
        contenders: dict[str, Callable[[], Took]] = {}
        for t in threads:
            contenders[f"scan {t}"] = partial(_pass, 0, t, span)
            contenders[f"sum {t}"] = partial(
                _timed, partial(peers.read_only_sum, memory.start, size, t)
            )
            contenders[f"memcpy {t}"] = partial(
                _timed, partial(peers.memcpy, memory.start, size, t, copy.start, copy.size)
            )
        taken = interleaved(contenders, rounds)
    finally:
        memory.close()
        copy.close()
    return [
        _ratio(taken, f"scan {t}", f"{against} {t}", peer, pages, t, size)
        for t in threads
        for against, peer in (("sum", "read-only sum, in place"), ("memcpy", "memcpy, in place"))
    ]
