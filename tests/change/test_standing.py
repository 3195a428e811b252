"""Standing set-ups: which unit, which drop-in, written and removed; systemd is the oracle."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dedup.change import standing
from dedup.change.standing import MARK, SETTING, Target, Ways
from dedup.errors import Unsupported
from dedup.kernel import systemd
from dedup.kernel.processes import Handle, Info
from dedup.kernel.systemd import Systemd
from dedup.model.guests import Guest

ID = "3f4e1d2c3b4a59687766554433221100ffeeddccbbaa99887766554433221100"
KNOWS = Systemd("258", running=True, knows_memory_ksm=True)
OLD = Systemd("252", running=True, knows_memory_ksm=False)


@pytest.fixture
def me() -> Info:
    with Handle(os.getpid()) as handle:
        return handle.info


def ways(here: Systemd = KNOWS, root: Path = Path("/"), text: str | None = None,
         starts: bool | None = True) -> Ways:  # fmt: skip
    return Ways(here, starts, "/usr/bin/dedup", lambda _unit: text, root)


def one(me: Info, cgroup: str, given: Ways | None = None) -> Target:
    (target,) = standing.targets([replace(me, cgroup=cgroup)], {}, given or ways())
    return target


@pytest.mark.parametrize(
    ("cgroup", "unit", "uid"),
    [
        ("/system.slice/redis.service", "redis.service", None),
        ("/system.slice/system-foo.slice/foo@a.service", "foo@a.service", None),
        # A service's own cgroups may have any name.
        ("/system.slice/evil.service/sshd.service", "evil.service", None),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/a.service", "a.service", 1000),
        ("/user.slice/user-1000.slice/user@1000.service/init.scope", "init.scope", 1000),
        ("/user.slice/user-1000.slice/user@1000.service", "user@1000.service", None),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope", None),
        ("/docker/x", "", None),
        ("/", "", None),
    ],
)
def test_unit_of(cgroup: str, unit: str, uid: int | None) -> None:
    assert standing.unit_of(cgroup) == (unit, uid)


@pytest.mark.parametrize(
    ("cgroup", "kind", "name"),
    [
        ("/system.slice/redis.service", "service", "redis.service"),
        (f"/system.slice/docker-{ID}.scope", "container", ID),
        (f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope", "container", ID),
        ("/lxc.payload.web1/system.slice/x.service", "container", "web1"),
        ("/machine.slice/systemd-nspawn@web.service/payload", "service",
         "systemd-nspawn@web.service"),
        ("/user.slice/user-0.slice/user@0.service/app.slice/a.service", "user-service",
         "a.service"),
        ("/user.slice/user-1000.slice/session-3.scope", "scope", "session-3.scope"),
        ("/", "none", ""),
    ],
)  # fmt: skip
def test_kinds(me: Info, cgroup: str, kind: str, name: str) -> None:
    target = one(me, cgroup)
    assert (target.kind, target.name) == (kind, name)
    assert (target.drop_in is not None) is kind.endswith("service")
    assert target.notes or target.drop_in


def test_a_systemd_that_knows_the_setting(me: Info) -> None:
    target = one(me, "/system.slice/redis.service")
    assert target.drop_in is not None
    assert str(target.drop_in.path) == "/etc/systemd/system/redis.service.d/50-dedup-ksm.conf"
    assert target.drop_in.text == SETTING
    assert target.commands == ("systemctl daemon-reload", "systemctl restart redis.service")
    assert target.notes == ()
    # Nobody has tried whether such a service starts.
    unsure = one(me, "/system.slice/redis.service", ways(starts=None))
    assert "systemd-run --wait -p MemoryKSM=yes true" in unsure.notes[0]


def test_a_users_service_belongs_to_the_user(me: Info) -> None:
    target = one(me, "/user.slice/user-0.slice/user@0.service/app.slice/a.service")
    assert target.drop_in is not None
    home = pwd.getpwuid(0).pw_dir
    assert str(target.drop_in.path).startswith(f"{home}/.config/systemd/user/a.service.d/")
    assert target.commands[0] == "systemctl --user daemon-reload"


UNIT = """
[Unit]
Description=x
ExecStart=/not/this
[Service]
ExecStart=/old
ExecStart=
# ExecStart=/nor/this
ExecStart=-/usr/bin/redis-server /etc/a \\
# a comment in between
   --daemonize no
