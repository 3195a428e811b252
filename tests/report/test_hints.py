from __future__ import annotations

from typing import TYPE_CHECKING

from dedup.report import hints

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_sudo_gets_a_path_where_it_needs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, system = tmp_path / "venv", tmp_path / "usr"
    for folder in (ours, system):
        folder.mkdir()
        (folder / "dedup").write_text("#!/bin/sh\n")
        (folder / "dedup").chmod(0o755)
    monkeypatch.setenv("PATH", str(ours))
    monkeypatch.setattr(hints, "SYSTEM_PATH", str(tmp_path))
    assert hints.typable("run `sudo dedup scan`") == f"run `sudo {ours}/dedup scan`"
    monkeypatch.setattr(hints, "SYSTEM_PATH", str(system))
    assert hints.typable("run `sudo dedup scan`") == "run `sudo dedup scan`"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hints.typable("run `sudo dedup scan`") == "run `sudo dedup scan`"


def test_as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert hints.as_root("echo 1 > /x") == "echo 1 > /x"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert hints.as_root("echo 1 > /x") == "sudo sh -c 'echo 1 > /x'"
    assert hints.as_root("dedup apply --all") == "sudo dedup apply --all"
