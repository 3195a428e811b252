"""The known layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

Content = tuple[str, int]
"""What a page holds (`unique`, `zero`, or any word: the same in every process), how many."""
Rewrite = tuple[str, int, int]
"""What a forked child writes (`same`: the bytes that are there), first page, how many."""

SIZES: Final = (1, 2, 3, 255, 256, 257, 258, 512, 513, 1000)
"""Around the default `max_page_sharing` of 256."""


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """A region of a subject: `anon`, `shared`, `hugetlb`, `locked` or `huge`."""

    kind: str
    pages: tuple[Content, ...]


@dataclass(frozen=True, slots=True)
class SubjectSpec:
    """A process: its regions, and forked children with what each rewrites."""

    regions: tuple[RegionSpec, ...]
    forks: tuple[tuple[Rewrite, ...], ...] = ()
    keeps_writing: int | None = None
    """Region whose pages it rewrites all the time."""


@dataclass(frozen=True, slots=True)
class Write:
    """A later step: one page of the first subject written, then counted again."""

    page: int
    content: str


@dataclass(frozen=True, slots=True)
class Case:
    """One layout."""

    name: str
    subjects: tuple[SubjectSpec, ...]
    use_zero_pages: bool = False
    writes: tuple[Write, ...] = ()
    note: str = ""
    only_alone: bool = False
    """A zero page without a partner here finds one where others' zero pages are merged."""


def _anon(*pages: Content) -> RegionSpec:
    return RegionSpec("anon", pages)


def _one(*regions: RegionSpec, **more: object) -> tuple[SubjectSpec, ...]:
    return (SubjectSpec(regions, **more),)  # type: ignore[arg-type]


def _distinct(prefix: str, count: int) -> tuple[Content, ...]:
    return tuple((f"{prefix} {i}", 1) for i in range(count))


ARTICLE_NOTE: Final = (
    "three mappings of one page: pages_shared counts the page that stays (1), pages_sharing the "
    "mappings that it saves (2); a count of 3 adds the two"
)


def all_cases(huge_pages: int) -> list[Case]:
    """All layouts; `huge_pages` is the pages in a huge page, 0 where there are none."""
    mixed = (
        ("unique", 500),
        *((c, 2) for c, _ in _distinct("pair", 100)),
        *((c, 3) for c, _ in _distinct("triple", 50)),
        *((c, 20) for c, _ in _distinct("twenty", 10)),
        ("six hundred", 600),
    )
    cases = [
        Case(
            "article: three zero pages, then each written to",
            _one(_anon(("zero", 3))),
            writes=(Write(0, "unique"), Write(1, "unique"), Write(2, "unique")),
            note=ARTICLE_NOTE,
        ),
        *(Case(f"{n} equal pages", _one(_anon(("equal", n)))) for n in SIZES),
        Case("mixed groups", _one(_anon(*mixed))),
        Case(
            "two processes with the same 300 pages",
            _one(_anon(*_distinct("common", 300))) * 2,
        ),
        Case(
            "257 equal pages over three processes",
            tuple(SubjectSpec((_anon(("equal", n)),)) for n in (100, 100, 57)),
            note="the page beyond max_page_sharing that stays out is the last in scan order",
        ),
        Case("zero pages", _one(_anon(("zero", 100), ("twenty", 20), ("unique", 10)))),
        Case(
            "zero pages, use_zero_pages on",
            _one(_anon(("zero", 100), ("twenty", 20), ("unique", 10))),
            use_zero_pages=True,
        ),
        Case("one zero page, use_zero_pages on", _one(_anon(("zero", 1))), use_zero_pages=True),
        Case(
            "forked: 100 pages, three children",
            _one(_anon(*_distinct("fork", 100)), forks=((), (), ())),
            note="one frame shared by fork already: nothing to merge",
        ),
        Case(
            "forked, and separate copies in another process",
            (
                SubjectSpec((_anon(*_distinct("fork", 100)),), forks=((), (), ())),
                SubjectSpec((_anon(*_distinct("fork", 100)),)),
            ),
            note="pages_sharing counts 400 mappings, yet 100 frames are freed",
        ),
        Case(
            "forked: children rewrite half, each differently",
            _one(
                _anon(*_distinct("fork", 100)),
                forks=((("unique", 0, 50),), (("unique", 0, 50),), (("unique", 0, 50),)),
            ),
        ),
        Case(
            "forked: children rewrite half with the same bytes",
            _one(
                _anon(*_distinct("fork", 100)),
                forks=((("same", 0, 50),), (("same", 0, 50),), (("same", 0, 50),)),
            ),
        ),
        Case(
            "forked: 200 equal pages, three children",
            _one(_anon(("equal", 200)), forks=((), (), ())),
            note="forks of one frame beyond max_page_sharing: the order decides",
        ),
        Case("locked: 50 pairs", _one(RegionSpec("locked", (*_distinct("a", 50),) * 2))),
        Case(
            "shared memory does not merge",
            _one(RegionSpec("shared", (("equal", 20),)), _anon(("other", 2))),
        ),
        Case(
            "hugetlb pages do not merge",
            _one(RegionSpec("hugetlb", (("equal", huge_pages or 1),)), _anon(("other", 2))),
        ),
        Case(
            "pages rewritten all the time",
            _one(_anon(("equal", 100)), _anon(("unique", 64)), keeps_writing=1),
        ),
    ]
    if huge_pages:
        cases += _huge_cases(huge_pages)
    cases.append(_everything(huge_pages))
    return cases


def _huge(*pages: Content) -> RegionSpec:
    return RegionSpec("huge", pages)


def _huge_cases(n: int) -> list[Case]:
    return [
        Case("two huge pages, all different", _one(_huge(("unique", 2 * n)))),
        Case(
            "two equal huge pages",
            _one(_huge(*_distinct("huge", n)), _huge(*_distinct("huge", n))),
        ),
        Case(
            "two huge pages, a pair inside the first",
            _one(_huge(("a", 2), ("unique", 2 * n - 2))),
            note="a merge splits its huge page; the other one stays whole",
        ),
        Case(
            "a huge page with 100 zero pages",
            _one(_huge(("zero", 100), ("unique", n - 100))),
            note="the split maps zero pages to the shared zero page, outside KSM's books",
        ),
        Case(
            "a huge page with 100 zero pages, use_zero_pages on",
            _one(_huge(("zero", 100), ("unique", n - 100))),
            use_zero_pages=True,
        ),
        Case(
            "a huge page with 100 zero pages and a pair",
            _one(_huge(("zero", 100), ("a", 2), ("unique", n - 102))),
        ),
        Case(
            "a huge page with one zero page, and a plain one",
            _one(_huge(("zero", 1), ("unique", n - 1)), _anon(("zero", 1))),
            only_alone=True,
        ),
    ]


def _everything(n: int) -> Case:
    forked = (
        _anon(("unique", 200), ("equal", 60), *_distinct("common", 60)),
        RegionSpec("locked", (("equal", 10),)),
        RegionSpec("shared", (("equal", 10),)),
    )
    other: tuple[RegionSpec, ...] = (
        _anon(*_distinct("common", 60), ("equal", 40), ("zero", 30)),
        RegionSpec("locked", (("zero", 5),)),
    )
    if n:
        other += (_huge(("equal", 10), ("zero", 7), ("unique", n - 17)),)
    return Case(
        "everything at once, in two processes, one forked",
        (
            SubjectSpec(forked, forks=((("unique", 0, 20), ("same", 200, 20)),)),
            SubjectSpec(other),
        ),
    )
