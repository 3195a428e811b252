"""What this host, kernel and user can and can't do. All is probed; nothing is changed."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from dedup import calibration
from dedup.change import applied, hold, journal
from dedup.change.tunables import TUNERS, others_at_the_knobs, planned_restore
from dedup.errors import DedupError, NotPermitted
from dedup.kernel import (
    advise,
    container,
    huge,
    inject,
    limits,
    lock,
    maps,
    memory,
    numa,
    pagemap,
    privileges,
    processes,
    vmstat,
)
from dedup.kernel import ksm as interface
from dedup.kernel.ksm import PAGE_BYTES, RUN_MERGE, RUN_UNMERGE, Ksm
from dedup.kernel.ksmd import Ksmd, cpu_vectors

if TYPE_CHECKING:
    from collections.abc import Callable

    from dedup.kernel.container import Container
    from dedup.kernel.huge import Huge
    from dedup.kernel.ksm import Uses
    from dedup.kernel.limits import Limits
    from dedup.kernel.pagemap import Sight
    from dedup.kernel.privileges import Privileges

State = Literal["ok", "limited", "cannot", "note"]
STATES: Final[tuple[State, ...]] = ("ok", "limited", "cannot", "note")

COUNTERS: Final = {
    "ksm_zero_pages": "pages merged with the shared zero page are not counted",
    "general_profit": "the profit is worked out from the other counters",
    "pages_scanned": "ksmd's pace can't be seen",
    "stable_node_chains": "chains of frames can't be compared",
    "smart_scan": "it has no smart scan: all pages are visited each time",
    "use_zero_pages": "zero pages merge with each other, and keep a frame",
    "advisor_mode": "it has no advisor: pages_to_scan stays as it is set",
}
"""Files that not every kernel has, and what the lack of each means."""
PROCESS_COUNTERS: Final = ("ksm_rmap_items", "ksm_merging_pages", "ksm_process_profit",
                           "ksm_zero_pages", "ksm_merge_any", "ksm_mergeable")  # fmt: skip
SYSTEMD_LEAST: Final = 254
"""The first version with MemoryKSM=."""
SYSTEMCTL_SECONDS: Final = 5.0
MAPS_USUAL: Final = 65530
"""The kernel's default of vm.max_map_count."""
COPIES_USUAL: Final = 256
"""The kernel's default of max_page_sharing."""
STATE_BYTES: Final = 1 << 20
"""Free, for the journal: far more than it takes."""
YAMA_ADMIN: Final = 2
YAMA_NOBODY: Final = 3
MOST_NAMES: Final = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; commands stand between backticks, as root types them."""

    state: State
    found: str
    meaning: str = ""
    way_out: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A finding with its place; the name stays the same from version to version."""

    topic: str
    name: str
    finding: Finding


@dataclass(slots=True)
class Host:
    """Where to look.

    Parameters
    ----------
    root : Path, optional
        The root of the file system; the machine's own processor and system calls are probed
        whatever it is.
    systemctl : str, optional
        The command.
    """

    root: Path = Path("/")
    systemctl: str = "systemctl"

    @property
    def proc(self) -> Path:
        """Procfs."""
        return self.root / "proc"

    @property
    def mm(self) -> Path:
        """Where sysfs has memory management."""
        return self.root / "sys/kernel/mm"

    @property
    def state(self) -> Path:
        """Lock and journal."""
        return self.root / "run/dedup"


