from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from dedup.kernel.ksm import Ksm
from tests.kernel_fixtures import PAGE, KsmControl, Target

from .conftest import Dedup, on_terminal

needs_ksm = pytest.mark.skipif(not Ksm().present, reason="this kernel has no KSM")


def test_help_begins_with_an_example(dedup: Dedup) -> None:
    result = dedup("status", "--help", COLUMNS="60")
    assert result.status == 0
    assert result.out.startswith("Examples:\n  dedup status")
    assert max(map(len, result.out.splitlines())) <= 60


@pytest.mark.parametrize(
    "args",
    [
        ["--interval", "-1"],
        ["--interval", "nan"],
        ["--interval", "inf"],
        ["--interval", "soon"],
        ["--by", "service"],
        ["--top", "-1"],
        ["--sample"],
        ["more"],
    ],
)
def test_wrong_words(dedup: Dedup, args: list[str]) -> None:
    result = dedup("status", *args)
    assert result.status == 2
    assert "dedup status --help" in " ".join(result.err.split())
    assert result.out == ""
    assert dedup("status", *args, "--json").json["error"]["code"] == "usage"


@needs_ksm
def test_at_once(dedup: Dedup) -> None:
    for args in (["--no-sample"], ["--interval", "0"]):
        result = dedup("status", *args, "--json")
        assert result.status == 0
        assert result.err == ""
        assert result.json["sample"] is None
    data = dedup("status", "--interval", "0.2", "--json").json
    assert 0.2 <= data["sample"]["seconds"] < 5


@needs_ksm
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_without_root(dedup_nobody: Dedup) -> None:
    result = dedup_nobody("status", "--no-sample")
    assert result.status == 0
    said = " ".join(result.out.split())
    assert "hidden from you" in said
    assert "dedup status" in said
    data = dedup_nobody("status", "--no-sample", "--json").json
    assert data["processes"]["hidden"] > 0
    assert data["ksmd"]["cpu_seconds"] is not None


def test_a_kernel_without_ksm(dedup: Dedup) -> None:
    """An empty folder is mounted over it."""
    if os.geteuid() != 0 or not Path("/sys/kernel/mm").exists():
        pytest.skip("needs root")
    script = 'mount -t tmpfs none /sys/kernel/mm && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", script, "sh")
    result = dedup("status", prefix=prefix)
    assert result.status == 6
    assert "no KSM" in result.err
    assert dedup("status", "--json", prefix=prefix).json["error"]["code"] == "unsupported"


@needs_ksm
@pytest.mark.root
@pytest.mark.parametrize(
    "prefix", [("unshare", "-Urpfm", "--mount-proc"), ("setpriv", "--bounding-set=-all")]
)
def test_in_namespaces_and_without_capabilities(dedup: Dedup, prefix: tuple[str, ...]) -> None:
    data = dedup("status", "--no-sample", "--json", prefix=prefix).json
    assert (data["ksmd"]["cpu_seconds"] is None) is (prefix[0] == "unshare")
    assert dedup("status", "--no-sample", prefix=prefix).status == 0


@needs_ksm
@pytest.mark.root
def test_settings_changed_for_now(dedup: Dedup, tmp_path: Path) -> None:
    entry = {"path": "/sys/kernel/mm/ksm/pages_to_scan", "before": "7", "after": "8"}
    (tmp_path / "journal").write_text(json.dumps(entry) + "\n")
    script = f'mkdir -p /run/dedup; mount --bind {tmp_path} /run/dedup; exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-ec", script, "sh")
    (words,) = dedup("status", "--no-sample", "--json", prefix=prefix).json["changed_for_now"]
    assert "has changed pages_to_scan for the moment" in words
    assert "changed pages_to_scan" in " ".join(
        dedup("status", "--no-sample", prefix=prefix).out.split()
    )


