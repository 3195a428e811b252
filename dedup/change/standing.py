"""What makes memory mergeable for good: by systemd unit, by container, by QEMU guest.

Sources: systemd.exec(5) (MemoryKSM=), systemd.service(5) (ExecStart= and its prefixes),
systemd.unit(5) (drop-ins), cgroup paths as systemd makes them (slices, then the unit).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dedup.errors import NoSuchProcess, NotPermitted, OutputFailed, Unsupported
from dedup.kernel import maps
from dedup.kernel.processes import Handle, container_of
from dedup.model import eligibility, guests
from dedup.pages import Region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from dedup.kernel.processes import Info
    from dedup.kernel.systemd import Systemd
    from dedup.model.guests import Guest

NAME: Final = "50-dedup-ksm.conf"
MARK: Final = "# Written by `dedup standing`; `dedup standing --undo` removes it.\n"
SETTING: Final = MARK + "[Service]\nMemoryKSM=yes\n"
LONGEST: Final = 250
_UNIT: Final = re.compile(r"[A-Za-z0-9:_.\\@-]+\.service")
_USER_MANAGER: Final = re.compile(r"user@(\d+)\.service")
_CONTINUED: Final = re.compile(r"\\\n(?:[ \t]*[#;].*\n)*")
"""A line that goes on; comments in between don't end it."""
_PREFIX: Final = re.compile(r"[-@:+!|]*")
_ENDINGS: Final = (".service", ".scope", ".socket", ".mount", ".swap")

SERVICE, USER_SERVICE, SCOPE = "service", "user-service", "scope"
CONTAINER, GUEST, NONE = "container", "guest", "none"

CHECK_FIRST: Final = (
    "some builds of systemd 254 and 255 start no service that has MemoryKSM=yes: check with "
    "`sudo systemd-run --wait -p MemoryKSM=yes true` before the restart"
)
CONTAINER_WAYS: Final = (
    "in the image: make `dedup run --` the first words of the entrypoint; its children inherit it",
    "no setting of runc, crun, docker, podman or LXC for it is known to us",
)
SCOPE_WAYS: Final = (
    "a scope holds processes that somebody else started, and takes no MemoryKSM=",
    "start the program with `dedup run -- CMD`, or as a service",
)


@dataclass(frozen=True, slots=True)
class DropIn:
    """A file to write."""

    path: Path
    text: str


@dataclass(slots=True)
class Target:
    """Processes that one setting makes mergeable."""

    kind: str
    name: str
    processes: list[Info]
    drop_in: DropIn | None = None
    commands: tuple[str, ...] = ()
    """To type once the drop-in is there."""
    notes: tuple[str, ...] = ()
    guest: Guest | None = None
    uid: int = 0
    """Whose systemd it is."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a drop-in."""

    path: Path
    outcome: str
    """`written`, `unchanged`, `removed`, `absent` or `refused`."""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Ways:
    """What the targets are made from.

    Parameters
    ----------
    systemd : Systemd
    starts : bool, optional
        Whether a service with MemoryKSM=yes really starts here; None where nobody tried.
    program : str
        Words that run dedup, with its full path.
    unit_text : callable
        ``unit_text(unit)`` gives the unit's files, None where there are none.
    root : Path
        Of the system's files.
    """

    systemd: Systemd
    starts: bool | None
    program: str
    unit_text: Callable[[str], str | None]
    root: Path = field(default=Path("/"))


def unit_of(cgroup: str) -> tuple[str, int | None]:
    """Unit of a cgroup path, and the user whose own systemd has it.

    The first part that is no slice is the unit: whatever stands below was made by the service
    itself, and may bear any name.
    """
    parts = [p for p in cgroup.strip("/").split("/") if p]
    uid = None
    for part in parts:
        if part.endswith(".slice"):
            continue
        if uid is None and (m := _USER_MANAGER.fullmatch(part)):
            uid = int(m[1])
            continue
        return (part if part.endswith(_ENDINGS) else ""), uid
    return (f"user@{uid}.service", None) if uid is not None else ("", None)


