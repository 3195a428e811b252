"""How well three or four of twelve tell of kinds: ``python -m benchmarks.capacity_classes``.

Twelve instances of each service are started at rest and saved as `dedup scan --save` does. Then
all choices of three, and of four, of the twelve are planned from. The truth for twelve, and for
eight that the choice is among, is the closed form over the saved ones; ksmd has no part in it.
A service of several kinds has some instances started with longer arguments: without address
randomisation that moves their layout.
"""

from __future__ import annotations

import argparse
import itertools
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks.capacity import POOL
from dedup.estimate import fingerprints, key, store
from dedup.estimate.curve import Service
from dedup.estimate.rules import Rules
from dedup.scanning import Plan, scan_pids
from dedup.sources.live import Options
from tests import programs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dedup.estimate.fingerprints import Instance

ALL: Final = 12
FEWER: Final = 8
PREDICTED: Final = (FEWER, ALL)
DRAWN: Final = (3, 4)
FIXED: Final = ("setarch", "-R")
LONGER: Final = 64
"""Characters by which the argument of each further kind is longer."""
REST_SECONDS: Final = {"node": 10.0}
KEYS: Final = 20_000
APART: Final = 0.05
"""Of an instance's contents: kinds have so much for themselves."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A service.

    Parameters
    ----------
    words : tuple of str
        To start it; none for the forked pool and redis.
    text : str
    name : str
        Of the file with the text.
    sizes : tuple of int
        Instances of each kind.
    """

    words: tuple[str, ...] = ()
    text: str = ""
    name: str = ""
    sizes: tuple[int, ...] = (ALL,)

    def of(self, *sizes: int) -> Kind:
        return Kind(self.words, self.text, self.name, sizes)

    @property
    def kinds(self) -> list[int]:
        """The kind of each instance; the same mixture of starts every time."""
        found = [kind for kind, n in enumerate(self.sizes) for _ in range(n)]
        random.Random(5).shuffle(found)
        return found


PYTHON: Final = Kind((*FIXED, "env", "PYTHONHASHSEED=0", sys.executable), programs.PYTHON, "p.py")
PERL: Final = Kind(
    (*FIXED, "env", "PERL_HASH_SEED=0", "PERL_PERTURB_KEYS=0", "perl"), programs.PERL, "p.pl"
)
JAVA: Final = Kind(
    (*FIXED, "java", "-Xmx128m", "-Xint", "-XX:+UseSerialGC"), programs.JAVA, "Program.java"
)
PHP: Final = Kind((*FIXED, "php"), programs.PHP, "p.php")
KINDS: Final = {
    "python-fixed": PYTHON,
    "python-fixed-10+2": PYTHON.of(10, 2),
    "python-fixed-6+6": PYTHON.of(6, 6),
    "perl-fixed": PERL,
    "perl-fixed-9+3": PERL.of(9, 3),
    "java-8+3+1": JAVA.of(8, 3, 1),
    "php-fixed-8+4": PHP.of(8, 4),
    "perl-noaslr": Kind((*FIXED, "perl"), programs.PERL, "p.pl"),
    "perl": Kind(("perl",), programs.PERL, "p.pl"),
    "python": Kind((sys.executable,), programs.PYTHON, "p.py"),
    "node": Kind(("node",), programs.NODE, "p.js"),
    "php": Kind(("php",), programs.PHP, "p.php"),
    "java": Kind(("java", "-Xmx128m"), programs.JAVA, "Program.java"),
    "redis": Kind(),
    "redis-half-own": Kind(),
    "pool": Kind(),
}


