"""Which mappings KSM accepts, and why not.

Source: mm/ksm.c, ksm_compatible() (`vma_ksm_compatible` before), and fs/proc/task_mmu.c,
show_smap_vma_flags(), for the two-letter names.
"""

from __future__ import annotations

from typing import Final

REFUSED: Final = {
    "sh": "shared between processes (VM_SHARED): its pages are no private copies",
    "ms": "may be shared (VM_MAYSHARE): its pages are no private copies",
    "ht": "hugetlb pages (VM_HUGETLB): KSM leaves them alone",
    "io": "memory-mapped I/O (VM_IO)",
    "pf": "raw frame numbers (VM_PFNMAP): no pages to merge",
    "mm": "mixed frames of a device (VM_MIXEDMAP)",
    "de": "special mapping of the kernel or a driver (VM_DONTEXPAND)",
    "dp": "droppable (VM_DROPPABLE): the kernel may drop its pages",
}
"""VmFlags that make a mapping ineligible, with the reason in words, the weightiest first."""

_REFUSED: Final = frozenset(REFUSED)

DAX_NAMES: Final = ("/dev/dax",)


def why_not(vm_flags: frozenset[str], name: str) -> str:
    """Why KSM would not accept a mapping; empty when it would.

    Parameters
    ----------
    vm_flags : frozenset of str
        The two-letter names of smaps.
    name : str
        What smaps calls the mapping.

    Returns
    -------
    str
    """
    if name == "[vsyscall]":
        return "the vsyscall page: no mapping of the process's own"
    if not _REFUSED.isdisjoint(vm_flags):
        return next(reason for flag, reason in REFUSED.items() if flag in vm_flags)
    if name.startswith(DAX_NAMES):
        return "direct access to a device (DAX)"
    return ""
