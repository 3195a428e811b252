"""What this process may do: capabilities, seccomp, Yama, lockdown, hidepid.

Sources: proc_pid_status(5), capabilities(7), user_namespaces(7),
Documentation/admin-guide/LSM/Yama.rst, kernel_lockdown(7),
Documentation/filesystems/proc.rst (hidepid).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
SECURITY: Final = Path("/sys/kernel/security")

CAPABILITIES: Final = {"CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_CHECKPOINT_RESTORE": 40}
"""Those that matter here (include/uapi/linux/capability.h)."""

WHOLE: Final = 4294967295
"""Ids in the map of the initial user namespace."""

HIDEPID: Final = {
    "1": "noaccess",
    "2": "invisible",
    "4": "ptraceable",
}


@dataclass(frozen=True, slots=True)
class Privileges:
    """Of this process."""

    uid: int
    """Effective."""
    capabilities: frozenset[str]
    """Those of `CAPABILITIES` that it has, in its user namespace."""
    initial: bool
    """Whether that is the host's own namespace: only there do capabilities reach the host."""
    seccomp: int
    """0 none, 1 strict, 2 filter."""
    yama: int | None
    """kernel.yama.ptrace_scope; None without Yama."""
    lockdown: str
    """`none`, `integrity`, `confidentiality`; empty where it can't be seen."""
    hidepid: str
    """`noaccess`, `invisible`, `ptraceable`; empty where all see all."""

    def has(self, capability: str) -> bool:
        """Whether it has a capability that reaches the host."""
        return self.initial and capability in self.capabilities


def read(proc: Path = PROC, security: Path = SECURITY) -> Privileges:
    """Read them; what can't be read counts as absent."""
    status = _text(proc / "self/status")
    effective = int(_field("CapEff", status) or "0", 16)
    uids = _field("Uid", status).split()
    users = _text(proc / "self/uid_map").split()
    yama = _text(proc / "sys/kernel/yama/ptrace_scope").strip()
    lockdown = re.search(r"\[(\w+)]", _text(security / "lockdown"))
    return Privileges(
        uid=int(uids[1]) if uids else os.geteuid(),
        capabilities=frozenset(n for n, bit in CAPABILITIES.items() if effective >> bit & 1),
        initial=not users or [int(n) for n in users] == [0, 0, WHOLE],
        seccomp=int(_field("Seccomp", status) or 0),
        yama=int(yama) if yama.isdigit() else None,
        lockdown=lockdown[1] if lockdown else "",
        hidepid=_hidepid(_text(proc / "self/mountinfo"), proc),
    )


def _hidepid(mounts: str, proc: Path) -> str:
    """The option of the last mount on /proc, which is the one in sight."""
    found = ""
    for line in mounts.splitlines():
        head, _, tail = line.partition(" - ")
        fields, options = head.split(), tail.split()
        if len(fields) < 5 or len(options) < 3 or fields[4] != str(proc) or options[0] != "proc":
            continue
        m = re.search(r"(?:^|,)hidepid=(\w+)", options[2])
        found = HIDEPID.get(m[1], m[1]) if m else ""
    return "" if found in {"0", "off"} else found


def _field(name: str, status: str) -> str:
    m = re.search(rf"^{name}:\s*(.+)$", status, re.MULTILINE)
    return m[1] if m else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
