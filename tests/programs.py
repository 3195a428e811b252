"""Programs of many runtimes: how to start each, and how to know that it is ready and idle.

Each is begun with `dedup run`, does some work of its kind, says that it is ready, and waits.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dedup.kernel.processes import Choice, Handle, choose

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Start = Callable[[Path, int], AbstractContextManager[int]]

RUN: Final = (sys.executable, "-m", "dedup", "run", "--")
READY_SECONDS: Final = 60.0
IDLE_SECONDS: Final = 1.5
IDLE_SHARE: Final = 0.02
"""Of a core: what a waiting program may use in IDLE_SECONDS, for its timers."""
NOBODY: Final = 65534


@dataclass(frozen=True, slots=True)
class Program:
    """A kind of program.

    Parameters
    ----------
    name : str
    command : str
        What has to be on the PATH.
    package : str
        Debian's package that brings it.
    start : callable
        Starts one in a folder, with a number; gives the pid of its first process.
    tested : bool
        Whether the tests take it; the others are for the table (`python -m tests.live_programs`).
    restless : bool
        Whether timers have it write pages at rest: for a moment each is not merged then.
    rest_seconds : float
        After its last work, until its memory has the size that it keeps.
    """

    name: str
    command: str
    package: str
    start: Start
    tested: bool = False
    restless: bool = False
    rest_seconds: float = 0.0

    @property
    def missing(self) -> str:
        """Why it can't be started here; empty where it can."""
        if shutil.which(self.command) is not None:
            return ""
        return f"needs {self.command}: apt-get install {self.package}"


def tree(pid: int) -> list[int]:
    """A process and its descendants, the oldest first, as ksmd comes by them."""

    def start(pid: int) -> tuple[int, int]:
        with Handle(pid) as handle:
            return handle.id.start_time, pid

    return sorted(choose(Choice(trees=(pid,))), key=start)


def wait_until_idle(pids: Sequence[int]) -> None:
    """Wait until for a while no core was used to speak of, and no page taken or given back.

    A runtime may return memory, or tidy up, a second after its last work.
    """
    deadline = time.monotonic() + READY_SECONDS
    before = _use(pids)
    while True:
        begin = time.monotonic()
        time.sleep(IDLE_SECONDS)
        now = _use(pids)
        used = now[0] - before[0]
        if used < IDLE_SHARE * (time.monotonic() - begin) * 1e9 and now[1] == before[1]:
            return
        assert time.monotonic() < deadline, f"{pids} are not idle"
        before = now


def _use(pids: Sequence[int]) -> tuple[int, list[str]]:
    """Nanoseconds on a core of all threads, and memory of each process."""
    total, memory = 0, []
    for pid in pids:
        for stat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                total += int(stat.read_text().split()[0])
        memory.append(Path(f"/proc/{pid}/statm").read_text())
    return total, memory


# -- programs that run a text, and wait for the end of stdin ---------------------------------------


