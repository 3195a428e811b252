"""`dedup scan` of files: what is shown, the JSON, the exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dedup.estimate import store
from tests.cli.conftest import Dedup, Result, environment
from tests.sources.memory_files import (
    PAGE,
    ZERO,
    Dumped,
    Elf,
    Load,
    dump,
    file_note,
    page,
    prpsinfo,
)

A, B = 0x400000, 0x7F0000000000
DEFAULTS = ("--tunable", "max_page_sharing=256", "--tunable", "use_zero_pages=0")
"""The kernel's, whatever the host has."""


def core(path: Path, pid: int = 4321, name: str = "served") -> Path:
    loads = [
        Load(A, page("text"), flags=5),
        Load(B, page("a") * 3 + page("b") + ZERO * 2, memory=9 * PAGE),
    ]
    return Elf(loads, [prpsinfo(pid, name), file_note((A, A + PAGE, "/bin/x"))]).write(path)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    core(tmp_path / "core")
    (tmp_path / "ram").write_bytes(page("a") + page("guest"))
    dump(tmp_path / "dump", Dumped(7, [(B + 64 * PAGE, [page("a"), page("c")], 4)], name="saved"))
    return tmp_path


def test_what_is_shown(dedup: Dedup, files: Path) -> None:
    found = dedup("scan", "--core", str(files / "core"), *DEFAULTS)
    assert found.status == 0
    assert found.out.startswith("KSM would free 8.0 KiB to 12.0 KiB (2 to 3 pages)")
    words = " ".join(found.out.split())
    assert f"core {files}/core".replace(" ", "") in words.replace(" ", "")
    assert "6 pages, 2 of them all zero" in words
    assert (
        "4.0 KiB are all-zero pages: a file can't tell them from memory that was never touched"
        in words
    )
    assert "Files hold no frame numbers" in words
    assert "of 2 segments 0 are empty and 1 there in part" in words
    assert "in a core, unchanged pages of the file can't be told" in words
    assert "sudo" not in words
    assert "--passes" not in words
    assert "4321" in words
    assert "served" in words


def test_all_kinds_in_one_scan(dedup: Dedup, files: Path) -> None:
    found = dedup(
        "scan", "--json", "--core", str(files / "core"), "--image", str(files / "ram"),
        "--criu", str(files / "dump"), "--seed", "5", *DEFAULTS,
    )  # fmt: skip
    assert found.status == 0
    data = found.json
    assert [p["pid"] for p in data["processes"]] == [4321, 0, 7]
    assert [p["name"] for p in data["processes"]] == ["served", "ram", "saved"]
    assert [p["source"] for p in data["processes"]] == [0, 1, 2]
    unknown = [(p["start_time"], p["pinned_bytes"]) for p in data["processes"]]
    assert unknown == [(None, None)] * 3
    assert data["scan"]["sources"] == [
        {"kind": "core", "path": str(files / "core"), "processes": 1, "pages": 6,
         "zero_pages": 2, "hole_pages": 0, "file_bytes": (files / "core").stat().st_size},
        {"kind": "image", "path": str(files / "ram"), "processes": 1, "pages": 2,
         "zero_pages": 0, "hole_pages": 0, "file_bytes": 2 * PAGE},
        {"kind": "criu", "path": str(files / "dump"), "processes": 1, "pages": 2,
         "zero_pages": 0, "hole_pages": 0, "file_bytes": 2 * PAGE},
    ]  # fmt: skip
    assert data["scan"]["frames"] is None
    assert data["scan"]["complete"] is True
    assert [s["code"] for s in data["scan"]["skipped"]] == ["not-dumped"]
    assert data["scan"]["passes"] == 1
    p = data["prediction"]
    # `a` five times; zeros twice, or never touched.
    assert p["frames_freed"] is None
    assert p["bounds"]["pages_shared"] == [1, 2]
    assert p["bounds"]["pages_sharing"] == [4, 5]
    assert p["bounds"]["frames_freed"] == [4, 5]
    assert p["breakdown"]["zero_pages"] == 1
    assert p["pages_volatile"] is None
    assert p["thp_split"] is None
    for region in data["regions"]:
        for name in ("advised", "anon_huge_bytes", "swap_bytes", "ksm_bytes"):
            assert region[name] is None, name
    assert {t["looks_like"] for t in data["top_contents"]} == {"binary", "zero"}


def test_live_processes_have_no_source(dedup: Dedup) -> None:
    data = dedup("scan", "--json", "--passes", "1", "--pid", str(os.getpid())).json
    assert data["scan"]["sources"] == []
    assert [p["source"] for p in data["processes"]] == [None]


def test_a_live_process_and_a_core(dedup: Dedup, files: Path) -> None:
    found = dedup(
        "scan", "--json", "--pid", str(os.getpid()), "--core", str(files / "core"),
        "--interval", "0.1",
    )  # fmt: skip
    data = found.json
    assert found.status == 0
    assert [p["pid"] for p in data["processes"]] == [os.getpid(), 4321]
    assert data["scan"]["passes"] >= 2
    assert data["regions"][0]["advised"] is not None


