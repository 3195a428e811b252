"""/sys/kernel/mm/ksm: parsing, absence, and the kernel's refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dedup.errors import Unsupported
from dedup.kernel import ksm as interface
from dedup.kernel.ksm import Ksm
from tests.kernel_fixtures import KsmControl, Target
from tests.outsiders import VFORK_SOURCE, started
from tests.waits import build


def test_a_kernel_without_ksm(tmp_path: Path) -> None:
    ksm = Ksm(tmp_path / "ksm")
    assert not ksm.present
    for read in (ksm.counters, ksm.tunables, ksm.require):
        with pytest.raises(Unsupported, match="no KSM"):
            read()
    with pytest.raises(Unsupported, match="no tunable"):
        ksm.write("run", 1)


def test_an_old_kernel(tmp_path: Path) -> None:
    """Files that it lacks are left out, or 0."""
    for name, value in {"run": "0", "pages_to_scan": "100", "pages_shared": "5"}.items():
        (tmp_path / name).write_text(value + "\n")
    ksm = Ksm(tmp_path)
    assert ksm.tunables() == {"run": 0, "pages_to_scan": 100}
    counters = ksm.counters()
    assert (counters.pages_shared, counters.ksm_zero_pages) == (5, 0)


def test_the_advisors_word(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("0\n")
    (tmp_path / "advisor_mode").write_text("none [scan-time]\n")
    assert Ksm(tmp_path).tunables()["advisor_mode"] == "scan-time"


def test_files(tmp_path: Path) -> None:
    assert Ksm(tmp_path / "ksm").files() == frozenset()
    (tmp_path / "run").touch()
    assert Ksm(tmp_path).files() == {"run"}


@pytest.mark.ksm
@pytest.mark.root
def test_the_kernels_defaults(ksm: KsmControl) -> None:
    """What the machine had at its boot, of which nothing here is changed."""
    found = ksm.before
    assert {name: value for name, value in interface.DEFAULTS.items() if name in found} == {
        name: value for name, value in found.items() if name != "run"
    }


@pytest.mark.ksm
@pytest.mark.root
def test_uses(target: Target) -> None:
    """Who is mergeable, once for an address space; and how many are hidden."""
    assert target.pid not in [use.info.id.pid for use in interface.uses().found]
    target.do("map", name="a", pages=4)
    target.do("advise", name="a", what="mergeable")
    whole = interface.uses()
    assert whole.told
    assert whole.hidden == 0
    (mine,) = [use for use in whole.found if use.info.id.pid == target.pid]
    assert mine.counters.ksm_mergeable
    assert not mine.counters.ksm_merge_any
    assert mine.info.uid == 0
    show = (
        "import os\n"
        "from dedup.kernel.ksm import uses\nuses()\n"
        "os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
        "print(uses().hidden, len(uses().found))"
    )
    other = subprocess.run(
        [sys.executable, "-c", show],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    hidden, found = map(int, other.stdout.split())
    assert hidden > 0
    assert found == 0


@pytest.mark.ksm
@pytest.mark.root
def test_one_address_space_counts_once() -> None:
    """A parent of vfork and its child, before the child's exec."""
    run = [sys.executable, "-m", "dedup", "run", "--", str(build(VFORK_SOURCE))]
    with started(run) as process:
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (child, str(process.pid)):
            assert "ksm_merge_any: yes" in Path(f"/proc/{pid}/ksm_stat").read_text()
        found = [use.info.id.pid for use in interface.uses().found]
        assert found.count(process.pid) + found.count(int(child)) == 1


@pytest.mark.ksm
@pytest.mark.root
def test_what_the_kernel_refuses(ksm: KsmControl, target: Target) -> None:
    with pytest.raises(Unsupported, match="refuses run=3"):
        ksm.ksm.write("run", 3)
    with pytest.raises(Unsupported, match="refuses max_page_sharing=1"):
        ksm.ksm.write("max_page_sharing", 1)
    target.do("map", name="a", pages=4)
    target.do("fill", name="a", at=0, count=4, what="x")
    target.do("advise", name="a", what="mergeable")
    ksm.converge()
    with pytest.raises(Unsupported, match="while pages are merged"):
        ksm.ksm.write("max_page_sharing", 100)
    assert interface.users()[target.pid]
