"""Redis servers at work: redis-benchmark on each, and a client that checks every answer."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


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

    def number(self, name: str) -> int:
        """A number from INFO."""
        text = self.ask("INFO", "everything").decode()
        return int(next(x for x in text.splitlines() if x.startswith(name + ":")).split(":")[1])


@dataclass
class Serving:
    """The servers, and what became of their requests once the context is left."""

    pids: list[int]
    clients: list[Client]
    problems: list[str] = field(default_factory=list)
    served: int = 0

    @property
    def checked(self) -> int:
        return sum(c.requests for c in self.clients)

    @property
    def slowest_seconds(self) -> float:
        return max(c.slowest_seconds for c in self.clients)

    def summary(self) -> str:
        return (
            f"{len(self.pids)} servers served {self.served} requests, {self.checked} of them "
            f"checked: {len(self.problems)} failed or broke; the slowest checked pair of requests "
            f"took {self.slowest_seconds * 1e3:.1f} ms"
        )


@contextmanager
def serving(count: int, keys: int = 0, words: tuple[str, ...] = ()) -> Iterator[Serving]:
    """So many redis-servers under load, each with the same `keys` besides.

    Parameters
    ----------
    count, keys : int
    words : tuple of str
        For redis-benchmark, in place of sets and gets as fast as it goes.
    """
    words = words or ("-c", "8", "-r", "20000", "-d", "200", "-t", "set,get")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = [folder / f"{number}.sock" for number in range(count)]
        servers = []
        for path in paths:
            command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "",
                       "--enable-debug-command", "yes"]  # fmt: skip
            server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            stack.callback(server.wait)
            stack.callback(server.kill)
            servers.append(server)
            while not path.is_socket():
                time.sleep(0.01)
        clients = [Client(path) for path in paths]
        for client in clients:
            stack.callback(client.connection.close)
            if keys and client.ask("DEBUG", "POPULATE", str(keys), "key", "100") != b"+OK\r\n":
                raise RuntimeError("redis-server would not take DEBUG POPULATE")
        loads = []
        for path in paths:
            command = ["redis-benchmark", "-s", str(path), "-n", "100000000", "-q", *words]
            load = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            stack.callback(load.wait)
            stack.callback(load.kill)
            loads.append(load)
        time.sleep(1)
        before = [c.number("total_connections_received") for c in clients]
        for client in clients:
            client.start()
        found = Serving([s.pid for s in servers], clients)
        yield found
        for client in clients:
            client.stop.set()
            client.join()
            found.problems += client.failed
        after = [c.number("total_connections_received") for c in clients]
        errors = [c.number("total_error_replies") for c in clients]
        found.served = sum(c.number("total_commands_processed") for c in clients)
        found.problems += [f"{p.args!r} ended" for p in servers + loads if p.poll() is not None]
        found.problems += [f"{b - a} new connections" for a, b in zip(before, after, strict=True)
                           if a != b]  # fmt: skip
        found.problems += [f"{e} error replies" for e in errors if e]
