"""Waiting for ksmd."""

from __future__ import annotations

import pytest

from dedup.change import wait
from dedup.errors import CheckFailed, KsmNotRunning
from tests.kernel_fixtures import KsmControl, Target

pytestmark = [pytest.mark.ksm, pytest.mark.root]


def test_gives_up_when_ksmd_has_nothing_to_do(ksm: KsmControl) -> None:
    ksm.start()
    with pytest.raises(CheckFailed, match="converged"):
        wait.converge(ksm.ksm, timeout_seconds=0.2)


def test_a_resting_ksmd_is_told_apart(ksm: KsmControl) -> None:
    with pytest.raises(KsmNotRunning):
        wait.converge(ksm.ksm, timeout_seconds=5)


def test_converges_on_many_pages(ksm: KsmControl, target: Target) -> None:
    """Thousands of unique pages: each visit moves the counters for a moment."""
    target.do("map", name="a", pages=8000)
    target.do("fill", name="a", at=0, count=8000, what="unique")
    target.do("advise", name="a", what="mergeable")
    ksm.start()
    done = wait.converge(ksm.ksm, timeout_seconds=60)
    assert done.full_scans >= wait.LEAST_SCANS
    ksm.stop()
    assert ksm.ksm.counters().pages_unshared == 8000
