"""The JSON of the contract; `dedup/schema/dedup.schema.json` describes it.

Kernel quantities bear the kernel's names and units; every other size ends in `_bytes`, every
duration in `_seconds`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dedup.report.names import lossless

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dedup.errors import DedupError
    from dedup.pages import Process, Region, Skipped
    from dedup.report.summary import By, Service
    from dedup.scanning import Scan

SCHEMA_VERSION: Final = 1


def envelope(kind: str, **fields: Any) -> dict[str, Any]:
    """The outer object of every output.

    Parameters
    ----------
    kind : str
        `scan`, `apply`, `self_test`, `restore`, `error`.
    **fields
        What it holds, in this order.
    """
    return {"schema_version": SCHEMA_VERSION, "kind": kind, **fields}


def error_object(e: DedupError, hint: str | None = None) -> dict[str, Any]:
    """An error, with the hint that is shown."""
    return envelope(
        "error",
        error={
            "code": e.code,
            "message": lossless(e.message),
            "hint": lossless(e.hint if hint is None else hint),
        },
    )


def host_object(kernel: str, page_size: int, tunables: Mapping[str, int | str]) -> dict[str, Any]:
    """The host: kernel, page size and the tunables of KSM, null where there is no KSM."""
    return {"kernel": kernel, "page_size": page_size, "ksm": dict(tunables) or None}


def scan_object(scan: Scan, by: By | None = None) -> dict[str, Any]:
    """A scan whole; with `by`, the ranking of services too."""
    from dedup.report import summary

    pages = scan.pages
    counts = summary.by_region(pages)
    process_pages = summary.by_process(pages, counts.pages).tolist()
    data = envelope(
        "scan",
        host=host_object(scan.kernel, pages.page_size, scan.tunables),
        scan=_scan_part(scan),
        prediction=_prediction(scan),
        cost={"metadata_bytes": scan.prediction.metadata_bytes},
        processes=[
            _process(p, n, prediction)
            for p, n, prediction in zip(
                pages.processes, process_pages, scan.prediction.processes, strict=True
            )
        ],
        regions=[
            _region(r, pages.processes[r.process].id.pid, n, duplicates, volatile)
            for r, n, duplicates, volatile in zip(
                pages.regions,
                counts.pages.tolist(),
                counts.duplicates.tolist(),
                counts.volatile.tolist() if pages.looks > 1 else [None] * len(pages.regions),
                strict=True,
            )
        ],
    )
    if by is not None:
        data["by"] = by
        data["groups"] = [_service(s) for s in summary.services(scan, by)]
    return data


def _scan_part(scan: Scan) -> dict[str, Any]:
    from dedup.report import summary

    tally = scan.tally
    skipped = [_skipped(s) for s in scan.pages.skipped]
    if tally.unread_pages:
        skipped.append(
            {
                "pid": None,
                "what": "pages that could not be read",
                "code": "unread",
                "pages": tally.unread_pages,
            }
        )
    return {
        "pages": scan.scanned_pages,
        "frames": summary.distinct_frames(scan.pages),
        "bytes": scan.scanned_pages * scan.pages.page_size,
        "seconds": scan.seconds,
        "scope": scan.scope,
        "passes": scan.passes,
        "interval_seconds": scan.interval_seconds if scan.passes > 1 else None,
        "full_scan_seconds": scan.full_scan_seconds,
        "hash": "xxh3_64",
        "seed": scan.seed,
        "reader": {
            "threads": tally.threads,
            "hash_source": tally.hash_source,
            "pagemap_scan": scan.pagemap_scan,
            "process_vm_readv_pages": tally.process_vm_readv_pages,
            "proc_mem_pages": tally.proc_mem_pages,
            "in_place_pages": tally.in_place_pages,
            "unread_pages": tally.unread_pages,
            "sharing_lost_pages": tally.sharing_lost_pages,
            "forking_processes": tally.forking_processes,
            "read_bytes": tally.bytes_read,
        },
        "complete": scan.complete,
        "skipped": skipped,
    }


def _skipped(s: Skipped) -> dict[str, Any]:
    return {"pid": s.pid, "what": lossless(s.what), "code": s.code, "pages": s.pages}


def _bounds(bounds: Mapping[str, tuple[int, int]]) -> dict[str, list[int]]:
    return {name: [low, high] for name, (low, high) in bounds.items()}


def _prediction(scan: Scan) -> dict[str, Any]:
    from dedup.model.merge import FIELDS

    prediction = scan.prediction
    data: dict[str, Any] = {name: getattr(prediction, name) for name in FIELDS}
    data["bounds"] = _bounds(prediction.bounds)
    data["breakdown"] = {
        "zero_pages": prediction.breakdown.zero_pages,
        "within_process_pages": prediction.breakdown.within_processes,
        "across_process_pages": prediction.breakdown.across_processes,
    }
    return data


def _process(process: Process, pages: int, prediction: Any) -> dict[str, Any]:
    from dedup.model.merge import PROCESS_FIELDS

    return {
        "pid": process.id.pid,
        "start_time": process.id.start_time,
        "name": lossless(process.name),
        "user": lossless(process.user),
        "cgroup": lossless(process.cgroup),
        "unit": lossless(process.unit),
        "pages": pages,
        **{name: getattr(prediction, name) for name in PROCESS_FIELDS},
        "bounds": _bounds(prediction.bounds),
    }


def _region(
    region: Region, pid: int, pages: int, duplicates: int, volatile: int | None
) -> dict[str, Any]:
    return {
        "pid": pid,
        "start": hex(region.start),
        "end": hex(region.end),
        "name": lossless(region.name),
        "perms": region.perms,
        "eligible": region.eligible,
        "why": region.why,
        "advised": region.advised,
        "scanned": region.scanned,
        "pages": pages,
        "duplicate_pages": duplicates,
        "pages_volatile": volatile,
        "anonymous_bytes": region.anonymous_bytes,
        "anon_huge_bytes": region.anon_huge_bytes,
        "swap_bytes": region.swap_bytes,
        "ksm_bytes": region.ksm_bytes,
    }


def _service(service: Service) -> dict[str, Any]:
    return {
        "name": lossless(service.name),
        "processes": service.processes,
        "pages": service.pages,
        "frames_freed_alone": service.frames_freed_alone,
        "saved_alone_bytes": service.saved_alone_bytes,
    }
