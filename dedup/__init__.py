"""What kernel samepage merging (KSM) would save here, made so, and held against the kernel.

>>> import dedup
>>> scan = dedup.scan(pids=[1234])  # doctest: +SKIP
>>> scan.prediction.pages_sharing  # doctest: +SKIP
>>> with dedup.merge(array) as merged:  # doctest: +SKIP
...     merged.difference
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from dedup.errors import DedupError
    from dedup.merging import Merge, merge
    from dedup.sampling import Sampled
    from dedup.scanning import Scan

__all__ = ["DedupError", "Merge", "Sampled", "Scan", "merge", "scan"]

_LAZY = {
    "DedupError": "dedup.errors",
    "Merge": "dedup.merging",
    "Sampled": "dedup.sampling",
    "Scan": "dedup.scanning",
    "merge": "dedup.merging",
}


def __getattr__(name: str) -> Any:
    # NumPy and the compiled core come with the first use, not with `import dedup`.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dedup' has no attribute {name!r}")


def _is_count(value: object, least: int) -> bool:
    from operator import index

    try:
        return index(value) >= least  # type: ignore[arg-type]
    except TypeError:
        return False


@overload
def scan(
    pids: Sequence[int] = (),
    *,
    arrays: Sequence[Any] = (),
    scope: Literal["compatible", "advised"] = "compatible",
    passes: int | None = None,
    interval_seconds: float | None = None,
    full_scan_seconds: float | None = None,
    threads: int | None = None,
    seed: int | None = None,
    partial_passes: bool = False,
    memory: None = None,
) -> Scan: ...
@overload
def scan(
    pids: Sequence[int] = (),
    *,
    arrays: Sequence[Any] = (),
    scope: Literal["compatible", "advised"] = "compatible",
    passes: int | None = None,
    interval_seconds: float | None = None,
    full_scan_seconds: float | None = None,
    threads: int | None = None,
    seed: int | None = None,
    partial_passes: bool = False,
    memory: int | str,
) -> Scan | Sampled: ...
def scan(
    pids: Sequence[int] = (),
    *,
    arrays: Sequence[Any] = (),
    scope: Literal["compatible", "advised"] = "compatible",
    passes: int | None = None,
    interval_seconds: float | None = None,
    full_scan_seconds: float | None = None,
    threads: int | None = None,
    seed: int | None = None,
    partial_passes: bool = False,
    memory: int | str | None = None,
) -> Scan | Sampled:
    """Predict what KSM would merge in live processes, or in arrays of this process.

    Parameters
    ----------
    pids : sequence of int
        Processes.
    arrays : sequence of array_like
        Our own memory instead, hashed where it lies; whole pages take part.
    scope : {"compatible", "advised"}
        Every mapping that KSM would accept were it advised, or those marked mergeable now.
    passes : int, optional
        Looks at the memory: pages whose content differs between two are volatile. By default 2, or
        3 and an extrapolation where ksmd's full scan takes more than 3 s.
    interval_seconds : float, optional
        Between looks; by default from the time of ksmd's full scan, at most 5 s.
    full_scan_seconds : float, optional
        That time, where other tunables than the present ones are intended.
    threads : int, optional
        That read; by default the cores that we may use.
    seed : int, optional
        Of the hash; drawn anew by default.
    partial_passes : bool
        Looks after the first read only the pages that would merge: quicker, but `pages_unshared`
        and `pages_volatile` are None, with bounds.
    memory : int or str, optional
        Bytes that the scan may take beside what this process has already, or a size: "512M". Where
        not all pages have room, those of a sample of the contents are kept.

    Returns
    -------
    Scan or Sampled
        Its `prediction` has the kernel's counters, in pages; `pages` has the arrays. `Sampled`
        where the pages did not fit into `memory`: then its counters are None, with bounds.

    Raises
    ------
    DedupError
        `NoSuchProcess`, `NoMemory`, `NotPermitted`, `NotMergeable`, `OutOfMemory`, `Usage`.
    """
    from dedup.errors import Usage

    for name, good in {
        "scope": scope in {"compatible", "advised"},
        "passes": passes is None or _is_count(passes, 1),
        "threads": threads is None or _is_count(threads, 1),
        "seed": seed is None or (_is_count(seed, 0) and seed < 1 << 64),
        "interval_seconds": interval_seconds is None or 0 <= interval_seconds < float("inf"),
        "full_scan_seconds": full_scan_seconds is None or 0 < full_scan_seconds < float("inf"),
        "pids": not isinstance(pids, int | str) and all(_is_count(p, 1) for p in pids),
    }.items():
        if not good:
            raise Usage(
                f"dedup.scan: {name} has a value that means nothing", "see help(dedup.scan)"
            )
    from dedup.kernel import shortage

    with shortage.needed("start"):
        shortage.for_import("numpy")
        from dedup.scanning import Plan, scan_pids, scan_spans
        from dedup.sources.live import Options

    plan = Plan(
        options=Options(scope=scope, threads=threads or 0, seed=seed),
        passes=passes,
        interval_seconds=interval_seconds,
        full_scan_seconds=full_scan_seconds,
        partial_passes=partial_passes,
    )
    if len(arrays):
        if len(pids):
            raise Usage("pids and arrays don't go together", "scan them one after the other")
        if memory is not None:
            raise Usage("memory does not go with arrays, which lie in it", "leave it out")
        from dedup.merging import piece_of

        return scan_spans([piece_of(a).span for a in arrays], plan)
    if not len(pids):
        raise Usage("nothing chosen to scan", "name pids or arrays: `dedup.scan(pids=[1234])`")
    if memory is not None:
        from dedup import budget
        from dedup.estimate.host import parse_size

        try:
            size = parse_size(memory) if isinstance(memory, str) else int(memory)
            if size <= 0:
                raise ValueError("it is to be above 0")
        except (TypeError, ValueError) as e:
            raise Usage(f"dedup.scan: memory: {e}", 'bytes, or a size such as "512M"') from e
        return budget.scan_pids([int(p) for p in pids], size, plan)
    return scan_pids([int(p) for p in pids], plan)
