from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from dedup.estimate import settings
from dedup.estimate.settings import AS_IS, FIXED_SEEDS, NO_RANDOMIZE, NotApplicable, Start

NODE = ("--hash-seed=1", "--random-seed=1", "--single-threaded", "--predictable")


def test_without_seeds_the_command_stays() -> None:
    words = ["node", "app.js"]
    assert settings.apply(AS_IS, words, ["node"]) == Start(("node", "app.js"))
    fixed = settings.apply(NO_RANDOMIZE, words, ["node"])
    assert fixed == Start(("node", "app.js"), randomized=False)


@pytest.mark.parametrize(
    ("programs", "environment"),
    [(["python3.11"], {"PYTHONHASHSEED": "0"}), (["python"], {"PYTHONHASHSEED": "0"}),
     (["pypy3"], {"PYTHONHASHSEED": "0"}),
     (["perl"], {"PERL_HASH_SEED": "0", "PERL_PERTURB_KEYS": "0"}),
     (["dash", "perl5.36.0", "python3.11"],
      {"PYTHONHASHSEED": "0", "PERL_HASH_SEED": "0", "PERL_PERTURB_KEYS": "0"})],
)  # fmt: skip
def test_seeds_by_the_environment(programs: list[str], environment: dict[str, str]) -> None:
    found = settings.apply(FIXED_SEEDS, ["gunicorn", "app"], programs)
    assert found == Start(("gunicorn", "app"), environment, randomized=False)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["node", "app.js"], ("node", *NODE, "app.js")),
     (["/usr/bin/nodejs", "--inspect", "app"], ("/usr/bin/nodejs", *NODE, "--inspect", "app")),
     (["env", "A=1", "node18", "node"], ("env", "A=1", "node18", *NODE, "node"))],
)  # fmt: skip
def test_flags_of_node_go_behind_it(words: list[str], expected: tuple[str, ...]) -> None:
    found = settings.apply(FIXED_SEEDS, words, ["node"])
    assert isinstance(found, Start)
    assert (found.words, found.arguments, found.environment) == (expected, NODE, {})
    assert "Math.random" in found.also


@pytest.mark.parametrize(
    ("words", "programs", "why"),
    [(["redis-server"], ["redis-server"], r"no Python, Perl or Node.js .*\(redis-server\)"),
     (["a"], [], "none seen"), (["a"], ["perlbug", "nodeenv", "pythonista"], "no Python"),
     (["npm", "start"], ["node"], "no word of the command starts Node.js.*--hash-seed=1")],
)  # fmt: skip
def test_where_it_would_change_nothing(words: list[str], programs: list[str], why: str) -> None:
    found = settings.apply(FIXED_SEEDS, words, programs)
    assert isinstance(found, NotApplicable)
    assert re.search(why, found.why)


def test_the_runtimes_do_it() -> None:
    """Their hashes are the same in each run then, and not before."""
    python = [sys.executable, "-c", "print(hash('a'))"]
    perl = ["perl", "-e", "my %h = map { $_ => 1 } 1 .. 50; print join ' ', keys %h"]
    for words, name in ((python, "python3"), (perl, "perl")):
        start = settings.apply(FIXED_SEEDS, words, [name])
        assert isinstance(start, Start)
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONHASHSEED"}

        def outputs(environment: dict[str, str], words: list[str] = words) -> set[bytes]:
            return {subprocess.check_output(words, env=environment) for _ in range(4)}

        assert len(outputs(clean)) > 1
        assert len(outputs({**clean, **start.environment})) == 1
