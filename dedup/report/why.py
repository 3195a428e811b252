"""Why KSM saves no more: where each byte goes, and the contents that free the most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from dedup.model import explain
from dedup.model.eligibility import REFUSED
from dedup.model.explain import FREED, End
from dedup.sources import again

if TYPE_CHECKING:
    from dedup.model.explain import Content
    from dedup.pages import Region
    from dedup.scanning import Scan

WORDS: Final = {
    "duplicate": "copies of other pages: merged and freed",
    "constant": "one value repeated throughout the page: merged and freed",
    "zero": "all-zero pages: merged and freed",
    "zero_in_huge_page": "all-zero pages inside huge pages, mostly rounding that nobody wrote: "
    "freed when ksmd splits the huge pages",
    "kept": "the one copy of each content that stays for all to share",
    "outside": "copies on frames that processes outside this scan map too: those stay",
    "fork": "shared since a fork: one frame already, nothing to gain",
    "hidden": "copies, or one frame already (fork, KSM): frame numbers are hidden without root",
    "ksm": "merged by KSM already",
    "unique": "unique: no other page is like it",
    "volatile": "volatile: the content changed between the looks",
    "new": "new: not there at the first look",
    "unread": "present, but could not be read",
    "gone": "gone before the last look",
    "swapped": "swapped out: KSM merges only what is in memory",
    "out_of_scope": "not marked mergeable, so left out (--scope advised)",
    "not_eligible": "KSM refuses these mappings",
    "file": "unchanged pages of files: one copy in the page cache already",
    "zero_page": "never written, only read: the shared zero page, which takes no memory",
    "left_out": "processes that could not be looked at",
}
"""What becomes of a page, in words, by the code of the JSON."""

HIDDEN_IN_FILES: Final = (
    "copies, or one frame already (fork): files hold no frame numbers, and two processes have the "
    "same at the same address"
)

NOT_READ_AGAIN: Final = (
    "unique: no other page was like it when it was read, mostly at the first look"
)
"""Of unique pages, where later looks read only what would merge."""

PLACES: Final = {code: i for i, code in enumerate(WORDS)}

NO_MEMORY: Final = frozenset({"zero_page", "gone"})
"""Codes of pages that take no memory."""
FREED_CODES: Final = frozenset(e.name.lower() for e in FREED)
KERNELS_OWN: Final = frozenset({"[vvar]", "[vvar_vclock]", "[vdso]", "[vsyscall]"})
"""Mappings that every process has of the kernel."""
NOTHING: Final = "no memory of its own: never written to"


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the memory, and what becomes of it."""

    code: str
    words: str
    pages: int | None
    """None where the number is not known."""
    flag: str | None = None
    """The VmFlag that makes KSM refuse it."""


@dataclass(frozen=True, slots=True)
class Top:
    """A content that frees much."""

    content: Content
    looks_like: str | None
    """None where its processes have ended."""


