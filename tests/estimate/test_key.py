from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dedup.errors import BadInput, OutputFailed, Refused
from dedup.estimate import key
from dedup.estimate.key import Key


def test_siphash_as_its_authors_have_it() -> None:
    # vectors.h of the reference: key 00 to 0f, message 00 to 07.
    secret = np.frombuffer(bytes(range(16)), "<u8").astype(np.uint64)
    message = np.frombuffer(bytes(range(8)), "<u8").astype(np.uint64)
    found = key.siphash(np.repeat(message, 3), secret)
    assert [int(x).to_bytes(8, "little").hex() for x in found] == ["6224939a79f5f593"] * 3


def test_slices_are_as_the_whole() -> None:
    k = Key(b"k" * 32)
    words = np.arange(key.SLICE + 5, dtype=np.uint64)
    found = k.fingerprints(words)
    assert len(np.unique(found)) == len(words)
    assert (found[-3:] == k.fingerprints(words[-3:])).all()
    assert (words == np.arange(len(words), dtype=np.uint64)).all()


def test_what_is_made_of_a_key_does_not_tell_it() -> None:
    a, b = Key(b"a" * 32), Key(b"b" * 32)
    assert a.id != b.id
    assert a.seed != b.seed
    assert a.tag("x") != b.tag("x")
    assert a.tag("x") == Key(b"a" * 32).tag("x")
    assert (b"a" * 32).hex() not in a.id
    assert "aaaa" not in repr(a)


def test_a_key_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made = key.of_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key.of_file(path) == made
    assert os.listdir(tmp_path) == ["key"]


def test_of_many_that_make_one_all_get_the_same(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\nfrom dedup.estimate import key\n"
        "print(key.of_file(pathlib.Path(sys.argv[1])).id)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "key")]
    root = Path(key.__file__).parents[2]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(6)
    ]
    assert len({p.communicate(timeout=60)[0] for p in started}) == 1
    assert all(p.returncode == 0 for p in started)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    key.of_file(path)
    path.chmod(mode)
    with pytest.raises(Refused, match="others may read") as e:
        key.of_file(path)
    assert "chmod 600" in e.value.hint


@pytest.mark.parametrize("text", ["", "abc\n", "g" * 64, "a" * 63, "a" * 64 + "\n\n", "a" * 66])
def test_what_is_no_key(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(BadInput, match="no key"):
        key.of_file(path)


def test_places_where_no_key_can_be(tmp_path: Path) -> None:
    with pytest.raises(OutputFailed, match="key"):
        key.of_file(tmp_path / "no" / "folder")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    with pytest.raises(BadInput, match="no regular file"):
        key.of_file(fifo)