Type=notify
"""


@pytest.mark.parametrize(
    ("here", "starts"), [(OLD, None), (KNOWS, False), (replace(OLD, knows_memory_ksm=None), None)]
)
def test_the_way_out_where_systemd_cant(me: Info, here: Systemd, starts: bool | None) -> None:
    target = one(me, "/system.slice/r.service", ways(here, text=UNIT, starts=starts))
    assert target.drop_in is not None
    assert " ".join(target.drop_in.text.split()) == " ".join(
        f"{MARK}[Service] ExecStart= ExecStart=-/usr/bin/dedup run -- /usr/bin/redis-server "
        "/etc/a --daemonize no".split()
    )
    assert "this systemd" in target.notes[0]


@pytest.mark.parametrize(
    ("text", "why"),
    [(None, "not found"), ("[Service]\nType=oneshot\n", "has none"),
     ("[Service]\nExecStart=@/bin/a b\n", "begins with @")],
)  # fmt: skip
def test_no_way_out(me: Info, text: str | None, why: str) -> None:
    target = one(me, "/system.slice/r.service", ways(OLD, text=text))
    assert target.drop_in is None
    assert why in target.notes[1]
    with pytest.raises(Unsupported):
        standing.write(target)


@pytest.mark.parametrize(
    "name", ["a b.service", "é.service", "$(x).service", "x" * 250 + ".service"]
)
def test_names_that_no_systemd_gives(me: Info, name: str) -> None:
    assert one(me, f"/system.slice/{name}").drop_in is None


def test_write_and_undo(me: Info, tmp_path: Path) -> None:
    target = one(me, "/system.slice/r.service", ways(root=tmp_path))
    assert target.drop_in is not None
    path = target.drop_in.path
    assert standing.write(target, dry_run=True).outcome == "written"
    assert not path.parent.exists()
    assert standing.undo(target).outcome == "absent"
    assert standing.write(target).outcome == "written"
    assert path.read_text() == SETTING
    assert path.stat().st_mode & 0o777 == 0o644
    assert standing.write(target).outcome == "unchanged"
    path.write_text(MARK + "[Service]\nold=1\n")
    assert standing.write(target).outcome == "written"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert standing.undo(target, dry_run=True).outcome == "removed"
    assert path.exists()
    assert standing.undo(target).outcome == "removed"
    assert not path.parent.exists()


def test_files_of_others_stay(me: Info, tmp_path: Path) -> None:
    target = one(me, "/system.slice/r.service", ways(root=tmp_path))
    assert target.drop_in is not None
    path = target.drop_in.path
    path.parent.mkdir(parents=True)
    path.write_text("[Service]\n")
    assert standing.write(target).outcome == "refused"
    assert standing.undo(target).outcome == "refused"
    assert path.read_text() == "[Service]\n"
    assert standing.write(target, force=True).outcome == "written"
    other = path.parent / "other.conf"
    other.write_text("")
    assert standing.undo(target).outcome == "removed"
    assert other.exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(SETTING + "#\n")
    path.symlink_to(elsewhere)
    assert standing.write(target).outcome == "refused"
    assert standing.write(target, force=True).outcome == "written"
    assert not path.is_symlink()
    assert elsewhere.read_text() == SETTING + "#\n"


def test_the_service_of_another_user(me: Info) -> None:
    uid = os.geteuid() + 1
    path = f"/user.slice/user-{uid}.slice/user@{uid}.service/app.slice/a.service"
    target = one(me, path)
    assert target.drop_in is not None
    if not target.drop_in.path.exists():
        assert standing.write(target).outcome == "refused"
        assert not target.drop_in.path.exists()


def test_guests_stand_for_themselves(me: Info) -> None:
    info = replace(me, cgroup="/machine.slice/machine-qemu\\x2d1\\x2da.scope")
    guest = Guest("shared", 1 << 26, 1)
    (target,) = standing.targets([info], {info.id.pid: guest}, ways())
    assert (target.kind, target.name, target.guest) == ("guest", str(info.id.pid), guest)
    assert target.notes == guest.ways_out


def test_processes_of_a_unit_are_one_target(me: Info) -> None:
    a, b = (replace(me, cgroup=f"/system.slice/{n}.service") for n in "ab")
    assert [len(t.processes) for t in standing.targets([a, b, a], {}, ways())] == [2, 1]


def test_unit_files(tmp_path: Path) -> None:
    low, high = tmp_path / "usr/lib/systemd/system", tmp_path / "etc/systemd/system"
    for folder in (low, high):
        folder.mkdir(parents=True)
    (low / "a@.service").write_text("[Service]\nExecStart=/low %i\n")
    assert systemd.unit_text("a@x.service", standing.NAME, tmp_path) == (
        "[Service]\nExecStart=/low %i\n"
    )
    drop_ins = high / "a@x.service.d"
    drop_ins.mkdir()
    (drop_ins / "10-x.conf").write_text("[Service]\nExecStart=\nExecStart=/changed\n")
    (drop_ins / standing.NAME).write_text("[Service]\nExecStart=/ours\n")
    text = systemd.unit_text("a@x.service", standing.NAME, tmp_path)
    assert text is not None
    assert standing.exec_starts(text) == ["/changed"]
    assert systemd.unit_text("b.service", standing.NAME, tmp_path) is None


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_what_systemd_itself_says(tmp_path: Path, me: Info) -> None:
    here = systemd.probe()
    assert here.version
    assert here.running is Path("/run/systemd/system").exists()
    assert here.knows_memory_ksm is not None
    unit = "[Service]\nType=notify\nExecStart=-/bin/sh -c 'echo a \\\n  b' %n\n"
    (tmp_path / "r.service").write_text(unit)
    target = one(me, "/system.slice/r.service", replace(ways(OLD, text=unit), program="/bin/env"))
    assert target.drop_in is not None
    folder = tmp_path / "r.service.d"
    folder.mkdir()
    (folder / standing.NAME).write_text(target.drop_in.text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "r.service")],
        capture_output=True, text=True, env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )  # fmt: skip
    assert "r.service" not in done.stderr
    # The same with the setting: it complains exactly where it does not know it.
    (folder / standing.NAME).write_text(SETTING)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "r.service")],
        capture_output=True, text=True, env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )  # fmt: skip
    assert ("MemoryKSM" in done.stderr) is not here.knows_memory_ksm
