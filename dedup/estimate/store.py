"""Files of fingerprints: Parquet, one instance each; no byte of a page is in them.

A file may come from anywhere. What is read from it is checked whole before use, and takes memory
in proportion to the file: n ascending fingerprints are 64 - log2(n) random bits each, which no
compression makes fewer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dedup.errors import BadInput, NotPermitted, OutputFailed, Unsupported, Usage
from dedup.estimate.fingerprints import (
    CONSTANT,
    LIVE,
    RANDOMIZED,
    SOURCES,
    ZERO,
    Contents,
    Facts,
    Instance,
)
from dedup.kernel import shortage

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import ModuleType

VERSION: Final = 2
SINCE_2: Final[dict[str, Any]] = {
    "source": LIVE, "guest_bytes": 0, "user": None, "cgroup": None,
}  # fmt: skip
"""Facts that files of version 1 have not: those came from live processes alone."""
METADATA: Final = b"dedup"
"""Key of the schema's metadata under which ours is, as JSON."""
COLUMNS: Final = {
    "fingerprint": "uint64",
    "mappings": "uint32",
    "frames": "uint32",
    "outside": "uint32",
    "huge": "uint32",
    "flags": "uint8",
}
ROW_GROUP: Final = 1 << 20
BATCH: Final = 1 << 16
ROW_BYTES: Final = 4
"""Of a file, for a row, at the least: so much keep the fingerprints of 32 TiB."""
METADATA_MOST: Final = 1 << 16
"""Bytes, and items of a list, that a file's own head may have."""
PAGE_SIZES: Final = (4096, 8192, 16384, 65536)
COUNT_MOST: Final = 1 << 62
TEXT_MOST: Final = 256
RANGES: Final = {
    "max_page_sharing": (2, (1 << 31) - 1),
    "use_zero_pages": (0, 1),
    "merge_across_nodes": (0, 1),
    "smart_scan": (0, 1),
    "pages_to_scan": (0, (1 << 32) - 1),
    "sleep_millisecs": (0, (1 << 32) - 1),
}
"""Of the tunables that a file has (mm/ksm.c)."""
INSTALL: Final = "pip install 'dedup-ksm[capacity]'"


def _parquet() -> tuple[ModuleType, ModuleType]:
    try:
        with shortage.needed("load pyarrow"):
            import pyarrow as pa
            import pyarrow.parquet as pq
    except ImportError as e:
        raise Unsupported("files of fingerprints need pyarrow, which is not here", INSTALL) from e
    return pa, pq


def require() -> None:
    """See to it that files can be written, before a scan is taken.

    Raises
    ------
    Unsupported
    """
    _parquet()


def check(path: Path) -> None:
    """See to it that a file may be put there: the new one takes the place of what is there.

    A device, such as /dev/null, or a link, such as /dev/stdout, would be lost for all programs.

    Raises
    ------
    Usage, NotPermitted
    """
    if not path.name:
        raise Usage("--save needs the name of a file", "name a file: `--save web-1.dedup`")
    try:
        folder = path.parent.is_dir()
    except OSError as e:
        raise NotPermitted(
            f"may not look into {path.parent}: {e.strerror}",
            "name a file in a folder of yours, or run it as root: `sudo dedup ...`",
        ) from e
    if not folder:
        raise Usage(f"there is no folder {path.parent}", f"make it: `mkdir -p {path.parent}`")
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # not there, or it can't be written either, which is told of then
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "no regular file"
        raise Usage(f"{path} is {what}, and would be replaced", "name another file")


def save(instance: Instance, path: Path) -> None:
    """Write a file, whole or not at all.

    Raises
    ------
    Unsupported
        pyarrow is not installed.
    Usage
        Something else than a file is there.
    NotPermitted, OutputFailed
    """
    check(path)
    pa, pq = _parquet()
    c = instance.contents
    facts = {"schema_version": VERSION, "rows": len(c), **dataclasses.asdict(instance.facts)}
    schema = pa.schema(
        [pa.field(name, getattr(pa, kind)(), nullable=False) for name, kind in COLUMNS.items()],
        metadata={METADATA: json.dumps(facts, allow_nan=False).encode()},
    )
    table = pa.Table.from_arrays([pa.array(getattr(c, name)) for name in COLUMNS], schema=schema)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with open(fd, "wb") as file:
                pq.write_table(
                    table, file, compression="zstd", row_group_size=ROW_GROUP,
                    use_dictionary=["mappings", "frames", "outside", "huge", "flags"],
                    write_page_checksum=True,
                )  # fmt: skip
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
    except PermissionError as e:
        raise NotPermitted(f"may not write {path}: {e.strerror}", "name another file") from e
    except OSError as e:
        raise OutputFailed(
            f"writing {path} failed: {e.strerror or e}", "make room there, or name another file"
        ) from e


def load(path: Path) -> Instance:
    """Read a file.

    Raises
    ------
    BadInput
        It is not there, none of ours, damaged, or of another version.
    Unsupported
        pyarrow is not installed.
    NotPermitted
    """
    pa, pq = _parquet()
    try:
        # Not to wait for the other end, where it is a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as e:
        raise NotPermitted(f"may not read {path}: {e.strerror}") from e
    except OSError as e:
        raise BadInput(f"can't open {path}: {e.strerror}", "make it: `dedup scan --save`") from e
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise BadInput(f"{path} is no regular file", "name files made by `dedup scan --save`")
    with open(fd, "rb") as file:
        try:
            return _read(pq, file, status.st_size, path)
        except BadInput:
            raise
        except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as e:
            words = " ".join(str(e).split())[:TEXT_MOST]
            raise BadInput(
                f"{path} is no file of fingerprints, or damaged: {words}",
                "make it again: `dedup scan --save`",
            ) from e