@contextmanager
def _started(words: Sequence[str], folder: Path, ready: bytes) -> Iterator[int]:
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.read(len(ready)) == ready
        yield process.pid
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@contextmanager
def _redis(folder: Path, number: int, own: int) -> Iterator[int]:
    path = folder / f"redis{number:02d}.sock"
    words = ["redis-server", "--port", "0", "--save", "", "--unixsocket", str(path)]
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=folder
    )
    try:
        programs.connect(path, process).close()
        commands = []
        for first, last, seed in ((0, KEYS - own, 7), (KEYS - own, KEYS, 1000 + number)):
            source = random.Random(seed)
            commands += [
                b"SET key:%d %0400x\r\n" % (k, source.getrandbits(1600)) for k in range(first, last)
            ]
        subprocess.run(
            ["redis-cli", "-s", str(path), "--pipe"],
            input=b"".join(commands), check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def _start(name: str, folder: Path, stack: ExitStack) -> list[int]:
    """All instances of a service, at rest."""
    kind = KINDS[name]
    if name == "pool":
        words = (sys.executable, "-c", POOL, str(ALL))
        master = stack.enter_context(_started(words, folder, b"1" * ALL))
        pids = [pid for pid in programs.tree(master) if pid != master]
    elif not kind.words:
        own = KEYS // 2 if name.endswith("own") else 0
        pids = []
        for number in range(ALL):
            pids.append(stack.enter_context(_redis(folder, number, own)))
            time.sleep(1)
    else:
        (folder / kind.name).write_text(kind.text)
        pids = [
            stack.enter_context(
                _started([*kind.words, kind.name, "x" * (1 + LONGER * of)], folder, b"ready\n")
            )
            for of in kind.kinds
        ]
    programs.wait_until_idle(pids)
    time.sleep(REST_SECONDS.get(name, 0))
    return pids


def save(name: str, folder: Path) -> None:
    """Twelve instances' files, where they are not there yet."""
    paths = [folder / f"{name}-{i}.dedup" for i in range(ALL)]
    if all(path.exists() for path in paths):
        return
    secret = key.of_file(folder / key.NAME)
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        for path, pid in zip(paths, _start(name, Path(work), stack), strict=True):
            plan = Plan(Options(scope="compatible", seed=secret.seed), passes=2)
            one = fingerprints.of_scan(scan_pids([pid], plan), secret, name)
            store.save(one, path)


def kinds_of(instances: Sequence[Instance]) -> list[int]:
    """The kind of each, by what it shares with all others; all 0 where they are alike.

    Perl and Java have kinds that nobody asked for.
    """
    sets = [set(i.contents.fingerprint.tolist()) for i in instances]
    common = np.array([[len(a & b) for b in sets] for a in sets])
    pairs = common[np.triu_indices(len(sets), 1)]
    if pairs.max() - pairs.min() < APART * len(sets[0]):
        return [0] * len(sets)
    near = common > (pairs.max() + pairs.min()) / 2
    return [int(np.flatnonzero(row)[0]) for row in near]


@dataclass(slots=True)
class Found:
    """What the plans from all choices of so many of a service's twelve said; shares of all."""

    draws: int = 0
    mixed: int = 0
    """Of several kinds, two or more of one of them."""
    told: int = 0
    """Of those, with `classes_suspected`."""
    apart: int = 0
    """Each of another kind: they share as little as instances of one kind may that share little."""
    told_apart: int = 0
    false: int = 0
    """Of the others."""
    told_held: int = 0
    """Those with `classes_suspected`, the truth at 8 and 12 in the interval."""
    suspected: int = 0
    bounded: int = 0
    """The truth lay below the worst case at 8 and 12."""
    held: dict[int, int] = field(default_factory=lambda: dict.fromkeys(PREDICTED, 0))
    """By instances: the truth lay in the interval."""
    errors: dict[int, list[float]] = field(default_factory=lambda: {n: [] for n in PREDICTED})
    """Of `frames`, per cent."""


def study(instances: Sequence[Instance], kinds: Sequence[int], k: int) -> Found:
    """Plan from all choices of k, and compare."""
    rules = Rules()
    every = Service(instances, rules).incidence
    whole = every.curve(ALL)[-1].frames
    found = Found()
    draw = random.Random(k)
    for chosen in itertools.combinations(range(ALL), k):
        others = [i for i in range(ALL) if i not in chosen]
        eight = np.zeros((1, ALL), bool)
        eight[0, [*chosen, *draw.sample(others, FEWER - k)]] = True
        truth = {FEWER: float(every.needed(eight)[0]), ALL: whole}
        service = Service([instances[i] for i in chosen], rules)
        curve = service.curve(ALL)
        found.draws += 1
        suspected = service.incidence.classes_suspected
        different = len({kinds[i] for i in chosen})
        if different == k:
            found.apart += 1
            found.told_apart += suspected
        elif different > 1:
            found.mixed += 1
            found.told += suspected
        else:
            found.false += suspected
        for n, frames in truth.items():
            p = curve[n - 1]
            found.held[n] += p.low_frames <= round(frames) <= p.high_frames
            found.errors[n].append(100 * (p.frames - frames) / frames)
        points = [(curve[n - 1], round(frames)) for n, frames in truth.items()]
        found.bounded += all(frames <= p.worst_frames for p, frames in points)
        found.suspected += suspected
        found.told_held += suspected and all(
            p.low_frames <= frames <= p.high_frames for p, frames in points
        )
    return found


def row(name: str, k: int, f: Found) -> str:
    """One of the table."""

    def share(part: int, of: int) -> str:
        return f"{part} of {of}" if of else "-"

    error = [
        f"{np.median(np.abs(f.errors[n])):.1f} / {max(f.errors[n], key=abs):+.1f}" for n in f.errors
    ]
    held = [share(f.held[n], f.draws) for n in f.held]
    return " | ".join(
        ["", name, str(k), share(f.told, f.mixed), share(f.told_apart, f.apart),
         share(f.false, f.draws - f.mixed - f.apart), *error, *held,
         share(f.told_held, f.suspected), share(f.bounded, f.draws), ""]
    ).strip()  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER",
        help="of the saved files; those that are there are not made anew",
    )  # fmt: skip
    options = parser.parse_args()
    unknown = set(options.kinds) - set(KINDS)
    if unknown:
        parser.error(f"no such kinds: {', '.join(unknown)}")
    print(
        "| service | of 12 | told, two alike | none alike | all alike | error at 8, % | at 12 "
        "| held at 8 | at 12 | held where told | below the worst |"
    )
    print("| --- " * 11 + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(exist_ok=True)
        for kind in options.kinds or KINDS:
            save(kind, folder)
            instances = store.load_all([folder / f"{kind}-{i}.dedup" for i in range(ALL)])
            for k in DRAWN:
                found = study(instances, kinds_of(instances), k)
                print(row(kind, k, found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
