"""The self-test as users run it, and that it can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dedup.kernel.ksm import Ksm
from dedup.model import contents
from dedup.schema import load
from dedup.selftest import run as selftest
from dedup.selftest.cases import SIZES, all_cases
from tests.kernel_fixtures import Target

pytestmark = [pytest.mark.ksm, pytest.mark.root]


def run(*words: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "dedup", "apply", "--self-test", "--json", *words],
        capture_output=True, text=True,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_every_case_is_equal_and_tunables_are_back() -> None:
    import jsonschema

    before = Ksm().tunables()
    status, data = run()
    assert status == 0
    assert data["passed"]
    assert not data["skipped"]
    assert not data["by_process"]
    names = {c["name"] for c in data["cases"]}
    assert {f"{n} equal pages" for n in SIZES} <= names
    for case in data["cases"]:
        assert case["equal"], case
        assert case["predicted"] == case["actual"], case
        for process in case["processes"]:
            assert not any(process["difference"].values()), case
    jsonschema.validate(data, load())
    assert Ksm().tunables() == before
    assert not any(Ksm().counters().settled())


def test_the_article() -> None:
    """Three zero pages: 1 shared and 2 sharing, whose sum is the article's 3."""
    status, data = run("--case", "article*")
    assert status == 0
    figures = [
        tuple(c["actual"][n] for n in ("pages_shared", "pages_sharing", "pages_unshared"))
        for c in data["cases"]
    ]
    assert figures == [(1, 2, 0), (1, 1, 1), (1, 0, 2), (0, 0, 3)]


def test_a_wrong_model_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The naive count, without the leftover of max_page_sharing, must not pass."""

    def naive(n: Any, limit: int) -> tuple[Any, Any]:
        return -(-n // limit), n * 0

    monkeypatch.setattr(contents, "closed_form", naive)
    result = selftest.run(lambda case: case.name == "257 equal pages")
    assert not result.passed
    (case,) = result.cases
    assert case.comparison is not None
    assert case.comparison.difference["pages_unshared"] == 1


def test_where_others_use_ksm_their_pages_stay_merged(target: Target) -> None:
    """Others' memory is neither unmerged nor counted."""
    target.do("map", name="a", pages=20)
    target.do("fill", name="a", at=0, count=20, what="other 1")
    target.do("advise", name="a", what="mergeable")
    wanted = {"257 equal pages", "zero pages"}
    result = selftest.run(lambda case: case.name in wanted)
    assert result.passed
    assert any(str(target.pid) in o for o in result.others)
    assert all(c.comparison is None and c.processes for c in result.cases)
    assert int(Path(f"/proc/{target.pid}/ksm_merging_pages").read_text()) == 20


def test_users_out_of_sight_are_noticed(target: Target) -> None:
    """A user of KSM in another pid namespace can't be seen, but ksmd has work."""
    target.do("map", name="a", pages=20)
    target.do("fill", name="a", at=0, count=20, what="other 1")
    target.do("advise", name="a", what="mergeable")
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "dedup", "apply",
         "--self-test", "--json", "--case", "257 equal pages"],
        capture_output=True, text=True,
    )  # fmt: skip
    data = json.loads(done.stdout)
    assert done.returncode == 0, data
    assert data["by_process"]
    assert "out of sight" in data["others"][0]


def test_names_are_unique() -> None:
    names = [c.name for c in all_cases(512)]
    assert len(names) == len(set(names))