def targets(infos: Iterable[Info], found: Mapping[int, Guest], ways: Ways) -> list[Target]:
    """Group processes by what makes them mergeable for good.

    Parameters
    ----------
    infos : iterable of Info
    found : mapping of int to Guest
        QEMU's guests by pid: see `find_guests`.
    ways : Ways
    """
    groups: dict[tuple[str, str, int], list[Info]] = {}
    for info in infos:
        groups.setdefault(_key(info, found), []).append(info)
    return [_target(*key, members, found, ways) for key, members in groups.items()]


def named(unit: str, ways: Ways) -> Target:
    """The target of a service of the system by its name, whether it runs or not."""
    return _target(SERVICE, unit if unit.endswith(_ENDINGS) else f"{unit}.service", 0, [], {}, ways)


def find_guests(infos: Iterable[Info]) -> dict[int, Guest]:
    """QEMU's guests among processes, by pid; one whose mappings are hidden is left out."""
    found = {}
    for info in infos:
        if not guests.is_qemu(info.name):
            continue
        try:
            with Handle(info.id.pid) as handle:
                words = [os.fsdecode(w) for w in handle.read("cmdline").split(b"\0")]
                regions = [_region(m) for m in maps.read(handle)]
        except (NoSuchProcess, NotPermitted, OutputFailed):
            continue
        found[info.id.pid] = guests.guest(regions, words)
    return found


def _region(m: maps.Mapping) -> Region:
    why = eligibility.why_not(m.vm_flags, m.name)
    return Region(0, m.start, m.end, m.perms, m.name, m.vm_flags, not why, why,
                  "mg" in m.vm_flags, True)  # fmt: skip


def _key(info: Info, found: Mapping[int, Guest]) -> tuple[str, str, int]:
    if info.id.pid in found:
        return GUEST, str(info.id.pid), info.uid
    unit, uid = unit_of(info.cgroup)
    container = container_of(info.cgroup)
    if container and not unit.startswith("systemd-nspawn@"):
        return CONTAINER, container, 0
    if unit.endswith(".service"):
        return (SERVICE, unit, 0) if uid is None else (USER_SERVICE, unit, uid)
    return (SCOPE, unit, uid or 0) if unit else (NONE, "", 0)


def _target(
    kind: str, name: str, uid: int, members: list[Info], found: Mapping[int, Guest], ways: Ways
) -> Target:
    target = Target(kind, name, members, uid=uid)
    if kind == GUEST:
        target.guest = found[int(name)]
        target.notes = target.guest.ways_out
    elif kind == CONTAINER:
        target.notes = CONTAINER_WAYS
    elif kind in {SERVICE, USER_SERVICE}:
        _service(target, ways)
    elif kind == SCOPE:
        target.notes = SCOPE_WAYS
    else:
        target.notes = ("start the program with `dedup run -- CMD`",)
    return target


def _service(target: Target, ways: Ways) -> None:
    if not _UNIT.fullmatch(target.name) or len(target.name) > LONGEST:
        target.notes = ("that is no name of a service",)
        return
    own = target.kind == USER_SERVICE
    if ways.systemd.knows_memory_ksm and ways.starts is not False:
        text: str | None = SETTING
        notes = [CHECK_FIRST] if ways.starts is None else []
    else:
        what = (
            "starts no service that has MemoryKSM=yes"
            if ways.systemd.knows_memory_ksm
            else "does not know MemoryKSM="
        )
        notes = [f"this systemd ({ways.systemd.version or 'unknown'}) {what}"]
        text, more = (None, "") if own else _wrapped(ways.unit_text(target.name), ways.program)
        notes.append(
            f"write ExecStart= anew with `{ways.program} run --` before its words{more}"
            if text is None
            else f"so the command is started by `dedup run`; the service must be allowed to read "
            f"{ways.program.split()[0]} (ProtectHome=, User=)"
        )
    if text is not None:
        folder = _own_folder(target.uid) if own else ways.root / "etc/systemd/system"
        target.drop_in = DropIn(folder / f"{target.name}.d" / NAME, text)
    ctl = "systemctl --user" if own else "systemctl"
    target.commands = (f"{ctl} daemon-reload", f"{ctl} restart {_quoted(target.name)}")
    target.notes = tuple(notes)


def _quoted(unit: str) -> str:
    return f"'{unit}'" if "\\" in unit else unit


def _own_folder(uid: int) -> Path:
    try:
        home = pwd.getpwuid(uid).pw_dir
    except KeyError:
        home = "~"
    return Path(home, ".config/systemd/user")


