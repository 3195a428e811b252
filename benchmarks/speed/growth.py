"""The time of a pass against the memory scanned: a line, or where it bends."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.speed.scans import one_pass
from benchmarks.speed.target import HUGE, process

if TYPE_CHECKING:
    from collections.abc import Sequence

SMALLEST: Final = 64 << 20
FITS: Final = 0.7
"""Part of the available memory that the largest target may take."""
STRAIGHT: Final = 0.10
"""Where no point lies farther from the line, in parts of it, it is straight."""
WIDTH, HEIGHT, MARGIN = 640, 400, 60
COLOURS: Final = {"small": "#1b6ca8", "huge": "#c8553d"}


@dataclass(frozen=True, slots=True)
class Line:
    """Times against sizes, and the line through them.

    The line is fitted to relative errors: else the largest size alone would decide.
    """

    pages: str
    threads: int
    bytes: list[int]
    seconds: list[float]
    """Medians."""
    fixed_seconds: float
    seconds_a_gib: float
    residuals: list[float]
    """What a time is above the line, in parts of it."""

    @property
    def straight(self) -> bool:
        """Whether no point lies far from the line."""
        return max(abs(r) for r in self.residuals) <= STRAIGHT

    def words(self) -> str:
        """For people."""
        worst = max(range(len(self.bytes)), key=lambda i: abs(self.residuals[i]))
        word = "a straight line" if self.straight else "NOT a straight line"
        return (
            f"{self.pages:>5} pages, {self.threads} threads: {self.fixed_seconds * 1e3:.0f} ms and "
            f"{self.seconds_a_gib * 1e3:.0f} ms a GiB, {word} from {human(self.bytes[0])} to "
            f"{human(self.bytes[-1])}: farthest from it is {human(self.bytes[worst])}, by "
            f"{100 * self.residuals[worst]:+.0f} %"
        )

    def row(self) -> dict[str, Any]:
        """For the JSON."""
        return {**asdict(self), "straight": self.straight}


def human(size: float) -> str:
    """A size in MiB or GiB."""
    return f"{size / 2**30:g} GiB" if size >= 2**30 else f"{size / 2**20:g} MiB"


def available() -> int:
    """MemAvailable in bytes."""
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) * 1024


def sizes(largest: int = 0) -> list[int]:
    """From 64 MiB in doubles to as much as fits, or to `largest`."""
    most = min(largest or available(), int(FITS * available()))
    found = [SMALLEST]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    if most >= found[-1] * 1.25:
        found.append(most // HUGE * HUGE)
    return found


def fit(pages: str, threads: int, size: Sequence[int], seconds: Sequence[float]) -> Line:
    """The line through such times."""
    x, y = np.array(size) / 2**30, np.array(seconds)
    weighted = np.stack([1 / y, x / y], axis=1)
    (fixed, slope), *_ = np.linalg.lstsq(weighted, np.ones(len(y)), rcond=None)
    residuals = y / (fixed + slope * x) - 1
    return Line(
        pages=pages,
        threads=threads,
        bytes=list(size),
        seconds=list(seconds),
        fixed_seconds=float(fixed),
        seconds_a_gib=float(slope),
        residuals=[float(r) for r in residuals],
    )


def measure(pages: str, threads: int, chosen: Sequence[int], rounds: int) -> Line:
    """One pass over a fresh target of each size, the median of the rounds."""
    seconds = []
    for size in chosen:
        with process(size, pages) as (pid, _):
            took = [one_pass([pid], threads).seconds for _ in range(rounds + 1)]
        seconds.append(statistics.median(took[1:]))
    return fit(pages, threads, chosen, seconds)


def plot(lines: Sequence[Line]) -> str:
    """An SVG of the times, on doubling scales both ways; a line's slope there is 1."""
    every_x = [float(b) for line in lines for b in line.bytes]
    every_y = [s for line in lines for s in line.seconds]
    low_x, high_x = np.log2(min(every_x)), np.log2(max(every_x))
    low_y, high_y = np.floor(np.log2(min(every_y))), np.ceil(np.log2(max(every_y)))

    def at(size: float, seconds: float) -> tuple[float, float]:
        x = MARGIN + (np.log2(size) - low_x) / max(high_x - low_x, 1) * (WIDTH - 2 * MARGIN)
        y = (np.log2(seconds) - low_y) / max(high_y - low_y, 1) * (HEIGHT - 2 * MARGIN)
        return float(x), float(HEIGHT - MARGIN - y)

    grid, middle = 'stroke="#dddddd"', 'text-anchor="middle"'
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    bottom, right = HEIGHT - MARGIN, WIDTH - MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" {middle}>memory scanned, GiB</text>',
        f'<text x="{MARGIN}" y="20">seconds for one pass</text>',
    ]
    for size in sorted(set(every_x)):
        x, _ = at(size, 2.0**low_y)
        out += [
            f'<line x1="{x:.1f}" y1="{MARGIN}" x2="{x:.1f}" y2="{bottom}" {grid}/>',
            f'<text x="{x:.1f}" y="{bottom + 18}" {middle}>{size / 2**30:.3g}</text>',
        ]
    for power in range(int(low_y), int(high_y) + 1):
        _, y = at(every_x[0], 2.0**power)
        out += [
            f'<line x1="{MARGIN}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" {grid}/>',
            f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{2.0**power:.3g}</text>',
        ]
    for number, line in enumerate(lines):
        colour = COLOURS[line.pages]
        fitted = (line.fixed_seconds + line.seconds_a_gib * b / 2**30 for b in line.bytes)
        points = [at(b, f) for b, f in zip(line.bytes, fitted, strict=True) if f > 0]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for b, s in zip(line.bytes, line.seconds, strict=True):
            x, y = at(b, s)
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
        words = f"{line.pages} pages, {line.threads} threads: {line.seconds_a_gib:.3f} s a GiB"
        y = MARGIN + 16 * (number + 1)
        out.append(f'<text x="{MARGIN + 10}" y="{y}" fill="{colour}">{words}</text>')
    return "\n".join([*out, "</svg>", ""])
