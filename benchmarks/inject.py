"""Redis servers made mergeable while they serve: ``python benchmarks/inject.py`` (as root).

Each server has redis-benchmark at work, and a client that checks every answer over one connection.
Prints how long the servers were stopped; fails if a request failed or a connection broke.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from dedup.kernel import inject
from dedup.kernel.processes import Handle


class Client(threading.Thread):
    """Sets and gets over one connection until told to end; notes what fails, and slow answers."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.settimeout(10)
        self.connection.connect(str(path))
        self.stop = threading.Event()
        self.requests = 0
        self.slowest_seconds = 0.0
        self.failed: list[str] = []

    def ask(self, *words: str) -> bytes:
        text = f"*{len(words)}\r\n" + "".join(f"${len(w)}\r\n{w}\r\n" for w in words)
        self.connection.sendall(text.encode())
        return self.connection.recv(1 << 16)

    def run(self) -> None:
        while not self.stop.is_set():
            value = f"value-{self.requests}"
            begin = time.monotonic()
            try:
                if self.ask("SET", "checked", value) != b"+OK\r\n":
                    self.failed.append("SET")
                if self.ask("GET", "checked") != f"${len(value)}\r\n{value}\r\n".encode():
                    self.failed.append("GET")
            except OSError as e:
                self.failed.append(str(e))
                return
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - begin)
            self.requests += 2


def field(client: Client, name: str) -> int:
    """A number from INFO."""
    text = client.ask("INFO", "everything").decode()
    return int(next(x for x in text.splitlines() if x.startswith(name + ":")).split(":")[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--times", type=int, default=30, help="on and off again so many times")
    options = parser.parse_args()
    stopped: list[float] = []
    plain = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers, clients, loads = [], [], []
        for number in range(options.servers):
            path = folder / f"{number}.sock"
            command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", ""]
            server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            stack.callback(server.wait)
            stack.callback(server.kill)
            servers.append(server)
            while not path.is_socket():
                time.sleep(0.01)
            command = ["redis-benchmark", "-s", str(path), "-c", "8", "-n", "100000000", "-r",
                       "20000", "-d", "200", "-t", "set,get", "-q"]  # fmt: skip
            load = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            stack.callback(load.wait)
            stack.callback(load.kill)
            loads.append(load)
        time.sleep(1)
        clients = [Client(folder / f"{n}.sock") for n in range(options.servers)]
        before = [field(c, "total_connections_received") for c in clients]
        for client in clients:
            client.start()
        handles = [stack.enter_context(Handle(s.pid)) for s in servers]
        for _ in range(options.times):
            for on in (True, False):
                for handle in handles:
                    for stop in inject.merge_any(handle, on, deadline_seconds=10):
                        stopped.append(stop.stopped_seconds * 1e3)
                        plain += not stop.self_healing
        for client in clients:
            client.stop.set()
            client.join()
        after = [field(c, "total_connections_received") for c in clients]
        errors = [field(c, "total_error_replies") for c in clients]
        served = [field(c, "total_commands_processed") for c in clients]
        broken = [p.pid for p in servers + loads if p.poll() is not None]
    failed = [f for c in clients for f in c.failed]
    print(
        f"{len(stopped)} stops of {options.servers} servers that served {sum(served)} requests, "
        f"{sum(c.requests for c in clients)} of them checked: {len(failed)} failed, "
        f"{sum(after) - sum(before)} new connections, {sum(errors)} error replies"
    )
    print(
        f"stopped {statistics.median(stopped):.3f} ms in the median, {max(stopped):.3f} ms at the "
        f"most; {plain} not self-healing; the slowest checked pair of requests took "
        f"{max(c.slowest_seconds for c in clients) * 1e3:.1f} ms"
    )
    if failed or broken or before != after or any(errors):
        print("not harmless:", failed, broken, before, after, errors)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
