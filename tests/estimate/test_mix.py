"""Several services together, against counting by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.estimate.curve import Service
from dedup.estimate.domains import domains
from dedup.estimate.fingerprints import Instance
from dedup.estimate.instances import Incidence
from dedup.estimate.rules import Rules

from .build import counted, instance
from .test_instances import rows, rules, two_peaks


def labelled(instances: list[Instance], label: str, **facts: Any) -> list[Instance]:
    return [
        replace(i, facts=replace(i.facts, label=label, instance=f"{label}{n}", **facts))
        for n, i in enumerate(instances)
    ]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[Instance], list[Instance]]:
    zero = draw(st.sampled_from([None, 0, 7]))
    found = []
    for label in ("a", "b"):
        layouts = draw(st.lists(rows(), min_size=1, max_size=3))
        found.append(labelled([instance(i, r, zero=zero) for i, r in enumerate(layouts)], label))
    return found[0], found[1]


@given(pairs(), rules)
def test_what_was_seen_of_two_services_is_exact(
    services: tuple[list[Instance], list[Instance]], rules: Rules
) -> None:
    a, b = services
    i = Incidence([*a, *b], rules, [len(a), len(b)])
    for n, m in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        every = [
            counted([*s, *t], rules)
            for s in itertools.combinations(a, n)
            for t in itertools.combinations(b, m)
        ]
        (found,) = i.at(np.array([[n, m]]))
        assert found.frames == pytest.approx(mean(every))
        assert (found.low, found.high) == (min(every), max(every))


def peaks(n: int, shared: int, common: int, own: int, number: int) -> list[Instance]:
    """Instances of a service: what all services have, what all its own have, and each its own."""
    base = number * 1_000_000
    return labelled(
        [
            instance(
                i,
                {
                    **dict.fromkeys(range(common), (1, 1)),
                    **dict.fromkeys(range(base + 1000, base + 1000 + shared), (1, 1)),
                    **{base + 10_000 + 100 * i + c: (1, 1) for c in range(own)},
                },
            )
            for i in range(n)
        ],
        f"service-{number}",
    )


@given(
    st.lists(st.tuples(st.integers(3, 4), st.integers(5, 25), st.integers(0, 20),
                       st.integers(0, 20)), min_size=1, max_size=3),
    st.integers(0, 20), st.integers(2, 40),
)  # fmt: skip
def test_mixes_go_on_exactly(
    layouts: list[tuple[int, int, int, int]], common: int, sharing: int
) -> None:
    """Each content is everywhere, in a service, or in an instance: with chains, to the page."""
    limits = Rules(sharing)
    seen, wanted, mix = [], [], {}
    for number, (k, n, shared, own) in enumerate(layouts, 1):
        seen += peaks(k, shared, common, own, number)
        wanted += peaks(n, shared, common, own, number)
        mix[f"service-{number}"] = n
    service = Service(seen, limits, mix)
    point = service.curve(1)[0]
    assert point.frames == counted(wanted, limits)
    assert point.low_frames <= point.frames <= point.high_frames
    assert point.without_ksm_frames == sum(len(i.contents) for i in wanted)
    # Chains of what several services have are those of all mappings together.
    alone = [
        Service([i for i in seen if i.facts.label == label], limits, {label: n}).curve(1)[0].frames
        for label, n in mix.items()
    ]
    assert point.frames <= sum(alone)


def test_what_another_service_has_is_not_new() -> None:
    # Of 30 pages that each instance of a has alone, 10 are in all of b as well.
    a = labelled(
        [instance(i, dict.fromkeys(range(100 * i, 100 * i + 30), (1, 1))) for i in range(3)], "a"
    )
    b_rows = {c: (1, 1) for i in range(3) for c in range(100 * i, 100 * i + 10)}
    b = labelled([instance(9 + i, b_rows) for i in range(3)], "b")
    i = Incidence([*a, *b], Rules(), [3, 3])
    (found,) = i.at(np.array([[5, 3]]))
    assert found.frames == pytest.approx(90 + 2 * 20)
    assert i.private.tolist() == [20] * 3 + [0] * 3
    assert i.private_within(0).tolist() == [30] * 3


def test_services_with_few_instances_in_a_mix() -> None:
    one = labelled(two_peaks(1, 50, 5), "one")
    three = labelled(two_peaks(3, 50, 7, first=50), "three")
    service = Service([*one, *three], Rules(), {"one": 4, "three": 4})
    point = service.curve(1)[0]
    # What is certain of one's further instances: nothing, though three has its shared pages.
    assert point.frames == 50 + 5 + 3 * 55 + 4 * 7
    assert point.low_frames <= 50 + 5 + 4 * 7
    assert not service.incidence.bounded(0)
    assert service.incidence.bounded(1)
    two = Service([*labelled(two_peaks(2, 50, 5), "two"), *three], Rules(), {"two": 4, "three": 4})
    point = two.curve(1)[0]
    assert point.frames == 50 + 4 * 5 + 4 * 7
    assert point.high_frames >= point.frames + 2 * 50


def test_the_rest_of_a_mix_adds_up() -> None:
    a = labelled(two_peaks(3, 10, 1), "a", page_table_bytes=1000, file_bytes=7)
    b = labelled(two_peaks(3, 10, 2, first=20), "b", page_table_bytes=300, file_bytes=20)
    service = Service([*a, *b], Rules(), {"a": 4, "b": 5})
    assert service.rest.each_bytes == 4 * 1000 + 5 * 300
    assert service.rest.once_bytes == 27
    (p,) = service.curve(1)
    assert p.frames == 10 + 4 * 1 + 5 * 2
    assert p.without_ksm_bytes == (4 * 11 + 5 * 12) * 4096 + service.rest.each_bytes + 27
    load = service.load(p)
    assert load.rmap_items == 4 * 11 + 5 * 12
    assert (load.pages_shared, load.pages_unshared) == (10, 14)


def found(seen: list[Instance], mix: dict[str, int], use: bool = False) -> dict[str, int | None]:
    r = Rules(use_zero_pages=use)
    service = Service(seen, r, mix)
    parts = [Service([i for i in seen if i.facts.label == x], r, {x: n}) for x, n in mix.items()]
    return {d.name: d.frames for d in domains(service, parts, service.curve(16), 1, 1 << 40)}


def test_where_less_may_merge() -> None:
    def make(label: str, number: int, **facts: Any) -> list[Instance]:
        base = number * 1000
        return labelled(
            [
                instance(
                    i,
                    {0: (4, 4), 1: (3, 3), base + 5: (2, 2), base + 10 + i: (1, 1)},
                    zero=0,
                )
                for i in range(3)
            ],
            label, **facts,
        )  # fmt: skip

    a, b = make("a", 1, user="x", cgroup=None), make("b", 2, user="y", cgroup=None)
    seen, mix = [*a, *b], {"a": 4, "b": 5}
    frames = found(seen, mix)
    # Zeros and 1 in all, one content in each service, one in each instance.
    assert Service(seen, Rules(), mix).curve(1)[0].frames == 1 + 1 + 2 + 9
    assert frames == {
        "zero_pages": 9 * 6, "instance": 9 * 4, "label": 2 * (1 + 1 + 1) + 9,
        "user": 2 * 3 + 9, "cgroup": None,
    }  # fmt: skip
    # All of one user: no line is drawn. Each of its own: one around each.
    same = labelled(a, "a", user="x") + labelled(b, "b", user="x")
    assert found(same, mix)["user"] == 13
    each = [replace(i, facts=replace(i.facts, user=i.facts.instance)) for i in seen]
    assert found(each, mix)["user"] == 9 * 4
    # Some of one, some of another, or one instance alone: that does not tell.
    some = [replace(i, facts=replace(i.facts, user=f"{n % 2}")) for n, i in enumerate(seen)]
    assert found(some, mix)["user"] is None
    assert found([*a, b[0]], mix)["user"] is None


def test_frames_that_fork_shares_stay_shared_apart() -> None:
    workers = [
        instance(
            n,
            {**dict.fromkeys(range(100), (1, 1)), 1000 + n: (2, 2)},
            outside=dict.fromkeys(range(100), 1),
        )
        for n in range(3)
    ]
    i = Incidence(workers, Rules())
    assert i.apart(np.array([1, 3, 10])).tolist() == [101, 103, 110]


def test_what_one_of_each_service_has_is_neithers_own() -> None:
    # Of 30 pages of an instance, 10 are in one of the other service's too.
    def layout(i: int, base: int) -> dict[int, tuple[int, int]]:
        return dict.fromkeys([*range(100 * i, 100 * i + 10), *range(base, base + 20)], (1, 1))

    a = labelled([instance(i, layout(i, 10_000 + 100 * i)) for i in range(3)], "a")
    b = labelled([instance(i, layout(i, 20_000 + 100 * i)) for i in range(3)], "b")
    i = Incidence([*a, *b], Rules(), [3, 3])
    assert i.private.tolist() == [20] * 6
    assert i.private_within(1).tolist() == [30] * 3
    (found,) = i.at(np.array([[4, 5]]))
    assert found.lin == pytest.approx(3 * 10 + 4 * 20 + 5 * 20)
