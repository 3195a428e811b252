"""`dedup scan`: predict what KSM would merge in live processes, or in memory that lies in files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dedup.cli.options import Rate, Seconds, Size, Tunable, chooses_processes, reports, words_of
from dedup.cli.root import Exemplified
from dedup.errors import Partial, Usage

if TYPE_CHECKING:
    from dedup.cli.output import Output
    from dedup.estimate.key import Key
    from dedup.kernel.processes import Choice
    from dedup.sampling import Sampled
    from dedup.scanning import Plan, Scan

LABEL_MOST = 64
"""Characters of a service's name."""


@click.command(
    cls=Exemplified,
    examples=[
        ("dedup scan --pid 1234", "what KSM would merge in a process"),
        ("dedup scan --name 'redis*'", "in several, and between them"),
        ("dedup scan --all --by unit", "which services are worth it"),
        ("dedup scan --pid 1234 --json", "the same for programs"),
        ("dedup scan --all --sample 10%", "an estimate from a tenth of it, with its range"),
        ("dedup scan --all --memory 512M", "with no more memory than this of its own"),
        ("dedup scan --core core.1 --core core.2", "in core files, and between them"),
        (
            "dedup scan --tree 1234 --save web-1.dedup",
            "keep its fingerprints: see `dedup capacity`",
        ),
    ],
)
@chooses_processes
@click.option(
    "--core", "cores", type=click.Path(), multiple=True, metavar="FILE",
    help="Memory in an ELF core: gcore's, the kernel's, QEMU's dump-guest-memory.",
)  # fmt: skip
@click.option(
    "--image", "images", type=click.Path(), multiple=True, metavar="FILE",
    help="Raw memory: QEMU's pmemsave, a snapshot of a guest.",
)  # fmt: skip
@click.option(
    "--criu", "criu", type=click.Path(), multiple=True, metavar="DIR",
    help="Memory in the images of a CRIU dump.",
)  # fmt: skip
@click.option(
    "--by", type=click.Choice(["name", "user", "cgroup", "unit"]),
    help="Group the processes and rank the groups by what each would save alone.",
)  # fmt: skip
@click.option(
    "--scope", type=click.Choice(["compatible", "advised"]), default="compatible",
    show_default=True,
    help="Every mapping that KSM would accept were it advised, or only those marked mergeable now.",
)  # fmt: skip
@click.option(
    "--passes", type=click.IntRange(min=1), metavar="N",
    help="Looks at the memory: pages whose content differs between them are volatile. By default "
    "2, or 3 and an extrapolation where ksmd's full scan takes more than 3 s.",
)  # fmt: skip
@click.option(
    "--interval", type=Seconds(auto=True), default="auto", show_default=True,
    metavar="SECONDS|auto",
    help="Between looks; auto goes by the time of ksmd's full scan, at most 5 s.",
)  # fmt: skip
@click.option(
    "--partial-passes", is_flag=True,
    help="Looks after the first read only the pages that would merge: quicker, but what of the "
    "rest is volatile stays unknown.",
)  # fmt: skip
@click.option(
    "--full-scan", type=Seconds(), metavar="SECONDS",
    help="Time of ksmd's full scan, where you mean to change the tunables.",
)  # fmt: skip
@click.option(
    "--tunable", "assumed", type=Tunable(), multiple=True, metavar="NAME=VALUE",
    help="Predict for another value of a tunable of KSM: use_zero_pages=1, pages_to_scan=5000.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0, (1 << 64) - 1), metavar="N",
    help="Of the hash; drawn anew for each scan by default.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1, 1024), metavar="N",
    help="Reading threads; by default the cores that we may use.",
)  # fmt: skip
@click.option(
    "--top", type=click.IntRange(min=0), metavar="N",
    help="Contents to show, those that free the most: 5 by default, 10 with --json, 0 for none.",
)  # fmt: skip
@click.option(
    "--sample", "rate", type=Rate(), metavar="RATE",
    help="Read this part alone, 0.1 or 10%, and estimate the whole, with a range.",
)  # fmt: skip
@click.option(
    "--within", type=Seconds(), metavar="SECONDS",
    help="Read as much as fits into this time: everything, or a sample.",
)  # fmt: skip
@click.option(
    "--memory", "budget_bytes", type=Size(), metavar="SIZE",
    help="Memory that the scan itself may take, as 512M or 2G: where not all pages have room, "
    "those of a sample of the contents are kept, and the whole is estimated, with a range.",
)  # fmt: skip
@click.option(
    "--save", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Keep fingerprints, for `dedup capacity`: all chosen processes and files are one "
    "instance.",
)  # fmt: skip
@click.option(
    "--label", metavar="NAME", help="Of the service, with --save; else the processes' name."
)
@click.option(
    "--key-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Key of saved fingerprints, made if it does not exist; scans with the same key can be "
    "compared. By default .dedup-key beside the file.",
)  # fmt: skip
@reports
@click.option("--verbose", "-v", is_flag=True, help="Show all processes and regions.")
def command(
    choice: Choice,
    output: Output,
    cores: tuple[str, ...],
    images: tuple[str, ...],
    criu: tuple[str, ...],
    by: Any,
    scope: Any,
    passes: int | None,
    interval: float | None,
    partial_passes: bool,
    full_scan: float | None,
    assumed: tuple[tuple[str, int], ...],
    seed: int | None,
    threads: int | None,
    top: int | None,
    rate: float | None,
    within: float | None,
    budget_bytes: int | None,
    save: Path | None,
    label: str | None,
    key_file: Path | None,
    verbose: bool,
) -> int:
    """Predict what KSM would merge in live processes, or in memory that lies in files.

    It reads their memory and changes nothing: no page is faulted in, unshared or split, no process
    stops. The figures are what the kernel's counters show once ksmd has converged with smart scan
    off. Your own processes need no root; root sees frame numbers, which makes all figures exact.

    Files go through the same model, several of them as several processes, with live ones too if
    you like. They hold no frame numbers, and can't tell zeros from memory that was never touched.
    """
    from dedup import scanning
    from dedup.change.tunables import changed_for_now, others_at_the_knobs
    from dedup.report import jsonout, text
    from dedup.sources.live import Options

    options = {"core": cores, "image": images, "criu": criu}
    files = [(kind, path) for kind, paths in options.items() for path in paths]
    sampled = rate is not None or within is not None
    if budget_bytes is not None:
        for words, given in {
            "--sample and --within": sampled, "--core, --image and --criu": bool(files),
        }.items():  # fmt: skip
            if given:
                raise Usage(f"{words} do not go with --memory", "leave out one of them")
    if sampled:
        _only_what_a_sample_tells(
            {"--sample and --within": rate is not None and within is not None},
            {"--core, --image and --criu": bool(files), "--save": save is not None,
             "--by": by is not None, "--top": top is not None},
        )  # fmt: skip
        if partial_passes:
            raise Usage(
                "--partial-passes does not go with a sample: each look at it reads all of it",
                "leave out one of them",
            )
    if partial_passes and save is not None:
        raise Usage(
            "--save does not go with --partial-passes: it keeps which pages are volatile",
            "leave out `--partial-passes`",
        )
    key = _key(save, label, key_file, seed)
    pids = [] if files and not choice else scanning.choose(choice)
    sample: Sampled | None = None
    scan: Scan | None = None
    with output.progress() as progress:
        plan = scanning.Plan(
            options=Options(
                scope=scope,
                threads=threads or 0,
                seed=key.seed if key else seed,
                progress=progress,
            ),
            passes=passes,
            interval_seconds=interval,
            full_scan_seconds=full_scan,
            assumed=dict(assumed),
            partial_passes=partial_passes,
        )
        if budget_bytes is not None:
            whole = {"--save": save is not None, "--by": by is not None, "--top": top is not None}
            found = _within_memory(pids, plan, budget_bytes, whole, output)
            sample, scan = (None, found) if isinstance(found, scanning.Scan) else (found, None)
        elif sampled:
            sample = _sample(pids, plan, rate, within, output)
        if sample is None and scan is None:
            scan = (
                scanning.scan_files(files, pids, plan) if files else scanning.scan_pids(pids, plan)
            )
    if sample is not None:
        return _show_sample(sample, output, words_of(choice), verbose=verbose)
    assert scan is not None
    if key and save:
        from dedup.estimate import fingerprints, store

        store.save(fingerprints.of_scan(scan, key, label or ""), save)
    if output.json:
        output.result(jsonout.scan_object(scan, by, jsonout.TOP if top is None else top))
    else:
        view = text.View(
            scan,
            by=by,
            verbose=verbose,
            width=output.width,
            plain=output.plain,
            choice=words_of(choice),
            top=text.TOP_CONTENTS if top is None else top,
        )
        output.show(*view.result())
        warnings = [*others_at_the_knobs(), *changed_for_now()]
        output.advise(*(f"Warning: {other}" for other in warnings), *view.advice())
    if scan.complete:
        return 0
    output.note(f"dedup: done in part: {text.partial(scan)}")
    return Partial.exit_status