class _Look:
    """What several checks need, read once."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.ksm = Ksm(host.mm / "ksm")

    @cached_property
    def tunables(self) -> dict[str, int | str]:
        return self.ksm.tunables() if self.ksm.present else {}

    @cached_property
    def rights(self) -> Privileges:
        return privileges.read(self.host.proc, self.host.root / "sys/kernel/security")

    @cached_property
    def container(self) -> Container:
        return container.read(self.host.root)

    @cached_property
    def sight(self) -> Sight:
        return pagemap.sight(self.host.proc, self.host.mm / "transparent_hugepage")

    @cached_property
    def huge(self) -> Huge:
        return huge.read(self.host.mm, self.host.proc)

    @cached_property
    def limits(self) -> Limits:
        return limits.read(self.host.proc)

    @cached_property
    def uses(self) -> Uses:
        return interface.uses(self.host.proc)

    @property
    def as_root(self) -> str:
        """How to get privileges that are lacking: by sudo, or from the host."""
        if self.rights.uid == 0:
            return "run it on the host, as root, outside of this container"
        return "`sudo dedup ...`"


# -- the kernel ------------------------------------------------------------------------------------


def _proc(look: _Look) -> Finding | None:
    if (look.host.proc / "self").exists():
        return None
    return Finding(
        "cannot",
        f"procfs is not mounted on {look.host.proc}",
        "no process can be seen, let alone read",
        "`mount -t proc proc /proc`",
    )


def _ksm(look: _Look) -> Finding:
    if look.ksm.present:
        return Finding("ok", f"in this kernel; pages of {PAGE_BYTES // 1024} KiB")
    if not look.host.mm.parent.exists():
        return Finding(
            "cannot",
            f"sysfs is not mounted on {look.host.root / 'sys'}",
            "KSM can neither be seen nor set from here",
            "`mount -t sysfs sysfs /sys`, or look on the host",
        )
    return Finding(
        "cannot",
        f"{look.ksm.root} is missing: this kernel has no KSM",
        "nothing can merge here; a scan still predicts what would",
        "boot a kernel with CONFIG_KSM=y: `grep KSM /boot/config-$(uname -r)`",
    )


def _ksmd(look: _Look) -> Finding | None:
    if not look.ksm.present:
        return None
    run = look.tunables["run"]
    if run != RUN_MERGE:
        return Finding(
            "limited",
            "it unmerged everything (run=2)" if run == RUN_UNMERGE else "stopped (run=0)",
            "nothing merges, and counters stand still",
            "`echo 1 > /sys/kernel/mm/ksm/run`, or for a while `dedup apply --start-ksmd`",
        )
    words = f"runs: {look.tunables.get('pages_to_scan')} pages every "
    words += f"{look.tunables.get('sleep_millisecs')} ms"
    try:
        Ksmd(look.host.proc)
    except DedupError:
        return Finding(
            "limited", f"{words}; out of sight", "its CPU can't be told", "look on the host"
        )
    return Finding("ok", words)


def _prctl(_look: _Look) -> Finding:
    try:
        on = advise.merge_any()
    except NotPermitted as e:
        return Finding(
            "cannot",
            e.message,
            "`dedup run` can't make a program's memory mergeable",
            "allow prctl in the seccomp profile, or start the program on the host",
        )
    if on is None:
        return Finding(
            "cannot",
            "this kernel has no prctl(PR_SET_MEMORY_MERGE)",
            "`dedup run` can't make a program's memory mergeable",
            "have the program call madvise(MADV_MERGEABLE), as QEMU does",
        )
    return Finding(
        "ok", "PR_SET_MEMORY_MERGE works" + (" (and is on for dedup itself)" if on else "")
    )


def _counters(look: _Look) -> Finding | None:
    if not look.ksm.present:
        return None
    lacking = {n: why for n, why in COUNTERS.items() if n not in look.ksm.files()}
    if not lacking:
        return Finding("ok", "all that dedup knows of are there")
    words = "; ".join(f"no {n}: {why}" for n, why in lacking.items())
    return Finding("limited", f"{len(lacking)} are missing", words, "a newer kernel has them")


def _ksm_stat(look: _Look) -> Finding | None:
    if not look.ksm.present:
        return None
    try:
        text = (look.host.proc / "self/ksm_stat").read_text()
    except OSError:
        return Finding(
            "limited",
            "no /proc/PID/ksm_stat",
            "what each process gains can't be told, and only the host's counters be compared",
            "a newer kernel has it",
        )
    lacking = [n for n in PROCESS_COUNTERS if not re.search(rf"^{n}\b", text, re.MULTILINE)]
    if lacking:
        return Finding(
            "limited",
            f"/proc/PID/ksm_stat lacks {', '.join(lacking)}",
            "these count as 0 or as no",
            "a newer kernel has them",
        )
    return Finding("ok", "/proc/PID/ksm_stat, with ksm_merge_any and ksm_mergeable")


def _smaps(look: _Look) -> Finding:
    mappings = maps.parse((look.host.proc / "self/smaps").read_bytes())
    if all(m.ksm_bytes is None for m in mappings):
        return Finding(
            "limited",
            "no KSM line in /proc/PID/smaps",
            "merged memory can't be told by mapping, so all is read the slow and harmless way",
            "a newer kernel has it",
        )
    return Finding("ok", "VmFlags and KSM lines in /proc/PID/smaps")


def _vmstat(look: _Look) -> Finding:
    if vmstat.events(look.host.proc).cow_ksm is None:
        return Finding(
            "limited",
            "no cow_ksm in /proc/vmstat",
            "writes to merged pages are not counted",
            "a kernel with CONFIG_KSM and CONFIG_VM_EVENT_COUNTERS has it",
        )
    return Finding("ok", "cow_ksm in /proc/vmstat counts merged pages that are broken")


# -- reading memory --------------------------------------------------------------------------------


def _frames(look: _Look) -> Finding:
    if look.sight.frames:
        return Finding("ok", "frame numbers are shown in /proc/PID/pagemap")
    return Finding(
        "limited",
        "frame numbers are hidden (CAP_SYS_ADMIN shows them)",
        "what processes share since a fork can't be told from copies: such figures are ranges",
        look.as_root,
    )


def _pagemap_scan(look: _Look) -> Finding:
    if look.sight.pagemap_scan:
        return Finding("ok", "PAGEMAP_SCAN works")
    return Finding(
        "limited", "no PAGEMAP_SCAN", "scans of sparse memory take longer", "a newer kernel has it"
    )


def _page_flags(look: _Look) -> Finding:
    sight = look.sight
    lacking = [
        f"/proc/{name}"
        for name, there in (("kpageflags", sight.kpageflags), ("kpagecount", sight.kpagecount))
        if not there
    ]
    if not lacking:
        return Finding("ok", "/proc/kpageflags and /proc/kpagecount can be read")
    return Finding(
        "limited",
        f"{' and '.join(lacking)} can't be read",
        "merged pages are recognised by mapping alone, and memory is read the slow way there",
        look.as_root,
    )


def _process_vm_readv(_look: _Look) -> Finding:
    if why := memory.fast_path():
        return Finding(
            "limited",
            f"process_vm_readv: {why}",
            "all memory is read through /proc/PID/mem: harmless, but slower",
            "allow the call in the seccomp profile",
        )
    return Finding("ok", "process_vm_readv works")


def _other_processes(look: _Look) -> Finding:
    rights = look.rights
    if rights.has("CAP_SYS_PTRACE"):
        return Finding("ok", "memory of all processes can be read (CAP_SYS_PTRACE)")
    return Finding(
        "limited",
        f"no CAP_SYS_PTRACE on the host (uid {rights.uid})",
        "memory and counters of your own processes alone can be read",
        look.as_root,
    )


def _hidepid(look: _Look) -> Finding:
    how = look.rights.hidepid
    if not how:
        return Finding("ok", "/proc shows all processes")
    if look.rights.has("CAP_SYS_PTRACE"):
        return Finding("ok", f"/proc is mounted with hidepid={how}, which does not hold for you")
    return Finding(
        "limited",
        f"/proc is mounted with hidepid={how}",
        "processes of others are not even counted",
        look.as_root,
    )


# -- changing --------------------------------------------------------------------------------------


def _user(look: _Look) -> Finding:
    rights = look.rights
    names = ", ".join(sorted(rights.capabilities)) or "none that matters here"
    words = f"uid {rights.uid}; capabilities: {names}"
    if not rights.initial:
        return Finding(
            "note",
            words,
            "in a user namespace: they do not reach the host",
            "run it on the host, as root",
        )
    return Finding("ok", words)


def _tunables(look: _Look) -> Finding | None:
    if not look.ksm.present:
        return None
    if look.ksm.writable():
        return Finding("ok", "KSM's settings can be written")
    read_only = look.container.sys_read_only
    return Finding(
        "cannot",
        "KSM's settings can't be written" + (": /sys is mounted read-only" if read_only else ""),
        "ksmd can't be started, set or put to rest from here",
        look.as_root if not read_only else "run it on the host, as root, outside of this container",
    )


def _injection(_look: _Look) -> Finding:
    machine = platform.machine()
    if not inject.supported():
        return Finding(
            "cannot",
            f"no system calls into running processes on {machine}",
            "what runs already can't be made mergeable",
            "start it with `dedup run -- CMD`",
        )
    if machine != "x86_64":
        return Finding(
            "note",
            f"system calls into running processes: built for {machine}, but untested there",
            "try it first on a process that may die",
            "start programs with `dedup run -- CMD`, which needs none",
        )
    return Finding("ok", f"system calls into running processes: tested on {machine}")


def _yama(look: _Look) -> Finding:
    scope, root = look.rights.yama, look.rights.has("CAP_SYS_PTRACE")
    if scope is None:
        return Finding("ok", "no Yama in this kernel")
    words = f"kernel.yama.ptrace_scope={scope}"
    if scope == 0 or (root and scope < YAMA_NOBODY):
        return Finding("ok", words)
    if scope >= YAMA_NOBODY:
        return Finding(
            "cannot",
            words,
            "nobody may read or change another process's memory, root included, until a reboot",
            "take it out of /etc/sysctl.d and reboot; `dedup run -- CMD` works without it",
        )
    if scope >= YAMA_ADMIN:
        return Finding("cannot", words, "other processes can be read by root alone", look.as_root)
    return Finding(
        "limited",
        words,
        "of other processes, only descendants can be read",
        f"{look.as_root}, or `sysctl kernel.yama.ptrace_scope=0`",
    )


def _seccomp(look: _Look) -> Finding:
    if not look.rights.seccomp:
        return Finding("ok", "no filter on our own system calls")
    return Finding(
        "note",
        "a filter is on our own system calls, as in most containers",
        "calls may be refused; those that dedup can try without harm are tried above",
        "run it on the host where one is missing",
    )


def _lockdown(look: _Look) -> Finding:
    how = look.rights.lockdown
    if how in {"", "none"}:
        return Finding("ok", "the kernel is not locked down" if how else "no lockdown in sight")
    return Finding(
        "note", f"the kernel is locked down ({how})", "dedup has not been tested with it"
    )


def _systemd(look: _Look) -> Finding:
    version = _systemctl(look.host.systemctl, "--version")
    if version is None:
        return Finding(
            "note", "no systemd", "MemoryKSM= is out of the question", "`dedup run -- CMD`"
        )
    found = re.search(r"\d+", version)
    number = int(found[0]) if found else 0
    # The properties of a unit that is not there are those that the running manager knows.
    shown = _systemctl(look.host.systemctl, "show", "--property=MemoryKSM", "dedup-probe.service")
    knows = shown.startswith("MemoryKSM=") if shown is not None else number >= SYSTEMD_LEAST
    source = "" if shown is not None else ", by its version, since it does not run"
    if knows:
        return Finding("ok", f"systemd {number} has MemoryKSM={source}")
    return Finding(
        "limited",
        f"systemd {number} has no MemoryKSM={source}",
        "a unit can't be made mergeable by its settings alone",
        "begin its ExecStart= with `dedup run --`",
    )


def _systemctl(command: str, *args: str) -> str | None:
    """Its stdout; None where it is missing or fails."""
    try:
        done = subprocess.run(
            [command, *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SYSTEMCTL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


# -- what merges -----------------------------------------------------------------------------------


def _smart_scan(look: _Look) -> Finding | None:
    value = look.tunables.get("smart_scan")
    if value is None:
        return None
    if not value:
        return Finding("ok", "off: equal pages always meet")
    return Finding(
        "limited",
        "on, the kernel's default",
        "pages that became mergeable at different times may never be looked at in the same scan: "
        "some that are equal never merge",
        "`echo 0 > /sys/kernel/mm/ksm/smart_scan`; `dedup apply` has it off for its time",
    )


def _max_page_sharing(look: _Look) -> Finding | None:
    value = look.tunables.get("max_page_sharing")
    if value is None:
        return None
    words = f"{value} mappings on one frame at the most"
    if int(value) >= COPIES_USUAL:
        return Finding("ok", words)
    return Finding(
        "note",
        words,
        f"of many equal pages, one in {value} keeps a frame",
        f"`echo {COPIES_USUAL} > /sys/kernel/mm/ksm/max_page_sharing`, while nothing is merged",
    )


def _numa(look: _Look) -> Finding | None:
    value = look.tunables.get("merge_across_nodes")
    nodes = numa.nodes(look.host.root / "sys/devices/system", look.host.proc)
    if nodes is None:
        return Finding("ok", "one NUMA node")
    if value == 0:
        return Finding(
            "note",
            "several NUMA nodes, merge_across_nodes=0",
            "equal pages of different nodes do not merge",
            "`echo 1 > /sys/kernel/mm/ksm/merge_across_nodes`, while nothing is merged",
        )
    return Finding(
        "note",
        "several NUMA nodes, merge_across_nodes=1",
        "merged pages may lie on another node than their reader",
        "`echo 0 > /sys/kernel/mm/ksm/merge_across_nodes`, while nothing is merged",
    )


def _huge_pages(look: _Look) -> Finding:
    found = look.huge
    in_use = f"; {found.in_use_bytes >> 20} MiB in use" if found.in_use_bytes else ""
    if found.enabled in {"", "never"}:
        return Finding("ok", "no transparent huge pages")
    if found.enabled == "madvise":
        return Finding("ok", f"transparent huge pages for programs that ask{in_use}")
    return Finding(
        "note",
        f"transparent huge pages for all (enabled={found.enabled}){in_use}",
        "one in which a page merges is split, and no longer as fast; khugepaged may put it "
        "together again, which unmerges",
        "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`",
    )


def _smaller_huge_pages(look: _Look) -> Finding:
    if not look.huge.smaller_sizes:
        return Finding("ok", "no anonymous huge pages of smaller sizes (mTHP)")
    return Finding(
        "limited",
        f"anonymous huge pages of {', '.join(look.huge.smaller_sizes)} are on (mTHP)",
        "each page has to be looked up, and predictions are untested with them",
        "`echo never > /sys/kernel/mm/transparent_hugepage/hugepages-SIZE/enabled`",
    )


def _hugetlb(look: _Look) -> Finding:
    reserved = look.huge.reserved_bytes
    if not reserved:
        return Finding("ok", "no memory is reserved for hugetlb")
    return Finding(
        "note",
        f"{reserved >> 20} MiB are reserved for hugetlb",
        "memory in such pages never merges",
        "give fewer: `sysctl vm.nr_hugepages`, and see who uses them",
    )


def _randomisation(look: _Look) -> Finding | None:
    value = look.limits.randomize_va_space
    if value is None:
        return None
    if not value:
        return Finding("ok", "addresses are not randomised: like programs have like pages")
    return Finding(
        "note",
        f"addresses are randomised (kernel.randomize_va_space={value})",
        "pages with pointers differ between like processes: on one machine, four of Python with "
        "NumPy merged 6,471 pages with it and 12,230 without, three of redis 578 and 1,289",
        "`dedup run --no-randomize -- CMD`, for programs that may do without the protection",
    )


def _swap(look: _Look) -> Finding:
    swaps = look.limits.swaps
    if not swaps:
        return Finding("ok", "no swap")
    compressed = any("zram" in name for name in swaps)
    return Finding(
        "note",
        f"swap is on: {', '.join(swaps[:MOST_NAMES])}"
        + (" (compressed memory)" if compressed else ""),
        "pages swapped out are no candidates, and one that comes back may come as a copy",
    )


def _map_count(look: _Look) -> Finding | None:
    value = look.limits.max_map_count
    if value is None:
        return None
    if value >= MAPS_USUAL:
        return Finding("ok", f"vm.max_map_count={value}")
    return Finding(
        "note",
        f"vm.max_map_count={value}",
        "advice for parts of a mapping splits it, which fails at that number",
        f"`sysctl vm.max_map_count={MAPS_USUAL}`",
    )


# -- who else --------------------------------------------------------------------------------------


def _knobs(look: _Look) -> Finding:
    others = others_at_the_knobs(look.host.proc, look.ksm.root)
    if not others:
        return Finding("ok", "nobody else turns KSM's knobs")
    ways = [
        f"`systemctl stop {name}`" for name in TUNERS if any(o.startswith(name) for o in others)
    ]
    if look.tunables.get("advisor_mode") == "scan-time":
        ways.append("`echo none > /sys/kernel/mm/ksm/advisor_mode`")
    return Finding(
        "limited",
        "; ".join(others),
        "predictions hold for the settings of their moment; `dedup apply` fails when they change",
        " and ".join(ways),
    )


def _mergeable(look: _Look) -> Finding | None:
    if not look.ksm.present:
        return None
    uses = look.uses
    if not uses.told:
        return Finding("note", "which processes are mergeable can't be told (no ksm_stat)")
    hidden = f"; {uses.hidden} are hidden from you" if uses.hidden else ""
    if not uses.found:
        return Finding("ok", f"no process in sight is mergeable{hidden}")
    domains = {(u.info.user, processes.container_of(u.info.cgroup)) for u in uses.found}
    names = sorted({user for user, _ in domains})
    n = len(uses.found)
    words = (
        f"{n} process{'es are' if n > 1 else ' is'} mergeable, of {', '.join(names[:MOST_NAMES])}"
    )
    if len(names) > MOST_NAMES:
        words += f" and {len(names) - MOST_NAMES} more"
    if len(domains) < 2:
        return Finding("ok", words + hidden)
    return Finding(
        "note",
        f"{words}{hidden}",
        f"they are {len(domains)} users or containers, and KSM merges across them: by the time "
        "that a write takes, one can find out whether another has the same page",
        "let those alone be mergeable that trust each other; `dedup status --by user` shows who is",
    )


def _container(look: _Look) -> Finding:
    inside = look.container
    if not inside.inside:
        return Finding("ok", "not in a container")
    what = " ".join(filter(None, (inside.engine, inside.name[:12])))
    apart = [
        f"{kind} namespace"
        for kind, there in (("pid", inside.pid_namespace), ("user", inside.user_namespace))
        if there
    ]
    words = f"in a container{f' ({what})' if what else ''}"
    if apart:
        words += f": a {' and a '.join(apart)} of its own"
    return Finding(
        "limited",
        words,
        "KSM's counters are those of the whole host, its processes and ksmd are out of sight, and "
        "other containers too",
        f"on the host: `dedup scan --container {inside.name or 'NAME'}`",
    )


# -- dedup itself ----------------------------------------------------------------------------------


def _calibration(look: _Look) -> Finding:
    stored = calibration.load(look.host.root / calibration.PATH.relative_to("/"))
    if stored.calibration is not None:
        how = " by watching others' work" if stored.calibration.observed else ""
        return Finding("ok", f"ksmd's costs were measured here{how}: scans tell the price")
    return Finding(
        "limited",
        stored.why or "ksmd's costs were never measured here",
        "scans can't tell ksmd's CPU",
        "`dedup tune --calibrate`: some seconds, once for each host",
    )


def _state(look: _Look) -> Finding:
    folder = look.host.state
    try:
        if os.path.lexists(folder):
            lock.require_own_folder(folder)
    except DedupError as e:
        return Finding("cannot", e.message, "`dedup apply` fails", e.hint)
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    found = os.statvfs(existing)
    free = found.f_bavail * found.f_frsize
    full = free < STATE_BYTES or (found.f_files and not found.f_favail)
    if found.f_flag & os.ST_RDONLY:
        words = f"{existing} is mounted read-only"
    elif full:
        words = f"{existing} is full"
    else:
        return Finding("ok", f"{folder}: room for lock and journal")
    return Finding(
        "cannot",
        words,
        "nothing is changed that can't be written to the journal first: `dedup apply` fails",
        f"make room: `df -h {existing}; df -i {existing}`",
    )


def _journal(look: _Look) -> Finding:
    state = look.host.state
    if not (state / journal.NAME).exists():
        return Finding("ok", "no killed run has left anything changed")
    pid = lock.holder(state, look.host.proc)
    who = f"dedup (pid {pid}) has" if pid else "a killed run has left"
    try:
        paths = dict.fromkeys(Path(r.path).name for r in planned_restore(state))
    except NotPermitted:
        return Finding(
            "note" if pid else "limited",
            f"{who} settings changed; which ones, root alone may read",
            "figures are for those",
            "wait until it is done" if pid else "`dedup restore`",
        )
    names = ", ".join(paths) or "nothing that counts"
    if pid:
        return Finding(
            "note", f"{who} {names} changed", "figures are for that", "wait until it is done"
        )
    return Finding("limited", f"{who} {names} changed", "figures are for that", "`dedup restore`")


def _held(look: _Look) -> Finding | None:
    state = look.host.state
    found = hold.read(state)
    if found is None:
        return None
    if left := hold.planned(look.ksm, state):
        by_us = left[0].outcome == "restored"
        return Finding(
            "limited" if by_us else "note",
            "a killed `dedup run --start-ksmd` has left "
            + ("ksmd running" if by_us else "its record"),
            "ksmd goes on without anybody who wants it" if by_us else "",
            "`dedup restore`",
        )
    pids = ", ".join(str(h.pid) for h in found.holders) or "one that has ended"
    return Finding("note", f"ksmd runs for `dedup run` (pid {pids})", "it stops with the last one")


def _applied(look: _Look) -> Finding | None:
    state = look.host.state
    if not (state / applied.NAME).exists():
        return None
    pid = lock.holder(state, look.host.proc)
    try:
        found = applied.Applied(state).applications()
    except NotPermitted:
        return Finding(
            "note",
            "`dedup apply` has made processes mergeable; which ones, root alone may read",
            "they stay so",
            "`dedup apply --undo`, or `dedup restore` where it was interrupted",
        )
    broken = sum(len(a.marks) for a in found if not a.finished)
    whole = sum(len(a.marks) for a in found if a.finished)
    if broken and pid is None:
        return Finding(
            "limited",
            f"an interrupted `dedup apply` has left {_of_processes(broken)} mergeable",
            "nobody compares what they save, and they stay so",
            "`dedup restore`",
        )
    if broken:
        return Finding("note", f"dedup (pid {pid}) makes {_of_processes(broken)} mergeable", "", "")
    if not whole:
        return None
    return Finding(
        "note",
        f"`dedup apply` has made {_of_processes(whole)} mergeable",
        "they stay so until they end",
        "`dedup apply --undo`",
    )


def _of_processes(n: int) -> str:
    return f"{n:,} process{'' if n == 1 else 'es'}"


def _tuned(look: _Look) -> Finding | None:
    record = journal.Journal(look.host.state, journal.STANDING)
    if not record.path.exists():
        return None
    try:
        names = ", ".join(dict.fromkeys(Path(e.path).name for e in record.entries()))
    except NotPermitted:
        names = "tunables (root alone may read which)"
    return Finding(
        "note",
        f"`dedup tune --apply` has set {names or 'nothing that counts'}",
        "that stays so until the next boot",
        "`dedup tune --undo`",
    )


def _hash(look: _Look) -> Finding:
    source, _, symbol = memory.load_hash(PAGE_BYTES).partition(":")
    if source == "python":
        return Finding(
            "limited",
            "pages are hashed by a Python call each",
            "scans take many times as long",
            "install xxhash anew: `pip install --force-reinstall xxhash`",
        )
    vectors = cpu_vectors(look.host.proc)
    return Finding("ok", f"{symbol} of {source}" + (f", on {vectors}" if vectors else ""))


def _threads(_look: _Look) -> Finding:
    n = memory.default_threads()
    return Finding("ok", f"{n} reading thread{'s' if n > 1 else ''}: the cores that we may use")


TOPICS: Final[dict[str, tuple[Callable[[_Look], Finding | None], ...]]] = {
    "Kernel": (_proc, _ksm, _ksmd, _prctl, _counters, _ksm_stat, _smaps, _vmstat),
    "Reading memory": (
        _frames, _pagemap_scan, _page_flags, _process_vm_readv, _other_processes, _hidepid,
    ),
    "Changing": (_user, _tunables, _injection, _yama, _seccomp, _lockdown, _systemd),
    "What merges": (
        _smart_scan, _max_page_sharing, _numa, _huge_pages, _smaller_huge_pages, _hugetlb,
        _randomisation, _swap, _map_count,
    ),
    "Who else": (_knobs, _mergeable, _container),
    "dedup itself": (
        _calibration, _state, _journal, _held, _applied, _tuned, _hash, _threads,
    ),
}  # fmt: skip
"""All checks. The name of one is that of its function."""


def examine(host: Host | None = None) -> list[Check]:
    """Run all checks; those that have no meaning here are left out. It never raises.

    Parameters
    ----------
    host : Host, optional
        Where to look.
    """
    look = _Look(host or Host())
    found = []
    for topic, checks in TOPICS.items():
        for check in checks:
            try:
                finding = check(look)
            except (DedupError, OSError, ValueError) as e:
                why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
                finding = Finding("limited", f"could not be looked at: {why}")
            if finding is not None:
                found.append(Check(topic, check.__name__.strip("_"), finding))
    return found
