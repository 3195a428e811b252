"""`dedup apply`: make memory mergeable, and hold ksmd's counters against the prediction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dedup.cli.options import Seconds, chooses_processes, reports
from dedup.cli.root import Exemplified
from dedup.errors import CheckFailed, Interrupted, NoSuchProcess, Partial, Usage

if TYPE_CHECKING:
    from dedup.change.plan import How, Wish
    from dedup.change.trust import Domain
    from dedup.cli.output import Output
    from dedup.kernel.processes import Choice
    from dedup.selftest.run import CaseResult
    from dedup.sources.live import Scope


@click.command(
    cls=Exemplified,
    examples=[
        ("sudo dedup apply --name redis-server --dry-run", "what it would do, and bring"),
        ("sudo dedup apply --name redis-server --start-ksmd", "do it, and hold it to its word"),
        ("sudo dedup apply --undo", "take back all that it has made mergeable"),
        ("sudo dedup apply --self-test", "known layouts, every counter compared"),
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
    "--how",
    type=click.Choice(["auto", "whole", "ranges"]),
    default="auto",
    show_default=True,
    help="Make mergeable the whole of each process, what it maps later and its children included; "
    "or only the ranges that pay. auto: ranges, where they bring 95 % for half of the pages.",
)
@click.option(
    "--scope",
    type=click.Choice(["compatible", "advised"]),
    default="compatible",
    show_default=True,
    help="advised: make nothing mergeable that is not so already.",
)
@click.option(
    "--undo",
    is_flag=True,
    help="Take back what was made mergeable, of the chosen processes or of all.",
)
@click.option(
    "--follow",
    is_flag=True,
    help="Then stay, and take processes too that appear later and fit the choice, until Ctrl-C.",
)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Do what a plan of before says: the output of --dry-run --json. Predicted anew.",
)
@click.option(
    "--domain",
    type=click.Choice(["user", "cgroup", "label"]),
    default="user",
    show_default=True,
    help="Who trusts whom: only within one such domain memory may merge.",
)
@click.option(
    "--accept-side-channels",
    is_flag=True,
    help="Let memory of several domains merge: each may find out what the others hold.",
)
@click.option(
    "--secret-holders",
    is_flag=True,
    help="Take processes too that likely hold secrets, such as ssh-agent and browsers.",
)
@click.option(
    "--suspend-seccomp",
    is_flag=True,
    help="Take processes under seccomp too, and suspend it for the one system call.",
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
    how: How,
    scope: Scope,
    undo: bool,
    follow: bool,
    plan_file: Path | None,
    domain: Domain,
    accept_side_channels: bool,
    secret_holders: bool,
    suspend_seccomp: bool,
    start_ksmd: bool,
    keep_tunables: bool,
    tolerance: int | None,
    timeout: float,
    interval: float | None,
    dry_run: bool,
) -> int:
    """Make processes mergeable while they run, and hold ksmd's counters against the prediction.

    One thread of each process is stopped for a moment, some milliseconds at the most, and makes the
    one system call itself. What is made mergeable stays so until `--undo`, or the process ends. All
    tunables are put back at the end, whatever happens; smart scan is off while it waits. An error,
    or Ctrl-C, takes back everything.
    """
    if self_test:
        if undo:
            raise Usage("--undo does not go with --self-test", "see `dedup apply --help`")
        if choice:
            raise Usage(
                "--self-test uses memory of its own: choose no process with it",
                "see `dedup apply --help`",
            )
        return _self_test(output, cases, dry_run=dry_run)
    if cases:
        raise Usage("--case goes with --self-test", "see `dedup apply --help`")
    if undo:
        if plan_file or follow:
            raise Usage("--undo goes by the record: no --plan, no --follow", "choose by `--pid`")
        return _undo(output, choice, suspend_seccomp=suspend_seccomp, dry_run=dry_run)
    if choice and plan_file:
        raise Usage("--plan has its processes: choose none with it", "see `dedup apply --help`")
    if not choice and plan_file is None:
        raise Usage(
            "nothing chosen to apply to",
            "`dedup apply --self-test`, or name processes: `dedup apply --pid 1234`",
        )
    from dedup import scanning
    from dedup.change import plan as planning
    from dedup.change import planfile
    from dedup.change.apply import apply
    from dedup.report import applied, planned
    from dedup.sources.live import Options

    if follow:
        _require_followable(choice, how, scope, dry_run=dry_run, json=output.json)
        how = "whole"
    given = None if plan_file is None else planfile.read(plan_file)
    wish = planning.Wish(how, domain, accept_side_channels, secret_holders, suspend_seccomp)
    try:
        pids = scanning.choose(choice) if given is None else given.pids
    except NoSuchProcess:
        if not follow:
            raise
        return _follow(output, choice, wish)
    with output.progress() as progress:
        scan_plan = scanning.Plan(
            options=Options(scope=scope, progress=progress), interval_seconds=interval
        )
        if dry_run:
            plan = planning.make(pids, scan_plan, wish, given=given)
        else:
            result = apply(
                pids,
                scan_plan,
                wish,
                start_ksmd=start_ksmd,
                keep_tunables=keep_tunables,
                tolerance_pages=tolerance,
                timeout_seconds=timeout,
                progress=progress,
                given=given,
                step=(lambda _: None) if follow else _finishing,
            )
    if dry_run:
        if output.json:
            output.result(planned.plan_object(plan))
        else:
            output.show(*planned.plan_parts(plan))
        return 0 if plan.scan.complete else Partial.exit_status
    if output.json:
        output.result(applied.application_object(result))
    else:
        output.show(
            "\n".join(planned.marked_lines(result)),
            "",
            applied.comparison_table(result.comparison, output.width, plain=output.plain),
            "",
            applied.process_table(result, output.width, plain=output.plain),
            "",
            "\n".join(applied.application_lines(result)),
        )
    if not result.holds:
        return CheckFailed.exit_status
    if follow:
        return _follow(output, choice, wish)
    return 0 if result.scan.complete else Partial.exit_status


def _require_followable(
    choice: Choice, how: How, scope: Scope, *, dry_run: bool, json: bool
) -> None:
    """Refuse words that mean nothing together with --follow."""
    if not choice:
        return
    if how == "ranges" or scope == "advised":
        raise Usage(
            "--follow makes whole processes mergeable", "leave out `--how ranges` and `--scope`"
        )
    if dry_run or json:
        raise Usage("--follow has no result", "leave out `--dry-run` and `--json`")
    if not (choice.names or choice.users or choice.cgroups or choice.containers or choice.all):
        raise Usage(
            "--follow needs a choice that later processes can fit; children of a process that is "
            "mergeable as a whole are so anyway",
            "`--name`, `--user`, `--cgroup`, `--container` or `--all`",
        )


def _follow(output: Output, choice: Choice, wish: Wish) -> int:
    """Take what appears later, until a signal."""
    from dedup.change.follow import Followed, follow
    from dedup.kernel import arrivals, processes
    from dedup.report.names import safe

    marked = 0

    def tell(one: Followed) -> None:
        nonlocal marked
        marked += one.outcome == "marked"
        words = {"marked": "is mergeable now", "already": "is so already", "left": "left"}
        why = f": {one.why}" if one.why else ""
        output.show(f"{one.pid} {safe(one.name)}: {words[one.outcome]}{safe(why)}")

    find = arrivals.in_choice(choice)
    now = set(find())
    output.show("following; Ctrl-C ends it, and what is mergeable stays so")
    try:
        follow(find, [i for i in processes.every() if i.id.pid in now], wish, tell)
    except Interrupted:
        output.show(
            f"{marked} that appeared later were made mergeable: `dedup apply --undo` takes them "
            "back"
        )
    return 0


def _finishing(step: str) -> None:
    """What is finished stays: a signal would say that it was taken back."""
    if step == "finish":
        from dedup.cli import guard

        guard.too_late_to_interrupt()


def _undo(output: Output, choice: Choice, *, suspend_seccomp: bool, dry_run: bool) -> int:
    from dedup import scanning
    from dedup.change.applied import Applied
    from dedup.change.tunables import host_locked
    from dedup.change.undo import undo
    from dedup.report import planned

    pids = set(choice.pids)
    if choice:
        try:
            pids |= set(scanning.choose(choice))
        except NoSuchProcess:
            if not pids:
                raise
    with host_locked(dry_run=dry_run):
        result = undo(
            Applied(),
            (lambda process: process.pid in pids) if choice else (lambda _: True),
            suspend_seccomp=suspend_seccomp,
            dry_run=dry_run,
        )
    if output.json:
        output.result(planned.undo_object(result, dry_run=dry_run))
    else:
        output.show("\n".join(planned.undo_lines(result, dry_run=dry_run)))
    return 0 if result.complete else Partial.exit_status


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
