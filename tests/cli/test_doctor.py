"""The doctor on the real machine: each thing that it can find is brought about."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dedup.kernel.ksm import Ksm
from tests.kernel_fixtures import KsmControl, Target

from .conftest import Dedup, on_terminal

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
needs_ksm = pytest.mark.skipif(not Ksm().present, reason="this kernel has no KSM")

Found = dict[str, dict[str, Any]]


def checks(dedup: Dedup, *args: str, prefix: tuple[str, ...] = ()) -> Found:
    """By their names."""
    result = dedup("doctor", "--json", *args, prefix=prefix)
    assert result.err == ""
    found = {c["name"]: c for c in result.json["checks"]}
    assert not [c for c in found.values() if "could not be looked at" in c["found"]]
    return found


def mounted(script: str) -> tuple[str, ...]:
    """In a mount namespace of its own, after this script."""
    return ("unshare", "--mount", "sh", "-ec", f'{script}\nexec "$@"', "sh")


def over(path: str, content: str, tmp_path: Path) -> tuple[str, ...]:
    """With another content of a file."""
    file = tmp_path / "content"
    file.write_text(content + "\n")
    return mounted(f"mount --bind {file} {path}")


def test_help_begins_with_an_example(dedup: Dedup) -> None:
    result = dedup("doctor", "--help", COLUMNS="60")
    assert result.status == 0
    assert result.out.startswith("Examples:\n  dedup doctor")
    assert max(map(len, result.out.splitlines())) <= 60


@pytest.mark.parametrize("args", [["--fix"], ["ksm"], ["--color", "blue"]])
def test_wrong_words(dedup: Dedup, args: list[str]) -> None:
    result = dedup("doctor", *args)
    assert result.status == 2
    assert "dedup doctor --help" in " ".join(result.err.split())


def test_text_and_json_agree(dedup: Dedup) -> None:
    text = dedup("doctor")
    assert text.status == 0
    assert text.err == ""
    assert "\x1b" not in text.out
    data = dedup("doctor", "--json").json
    assert sum(data["counts"].values()) == len(data["checks"])
    last = text.out.splitlines()[-1]
    for state, word in (("ok", "ok"), ("cannot", "can't")):
        if data["counts"][state]:
            assert f"{data['counts'][state]} {word}" in last


def test_terminals(dedup: Dedup) -> None:
    assert "\x1b[32m" in on_terminal(["doctor"]).screen
    assert "\x1b" not in on_terminal(["doctor"], NO_COLOR="1").screen
    narrow = on_terminal(["doctor"], columns=40, NO_COLOR="1").screen
    assert max(len(line.rstrip()) for line in narrow.splitlines()) <= 40
    assert dedup("doctor", "--ascii").out.isascii()


@as_root
def test_as_root_here(dedup: Dedup) -> None:
    found = checks(dedup)
    for name in ("frames", "other_processes", "user", "hash", "smaps"):
        assert found[name]["state"] == "ok", found[name]


@as_root
def test_as_nobody(dedup_nobody: Dedup) -> None:
    result = dedup_nobody("doctor", "--json", "--strict")
    assert result.status == 1
    found = {c["name"]: c for c in result.json["checks"]}
    assert found["tunables"]["state"] == "cannot"
    for name in ("frames", "page_flags", "other_processes"):
        assert found[name]["state"] == "limited"
        assert "sudo" in found[name]["way_out"]
    assert "hidden from you" in found["mergeable"]["found"]
    text = dedup_nobody("doctor", "-q")
    assert text.status == 0
    if not Ksm().running:
        assert "sudo sh -c 'echo 1 >" in " ".join(text.out.split())


@as_root
def test_strict_is_about_what_cannot_be_done(dedup: Dedup) -> None:
    if not checks(dedup).keys() & {"ksmd"}:
        pytest.skip("this kernel has no KSM")
    assert dedup("doctor", "--strict").status == 0
    prefix = mounted("mount -t tmpfs none /sys/kernel/mm")
    assert dedup("doctor", "--strict", prefix=prefix).status == 1
    assert dedup("doctor", prefix=prefix).status == 0
    data = dedup("doctor", "--json", prefix=prefix).json
    assert data["host"]["ksm"] is None
    assert data["counts"]["cannot"] == 1


@as_root
def test_in_a_container(dedup: Dedup) -> None:
    found = checks(dedup, prefix=("unshare", "-Urpfm", "--mount-proc"))
    assert "a pid namespace and a user namespace" in found["container"]["found"]
    assert found["user"]["state"] == "note"
    assert found["frames"]["state"] == "limited"
    assert "on the host" in found["frames"]["way_out"]
    found = checks(dedup, prefix=("unshare", "--pid", "--fork", "--mount-proc"))
    assert found["container"]["found"].endswith("a pid namespace of its own")
    assert found["frames"]["state"] == "ok"


@as_root
@needs_ksm
def test_a_sysfs_that_is_read_only(dedup: Dedup) -> None:
    prefix = mounted("mount --bind /sys /sys; mount -o remount,bind,ro /sys")
    finding = checks(dedup, prefix=prefix)["tunables"]
    assert finding["state"] == "cannot"
    assert "read-only" in finding["found"]


@as_root
def test_no_sysfs(dedup: Dedup) -> None:
    found = checks(dedup, prefix=mounted("mount -t tmpfs none /sys"))
    assert "not mounted" in found["ksm"]["found"]


@as_root
def test_no_procfs(dedup: Dedup) -> None:
    data = dedup("doctor", "--json", prefix=mounted("mount -t tmpfs none /proc")).json
    found = {c["name"]: c for c in data["checks"]}
    assert "not mounted" in found["proc"]["found"]
    assert "could not be looked at" in found["frames"]["found"]


@as_root
def test_root_without_capabilities(dedup: Dedup) -> None:
    found = checks(dedup, prefix=("setpriv", "--bounding-set=-all", "--inh-caps=-all"))
    assert found["frames"]["state"] == "limited"
    assert found["other_processes"]["state"] == "limited"


@as_root
def test_a_proc_that_hides(dedup_nobody: Dedup, dedup: Dedup) -> None:
    mount = "mount -t proc -o hidepid=2 proc /proc"
    assert checks(dedup, prefix=mounted(mount))["hidepid"]["state"] == "ok"
    drop = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    finding = checks(dedup, prefix=(*mounted(mount), *drop))["hidepid"]
    assert finding["state"] == "limited"
    assert "invisible" in finding["found"]


FILTER = """
import ctypes, os, struct, sys
def refuse(*rules):
    # Load the number of the call, and for prctl its option; refuse with EPERM.
    code = []
    for number, option in rules:
        if option is None:
            code += [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001)]
        else:
            code += [(0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 16),
                     (0x15, 0, 1, option), (0x06, 0, 0, 0x00050001)]
    code.append((0x06, 0, 0, 0x7FFF0000))
    data = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *c) for c in code))
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(data))
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(program)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(buffer)), 0, 0) == 0
refuse((310, None), (157, 68))
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of system calls are x86-64's")
def test_a_seccomp_filter(dedup: Dedup) -> None:
    found = checks(dedup, prefix=(sys.executable, "-c", FILTER))
    assert found["seccomp"]["state"] == "note"
    assert found["process_vm_readv"]["state"] == "limited"
    assert "Operation not permitted" in found["process_vm_readv"]["found"]
    assert found["prctl"]["state"] == "cannot"
    assert "seccomp" in found["prctl"]["way_out"]


