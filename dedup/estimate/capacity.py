"""A capacity plan from end to end: files, curve, what fits, bad days, ksmd's price."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from dedup import calibration
from dedup.errors import Usage
from dedup.estimate import domains, host, store, stress
from dedup.estimate.curve import LEAST, Service
from dedup.estimate.fingerprints import LIVE, MIXED, UNKNOWN
from dedup.estimate.host import Memory
from dedup.estimate.rules import Rules
from dedup.kernel import ksmd, meminfo
from dedup.model import cost

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from dedup.estimate.curve import Point
    from dedup.estimate.domains import Domain
    from dedup.estimate.fingerprints import Facts, Instance
    from dedup.estimate.host import Fits
    from dedup.estimate.stress import Day
    from dedup.model.cost import Cost

DEFAULTS: Final = {"max_page_sharing": 256, "use_zero_pages": 0, "merge_across_nodes": 1}
"""The kernel's, where a scan was taken without KSM."""


NAMED: Final = 3
"""Files that a warning names."""
FILES_LACK: Final = (
    "do not tell what changes, what fork shares, what lies in huge pages, nor page tables, shared "
    "memory and pages of files: all pages count as lasting, with frames of their own, and the "
    "rest as nothing; zeros may be memory that was never touched"
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for.

    Parameters
    ----------
    label : str, optional
        Only files of this service.
    ram_bytes : int, optional
        None: this host's.
    reserve_bytes : int
    headroom : float
        Share that is to stay free.
    instances : int, optional
        The curve goes so far, at the least.
    assumed : mapping of str to int
        Tunables in place of those of the scans.
    mix : mapping of str to int, optional
    swap_bytes : int, optional
    """

    label: str | None = None
    ram_bytes: int | None = None
    reserve_bytes: int = 0
    headroom: float = 0.0
    instances: int | None = None
    assumed: Mapping[str, int] = field(default_factory=dict)
    mix: Mapping[str, int] | None = None
    """Instances of each service, by label, that go together."""
    swap_bytes: int | None = None
    """None: this host's, with its memory; else none."""


@dataclass(frozen=True, slots=True)
class Caution:
    """Something that the figures do not say by themselves."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer."""

    wish: Wish
    instances: list[Instance]
    service: Service
    parts: list[Service]
    """Each service of a mix by itself; the service alone without one."""
    tunables: dict[str, int]
    memory: Memory
    curve: list[Point]
    fits: Fits
    stressed: int
    """Instances that the bad days and the price are for: as many as fit, one at the least."""
    days: list[Day]
    domains: list[Domain]
    cost: Cost | None
    """None where ksmd scans nothing."""
    warnings: list[Caution]

    @property
    def label(self) -> str:
        """The service, or the mix as it was asked for."""
        if self.wish.mix is None:
            return self.service.facts[0].label
        return ",".join(f"{label}={n}" for label, n in self.wish.mix.items())

    @property
    def restart_seconds(self) -> float | None:
        """Until ksmd has merged an instance that starts anew, at the most."""
        return None if self.cost is None else stress.AGAIN_SCANS * self.cost.full_scan_seconds


def plan(paths: Sequence[Path], wish: Wish) -> Plan:
    """Plan from saved scans.

    Raises
    ------
    BadInput, NotPermitted, Unsupported
        See `store.load_all`.
    Usage
        The files are of several services, none of the one asked for, or too many.
    """
    return of_instances(_chosen(store.load_all(paths), wish), wish)


def of_instances(found: list[Instance], wish: Wish) -> Plan:
    """Plan from instances made with the same key: of one service, or of those of a mix.

    Raises
    ------
    Usage
        They are too many.
    """
    told = next((i.facts.tunables for i in found if i.facts.tunables), {})
    tunables = {**DEFAULTS, **told, **wish.assumed}
    rules = Rules(tunables["max_page_sharing"], bool(tunables["use_zero_pages"]))
    service = Service(found, rules, wish.mix)
    parts = [service]
    if wish.mix is not None and len(wish.mix) > 1:
        parts = [
            Service([i for i in found if i.facts.label == label], rules, {label: n})
            for label, n in wish.mix.items()
        ]
    ram, swap = wish.ram_bytes, wish.swap_bytes
    if swap is None:
        swap = meminfo.swap_bytes() if ram is None else 0
    if ram is None:
        ram = meminfo.total_bytes()
    memory = Memory(ram, wish.reserve_bytes, wish.headroom, swap)
    curve, fits = host.fit(service, memory, max(LEAST, wish.instances or 0))
    stressed = max(1, fits.with_ksm)
    point = curve[stressed - 1]
    settings = cost.Settings.of(tunables, ksmd.tick_seconds())
    price = None
    if settings.pages_to_scan:
        price = cost.price(service.load(point), settings, calibration.load().calibration)
    return Plan(
        wish=wish,
        instances=found,
        service=service,
        parts=parts,
        tunables=tunables,
        memory=memory,
        curve=curve,
        fits=fits,
        stressed=stressed,
        days=stress.days(service, curve, stressed, memory, price),
        domains=domains.domains(service, parts, curve, stressed, memory.budget_bytes),
        cost=price,
        warnings=_warnings(service, tunables, wish, fits),
    )


def _chosen(instances: list[Instance], wish: Wish) -> list[Instance]:
    """The instances of the services asked for."""
    label, labels = wish.label, sorted({i.facts.label for i in instances})
    if wish.mix is not None:
        for one in wish.mix:
            if one not in labels:
                raise Usage(
                    f"no file is of the service {shlex.quote(one)}",
                    f"they have {_list(labels)}: each as `--mix {shlex.quote(f'{labels[0]}=1')}`",
                )
        return [i for i in instances if i.facts.label in wish.mix]
    if label is None and len(labels) > 1:
        raise Usage(
            f"the files are of several services: {_list(labels)}",
            f"choose one: `--label {shlex.quote(labels[0])}`, or say how many of each go together: "
            f"`--mix {shlex.quote(','.join(f'{one}=1' for one in labels))}`",
        )
    found = [i for i in instances if label is None or i.facts.label == label]
    if not found:
        raise Usage(f"no file is of the service {label}", f"they have {_list(labels)}")
    return found


def _list(labels: Sequence[str]) -> str:
    """Labels in a row; in quotes where one would read as several."""
    return ", ".join(f"'{one}'" if "," in one else shlex.quote(one) for one in labels)


def _warnings(
    service: Service, tunables: Mapping[str, int], wish: Wish, fits: Fits
) -> list[Caution]:
    i, facts = service.incidence, service.facts
    out: list[Caution] = []
    what = "fit" if wish.mix is None else "mixes fit"
    worst = f"{fits.worst:,} {what} should further ones share with nobody"

    def warn(code: str, message: str) -> None:
        out.append(Caution(code, message))

    def who(chosen: list[Facts]) -> str:
        if len(facts) == 1:
            return "the instance"
        which = [
            name for name, f in zip(service.names, facts, strict=True)
            if any(f is one for one in chosen)
        ]  # fmt: skip
        named = "" if len(chosen) == len(facts) else f" ({', '.join(which[:NAMED])}"
        more = f" and {len(which) - NAMED} more)" if len(which) > NAMED else ")"
        return f"{len(chosen)} of {len(facts)} instances{named + more if named else ''}"

    def of(sizes: Collection[int]) -> str:
        """Which services of a mix have so many instances."""
        which = [
            label for label, k in zip(service.labels, i.sizes.tolist(), strict=True) if k in sizes
        ]
        return f"{', '.join(which)}: " if len(service.labels) > 1 else ""

    if 1 in i.sizes:
        warn(
            "one-instance",
            f"{of([1])}one instance does not tell what another has in common with it: only what "
            "is certain is counted as merged, and the range goes to instances all alike; take "
            "three",
        )
    if 2 in i.sizes:
        warn(
            "two-instances",
            f"{of([2])}two instances can't tell what all share from what some share: the upper "
            "bound is the worst case; take a third",
        )
    for s, label in enumerate(service.labels):
        if not i.suspected(s):
            continue
        few, many, _ = i.pairs(s)
        kinds = " + ".join(str(len(kind)) for kind in i.kinds(s))
        whose = "the instances" if len(service.labels) == 1 else f"those of {label}"
        warn(
            "classes",
            f"{whose} look like several kinds ({kinds}): two of them have {round(few):,} to "
            f"{round(many):,} contents in common. Kinds share within themselves only (one more "
            "character in an argument is enough). The figures take further ones for kinds that "
            f"were seen; the upper bound is the worst case: {worst}. Take more instances, or each "
            "kind under a label of its own",
        )
    for code, chosen, words in (
        ("from-files", [f for f in facts if f.source != LIVE],
         f"came from files, which {FILES_LACK}"),
        ("one-look", [f for f in facts if f.looks < 2 and f.source in {LIVE, MIXED}],
         "was looked at once: pages that change count as lasting; leave out `--passes 1`"),
        ("drifting", [f for f in facts if f.drifting],
         "was still changing its nature: the figures are of a moment"),
        ("extrapolated", [f for f in facts if f.extrapolated],
         "was watched for less than ksmd's steady state takes: fewer pages may last"),
        ("frames-hidden", [f for f in facts if not f.frames_known and f.source == LIVE],
         "was scanned without root: frames that fork shares count for each process"),
        ("partial", [f for f in facts if not f.complete], "was scanned in part"),
        ("swap", [f for f in facts if f.swap_bytes],
         "had memory swapped out, which is not counted"),
    ):  # fmt: skip
        if chosen:
            several = min(len(facts), len(chosen)) > 1
            verb = words.replace("was ", "were ", 1) if several else words
            warn(code, f"{who(chosen)} {verb}")
    if all(f.randomized == "none" for f in facts) and i.certain:
        warn(
            "fixed-addresses",
            "addresses are not random, so instances share whole layouts, and there may be several "
            "(a file more in a program's folder is enough): up to "
            f"{100 * i.class_share:.0f} % of all may have one that was not seen, and in the "
            f"worst case {worst}. Take more instances, started at different times",
        )
    if len({f.randomized for f in facts} - {UNKNOWN}) > 1:
        warn("randomized", "some instances have random addresses and others not: they share less")
    kernels = sorted({f.kernel for f in facts if f.kernel})
    if len(kernels) > 1:
        warn("kernels", f"the scans are of several kernels, {', '.join(kernels)}: rules are those "
             "of one")  # fmt: skip
    if len({f.source for f in facts}) > 1:
        warn("sources", "scans of files and of live processes differ by what files can't tell: "
             "their sizes do not compare")  # fmt: skip
    for name in ("max_page_sharing", "use_zero_pages"):
        values = {f.tunables.get(name, DEFAULTS[name]) for f in facts if f.tunables}
        if len(values) > 1 and name not in wish.assumed:
            warn("tunables", f"{name} was not the same for all; {tunables[name]} is taken")
    if not tunables["merge_across_nodes"]:
        warn("nodes", "merge_across_nodes is off: on several NUMA nodes less merges than this")
    if fits.with_ksm >= service.most:
        warn("limit", f"more than {service.most:,} fit: the plan ends there")
    return out