def test_by_name(dedup: Dedup, files: Path) -> None:
    core(files / "second", 17)
    found = dedup(
        "scan", "--json", "--by", "name",
        "--core", str(files / "core"), "--core", str(files / "second"),
    )  # fmt: skip
    assert [(g["name"], g["processes"]) for g in found.json["groups"]] == [("served", 2)]


def complains(found: Result, status: int, words: str) -> None:
    assert found.status == status, found.err
    assert found.out == ""
    said = " ".join(found.err.split())
    assert words in said
    assert found.err.count("\n\n") == 0, "one paragraph"


@pytest.mark.parametrize("option", ["--core", "--image", "--criu"])
def test_what_is_no_such_file(dedup: Dedup, tmp_path: Path, option: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "empty", "folder", "none", "/dev/zero"):
        complains(dedup("scan", option, str(tmp_path / name)), 7, "dedup: ")
    found = dedup("scan", "--json", option, str(tmp_path / "none"))
    assert (found.status, found.json["error"]["code"]) == (7, "bad-input")


def test_a_cut_core(dedup: Dedup, files: Path) -> None:
    os.truncate(files / "core", 2 * PAGE)
    complains(dedup("scan", "--core", str(files / "core")), 7, "was cut")


@pytest.mark.root
def test_without_the_right_to_read(files: Path) -> None:
    (files / "core").chmod(0o600)
    # Nobody may not reach our modules: they are there before it becomes nobody.
    program = """
import os, sys
import dedup.__main__
sys.argv = ["dedup", "scan", "--core", sys.argv[1]]
sys.stdout = open(os.devnull, "w")
assert dedup.__main__.main() in {None, 0}
sys.stdout = sys.__stdout__
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(dedup.__main__.main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(files / "core")],
        capture_output=True, text=True, env=environment(), timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (4, ""), done.stderr
    assert "may not read" in done.stderr


def test_without_pyelftools(files: Path) -> None:
    program = """
import sys
sys.modules["elftools"] = None
import dedup.__main__
sys.argv = ["dedup", "scan", *sys.argv[1:]]
sys.exit(dedup.__main__.main())
"""

    def run(*args: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-c", program, *args],
            capture_output=True, text=True, env=environment(), timeout=60,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    complains(run("--core", str(files / "core")), 6, "pip install 'dedup-ksm[files]'")
    assert run("--image", str(files / "ram")).status == 0


def test_words_that_dont_go_together(dedup: Dedup, files: Path) -> None:
    complains(dedup("scan"), 2, "nothing chosen")
    complains(dedup("scan", "--core", str(files / "core"), "--passes", "2"), 2, "one moment")
    complains(
        dedup("scan", "--image", str(files / "ram"), "--scope", "advised"), 2, "does not tell"
    )
    assert dedup("scan", "--core", str(files / "core"), "--passes", "1").status == 0


def test_bytes_that_make_no_page_are_left_out(dedup: Dedup, files: Path) -> None:
    with (files / "ram").open("ab") as file:
        file.write(b"rest")
    found = dedup("scan", "--image", str(files / "ram"))
    assert found.status == 3
    assert "4 bytes" in found.err
    assert "Left out" in found.out


def test_names_that_harm_terminals(dedup: Dedup, tmp_path: Path) -> None:
    path = core(tmp_path / "core\x1b[31m\nx", name="a\x1b[2J")
    found = dedup("scan", "-v", "--core", str(path))
    assert found.status == 0
    assert "\x1b" not in found.out
    path.write_bytes(b"no core")
    assert "\x1b" not in dedup("scan", "--core", str(path)).err


def test_help(dedup: Dedup) -> None:
    out = dedup("scan", "--help").out
    for option in ("--core FILE", "--image FILE", "--criu DIR"):
        assert option in out


def test_fingerprints_of_files(dedup: Dedup, files: Path) -> None:
    for kind, path in (("core", "core"), ("image", "ram"), ("criu", "dump")):
        saved = files / f"{kind}.dedup"
        found = dedup("scan", f"--{kind}", str(files / path), "--save", str(saved), "--json")
        assert found.status == 0
        one = store.load(saved)
        assert one.facts.source == kind
        assert one.facts.scanned_pages == found.json["scan"]["pages"]
        assert one.facts.tunables == {}
    several = files / "several.dedup"
    words = ["--core", str(files / "core"), "--criu", str(files / "dump"), "--save", str(several)]
    assert dedup("scan", *words, "--label", "both").status == 0
    both = store.load(several)
    assert (both.facts.source, both.facts.label, both.facts.processes) == ("mixed", "both", 2)
    # One content of the core, three times there, is in the dump as well.
    assert 4 in both.contents.mappings.tolist()
