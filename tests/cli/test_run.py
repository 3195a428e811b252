from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pexpect
import pytest

from dedup import schema
from dedup.kernel.ksm import Ksm
from tests.kernel_fixtures import PAGE, KsmControl, process_numbers

from .conftest import REPOSITORY, Dedup, environment, on_terminal, state_of, wait_for


@pytest.mark.parametrize("dashes", [["--"], []])
def test_the_command_takes_our_place(dedup: Dedup, dashes: list[str]) -> None:
    code = "import os, sys; print(os.getppid()); print(sys.argv[1:])"
    words = ["--json", "--help", "--", "-x", ""]
    result = dedup("run", *dashes, sys.executable, "-c", code, *words)
    assert result.status == 0
    parent, argv = result.out.splitlines()
    assert int(parent) == os.getpid()
    assert argv == str(words)
    assert result.err == ""


def test_its_memory_and_its_childrens_is_mergeable(dedup: Dedup) -> None:
    result = dedup("run", "--", "sh", "-c", "grep -c ' mg' /proc/self/smaps; true")
    assert int(result.out) > 5


def test_its_status_is_the_commands(dedup: Dedup) -> None:
    assert dedup("run", "--", "sh", "-c", "exit 7").status == 7
    assert dedup("run", "--", "sh", "-c", "kill -9 $$").status == -9


def test_signals_are_as_they_were(dedup: Dedup) -> None:
    lines = "grep -E 'Sig(Ign|Blk)' /proc/self/status"
    assert (
        dedup("run", "--", "sh", "-c", lines).out
        == subprocess.run(["sh", "-c", lines], capture_output=True, text=True).stdout
    )


def test_not_found(dedup: Dedup) -> None:
    for word in ("no-such-command-here", "/no/such/command", "/etc/passwd/x"):
        result = dedup("run", "--", word)
        assert result.status == 127
        assert "there is no command" in result.err


