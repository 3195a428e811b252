"""Pilots of real programs; whatever happens meanwhile, none of what they started is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dedup.kernel import family

from .conftest import REPOSITORY, Dedup, Result, environment, on_terminal, wait_for
from .test_run import NO_PERSONALITY, PERSONALITY

SOON = ("--tunable", "pages_to_scan=1000000")
"""Looks a moment apart, as ksmd at that pace would need."""

WORKER = """
import json, decimal, email.message, http.client, logging, sys
table = {str(i): str(i) * 3 for i in range(20_000)}
names = {f"name {i}" for i in range(20_000)}
print("ready", flush=True)
sys.stdin.read()
"""

ORPHAN = """
import os, signal, sys, time
if os.fork() == 0:
    # A daemon: of another session, and its parent is gone.
    os.setsid()
    if os.fork() == 0:
        while True:
            time.sleep(60)
    os._exit(0)
print("ready", flush=True)
while True:
    time.sleep(60)
"""
STUBBORN = (
    "import signal\nfor number in (1, 2, 15): signal.signal(number, signal.SIG_IGN)\n" + ORPHAN
)

Words = Callable[[str], str]


def alive(marker: str) -> list[int]:
    """Processes with this text in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if marker.encode() in words and b"--pilot" not in words:
            found.append(int(path.parent.name))
    return found


@pytest.fixture
def words(tmp_path: Path) -> Iterator[Words]:
    """The command of a program in a file of its own; none may be left at the end."""
    path = tmp_path / "program-of-a-pilot.py"

    def command(text: str) -> str:
        path.write_text(text)
        return f"{sys.executable} {path}"

    before = folders()
    yield command
    left = alive(str(path))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    # Where dedup itself was killed, its keeper removes the folder, the processes first.
    wait_for(lambda: folders() <= before)


def folders() -> set[Path]:
    """Temporary folders of pilots."""
    return set(Path(tempfile.gettempdir()).glob("dedup-pilot-*"))


