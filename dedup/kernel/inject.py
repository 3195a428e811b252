"""System calls inside another, running process, by ptrace.

One thread is stopped, makes the calls, and goes on where it was; the others run on meanwhile.
prctl and madvise act on the address space that they all share. Everything between stop and
release happens in `_core.inject`.

If we die at any instant, the kernel lets the thread go, and it comes back by itself: its
registers lead from the call into rt_sigreturn, with a signal frame below its stack's red zone.
What remains is said in `Stop`: where no frame can be put (a stack that might have other data
below it, as Go's and coroutines' have; no such instructions; a shadow stack; seccomp suspended;
aarch64), our death within `window_seconds` would harm the program.

Sources: ptrace(2), signal(7) "Interruption of system calls ... by stop signals", sigreturn(2),
proc_pid_syscall(5); arch/x86/kernel/signal.c, kernel/signal.c, kernel/ptrace.c.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from dedup import _core
from dedup.errors import (
    DedupError,
    NotPermitted,
    NotStopped,
    ProcessGone,
    Refused,
    Unsupported,
)
from dedup.kernel import maps, processes
from dedup.kernel.advise import MADV_MERGEABLE, MADV_UNMERGEABLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

    from dedup.kernel.processes import Handle
    from dedup.pages import I64, U64

PR_SET_MEMORY_MERGE: Final = 67
PR_GET_MEMORY_MERGE: Final = 68
YAMA: Final = Path("/proc/sys/kernel/yama/ptrace_scope")

STOP_SECONDS: Final = 0.002
"""No further call begins in a stop that has lasted so long."""
UNMERGE_BYTES: Final = 1 << 20
"""Unmerged in one call: each page of it may have to be copied, about 3 µs a page."""
WALKED_BYTES: Final = 16 << 20
"""Without a KSM page the kernel looks at memory far faster than that: up to here in one call."""
THREADS_TRIED: Final = 8


@dataclass(frozen=True, slots=True)
class _Architecture:
    prctl: int
    madvise: int
    syscall: bytes
    syscall_return: bytes
    restorers: tuple[bytes, ...]
    align: int
    sees_eintr: frozenset[int]
    """Waits that end with EINTR after a stop (signal(7)): no thread of choice."""
    may_see_eintr: frozenset[int]
    """Those that do so on a socket with a timeout."""


_ARCHITECTURES: Final = {
    "x86_64": _Architecture(
        prctl=157,
        madvise=28,
        syscall=b"\x0f\x05",
        syscall_return=b"\x0f\x05\xc3",
        restorers=(b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05", b"\xb8\x0f\0\0\0\x0f\x05"),
        align=1,
        sees_eintr=frozenset({65, 128, 208, 220, 232, 281, 333, 426, 441}),
        may_see_eintr=frozenset({0, 1, 19, 20, 42, 43, 44, 45, 46, 47, 288, 299, 307}),
    ),
    # Untested.
    "aarch64": _Architecture(
        prctl=167,
        madvise=233,
        syscall=b"\x01\0\0\xd4",
        syscall_return=b"",
        restorers=(),
        align=4,
        sees_eintr=frozenset({4, 22, 137, 192, 193, 292, 426, 441}),
        may_see_eintr=frozenset({63, 64, 65, 66, 202, 203, 206, 207, 211, 212, 242, 243, 269}),
    ),
}


def supported() -> bool:
    """Whether this build can put system calls into processes of this machine."""
    return bool(_core.INJECT_ARCHITECTURE) and platform.machine() in _ARCHITECTURES


@dataclass(frozen=True, slots=True)
class Stop:
    """One stop of one thread."""

    thread: int
    calls: int
    """How many it made."""
    stopped_seconds: float
    """From our asking for the stop until it was let go: the most that it can have lasted."""
    self_healing: bool
    """It would have come back without us at any instant."""
    window_seconds: float
    """How long our death would have been seen: where not self-healing, by its harm; else by an
    EINTR from a wait that gives one after any stop (epoll_wait, sigtimedwait, semtimedop). With
    aarch64 such a wait gives EINTR at all events."""


@dataclass(frozen=True, slots=True)
class Done:
    """What calls returned, and the stops that it took."""

    errors: list[int | None]
    """The errno of each range, None where it was done."""
    stops: list[Stop]


@dataclass(slots=True)
class _Place:
    """Where in the target: instructions, and stacks that are nothing else."""

    gadget: int = 0
    restorer: int = 0
    bare: int = 0
    """A system call's instruction, whatever follows it."""
    stacks: list[tuple[int, int, int]] = field(default_factory=list)

    def stack_array(self) -> U64:
        return np.array(self.stacks, np.uint64).reshape(-1, 3)