def test_not_executable(dedup: Dedup, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    plain = tmp_path / "plain"
    plain.write_text("text")
    for path in (script, plain, tmp_path):
        result = dedup("run", str(path))
        assert result.status == 126
        assert str(path) in result.err.replace("\n  ", "")


@pytest.mark.parametrize("args", [[], ["--"], ["--nonsense", "true"]])
def test_its_own_failures(dedup: Dedup, args: list[str]) -> None:
    result = dedup("run", *args)
    assert result.status == 125
    assert "`dedup run --help`" in result.err


def test_help_tells_of_children_and_of_ksmd(dedup: Dedup) -> None:
    text = " ".join(dedup("run", "--help").out.split())
    assert "children" in text
    assert "maps later" in text
    assert "ksmd" in text


def test_names_that_are_no_text(dedup: Dedup) -> None:
    word = b"\xff\x1b[31m".decode(errors="surrogateescape")
    result = dedup("run", word)
    assert result.status == 127
    assert "\\xff\\x1b[31m" in result.err
    assert dedup("run", "echo", word).out == word + "\n"


def test_a_word_on_a_terminal_where_ksmd_rests() -> None:
    try:
        resting = Path("/sys/kernel/mm/ksm/run").read_text().strip() != "1"
    except OSError:
        pytest.skip("no KSM here")
    shown = on_terminal(["run", "true"])
    assert shown.status == 0
    assert ("ksmd is not running" in " ".join(shown.screen.split())) is resting


# -- as the command's parent -----------------------------------------------------------------------

RUN = (sys.executable, "-m", "dedup", "run")
CATCHES = """
import os, signal, sys, time
got = []
def note(number, frame):
    print(signal.Signals(number).name, flush=True)
for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "WINCH", "ALRM"):
    signal.signal(getattr(signal, "SIG" + name), note)
print("ready", flush=True)
while True:
    line = sys.stdin.readline()
    if not line:
        break
    exec(line)
"""
EQUAL = """
import mmap, sys
memory = mmap.mmap(-1, {pages} * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for page in range({pages}):
    memory[page * mmap.PAGESIZE : (page + 1) * mmap.PAGESIZE] = b"x" * mmap.PAGESIZE
print("ready", flush=True)
sys.stdin.read()
"""


class Running(subprocess.Popen[str]):
    """Nobody waits for it where a test failed: what it waits for may never come."""

    def __exit__(self, kind: Any, value: Any, where: Any) -> None:
        if kind is not None:
            for pid in (*pids_below(self.pid), self.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        super().__exit__(kind, value, where)


def running(*words: str, **more: Any) -> Running:
    return Running(
        [*RUN, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=REPOSITORY, env=environment(), **more,
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def report_of(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    jsonschema.Draft202012Validator(schema.load()).validate(data)
    return data


def test_the_environment_is_what_it_was(dedup: Dedup) -> None:
    bare = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
    for more in ([], ["--report"]):
        done = subprocess.run(
            [*RUN, *more, "env"], env=bare, capture_output=True, text=True, cwd="/"
        )
        assert dict(w.split("=", 1) for w in done.stdout.splitlines()) == bare


@pytest.mark.parametrize("before", [(), ("--ignore-signal=HUP,CHLD",)])
@pytest.mark.parametrize("more", [[], ["--report"]])
@pytest.mark.parametrize(
    "words", [["grep", "-E", "Sig(Ign|Blk|Cgt)", "/proc/self/status"], ["ls", "/proc/self/fd"]]
)
def test_files_and_signal_settings_are_as_they_were(
    before: tuple[str, ...], more: list[str], words: list[str]
) -> None:
    plain, ours = (
        subprocess.run(
            ["env", *before, *prefix, *words],
            capture_output=True, text=True, env=environment(), cwd=REPOSITORY,
        ).stdout
        for prefix in ([], [*RUN, *more, "--"])
    )  # fmt: skip
    assert plain == ours


@pytest.mark.parametrize("more", [[], ["--report"]])
def test_no_randomize(dedup: Dedup, more: list[str]) -> None:
    code = "import sys; print(open('/proc/self/maps').read(), hex(id(sys)))"
    words = ["--no-randomize", *more, "--", sys.executable, "-c", code]
    shown = {dedup("run", *words, PYTHONHASHSEED="0").out for _ in range(3)}
    assert len(shown) == 1
    assert len({dedup("run", "--", *words[words.index("--") + 1 :]).out for _ in range(2)}) == 2


NO_PERSONALITY = """
import ctypes, os, struct, sys
def line(code, jt, jf, k): return struct.pack("HBBI", code, jt, jf, k)
# The number of the call; personality fails with EPERM, all else is allowed.
program = b"".join([line(0x20, 0, 0, 0), line(0x15, 0, 1, int(sys.argv[1])),
                    line(0x06, 0, 0, 0x00050001), line(0x06, 0, 0, 0x7FFF0000)])
buffer = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = [("n", ctypes.c_ushort), ("at", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
filter = Filter(4, ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(filter), 0, 0) == 0
os.execv(sys.argv[2], sys.argv[2:])
"""
PERSONALITY = {"x86_64": 135, "aarch64": 92}


@pytest.mark.parametrize("more", [[], ["--report"]])
def test_no_randomize_refused(dedup: Dedup, more: list[str]) -> None:
    number = str(PERSONALITY[os.uname().machine])
    prefix = (sys.executable, "-c", NO_PERSONALITY, number)
    result = dedup("run", *more, "--no-randomize", "--", "echo", "ran", prefix=prefix)
    assert result.status == 125
    assert result.out == ""
    assert "leave out --no-randomize" in " ".join(result.err.split())
    assert dedup("run", *more, "--", "echo", "ran", prefix=prefix).out == "ran\n"


def test_the_parents_own_failures(dedup: Dedup, tmp_path: Path) -> None:
    result = dedup("run", "--report", "--", "no-such-command-here")
    assert result.status == 127
    assert "there is no command" in result.err
    assert "saved" not in result.err
    assert dedup("run", "--report", str(tmp_path)).status == 126
    result = dedup("run", "--report-json", str(tmp_path / "none" / "x"), "true")
    assert result.status == 125
    assert "No such file" in result.err
    file = tmp_path / "report"
    assert dedup("run", "--report-json", str(file), "no-such-command-here").status == 127
    assert report_of(file)["error"]["code"] == "not-found"


def test_status_and_output_pass_through(dedup: Dedup) -> None:
    result = dedup("run", "--report", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (result.status, result.out) == (7, "out\n")
    assert result.err.startswith("err\ndedup: sh -c ")
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGRTMIN + 2):
        result = dedup("run", "--report", "sh", "-c", f"kill -{int(number)} $$")
        assert result.status == -number


def test_a_report_that_can_not_be_written_is_told() -> None:
    with running("--report-json", "/dev/full", "sh", "-c", "exit 7") as process:
        _, err = process.communicate(timeout=20)
    assert process.returncode == 7
    assert err == "dedup: writing /dev/full failed: No space left on device\n"


def test_signals_are_passed_on(tmp_path: Path) -> None:
    file = tmp_path / "report"
    with running("--report-json", str(file), sys.executable, "-c", CATCHES) as process:
        assert said(process) == "ready"
        for name in ("USR1", "INT", "TERM", "HUP", "QUIT", "USR2", "WINCH", "ALRM", "INT"):
            process.send_signal(getattr(signal, f"SIG{name}"))
            assert said(process) == f"SIG{name}"
        out, err = process.communicate("raise SystemExit(3)\n", timeout=20)
    assert (process.returncode, out, err) == (3, "", "")
    assert (report_of(file)["status"], report_of(file)["signal"]) == (3, None)


def test_a_signal_that_the_command_sends_to_its_group_comes_once() -> None:
    with running("--report", sys.executable, "-c", CATCHES, process_group=0) as process:
        assert said(process) == "ready"
        assert process.stdin is not None
        process.stdin.write("os.kill(0, signal.SIGUSR1)\n")
        process.stdin.flush()
        assert said(process) == "SIGUSR1"
        process.send_signal(signal.SIGUSR2)
        assert said(process) == "SIGUSR2"
        out, _ = process.communicate("", timeout=20)
    assert (process.returncode, out) == (0, "")


BECOMES = """
import os, sys
os.setuid(65533)
print("ready", flush=True)
sys.exit(int(sys.stdin.readline()))
"""


@pytest.mark.root
def test_a_command_that_we_may_not_signal_goes_on() -> None:
    with subprocess.Popen(
        ["setpriv", "--bounding-set=-kill", *RUN, "--report", sys.executable, "-c", BECOMES],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=REPOSITORY, env=environment(),
    ) as process:  # fmt: skip
        assert said(process) == "ready"
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            process.send_signal(number)
            pause(0.2)
        _, err = process.communicate("5\n", timeout=20)
    assert process.returncode == 5, err


def test_death_by_a_signal_that_was_passed_on(tmp_path: Path) -> None:
    file = tmp_path / "report"
    with running("--report-json", str(file), "sh", "-c", "echo on; exec cat") as process:
        assert said(process) == "on"
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM
    assert (report_of(file)["status"], report_of(file)["signal"]) == (None, signal.SIGTERM)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def pause(seconds: float) -> None:
    """For a reading or two of the counters, which nothing shows from outside."""
    begin = time.monotonic()
    wait_for(lambda: time.monotonic() - begin > seconds)


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_sigstop_of_the_command_alone_is_left_to_who_sent_it() -> None:
    with running("--report", "cat") as process:
        wait_for(lambda: Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text() != "")
        child = child_of(process.pid)
        os.kill(child, signal.SIGSTOP)
        wait_for(lambda: state_of(child) == "T")
        assert state_of(process.pid) == "S"
        os.kill(process.pid, signal.SIGCONT)
        wait_for(lambda: state_of(child) == "S")
        out, _ = process.communicate("more", timeout=20)
    assert out == "more"


def test_on_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C comes once, Ctrl-Z stops both, `fg` goes on with both; the shell sees it all."""
    program = tmp_path / "program"
    program.write_text(CATCHES.replace("sys.stdin.readline()", "input()"))
    shell = pexpect.spawn(
        "bash", ["--norc", "--noprofile", "-i"], env=environment(TERM="dumb", PS1="$ "),
        cwd=str(REPOSITORY), encoding="utf-8", timeout=20, echo=False,
    )  # fmt: skip
    shell.expect_exact("$ ")
    shell.sendline(f"{sys.executable} -m dedup run --report {sys.executable} {program}")
    shell.expect_exact("ready")
    for _ in range(2):
        shell.sendintr()
        shell.expect_exact("SIGINT")
        shell.sendline("print('and', 'on')")
        # A second one would come in between.
        shell.expect_exact("and on")
        assert "SIGINT" not in shell.before
        shell.send("\x1a")
        shell.expect_exact("Stopped")
        shell.expect_exact("$ ")
        stopped = [p for p in pids_below(shell.pid) if state_of(p) == "T"]
        assert len(stopped) == 2
        shell.sendline("fg")
        shell.expect_exact("--report")
        for pid in stopped:
            wait_for(lambda: state_of(pid) in "SR")  # noqa: B023 - called at once
    shell.sendline("raise SystemExit(9)")
    shell.expect_exact("dedup: ")
    shell.expect_exact("$ ")
    shell.sendline("echo status $?")
    shell.expect_exact("status 9")
    shell.sendline(f"{sys.executable} -m dedup run --report cat; echo and then")
    wait_for(lambda: len(pids_below(shell.pid)) == 2)
    shell.sendintr()
    shell.expect_exact("ended by SIGINT")
    # The shell gives the rest of the line up, as for any command that ends by Ctrl-C.
    shell.expect_exact("$ ")
    assert "and then" not in shell.before.replace("; echo and then", "")
    shell.sendline("exit")
    shell.close()


def pids_below(pid: int) -> list[int]:
    from dedup.kernel.family import descendants

    return descendants(pid)


def test_orphans_are_seen_and_reaped_and_may_go_on(tmp_path: Path) -> None:
    file = tmp_path / "report"
    # A daemon of the command's, twice removed, that outlives it; and one that ends before.
    script = (
        "(sleep 30 >/dev/null 2>&1 </dev/null & echo $!); (true &); (sleep 0.1 &);"
        "read line; cat /proc/$PPID/task/$PPID/children"
    )
    with running("--report-json", str(file), "sh", "-c", script) as process:
        daemon = int(said(process))
        wait_for(lambda: state_of(daemon) == "S")
        wait_for(lambda: parent_of(daemon) == process.pid)
        wait_for(lambda: len(pids_below(process.pid)) == 2)
        pause(1)
        out, _ = process.communicate("\n", timeout=20)
    try:
        assert process.returncode == 0
        assert len(out.split()) == 2
        report = report_of(file)
        assert report["processes"]["left_running"] == 1
        assert report["processes"]["seen"] >= 2
    finally:
        os.kill(daemon, signal.SIGKILL)


def test_the_parent_needs_no_root(dedup_nobody: Any) -> None:
    result = dedup_nobody("run", "--report", "--", "sh", "-c", "exit 4")
    assert result.status == 4
    assert "dedup: sh -c" in result.err
    result = dedup_nobody("run", "--start-ksmd", "--", "echo", "ran")
    assert (result.status, result.out) == (125, "")
    assert "sudo" in result.err


@pytest.mark.ksm
@pytest.mark.root
def test_figures_are_those_of_ksm_stat(tmp_path: Path, ksm: KsmControl) -> None:
    """Known pages, ksmd converged: the last reading is what the kernel said, to the page."""
    ksm.alone()
    file = tmp_path / "report"
    pages = 1000
    with running(
        "--report", "--report-json", str(file), sys.executable, "-c", EQUAL.format(pages=pages)
    ) as process:
        assert said(process) == "ready"
        ksm.converge()
        child = child_of(process.pid)
        expected = process_numbers(child, "ksm_stat")
        counters = ksm.ksm.counters()
        pause(1)
        _, err = process.communicate("", timeout=20)
    report = report_of(file)
    last, peak = report["last"], report["peak"]
    for name in ("ksm_merging_pages", "ksm_rmap_items", "ksm_zero_pages", "ksm_process_profit"):
        assert last[name] == expected[name]
    assert last["ksm_merging_pages"] >= pages
    assert report["alone"] is True
    assert last["saved_bytes"] == peak["saved_bytes"] == counters.general_profit
    assert 0 < report["mean"]["saved_bytes"] < peak["saved_bytes"]
    assert last["seconds_before_end"] < 5
    assert report["ksmd_cpu_seconds"] > 0
    assert report["processes"] == {"seen": 1, "most": 1, "hidden": 0, "left_running": 0}
    assert "s of CPU\n" in err
    assert "everybody" not in err


@pytest.mark.ksm
@pytest.mark.root
def test_others_make_it_a_range(tmp_path: Path, ksm: KsmControl) -> None:
    ksm.alone()
    file = tmp_path / "report"
    other = running(sys.executable, "-c", EQUAL.format(pages=300))
    with (
        other,
        running("--report", "--report-json", str(file), sys.executable, "-c",
                EQUAL.format(pages=300)) as process,
    ):  # fmt: skip
        assert (said(process), said(other)) == ("ready", "ready")
        ksm.converge()
        counters = ksm.ksm.counters()
        pause(1)
        _, err = process.communicate("", timeout=20)
        other.communicate("", timeout=20)
    last = report_of(file)["last"]
    assert report_of(file)["alone"] is False
    low, high = last["bounds"]["saved_bytes"]
    assert last["saved_bytes"] is None
    assert high - low == counters.pages_shared * PAGE
    assert high == last["ksm_process_profit"]
    assert "for everybody who uses KSM" in " ".join(err.split())


@pytest.mark.ksm
@pytest.mark.root
def test_start_ksmd(dedup: Dedup) -> None:
    before = Ksm().tunables()
    assert before["run"] == 0
    result = dedup("run", "--start-ksmd", "cat", "/sys/kernel/mm/ksm/run", "/run/dedup/ksmd")
    assert result.status == 0
    assert result.out.startswith('1\n{"before": 0, "holders": [[')
    assert Ksm().tunables() == before
    assert dedup("run", "--start-ksmd", "no-such-command-here").status == 127
    assert Ksm().tunables() == before
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with running("--start-ksmd", "sh", "-c", "echo on; exec cat") as process:
            assert said(process) == "on"
            process.send_signal(number)
            assert process.wait(20) == -number
        assert Ksm().tunables() == before