def _wrapped(unit_text: str | None, program: str) -> tuple[str | None, str]:
    """A drop-in that starts a unit's command by `dedup run`, or None and why not."""
    if unit_text is None:
        return None, " (its unit file was not found)"
    lines = []
    for command in exec_starts(unit_text):
        prefix = _PREFIX.match(command)
        marks = prefix[0] if prefix else ""
        if "@" in marks or "|" in marks:
            return None, f" (it begins with {marks})"
        lines.append(f"ExecStart={marks}{program} run -- {command[len(marks) :].lstrip()}\n")
    if not lines:
        return None, " (its unit file has none)"
    return MARK + "[Service]\nExecStart=\n" + "".join(lines), ""


def exec_starts(text: str) -> list[str]:
    """The values of ExecStart= in a unit's text; an empty one forgets those before it."""
    found: list[str] = []
    section = ""
    for line in map(str.strip, _CONTINUED.sub(" ", text).splitlines()):
        if line.startswith(("#", ";")):
            continue
        if line.startswith("["):
            section = line
        name, separator, value = line.partition("=")
        if section == "[Service]" and separator and name.strip() == "ExecStart":
            found = [*found, value.strip()] if value.strip() else []
    return found


def write(target: Target, *, force: bool = False, dry_run: bool = False) -> Outcome:
    """Write a target's drop-in, whole or not at all; never over a file of somebody else's.

    Raises
    ------
    Unsupported
        The target has none.
    NotPermitted, OutputFailed
    """
    drop_in = _drop_in(target)
    path = drop_in.path
    present = _read(path)
    if present == drop_in.text:
        return Outcome(path, "unchanged")
    if present is not None and not present.startswith(MARK) and not force:
        return Outcome(path, "refused", "the file is there and not ours: see `--force`")
    if target.kind == USER_SERVICE and target.uid != os.geteuid():
        return Outcome(path, "refused", "run it as that user, without sudo")
    if not dry_run:
        _replace(path, drop_in.text)
    return Outcome(path, "written")


def undo(target: Target, *, dry_run: bool = False) -> Outcome:
    """Remove a target's drop-in, if it is ours.

    Raises
    ------
    NotPermitted, OutputFailed
    """
    path = _drop_in(target).path
    present = _read(path)
    if present is None:
        return Outcome(path, "absent")
    if not present.startswith(MARK):
        return Outcome(path, "refused", "the file is not ours")
    if target.kind == USER_SERVICE and target.uid != os.geteuid():
        return Outcome(path, "refused", "run it as that user, without sudo")
    if not dry_run:
        try:
            path.unlink()
        except PermissionError as e:
            raise NotPermitted(f"may not remove {path}: {e.strerror}") from e
        except OSError as e:
            raise OutputFailed(f"removing {path} failed: {e.strerror}", "") from e
        with contextlib.suppress(OSError):  # others have drop-ins there
            path.parent.rmdir()
    return Outcome(path, "removed")


def _drop_in(target: Target) -> DropIn:
    if target.drop_in is None:
        raise Unsupported(f"there is no drop-in for {target.name or 'these processes'}", "")
    return target.drop_in


def _read(path: Path) -> str | None:
    """The text of a file, None where it is absent; a link counts as somebody else's."""
    if path.is_symlink():
        return ""
    try:
        return path.read_text(errors="surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as e:
        raise NotPermitted(f"may not read {path}: {e.strerror}") from e
    except OSError as e:
        raise OutputFailed(f"reading {path} failed: {e.strerror}", "") from e


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            with os.fdopen(fd, "w", errors="surrogateescape") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except PermissionError as e:
        raise NotPermitted(f"may not write {path}: {e.strerror}") from e
    except OSError as e:
        raise OutputFailed(f"writing {path} failed: {e.strerror}") from e


def chosen(pids: Sequence[int]) -> list[Info]:
    """The processes of pids, those that have ended meanwhile left out.

    Raises
    ------
    NoSuchProcess
        None is there any more.
    """
    found = []
    for pid in pids:
        try:
            with Handle(pid) as handle:
                handle.require_memory()
                found.append(handle.info)
        except (NoSuchProcess, NotPermitted):
            if len(pids) == 1:
                raise
    if not found:
        raise NoSuchProcess("none of the chosen processes has memory of its own")
    return found
