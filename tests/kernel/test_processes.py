"""Which processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dedup.errors import NoMemory, NoSuchProcess, ProcessGone
from dedup.kernel.processes import Choice, Handle, choose, container_of
from dedup.sources.live import LiveSource, Options
from tests.kernel_fixtures import Target

ID = "3f4e1d2c3b4a59687766554433221100ffeeddccbbaa99887766554433221100"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process


@pytest.mark.parametrize(
    ("cgroup", "container"),
    [
        ("/", ""),
        ("/system.slice/ssh.service", ""),
        ("/user.slice/user-1000.slice/session-3.scope", ""),
        (f"/system.slice/docker-{ID}.scope", ID),
        (f"/docker/{ID}", ID),
        (f"/machine.slice/libpod-{ID}.scope", ID),
        (f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope", ID),
        (f"/kubepods.slice/kubepods-burstable.slice/crio-{ID}.scope", ID),
        (f"/kubepods/burstable/pod12-34/{ID}", ID),
        ("/lxc.payload.web1", "web1"),
        ("/lxc/web1", "web1"),
        ("/machine.slice/machine-web1.scope", "web1"),
        ("/machine.slice/machine-web1.scope/payload", "web1"),
        ("/machine.slice/machine-qemu\\x2d1\\x2dvm.scope", "qemu-1-vm"),
        ("/machine.slice/systemd-nspawn@web1.service/payload", "web1"),
        ("/machine.slice/web1.scope", "web1"),
        ("/lxc.payload/web1/init.scope", "web1"),
        (f"/docker/{ID}/init.scope", ID),
        (f"/ecs/task-1/{ID}", ID),
        (f"/system.slice/containerd.service/kubepods-pod1.slice:cri-containerd:{ID}", ID),
        (
            f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container",
            ID,
        ),
        # Those that look like it: the services themselves, and what watches a container.
        ("/system.slice/docker.service", ""),
        ("/system.slice/docker.socket", ""),
        ("/system.slice/containerd.service", ""),
        ("/system.slice/docker-cleanup.service", ""),
        ("/system.slice/machine-setup.service", ""),
        (f"/machine.slice/libpod-conmon-{ID}.scope", ""),
        ("/lxc.monitor.web1", ""),
        ("/machine.slice", ""),
        ("/docker", ""),
        ("/kubepods/besteffort/pod12", ""),
    ],
)
def test_container_of(cgroup: str, container: str) -> None:
    assert container_of(cgroup) == container


def test_choose_by_name_tree_and_user(tmp_path: Path) -> None:
    program = tmp_path / "odd ) name"
    program.symlink_to(sys.executable)
    # A child of a child of ours, whose name has what /proc/PID/stat is split by.
    code = (
        "import subprocess, sys\n"
        f"p = subprocess.Popen([{str(program)!r}, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "print(p.pid, flush=True)\n"
        "input(); p.communicate(b'\\n')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert choose(Choice(names=("odd ) n*",))) == [child]
        assert choose(Choice(trees=(parent.pid,))) == sorted([parent.pid, child])
        assert {parent.pid, child} <= set(choose(Choice(users=(str(os.getuid()),))))
        with Handle(child) as handle:
            assert handle.info.name == "odd ) name"
            assert handle.info.ppid == parent.pid
            cgroup = handle.info.cgroup
        assert child in choose(Choice(cgroups=(cgroup,)))
        assert os.getpid() not in choose(Choice(all=True))
        parent.communicate("\n")
    with pytest.raises(NoSuchProcess):
        choose(Choice(names=("odd ) n*",)))


def test_a_handle_stays_with_its_process(sleeper: subprocess.Popen[bytes]) -> None:
    with Handle(sleeper.pid) as handle:
        assert handle.alive()
        sleeper.communicate(b"\n")
        assert not handle.alive()
        with pytest.raises(ProcessGone):
            handle.read("stat")
        assert handle.id.start_time > 0


def test_a_pid_used_again_is_refused(target: Target) -> None:
    """The second look finds another process under the pid of the first."""
    source = LiveSource([target.pid], Options())
    pages = source.first_look()
    (known,) = pages.processes
    other = replace(known.id, start_time=known.id.start_time - 1)
    pages.processes[0] = replace(known, id=other)
    with pytest.raises(ProcessGone, match="another one's"):
        source.look_again()


@pytest.mark.parametrize("name", [b"a) R 1 (b", b"two\nlines", b"((((", b")", b"\xff\x1b[31m", b""])
def test_any_name_can_be_read(name: bytes) -> None:
    code = (
        "import ctypes, sys\n"
        f"ctypes.CDLL(None).prctl(15, {name!r}, 0, 0, 0)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with Handle(process.pid) as handle:
            assert handle.info.ppid == os.getpid()
            assert handle.info.name.encode(errors="surrogateescape") == name
            assert handle.alive()
        process.communicate(b"")


def test_zombie(sleeper: subprocess.Popen[bytes]) -> None:
    assert sleeper.stdin is not None
    sleeper.stdin.close()
    sleeper.stdin = None
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    with Handle(sleeper.pid) as handle:
        assert not handle.alive()
        with pytest.raises(NoMemory, match="zombie"):
            handle.require_memory()
    sleeper.wait()


def test_kernel_thread() -> None:
    comm = Path("/proc/2/comm")
    if not comm.exists() or comm.read_text() != "kthreadd\n":
        pytest.skip("kernel threads are out of sight here")
    with Handle(2) as handle, pytest.raises(NoMemory, match="kernel thread"):
        handle.require_memory()


def test_no_such_process() -> None:
    with pytest.raises(NoSuchProcess, match="no process"):
        Handle(2**22 + 1)
    with pytest.raises(NoSuchProcess, match="tree"):
        choose(Choice(trees=(2**22 + 1,)))
