"""The JSON of the contract; `dedup/schema/dedup.schema.json` describes it.

Kernel quantities bear the kernel's names and units; every other size ends in `_bytes`, every
duration in `_seconds`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from dedup.report.names import lossless

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dedup.errors import Told
    from dedup.kernel.memory import Tally
    from dedup.model.prediction import Prediction
    from dedup.model.smart import SmartScan
    from dedup.pages import Process, Region, Skipped
    from dedup.report.summary import By, Service, StoredPages
    from dedup.report.why import Part, Top, Why
    from dedup.sampling import Sampled
    from dedup.scanning import Scan

SCHEMA_VERSION: Final = 1
TOP: Final = 10
"""Contents shown."""


def envelope(kind: str, **fields: Any) -> dict[str, Any]:
    """The outer object of every output.

    Parameters
    ----------
    kind : str
        `scan`, `apply`, `self_test`, `restore`, `status`, `doctor`, `error`.
    **fields
        What it holds, in this order.
    """
    return {"schema_version": SCHEMA_VERSION, "kind": kind, **fields}


def error_object(e: Told, hint: str | None = None) -> dict[str, Any]:
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


def scan_object(scan: Scan, by: By | None = None, top: int = TOP) -> dict[str, Any]:
    """A scan whole; with `by`, the ranking of services too; `top` contents that free the most."""
    from dedup.report import price, summary
    from dedup.report.why import Why

    pages = scan.pages
    why = Why(scan, top)
    counts = summary.by_region(pages)
    process_pages = summary.by_process(pages, counts.pages).tolist()
    volatile_known = pages.looks > 1 and scan.read_again_pages is None
    data = envelope(
        "scan",
        host=host_object(scan.kernel, pages.page_size, scan.tunables),
        scan=_scan_part(scan),
        prediction=prediction_object(scan),
        smart_scan=smart_object(scan.smart_scan),
        cost=price.scan_cost_object(scan),
        processes=[
            _process(p, n, prediction, fate)
            for p, n, prediction, fate in zip(
                pages.processes,
                process_pages,
                scan.prediction.processes,
                why.by_process(),
                strict=True,
            )
        ],
        regions=[
            {
                **_region(r, pages.processes[r.process], n, duplicates, volatile),
                "why": why.reason(i),
                "pages_by_fate": why.by_region[i],
            }
            for i, (r, n, duplicates, volatile) in enumerate(
                zip(
                    pages.regions,
                    counts.pages.tolist(),
                    counts.duplicates.tolist(),
                    counts.volatile.tolist() if volatile_known else [None] * len(pages.regions),
                    strict=True,
                )
            )
        ],
        why_not_more=[_part(part, pages.page_size) for part in why.whole],
        top_contents=[_top(i, t, why) for i, t in enumerate(why.contents, 1)],
    )
    if by is not None:
        data["by"] = by
        data["groups"] = [_service(s) for s in summary.services(scan, by)]
    return data


def sample_object(scan: Sampled) -> dict[str, Any]:
    """A scan of a sample: as a scan, without what a sample can't tell."""
    from dedup.report import price

    pages, tally, found = scan.pages, scan.tally, scan.estimate
    frames = found.frames
    return envelope(
        "scan",
        host=host_object(scan.kernel, pages.page_size, scan.tunables),
        scan={
            "pages": scan.present.pages,
            "frames": round(frames.point)
            if frames.low == frames.high and pages.frames_known
            else None,
            "bytes": scan.present.pages * pages.page_size,
            "seconds": scan.seconds,
            "scope": scan.scope,
            "passes": pages.looks,
            "partial_passes": False,
            "read_again_pages": None,
            "assumed_tunables": scan.assumed,
            "interval_seconds": scan.interval_seconds,
            "full_scan_seconds": scan.full_scan_seconds,
            "looks_seconds": scan.looks_seconds,
            "drifting": None,
            "extrapolated": False,
            "hash": "xxh3_64",
            "seed": scan.seed,
            "reader": _reader(tally, pagemap_scan=scan.pagemap_scan),
            "complete": scan.complete,
            "skipped": _skipped(scan),
            "sources": [],
            "sample": {
                "by": scan.by,
                "rate": scan.rate,
                "within_seconds": scan.within_seconds,
                "memory_bytes": scan.memory_bytes,
                "frame_rate": scan.frame_rate,
                "pages": len(pages.hashes),
                "frames": found.sampled_frames,
                "contents_seen": found.contents_seen,
                "confidence": found.confidence,
                "point": found.point,
                "solved": found.solved,
            },
        },
        prediction=_prediction(found.prediction, None),
        smart_scan=None,
        cost=None if scan.cost is None else {**price.cost_object(scan.cost), "proposals": []},
        processes=[
            _process(p, n, prediction, {})
            for p, n, prediction in zip(
                pages.processes, scan.by_process.tolist(), found.prediction.processes, strict=True
            )
        ],
        regions=[],
        why_not_more=[],
        top_contents=[],
    )


