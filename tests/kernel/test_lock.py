"""Who holds the lock."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dedup.errors import Busy, OutputFailed, Refused
from dedup.kernel.lock import HostLock, holder, read_own

NOBODY = 65534


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


@pytest.mark.parametrize("there", ["file", "link to nothing", "pipe"])
def test_what_is_no_folder(tmp_path: Path, there: str) -> None:
    state = tmp_path / "state"
    if there == "file":
        state.write_text("precious")
    elif there == "pipe":
        os.mkfifo(state)
    else:
        state.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputFailed, match="is no folder") as e, HostLock(state):
        pass
    assert f"ls -ld {state}" in e.value.hint
    assert not (tmp_path / "nowhere").exists()
    assert there != "file" or state.read_text() == "precious"


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_folder_where_others_may_write(tmp_path: Path, mode: int) -> None:
    """They could write a journal, which root then follows."""
    tmp_path.chmod(mode)
    with pytest.raises(Refused, match="others may write") as e, HostLock(tmp_path):
        pass
    assert "chmod 755" in e.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.root
def test_a_folder_of_another_user(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, NOBODY)
    with pytest.raises(Refused, match="others may write"), HostLock(tmp_path):
        pass


@pytest.mark.root
def test_a_file_of_another_user(tmp_path: Path) -> None:
    for name in ("lock", "journal"):
        (tmp_path / name).write_text("{}")
        os.chown(tmp_path / name, NOBODY, NOBODY)
    with pytest.raises(OutputFailed, match="no file of dedup's"), HostLock(tmp_path):
        pass
    with pytest.raises(OutputFailed, match="no file of dedup's"):
        read_own(tmp_path / "journal")


@pytest.mark.parametrize("there", ["link", "pipe", "folder"])
def test_what_is_no_file(tmp_path: Path, there: str) -> None:
    """A link is not followed, and a pipe not waited for."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("lock", "journal"):
        path = tmp_path / name
        if there == "link":
            path.symlink_to(precious)
        elif there == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
    with pytest.raises(OutputFailed, match="no file of dedup's") as e, HostLock(tmp_path):
        pass
    assert f"ls -l {tmp_path / 'lock'}" in e.value.hint
    with pytest.raises(OutputFailed, match="no file of dedup's"):
        read_own(tmp_path / "journal")
    assert precious.read_text() == "precious"
