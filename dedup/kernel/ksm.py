"""Counters and tunables of /sys/kernel/mm/ksm, and per-process ksm_stat.

Source: Documentation/admin-guide/mm/ksm.rst and mm/ksm.c.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dedup.errors import NotPermitted, OutputFailed, Unsupported

if TYPE_CHECKING:
    from dedup.kernel.processes import Handle, Info

ROOT: Final = Path("/sys/kernel/mm/ksm")

PAGE_BYTES: Final = os.sysconf("SC_PAGESIZE")
RMAP_ITEM_BYTES: Final = 64
"""Of struct ksm_rmap_item on 64-bit kernels."""
SYSFS_BYTES: Final = 4096
"""The most that a file there holds: a page."""

RUN_STOP: Final = 0
RUN_MERGE: Final = 1
RUN_UNMERGE: Final = 2

TUNABLES: Final = (
    "run",
    "pages_to_scan",
    "sleep_millisecs",
    "max_page_sharing",
    "merge_across_nodes",
    "use_zero_pages",
    "smart_scan",
    "stable_node_chains_prune_millisecs",
    "advisor_mode",
    "advisor_max_cpu",
    "advisor_min_pages_to_scan",
    "advisor_max_pages_to_scan",
    "advisor_target_scan_time",
)
"""Files that can be written. A kernel has those of its age; absent ones are left out."""

DEFAULTS: Final[dict[str, int | str]] = {
    "pages_to_scan": 100,
    "sleep_millisecs": 20,
    "max_page_sharing": 256,
    "merge_across_nodes": 1,
    "use_zero_pages": 0,
    "smart_scan": 1,
    "stable_node_chains_prune_millisecs": 2000,
    "advisor_mode": "none",
    "advisor_max_cpu": 70,
    "advisor_min_pages_to_scan": 500,
    "advisor_max_pages_to_scan": 30000,
    "advisor_target_scan_time": 200,
}
"""What a kernel begins with (mm/ksm.c); `run` is the distribution's affair."""


@dataclass(frozen=True, slots=True)
class Counters:
    """The kernel's counters: pages, but `general_profit` in bytes and `full_scans` in scans."""

    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    pages_volatile: int
    ksm_zero_pages: int
    stable_node_chains: int
    stable_node_dups: int
    general_profit: int
    full_scans: int
    pages_scanned: int
    pages_skipped: int

    @property
    def rmap_items(self) -> int:
        """All pages that ksmd follows (rmap_items in use)."""
        return self.pages_shared + self.pages_sharing + self.pages_unshared + self.pages_volatile

    def settled(self) -> tuple[int, ...]:
        """What must stand still for ksmd to have converged.

        Unshared and volatile as one: each page that ksmd visits is in neither tree for a moment.
        Their sum is off by one where ksmd is at work between the readings of the two files, so it
        is taken from `general_profit`, one file, in which all rmap_items are counted.

        Source: mm/ksm.c, general_profit_show().
        """
        merged = self.pages_sharing + self.ksm_zero_pages
        return (
            self.pages_shared,
            self.pages_sharing,
            (merged * PAGE_BYTES - self.general_profit) // RMAP_ITEM_BYTES
            if self.general_profit
            else self.pages_unshared + self.pages_volatile,
            self.ksm_zero_pages,
            self.stable_node_chains,
            self.stable_node_dups,
        )


@dataclass(frozen=True, slots=True)
class ProcessCounters:
    """/proc/PID/ksm_stat: pages, but `ksm_process_profit` in bytes."""

    ksm_rmap_items: int
    ksm_zero_pages: int
    ksm_merging_pages: int
    ksm_process_profit: int
    ksm_merge_any: bool | None
    """None where the kernel does not tell (`inject.merges_any` asks the process itself)."""
    ksm_mergeable: bool | None
    """Whether any mapping is; None where the kernel does not tell."""


