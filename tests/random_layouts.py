"""Random memory in real processes: predicted, merged by ksmd, every counter compared.

    sudo .venv/bin/python -m tests.random_layouts --count 200

Each run draws new layouts and prints the seed that makes the same ones again; `--layout N` makes a
single one by its own number.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

from tests.conftest import ksm_lock
from tests.kernel_fixtures import KsmControl, ksm_control
from tests.model.layouts import UNIQUE
from tests.model.simulator import SHARED_ZERO, ZERO, Frame
from tests.model.twin import Figure, Paper, Twin

MOST_PROCESSES = 6

T = TypeVar("T", bound=Paper)


@dataclass
class Result:
    """One layout, and what differs."""

    number: int
    has: list[str]
    """Its ingredients."""
    figures: list[Figure]
    chance: str
    """Why ksmd may not do the same every time; empty: it does, and every figure is due."""

    @property
    def wrong(self) -> list[Figure]:
        """What is not equal, or outside the ranges where chance decides."""
        return [f for f in self.figures if not (f.inside if self.chance else f.equal)]


class Draw:
    """The random choices of one layout.

    Parameters
    ----------
    number : int
        Of the layout: the same number makes the same one again.
    """

    def __init__(self, number: int) -> None:
        self.chance = chance = random.Random(number)
        self.has: set[str] = set()
        self.limit = chance.choice([2, 2, 3, 3, 4, 5, 7, 16, 100, 256, chance.randint(2, 256)])
        self.use_zero_pages = chance.random() < 0.3
        # Few contents meet often, many seldom; all-zero pages are their own kind.
        few = chance.choice([[1], [1, 2], list(range(1, 10))])
        self.contents = [*few, UNIQUE, UNIQUE] + [ZERO] * chance.choice([0, 1, 1, 3])
        self.forks = chance.random() < 0.5
        self.huge = chance.random() < 0.6
        self.merges_before = chance.random() < 0.5 and not (self.forks and self.huge)
        # A merge that failed leaves KSM pages without a node, and nothing tells them from others:
        # so no locked pages shared by fork, that make merges fail, in memory merged before.
        self.locks = not (self.merges_before and self.forks)

    def lay_out(self, make: Callable[[int], T], merge: Callable[[T], None]) -> T:
        """Make so many processes and fill them; `merge` merges what is there."""
        chance = self.chance
        twin = make(chance.choice([1, 1, 2, 2, 3]))
        for _ in range(chance.randint(2, 9)):
            self.one_thing(twin)
        if self.merges_before:
            self.has.add("merged before")
            merge(twin)
            for _ in range(chance.randint(1, 6)):
                self.one_thing(twin)
        self.name(twin)
        return twin

    def one_thing(self, twin: Paper) -> None:
        """Do something to one of the processes."""
        chance = self.chance
        p = chance.randrange(len(twin.layout.processes))
        mappings = twin.layout.processes[p]
        kinds = ["pages", "pages", "copies", "copies", "rewrite", "volatile"]
        kinds += ["locked"] * self.locks + ["huge"] * (4 * self.huge) + ["fork"] * (3 * self.forks)
        match chance.choice(kinds):
            case "pages":
                twin.pages(p, chance.choices(self.contents, k=chance.randint(1, 12)))
            case "copies":
                most = chance.choice([6, 6, 2 * self.limit + 3])
                twin.pages(p, [chance.choice(self.contents)] * chance.randint(1, most))
            case "locked":
                self.has.add("locked")
                contents = chance.choices(self.contents, k=chance.randint(1, 6))
                twin.pages(p, contents, locked=True)
            case "volatile":
                self.has.add("volatile")
                twin.pages(p, [UNIQUE] * chance.randint(1, 5), volatile=True)
            case "huge":
                some = chance.choices(self.contents, k=chance.randint(0, chance.choice([5, 5, 60])))
                locked = self.locks and chance.random() < 0.15
                self.has |= {"huge page"} | ({"locked huge page"} if locked else set())
                twin.huge(p, some, locked=locked)
            case "fork" if len(twin.layout.processes) < MOST_PROCESSES:
                self.has.add("fork")
                twin.fork(p)
            case "rewrite" if mappings:
                # ksmd's books of a merged page that was written since can't be seen from outside.
                chosen = chance.sample(range(len(mappings)), min(len(mappings), 3))
                for index in chosen:
                    m = mappings[index]
                    if m.frame.node is None and not m.volatile:
                        twin.rewrite(p, index, chance.choice(self.contents))
            case _:
                pass

    def name(self, twin: Paper) -> None:
        """Note what is in it."""
        every = [m for mappings in twin.layout.processes for m in mappings]
        count = Counter(m.frame.content for m in every)
        processes: dict[Frame, set[int]] = {}
        for m in every:
            processes.setdefault(m.frame, set()).add(m.process)
        marks = {
            "huge page shared by fork": any(
                f.compound and len(p) > 1 for f, p in processes.items()
            ),
            "zero in a huge page": any(f.compound and f.content == ZERO for f in processes),
            "several processes": len(twin.layout.processes) > 1,
            "zero": any(m.frame.content == ZERO and m.frame is not SHARED_ZERO for m in every),
            "unique": any(n == 1 for n in count.values()),
            "copies": any(n > 1 for n in count.values()),
            "beyond max_page_sharing": any(n > self.limit for n in count.values()),
            "use_zero_pages": self.use_zero_pages,
            "max_page_sharing 2": self.limit == 2,
            "max_page_sharing 3..16": 3 <= self.limit <= 16,
            "max_page_sharing 17..256": self.limit > 16,
        }
        self.has |= {name for name, there in marks.items() if there}


def run(ksm: KsmControl, number: int) -> Result:
    """Make one layout, and compare."""
    draw = Draw(number)
    ksm.clear()
    ksm.set(max_page_sharing=draw.limit, use_zero_pages=int(draw.use_zero_pages))
    with ExitStack() as stack:
        twin = draw.lay_out(lambda n: Twin(stack, n), lambda t: t.merge_now(ksm))
        chance = twin.left_to_chance(draw.limit)
        return Result(number, sorted(draw.has), twin.compare(ksm), chance)


def on_paper(number: int) -> Result:
    """Compare one layout with the simulator, without any process."""
    draw = Draw(number)
    zero = draw.use_zero_pages
    paper = draw.lay_out(Paper, lambda t: t.merge(draw.limit, use_zero_pages=zero))
    chance = paper.left_to_chance(draw.limit)
    figures = paper.simulated(draw.limit, use_zero_pages=zero)
    return Result(number, sorted(draw.has), figures, chance)


def numbers(seed: int) -> Iterator[int]:
    """The layouts of a seed, without end."""
    chance = random.Random(seed)
    while True:
        yield chance.randrange(10**9)


def share(results: list[Result]) -> str:
    """How many layouts have what."""
    counts = Counter(name for r in results for name in r.has)
    return "\n".join(f"  {n:4d}  {name}" for name, n in counts.most_common())


def tell(result: Result) -> None:
    """Say what is wrong with a layout."""
    print(f"layout {result.number} differs ({', '.join(result.has)})")
    for figure in result.wrong:
        print(f"  {figure}", flush=True)


def main() -> int:
    """Run it; 1 where anything differs."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.random_layouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=200, help="layouts to compare (200)")
    parser.add_argument("--seed", type=int, help="draw the layouts of an earlier run again")
    parser.add_argument("--layout", type=int, help="one layout, by its number")
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("needs root: it drives this machine's KSM")
    seed = secrets.randbelow(10**9) if chosen.seed is None else chosen.seed
    which: Iterable[int] = numbers(seed) if chosen.layout is None else [chosen.layout]
    print(f"seed {seed}" if chosen.layout is None else f"layout {chosen.layout}", flush=True)
    begin = time.monotonic()
    exact: list[Result] = []
    ranges: list[Result] = []
    with ksm_lock(fcntl.LOCK_EX), ksm_control() as ksm:
        for number in which:
            result = run(ksm, number)
            (ranges if result.chance else exact).append(result)
            if result.wrong:
                tell(result)
            if len(exact) == chosen.count:
                break
    equal = sum(not r.wrong for r in exact)
    inside = sum(not r.wrong for r in ranges)
    print(f"layouts with\n{share(exact)}")
    if ranges:
        print(
            f"{inside} of {len(ranges)} more within the ranges predicted: ksmd itself differs from "
            "run to run there"
        )
        for chance, n in Counter(r.chance for r in ranges).most_common():
            print(f"  {n:4d}  {chance}")
    print(
        f"{equal} of {len(exact)} layouts equal, every counter, in {time.monotonic() - begin:.0f} s"
    )
    return int(equal != len(exact) or inside != len(ranges))


if __name__ == "__main__":
    sys.exit(main())
