"""Capabilities, seccomp, Yama, lockdown, hidepid: as others make them, and for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dedup.kernel import privileges

SHOW = """
import json
from dedup.kernel import privileges
p = privileges.read()
print(json.dumps([p.uid, sorted(p.capabilities), p.initial, p.seccomp, p.hidepid,
                  p.has("CAP_SYS_ADMIN")]))
"""


def show(*prefix: str) -> list[Any]:
    """What a process started this way finds."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", SHOW], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def test_nothing_told(tmp_path: Path) -> None:
    found = privileges.read(tmp_path, tmp_path)
    assert found.capabilities == frozenset()
    assert (found.seccomp, found.yama, found.lockdown, found.hidepid) == (0, None, "", "")


def test_what_files_tell(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text(
        "Uid:\t1000\t7\t1000\t1000\nCapEff:\t0000010000080000\nSeccomp:\t2\n"
    )
    (tmp_path / "self/uid_map").write_text("         0       1000          1\n")
    (tmp_path / "self/mountinfo").write_text(
        f"1 2 0:3 / {tmp_path} rw - proc proc rw\n"
        f"4 2 0:3 / {tmp_path} rw,relatime - proc proc rw,gid=4,hidepid=2\n"
        "9 2 0:3 / /elsewhere rw - proc proc rw,hidepid=1\n"
    )
    (tmp_path / "sys/kernel/yama").mkdir(parents=True)
    (tmp_path / "sys/kernel/yama/ptrace_scope").write_text("3\n")
    (tmp_path / "lockdown").write_text("none [integrity] confidentiality\n")
    found = privileges.read(tmp_path, tmp_path)
    assert (found.uid, found.seccomp, found.yama) == (7, 2, 3)
    assert found.capabilities == {"CAP_SYS_PTRACE", "CAP_CHECKPOINT_RESTORE"}
    assert (found.lockdown, found.hidepid) == ("integrity", "invisible")
    assert not found.initial
    assert not found.has("CAP_SYS_PTRACE")


@pytest.mark.parametrize(
    ("option", "words"), [("off", ""), ("0", ""), ("1", "noaccess"), ("invisible", "invisible")]
)
def test_hidepid(tmp_path: Path, option: str, words: str) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(
        f"1 2 0:3 / {tmp_path} rw - proc proc rw,hidepid={option}\n"
    )
    assert privileges.read(tmp_path).hidepid == words


def test_here() -> None:
    assert privileges.read().uid == os.geteuid()


@pytest.mark.root
def test_without_capabilities() -> None:
    uid, capabilities, initial, _, _, admin = show(
        "setpriv", "--bounding-set=-all", "--inh-caps=-all"
    )
    assert (uid, capabilities, initial, admin) == (0, [], True, False)
    one = show("setpriv", "--bounding-set=-all,+sys_ptrace", "--inh-caps=-all")
    assert one[1] == ["CAP_SYS_PTRACE"]


@pytest.mark.root
def test_root_of_a_namespace_is_not_the_hosts() -> None:
    uid, capabilities, initial, _, _, admin = show("unshare", "-Ur")
    assert uid == 0
    assert "CAP_SYS_ADMIN" in capabilities
    assert (initial, admin) == (False, False)


@pytest.mark.root
def test_a_proc_that_hides_processes() -> None:
    script = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'
    assert show("unshare", "--mount", "sh", "-c", script, "sh")[4] == "invisible"
