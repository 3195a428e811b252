from __future__ import annotations

import re
import subprocess

from dedup.kernel import personality

WORDS = ("grep", "stack", "/proc/self/maps")


def layouts() -> set[bytes]:
    return {re.sub(rb" .*", b"", subprocess.check_output(WORDS)) for _ in range(4)}


def test_for_what_is_started_meanwhile() -> None:
    with personality.not_randomized():
        assert len(layouts()) == 1
        with personality.not_randomized():
            pass
        # It was off before: off it stays.
        assert len(layouts()) == 1
    assert len(layouts()) > 1