def script(words: Sequence[str], text: str, suffix: str) -> Start:
    """An interpreter with a text that prints "ready", and ends when stdin does."""

    @contextmanager
    def start(folder: Path, number: int) -> Iterator[int]:
        path = folder / f"{Path(words[0]).name}{suffix}"
        path.write_text(text)
        process = subprocess.Popen(
            [*RUN, *(str(path) if w == "PROGRAM" else w for w in words)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line == b"ready\n", line
            yield process.pid
        finally:
            process.communicate()

    return start


PYTHON = """
import sys
import numpy as np
rows = np.arange(200_000, dtype=np.float64).reshape(-1, 100)
table = {i: str(i) * 3 for i in range(20_000)}
print("ready", flush=True)
sys.stdin.read()
"""

PYPY = """
import sys
table = {i: str(i) * 3 for i in range(50_000)}
for turn in range(20):
    rows = sorted(table.values())
print("ready")
sys.stdout.flush()
sys.stdin.read()
"""

NODE = """
const rows = [];
for (let i = 0; i < 50000; i++) rows.push({ id: i, name: `row ${i}` });
const again = JSON.parse(JSON.stringify(rows));
const table = new Map(again.map((row) => [row.name, row]));
console.log("ready");
process.stdin.on("end", () => process.exit(table.size === 50000 ? 0 : 1));
process.stdin.resume();
"""

JAVA = """
import java.util.HashMap;

public class Program {
    public static void main(String[] words) throws Exception {
        var table = new HashMap<String, String>();
        for (int turn = 0; turn < 5; turn++)
            for (int i = 0; i < 50_000; i++) table.put("key " + i, "value " + i % 100);
        System.out.println("ready");
        while (System.in.read() >= 0) {}
        System.exit(table.size() == 50_000 ? 0 : 1);
    }
}
"""

PERL = """
my %table = map { $_ => "value " . $_ % 100 } 1 .. 50_000;
my @rows = sort values %table;
$| = 1;
print "ready\\n";
1 while <STDIN>;
"""

RUBY = """
table = (1..50_000).to_h { |i| [i, "value #{i % 100}"] }
rows = table.values.sort
$stdout.sync = true
puts "ready"
$stdin.read
"""

PHP = """<?php
$table = [];
for ($i = 0; $i < 50000; $i++) $table["key $i"] = "value " . $i % 100;
asort($table);
echo "ready\\n";
stream_get_contents(STDIN);
"""

LUA = """
local rows = {}
for i = 1, 50000 do rows[i] = { id = i, name = "value " .. i % 100 } end
table.sort(rows, function(a, b) return a.id > b.id end)
collectgarbage()
print("ready")
io.stdout:flush()
io.read("a")
"""

LUAJIT = LUA.replace('"a"', '"*a"')

GUILE = """
(define table (make-hash-table))
(do ((i 0 (+ i 1))) ((= i 50000))
  (hash-set! table i (string-append "value " (number->string (modulo i 100)))))
(gc)
(display "ready\\n")
(force-output)
(let loop () (unless (eof-object? (read-char)) (loop)))
"""

TCL = """
for {set i 0} {$i < 50000} {incr i} { dict set table $i "value [expr {$i % 100}]" }
set rows [lsort [dict values $table]]
puts ready
flush stdout
read stdin
"""

SBCL = """
(defvar *table* (make-hash-table))
(dotimes (i 50000) (setf (gethash i *table*) (format nil "value ~d" (mod i 100))))
(gc :full t)
(format t "ready~%")
(finish-output)
(loop while (read-char *standard-input* nil))
"""

ERLANG = """
main(_) ->
    Table = maps:from_list([{I, integer_to_list(I rem 100)} || I <- lists:seq(1, 50000)]),
    Pids = [spawn(fun() -> receive stop -> Table end end) || _ <- lists:seq(1, 10)],
    erlang:garbage_collect(),
    io:format("ready~n"),
    io:get_line(""),
    [P ! stop || P <- Pids].
"""

R = """
table <- data.frame(id = 1:50000, name = paste("value", 1:50000 %% 100))
model <- lm(id ~ name, table)
cat("ready\\n")
flush(stdout())
invisible(readLines(file("stdin")))
"""

PROLOG = """
:- initialization(main).
:- dynamic row/2.
main :-
    forall(between(1, 50000, I), (M is I mod 100, assertz(row(I, M)))),
    format("ready~n"), flush_output,
    read_string(user_input, _, _),
    halt.
"""

CHEZ = """
(define table (make-eqv-hashtable))
(do ((i 0 (+ i 1))) ((= i 50000))
  (hashtable-set! table i (string-append "value " (number->string (modulo i 100)))))
(collect)
(display "ready\\n")
(flush-output-port)
(let loop () (unless (eof-object? (read-char)) (loop)))
"""

GAWK = """
BEGIN {
    for (i = 0; i < 50000; i++) table[i] = "value " i % 100
    n = asort(table)
    print "ready"
    fflush()
    while ((getline line) > 0) n++
}
"""

# -- servers ---------------------------------------------------------------------------------------


def connect(path: Path, process: subprocess.Popen[bytes]) -> socket.socket:
    """Connect to a server that is starting."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(str(path))
        except OSError:
            link.close()
            assert process.poll() is None, f"{process.args!r} has ended: {process.returncode}"
            assert time.monotonic() < deadline, f"{process.args!r} is not ready"
            time.sleep(0.02)
        else:
            return link


@contextmanager
def server(words: Sequence[str], path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens at a socket with this path, once that accepts."""
    process = subprocess.Popen(
        [*RUN, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        connect(path, process).close()
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def redis(folder: Path, number: int, keys: int = 60_000) -> Iterator[int]:
    """A redis-server with the same keys in each."""
    path = folder / f"redis{number}.sock"
    words = ["redis-server", "--port", "0", "--save", "", "--unixsocket", str(path),
             "--dir", str(folder)]  # fmt: skip
    with server(words, path) as process:
        source = random.Random(7)
        commands = b"".join(
            b"SET key:%d %d-%032x\r\n" % (k, k, source.getrandbits(128)) for k in range(keys)
        )
        subprocess.run(
            ["redis-cli", "-s", str(path), "--pipe"], input=commands, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        yield process.pid


@contextmanager
def memcached(folder: Path, number: int) -> Iterator[int]:
    """A memcached with some keys."""
    path = folder / f"memcached{number}.sock"
    with server(["memcached", "-u", "root", "-s", str(path)], path) as process:
        with connect(path, process) as link:
            link.sendall(
                b"".join(b"set key:%d 0 0 8 noreply\r\n%08d\r\n" % (k, k) for k in range(20_000))
            )
            link.sendall(b"version\r\n")
            assert link.recv(100).startswith(b"VERSION")
        yield process.pid


NGINX = """
daemon off;
user root;
worker_processes 3;
pid {folder}/nginx{number}.pid;
error_log /dev/null;
events {{}}
http {{
    access_log off;
    proxy_cache_path {folder}/cache{number} keys_zone=one:1m;
    gzip on;
    server {{
        listen unix:{folder}/nginx{number}.sock;
        location / {{ return 200 "served"; }}
    }}
}}
"""


@contextmanager
def nginx(folder: Path, number: int) -> Iterator[int]:
    """An nginx with three forked workers."""
    path = folder / f"nginx{number}.sock"
    configuration = folder / f"nginx{number}.conf"
    configuration.write_text(NGINX.format(folder=folder, number=number))
    with server(["nginx", "-c", str(configuration)], path) as process:
        for _ in range(50):
            with connect(path, process) as link:
                link.sendall(b"GET / HTTP/1.0\r\n\r\n")
                assert b"served" in link.recv(1000)
        yield process.pid


@contextmanager
def postgres(folder: Path, number: int) -> Iterator[int]:
    """A PostgreSQL with its background processes and a session of each client.

    It refuses to run as root.
    """
    data = folder / f"postgres{number}"
    data.mkdir()
    os.chown(data, NOBODY, NOBODY)
    os.chmod(folder, 0o755)
    as_nobody = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    subprocess.run(
        [*as_nobody, "initdb", "-D", str(data), "--auth", "trust", "-U", "postgres", "--no-sync"],
        check=True, stdout=subprocess.DEVNULL, cwd=data,
    )  # fmt: skip
    path = data / ".s.PGSQL.5432"
    words = [*as_nobody, "postgres", "-D", str(data), "-k", str(data), "-h", "", "-F"]
    with server(words, path) as process:
        yield process.pid


@contextmanager
def node_exporter(folder: Path, number: int) -> Iterator[int]:
    """A server written in Go."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    process = subprocess.Popen(
        [*RUN, "prometheus-node-exporter", f"--web.listen-address={address}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + READY_SECONDS
        got = 0
        while got < 20:
            try:
                with urllib.request.urlopen(f"http://{address}/metrics") as page:
                    assert page.read()
                got += 1
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


PROGRAMS: Final = (
    Program("redis", "redis-server", "redis-server", redis, tested=True, restless=True),
    Program("Python, NumPy", "python3", "python3",
            script([sys.executable, "PROGRAM"], PYTHON, ".py"), tested=True),
    # V8 collects garbage and gives memory back when nothing has happened for 8 s.
    Program("Node.js", "node", "nodejs", script(["node", "PROGRAM"], NODE, ".js"), tested=True,
            rest_seconds=10),
    Program("Java", "javac", "default-jdk-headless",
            script(["java", "-Xmx256m", "PROGRAM"], JAVA, ".java"), tested=True),
    Program("Perl", "perl", "perl", script(["perl", "PROGRAM"], PERL, ".pl"), tested=True),
    Program("PHP", "php", "php-cli", script(["php", "PROGRAM"], PHP, ".php"), tested=True),
    Program("Lua", "lua5.4", "lua5.4", script(["lua5.4", "PROGRAM"], LUA, ".lua"), tested=True),
    Program("SWI-Prolog", "swipl", "swi-prolog-nox",
            script(["swipl", "PROGRAM"], PROLOG, ".pl"), tested=True),
    Program("Go", "prometheus-node-exporter", "prometheus-node-exporter", node_exporter,
            tested=True),
    Program("nginx", "nginx", "nginx-light", nginx, tested=True),
    Program("PostgreSQL", "initdb", "postgresql", postgres, restless=True),
    Program("memcached", "memcached", "memcached", memcached, restless=True),
    Program("Ruby", "ruby", "ruby", script(["ruby", "PROGRAM"], RUBY, ".rb")),
    Program("LuaJIT", "luajit", "luajit", script(["luajit", "PROGRAM"], LUAJIT, ".lua")),
    Program("PyPy", "pypy3", "pypy3", script(["pypy3", "PROGRAM"], PYPY, ".py")),
    Program("Erlang", "escript", "erlang-base", script(["escript", "PROGRAM"], ERLANG, ".erl")),
    Program("SBCL", "sbcl", "sbcl", script(["sbcl", "--script", "PROGRAM"], SBCL, ".lisp")),
    Program("Guile", "guile", "guile-3.0",
            script(["guile", "--no-auto-compile", "PROGRAM"], GUILE, ".scm")),
    Program("Chez Scheme", "chezscheme", "chezscheme",
            script(["chezscheme", "--script", "PROGRAM"], CHEZ, ".ss")),
    Program("R", "Rscript", "r-base-core", script(["Rscript", "PROGRAM"], R, ".R")),
    Program("Tcl", "tclsh", "tcl", script(["tclsh", "PROGRAM"], TCL, ".tcl")),
    Program("gawk", "gawk", "gawk", script(["gawk", "-f", "PROGRAM"], GAWK, ".awk")),
)  # fmt: skip
