"""Each check, on files made for it; tests/cli/test_doctor.py provokes them for real."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from dedup.kernel import inject
from dedup.kernel.lock import HostLock
from dedup.kernel.processes import Handle
from dedup.observe import doctor
from dedup.observe.doctor import STATES, TOPICS, Finding, Host, examine

KSM_FILES = {
    "run": 1, "pages_to_scan": 100, "sleep_millisecs": 20, "smart_scan": 0, "use_zero_pages": 0,
    "max_page_sharing": 256, "merge_across_nodes": 1, "ksm_zero_pages": 0, "general_profit": 0,
    "pages_scanned": 0, "stable_node_chains": 0, "advisor_mode": "[none] scan-time",
}  # fmt: skip


class Made:
    """A root with files of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.systemctl = "/nonexistent/systemctl"
        self.put("proc/self/ksm_stat", "".join(f"{n} 0\n" for n in doctor.PROCESS_COUNTERS))
        for name, value in KSM_FILES.items():
            self.put(f"sys/kernel/mm/ksm/{name}", value)

    def put(self, path: str, content: object) -> None:
        """Write a file, and the folders that it needs."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")

    def remove(self, path: str) -> None:
        (self.root / path).unlink()

    def status(self, **fields: object) -> None:
        """Of this process."""
        self.put("proc/self/status", "\n".join(f"{n}:\t{v}" for n, v in fields.items()))

    def script(self, text: str) -> None:
        """The systemctl."""
        path = self.root / "systemctl"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        self.systemctl = str(path)

    def check(self, name: str) -> Finding:
        """What one check finds."""
        found = {c.name: c.finding for c in examine(Host(self.root, self.systemctl))}
        return found[name]

    def absent(self, name: str) -> bool:
        """Whether a check has no meaning here."""
        return name not in {c.name for c in examine(Host(self.root, self.systemctl))}


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_an_empty_root_is_no_reason_to_fail(tmp_path: Path) -> None:
    found = {c.name: c.finding for c in examine(Host(tmp_path, "/nonexistent"))}
    for name in ("proc", "ksm"):
        assert found[name].state == "cannot"
        assert "not mounted" in found[name].found
    assert "smart_scan" not in found
    assert "tunables" not in found
    # Those that need a file which is not there say so.
    assert found["smaps"].state == "limited"
    assert "could not be looked at: No such file" in found["smaps"].found


def test_names_and_words() -> None:
    checks = examine()
    names = [c.name for c in checks]
    assert len(names) == len(set(names))
    assert set(names) <= {f.__name__[1:] for functions in TOPICS.values() for f in functions}
    for c in checks:
        assert re.fullmatch("[a-z0-9_]+", c.name)
        assert c.finding.state in STATES
        assert c.finding.found
        assert "could not be looked at" not in c.finding.found, c
        assert (c.finding.state == "ok") == (not c.finding.meaning), c


def test_no_ksm(made: Made) -> None:
    for name in KSM_FILES:
        made.remove(f"sys/kernel/mm/ksm/{name}")
    finding = made.check("ksm")
    assert finding.state == "cannot"
    assert "CONFIG_KSM" in finding.way_out


@pytest.mark.parametrize(
    ("run", "state", "words"), [(0, "limited", "stopped"), (2, "limited", "unmerged everything")]
)
def test_ksmd_at_rest(made: Made, run: int, state: str, words: str) -> None:
    made.put("sys/kernel/mm/ksm/run", run)
    finding = made.check("ksmd")
    assert finding.state == state
    assert words in finding.found
    assert "echo 1 > /sys/kernel/mm/ksm/run" in finding.way_out


def test_ksmd_out_of_sight(made: Made) -> None:
    finding = made.check("ksmd")
    assert finding.state == "limited"
    assert finding.found == "runs: 100 pages every 20 ms; out of sight"


def test_an_older_kernel(made: Made) -> None:
    assert made.check("counters").state == "ok"
    assert made.check("ksm_stat").state == "ok"
    made.remove("sys/kernel/mm/ksm/smart_scan")
    made.remove("sys/kernel/mm/ksm/general_profit")
    finding = made.check("counters")
    assert finding.state == "limited"
    assert finding.found.startswith("2 are missing")
    assert "no smart_scan: " in finding.meaning
    made.put("proc/self/ksm_stat", "ksm_rmap_items 0\nksm_merging_pages 0\nksm_process_profit 0")
    assert "ksm_merge_any" in made.check("ksm_stat").found
    made.remove("proc/self/ksm_stat")
    assert "no /proc/PID/ksm_stat" in made.check("ksm_stat").found
    assert made.check("mergeable").state == "note"
    made.put("proc/vmstat", "nr_free_pages 3")
    assert made.check("vmstat").state == "limited"
    made.put("proc/vmstat", "cow_ksm 3")
    assert made.check("vmstat").state == "ok"


SMAPS = "00400000-00401000 r--p 00000000 00:00 0 x\nRss: 4 kB\n{}VmFlags: rd mr\n"


def test_smaps(made: Made) -> None:
    made.put("proc/self/smaps", SMAPS.format("KSM:  0 kB\n").rstrip())
    assert made.check("smaps").state == "ok"
    made.put("proc/self/smaps", SMAPS.format("").rstrip())
    assert "no KSM line" in made.check("smaps").found
    made.put("proc/self/smaps", "00400000-00401000 r--p 00000000 00:00 0 x\nRss: 4 kB")
    assert "no VmFlags" in made.check("smaps").found


ALL = "000001ffffffffff"
NONE = "0000000000000000"


@pytest.mark.parametrize(
    ("scope", "capabilities", "state"),
    [
        ("0", NONE, "ok"),
        ("1", NONE, "limited"),
        ("1", ALL, "ok"),
        ("2", NONE, "cannot"),
        ("2", ALL, "ok"),
        ("3", ALL, "cannot"),
        ("3", NONE, "cannot"),
    ],
)
def test_yama(made: Made, scope: str, capabilities: str, state: str) -> None:
    made.status(Uid="1000\t1000\t1000\t1000", CapEff=capabilities)
    assert made.check("yama").found == "no Yama in this kernel"
    made.put("proc/sys/kernel/yama/ptrace_scope", scope)
    finding = made.check("yama")
    assert finding.state == state
    assert bool(finding.way_out) is (state != "ok")


def test_rights(made: Made) -> None:
    made.status(Uid="1000\t1000\t1000\t1000", CapEff=NONE, Seccomp=2)
    assert made.check("user").found == "uid 1000; capabilities: none that matters here"
    assert made.check("other_processes").state == "limited"
    assert made.check("other_processes").way_out == "`sudo dedup ...`"
    assert made.check("seccomp").state == "note"
    made.status(Uid="0\t0\t0\t0", CapEff=ALL, Seccomp=0)
    made.put("proc/self/uid_map", "0 0 4294967295")
    assert made.check("other_processes").state == "ok"
    assert made.check("seccomp").state == "ok"
    # Root of a user namespace.
    made.put("proc/self/uid_map", "0 1000 1")
    assert made.check("user").state == "note"
    finding = made.check("other_processes")
    assert finding.state == "limited"
    assert "on the host" in finding.way_out


def test_lockdown(made: Made) -> None:
    assert made.check("lockdown").state == "ok"
    made.put("sys/kernel/security/lockdown", "none integrity [confidentiality]")
    assert made.check("lockdown").state == "note"
    made.put("sys/kernel/security/lockdown", "[none] integrity confidentiality")
    assert made.check("lockdown").found == "the kernel is not locked down"


def test_hidepid(made: Made) -> None:
    mount = f"1 2 0:3 / {made.root}/proc rw - proc proc rw,hidepid=2"
    made.put("proc/self/mountinfo", mount)
    assert made.check("hidepid").state == "limited"
    made.status(Uid="0\t0\t0\t0", CapEff=ALL)
    assert made.check("hidepid").state == "ok"


@pytest.mark.parametrize(
    ("script", "state", "words"),
    [
        ("test $1 = --version && echo systemd 256 || echo MemoryKSM=no", "ok", "systemd 256 has"),
        ("test $1 = --version && echo systemd 250 || echo MemoryKSM=no", "ok", "has MemoryKSM="),
        ("test $1 != --version || echo systemd 255", "limited", "systemd 255 has no MemoryKSM="),
        ("test $1 = --version && echo systemd 254", "ok", "by its version"),
        ("test $1 = --version && echo systemd 252", "limited", "by its version"),
        ("exit 1", "note", "no systemd"),
    ],
)
def test_systemd(made: Made, script: str, state: str, words: str) -> None:
    made.script(script)
    finding = made.check("systemd")
    assert finding.state == state
    assert words in finding.found


def test_no_systemd(made: Made) -> None:
    assert made.check("systemd").found == "no systemd"


def test_a_systemctl_that_hangs(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SYSTEMCTL_SECONDS", 0.1)
    made.script("exec sleep 30")
    assert made.check("systemd").found == "no systemd"


def test_injection(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    if inject.supported():
        assert made.check("injection").state == "note"
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    finding = made.check("injection")
    assert finding.state == "cannot"
    assert "dedup run" in finding.way_out


def test_what_merges(made: Made) -> None:
    assert made.check("smart_scan").state == "ok"
    made.put("sys/kernel/mm/ksm/smart_scan", 1)
    finding = made.check("smart_scan")
    assert finding.state == "limited"
    assert "never merge" in finding.meaning
    assert "echo 0 > /sys/kernel/mm/ksm/smart_scan" in finding.way_out
    assert made.check("max_page_sharing").state == "ok"
    made.put("sys/kernel/mm/ksm/max_page_sharing", 16)
    assert "one in 16" in made.check("max_page_sharing").meaning


@pytest.mark.parametrize(("across", "words"), [(0, "do not merge"), (1, "another node")])
def test_nodes(made: Made, across: int, words: str) -> None:
    assert made.check("numa").found == "one NUMA node"
    for n in (0, 1):
        made.put(f"sys/devices/system/node/node{n}/memory{n}/state", "online")
    made.put("sys/devices/system/memory/block_size_bytes", "8000000")
    made.put("sys/kernel/mm/ksm/merge_across_nodes", across)
    finding = made.check("numa")
    assert finding.state == "note"
    assert words in finding.meaning


def test_huge_pages(made: Made) -> None:
    thp = "sys/kernel/mm/transparent_hugepage"
    assert made.check("huge_pages").found == "no transparent huge pages"
    made.put(f"{thp}/hpage_pmd_size", 2 << 20)
    made.put(f"{thp}/enabled", "always [madvise] never")
    made.put("proc/meminfo", "AnonHugePages:     4096 kB")
    assert made.check("huge_pages").found.endswith("; 4 MiB in use")
    assert made.check("huge_pages").state == "ok"
    made.put(f"{thp}/enabled", "[always] madvise never")
    assert "khugepaged" in made.check("huge_pages").meaning
    made.put(f"{thp}/hugepages-64kB/enabled", "always inherit madvise [never]")
    assert made.check("smaller_huge_pages").state == "ok"
    made.put(f"{thp}/hugepages-64kB/enabled", "always [inherit] madvise never")
    finding = made.check("smaller_huge_pages")
    assert finding.state == "limited"
    assert "64kB" in finding.found
    assert made.check("hugetlb").state == "ok"
    made.put("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", 10)
    assert made.check("hugetlb").found.startswith("20 MiB")


def test_settings(made: Made) -> None:
    made.put("proc/sys/kernel/randomize_va_space", 0)
    assert made.check("randomisation").state == "ok"
    made.put("proc/sys/kernel/randomize_va_space", 2)
    assert "--no-randomize" in made.check("randomisation").way_out
    made.put("proc/sys/vm/max_map_count", 1000)
    assert made.check("map_count").state == "note"
    made.put("proc/sys/vm/max_map_count", 1048576)
    assert made.check("map_count").state == "ok"
    assert made.check("swap").state == "ok"
    made.put("proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 9 0 1")
    assert made.check("swap").found == "swap is on: /dev/zram0 (compressed memory)"


def test_knobs(made: Made) -> None:
    assert made.check("knobs").state == "ok"
    made.put("proc/77/comm", "ksmtuned")
    made.put("sys/kernel/mm/ksm/advisor_mode", "none [scan-time]")
    finding = made.check("knobs")
    assert finding.state == "limited"
    assert "ksmtuned (pid 77)" in finding.found
    assert "`systemctl stop ksmtuned` and `echo none > " in finding.way_out


def test_container(made: Made) -> None:
    assert made.check("container").state == "ok"
    (made.root / "proc/self/ns").mkdir(parents=True)
    (made.root / "proc/self/ns/pid").symlink_to("pid:[4026532181]")
    made.put("proc/self/cgroup", f"0::/machine.slice/libpod-{'ab' * 32}.scope")
    made.put("run/.containerenv", "")
    finding = made.check("container")
    assert finding.state == "limited"
    assert finding.found == "in a container (podman abababababab): a pid namespace of its own"
    assert f"--container {'ab' * 32}" in finding.way_out


def test_calibration(made: Made) -> None:
    finding = made.check("calibration")
    assert (finding.state, finding.found) == ("limited", "ksmd's costs were never measured here")
    assert finding.way_out.startswith("`dedup tune --calibrate`")
    made.put("var/lib/dedup/calibration.json", "{}")
    assert "is no calibration" in made.check("calibration").found


ENTRY: dict[str, Any] = {"before": "0", "after": "1"}


def line(**fields: Any) -> str:
    return json.dumps({"application": "a", **fields}) + "\n"


BEGIN = line(event="begin", began_ticks=1, mergeable_before=[])
MARK = line(
    event="mark", pid=1, start_time=1, name="x", program=[], way="whole", ranges=[], own=[]
)  # fmt: skip


def test_processes_made_mergeable(made: Made) -> None:
    assert made.absent("applied")
    made.put("run/dedup/applied", BEGIN + MARK)
    finding = made.check("applied")
    assert (finding.state, finding.way_out) == ("limited", "`dedup restore`")
    assert finding.found == "an interrupted `dedup apply` has left 1 process mergeable"
    with HostLock(made.root / "run/dedup"):
        (made.root / "proc/locks").write_text(Path("/proc/locks").read_text())
        finding = made.check("applied")
        assert (finding.state, finding.way_out) == ("note", "")
    made.put("proc/locks", "")
    made.put("run/dedup/applied", BEGIN + MARK + line(event="finish"))
    finding = made.check("applied")
    assert (finding.state, finding.way_out) == ("note", "`dedup apply --undo`")
    undone = line(event="undone", pid=1, start_time=1)
    made.put("run/dedup/applied", BEGIN + MARK + line(event="finish") + undone)
    assert made.absent("applied")
    made.put("run/dedup/applied", "nonsense\nand more\n")
    finding = made.check("applied")
    assert (finding.state, "line 1" in finding.found) == ("limited", True)


def test_tunables_that_stay(made: Made) -> None:
    assert made.absent("tuned")
    path = str(made.root / "sys/kernel/mm/ksm/pages_to_scan")
    made.put("run/dedup/tuned", json.dumps({"path": path, **ENTRY}) + "\n")
    finding = made.check("tuned")
    assert finding.found == "`dedup tune --apply` has set pages_to_scan"
    assert (finding.state, finding.way_out) == ("note", "`dedup tune --undo`")


def test_ksmd_held(made: Made) -> None:
    assert made.absent("held")
    made.put("sys/kernel/mm/ksm/run", "1")
    with Handle(os.getpid()) as handle:
        me = handle.id
    made.put("run/dedup/ksmd", json.dumps({"before": 0, "holders": [[me.pid, me.start_time]]}))
    finding = made.check("held")
    assert finding.state == "note"
    assert f"(pid {me.pid})" in finding.found
    made.put("run/dedup/ksmd", json.dumps({"before": 0, "holders": [[me.pid, 1]]}))
    finding = made.check("held")
    assert (finding.state, finding.way_out) == ("limited", "`dedup restore`")
    # ksmd ran before it, or somebody else has stopped it.
    made.put("run/dedup/ksmd", json.dumps({"before": 1, "holders": [[me.pid, 1]]}))
    finding = made.check("held")
    assert (finding.state, finding.way_out) == ("note", "`dedup restore`")


def test_the_journal(made: Made) -> None:
    assert made.check("journal").state == "ok"
    assert made.check("state").state == "ok"
    path = str(made.root / "sys/kernel/mm/ksm/run")
    made.put("run/dedup/journal", json.dumps({"path": path, **ENTRY}))
    finding = made.check("journal")
    assert finding.found == "a killed run has left run changed"
    assert finding.way_out == "`dedup restore`"
    # One that is at it now.
    with HostLock(made.root / "run/dedup"):
        (made.root / "proc/locks").write_text(Path("/proc/locks").read_text())
        finding = made.check("journal")
        assert finding.state == "note"
        assert finding.found == f"dedup (pid {os.getpid()}) has run changed"
    made.put("proc/locks", "")
    made.put("run/dedup/journal", "no json\nnor this")
    finding = made.check("journal")
    assert finding.state == "limited"
    assert "line 1 of the journal" in finding.found