def _only_what_a_sample_tells(twice: dict[str, bool], other: dict[str, bool]) -> None:
    """Refuse options that a sample has nothing for."""
    for words, given in twice.items():
        if given:
            raise Usage(f"{words} both say how much to read", "leave out one of them")
    for words, given in other.items():
        if given:
            raise Usage(
                f"{words} {'do' if ' ' in words else 'does'} not go with a sample: it takes all "
                "of the memory of live processes",
                "leave it out, or leave out `--sample` and `--within`",
            )


def _sample(
    pids: list[int],
    plan: Plan,
    rate: float | None,
    within: float | None,
    output: Output,
) -> Sampled | None:
    """Scan a sample; None where everything is as quick, or fits."""
    from dataclasses import replace

    from dedup import sampling
    from dedup.estimate.sampled import RATE_MOST

    if within is not None:
        sampling.require()
        rate = sampling.rate_within(pids, plan, within)
        if rate is None:
            plan.interval_most_seconds = sampling.interval_within(plan, within)
            output.note(f"dedup: everything is read: that fits into {within:g} s")
            return None
    assert rate is not None
    if rate > RATE_MOST:
        output.note(f"dedup: everything is read: above {RATE_MOST:.0%} a sample is no quicker")
        return None
    return sampling.sample_pids(pids, rate, replace(plan), within)


