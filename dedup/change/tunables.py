"""The kernel's settings, changed for the time of a run: locked, journalled, put back."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from dedup.change import hold
from dedup.change.journal import STANDING, Entry, Journal, Restored
from dedup.errors import CheckFailed, NotPermitted, OutputFailed
from dedup.kernel import lock, processes
from dedup.kernel.ksm import ROOT, RUN_MERGE, Ksm
from dedup.kernel.lock import STATE, HostLock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

TUNERS: Final = ("ksmtuned", "uksmd")
"""Daemons that turn KSM's knobs."""

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""None of these may interrupt the putting back."""

DEFAULT_PAGES_TO_SCAN: Final = 100
"""To which the kernel goes back when its advisor is switched off."""

NR_HUGEPAGES: Final = "/proc/sys/vm/nr_hugepages"


def others_at_the_knobs(proc: Path = Path("/proc"), root: Path = ROOT) -> list[str]:
    """Who else turns KSM's knobs on this host: a sentence each, empty where nobody does."""
    found = []
    for pid in processes.pids(proc):
        try:
            name = (proc / str(pid) / "comm").read_bytes().decode(errors="replace").strip()
        except OSError:
            continue  # ended meanwhile
        if name in TUNERS:
            found.append(f"{name} (pid {pid}) changes KSM's tunables as it sees fit")
    ksm = Ksm(root)
    if ksm.present and ksm.tunables().get("advisor_mode") == "scan-time":
        found.append("the kernel's own advisor (advisor_mode=scan-time) sets pages_to_scan")
    return found


def changed_for_now(state: Path = STATE) -> list[str]:
    """What another run of ours has changed and will put back: a sentence, or nothing."""
    try:
        entries = planned_restore(state)
    except (NotPermitted, OutputFailed):
        return []  # the journal is root's
    names = ", ".join(dict.fromkeys(Path(e.path).name for e in entries))
    if not names:
        return []
    return [f"another run of dedup has changed {names} for the moment: figures are for that"]


def read_setting(path: str) -> str:
    """Present value of a setting in /sys or /proc/sys, as it would be written."""
    file = Path(path)
    if file.parent.name == "ksm":
        return str(Ksm(file.parent).tunables().get(file.name, ""))
    return file.read_text().strip()


def write_setting(path: str, value: str) -> None:
    """Write a setting.

    Raises
    ------
    NotPermitted, Unsupported, OutputFailed
    """
    file = Path(path)
    if file.parent.name == "ksm":
        Ksm(file.parent).write(file.name, value)
        return
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except PermissionError as e:
        raise NotPermitted(f"may not write {path}: {e.strerror}") from e
    except OSError as e:
        raise OutputFailed(f"writing {value} to {path} failed: {e.strerror}", "") from e


class Tunables:
    """Settings changed for a while; leaving the context puts them back, whatever happened.

    Entering takes the host's lock, and puts back first what a killed run has left.

    Parameters
    ----------
    ksm : Ksm
    state : Path, optional
        Folder of lock and journal.

    Raises
    ------
    Busy, NotPermitted, OutputFailed
    """

    def __init__(self, ksm: Ksm, state: Path = STATE) -> None:
        self.ksm = ksm
        self._state = state
        self._lock = HostLock(state)
        self._journal = Journal(state)
        self._standing = Journal(state, STANDING)
        self._wanted: dict[str, str] = {}
        self.leftover: list[Restored] = []
        """What an earlier, killed run had left changed; put back on entering."""
        self.restored: list[Restored] = []
        """What leaving the context put back."""

    def __enter__(self) -> Self:
        self.ksm.require()
        if not self.ksm.writable():
            raise NotPermitted(f"may not write KSM's tunables in {self.ksm.root}")
        self._lock.acquire()
        try:
            self.leftover = _put_back(self._journal, self.ksm, self._state)
            self.leftover += hold.settle(self.ksm, self._state)
            _require_done(self.leftover)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        # A second Ctrl-C must not stop us half-way.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.restored = _put_back(self._journal, self.ksm, self._state)
            if kind is None:
                _require_done(self.restored)
        finally:
            try:
                hold.settle(self.ksm, self._state, then=self._lock.release)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def set(self, name: str, value: int | str) -> None:
        """Change a tunable of KSM; nothing is written where it has the value already.

        Raises
        ------
        NotPermitted, Unsupported, OutputFailed
        """
        self.set_path(str(self.ksm.root / name), str(value))

    def set_path(self, path: str, value: str) -> None:
        """Change any setting, by its path."""
        before = read_setting(path)
        self._wanted[path] = value
        if before != value:
            self._journal.record(Entry(path, before, value))
            write_setting(path, value)

    def changes(self) -> list[Entry]:
        """What was changed so far, oldest first."""
        return self._journal.entries()

    def keep(self) -> list[Entry]:
        """Let all changes stay when the context is left, and give them; `undo` puts them back.

        Killed in it, `restore` puts them back, or the record is whole and `undo` does. ksmd that
        was to run stays so even if it ran before only because somebody held it.

        Raises
        ------
        NotPermitted, OutputFailed
            Nothing is kept then.
        """
        held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        run = str(self.ksm.root / "run")
        try:
            if self._wanted.get(run) == str(RUN_MERGE):
                hold.hand_over(
                    self._state,
                    lambda before: self._journal.record(Entry(run, str(before), str(RUN_MERGE))),
                )
            kept = self.changes()
            self._journal.move_to(self._standing)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        return kept

    def undo(self) -> list[Restored]:
        """Put back what earlier runs have kept.

        Raises
        ------
        NotPermitted, OutputFailed
        """
        held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            undone = _put_back(self._standing, self.ksm, self._state)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        _require_done(undone, "dedup tune --undo")
        return undone

    def require_unchanged(self) -> None:
        """Raise when somebody else changed a setting of ours meanwhile.

        Raises
        ------
        CheckFailed
        """
        for path, value in self._wanted.items():
            found = read_setting(path)
            if found != value:
                raise CheckFailed(
                    f"{path} was set to {value} and is {found} now: somebody else changes it",
                    "stop ksmtuned or whatever sets it, then run this again",
                )


