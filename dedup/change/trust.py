"""Who may share memory with whom, and who with nobody.

A merged page is copied at its first write, which takes measurably longer: whoever has a page merged
with another's can find out whether that one holds a content. KSM knows no domains; what is
mergeable on the host merges.

Sources: Documentation/admin-guide/mm/ksm.rst; Suzaki and others, "Memory Deduplication as a Threat
to the Guest OS" (EuroSec 2011); Bosman and others, "Dedup Est Machina" (IEEE S&P 2016).
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from dedup.errors import Refused
from dedup.kernel import ksm as ksm_interface
from dedup.kernel import processes
from dedup.kernel.processes import Handle

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Domain = Literal["user", "cgroup", "label"]

SECRET_HOLDERS: Final = {
    "keys": (
        "ssh-agent", "sshd", "gpg-agent", "scdaemon", "pinentry*", "gnome-keyring-*",
        "kwalletd*", "ksecretd", "keepass*", "keyring*", "bitwarden*", "1password*", "rbw-agent",
        "pass", "vault", "bao", "softhsm*", "pkcs11*", "p11-kit*", "swtpm*", "tpm2-*", "sssd*",
        "krb5kdc", "kadmind", "systemd-cryptse", "cryptsetup", "step-ca",
    ),
    "a browser's": (
        "firefox*", "Web Content", "Isolated *", "WebExtensions", "Privileged Cont", "chrome",
        "google-chrome*", "chromium*", "brave*", "opera*", "vivaldi*", "msedge*", "epiphany*",
        "WebKitWebProces", "WebKitNetworkPr", "qutebrowser", "QtWebEngineProc", "librewolf*",
        "thunderbird*",
    ),
}  # fmt: skip
"""Names, as `ps -o comm` has them, of likely holders of secrets: by what they hold."""

MOST_PIDS: Final = 8
"""So many are named one by one in an offer."""


@dataclass(frozen=True, slots=True)
class Member:
    """A process that is, or would be, mergeable."""

    pid: int
    name: str
    domain: str
    chosen: bool
    """Of the plan; else it is mergeable already."""


def secrets_of(name: str) -> str:
    """What secrets a process of this name likely holds; empty where none."""
    for what, globs in SECRET_HOLDERS.items():
        if any(fnmatch.fnmatchcase(name, g) for g in globs):
            return what
    return ""


def domain_of(handle: Handle, kind: Domain) -> str:
    """The trust domain of a process: its user, its container or cgroup, or its security label."""
    info = handle.info
    if kind == "user":
        return info.user
    if kind == "cgroup":
        container = processes.container_of(info.cgroup)
        return container or info.cgroup
    return processes.label(handle) or "unlabelled"


def members(chosen: Iterable[int], kind: Domain) -> list[Member]:
    """The processes of a plan, and those on this host that are mergeable already."""
    from dedup.errors import NoSuchProcess

    wanted = set(chosen)
    found = []
    for pid in sorted(wanted | set(ksm_interface.users())):
        try:
            with Handle(pid) as handle:
                domain = domain_of(handle, kind)
                found.append(Member(pid, handle.info.name, domain, pid in wanted))
        except NoSuchProcess:
            continue  # ended meanwhile: the plan notices
    return found


def by_domain(found: Sequence[Member]) -> dict[str, list[Member]]:
    """Members by their domain, that with the most of the plan first."""
    domains: dict[str, list[Member]] = {}
    for member in found:
        domains.setdefault(member.domain, []).append(member)
    return dict(sorted(domains.items(), key=lambda d: (-sum(m.chosen for m in d[1]), d[0])))


def require_one(found: Sequence[Member], kind: Domain) -> None:
    """Refuse to have several domains merge.

    Raises
    ------
    Refused
    """
    domains = by_domain(found)
    if len(domains) < 2 or not any(m.chosen for m in found):
        return
    said = "; ".join(f"{domain}: {_count(members_)}" for domain, members_ in domains.items())
    raise Refused(
        f"this would let memory of {len(domains)} trust domains merge, by {kind} ({said}). "
        "The first write to a merged page takes longer, so that by timing its own writes a process "
        "can find out what another one holds. KSM knows no domains: whatever is mergeable on this "
        "host merges together",
        _offer(domains, kind),
    )


def _count(found: Sequence[Member]) -> str:
    chosen = sum(m.chosen for m in found)
    already = len(found) - chosen
    parts = [f"{chosen} chosen"] if chosen else []
    return ", ".join([*parts, *([f"{already} mergeable already"] if already else [])])


def _offer(domains: dict[str, list[Member]], kind: Domain) -> str:
    accept = "add `--accept-side-channels` where they trust each other"
    standing = [d for d, found in domains.items() if not all(m.chosen for m in found)]
    if len(standing) > 1:
        return f"several are mergeable already, whatever you choose; {accept}"
    within = standing[0] if standing else next(iter(domains))
    pids = [m.pid for m in domains[within] if m.chosen]
    if not pids:
        return f"processes of {within} are mergeable already, and none of it was chosen; {accept}"
    if len(pids) <= MOST_PIDS:
        words = " ".join(f"--pid {pid}" for pid in pids)
    else:
        words = {"user": f"--user {within}", "cgroup": f"--cgroup {within}"}.get(kind, "--pid ...")
    return f"keep to one: `dedup apply {words}` ({within}); or {accept}"
