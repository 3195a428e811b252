from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedup.errors import BadInput, NotPermitted, OutputFailed, Unsupported, Usage
from dedup.estimate import store
from dedup.estimate.fingerprints import Contents, Instance

from .build import instance

CONTENTS = 500


def some(number: int = 0, contents: int = CONTENTS) -> Instance:
    draw = random.Random(number)
    names = draw.sample(range(1 << 62), contents)
    rows = {n: (m := draw.randint(1, 300), draw.randint(1, m)) for n in names}
    return instance(number, rows, zero=names[3], volatile=12)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "web-0.dedup"
    store.save(some(), path)
    return path


def same(a: Instance, b: Instance) -> bool:
    columns = [f.name for f in dataclasses.fields(Contents)]
    return a.facts == b.facts and all(
        np.array_equal(getattr(a.contents, c), getattr(b.contents, c)) for c in columns
    )


def change(path: Path, facts: dict[str, Any] | None = None, **columns: Any) -> None:
    """Write the file anew with other facts or columns, so that Parquet itself is in order."""
    table = pq.read_table(path)
    data = json.loads(table.schema.metadata[store.METADATA]) | (facts or {})
    for name, values in columns.items():
        i = table.schema.get_field_index(name)
        table = table.set_column(i, table.schema.field(name), pa.array(values))
    table = table.replace_schema_metadata({store.METADATA: json.dumps(data).encode()})
    pq.write_table(table, path)


@pytest.mark.parametrize("contents", [0, 1, CONTENTS, store.BATCH + 7])
def test_round_trip(tmp_path: Path, contents: int) -> None:
    one = some(1, contents) if contents > 3 else instance(1, {5: (2, 1)} if contents else {})
    path = tmp_path / "one.dedup"
    store.save(one, path)
    found = store.load(path)
    assert same(found, one)
    assert found.name == str(path)
    assert os.listdir(tmp_path) == ["one.dedup"]
    assert path.stat().st_mode & 0o077 == 0


def test_other_tools_read_it(saved: Path) -> None:
    table = pq.read_table(saved)
    assert table.column_names == list(store.COLUMNS)
    assert table.num_rows == CONTENTS
    assert json.loads(table.schema.metadata[b"dedup"])["label"] == "web"


