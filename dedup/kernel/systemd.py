"""systemd here: whether it runs, which settings it knows, and a unit's files.

Sources: sd_booted(3), systemd.unit(5), systemd-analyze(1); systemd's pull requests 26621
(MemoryKSM=) and 31683 (before it, each service with MemoryKSM=yes fails to start).
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TIMEOUT_SECONDS: Final = 20
RUNNING: Final = Path("/run/systemd/system")
ROOT: Final = Path("/")
SYSTEM_FOLDERS: Final = (
    "etc/systemd/system",
    "run/systemd/system",
    "run/systemd/generator",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
)
"""Where units of the system are, those that win first."""
PROBE: Final = "[Service]\nExecStart=/bin/true\nMemoryKSM=yes\n"


@dataclass(frozen=True, slots=True)
class Systemd:
    """What this systemd can."""

    version: str
    """Empty where there is none."""
    running: bool
    """It is the init of this machine or container."""
    knows_memory_ksm: bool | None
    """Whether it knows the setting; None where that can't be found out."""


def probe() -> Systemd:
    """Ask the installed systemd; nothing is started and nothing changed."""
    version = _output("systemctl", "--version")
    return Systemd(
        version=m[1] if (m := re.match(r"systemd (\S+)", version or "")) else "",
        running=RUNNING.exists(),
        knows_memory_ksm=_knows(),
    )


def _knows() -> bool | None:
    """systemd-analyze reads a unit as systemd would, and tells of settings unknown to it."""
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder, "dedup-probe.service")
        unit.write_text(PROBE)
        said = _output("systemd-analyze", "verify", "--man=no", str(unit))
    if said is None:
        return None
    return "MemoryKSM" not in said


def starts_with_memory_ksm() -> bool | None:
    """Start `true` as a transient service with MemoryKSM=yes; None where that can't be done.

    systemd 254 and some builds of 255 know the setting, and then no service with it starts.
    """
    if not RUNNING.exists() or os.geteuid() != 0:
        return None
    try:
        done = subprocess.run(
            ["systemd-run", "--quiet", "--wait", "--collect", "-p", "MemoryKSM=yes", "true"],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.returncode == 0


def _output(*words: str) -> str | None:
    """What a command says, on both streams; None where it can't be run."""
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=TIMEOUT_SECONDS, check=False, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace")


def unit_text(unit: str, without: str, root: Path = ROOT) -> str | None:
    """The text of a unit of the system, its drop-ins after it; None where it has no file.

    Parameters
    ----------
    unit : str
        ``redis-server.service``; an instance is looked for by its template too.
    without : str
        Name of a drop-in that is left out.
    root : Path, optional
    """
    names = [unit]
    if m := re.fullmatch(r"(.+?)@.+(\.\w+)", unit):
        names.append(f"{m[1]}@{m[2]}")
    files = [root / f / n for n in names for f in SYSTEM_FOLDERS]
    text = next((t for f in files if (t := _text(f)) is not None), None)
    if text is None:
        return None
    drop_ins: dict[str, Path] = {}
    for folder in SYSTEM_FOLDERS:
        for name in names:
            try:
                found = sorted((root / folder / f"{name}.d").glob("*.conf"))
            except OSError:
                continue
            for file in found:
                if file.name != without:
                    drop_ins.setdefault(file.name, file)
    parts = [text, *(_text(drop_ins[n]) or "" for n in sorted(drop_ins))]
    return "\n".join(parts)


def _text(file: Path) -> str | None:
    try:
        return file.read_text(errors="surrogateescape")
    except OSError:
        return None
