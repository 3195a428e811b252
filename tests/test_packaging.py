"""What is packed: it builds, it installs, it works from anywhere, and nothing is left out."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Everything that a wheel may hold besides Python modules and its own dist-info folder.
WHEEL_SUFFIXES = {".py", ".pyi", ".so", ".typed", ".json"}


def run(*command: str | Path, cwd: Path, check: bool = True) -> str:
    """Run a command as a user's shell would, without what this test run has in its environment."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "DEDUP_DEBUG"}
    }
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    if check and done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def copy_sources(target: Path) -> None:
    """Copy what a fresh checkout of this state would hold."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = [name for name in listed.stdout.split("\0") if name]
    if listed.returncode != 0 or not names:  # no checkout but an unpacked sdist
        ignored = shutil.ignore_patterns(
            ".*", "build", "dist", "*.so", "*.egg-info", "_core.c", "__pycache__"
        )
        shutil.copytree(ROOT, target, ignore=ignored)
        return
    for name in names:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@dataclass(frozen=True)
class Built:
    """The two files that a release would consist of."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build the sdist from the sources, and the wheel from the sdist."""
    source = tmp_path_factory.mktemp("packaging") / "source"
    out = source.parent / "dist"
    copy_sources(source)
    run(sys.executable, "-m", "build", "--outdir", out, source, cwd=source.parent)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return Built(sdist, wheel)


def wheel_members(built: Built) -> set[str]:
    with zipfile.ZipFile(built.wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def sdist_members(built: Built) -> set[str]:
    with tarfile.open(built.sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def test_the_wheel_holds_all_that_the_package_needs(built: Built) -> None:
    members = wheel_members(built)
    assert {"dedup/py.typed", "dedup/_core.pyi", "dedup/__main__.py"} <= members
    schemas = {f"dedup/schema/{path.name}" for path in (ROOT / "dedup/schema").glob("*.json")}
    assert schemas
    assert schemas <= members
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dedup").rglob("*.py")}
    assert modules <= members
    assert [name for name in members if name.endswith(".dist-info/licenses/LICENSE")]
    assert [name for name in members if name.startswith("dedup/_core.") and name.endswith(".so")]


def test_the_wheel_holds_nothing_else(built: Built) -> None:
    """Neither the generated C nor the Cython source: an installed package can use neither."""
    unwanted = {
        name
        for name in wheel_members(built)
        if ".dist-info/" not in name
        and (not name.startswith("dedup/") or PurePosixPath(name).suffix not in WHEEL_SUFFIXES)
    }
    assert not unwanted


def test_the_sdist_holds_what_a_build_and_its_tests_need(built: Built) -> None:
    members = sdist_members(built)
    wanted = {"LICENSE", "README.md", "pyproject.toml", "setup.py", "dedup/_core.pyx"}
    for folder in ("tests", "examples", "scripts"):
        wanted |= {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
    assert wanted <= members
    generated = {name for name in members if name.endswith((".so", ".pyc"))}
    generated |= {name for name in members if name.startswith("dedup/") and name.endswith(".c")}
    assert not generated


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_it_installs_and_runs(built: Built, tmp_path: Path, kind: str) -> None:
    venv = tmp_path / "an environment"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin/python"
    package: Path = getattr(built, kind)
    run(sys.executable, "-m", "pip", "--python", python, "install", package, cwd=elsewhere)

    assert PROJECT["version"] in run(venv / "bin/dedup", "--version", cwd=elsewhere)
    assert PROJECT["version"] in run(python, "-m", "dedup", "--version", cwd=elsewhere)
    where = run(
        python,
        "-c",
        "import dedup, dedup._core; print(dedup.__file__); print(dedup._core.__file__)",
        cwd=elsewhere,
    )
    for line in where.splitlines():
        assert Path(line).is_relative_to(venv.resolve())
