"""In a container, or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dedup.kernel import container

ID = "0123456789abcdef" * 4
SHOW = "from dedup.kernel import container; print(container.read())"


def make(root: Path, *, pid: int = 0xEFFFFFFC, user: int = 0xEFFFFFFD, cgroup: str = "/") -> None:
    (root / "proc/self/ns").mkdir(parents=True)
    (root / "proc/self/ns/pid").symlink_to(f"pid:[{pid}]")
    (root / "proc/self/ns/user").symlink_to(f"user:[{user}]")
    (root / "proc/self/cgroup").write_text(f"0::{cgroup}\n")


def test_the_host(tmp_path: Path) -> None:
    make(tmp_path)
    assert not container.read(tmp_path).inside
    # A booted image may have it.
    (tmp_path / ".dockerenv").touch()
    assert not container.read(tmp_path).inside


def test_a_folder_without_anything(tmp_path: Path) -> None:
    assert not container.read(tmp_path).inside


def test_containers(tmp_path: Path) -> None:
    make(tmp_path, pid=4026532181, cgroup=f"/machine.slice/libpod-{ID}.scope")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.containerenv").touch()
    found = container.read(tmp_path)
    assert found.inside
    assert (found.pid_namespace, found.user_namespace) == (True, False)
    assert (found.engine, found.name) == ("podman", ID)


@pytest.mark.parametrize("user", [4026531837, 4026532999])
def test_one_with_the_hosts_pids(tmp_path: Path, user: int) -> None:
    make(tmp_path, user=user, cgroup=f"/docker/{ID}")
    found = container.read(tmp_path)
    assert found.inside
    assert found.user_namespace is (user != 4026531837)


@pytest.mark.root
def test_namespaces_for_real() -> None:
    def show(*prefix: str) -> str:
        done = subprocess.run(
            [*prefix, sys.executable, "-c", SHOW], capture_output=True, text=True, timeout=60,
            check=True,
        )  # fmt: skip
        return done.stdout

    assert "pid_namespace=True" in show("unshare", "--pid", "--fork", "--mount-proc")
    assert "user_namespace=True" in show("unshare", "-Ur")
    script = 'mount --bind -o ro /sys /sys && mount -o remount,bind,ro /sys && exec "$@"'
    bound = show("unshare", "--mount", "sh", "-c", script, "sh")
    if os.path.isdir("/sys/kernel/mm/ksm"):
        assert "sys_read_only=True" in bound
        assert "sys_read_only=False" in show()
