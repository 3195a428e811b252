"""Live programs: what was predicted before is what ksmd reaches, to the page."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dedup.change import verify
from dedup.kernel.ksm import process_counters
from dedup.kernel.processes import Handle
from dedup.scanning import Plan, scan_pids
from dedup.sources.live import Options
from tests.kernel_fixtures import KsmControl

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.ksm, pytest.mark.root]

RUN = [sys.executable, "-m", "dedup", "run", "--"]

NUMPY = """
import sys
import numpy as np
rows = np.arange(200_000, dtype=np.float64).reshape(-1, 100)
table = {i: str(i) * 3 for i in range(20_000)}
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def redis(folder: Path, number: int, keys: int) -> Iterator[int]:
    """A redis-server begun with `dedup run`, with the same keys in each."""
    path = folder / f"{number}.sock"
    process = subprocess.Popen(
        [*RUN, "redis-server", "--port", "0", "--save", "", "--unixsocket", str(path),
         "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while True:
            with socket.socket(socket.AF_UNIX) as link:
                try:
                    link.connect(str(path))
                    break
                except OSError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
        source = random.Random(7)
        commands = b"".join(
            b"SET key:%d %d-%032x\r\n" % (k, k, source.getrandbits(128)) for k in range(keys)
        )
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(path))
            sender = subprocess.Popen(
                ["redis-cli", "-s", str(path), "--pipe"], stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            sender.communicate(commands)
            assert sender.returncode == 0
        yield process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def numpy_process() -> Iterator[int]:
    process = subprocess.Popen(
        [*RUN, sys.executable, "-c", NUMPY],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process.pid
    finally:
        process.communicate()


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def hold_against_the_kernel(ksm: KsmControl, pids: list[int]) -> verify.Comparison:
    """Predict, merge, compare every counter; processes stopped from before the first look."""
    with stopped(pids):
        scan = scan_pids(pids, Plan(options=Options(scope="advised"), interval_seconds=0.2))
        ksm.converge()
        found = verify.compare(scan.prediction, ksm.ksm.counters())
        for process, predicted in zip(scan.pages.processes, scan.prediction.processes, strict=True):
            with Handle(process.id.pid) as handle:
                actual = process_counters(handle)
            assert actual is not None
            assert not any(verify.compare_process(predicted, actual).difference.values())
        assert scan.prediction.frames_freed is not None
    assert None not in found.predicted.values()
    assert found.predicted == found.actual
    return found


@pytest.mark.redis
def test_three_redis_servers_with_the_same_keys(ksm: KsmControl, tmp_path: Path) -> None:
    with ExitStack() as stack:
        pids = [stack.enter_context(redis(tmp_path, i, 60_000)) for i in range(3)]
        found = hold_against_the_kernel(ksm, pids)
    assert found.actual["pages_sharing"] > 100


@pytest.mark.parametrize("use_zero_pages", [0, 1])
def test_four_python_processes_with_numpy(ksm: KsmControl, use_zero_pages: int) -> None:
    ksm.set(use_zero_pages=use_zero_pages)
    with ExitStack() as stack:
        pids = [stack.enter_context(numpy_process()) for _ in range(4)]
        found = hold_against_the_kernel(ksm, pids)
    assert found.actual["pages_sharing"] > 100


def test_a_small_limit_of_sharing(ksm: KsmControl) -> None:
    """max_page_sharing of 7: many chains, many leftovers."""
    ksm.set(max_page_sharing=7)
    with ExitStack() as stack:
        pids = [stack.enter_context(numpy_process()) for _ in range(3)]
        with stopped(pids):
            scan = scan_pids(pids, Plan(options=Options(scope="advised"), interval_seconds=0.2))
            ksm.converge()
            found = verify.compare(scan.prediction, ksm.ksm.counters())
    assert found.predicted == found.actual
    assert found.actual["stable_node_chains"] > 0


def test_apply_on_processes(ksm: KsmControl) -> None:
    """The command, over processes begun with `dedup run`, left running."""
    import json

    import jsonschema

    from dedup.schema import load

    with ExitStack() as stack:
        pids = [stack.enter_context(numpy_process()) for _ in range(2)]
        words = [w for p in pids for w in ("--pid", str(p))]
        at_rest = subprocess.run(
            [sys.executable, "-m", "dedup", "apply", *words], capture_output=True, text=True
        )
        assert at_rest.returncode == 6
        assert "--start-ksmd" in at_rest.stderr
        done = subprocess.run(
            [sys.executable, "-m", "dedup", "apply", *words, "--start-ksmd", "--interval", "0.3",
             "--json"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        data = json.loads(done.stdout)
        jsonschema.validate(data, load())
        assert data["holds"]
        assert data["actual"]["pages_sharing"] > 50
        not_mergeable = subprocess.run(
            [sys.executable, "-m", "dedup", "apply", "--pid", str(os.getpid()), "--start-ksmd"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert not_mergeable.returncode == 6
        assert "dedup run" in not_mergeable.stderr