def _read(pq: ModuleType, file: Any, size: int, path: Path) -> Instance:
    parquet = pq.ParquetFile(
        file,
        memory_map=False,
        pre_buffer=False,
        thrift_string_size_limit=METADATA_MOST * 4,
        thrift_container_size_limit=METADATA_MOST,
        page_checksum_verification=True,
    )
    schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
    facts = _facts((schema.metadata or {}).get(METADATA), path)
    kinds = {f.name: str(f.type) for f in schema}
    if kinds != COLUMNS or len(schema) != len(COLUMNS):
        raise ValueError("its columns are others")
    if facts.pop("rows") != rows or not 0 <= rows <= size // ROW_BYTES:
        raise ValueError("it has another number of rows than it says")
    for g in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(g)
        for i in range(group.num_columns):
            # Dictionaries and heads besides: a value takes no more than 16 bytes.
            if group.column(i).total_uncompressed_size > 16 * min(rows, ROW_GROUP) + METADATA_MOST:
                raise ValueError("a column is larger than its rows can be")
    columns = {name: np.empty(rows, kind) for name, kind in COLUMNS.items()}
    at = 0
    for batch in parquet.iter_batches(BATCH, use_threads=False):
        if at + batch.num_rows > rows or any(c.null_count for c in batch.columns):
            raise ValueError("it has another number of values than it says")
        for name in COLUMNS:
            columns[name][at : at + batch.num_rows] = batch.column(name).to_numpy()
        at += batch.num_rows
    if at != rows:
        raise ValueError("rows are missing")
    found = Instance(Facts(**facts), Contents(**columns), str(path))
    _check(found)
    return found


def _facts(text: bytes | None, path: Path) -> dict[str, Any]:
    """The facts, each of its kind and in its range."""
    if text is None:
        raise BadInput(
            f"{path} is a Parquet file, but none of dedup's", "make one: `dedup scan --save`"
        )
    if len(text) > METADATA_MOST:
        raise ValueError("its facts are too long")
    try:
        data = json.loads(text)
    except RecursionError as e:
        raise ValueError("its facts are nested") from e
    if not isinstance(data, dict):
        raise ValueError("its facts are none")
    version = data.pop("schema_version", None)
    if version == 1:
        data = {**SINCE_2, **data}
    elif version != VERSION:
        raise BadInput(
            f"{path} has fingerprints of version {version!r}; this dedup knows 1 and {VERSION}",
            "take the scan again with this version of dedup",
        )
    kinds = {f.name: f.type for f in dataclasses.fields(Facts)} | {"rows": "int"}
    if set(data) != set(kinds):
        raise ValueError("facts are missing, or unknown")
    for name, value in data.items():
        if not _fits(value, str(kinds[name])):
            raise ValueError(f"{name} is out of range")
    for name, values in (
        ("page_size", PAGE_SIZES), ("randomized", RANDOMIZED), ("source", SOURCES)
    ):  # fmt: skip
        if data[name] not in values:
            raise ValueError(f"{name} is out of range")
    return data


def _fits(value: Any, kind: str) -> bool:
    if value is None:
        return kind.endswith("None")
    if kind.startswith("str"):
        return isinstance(value, str) and len(value) <= TEXT_MOST
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "dict[str, int]":
        return isinstance(value, dict) and all(
            name in RANGES and _fits(v, "int") and RANGES[name][0] <= v <= RANGES[name][1]
            for name, v in value.items()
        )
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < COUNT_MOST


def _check(i: Instance) -> None:
    """The contents by themselves, and with the facts."""
    c, f = i.contents, i.facts
    if np.any(c.fingerprint[1:] <= c.fingerprint[:-1]):
        raise ValueError("its fingerprints do not ascend")
    if np.any((c.frames < 1) | (c.frames > c.mappings) | (c.outside > c.frames)):
        raise ValueError("a content has more frames than mappings, or none")
    if np.any(c.huge > c.mappings) or np.any(c.flags & ~(ZERO | CONSTANT)):
        raise ValueError("a content's counts or flags are out of range")
    if np.count_nonzero(c.flags & ZERO) > 1:
        raise ValueError("two contents are all zero")
    lasting = int(c.mappings.sum(dtype=np.int64))
    if lasting + f.volatile_pages != f.scanned_pages or f.volatile_frames > f.volatile_pages:
        raise ValueError("its counts do not add up")


def load_all(paths: Sequence[Path]) -> list[Instance]:
    """Read the files of a study, one instance each.

    Raises
    ------
    BadInput
        One is none, does not fit the first, or is of an instance that another one has.
    Unsupported, NotPermitted
    """
    found: list[Instance] = []
    seen: dict[str, str] = {}
    for path in paths:
        one = load(path)
        if found:
            _fit(found[0], one)
        other = seen.setdefault(one.facts.instance, one.name)
        if other != one.name or sum(i.name == one.name for i in found):
            raise BadInput(
                f"{one.name} and {other} are of the same instance",
                "give scans of different instances: the same one twice says nothing of a third",
            )
        found.append(one)
    return found


def _fit(first: Instance, other: Instance) -> None:
    for what, a, b, hint in (
        ("page size", first.facts.page_size, other.facts.page_size,
         "give scans of hosts with the same page size"),
        ("key", first.facts.key_id, other.facts.key_id,
         "take all scans with the same `--key-file`, or save them to the same folder"),
    ):  # fmt: skip
        if a != b:
            raise BadInput(
                f"{other.name} was made with another {what} than {first.name} ({b}, not {a})", hint
            )