@dataclass(frozen=True, slots=True)
class _Thread:
    tid: int
    rank: tuple[bool, int, bool]
    on_stack: bool | None
    """Whether its stack pointer lies in one of the stacks; None while it runs."""


class Injection:
    """System calls inside one process.

    Parameters
    ----------
    handle : Handle
        Stays the caller's.
    suspend_seccomp : bool, optional
        Go into processes with seccomp too, and suspend it meanwhile (CAP_SYS_ADMIN). Without it
        they are refused: a filter may kill them for the call.
    deadline_seconds : float, optional
        For a thread to stop, and for each call to end.

    Raises
    ------
    NoMemory, NoSuchProcess
        From entering, as are all of these.
    Refused
        Traced by another, or under seccomp.
    Unsupported
        This architecture's registers are unknown.
    NotPermitted
    """

    def __init__(
        self, handle: Handle, *, suspend_seccomp: bool = False, deadline_seconds: float = 1.0
    ) -> None:
        self.handle = handle
        self.suspend_seccomp = suspend_seccomp
        self.deadline_seconds = deadline_seconds
        self.stops: list[Stop] = []
        self._who = f"process {handle.pid} ({handle.info.name})"
        self._mem = -1

    def __enter__(self) -> Self:
        machine = platform.machine()
        found = _ARCHITECTURES.get(machine)
        if found is None or not _core.INJECT_ARCHITECTURE:
            raise Unsupported(
                f"system calls can't be put into a process on {machine}",
                "start the program with `dedup run -- CMD`: all its memory is mergeable then",
            )
        self.architecture = found
        processes.require_own_proc()
        self.handle.require_memory()
        self._refuse()
        # Of this address space: an exec makes the file useless, and is seen by that.
        self._mem = self.handle.open("mem", os.O_RDWR)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._mem >= 0:
            os.close(self._mem)
            self._mem = -1

    def prctl(self, option: int, argument: int) -> tuple[int, ...]:
        """A call of prctl for `run`; the arguments behind are 0."""
        return (self.architecture.prctl, option, argument)

    def madvise(self, start: int, end: int, advice: int) -> tuple[int, ...]:
        """A call of madvise for `run`."""
        return (self.architecture.madvise, start, end - start, advice)

    def run(self, calls: Sequence[tuple[int, ...]]) -> list[int]:
        """Make calls, in as many stops as it takes to keep each one short.

        Parameters
        ----------
        calls : sequence of tuple of int
            Number and arguments.

        Returns
        -------
        list of int
            What each one returned; an errno is negative.

        Raises
        ------
        ProcessGone, NotPermitted, Refused, Unsupported
        NotStopped
            It is in a wait that nothing interrupts, or a call did not end in time.
        """
        words = np.zeros((len(calls), 7), np.int64)
        for row, call in zip(words, calls, strict=True):
            row[: len(call)] = np.array(call, np.uint64).astype(np.int64)
        results = np.zeros(len(calls), np.int64)
        done = 0
        while done < len(calls):
            stop = self._stop(words[done:], results[done:])
            self.stops.append(stop)
            done += stop.calls
            if done < len(calls):
                time.sleep(max(0.001, stop.stopped_seconds))
        return results.tolist()

    def _stop(self, calls: I64, results: I64) -> Stop:
        until = time.monotonic() + self.deadline_seconds
        plain = False
        while True:
            place = self._place()
            if not place.bare:
                # Amid an exec, unless it stays so.
                if time.monotonic() > until:
                    raise Unsupported(
                        f"{self._who} has no instruction for a system call in its code",
                        "have it started with `dedup run -- CMD`, which needs no ptrace",
                    )
                time.sleep(0.001)
                continue
            threads = self._threads(place)
            if not place.restorer or self._shadow_stack():
                plain = True
            if not plain:
                threads = [t for t in threads if t.on_stack is not False]
            roomless = True
            for number, thread in enumerate(threads[:THREADS_TRIED], 1):
                left = until - time.monotonic()
                code, failure, made, healing, _, stopped, window = _core.inject(
                    self.handle.pid,
                    thread.tid,
                    self.handle.dir_fd,
                    self._mem,
                    _core.INJECT_SUSPEND_SECCOMP if self.suspend_seccomp else 0,
                    place.bare if plain else place.gadget,
                    0 if plain else place.restorer,
                    plain,
                    place.stack_array(),
                    np.ascontiguousarray(calls),
                    results,
                    max(left if number == len(threads) else left / 2, 0.01),
                    self.deadline_seconds,
                    STOP_SECONDS,
                )
                if code == _core.INJECT_DONE:
                    return Stop(
                        thread.tid, made, stopped, healing and not self.suspend_seccomp, window
                    )
                self._judge(code, failure, until)
                if code == _core.INJECT_NO_GADGET:
                    self._require_same_memory(place.bare)
                if code in {_core.INJECT_IN_RSEQ, _core.INJECT_NO_GADGET}:
                    break
                roomless &= code == _core.INJECT_NO_ROOM
            else:
                plain |= roomless
            if time.monotonic() > until:
                raise self._not_stopped()
            time.sleep(0.001)

    def _judge(self, code: int, failure: int, until: float) -> None:
        """Raise what an outcome means, unless another thread or a moment later may do better."""
        late = time.monotonic() > until
        match code:
            case _core.INJECT_NO_ROOM | _core.INJECT_IN_RSEQ | _core.INJECT_NO_GADGET:
                return
            case _core.INJECT_NOT_STOPPED if not late:
                return
            case _core.INJECT_NOT_STOPPED:
                raise self._not_stopped()
            case _core.INJECT_GONE:
                if not self.handle.alive():
                    raise ProcessGone(f"{self._who} has ended")
                if late:
                    raise self._not_stopped()
            case _core.INJECT_NOT_SEIZED:
                self._judge_seize(failure, late)
            case _core.INJECT_FOREIGN:
                raise self._foreign()
            case _core.INJECT_DISPATCHED:
                raise Refused(
                    f"{self._who} handles its system calls itself (syscall user dispatch)",
                    "have it started with `dedup run -- CMD`, which needs no ptrace",
                )
            case _core.INJECT_LEFT | _core.INJECT_STUCK:
                raise NotStopped(
                    f"a system call put into {self._who} did not end within "
                    f"{self.deadline_seconds:g} s; it ends by itself, and the process goes on then"
                )
            case _:
                reason = os.strerror(failure) if failure else "a fault at our instruction"
                raise NotStopped(
                    f"{self._who} could not be made to call ({reason}); it was let go unharmed",
                    "run it again",
                )

    def _judge_seize(self, failure: int, late: bool) -> None:
        self._refuse()
        # Opening its memory took the same right. So it is ending, in an exec, or still ours: the
        # kernel lets go of a thread a moment after ours is joined.
        if failure == errno.EPERM and not self.suspend_seccomp and not late:
            return
        if self.suspend_seccomp and failure in {errno.EINVAL, errno.EIO}:
            raise Unsupported("this kernel can't suspend seccomp (CONFIG_CHECKPOINT_RESTORE)", "")
        if failure == errno.EPERM:
            raise NotPermitted(f"may not trace {self._who}", _advice(self.suspend_seccomp))
        raise Unsupported(f"tracing {self._who} failed: {os.strerror(failure)}", "")

    def _not_stopped(self) -> DedupError:
        return NotStopped(
            f"{self._who} did not stop within {self.deadline_seconds:g} s: it waits for a disk, "
            "a child of vfork, or the like; nothing was changed"
        )

    def _status(self, folder: str = "") -> dict[str, str]:
        text = self.handle.read(f"{folder}status").decode(errors="replace")
        return {k: v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}

    def _refuse(self) -> None:
        """Raise where a stop or a call would be another's business, or harm."""
        status = self._status()
        if status["State"][0] in "ZX":
            raise ProcessGone(f"{self._who} has ended")
        tracer = status.get("TracerPid", "0")
        if tracer not in {"0", str(os.getpid())}:
            raise Refused(
                f"{self._who} is traced by process {tracer}, a debugger or the like",
                "run it again once that has let go of it",
            )
        # The first word of the auxiliary vector is a small number: with 32-bit words, two of them.
        vector = (self.handle.read_or_none("auxv") or b"")[:8]
        if int.from_bytes(vector, sys.byteorder) >> 32:
            raise self._foreign()
        if self.suspend_seccomp:
            return
        # Each thread has a filter of its own.
        if status.get("Seccomp", "0") != "0" or any(
            self._status(f"task/{tid}/").get("Seccomp", "0") != "0" for tid in self._tids()
        ):
            raise Refused(
                f"{self._who} is under seccomp: a filter may kill it for a call that it does not "
                "expect",
                "have it call prctl(PR_SET_MEMORY_MERGE) itself, or start it with `dedup run`",
            )

    def _foreign(self) -> Refused:
        return Refused(
            f"{self._who} is a 32-bit program: its registers are other ones",
            "have it started with `dedup run -- CMD`, which needs no ptrace",
        )

    def _tids(self) -> list[int]:
        fd = self.handle.open("task", os.O_RDONLY | os.O_DIRECTORY)
        try:
            return sorted(int(name) for name in os.listdir(fd))
        finally:
            os.close(fd)

    def _shadow_stack(self) -> bool:
        """A return to an address that was never called from would be a fault."""
        return "shstk" in self._status().get("x86_Thread_features", "")

    def _threads(self, place: _Place) -> list[_Thread]:
        """Threads, the best one first: one whose wait the kernel takes up again by itself."""
        found = []
        for tid in self._tids():
            try:
                state = self._status(f"task/{tid}/").get("State", "X")[0]
                words = self.handle.read(f"task/{tid}/syscall").split()
            except ProcessGone:
                continue  # this thread has ended
            if state in "ZX" or not words:
                continue
            number, on_stack = -1, None
            if words[0] != b"running":
                number, pointer = int(words[0]), int(words[-2], 16)
                on_stack = any(
                    start <= pointer < end and (tid == self.handle.pid or kind != 1)
                    for start, end, kind in place.stacks
                )
            if number in self.architecture.sees_eintr:
                waits = 3
            elif number in self.architecture.may_see_eintr:
                waits = 2
            else:
                waits = 1 if words[0] == b"running" else 0
            found.append(_Thread(tid, (state == "D", waits, on_stack is not True), on_stack))
        if not found and not self.handle.alive():
            raise ProcessGone(f"{self._who} has ended")
        return sorted(found, key=lambda t: t.rank)

    def _place(self) -> _Place:
        place = _Place()
        code = []
        before_end, before_closed = 0, False
        for start, end, perms, offset, inode, name in _mappings(self.handle.read("maps")):
            if perms == "rw-p" and name == "[stack]":
                place.stacks.append((start, end, _core.INJECT_MAIN_STACK))
            elif perms == "rw-p" and inode == 0 and before_closed and before_end == start:
                place.stacks.append((start, end, _core.INJECT_THREAD_STACK))
            elif perms == "r-xp" and (inode or name == "[vdso]"):
                library = Path(name).name.startswith(("libc.", "libc-", "ld-", "libpthread"))
                code.append((not library, start, end, offset, name))
            before_end, before_closed = end, perms == "---p"
        a = self.architecture
        for _, start, end, offset, name in sorted(code):
            text = self._code(start, end, offset, name)
            place.bare = place.bare or _address(text, (a.syscall,), a.align, start)
            if a.restorers:
                place.gadget = place.gadget or _address(text, (a.syscall_return,), 1, start)
                place.restorer = place.restorer or _address(text, a.restorers, 1, start)
            if place.bare and (not a.restorers or (place.gadget and place.restorer)):
                break
        if not place.gadget:
            place.restorer = 0
        if not place.bare:
            self._require_same_memory(code[0][1] if code else 0)
        return place

    def _require_same_memory(self, address: int) -> None:
        """Raise where our `mem` reads nothing: it is of an address space that is no more."""
        try:
            same = bool(os.pread(self._mem, 1, address))
        except OSError:
            same = True  # nothing at this address, but an address space
        if not same:
            raise ProcessGone(f"{self._who} has ended, or begun another program (exec)")

    def _code(self, start: int, end: int, offset: int, name: str) -> bytes:
        # From the file where we may: the target's own page tables stay as they are then.
        if name != "[vdso]":
            try:
                fd = self.handle.open(f"map_files/{start:x}-{end:x}")
            except DedupError:
                pass  # CAP_SYS_ADMIN is missing, or it is gone meanwhile
            else:
                try:
                    return os.pread(fd, end - start, offset)
                finally:
                    os.close(fd)
        try:
            return os.pread(self._mem, end - start, start)
        except OSError:
            return b""  # not there any more


