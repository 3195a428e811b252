"""`dedup restore` as it is typed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dedup.change.applied import Applied
from dedup.change.journal import Entry, Journal

if TYPE_CHECKING:
    from tests.cli.conftest import Dedup
    from tests.kernel_fixtures import KsmControl

pytestmark = [pytest.mark.ksm, pytest.mark.root]


def test_settings_are_listed_though_the_record_of_processes_is_damaged(
    ksm: KsmControl, dedup: Dedup
) -> None:
    path = str(ksm.ksm.root / "pages_to_scan")
    before = str(ksm.ksm.tunables()["pages_to_scan"])
    Journal().record(Entry(path, before, "321"))
    ksm.set(pages_to_scan=321)
    record = Applied().path
    record.write_text('{"event": "finish", "application": "none"}\n' * 2)
    try:
        done = dedup("restore")
        assert done.status == 10
        assert "put back" in done.out
        assert "can't be read" in " ".join(done.err.split())
        assert str(ksm.ksm.tunables()["pages_to_scan"]) == before
    finally:
        record.unlink()
    assert dedup("restore").status == 0