@pytest.mark.ksm
@pytest.mark.root
def test_begun_with_mergeable_memory(dedup: Dedup) -> None:
    found = checks(dedup, prefix=(sys.executable, "-m", "dedup", "run", "--"))
    assert "is on for dedup itself" in found["prctl"]["found"]


def test_our_own_process_is_left_as_it_is() -> None:
    show = (
        "from dedup.observe.doctor import examine; from dedup.kernel.advise import merge_any\n"
        "before = merge_any(); examine(); print(before, merge_any())"
    )
    done = subprocess.run(
        [sys.executable, "-c", show], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout in {"False False\n", "None None\n"}


@as_root
@pytest.mark.parametrize(
    ("path", "content", "name", "state"),
    [
        ("/sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never", "huge_pages",
         "note"),
        ("/sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]", "huge_pages",
         "ok"),
        ("/proc/sys/kernel/randomize_va_space", "0", "randomisation", "ok"),
        ("/proc/sys/kernel/randomize_va_space", "2", "randomisation", "note"),
        ("/proc/sys/vm/max_map_count", "9000", "map_count", "note"),
        ("/proc/swaps", "Filename Type Size Used Priority\n/swap file 9 0 -2", "swap", "note"),
        ("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "3", "hugetlb", "note"),
        ("/sys/kernel/mm/transparent_hugepage/hugepages-64kB/enabled", "always [inherit] never",
         "smaller_huge_pages", "limited"),
    ],
)  # fmt: skip
def test_settings(
    dedup: Dedup, tmp_path: Path, path: str, content: str, name: str, state: str
) -> None:
    """As another host has them; the real files, so that nobody else meets them."""
    if not Path(path).exists():
        pytest.skip(f"this kernel has no {path}")
    assert checks(dedup, prefix=over(path, content, tmp_path))[name]["state"] == state


@as_root
def test_a_journal_left_over(dedup: Dedup, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    prefix = mounted(f"mkdir -p /run/dedup; mount --bind {state} /run/dedup")
    assert checks(dedup, prefix=prefix)["journal"]["state"] == "ok"
    entry = {"path": "/proc/sys/vm/nr_hugepages", "before": "0", "after": "9"}
    (state / "journal").write_text(json.dumps(entry) + "\n")
    (state / "journal").chmod(0o600)
    finding = checks(dedup, prefix=prefix)["journal"]
    assert finding["state"] == "limited"
    assert finding["found"] == "a killed run has left nr_hugepages changed"
    assert "dedup restore" in finding["way_out"]
    drop = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    os.chown(state / "journal", 1, 1)
    finding = checks(dedup, prefix=(*prefix, *drop))["journal"]
    assert finding["state"] == "limited"
    assert "root alone may read" in finding["found"]
    # What it advises helps.
    os.chown(state / "journal", 0, 0)
    assert dedup("restore", prefix=prefix).status in {0, 6}
    if Ksm().present:
        assert checks(dedup, prefix=prefix)["journal"]["state"] == "ok"


@as_root
def test_no_room_for_the_journal(dedup: Dedup) -> None:
    fill = "mkdir -p /run/dedup; mount -t tmpfs -o size=16k,mode=755 none /run/dedup"
    finding = checks(dedup, prefix=mounted(fill))["state"]
    assert finding["state"] == "cannot"
    assert "/run/dedup is full" in finding["found"]
    finding = checks(dedup, prefix=mounted(f"{fill}; mount -o remount,ro /run/dedup"))["state"]
    assert "read-only" in finding["found"]


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ("mount -t tmpfs none /run/dedup", "others may write"),  # mode 1777
        ("mount -t tmpfs none /run; echo x >/run/dedup", "is no folder"),
        ("mount -t tmpfs none /run; ln -s /run/nowhere /run/dedup", "is no folder"),
    ],
)
@as_root
def test_a_folder_for_the_journal_that_is_none(dedup: Dedup, there: str, words: str) -> None:
    found = checks(dedup, prefix=mounted(f"mkdir -p /run/dedup; {there}"))["state"]
    assert found["state"] == "cannot"
    assert words in found["found"]


@as_root
def test_no_calibration(dedup: Dedup) -> None:
    prefix = mounted("mkdir -p /var/lib/dedup; mount -t tmpfs none /var/lib/dedup")
    finding = checks(dedup, prefix=prefix)["calibration"]
    assert finding["state"] == "limited"
    assert "tune --calibrate" in finding["way_out"]


@pytest.mark.ksm
@pytest.mark.root
def test_settings_of_ksm(ksm: KsmControl, dedup: Dedup) -> None:
    ksm.set(smart_scan=1, max_page_sharing=16)
    found = checks(dedup)
    assert found["ksmd"]["state"] == "limited"
    assert found["smart_scan"]["state"] == "limited"
    assert found["max_page_sharing"]["state"] == "note"
    ksm.set(smart_scan=0, max_page_sharing=256, advisor_mode="scan-time")
    ksm.start()
    before = ksm.ksm.tunables()
    found = checks(dedup)
    assert found["ksmd"]["state"] == "ok"
    assert found["smart_scan"]["state"] == "ok"
    assert found["max_page_sharing"]["state"] == "ok"
    assert "advisor" in found["knobs"]["found"]
    assert "echo none > " in found["knobs"]["way_out"]
    after = ksm.ksm.tunables()
    ksm.set(advisor_mode="none")  # which sets pages_to_scan anew
    assert {**after, "pages_to_scan": 0} == {**before, "pages_to_scan": 0}


@pytest.mark.ksm
@pytest.mark.root
def test_users_that_do_not_trust_each_other(ksm: KsmControl, dedup: Dedup) -> None:
    with Target() as one, Target(user=65534) as other:
        ksm.alone()
        one.do("map", name="a", pages=4)
        one.do("advise", name="a", what="mergeable")
        finding = checks(dedup)["mergeable"]
        assert finding["state"] == "ok"
        assert finding["found"] == "1 process is mergeable, of root"
        other.do("map", name="a", pages=4)
        other.do("advise", name="a", what="mergeable")
        finding = checks(dedup)["mergeable"]
        assert finding["state"] == "note"
        assert finding["found"] == "2 processes are mergeable, of nobody, root"
        assert "2 users" in finding["meaning"]
