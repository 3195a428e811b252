"""The journal: written before the change, read after a crash."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from dedup.change.applied import Applied
from dedup.change.journal import Entry, Journal
from dedup.errors import OutputFailed, Unsupported


class Settings:
    """A few settings in memory: the journal itself knows nothing of files."""

    def __init__(self, **values: str) -> None:
        self.values = values

    def read(self, path: str) -> str:
        return self.values[path]

    def write(self, path: str, value: str) -> None:
        self.values[path] = value


def change(journal: Journal, settings: Settings, path: str, value: str) -> None:
    journal.record(Entry(path, settings.read(path), value))
    settings.write(path, value)


def test_restores_the_first_value_newest_first(tmp_path: Path) -> None:
    journal, settings = Journal(tmp_path), Settings(a="1", b="x")
    change(journal, settings, "a", "2")
    change(journal, settings, "b", "y")
    change(journal, settings, "a", "3")
    done = journal.restore(settings.read, settings.write)
    assert settings.values == {"a": "1", "b": "x"}
    assert [(r.path, r.outcome) for r in done] == [("a", "restored"), ("b", "restored")]
    assert not journal.path.exists()


def test_crash_between_journal_and_change(tmp_path: Path) -> None:
    journal, settings = Journal(tmp_path), Settings(a="1")
    journal.record(Entry("a", "1", "2"))
    assert [r.outcome for r in journal.restore(settings.read, settings.write)] == ["unchanged"]
    assert settings.values == {"a": "1"}


def test_what_somebody_else_changed_since_stays(tmp_path: Path) -> None:
    journal, settings = Journal(tmp_path), Settings(a="1")
    change(journal, settings, "a", "2")
    settings.write("a", "7")
    (done,) = journal.restore(settings.read, settings.write)
    assert (done.outcome, settings.values["a"]) == ("left", "7")


def test_a_last_line_cut_short_is_no_change(tmp_path: Path) -> None:
    journal, settings = Journal(tmp_path), Settings(a="1")
    change(journal, settings, "a", "2")
    with journal.path.open("a") as f:
        f.write('{"path": "b", "bef')
    assert [e.path for e in journal.entries()] == ["a"]
    journal.record(Entry("c", "1", "2"))
    assert [e.path for e in journal.entries()] == ["a", "c"]


def test_a_broken_line_in_the_middle_is_said(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.path.write_text("nonsense\n" + '{"path": "a", "before": "1", "after": "2"}\n')
    with pytest.raises(OutputFailed, match="line 1"):
        journal.entries()


@pytest.mark.parametrize(
    "line", ['{"path": "a\\u0000b", "before": "1", "after": "2"}', "[" * 100_000]
)
def test_a_line_of_nonsense_is_said(tmp_path: Path, line: str) -> None:
    journal = Journal(tmp_path)
    journal.path.write_text(f"{line}\n{line}\n")
    with pytest.raises(OutputFailed, match="line 1"):
        journal.entries()


def record(**fields: object) -> str:
    mark = {
        "event": "mark", "application": "a", "pid": 1, "start_time": 1, "name": "x",
        "program": [], "way": "whole", "ranges": [], "own": [],
    }  # fmt: skip
    return json.dumps({**mark, **fields})


@pytest.mark.parametrize(
    "fields",
    [{"name": 5}, {"name": "\u20ac"}, {"start_time": math.inf}, {"way": []}, {"ranges": [[1]]}],
)
def test_a_record_of_nonsense_is_said(tmp_path: Path, fields: dict[str, object]) -> None:
    begin = '{"event": "begin", "application": "a", "began_ticks": 1, "mergeable_before": []}'
    end = '{"event": "finish", "application": "a"}'
    (tmp_path / "applied").write_text("\n".join([begin, record(**fields), end]) + "\n")
    with pytest.raises(OutputFailed, match="can't be read"):
        Applied(tmp_path).applications()


def test_a_failed_write_keeps_the_journal(tmp_path: Path) -> None:
    journal, settings = Journal(tmp_path), Settings(a="1")
    change(journal, settings, "a", "2")

    def refuse(path: str, value: str) -> None:
        raise Unsupported("the kernel refuses")

    (done,) = journal.restore(settings.read, refuse)
    assert done.outcome == "failed"
    assert journal.path.exists()


def test_dry_run_keeps_the_journal(tmp_path: Path) -> None:
    journal, settings = Journal(tmp_path), Settings(a="1")
    change(journal, settings, "a", "2")
    (done,) = journal.restore(settings.read, lambda _p, _v: None, dry_run=True)
    assert (done.outcome, settings.values["a"], journal.path.exists()) == ("restored", "2", True)


def test_not_readable_by_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.record(Entry("a", "1", "2"))
    assert journal.path.stat().st_mode & 0o077 == 0


@pytest.mark.root
def test_disk_full_means_no_change(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,mode=755", "none", tmp_path], check=True)
    try:
        (tmp_path / "filler").write_bytes(b"x" * 4096)
        journal = Journal(tmp_path)
        with pytest.raises(OutputFailed, match="nothing was changed"):
            journal.record(Entry("a", "1", "2"))
        assert journal.entries() == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_link_in_the_journals_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("")
    os.symlink(tmp_path / "elsewhere", tmp_path / "journal")
    with pytest.raises(OutputFailed):
        Journal(tmp_path).record(Entry("a", "1", "2"))
