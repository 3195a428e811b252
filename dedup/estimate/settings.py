"""Ways to start a program in which its copies have more pages in common, and what each costs.

Source: personality(2) ADDR_NO_RANDOMIZE; Python's documentation of PYTHONHASHSEED; perlrun(1)
PERL_HASH_SEED and PERL_PERTURB_KEYS; `node --v8-options`. What they bring was measured on copies of
each runtime (docs/pilot.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

COLLISIONS: Final = (
    "With a fixed seed whoever chooses the keys of a hash table, the names in a form or in JSON, "
    "can choose ones that collide, and keep a core busy with one request."
)


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to start the copies."""

    name: str
    title: str
    randomized: bool = True
    seeds_fixed: bool = False
    risk: str = ""
    """What it costs in security, one sentence."""


AS_IS: Final = Setting("as-is", "as it is")
NO_RANDOMIZE: Final = Setting(
    "no-randomize",
    "without randomisation",
    randomized=False,
    risk="Without address randomisation whoever finds a hole in the program knows where "
    "everything lies: not for programs that face strangers.",
)
FIXED_SEEDS: Final = Setting(
    "fixed-seeds", "and with fixed seeds", randomized=False, seeds_fixed=True, risk=COLLISIONS
)
SETTINGS: Final = (AS_IS, NO_RANDOMIZE, FIXED_SEEDS)


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime whose hashes are seeded at random, and what fixes the seed."""

    name: str
    program: re.Pattern[str]
    """Of the file that runs."""
    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    """Behind the word of the command that names the runtime."""
    also: str = ""
    """What these change besides."""


RUNTIMES: Final = (
    Runtime("Python", re.compile(r"(python|pypy)[\d.]*[dt]?"), {"PYTHONHASHSEED": "0"}),
    Runtime("Perl", re.compile(r"perl[\d.]*"), {"PERL_HASH_SEED": "0", "PERL_PERTURB_KEYS": "0"}),
    Runtime(
        "Node.js",
        re.compile(r"node(js)?[\d.]*"),
        arguments=("--hash-seed=1", "--random-seed=1", "--single-threaded", "--predictable"),
        also="Node.js then gives the same numbers from Math.random in every copy, and collects "
        "garbage and compiles on its one thread, which makes it slower.",
    ),
)


@dataclass(frozen=True, slots=True)
class Start:
    """What is started."""

    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    """Set besides."""
    arguments: tuple[str, ...] = ()
    """Put into the words."""
    randomized: bool = True
    also: str = ""


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """A setting that would change nothing for this command."""

    why: str


def seeded(programs: Iterable[str]) -> list[Runtime]:
    """The runtimes among these programs that seed their hashes at random."""
    names = set(programs)
    return [r for r in RUNTIMES if any(r.program.fullmatch(n) for n in names)]


def apply(
    setting: Setting, words: Sequence[str], programs: Iterable[str] = ()
) -> Start | NotApplicable:
    """The command under a setting.

    Parameters
    ----------
    setting : Setting
    words : sequence of str
        The command.
    programs : iterable of str
        Names of the files that its processes run, as seen when it was started as it is.
    """
    words = tuple(words)
    if not setting.seeds_fixed:
        return Start(words, randomized=setting.randomized)
    names = sorted(set(programs))
    found = seeded(names)
    if not found:
        return NotApplicable(
            f"no Python, Perl or Node.js among its programs ({', '.join(names) or 'none seen'})"
        )
    environment: dict[str, str] = {}
    added: tuple[str, ...] = ()
    also = []
    for runtime in found:
        environment |= runtime.environment
        if not runtime.arguments:
            continue
        at = next(
            (i for i, w in enumerate(words) if runtime.program.fullmatch(PurePath(w).name)), None
        )
        if at is None:
            if len(found) == 1:
                return NotApplicable(
                    f"no word of the command starts {runtime.name}; behind that word belong "
                    f"{' '.join(runtime.arguments)}"
                )
            continue
        words = (*words[: at + 1], *runtime.arguments, *words[at + 1 :])
        added += runtime.arguments
        also.append(runtime.also)
    return Start(words, environment, added, randomized=setting.randomized, also=" ".join(also))
