"""The mappings of a process: from smaps, or without it where a cheaper way says the same.

For smaps the kernel walks every page, some 40 ns each, before it shows VmFlags and sizes: a tenth
of a scan of small pages, and a thread of its own can't do it earlier. Of most processes all that
decides about KSM can be known without, and pages are counted by the look itself:

- /proc/PID/ksm_stat tells that no mapping is mergeable;
- nothing is locked (VmLck), and nothing swapped on the whole host;
- private anonymous memory has none of the VmFlags that KSM refuses but VM_DROPPABLE, whose pages
  are not swap-backed (mm/rmap.c, folio_add_new_anon_rmap): kpageflags shows it of any page;
- private mappings of files of ordinary file systems have none either, devices apart;
- shared mappings are refused in any case: by VM_SHARED, if the file is open for writing
  (mm/mmap.c, do_mmap), else by VM_MAYSHARE.

With a mapping of another kind, or many huge pages, it is smaps.
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup import _core
from dedup.errors import NotPermitted
from dedup.kernel import maps, meminfo, mounts, pagemap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dedup.kernel.ksm import ProcessCounters
    from dedup.kernel.pagemap import Sight
    from dedup.kernel.processes import Handle
    from dedup.pages import I64, U64, Bool

LEAST_BYTES: Final = 64 << 20
"""Of less memory, smaps is made as fast as what stands here."""
MOST_MAPPINGS: Final = 4096
"""Of more, smaps is made faster for each than calls for each."""
SMALL_BYTES: Final = 256 << 10
"""A mapping of less is counted together with its neighbours."""
DENSE: Final = 0.5
"""So much of the private anonymous mappings must be there: else their holes cost more."""
ORDINARY: Final = frozenset({
    "btrfs", "erofs", "ext2", "ext3", "ext4", "f2fs", "overlay", "squashfs", "tmpfs", "xfs",
})  # fmt: skip
"""File systems whose files are mapped without VmFlags of devices."""
HUGE_MOST: Final = 1 / 8
"""Of the private anonymous memory, huge pages mapped as one: here they are read more slowly."""
TWICE_MOST: Final = 1 / 2
"""The same, mappings with any such page: they are walked here, and again when they are read."""
KERNELS_OWN: Final = {
    b"[vdso]": frozenset({"de"}),
    b"[vvar]": frozenset({"io", "pf", "de"}),
    b"[vvar_vclock]": frozenset({"io", "pf", "de"}),
    b"[vsyscall]": frozenset[str](),
}
WITHOUT_PAGES: Final = frozenset({"[vvar]", "[vvar_vclock]", "[vsyscall]"})
"""What lies there is no page of its own to smaps."""
_ANONYMOUS: Final = re.compile(
    rb"^(([0-9a-f]+)-([0-9a-f]+)) (...)p [0-9a-f]+ 00:00 0 *(?:\[(?:heap|stack|anon:.*)\])?$",
    re.MULTILINE,
)
"""A private anonymous mapping in /proc/PID/maps: where it lies, begins and ends, and its access."""
NO_ACCESS: Final = b"---"
SHARED_MEMORY: Final = b"/dev/zero (deleted)"
"""Shared anonymous memory: on a tmpfs that is mounted nowhere."""


def of(
    handle: Handle, counters: ProcessCounters | None, sight: Sight, *, countable: bool,
    within: tuple[int, int] = maps.EVERYWHERE,
) -> list[maps.Mapping]:  # fmt: skip
    """All mappings of a process, ascending by address.

    Parameters
    ----------
    handle : Handle
    counters : ProcessCounters or None
        Of its ksm_stat.
    sight : Sight
    countable : bool
        Whether the caller counts the pages of mappings whose sizes are not told here
        (`Mapping.counted` False).
    within : pair of int, optional
        First address and the one behind the last: only mappings that reach into it.

    Raises
    ------
    ProcessGone, NotPermitted
    Unsupported
        The kernel shows no VmFlags.
    """
    # With huge pages of all sizes it matters whether relatives share any, which smaps tells.
    visible = sight.kpageflags and sight.pagemap_scan and not sight.every_folio
    if countable and visible and _quiet(handle, counters):
        try:
            found = _without_smaps(handle, sight, within)
        except (OSError, NotPermitted):
            found = None  # smaps, which is asked for next, tells what is wrong
        if found is not None:
            return found
    return maps.read(handle, within)


def _quiet(handle: Handle, counters: ProcessCounters | None) -> bool:
    """Whether the process is worth it, and has nothing that only smaps tells by mapping."""
    info = handle.info
    return (
        info.anonymous_bytes >= LEAST_BYTES
        and info.locked_bytes == 0
        and counters is not None
        and counters.ksm_mergeable is False
        and counters.ksm_merge_any is False
        and counters.ksm_merging_pages == 0
        and info.swapped_bytes == 0
        and meminfo.swap_used_bytes() == 0
    )


def _without_smaps(
    handle: Handle, sight: Sight, within: tuple[int, int]
) -> list[maps.Mapping] | None:
    """The mappings by /proc/PID/maps and pagemap; None where that does not tell enough."""
    text = handle.read("maps")
    if text.count(b"\n") > MOST_MAPPINGS:
        return None
    fd = handle.open("pagemap")
    try:
        anonymous = _ANONYMOUS.findall(text)
        # At once, since it is what mostly decides: most of it will be huge pages, too.
        if _begins_huge(fd, *_largest(anonymous, within), sight):
            return None
        access = {where: how for where, _, _, how in anonymous}
        return _listed(handle, fd, text, access, sight, within)
    finally:
        os.close(fd)


def _largest(
    anonymous: Sequence[tuple[bytes, bytes, bytes, bytes]], within: tuple[int, int]
) -> tuple[int, int]:
    """Start and end of the largest private anonymous mapping with access; (0, 0) for none."""
    low, high = within
    spans = ((int(a, 16), int(b, 16)) for _, a, b, how in anonymous if how != NO_ACCESS)
    inside = ((max(a, low), min(b, high)) for a, b in spans)
    return max(inside, key=lambda span: span[1] - span[0], default=(0, 0))


def _listed(
    handle: Handle, fd: int, text: bytes, access: Mapping[bytes, bytes], sight: Sight,
    within: tuple[int, int],
) -> list[maps.Mapping] | None:  # fmt: skip
    """The mappings in the text of maps; None where they can't be known so.

    `access` has those that are private and anonymous.
    """
    # Not splitlines: the kernel writes \012 for a line break in a name, and \r as it is.
    lines = text.split(b"\n")[:-1]
    low, high = within
    nothing = frozenset[str]()
    found: list[maps.Mapping] = []
    plain: list[int] = []
    """Indices of private anonymous mappings with access: their pages are counted later."""
    bare: list[int] = []
    """Those that might be droppable: private and anonymous."""
    rest: list[tuple[int, bytes, bytes, bytes, bytes, bytes]] = []
    for line in lines:
        where, perms, _, device, inode, name = line.split(b" ", 5)
        first, _, last = where.partition(b"-")
        start, end = int(first, 16), int(last, 16)
        if end <= low or start >= high:
            continue
        if found and start < found[-1].end:
            return None  # shown twice, for it grew meanwhile: `maps.parse` knows what to do
        name, i = name.lstrip(b" "), len(found)
        found.append(maps.mapping(start, end, perms, name, nothing))
        how = access.get(where)
        if how is None:
            rest.append((i, where, perms, device, inode, name))
            continue
        bare.append(i)
        if how != NO_ACCESS and end - start >= SMALL_BYTES:
            plain.append(i)
    sizes = sum(found[i].end - found[i].start for i in plain)
    if not plain or sizes * DENSE > handle.info.anonymous_bytes:
        return None
    file_systems = mounts.file_systems(handle)
    regular: set[tuple[bytes, ...]] = set()
    for i, where, perms, device, inode, name in rest:
        flags = _flags(handle, where, perms, device, inode, name, file_systems, regular)
        if flags is None:
            return None
        if flags:
            found[i] = found[i]._replace(vm_flags=flags)
    huge = _huge_if_kept(fd, [found[i] for i in bare], sight)
    if huge is None:
        return None
    with_huge = {i for i, has in zip(bare, huge, strict=True) if has}
    if sum(found[i].end - found[i].start for i in with_huge) > TWICE_MOST * sizes:
        return None
    for i in plain:
        m = found[i]
        size = m.end - m.start
        if i not in with_huge:
            found[i] = m._replace(anonymous_bytes=size, resident_bytes=size, counted=False)
    found = _counted(fd, found)
    huge_bytes = sum(m.anon_huge_bytes for m in found)
    return found if huge_bytes <= HUGE_MOST * sizes else None


def _flags(
    handle: Handle, where: bytes, perms: bytes, device: bytes, inode: bytes, name: bytes,
    file_systems: Mapping[tuple[int, int], str], regular: set[tuple[bytes, ...]],
) -> frozenset[str] | None:  # fmt: skip
    """Those VmFlags of a mapping that KSM refuses; None where they can't be known.

    `regular` holds the files that were found to be no devices: one file has many mappings.
    """
    if inode == b"0":
        return KERNELS_OWN.get(name)
    major, _, minor = device.partition(b":")
    if file_systems.get((int(major, 16), int(minor, 16))) not in ORDINARY:
        if name != SHARED_MEMORY or not perms.endswith(b"s"):
            return None
    elif (device, inode, name) not in regular:
        if not _is_regular(handle, where):
            return None
        regular.add((device, inode, name))
    if not perms.endswith(b"s"):
        return frozenset()
    if not perms.startswith(b"rw") and not _opened_for_writing(handle, where):
        return frozenset({"ms"})
    return frozenset({"sh", "ms"})


def _is_regular(handle: Handle, where: bytes) -> bool:
    """Whether a mapped file is no device: their nodes may lie in any file system."""
    return stat.S_ISREG(os.stat(b"map_files/" + where, dir_fd=handle.dir_fd).st_mode)


def _opened_for_writing(handle: Handle, where: bytes) -> bool:
    """Whether the file of a mapping was opened so: the link has the rights of the open file."""
    link = os.stat(b"map_files/" + where, dir_fd=handle.dir_fd, follow_symlinks=False)
    return bool(link.st_mode & stat.S_IWUSR)


def _begins_huge(fd: int, start: int, end: int, sight: Sight) -> bool:
    """Whether the first huge page's worth of a span, at a multiple of it, is mapped as one."""
    if not sight.huge_bytes:
        return False
    start = -(-start // sight.huge_bytes) * sight.huge_bytes
    one = start + sight.page_size
    return one <= end and bool(np.any(pagemap.present_ranges(fd, start, one)[:, 2]))


def _huge_if_kept(fd: int, some: Sequence[maps.Mapping], sight: Sight) -> Bool | None:
    """Which have a huge page mapped as one; None if one might be droppable.

    A page whose memory its process has given back lazily (MADV_FREE) looks like a droppable one.
    Of a mapping without pages nothing depends on it.
    """
    words, huge = _core.first_present(
        fd,
        np.array([m.start for m in some], np.uint64),
        np.array([m.end for m in some], np.uint64),
        sight.huge_bytes,
        sight.page_size,
    )
    frames = (words & np.uint64(pagemap.PFN_MASK)).astype(np.int64)
    kinds = pagemap.flags_of(np.sort(frames[frames != 0]))
    return huge if np.all(kinds & np.uint64(pagemap.KPF_SWAPBACKED)) else None


def _counted(fd: int, found: list[maps.Mapping]) -> list[maps.Mapping]:
    """With the pages of mappings counted that nobody else counts."""
    rows = np.concatenate(
        [np.empty((0, 3), np.uint64)]
        + [
            pagemap.kinds_of_ranges(fd, found[first].start, found[last].end)
            for first, last in _stretches(found)
        ]
    )
    which = [i for i, m in enumerate(found) if m.counted and m.name not in WITHOUT_PAGES]
    bounds = np.array([(found[i].start, found[i].end) for i in which], np.uint64).reshape(-1, 2)
    own = (rows[:, 2] & np.uint64(_core.PAGE_IS_FILE)) == 0
    huge = (rows[:, 2] & np.uint64(_core.PAGE_IS_HUGE)) != 0
    sizes = [_inside(part, bounds) for part in (rows, rows[own], rows[own & huge])]
    for i, resident, anonymous, as_one in zip(which, *sizes, strict=True):
        found[i] = found[i]._replace(
            anonymous_bytes=anonymous,
            anon_huge_bytes=as_one,
            resident_bytes=resident,
        )
    return found


def _inside(ranges: U64, bounds: U64) -> list[int]:
    """Bytes of some ranges, ascending and apart, within each pair of bounds."""
    if not len(ranges):
        return [0] * len(bounds)
    start, end = ranges[:, 0].astype(np.int64), ranges[:, 1].astype(np.int64)
    before = np.cumsum(end - start) - (end - start)

    def below(address: I64) -> I64:
        at = np.searchsorted(start, address, "right") - 1
        inside = np.minimum(address, end[at]) - start[at]
        return np.where(at < 0, 0, before[at] + inside)

    low, high = bounds.astype(np.int64).T
    return (below(high) - below(low)).tolist()  # type: ignore[no-any-return]


def _stretches(found: Sequence[maps.Mapping]) -> Iterator[tuple[int, int]]:
    """First and last index of mappings in a row that are counted here."""
    first = None
    for i, m in enumerate(found):
        counted = m.counted and m.name not in WITHOUT_PAGES
        if counted and first is None:
            first = i
        if not counted and first is not None:
            yield first, i - 1
            first = None
    if first is not None:
        yield first, len(found) - 1