def _within_memory(
    pids: list[int], plan: Plan, budget_bytes: int, whole: dict[str, bool], output: Output
) -> Scan | Sampled:
    """Scan within a budget: everything where it fits, else a sample by content."""
    from dedup import budget
    from dedup.kernel.footprint import resident_bytes
    from dedup.scanning import Scan

    wanted = [words for words, given in whole.items() if given]
    found = budget.scan_pids(
        pids, budget_bytes, plan, own_bytes=resident_bytes(), whole=wanted[0] if wanted else ""
    )
    if isinstance(found, Scan):
        output.note("dedup: everything is kept: that fits into the memory allowed")
    return found


def _show_sample(scan: Sampled, output: Output, choice: str, *, verbose: bool) -> int:
    from dedup.report import jsonout
    from dedup.report.sampled import SampleView

    if output.json:
        output.result(jsonout.sample_object(scan))
    else:
        view = SampleView(
            scan, verbose=verbose, width=output.width, plain=output.plain, choice=choice
        )
        output.show(*view.result())
    return 0 if scan.complete else Partial.exit_status


def _key(
    save: Path | None, label: str | None, key_file: Path | None, seed: int | None
) -> Key | None:
    """The key for what is to be saved, before the work of a scan."""
    if save is None:
        if label is not None or key_file is not None:
            raise Usage("--label and --key-file need --save", "name a file: `--save web-1.dedup`")
        return None
    if seed is not None:
        raise Usage("--save takes the seed from its key", "leave out `--seed`")
    if label is not None and not 0 < len(label) <= LABEL_MOST:
        raise Usage(f"--label takes 1 to {LABEL_MOST} characters")
    from dedup.estimate import key, store

    store.require()
    store.check(save)
    chosen = key_file or save.parent / key.NAME
    if os.path.realpath(save) == os.path.realpath(chosen):
        raise Usage(f"{save} is the file of the key, and would be replaced", "name another file")
    return key.of_file(chosen)
