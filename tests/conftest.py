"""Which tests run, in which order, and what makes a session fail besides a failing test.

- Tests marked `slow` run only with DEDUP_NIGHTLY=1 or when `-m` names them.
- Tests marked `root` or `ksm` are skipped where they cannot run.
- Tests marked `ksm` come last, and hold a lock meanwhile: two sessions never run them side by side.
- A session that leaves KSM's settings other than it found them fails.
- With DEDUP_STRICT_SKIPS=1, so does one that skips a test without tests/allowed_skips.txt
  allowing it, and one in which no test ran.
"""

import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest_plugins = ("tests.kernel_fixtures",)

KSM = Path("/sys/kernel/mm/ksm")
KSM_LOCK = Path(tempfile.gettempdir(), "dedup-tests-ksm.lock")
ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")
STRICT_SKIPS = os.environ.get("DEDUP_STRICT_SKIPS") == "1"
NIGHTLY = os.environ.get("DEDUP_NIGHTLY") == "1"


# --- Which tests run ------------------------------------------------------------------------------


def why_not(item: pytest.Item) -> str | None:
    """Return the reason for which a test cannot run here, if there is one."""
    is_root = os.geteuid() == 0
    if item.get_closest_marker("root") and not is_root:
        return "needs root"
    if item.get_closest_marker("ksm"):
        if not is_root:
            return "needs root"
        if not KSM.is_dir():
            return f"this kernel has no {KSM}"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not NIGHTLY and not re.search(r"\bslow\b", config.getoption("markexpr")):
        slow = [item for item in items if item.get_closest_marker("slow")]
        if slow:
            items[:] = [item for item in items if not item.get_closest_marker("slow")]
            config.hook.pytest_deselected(items=slow)
            config.stash[SLOW_LEFT_OUT] = len(slow)
    items.sort(key=lambda item: item.get_closest_marker("ksm") is not None)
    for item in items:
        if reason := why_not(item):
            item.add_marker(pytest.mark.skip(reason=reason))


SLOW_LEFT_OUT = pytest.StashKey[int]()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if left_out := config.stash.get(SLOW_LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{left_out} slow test(s) left out; DEDUP_NIGHTLY=1 or -m slow runs them"
        )


# --- The kernel's settings ------------------------------------------------------------------------


@contextmanager
def ksm_lock(operation: int) -> Iterator[None]:
    """Hold the lock of the tests that drive KSM; with LOCK_NB, BlockingIOError says it is taken."""
    try:
        descriptor = os.open(KSM_LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        descriptor = os.open(KSM_LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    # The outermost wrapper, so that a wait for the lock does not count towards the test's timeout.
    if item.get_closest_marker("ksm") is None or why_not(item) is not None:
        return (yield)
    with ksm_lock(fcntl.LOCK_EX):
        return (yield)


def ksm_settings() -> dict[str, str]:
    """Return what can be set in KSM, and to what it is set."""
    settings = {
        path.name: path.read_text().strip()
        for path in sorted(KSM.iterdir())
        if stat.S_IMODE(path.stat().st_mode) & 0o222
    }
    if "[scan-time]" in settings.get("advisor_mode", ""):
        # Then the kernel itself keeps changing this one.
        settings.pop("pages_to_scan", None)
    return settings


def ksm_settings_now(*, wait: bool) -> dict[str, str] | None:
    """Return KSM's settings while no other session's test is changing them, None if one is."""
    if os.geteuid() != 0 or not KSM.is_dir():
        return None
    try:
        with ksm_lock(fcntl.LOCK_SH if wait else fcntl.LOCK_SH | fcntl.LOCK_NB):
            return ksm_settings()
    except BlockingIOError:
        return None


# --- What makes a session fail --------------------------------------------------------------------


@dataclass
class Outcome:
    """What the end of the session is judged by."""

    ran: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


OUTCOME = pytest.StashKey[Outcome]()


def read_allowed_skips(text: str) -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
    """Parse allowed_skips.txt into pairs of patterns, for a test's id and for a reason."""
    allowed = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split(" | ", maxsplit=1)]
        if len(parts) != 2 or not all(parts):
            raise pytest.UsageError(f"{ALLOWED_SKIPS}:{number}: not `test id | reason`: {line}")
        test, reason = (
            re.compile(".*".join(map(re.escape, part.split("*"))), re.DOTALL) for part in parts
        )
        allowed.append((test, reason))
    return allowed


def pytest_configure(config: pytest.Config) -> None:
    outcome = config.stash[OUTCOME] = Outcome()
    config.pluginmanager.register(Recorder(outcome), "dedup-recorder")
    read_allowed_skips(ALLOWED_SKIPS.read_text())


class Recorder:
    """Notes which tests ran and which were skipped, and why."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.note_skip(report)
        elif report.when == "call" or report.failed:
            self.outcome.ran += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.note_skip(report)

    def note_skip(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        longrepr = report.longrepr
        reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        self.outcome.skipped.append((report.nodeid, reason.removeprefix("Skipped: ")))


def report_error(session: pytest.Session, nodeid: str, message: str) -> None:
    """Count an error like one of a test's own, so that every summary names it."""
    session.config.hook.pytest_runtest_logreport(
        report=pytest.TestReport(
            nodeid=nodeid,
            location=(nodeid.partition("::")[0], None, nodeid),
            keywords={},
            outcome="failed",
            longrepr=message,
            when="teardown",
        )
    )


def judge_skips(session: pytest.Session, outcome: Outcome) -> None:
    """Report every skip that is not allowed, and a session in which no test ran."""
    allowed = read_allowed_skips(ALLOWED_SKIPS.read_text())
    ran = outcome.ran
    for nodeid, reason in outcome.skipped:
        if not any(t.fullmatch(nodeid) and r.fullmatch(reason) for t, r in allowed):
            report_error(
                session,
                nodeid,
                f"skipped without leave: {reason}\nMake it run, or allow the skip by a line in "
                f"tests/{ALLOWED_SKIPS.name}:\n{nodeid} | {reason}",
            )
    if outcome.skipped and not ran:
        report_error(session, "tests/conftest.py::no_test_ran", "no test ran: all were skipped")


def judge_settings(session: pytest.Session, before: dict[str, str]) -> None:
    """Report the settings of KSM that are no longer what they were before the first test."""
    after = ksm_settings_now(wait=any(item.get_closest_marker("ksm") for item in session.items))
    if after is None:
        return
    if changed := [
        f"{name}: it was {before.get(name)}, now it is {after.get(name)}"
        for name in sorted(before.keys() & after.keys())
        if before[name] != after[name]
    ]:
        report_error(
            session,
            "tests/conftest.py::ksm_settings",
            f"the tests left settings changed in {KSM}:\n" + "\n".join(changed),
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    # Around the loop, not in a fixture: this sees what the last fixture's end leaves behind, and
    # a wait for another session's tests counts towards no test's timeout.
    if session.config.option.collectonly:
        return (yield)
    before = ksm_settings_now(wait=any(item.get_closest_marker("ksm") for item in session.items))
    try:
        return (yield)
    finally:
        if before is not None:
            judge_settings(session, before)
        if STRICT_SKIPS:
            judge_skips(session, session.config.stash[OUTCOME])
