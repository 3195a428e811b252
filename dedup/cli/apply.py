"""`dedup apply`: wait for ksmd, and hold its counters against the prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dedup.cli.options import Seconds, chooses_processes, reports
from dedup.cli.root import Exemplified
from dedup.errors import CheckFailed, Partial, Usage

if TYPE_CHECKING:
    from dedup.cli.output import Output
    from dedup.kernel.processes import Choice
    from dedup.selftest.run import CaseResult


@click.command(
    cls=Exemplified,
    examples=[
        ("sudo dedup apply --self-test", "known layouts, every counter compared"),
        ("sudo dedup apply --self-test --case 'article*'", "one of them"),
        ("sudo dedup apply --name redis-server --start-ksmd", "processes begun with `dedup run`"),
    ],
)
@chooses_processes
@click.option(
    "--self-test",
    is_flag=True,
    help="On memory of its own with known contents; starts and rests ksmd itself.",
)
@click.option(
    "--case",
    "cases",
    multiple=True,
    metavar="GLOB",
    help="With --self-test: only cases of this name.",
)
@click.option(
    "--start-ksmd",
    is_flag=True,
    help="Let ksmd run for the time of this command; then it is put back.",
)
@click.option(
    "--keep-tunables",
    is_flag=True,
    help="Leave smart scan as it is; unshared and volatile then count as one.",
)
@click.option(
    "--tolerance",
    type=click.IntRange(min=0),
    metavar="PAGES",
    help="Pages by which a counter may differ; default: those seen volatile.",
)
@click.option(
    "--timeout",
    type=Seconds(),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="For ksmd to converge.",
)
@click.option(
    "--interval",
    type=Seconds(auto=True),
    default="auto",
    show_default=True,
    metavar="SECONDS|auto",
    help="Between the two looks of the prediction.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done; change nothing.")
@reports
def command(
    choice: Choice,
    output: Output,
    self_test: bool,
    cases: tuple[str, ...],
    start_ksmd: bool,
    keep_tunables: bool,
    tolerance: int | None,
    timeout: float,
    interval: float | None,
    dry_run: bool,
) -> int:
    """Wait until ksmd has merged what is mergeable, and compare its counters with the prediction.

    The chosen processes' memory must be mergeable already (`dedup run`, or madvise by the program
    itself). Smart scan is off while it waits. All tunables are put back at the end, whatever
    happens.
    """
    if self_test:
        if choice:
            raise Usage(
                "--self-test uses memory of its own: choose no process with it",
                "see `dedup apply --help`",
            )
        return _self_test(output, cases, dry_run=dry_run)
    if cases:
        raise Usage("--case goes with --self-test", "see `dedup apply --help`")
    if not choice:
        raise Usage(
            "nothing chosen to apply to",
            "`dedup apply --self-test`, or name processes: `dedup apply --pid 1234`",
        )
    from dedup import scanning
    from dedup.change.apply import apply, require_mergeable
    from dedup.report import applied, jsonout, text
    from dedup.sources.live import Options

    pids = scanning.choose(choice)
    with output.progress() as progress:
        plan = scanning.Plan(
            options=Options(scope="advised", progress=progress), interval_seconds=interval
        )
        if dry_run:
            scan = scanning.scan_pids(pids, plan)
            require_mergeable(scan)
        else:
            result = apply(
                pids,
                plan,
                start_ksmd=start_ksmd,
                keep_tunables=keep_tunables,
                tolerance_pages=tolerance,
                timeout_seconds=timeout,
                progress=None
                if progress is None
                else (lambda c: progress("merged", c.pages_sharing, c.rmap_items)),
            )
    if dry_run:
        if output.json:
            output.result(jsonout.scan_object(scan))
        else:
            view = text.View(scan, by=None, verbose=False, width=output.width, plain=output.plain)
            output.show(*view.result())
        return 0
    if output.json:
        output.result(applied.application_object(result))
    else:
        output.show(
            applied.comparison_table(result.comparison),
            "",
            "\n".join(applied.application_lines(result)),
        )
    if not result.holds:
        return CheckFailed.exit_status
    return 0 if result.scan.complete else Partial.exit_status


def _self_test(output: Output, globs: tuple[str, ...], *, dry_run: bool) -> int:
    import fnmatch

    from dedup.kernel import pagemap
    from dedup.kernel.ksm import Ksm
    from dedup.report import applied
    from dedup.selftest import run as selftest
    from dedup.selftest.cases import Case, all_cases

    def wanted(case: Case) -> bool:
        return not globs or any(fnmatch.fnmatchcase(case.name, g) for g in globs)

    ksm = Ksm()
    ksm.require()
    sight = pagemap.sight()
    chosen = [c for c in all_cases(sight.huge_bytes // sight.page_size) if wanted(c)]
    if not chosen:
        raise Usage("no case has that name", "list them: `dedup apply --self-test --dry-run`")
    if dry_run:
        if output.json:
            output.result(applied.case_list_object(chosen))
        else:
            output.show("\n".join(c.name for c in chosen))
        return 0
    tunables = ksm.tunables()

    def show(result: CaseResult) -> None:
        if not output.json:
            output.show(applied.case_line(result))

    with output.progress() as progress:
        test = selftest.run(
            wanted,
            progress=None
            if progress is None
            else (lambda _name, done, total: progress("cases", done, total)),
            on_result=show,
        )
    if output.json:
        output.result(applied.self_test_object(test, sight.page_size, tunables))
    else:
        output.show(applied.self_test_summary(test))
    for warning in test.warnings:
        output.note(f"dedup: warning: {warning}")
    return 0 if test.passed else CheckFailed.exit_status