def test_a_file_that_is_cut(saved: Path) -> None:
    data = saved.read_bytes()
    for length in (0, 1, 3, 4, 8, 100, len(data) // 2, len(data) - 9, len(data) - 1):
        saved.write_bytes(data[:length])
        with pytest.raises(BadInput, match="web-0"):
            store.load(saved)


def test_a_file_with_bytes_changed(saved: Path) -> None:
    data, whole = saved.read_bytes(), store.load(saved)
    draw = random.Random(4)
    refused = 0
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(draw.choice([1, 1, 4])):
            damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        saved.write_bytes(damaged)
        try:
            found = store.load(saved)
        except BadInput:
            refused += 1
        else:
            # What is not covered by a checksum: the facts, and what no reader needs.
            assert np.array_equal(found.contents.fingerprint, whole.contents.fingerprint)
    assert refused > 300


@pytest.mark.parametrize("text", [b"", b"PAR1", b"PAR1" * 10, b"hello\n" * 50, bytes(4096)])
def test_what_is_no_parquet(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.dedup"
    path.write_bytes(text)
    with pytest.raises(BadInput, match=r"x\.dedup"):
        store.load(path)


def test_somebody_elses_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.dedup"
    pq.write_table(pa.table({"a": [1, 2]}), path)
    with pytest.raises(BadInput, match="none of dedup"):
        store.load(path)


def test_the_first_version(saved: Path) -> None:
    whole = store.load(saved)
    table = pq.read_table(saved)
    data = json.loads(table.schema.metadata[store.METADATA])
    for name in store.SINCE_2:
        del data[name]
    data["schema_version"] = 1
    text = json.dumps(data).encode()
    pq.write_table(table.replace_schema_metadata({store.METADATA: text}), saved)
    found = store.load(saved)
    assert found.facts == whole.facts
    assert found.facts.source == "live"


def test_another_version(saved: Path) -> None:
    change(saved, {"schema_version": 3})
    with pytest.raises(BadInput, match="version 3") as e:
        store.load(saved)
    assert "take the scan again" in e.value.hint


@pytest.mark.parametrize(
    "facts",
    [{"page_size": 0}, {"page_size": 1 << 40}, {"volatile_pages": -1}, {"volatile_pages": 13},
     {"scanned_pages": 1.5}, {"looks": True}, {"label": 3}, {"label": "x" * 300}, {"more": 1},
     {"tunables": []}, {"tunables": {"run": "1"}}, {"randomized": "maybe"}, {"complete": 1},
     {"rows": 3}, {"looks": None},
     {"tunables": {"max_page_sharing": 0}}, {"tunables": {"use_zero_pages": 2}},
     {"source": "cloud"}, {"source": None}, {"user": 3},
     {"file_bytes": 1 << 80}, {"volatile_frames": 13}],
)  # fmt: skip
def test_facts_that_can_not_be(saved: Path, facts: dict[str, Any]) -> None:
    change(saved, facts)
    with pytest.raises(BadInput, match="damaged"):
        store.load(saved)


def test_contents_that_can_not_be(saved: Path) -> None:
    c = store.load(saved).contents
    data = saved.read_bytes()
    more = c.frames.copy()
    more[5] = c.mappings[5] + 1
    none = c.frames.copy()
    none[5] = 0
    flags = c.flags.copy()
    flags[7] = 64
    zeros = c.flags.copy()
    zeros[:2] = 1
    for columns in (
        {"fingerprint": c.fingerprint[::-1]}, {"fingerprint": np.repeat(c.fingerprint[:1], len(c))},
        {"frames": more}, {"frames": none}, {"flags": flags}, {"flags": zeros},
        {"outside": c.frames + 1}, {"huge": c.mappings + 1}, {"mappings": c.mappings + 1},
    ):  # fmt: skip
        saved.write_bytes(data)
        change(saved, **columns)
        with pytest.raises(BadInput, match="damaged"):
            store.load(saved)


def test_columns_of_other_kinds(saved: Path) -> None:
    table = pq.read_table(saved)
    for other in (
        table.drop_columns(["huge"]),
        table.append_column("more", table.column("huge")),
        table.set_column(1, "mappings", table.column("mappings").cast(pa.int64())),
    ):
        pq.write_table(other, saved)
        with pytest.raises(BadInput, match="columns"):
            store.load(saved)


def test_few_bytes_that_claim_many_rows(saved: Path) -> None:
    # Runs of one value compress to nothing: a gigabyte of rows from some kilobytes.
    rows = 1 << 24
    schema = pq.read_table(saved).schema
    facts = json.loads(schema.metadata[store.METADATA]) | {"rows": rows}
    schema = schema.with_metadata({store.METADATA: json.dumps(facts).encode()})
    column = pa.array(np.ones(rows, np.uint64))
    table = pa.table([column.cast(f.type) for f in schema], schema=schema)
    pq.write_table(table, saved, compression="zstd")
    assert saved.stat().st_size < rows
    with pytest.raises(BadInput, match="number of rows"):
        store.load(saved)


def test_many_rows(tmp_path: Path) -> None:
    """The more fingerprints there are, the fewer bits of each are random: they compress."""
    names = np.unique(np.random.default_rng(3).integers(0, 1 << 64, 1 << 20, np.uint64))
    one, path = some(), tmp_path / "many.dedup"
    counts = np.ones(len(names), np.uint32)
    contents = Contents(names, counts, counts, 0 * counts, 0 * counts, counts.astype(np.uint8) * 0)
    facts = dataclasses.replace(one.facts, scanned_pages=len(names) + one.facts.volatile_pages)
    store.save(Instance(facts, contents), path)
    assert path.stat().st_size < 8 * len(names)
    assert len(store.load(path).contents) == len(names)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="can't open"):
        store.load(tmp_path / "none")
    with pytest.raises(BadInput, match="no regular file"):
        store.load(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadInput, match="no regular file"):
        store.load(tmp_path / "fifo")


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    paths = [tmp_path / f"web-{i}.dedup" for i in range(3)]
    for i, path in enumerate(paths):
        store.save(some(i), path)
    assert len(store.load_all(paths)) == 3
    copy = tmp_path / "copy.dedup"
    copy.write_bytes(paths[0].read_bytes())
    for again in (paths[0], copy):
        with pytest.raises(BadInput, match="same instance") as e:
            store.load_all([*paths, again])
        assert str(again) in e.value.message
    for facts, words in (
        ({"page_size": 16384}, "another page size"), ({"key_id": "other"}, "another key"),
    ):  # fmt: skip
        store.save(some(1), paths[1])
        change(paths[1], facts)
        with pytest.raises(BadInput, match=words) as e:
            store.load_all(paths)
        assert "web-1" in e.value.message


def test_what_is_no_file_is_not_replaced(saved: Path) -> None:
    """A new file takes the place of what is there, and of /dev/null there is but one."""
    pipe, link = saved.with_name("pipe"), saved.with_name("link")
    os.mkfifo(pipe)
    link.symlink_to(saved)
    for path in (pipe, link, saved.parent):
        with pytest.raises(Usage, match="would be replaced"):
            store.save(some(), path)
    assert pipe.is_fifo()
    assert link.is_symlink()
    with pytest.raises(Usage, match="needs the name"):
        store.save(some(), Path())
    store.save(some(2), saved)
    assert same(store.load(saved), some(2))


def test_no_folder(tmp_path: Path) -> None:
    """Said before a scan that would be for nothing."""
    for call in (store.check, lambda path: store.save(some(), path)):
        with pytest.raises(Usage, match="no folder") as e:
            call(tmp_path / "no" / "folder")
        assert "mkdir" in e.value.hint


def test_a_folder_out_of_reach(tmp_path: Path) -> None:
    inside = tmp_path / "closed" / "inside"
    inside.mkdir(parents=True)
    inside.parent.chmod(0)
    ours = os.geteuid()
    try:
        if ours == 0:
            os.seteuid(65534)
        with pytest.raises(NotPermitted, match="may not look into") as e:
            store.check(inside / "web-1.dedup")
    finally:
        os.seteuid(ours)
        inside.parent.chmod(0o700)
    assert "in a folder of yours" in e.value.hint


def test_no_room(saved: Path) -> None:
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OutputFailed, match="writing"):
            store.save(some(), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert list(saved.parent.glob("*.part")) == []


def test_without_pyarrow(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (store.require, lambda: store.load(saved)):
        with pytest.raises(Unsupported, match="pyarrow") as e:
            call()
        assert e.value.hint.startswith("pip install")