def _address(text: bytes, patterns: tuple[bytes, ...], align: int, start: int) -> int:
    """Address of the first pattern that is found, 0 where none is."""
    for pattern in patterns:
        at = text.find(pattern)
        while at >= 0 and at % align:
            at = text.find(pattern, at + 1)
        if at >= 0:
            return start + at
    return 0


_MAPPING: Final = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ (\d+) *(.*)$", re.MULTILINE
)


def _mappings(text: bytes) -> Iterable[tuple[int, int, str, int, int, str]]:
    for m in _MAPPING.finditer(text.decode(errors="surrogateescape")):
        yield int(m[1], 16), int(m[2], 16), m[3], int(m[4], 16), int(m[5]), m[6]


def _advice(suspend_seccomp: bool) -> str:
    """What to do about EPERM."""
    try:
        scope = YAMA.read_text().strip()
    except OSError:
        scope = ""
    if scope == "3":
        return (
            "kernel.yama.ptrace_scope=3 forbids it to everyone until the next boot: start the "
            "program with `dedup run -- CMD`"
        )
    if suspend_seccomp:
        return "to suspend seccomp takes CAP_SYS_ADMIN: `sudo dedup ...`"
    if scope in {"1", "2"}:
        return (
            f"kernel.yama.ptrace_scope={scope} leaves it to CAP_SYS_PTRACE: `sudo dedup ...` "
            "(in a container: `--cap-add SYS_PTRACE`)"
        )
    return "it takes CAP_SYS_PTRACE: `sudo dedup ...` (in a container: `--cap-add SYS_PTRACE`)"


