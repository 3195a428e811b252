"""The price in words and as JSON."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dedup.model.cost import Calibration, Costs, Load, Machine, Settings, price
from dedup.report import price as words
from dedup.scanning import Proposal
from tests.report.scans import make

COSTS = Costs(1000, 4000, 400, 100, 250, 100, 7000, 3000, 1500, 50, 3000, 20_000)
CALIBRATION = Calibration(COSTS, Machine("6.18", "a processor", 0.004))
LOAD = Load(pages_shared=100, pages_sharing=900, pages_unshared=9000)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0123, "12 ms"), (0.9999, "1000 ms"), (1.24, "1.2 s"), (59.4, "59 s"), (60, "1 min"),
     (250.2, "4 min 10 s"), (3600, "1 h"), (7500, "2 h 5 min"), (90_000, "1 d 1 h")],
)  # fmt: skip
def test_durations(seconds: float, expected: str) -> None:
    assert words.duration(seconds) == expected


def test_a_price_with_and_without_a_calibration() -> None:
    settings = Settings(100, 20, 0.004)
    scan = make([[1, 1]])
    scan.cost = price(LOAD, settings, CALIBRATION)
    scan.proposals = [
        Proposal({"pages_to_scan": 1000}, price(LOAD, Settings(1000, 20, 0.004), CALIBRATION))
    ]
    present, faster = words.rows(scan)
    assert present[0] == "100"
    assert " to " in present[1]
    assert faster[0] == "1,000"
    assert words.advice(scan) == ""
    found = words.scan_cost_object(scan)
    assert found is not None
    assert found["proposals"][0]["tunables"] == {"pages_to_scan": 1000}
    low, high = found["bounds"]["cpu_seconds"]
    assert low < found["cpu_seconds"] < high
    scan.cost, scan.proposals = price(LOAD, settings, None), []
    [[_, time, cpu, cores]] = words.rows(scan)
    assert time.startswith("at least ")
    assert (cpu, cores) == ("", "")
    assert "--calibrate" in words.advice(scan)
    scan.why_uncalibrated = "it was taken with another kernel"
    assert "another kernel" in words.advice(scan)


def test_no_price_is_no_row() -> None:
    scan = replace(make([[1, 1]]), cost=None)
    assert words.rows(scan) == []
    assert words.scan_cost_object(scan) is None
