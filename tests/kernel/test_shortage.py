from __future__ import annotations

import errno
import resource

import pytest

from dedup.errors import NotPermitted, OutOfMemory, is_refusal
from dedup.kernel import shortage

GIB = 1 << 30


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage, "limits", dict)


@pytest.mark.parametrize(
    "e",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("/x/y.so: failed to map segment from shared object"),
        ImportError("libz.so.1: cannot allocate memory: for a shared object"),
    ],
)
def test_what_is_a_refusal(e: Exception, unlimited: None) -> None:
    assert is_refusal(e)
    wrapped = ImportError("importing numpy failed")
    wrapped.__cause__ = e
    assert is_refusal(wrapped)
    words = r"no memory to count: the host has [0-9,]+ MiB left"
    with pytest.raises(OutOfMemory, match=words), shortage.needed("count"):
        raise e


def test_what_is_none() -> None:
    tls = ImportError("libgomp.so.1: cannot allocate memory in static TLS block")
    for e in (ImportError("no module named x"), tls, OSError(errno.EIO, "no"), ValueError()):
        assert not is_refusal(e)
        with pytest.raises(type(e)), shortage.needed("count"):
            raise e


def test_errors_of_ours_stay() -> None:
    """The one inside says it best, and ENOMEM of a call on a process is none of our memory."""
    refused = NotPermitted("no")
    refused.__cause__ = OSError(errno.ENOMEM, "no")
    with pytest.raises(NotPermitted), shortage.needed("count"):
        raise refused
    outer, inner = shortage.needed("count"), shortage.needed("read")
    with pytest.raises(OutOfMemory, match="to read"), outer, inner:
        raise MemoryError


@pytest.mark.parametrize(
    ("found", "hint"),
    [
        ({"ulimit -v": GIB}, "`ulimit -v unlimited`; or let the scan keep less (`--memory 512M`)"),
        ({"ulimit -v": GIB >> 3}, "allow more: `ulimit -v unlimited`; or scan fewer processes"),
        (
            {"ulimit -v": GIB, "ulimit -d": GIB >> 2},
            "`ulimit -v unlimited` and `ulimit -d unlimited`; or scan fewer processes",
        ),
    ],
)
def test_the_way_out(found: dict[str, int], hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage, "limits", lambda: found)
    e = shortage.refusal("read")
    assert hint in e.hint
    assert all(f"(`{name}`)" in e.message for name in found)


def test_limits_are_those_of_this_process() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 44, before[1]))
    try:
        assert shortage.limits()["ulimit -v"] == 1 << 44
        with shortage.spare():
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