def merge_any(
    handle: Handle,
    on: bool,
    *,
    again: Sequence[tuple[int, int]] = (),
    suspend_seccomp: bool = False,
    deadline_seconds: float = 1.0,
) -> list[Stop]:
    """Make all compatible memory of a process mergeable, future and children's included; or not.

    Off unmarks regions that the program had marked itself, too. Before, it unmerges piece by piece
    what the kernel would unmerge all within the one call.

    Parameters
    ----------
    handle : Handle
    on : bool
    again : sequence of (int, int)
        Ranges to mark mergeable right after: what the program had marked itself.
    suspend_seccomp, deadline_seconds
        See `Injection`.

    Returns
    -------
    list of Stop

    Raises
    ------
    NoMemory, ProcessGone, NotPermitted, Refused, NotStopped
    Unsupported
        No such prctl (before Linux 6.4, or without KSM), or see `Injection`.
    """
    with Injection(
        handle, suspend_seccomp=suspend_seccomp, deadline_seconds=deadline_seconds
    ) as injection:
        calls = []
        if not on:
            calls = [
                injection.madvise(start, end, MADV_UNMERGEABLE)
                for m in maps.read(handle)
                if "mg" in m.vm_flags and (m.ksm_bytes != 0 or m.anonymous_bytes > WALKED_BYTES)
                for start, end in _pieces(m.start, m.end)
            ]
        decisive = len(calls)
        calls.append(injection.prctl(PR_SET_MEMORY_MERGE, int(on)))
        calls += [injection.madvise(start, end, MADV_MERGEABLE) for start, end in again]
        _check(injection.run(calls)[decisive], "PR_SET_MEMORY_MERGE", handle)
        return injection.stops