def _scan_part(scan: Scan) -> dict[str, Any]:
    from dedup.report import summary

    tally = scan.tally
    return {
        "pages": scan.scanned_pages,
        "frames": summary.distinct_frames(scan.pages, scan.groups),
        "bytes": scan.scanned_pages * scan.pages.page_size,
        "seconds": scan.seconds,
        "scope": scan.scope,
        "passes": scan.passes,
        "partial_passes": scan.read_again_pages is not None,
        "read_again_pages": scan.read_again_pages,
        "assumed_tunables": scan.assumed,
        "interval_seconds": scan.interval_seconds if scan.passes > 1 else None,
        "full_scan_seconds": scan.full_scan_seconds,
        "looks_seconds": scan.looks_seconds,
        "drifting": scan.drifting,
        "extrapolated": scan.extrapolated,
        "hash": "xxh3_64",
        "seed": scan.seed,
        "reader": _reader(tally, pagemap_scan=scan.pagemap_scan),
        "complete": scan.complete,
        "skipped": _skipped(scan),
        "sources": [_source(s) for s in summary.sources(scan.pages)],
        "sample": None,
    }


def _reader(tally: Tally, *, pagemap_scan: bool) -> dict[str, Any]:
    return {
        "threads": tally.threads,
        "hash_source": tally.hash_source,
        "pagemap_scan": pagemap_scan,
        "process_vm_readv_pages": tally.process_vm_readv_pages,
        "proc_mem_pages": tally.proc_mem_pages,
        "same_frame_pages": tally.same_frame_pages,
        "in_place_pages": tally.in_place_pages,
        "unread_pages": tally.unread_pages,
        "sharing_lost_pages": tally.sharing_lost_pages,
        "forking_processes": tally.forking_processes,
        "read_bytes": tally.bytes_read,
    }


def _skipped(scan: Scan | Sampled) -> list[dict[str, Any]]:
    skipped = [skipped_object(s) for s in scan.pages.skipped]
    if scan.tally.unread_pages:
        skipped.append(
            {
                "pid": None,
                "what": "pages that could not be read",
                "code": "unread",
                "pages": scan.tally.unread_pages,
            }
        )
    return skipped


def _source(source: StoredPages) -> dict[str, Any]:
    """A file, or a folder of files, that memory was taken from."""
    return {
        "kind": source.stored.kind,
        "path": lossless(source.stored.path),
        "file_bytes": source.stored.file_bytes,
        "processes": source.processes,
        "pages": source.pages,
        "zero_pages": source.zero_pages,
        "hole_pages": source.stored.hole_pages,
    }


def skipped_object(s: Skipped) -> dict[str, Any]:
    """Something left out."""
    return {"pid": s.pid, "what": lossless(s.what), "code": s.code, "pages": s.pages}


def _bounds(bounds: Mapping[str, tuple[int, int]]) -> dict[str, list[int]]:
    return {name: [low, high] for name, (low, high) in bounds.items()}


