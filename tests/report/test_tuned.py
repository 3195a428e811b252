"""A wish in words: what is advised, and what must be known besides."""

from __future__ import annotations

import pytest

from dedup.errors import Usage
from dedup.kernel.ksm import Counters
from dedup.model import wish as wishes
from dedup.model.cost import Load, Settings
from dedup.model.wish import Wish
from dedup.report import tuned
from dedup.tuning import Tuning, followed
from tests.model.test_cost import CALIBRATION, TICK

LOAD = Load(pages_shared=1000, pages_sharing=20_000, pages_unshared=60_000)


def tuning(wish: Wish, *, busy: int = 0, **present: int) -> Tuning:
    tunables: dict[str, int | str] = {
        "run": 1, "pages_to_scan": 100, "sleep_millisecs": 20, "smart_scan": 0, **present
    }  # fmt: skip
    now = Settings.of(tunables, TICK)
    by = wishes.fixed(wish, LOAD, CALIBRATION, TICK, smart_scan=now.smart_scan)
    return Tuning(
        kernel="6.18",
        tunables=tunables,
        wish=wish,
        load=LOAD,
        page_size=4096,
        present=wishes.of(LOAD, now, CALIBRATION) if now.pages_to_scan else None,
        alternatives=[
            by,
            wishes.advised(wish, by, LOAD, CALIBRATION, now, tunables, 100.0),
        ],
        busy=bool(busy),
    )


@pytest.mark.parametrize(
    ("wish", "present", "words"),
    [
        (Wish(4), {}, "merges all in"),
        (Wish(4), {"pages_to_scan": 50_000}, "is cheaper"),
        (Wish(cores=0.3), {}, "merges sooner"),
        (Wish(4), {"pages_to_scan": 1052}, "no others do it cheaper"),
    ],
)
def test_advice(wish: Wish, present: dict[str, int], words: str) -> None:
    assert words in tuned.advice(tuning(wish, **present))


def test_what_must_be_known_besides() -> None:
    plain = " ".join(tuned.notes(tuning(Wish(4))))
    assert "scan under way:" not in plain
    assert "Smart scan" not in plain
    assert "starts slowly (30 s here)" in plain
    more = " ".join(tuned.notes(tuning(Wish(4), busy=1, smart_scan=1)))
    assert "scan under way:" in more
    assert "Smart scan is on" in more


def test_what_to_type() -> None:
    found = tuning(Wish(4, 0.5), run=0)
    fixed, advisor = found.alternatives
    typed = "dedup tune --pid 7 --within 4 --cpu 50 --apply"
    assert tuned.command(found, fixed, "--pid 7") == f"{typed} --start-ksmd"
    assert tuned.command(found, advisor, "--pid 7") == f"{typed} --advisor --start-ksmd"
    assert tuned.command(tuning(Wish(4)), fixed, "") == "dedup tune --within 4 --apply"


def test_ksmd_that_scans_nothing_never_merges() -> None:
    found = tuning(Wish(4), pages_to_scan=0)
    assert found.present is None
    assert "never" in list(tuned.table(found).columns[1].cells)
    assert tuned.tuning_object(found, "", None, None)["present"] is None


def counters(**values: int) -> Counters:
    names = Counters.__dataclass_fields__
    return Counters(**{n: values.get(n, 0) for n in names})


def test_the_load_that_ksm_has() -> None:
    now = counters(pages_shared=3, pages_sharing=40, pages_unshared=500, pages_volatile=70)
    assert followed(now, {"smart_scan": 0}) == Load(3, 40, 500, 70)
    # What smart scan passes over counts as volatile and is searched for all the same.
    assert followed(now, {"smart_scan": 1}) == Load(3, 40, 570, 0)
    with pytest.raises(Usage, match="no memory"):
        followed(counters(), {})
