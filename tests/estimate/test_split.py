"""A scan of several processes taken apart says the same of each as a scan of it alone."""

from __future__ import annotations

import numpy as np

from dedup.estimate import fingerprints, split
from dedup.estimate.key import Key
from dedup.scanning import Plan, scan_pids
from dedup.sources.live import Options
from tests.kernel_fixtures import Target

KEY = Key(bytes(range(32)))


def test_parts() -> None:
    with Target() as a, Target() as b, Target() as c:
        for i, target in enumerate((a, b, c)):
            target.do("map", name="m", pages=200)
            target.do("put", name="m", at=0, what=["zero"] * 3)
            target.do("put", name="m", at=3, what=["same"] * 20)
            target.do("put", name="m", at=30, what=[f"own {i} {n}" for n in range(i)])
        plan = Plan(Options(seed=KEY.seed), passes=1)
        pids = [a.pid, b.pid, c.pid]
        every = scan_pids(pids, plan)
        chosen: list[list[int]] = [[b.pid], [c.pid, a.pid], pids]
        for some in chosen:
            part = split.part(every, some)
            alone = scan_pids([p for p in pids if p in some], plan)
            assert [p.id for p in part.pages.processes] == [p.id for p in alone.pages.processes]
            assert len(part.pages.regions) == len(alone.pages.regions)
            order, alone_order = (
                np.argsort(p.address_of(np.arange(len(p.hashes))), kind="stable")
                for p in (part.pages, alone.pages)
            )
            assert np.array_equal(part.pages.hashes[order], alone.pages.hashes[alone_order])
            assert np.array_equal(part.pages.run_start, alone.pages.run_start)
            x, y = (fingerprints.of_scan(s, KEY, "t") for s in (part, alone))
            assert np.array_equal(x.contents.fingerprint, y.contents.fingerprint)
            assert np.array_equal(x.contents.mappings, y.contents.mappings)
            assert x.facts.instance == y.facts.instance
            assert x.facts.scanned_pages == y.facts.scanned_pages


def test_a_part_with_nothing() -> None:
    with Target() as a:
        part = split.part(scan_pids([a.pid], Plan(passes=1)), [])
        assert len(part.pages.hashes) == len(part.pages.regions) == 0