def prediction_object(scan: Scan) -> dict[str, Any]:
    """The counters once ksmd has converged."""
    return _prediction(scan.prediction, scan.overstated_most_pages)


def _prediction(prediction: Prediction, overstated_most_pages: int | None) -> dict[str, Any]:
    from dedup.model.prediction import FIELDS

    data: dict[str, Any] = {name: getattr(prediction, name) for name in FIELDS}
    bounds = dict(prediction.bounds)
    data["overstated_pages"] = None if overstated_most_pages else overstated_most_pages
    if overstated_most_pages:
        bounds["overstated_pages"] = (0, overstated_most_pages)
    data["bounds"] = _bounds(bounds)
    data["breakdown"] = {
        "zero_pages": prediction.breakdown.zero_pages,
        "within_process_pages": prediction.breakdown.within_processes,
        "across_process_pages": prediction.breakdown.across_processes,
    }
    return data


def smart_object(smart: SmartScan | None) -> dict[str, Any] | None:
    """The outcome with smart scan on."""
    if smart is None:
        return None
    return {**dataclasses.asdict(smart), "bounds": _bounds(smart.bounds)}


def _process(
    process: Process, pages: int, prediction: Any, fate: Mapping[str, int | None]
) -> dict[str, Any]:
    from dedup.model.prediction import PROCESS_FIELDS

    live = process.stored is None
    return {
        "pid": process.id.pid,
        "start_time": process.id.start_time if live else None,
        "name": lossless(process.name),
        "user": lossless(process.user),
        "cgroup": lossless(process.cgroup),
        "unit": lossless(process.unit),
        "pinned_bytes": process.pinned_bytes if live else None,
        "pages": pages,
        **{name: getattr(prediction, name) for name in PROCESS_FIELDS},
        "bounds": _bounds(prediction.bounds),
        "pages_by_fate": dict(fate),
        "source": process.stored,
    }


def _region(
    region: Region, process: Process, pages: int, duplicates: int, volatile: int | None
) -> dict[str, Any]:
    live = process.stored is None
    return {
        "pid": process.id.pid,
        "start": hex(region.start),
        "end": hex(region.end),
        "name": lossless(region.name),
        "perms": region.perms,
        "eligible": region.eligible,
        "advised": region.advised if region.advised_known else None,
        "scanned": region.scanned,
        "guest": region.guest,
        "pages": pages,
        "duplicate_pages": duplicates,
        "pages_volatile": volatile,
        "anonymous_bytes": region.anonymous_bytes,
        "anon_huge_bytes": region.anon_huge_bytes if live else None,
        "swap_bytes": region.swap_bytes if live else None,
        "ksm_bytes": region.ksm_bytes if live else None,
    }


def _part(part: Part, page_size: int) -> dict[str, Any]:
    return {
        "code": part.code,
        "words": part.words,
        "flag": part.flag,
        "pages": part.pages,
        "bytes": None if part.pages is None else part.pages * page_size,
    }


def _top(number: int, top: Top, why: Why) -> dict[str, Any]:
    pages, content = why.scan.pages, top.content
    low, high = content.frames_freed
    size = pages.page_size
    sizes = {"frames_freed": (low, high), "freed_bytes": (low * size, high * size)}
    return {
        "number": number,
        "looks_like": top.looks_like,
        "mappings": content.mappings,
        "frames": content.frames,
        **{name: a if a == b else None for name, (a, b) in sizes.items()},
        "bounds": _bounds({name: span for name, span in sizes.items() if span[0] != span[1]}),
        "processes": [
            {"pid": pages.processes[p].id.pid, "pages": n} for p, n in why.processes_of(content)
        ],
        "regions": [{"name": lossless(name), "pages": n} for name, n in why.names_of(content)],
    }


def _service(service: Service) -> dict[str, Any]:
    return {
        "name": lossless(service.name),
        "processes": service.processes,
        "pages": service.pages,
        "frames_freed_alone": service.frames_freed_alone,
        "saved_alone_bytes": service.saved_alone_bytes,
    }