def pilot(command: str, *args: str, **more: Any) -> subprocess.Popen[str]:
    """A pilot that goes on while we do something to it."""
    return subprocess.Popen(
        [sys.executable, "-m", "dedup", "capacity", "--pilot", command, *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        cwd=REPOSITORY, **more,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return Result(process.returncode, out, err)


# -- what it finds ---------------------------------------------------------------------------------


def test_python_under_each_setting(dedup: Dedup, words: Words) -> None:
    found = dedup(
        "capacity", "--pilot", words(WORKER), "--ready", "^ready$", "--settings", "--json", *SOON
    ).json
    assert found["kind"] == "capacity"
    assert [i["file"] for i in found["instances"]] == ["copy 1", "copy 2", "copy 3"]
    assert [i["randomized"] for i in found["instances"]] == ["all"] * 3
    tried = found["pilot"]
    assert tried["copies"] == 3
    assert tried["ready"] == {"kind": "pattern", "value": "^ready$"}
    assert (tried["setting"], tried["omitted"], tried["left_running"]) == ("as-is", [], [])
    as_is, fixed, seeds = tried["trials"]
    assert [t["setting"] for t in tried["trials"]] == ["as-is", "no-randomize", "fixed-seeds"]
    assert seeds["environment"] == {"PYTHONHASHSEED": "0"}
    assert as_is["environment"] == fixed["environment"] == {}
    # Each setting has more in common than the one before; how much the second has is chance.
    assert 5 * as_is["pages_sharing"] < fixed["pages_sharing"] < seeds["pages_sharing"]
    assert as_is["further_frames"] > fixed["further_frames"] > seeds["further_frames"]
    assert as_is["further_frames"] > 10 * seeds["further_frames"]
    assert as_is["fits"] == found["fits"]
    assert fixed["fits"]["with_ksm"] > as_is["fits"]["with_ksm"]
    for trial in tried["trials"]:
        assert trial["settled"]
        assert len(trial["ready_seconds"]) == 3
        assert all(0 < s < 20 for s in trial["ready_seconds"])
        assert any(name.startswith("python") for name in trial["programs"])
    assert as_is["risks"] == []
    assert "knows where everything lies" in fixed["risks"][0]
    assert "collide" in seeds["risks"][0]
    codes = [{w["code"] for w in t["warnings"]} for t in (as_is, fixed, seeds)]
    assert ["fixed-addresses" in c or "classes" in c for c in codes] == [False, True, True]
    assert ["random-seeds" in c for c in codes] == [False, True, False]


def test_perl_with_fixed_seeds(dedup: Dedup, tmp_path: Path) -> None:
    path = tmp_path / "worker.pl"
    path.write_text(
        'my %table = map { ("key $_" => "value $_") } 1 .. 20_000;\n'
        '$| = 1; print "ready\\n"; 1 while <STDIN>;'
    )
    args = ("--ready", "ready", "--settings", "--json", *SOON)
    found = dedup("capacity", "--pilot", f"perl {path}", *args).json["pilot"]
    as_is, fixed, seeds = found["trials"]
    assert seeds["environment"] == {"PERL_HASH_SEED": "0", "PERL_PERTURB_KEYS": "0"}
    assert seeds["pages_sharing"] > 20 * as_is["pages_sharing"]
    assert seeds["pages_sharing"] > 1.2 * fixed["pages_sharing"]
    assert not alive(str(path))


def test_redis_by_its_port(dedup: Dedup) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        # Nine behind it are free, too, as good as surely.
        base = free.getsockname()[1] // 10
    command = f"redis-server --port {base}{{n}} --dir {{dir}} --save ''"
    args = ("--ready", f"{base}{{n}}", "--copies", "2", "--settings", *SOON)
    result = dedup("capacity", "--pilot", command, *args, "-n", "20", "--ram", "8G")
    assert result.status == 0
    text = " ".join(result.out.split())
    assert "2 copies of `redis-server" in text
    assert "without randomisation" in text
    assert "Not tried (and with fixed seeds): no Python, Perl or Node.js" in text
    assert " 20 " in text
    assert "two instances can't tell" in " ".join(result.err.split())
    # A pilot has nothing to save.
    assert "the worst case; take a third" in " ".join(result.err.split())
    assert not alive(f"redis-server *:{base}")


def test_for_people(words: Words) -> None:
    shown = on_terminal(["capacity", "--pilot", words(WORKER), "--ready", "ready", *SOON])
    assert shown.status == 0
    assert "3 copies of `" in shown.screen
    assert "started here and stopped again" in " ".join(shown.screen.split())
    # Nobody asked for more.
    assert "randomisation" not in shown.screen


def test_without_root(dedup_nobody: Dedup) -> None:
    found = dedup_nobody("capacity", "--pilot", "sleep 100", "--copies", "3", "--json", *SOON).json
    assert found["pilot"]["trials"][0]["programs"] == [Path(shutil.which("sleep") or "").name]
    assert "frames-hidden" in [w["code"] for w in found["warnings"]]


def test_the_whole_tree_of_a_copy(dedup: Dedup, words: Words) -> None:
    command = words(ORPHAN)
    found = dedup(
        "capacity", "--pilot", f"sh -c '{command}; true'", "--ready", "ready", "--copies", "2",
        "--json", *SOON,
    ).json  # fmt: skip
    # The shell, the program, and its orphan in a session of its own.
    assert [i["processes"] for i in found["instances"]] == [3, 3]


def test_a_server_that_goes_to_the_background(dedup: Dedup, words: Words) -> None:
    command = words("import time\nwhile True: time.sleep(60)")
    found = dedup(
        "capacity", "--pilot", f"sh -c 'setsid {command} & exit 0'", "--ready", "1s",
        "--copies", "2", "--json", *SOON,
    ).json  # fmt: skip
    assert [i["processes"] for i in found["instances"]] == [1, 1]
    assert min(found["pilot"]["trials"][0]["ready_seconds"]) >= 1


def test_where_randomisation_can_not_be_switched_off(dedup: Dedup, words: Words) -> None:
    number = str(PERSONALITY[os.uname().machine])
    prefix = (sys.executable, "-c", NO_PERSONALITY, number)
    args = ("--ready", "ready", "--copies", "2", "--settings", "--json", *SOON)
    result = dedup("capacity", "--pilot", words(WORKER), *args, prefix=prefix)
    tried = result.json["pilot"]
    assert [t["setting"] for t in tried["trials"]] == ["as-is"]
    assert [o["setting"] for o in tried["omitted"]] == ["no-randomize", "fixed-seeds"]
    assert all("can't be switched off" in o["why"] for o in tried["omitted"])


def test_memory_that_grows_on(dedup: Dedup, words: Words) -> None:
    command = words(
        "import time\nkept = []\nwhile True:\n kept.append(bytes(1_000_000)); time.sleep(0.1)"
    )
    args = ("capacity", "--pilot", command, "--copies", "2", "--limit", "3", *SOON)
    (trial,) = dedup(*args, "--json").json["pilot"]["trials"]
    assert trial["settled"] is False
    assert "unsettled" in [w["code"] for w in trial["warnings"]]


# -- what a copy is given --------------------------------------------------------------------------

TELLS = """
import json, os, signal, sys, time
with open(f"{sys.argv[1]}.told", "w") as file:
    status = open("/proc/self/status").read().splitlines()
    json.dump({"argv": sys.argv[1:], "copy": os.environ["DEDUP_COPY"], "sid": os.getsid(0),
               "pid": os.getpid(), "temporary": os.environ["TMPDIR"], "cwd": os.getcwd(),
               "folder": os.path.isdir(os.environ["TMPDIR"]),
               "mergeable": " mg" in open("/proc/self/smaps").read(),
               "files": sorted(os.listdir("/proc/self/fd")),
               "signals": [l for l in status if l.startswith(("SigBlk", "SigIgn"))],
               "environment": sorted(os.environ)}, file)
print("ready", flush=True)
sys.stdin.read()
"""


def test_number_folder_and_surroundings(dedup: Dedup, words: Words, tmp_path: Path) -> None:
    command = f"{words(TELLS)} {tmp_path}/{{n}} '{{dir}} x' 'a b'"
    result = dedup("capacity", "--pilot", command, "--ready", "ready", "--copies", "2", *SOON)
    assert result.status == 0
    told = [json.loads((tmp_path / f"{n}.told").read_text()) for n in (1, 2)]
    for number, one in enumerate(told, 1):
        assert one["argv"] == [f"{tmp_path}/{number}", f"{one['temporary']} x", "a b"]
        assert one["copy"] == str(number)
        assert one["folder"]
        assert not Path(one["temporary"]).exists()
        assert one["cwd"] == str(REPOSITORY)
        assert one["sid"] == one["pid"]
        assert not one["mergeable"]
        # Two of its own: the one that it writes this to, and the folder.
        assert one["files"] == ["0", "1", "2", "3", "4"]
        # Python itself ignores SIGPIPE and SIGXFSZ.
        assert [line.split()[1] for line in one["signals"]] == ["0" * 16, f"{0x1001000:016x}"]
        assert set(one["environment"]) - set(environment()) == {"DEDUP_COPY"} | (
            {"TMPDIR"} - set(environment())
        )
    assert len(told[0]["temporary"]) == len(told[1]["temporary"])


def test_much_output_holds_nobody_up(dedup: Dedup, words: Words) -> None:
    command = words(
        "import sys\n"
        "for _ in range(400): sys.stdout.write('x' * 100_000); sys.stderr.write('y\\n' * 1000)\n"
        "print('\\nready at last', flush=True)\n"
        "import time\n"
        "while True: print('z' * 60_000, flush=True); time.sleep(0.02)"
    )
    args = ("--ready", "^ready at", "--copies", "2", "--limit", "30")
    result = dedup("capacity", "--pilot", command, *args, "--json", *SOON)
    assert result.status == 0
    assert result.json["pilot"]["trials"][0]["settled"]


def test_with_our_stdin_closed(words: Words) -> None:
    process = pilot(
        words(WORKER), "--ready", "ready", "--copies", "2", *SOON,
        preexec_fn=lambda: os.close(0),
    )  # fmt: skip
    result = ended(process)
    assert result.status == 0
    assert "2 copies" in result.out


# -- what fails ------------------------------------------------------------------------------------


def test_a_command_that_fails(dedup: Dedup, words: Words) -> None:
    command = words("import sys\nprint('to stdout')\nsys.exit('no such \\033[31mdatabase')")
    result = dedup("capacity", "--pilot", command, "--ready", "ready")
    assert result.status == 5
    text = " ".join(result.err.split())
    assert "copy 1 has ended with status 1, saying: no such \\x1b[31mdatabase" in text
    error = dedup("capacity", "--pilot", command, "--json").json["error"]
    assert error["code"] == "copy-ended"
    died = dedup("capacity", "--pilot", "sh -c 'kill -SEGV $$'").err
    assert "ended with signal SIGSEGV, without a word" in " ".join(died.split())


def test_a_command_that_ends_by_itself(dedup: Dedup) -> None:
    result = dedup("capacity", "--pilot", "sleep 0.5")
    assert result.status == 5
    assert "ended with status 0" in result.err


@pytest.mark.parametrize("word", ["no-such-command-here", "/etc/passwd", "/", "./no/such"])
def test_a_command_that_can_not_be_started(dedup: Dedup, word: str) -> None:
    result = dedup("capacity", "--pilot", f"{word} x", "--json")
    assert result.status == 2
    assert result.json["error"]["code"] == "not-started"
    assert word in result.json["error"]["message"]


def test_a_sign_that_never_comes(dedup: Dedup, words: Words) -> None:
    command = words("print('still loading', flush=True)\nimport time\ntime.sleep(1000)")
    result = dedup("capacity", "--pilot", command, "--ready", "listening", "--limit", "1")
    assert result.status == 1
    text = " ".join(result.err.split())
    assert "copy 1 has not printed anything that fits 'listening' after 1 s" in text
    assert "still loading" in text
    assert "--limit" in text


def test_a_port_that_is_taken(dedup: Dedup, words: Words) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = dedup("capacity", "--pilot", words(WORKER), "--ready", port)
        assert result.status == 2
        assert f"port {port} is taken already" in result.err
        # Without `{n}` in the command all copies want the same.
        command = words(f"import socket\nsocket.create_server(('127.0.0.1', {port}))")
        result = dedup("capacity", "--pilot", command)
        assert result.status == 5
        assert "give each copy a port of its own" in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("args", "said"),
    [(["--copies", "2"], "--copies needs --pilot"), (["--settings"], "--settings needs --pilot"),
     (["--ready", "x"], "--ready needs --pilot"), (["--limit", "1"], "--limit needs --pilot"),
     (["x.dedup", "--pilot", "true"], "from files or from a pilot"),
     (["--pilot", ""], "the command is empty"), (["--pilot", "a 'b"], "no closing quotation"),
     (["--pilot", "true", "--ready", "a("], "no regular expression"),
     (["--pilot", "true", "--ready", "70000"], "no port"),
     (["--pilot", "true", "--ready", ""], "empty pattern"),
     (["--pilot", "true", "--copies", "65"], "range"),
     (["--pilot", "true", "--copies", "10", "--ready", "7000{n}"], "go up to 65535"),
     (["--pilot", "true", "--limit", "0"], "above 0")],
)  # fmt: skip
def test_words_that_do_not_fit(dedup: Dedup, args: list[str], said: str) -> None:
    result = dedup("capacity", *args)
    assert result.status == 2
    assert said in " ".join(result.err.split())


# -- nothing is left -------------------------------------------------------------------------------


def two(words: Words, text: str, *args: str) -> tuple[subprocess.Popen[str], str]:
    """A pilot of two programs with an orphan each, and its marker."""
    command = words(text)
    process = pilot(command, "--copies", "2", *args)
    marker = command.split()[1]
    wait_for(lambda: len(alive(marker)) == 4)
    return process, marker


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all(words: Words, number: signal.Signals) -> None:
    process, marker = two(words, ORPHAN, "--ready", "never")
    process.send_signal(number)
    result = ended(process)
    assert result.status == 128 + number
    assert not alive(marker)


def test_ctrl_c_at_a_terminal_ends_all(words: Words) -> None:
    command = words(ORPHAN)
    process = pilot(command, "--ready", "never", start_new_session=True)
    wait_for(lambda: len(alive(command.split()[1])) == 6)
    os.killpg(process.pid, signal.SIGINT)
    begin = time.monotonic()
    assert ended(process).status == 130
    # They end by SIGTERM: nobody has to wait for SIGKILL.
    assert time.monotonic() - begin < 4


def test_sigkill_ends_all(words: Words) -> None:
    process, marker = two(words, STUBBORN, "--ready", "never")
    process.kill()
    process.communicate()
    wait_for(lambda: not alive(marker))


def keeper_of(process: subprocess.Popen[str]) -> int:
    (pid,) = (p for p in family.descendants(process.pid) if family.session(p) == p
              and p in family._children(process.pid, family.PROC))  # fmt: skip
    return pid


def test_the_keeper_killed(words: Words) -> None:
    process, marker = two(words, STUBBORN, "--ready", "never")
    os.kill(keeper_of(process), signal.SIGKILL)
    result = ended(process)
    assert result.status == 5
    assert "the process that keeps the copies is gone" in " ".join(result.err.split())
    assert not alive(marker)


def test_both_killed_at_once(dedup: Dedup, words: Words) -> None:
    command = words("import time\nwhile True: time.sleep(60)")
    process = pilot(command, "--ready", "never", "--copies", "2")
    wait_for(lambda: len(alive(command.split()[1])) == 2)
    before = folders()
    keeper = keeper_of(process)
    for pid in (process.pid, keeper):
        os.kill(pid, signal.SIGSTOP)
    for pid in (process.pid, keeper):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not alive(command.split()[1]))
    for folder in folders() & before:
        for inside in (*folder.glob("*"), folder):
            inside.rmdir()
