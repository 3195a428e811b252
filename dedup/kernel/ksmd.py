"""ksmd, the kernel thread that merges: where it is, and the CPU time it has used.

Sources: mm/ksm.c (ksm_init names the thread), Documentation/scheduler/sched-stats.rst
(/proc/PID/schedstat), proc_pid_stat(5).
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Final

from dedup.errors import Unsupported
from dedup.kernel import processes

PROC: Final = Path("/proc")
NAME: Final = b"ksmd"
KTHREADD: Final = 2
"""Parent of all kernel threads."""


class Ksmd:
    """The thread.

    Parameters
    ----------
    proc : Path, optional

    Raises
    ------
    Unsupported
        It is not in sight: no KSM in this kernel, or a container with pids of its own.
    """

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self.pid = _find(proc)
        self._exact = (proc / str(self.pid) / "schedstat").exists()

    def cpu_ns(self) -> int:
        """CPU time used since boot, in ns; up to date while the thread sleeps.

        Clock ticks (`sysconf(_SC_CLK_TCK)`) are all there is where the kernel keeps no schedstat.

        Raises
        ------
        Unsupported
            The thread is hidden from us.
        """
        if self._exact:
            return int(self._read("schedstat").split()[0])
        fields = self._read("stat").rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")

    def waited_ns(self) -> int | None:
        """Time since boot in which it had work but no processor; None without schedstat.

        Raises
        ------
        Unsupported
            The thread is hidden from us.
        """
        return int(self._read("schedstat").split()[1]) if self._exact else None

    def _read(self, name: str) -> bytes:
        try:
            return (self._proc / str(self.pid) / name).read_bytes()
        except OSError as e:
            raise Unsupported(f"ksmd's CPU time can't be read: {e.strerror}", "") from e


def _find(proc: Path) -> int:
    for pid in processes.pids(proc):
        try:
            head, _, tail = (proc / str(pid) / "stat").read_bytes().rpartition(b")")
        except OSError:
            continue  # ended meanwhile
        # Any process may take the name; a kernel thread's parent is kthreadd.
        if head.partition(b"(")[2] == NAME and int(tail.split()[1]) == KTHREADD:
            return pid
    raise Unsupported(
        "ksmd is not among the processes in sight",
        "in a container, run this on the host; else see `ls /sys/kernel/mm/ksm`",
    )


def tick_seconds() -> float:
    """Length of a timer tick (1 / HZ), by which the kernel rounds ksmd's sleeps.

    Source: clock_getres(2), CLOCK_MONOTONIC_COARSE.
    """
    return time.clock_getres(_COARSE)


_COARSE: Final = 6
"""CLOCK_MONOTONIC_COARSE (include/uapi/linux/time.h); Python has no name for it."""


def cpu_model(proc: Path = PROC) -> str:
    """The processor's name; on machines that give none, its implementer and part."""
    text = (proc / "cpuinfo").read_text(errors="replace")
    if found := re.search(r"^(?:model name|cpu)\s*:\s*(\S.*)$", text, re.MULTILINE):
        return found[1].strip()
    numbers = re.findall(r"^CPU (?:implementer|part)\s*:\s*(\S+)", text, re.MULTILINE)
    return " ".join(numbers[:2]) or os.uname().machine


_VECTORS: Final = {"avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}


def cpu_vectors(proc: Path = PROC) -> str:
    """The widest vector unit of the processor that hashing may use; empty where none is told."""
    text = (proc / "cpuinfo").read_text(errors="replace")
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return next((words for flag, words in _VECTORS.items() if flag in flags), "")