def merges_any(
    handle: Handle, *, suspend_seccomp: bool = False, deadline_seconds: float = 1.0
) -> bool:
    """Whether all compatible memory of a process is mergeable: it is made to ask itself.

    For kernels whose ksm_stat does not tell. Raises as `merge_any` does.
    """
    with Injection(
        handle, suspend_seccomp=suspend_seccomp, deadline_seconds=deadline_seconds
    ) as injection:
        (result,) = injection.run([injection.prctl(PR_GET_MEMORY_MERGE, 0)])
        _check(result, "PR_GET_MEMORY_MERGE", handle)
        return bool(result)


def require_possible(handle: Handle, *, suspend_seccomp: bool = False) -> None:
    """Raise where no call could be put into a process, as far as that shows without a stop.

    Raises
    ------
    NoMemory, ProcessGone, NotPermitted, Refused, Unsupported
        See `Injection`.
    """
    with Injection(handle, suspend_seccomp=suspend_seccomp):
        pass


def _check(result: int, option: str, handle: Handle) -> None:
    if result >= 0:
        return
    if result == -errno.EINVAL:
        raise Unsupported(
            f"this kernel has no prctl({option}): it needs Linux 6.4 with KSM",
            "have the program call madvise(MADV_MERGEABLE) itself",
        )
    if result in {-errno.EPERM, -errno.EACCES}:
        raise NotPermitted(f"prctl({option}) is forbidden inside process {handle.pid}", "")
    raise Unsupported(
        f"prctl({option}) inside process {handle.pid} failed: {os.strerror(-result)}", ""
    )