class Ksm:
    """KSM of this host.

    Parameters
    ----------
    root : Path, optional
        Its folder in sysfs.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root

    @property
    def present(self) -> bool:
        """Whether this kernel has KSM."""
        return (self.root / "run").exists()

    @property
    def running(self) -> bool:
        """Whether ksmd merges now (run=1); not, where the kernel has no KSM."""
        return self._number("run") == RUN_MERGE

    def require(self) -> None:
        """Raise `Unsupported` when this kernel has no KSM."""
        if not self.present:
            raise Unsupported(
                f"this kernel has no KSM: {self.root} is missing",
                "boot a kernel built with CONFIG_KSM=y; in a container, ask on the host",
            )

    def counters(self) -> Counters:
        """Read all counters; those that an older kernel lacks are 0.

        Raises
        ------
        Unsupported
            The kernel has no KSM.
        """
        self.require()
        return Counters(**{f.name: self._number(f.name) for f in fields(Counters)})

    def _number(self, name: str) -> int:
        try:
            return int(self._read(name))
        except FileNotFoundError:
            return 0

    def _read(self, name: str) -> bytes:
        # A scan reads some twenty of them; a buffered file takes several times as long.
        fd = os.open(f"{self.root}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, SYSFS_BYTES)
        finally:
            os.close(fd)

    def tunables(self) -> dict[str, int | str]:
        """Read all tunables that this kernel has.

        Raises
        ------
        Unsupported
            The kernel has no KSM.
        """
        self.require()
        values: dict[str, int | str] = {}
        for name in TUNABLES:
            try:
                text = self._read(name).decode().strip()
            except FileNotFoundError:
                continue
            if name == "advisor_mode":
                # `[none] scan-time`: the chosen word stands in brackets.
                text = next((w[1:-1] for w in text.split() if w.startswith("[")), text)
            values[name] = int(text) if text.lstrip("-").isdigit() else text
        return values

    def files(self) -> frozenset[str]:
        """Names of the counters and tunables that this kernel has; none without KSM."""
        try:
            return frozenset(os.listdir(self.root))
        except OSError:
            return frozenset()

    def writable(self) -> bool:
        """Whether we may write the tunables."""
        return os.access(self.root / "run", os.W_OK)

    def write(self, name: str, value: int | str) -> None:
        """Write one tunable.

        Raises
        ------
        NotPermitted
            No right to write.
        Unsupported
            The kernel lacks it, or refuses the value now (EBUSY, EINVAL).
        OutputFailed
            Anything else.
        """
        path = self.root / name
        try:
            # os.write, since a buffered file would lose the error in its destructor.
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, str(value).encode())
            finally:
                os.close(fd)
        except PermissionError as e:
            raise NotPermitted(f"may not write {path}: {e.strerror}") from e
        except FileNotFoundError as e:
            raise Unsupported(f"this kernel has no tunable {name} ({path})", "") from e
        except OSError as e:
            if e.errno == errno.EBUSY:
                raise Unsupported(
                    f"the kernel refuses {name}={value} while pages are merged",
                    "unmerge first: `echo 2 > /sys/kernel/mm/ksm/run`",
                ) from e
            if e.errno == errno.EINVAL:
                raise Unsupported(
                    f"the kernel refuses {name}={value} (invalid, or the advisor holds it)",
                    "see `cat /sys/kernel/mm/ksm/advisor_mode`",
                ) from e
            raise OutputFailed(f"writing {value} to {path} failed: {e.strerror}", "") from e


def process_counters(handle: Handle) -> ProcessCounters | None:
    """ksm_stat of a process; None where the kernel does not show it to us.

    Raises
    ------
    ProcessGone
        The process ended.
    """
    text = handle.read_or_none("ksm_stat")
    if text is None:
        return None
    values: dict[str, str] = {}
    for line in text.decode().splitlines():
        name, _, value = line.replace(":", " ").partition(" ")
        values[name] = value.strip()
    return ProcessCounters(
        ksm_rmap_items=int(values.get("ksm_rmap_items", 0)),
        ksm_zero_pages=int(values.get("ksm_zero_pages", 0)),
        ksm_merging_pages=int(values.get("ksm_merging_pages", 0)),
        ksm_process_profit=int(values.get("ksm_process_profit", 0)),
        ksm_merge_any=values["ksm_merge_any"] == "yes" if "ksm_merge_any" in values else None,
        ksm_mergeable=values["ksm_mergeable"] == "yes" if "ksm_mergeable" in values else None,
    )


@dataclass(frozen=True, slots=True)
class Use:
    """A process that KSM works for, or would."""

    info: Info
    counters: ProcessCounters

    @property
    def stale(self) -> bool:
        """Nothing of it is mergeable any more: ksmd forgets its pages when it comes by."""
        c = self.counters
        # A kernel that tells of the one tells of the other.
        return c.ksm_merge_any is not None and not (c.ksm_mergeable or c.ksm_merge_any)


@dataclass(frozen=True, slots=True)
class Uses:
    """All of them, ascending by pid."""

    found: tuple[Use, ...]
    hidden: int
    """Processes whose ksm_stat we may not read (mode 0400)."""
    told: bool
    """Whether this kernel has ksm_stat."""


def uses(proc: Path = Path("/proc")) -> Uses:
    """Look at each process; two that share one address space count once."""
    from dedup.errors import NoSuchProcess
    from dedup.kernel.processes import Handle, joins, pids

    found: list[Use] = []
    seen: list[int] = []
    hidden = 0
    for pid in pids(proc):
        try:
            with Handle(pid, proc) as handle:
                if handle.info.kernel_thread or handle.info.state in {"Z", "X"}:
                    continue
                c = process_counters(handle)
                info = handle.info
        except NoSuchProcess:
            continue  # ended meanwhile
        except NotPermitted:
            hidden += 1  # by hidepid
            continue
        if c is None:
            hidden += 1
        elif (c.ksm_rmap_items or c.ksm_mergeable or c.ksm_merge_any) and not joins(pid, seen):
            found.append(Use(info, c))
    told = (proc / "self" / "ksm_stat").exists()
    return Uses(tuple(found), hidden if told else 0, told)


def users(proc: Path = Path("/proc")) -> dict[int, str]:
    """Processes that are mergeable: pid and name. Root sees all of them."""
    return {use.info.id.pid: use.info.name for use in uses(proc).found if not use.stale}
