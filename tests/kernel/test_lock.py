"""Who holds the lock."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dedup.errors import Busy
from dedup.kernel.lock import HostLock, holder


def test_nobody(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with HostLock(tmp_path):
        pass
    assert holder(tmp_path) is None
    assert holder(tmp_path, tmp_path / "no proc") is None


def test_somebody_who_is_not_disturbed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    with HostLock(tmp_path), pytest.raises(Busy):
        assert holder(tmp_path) == os.getpid()
        assert holder(other) is None
        with HostLock(other):
            assert holder(other) == os.getpid()
        HostLock(tmp_path).acquire()


def test_nobody_else_may_open_it(tmp_path: Path) -> None:
    """Who may open it may lock it."""
    with HostLock(tmp_path) as held:
        assert held.path.stat().st_mode & 0o077 == 0