@needs_ksm
def test_colours_and_a_pipe(dedup: Dedup) -> None:
    assert "\x1b" not in dedup("status", "--no-sample").out
    assert "\x1b" in dedup("status", "--no-sample", "--color", "always").out
    assert "\x1b[1" in on_terminal(["status", "--no-sample"]).screen
    assert "\x1b" not in on_terminal(["status", "--no-sample"], NO_COLOR="1").screen
    narrow = on_terminal(["status", "--no-sample"], columns=40, NO_COLOR="1").screen
    assert max(len(line.rstrip()) for line in narrow.splitlines()) <= 40


@pytest.mark.ksm
@pytest.mark.root
def test_against_the_counters(ksm: KsmControl, dedup: Dedup) -> None:
    with Target() as target:
        target.do("map", name="a", pages=700)
        target.do("put", name="a", at=0, what=["zero"] * 300 + ["x"] * 200 + ["unique"] * 200)
        target.do("advise", name="a", what="mergeable")
        ksm.set(use_zero_pages=1)
        counters = ksm.converge()
        before = ksm.ksm.tunables()
        data = dedup("status", "--no-sample", "--json").json
        assert data["counters"]["ksm_zero_pages"] == 300
        assert data["counters"]["pages_sharing"] == 199
        assert data["saved"]["freed_bytes"] == 499 * PAGE
        assert data["saved"]["saved_bytes"] == counters.general_profit - 64
        assert data["saved"]["stale"] is True
        assert {"name": "use_zero_pages", "value": 1, "default": 0} in data["changed_tunables"]
        (mine,) = [g for g in data["groups"] if g["pid"] == target.pid]
        assert (mine["ksm_zero_pages"], mine["ksm_merging_pages"]) == (300, 200)
        assert mine["ksm_mergeable"] is True
        assert mine["ksm_merge_any"] is False
        (group,) = dedup("status", "--no-sample", "--json", "--by", "name", "--top", "1").json[
            "groups"
        ]
        assert group["ksm_merging_pages"] == 200
        assert "KSM saves 1.9 MiB at most" in dedup("status", "--no-sample").out
        assert ksm.ksm.tunables() == before
        target.do("put", name="a", at=300, what=["unique"] * 200)
        # ksmd rests, so nothing tells it.
        assert dedup("status", "--no-sample", "--json").json["counters"]["pages_sharing"] == 199


@pytest.mark.ksm
@pytest.mark.root
def test_somebody_else_at_the_knobs(ksm: KsmControl, dedup: Dedup) -> None:
    ksm.set(advisor_mode="scan-time")
    with subprocess.Popen(
        ["sh", "-c", "printf ksmtuned > /proc/self/comm; read line"], stdin=subprocess.PIPE
    ) as other:
        try:
            # dash's own printf writes it before it waits.
            comm = Path(f"/proc/{other.pid}/comm")
            while comm.read_text() != "ksmtuned\n":
                assert other.poll() is None
            data = dedup("status", "--no-sample", "--json").json
        finally:
            other.communicate(b"\n")
            ksm.set(advisor_mode="none")  # which sets pages_to_scan anew
    assert len(data["others"]) == 2
    assert f"ksmtuned (pid {other.pid})" in data["others"][0]
    assert "advisor" in data["others"][1]


@pytest.mark.ksm
@pytest.mark.root
def test_ones_own_processes_without_root(ksm: KsmControl, dedup_nobody: Dedup) -> None:
    with Target(user=65534) as mine, Target() as others:
        for process in (mine, others):
            process.do("map", name="a", pages=20)
            process.do("fill", name="a", at=0, count=20, what="x")
            process.do("advise", name="a", what="mergeable")
        counters = ksm.converge()
        data = dedup_nobody("status", "--no-sample", "--json").json
        assert [g["pid"] for g in data["groups"]] == [mine.pid]
        assert data["groups"][0]["ksm_merging_pages"] == 20
        assert data["processes"]["hidden"] > 0
        # The host's own counters are whole.
        assert data["counters"]["pages_sharing"] == counters.pages_sharing >= 39