def advise(
    handle: Handle,
    ranges: Sequence[tuple[int, int]],
    mergeable: bool,
    *,
    suspend_seccomp: bool = False,
    deadline_seconds: float = 1.0,
) -> Done:
    """Mark ranges of a process's memory mergeable, or not.

    As with `advise.mergeable` the kernel says "done" for memory that it then does not merge.

    Parameters
    ----------
    handle : Handle
    ranges : sequence of (int, int)
        First address and the one behind the last, page aligned.
    mergeable : bool
    suspend_seccomp, deadline_seconds
        See `Injection`.

    Returns
    -------
    Done

    Raises
    ------
    NoMemory, ProcessGone, NotPermitted, Refused, NotStopped, Unsupported
        See `Injection`; what the kernel says of a range is in the result.
    """
    advice = MADV_MERGEABLE if mergeable else MADV_UNMERGEABLE
    with Injection(
        handle, suspend_seccomp=suspend_seccomp, deadline_seconds=deadline_seconds
    ) as injection:
        pieces = [
            (which, piece)
            for which, (start, end) in enumerate(ranges)
            for piece in ([(start, end)] if mergeable else _pieces(start, end))
        ]
        results = injection.run([injection.madvise(*piece, advice) for _, piece in pieces])
        errors: list[int | None] = [None] * len(ranges)
        for (which, _), result in zip(pieces, results, strict=True):
            if result < 0 and errors[which] is None:
                errors[which] = -result
        return Done(errors, injection.stops)


def _pieces(start: int, end: int) -> Iterable[tuple[int, int]]:
    for at in range(start, end, UNMERGE_BYTES):
        yield at, min(at + UNMERGE_BYTES, end)
