"""ksmd kept running for as long as somebody wants it: several holders at once, the last puts back.

The file `ksmd` beside the journal says what `run` was before the first of them, and who they are.
A lock of its own guards it for the moments of a change; who also needs the host's lock takes that
one without waiting. Whoever holds the host's lock (`Tunables`) settles on its way in and out: so
a holder that was killed is put right by the next run of ours, or by `dedup restore`.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from dedup.change.journal import Journal, Restored
from dedup.errors import Busy, DedupError, NoSuchProcess, NotPermitted, OutputFailed
from dedup.kernel.ksm import RUN_MERGE, Ksm
from dedup.kernel.lock import (
    STATE,
    HostLock,
    cannot_open,
    make_state_folder,
    open_own,
    read_own,
)
from dedup.kernel.processes import Handle, require_own_proc
from dedup.pages import ProcessId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

NAME: Final = "ksmd"


@dataclass(slots=True)
class Holders:
    """Who wants ksmd to run, and what `run` was before the first of them came."""

    before: int | None
    """None where another run of ours was changing KSM just then: it settles when it is done."""
    holders: list[ProcessId] = field(default_factory=list)


class Hold:
    """Let ksmd run while the context lasts.

    Parameters
    ----------
    ksm : Ksm
    state : Path, optional
        Folder of lock and journal.

    Raises
    ------
    Unsupported, NotPermitted, OutputFailed
    """

    def __init__(self, ksm: Ksm, state: Path = STATE) -> None:
        self._ksm = ksm
        self._state = state
        self._me = _ourselves()
        self.waits = False
        """Another run of ours is changing KSM: ksmd runs once that is done."""

    def __enter__(self) -> Self:
        self._ksm.require()
        if not self._ksm.writable():
            raise NotPermitted(f"may not start ksmd: no right to write {self._ksm.root / 'run'}")
        with _locked(self._state):
            found = read(self._state) or Holders(None)
            found.holders = [*_living(found), self._me]
            _write(self._state, found)
            self._settle()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        with _locked(self._state):
            found = read(self._state)
            if found is None:
                return  # removed by hand: nothing says what to put back
            found.holders = [h for h in _living(found) if h != self._me]
            _write(self._state, found)
            self._settle()

    def keep(self) -> None:
        """Start ksmd now where it had to wait; cheap where it had not.

        Raises
        ------
        NotPermitted, OutputFailed
        """
        if self.waits:
            with _locked(self._state):
                self._settle()

    def _settle(self) -> None:
        from dedup.change import tunables

        host = HostLock(self._state)
        try:
            host.acquire()
        except Busy:
            # It settles when it is done, under our lock: so it has not looked yet.
            self.waits = (found := read(self._state)) is not None and found.before is None
            return
        try:
            Journal(self._state).restore(tunables.read_setting, tunables.write_setting)
            done = _settle(self._ksm, self._state)
        finally:
            host.release()
        self.waits = False
        if failed := [r for r in done if r.outcome == "failed"]:
            raise OutputFailed(
                f"could not put back {failed[0].path}={failed[0].value} ({failed[0].why})",
                "run `sudo dedup restore`",
            )


def settle(ksm: Ksm, state: Path = STATE, then: Callable[[], None] | None = None) -> list[Restored]:
    """Put `run` back where nobody wants ksmd any more; for whoever holds the host's lock.

    Parameters
    ----------
    ksm : Ksm
    state : Path, optional
    then : callable, optional
        Called under the same lock, whatever happens: it lets the host's lock go, so that a holder
        who finds that one taken knows that it will be settled.

    Returns
    -------
    list of Restored
        What was put back: one entry, or none.

    Raises
    ------
    NotPermitted, OutputFailed
    """
    try:
        if not (state / NAME).exists() and then is None:
            return []
        with _locked(state):
            try:
                return _settle(ksm, state)
            finally:
                if then is not None:
                    then()
    except BaseException:
        if then is not None:
            then()
        raise


def hand_over(state: Path, record: Callable[[int], None]) -> None:
    """Let `run` stay as the holders have it; for whoever holds the host's lock.

    Parameters
    ----------
    state : Path
    record : callable
        ``record(before)`` writes down what `run` was before them, since they forget it.

    Raises
    ------
    NotPermitted, OutputFailed
    """
    if not (state / NAME).exists():
        return
    with _locked(state):
        found = read(state)
        if found is None or found.before in {None, RUN_MERGE}:
            return
        assert found.before is not None
        record(found.before)
        _write(state, Holders(RUN_MERGE, found.holders))


def go_on(ksm: Ksm, state: Path, before: int) -> None:
    """Start ksmd again for its holders, after `run` was put back under them.

    For whoever holds the host's lock.

    Parameters
    ----------
    ksm : Ksm
    state : Path
    before : int
        What `run` was put back to: the last holder does the same.

    Raises
    ------
    NotPermitted, OutputFailed
    """
    if not (state / NAME).exists():
        return
    with _locked(state):
        found = read(state)
        if found is not None and found.before is not None and (living := _living(found)):
            _write(state, Holders(before, living))
            _start(ksm)


def planned(ksm: Ksm, state: Path, run: int | None = None) -> list[Restored]:
    """What `settle` would put back, without doing it.

    Parameters
    ----------
    ksm : Ksm
    state : Path
    run : int, optional
        What `run` will be by then; by default what it is.

    Raises
    ------
    NotPermitted, OutputFailed
    """
    found = read(state)
    if found is None or found.before is None or _living(found):
        return []
    return [_restored(ksm, found.before, _run(ksm) if run is None else run)]


def read(state: Path = STATE) -> Holders | None:
    """What the file says; None where there is none.

    Raises
    ------
    NotPermitted, OutputFailed
    """
    path = state / NAME
    try:
        data = json.loads(read_own(path))
        before = data["before"]
        if before is not None and type(before) is not int:
            raise TypeError
        return Holders(before, [ProcessId(int(p), int(s)) for p, s in data["holders"]])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as e:
        raise NotPermitted(f"may not read {path}: {e.strerror}") from e
    except OSError as e:
        raise OutputFailed(f"reading {path} failed: {e.strerror}", "") from e
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise OutputFailed(
            f"{path} can't be read",
            f"set /sys/kernel/mm/ksm/run as it should be, then remove {path}",
        ) from e


def _settle(ksm: Ksm, state: Path) -> list[Restored]:
    """Both locks are ours."""
    found = read(state)
    if found is None:
        return []
    living = _living(found)
    if living:
        if found.before is None:
            # On the disk before the change, so that a kill in between loses nothing.
            _write(state, Holders(_run(ksm), living))
            _start(ksm)
        elif living != found.holders:
            _write(state, Holders(found.before, living))
        return []
    done = []
    if found.before is not None:
        done = [_restored(ksm, found.before, _run(ksm))]
        if done[0].outcome == "restored":
            try:
                ksm.write("run", found.before)
            except DedupError as e:
                return [_restored(ksm, found.before, RUN_MERGE, why=e.message)]
    (state / NAME).unlink(missing_ok=True)
    return done


def _start(ksm: Ksm) -> None:
    if not ksm.running:
        ksm.write("run", RUN_MERGE)


def _restored(ksm: Ksm, before: int, found: int, why: str = "") -> Restored:
    path = str(ksm.root / "run")
    if why:
        return Restored(path, str(before), str(found), "failed", why)
    if found == before:
        return Restored(path, str(before), str(found), "unchanged")
    if found == RUN_MERGE:
        return Restored(path, str(before), str(found), "restored")
    return Restored(path, str(before), str(found), "left", "changed by somebody else since")


def _run(ksm: Ksm) -> int:
    return int(ksm.tunables()["run"])


def _living(found: Holders) -> list[ProcessId]:
    return [h for h in found.holders if _lives(h)]


def _lives(holder: ProcessId) -> bool:
    try:
        with Handle(holder.pid) as handle:
            return handle.id == holder and handle.alive()
    except NoSuchProcess:
        return False
    except NotPermitted:
        return True  # hidden from us, so there is one


def _ourselves() -> ProcessId:
    require_own_proc()
    with Handle(os.getpid()) as handle:
        return handle.id


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """Hold the lock of the file; others have it for milliseconds only."""
    make_state_folder(state)
    path = state / f"{NAME}.lock"
    try:
        fd = open_own(path, os.O_RDWR | os.O_CREAT)
    except PermissionError as e:
        raise NotPermitted(f"may not lock {path}: {e.strerror}") from e
    except OSError as e:
        raise cannot_open(path, e) from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _write(state: Path, found: Holders) -> None:
    path = state / NAME
    part = state / f"{NAME}.new"
    data: dict[str, Any] = {
        "before": found.before,
        "holders": [[h.pid, h.start_time] for h in found.holders],
    }
    try:
        fd = open_own(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.write(fd, json.dumps(data).encode() + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise OutputFailed(
            f"writing {path} failed: {e.strerror}; nothing was changed",
            "make room there, then run it again",
        ) from e