def _put_back(journal: Journal, ksm: Ksm, state: Path) -> list[Restored]:
    """Restore a journal; ksmd runs on where somebody holds it."""
    done = journal.restore(read_setting, write_setting)
    for r in done:
        if (
            r.path == str(ksm.root / "run")
            and r.outcome == "restored"
            and r.value != str(RUN_MERGE)
        ):
            hold.go_on(ksm, state, int(r.value))
    return done


@contextmanager
def host_locked(state: Path = STATE, *, dry_run: bool = False) -> Iterator[None]:
    """Hold the host's lock without changing KSM; on leaving, settle for holders of ksmd that left.

    Parameters
    ----------
    state : Path, optional
    dry_run : bool
        Take no lock, since nothing could be settled then.

    Raises
    ------
    Busy, NotPermitted, OutputFailed
    """
    if dry_run:
        if (pid := lock.holder(state)) is not None:
            raise lock.busy(str(pid))
        yield
        return
    held = HostLock(state)
    held.acquire()
    try:
        yield
    finally:
        hold.settle(Ksm(), state, then=held.release)


def _require_done(restored: list[Restored], again: str = "dedup restore") -> None:
    failed = [r for r in restored if r.outcome == "failed"]
    if failed:
        what = ", ".join(f"{r.path}={r.value} ({r.why})" for r in failed)
        raise OutputFailed(f"could not put back {what}", f"run `sudo {again}`")


def restore(ksm: Ksm, state: Path = STATE) -> list[Restored]:
    """Put back what an interrupted run has left changed.

    Raises
    ------
    Busy, NotPermitted, OutputFailed
    """
    if not ksm.writable() and ksm.present:
        raise NotPermitted(f"may not write KSM's tunables in {ksm.root}")
    with HostLock(state) as held:
        done = _put_back(Journal(state), ksm, state)
        return done + hold.settle(ksm, state, then=held.release)


def planned_restore(state: Path = STATE) -> list[Restored]:
    """What `restore` would do, without doing it.

    Raises
    ------
    NotPermitted, OutputFailed
    """
    ksm = Ksm()
    done = _planned(Journal(state))
    for r in done:
        if r.path == str(ksm.root / "run"):
            return done + hold.planned(ksm, state, int(r.value if r.outcome != "left" else r.found))
    return done + hold.planned(ksm, state)


def planned_undo(state: Path = STATE) -> list[Restored]:
    """What `Tunables.undo` would do, without doing it.

    Raises
    ------
    NotPermitted, OutputFailed
    """
    return _planned(Journal(state, STANDING))


def _planned(journal: Journal) -> list[Restored]:
    written: dict[str, str] = {}

    def write(path: str, value: str) -> None:
        written[path] = value
        file = Path(path)
        if file.name == "advisor_mode" and value == "none":
            # The kernel does so itself (mm/ksm.c, set_advisor_defaults).
            written[str(file.with_name("pages_to_scan"))] = str(DEFAULT_PAGES_TO_SCAN)

    def read(path: str) -> str:
        return written[path] if path in written else read_setting(path)

    return journal.restore(read, write, dry_run=True)