@dataclass(slots=True)
class Why:
    """Where everything goes.

    Parameters
    ----------
    scan : Scan
    top : int
        Contents wanted, with a look at a page of each.
    """

    scan: Scan
    top: int = 0
    by_region: list[dict[str, int | None]] = field(init=False)
    """Pages by code, the most first; what is empty is left out, None is not known."""
    whole: list[Part] = field(init=False)
    contents: list[Top] = field(init=False)

    def __post_init__(self) -> None:
        scan = self.scan
        found = explain.explain(scan.pages, scan.groups, scan.rules, self.top)
        zero = again.zero_pages(scan.pages)
        self.by_region = [
            self._region(region, counts, n)
            for region, counts, n in zip(
                scan.pages.regions, found.pages.tolist(), zero, strict=True
            )
        ]
        self.whole = self._whole()
        read = [c for c in found.contents if not c.constant]
        looks = iter(again.looks_like(scan.pages, [c.samples for c in read], scan.seed))
        self.contents = [
            # What the scan saw of zero and constant pages needs no second look.
            Top(c, "zero" if c.zero else "constant" if c.constant else next(looks))
            for c in found.contents
        ]

    def _region(self, region: Region, counts: list[int], zero: int | None) -> dict[str, int | None]:
        size = self.scan.pages.page_size
        anonymous, resident = region.anonymous_bytes // size, region.resident_bytes
        parts: dict[str, int | None] = {e.name.lower(): counts[e] for e in End}
        if not region.eligible:
            # What is not private is not among the anonymous bytes.
            shared = "p" not in region.perms
            rest = None if shared else anonymous
            parts["not_eligible"] = rest if resident is None else resident // size
        else:
            parts["swapped"] = region.swap_bytes // size
            parts["out_of_scope"] = 0 if region.scanned else anonymous
            if resident is not None:
                parts["file"] = max(0, resident // size - anonymous)
            parts["zero_page"] = zero
        some = {code: n for code, n in parts.items() if n != 0}
        return dict(sorted(some.items(), key=lambda part: _weight(*part)))

    def by_process(self) -> list[dict[str, int | None]]:
        """The same by process."""
        sums: list[dict[str, int | None]] = [{} for _ in self.scan.pages.processes]
        for region, parts in zip(self.scan.pages.regions, self.by_region, strict=True):
            mine = sums[region.process]
            for code, n in parts.items():
                before = mine.get(code, 0)
                mine[code] = None if before is None or n is None else before + n
        return [dict(sorted(s.items(), key=lambda part: _weight(*part))) for s in sums]

    def _whole(self) -> list[Part]:
        sums: dict[tuple[str, str, str | None], int | None] = {}
        for region, parts in zip(self.scan.pages.regions, self.by_region, strict=True):
            if region.name in KERNELS_OWN:
                continue
            for code, n in parts.items():
                refused = code == "not_eligible"
                words = region.why if refused else self._words(code)
                key = (code, words, flag_of(region) if refused else None)
                before = sums.get(key, 0)
                sums[key] = None if before is None or n is None else before + n
        if any(s.amiss for s in self.scan.pages.skipped):
            sums["left_out", WORDS["left_out"], None] = None
        parts_of = [Part(code, words, n, flag) for (code, words, flag), n in sums.items()]
        return sorted(parts_of, key=lambda part: _weight(part.code, part.pages))

    def reason(self, region: int) -> str:
        """Why KSM refuses a region, else what becomes of the most of it, in words."""
        where = self.scan.pages.regions[region]
        if not where.eligible:
            return where.why
        known = [code for code, n in self.by_region[region].items() if n is not None]
        memory = [code for code in known if code not in NO_MEMORY]
        return next((self._words(code) for code in (*memory, *known)), NOTHING)

    def _words(self, code: str) -> str:
        stored = code == "hidden" and self.scan.pages.stored
        if code == "unique" and self.scan.read_again_pages is not None:
            return NOT_READ_AGAIN
        return HIDDEN_IN_FILES if stored else WORDS[code]

    def processes_of(self, content: Content) -> list[tuple[int, int]]:
        """Processes (indices) with a content and the pages in each, the most first."""
        sums: dict[int, int] = {}
        for region, n in content.regions:
            process = self.scan.pages.regions[region].process
            sums[process] = sums.get(process, 0) + n
        return sorted(sums.items(), key=lambda item: (-item[1], item[0]))

    def names_of(self, content: Content) -> list[tuple[str, int]]:
        """Names of regions with a content and the pages in each, the most first."""
        sums: dict[str, int] = {}
        for region, n in content.regions:
            name = self.scan.pages.regions[region].name
            sums[name] = sums.get(name, 0) + n
        return sorted(sums.items(), key=lambda item: (-item[1], item[0]))


def _weight(code: str, pages: int | None) -> tuple[int, int]:
    """The most first; of equals, in the order of the words."""
    return -(pages or 0), PLACES[code]


def flag_of(region: Region) -> str | None:
    """The VmFlag for which KSM refuses a region; None where it is its name."""
    return next((flag for flag in REFUSED if flag in region.vm_flags), None)
