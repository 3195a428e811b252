"""QEMU guests for the benchmarks: a Linux with a shell, by emulation (TCG), 256 MiB each."""

from __future__ import annotations

import shutil
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB: Final = 256
OWN_MIB: Final = 8
"""Of each guest's memory: a file of random bytes."""
KERNEL: Final = "linux-image-cloud-amd64"
BUSYBOX: Final = "busybox-static"
READY_SECONDS: Final = 60.0
INIT: Final = f"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /dev
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t devtmpfs none /dev
/bin/busybox dd if=/dev/urandom of=/own bs=1M count={OWN_MIB} 2>/dev/null
/bin/busybox echo ready
exec /bin/busybox sleep 1000000
"""


def missing() -> str:
    """Why there can be no guests here; empty where there can."""
    if shutil.which("qemu-system-x86_64") is None:
        return "needs qemu-system-x86_64: apt-get install qemu-system-x86 seabios"
    if shutil.which("apt-get") is None:
        return f"needs apt-get, which brings {KERNEL} and {BUSYBOX}"
    return ""


class Linux:
    """A kernel and an initial file system, from Debian's packages; nothing is installed.

    Parameters
    ----------
    folder : Path
        Where they are unpacked.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        kernel = subprocess.run(
            ["apt-cache", "depends", "--important", KERNEL], check=True, capture_output=True,
            text=True,
        ).stdout.split("Depends: ")[1].split()[0]  # fmt: skip
        subprocess.run(
            ["apt-get", "download", "-q", kernel, BUSYBOX], cwd=folder, check=True,
            capture_output=True,
        )  # fmt: skip
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder / "root"], check=True)
        (self.kernel,) = (folder / "root/boot").glob("vmlinuz-*")
        self.initrd = folder / "initrd"
        tree = folder / "tree"
        (tree / "bin").mkdir(parents=True)
        busybox = shutil.copy(folder / "root/bin/busybox", tree / "bin")
        (tree / "init").write_text(INIT)
        (tree / "init").chmod(0o755)
        with self.initrd.open("wb") as file:
            subprocess.run(
                [busybox, "cpio", "-o", "-H", "newc"], input=b"init\nbin\nbin/busybox\n",
                stdout=file, stderr=subprocess.DEVNULL, cwd=tree, check=True,
            )  # fmt: skip

    @contextmanager
    def start(self, folder: Path, number: int) -> Iterator[int]:
        """Start a guest; its memory is mergeable, as QEMU has it by default."""
        console = folder / f"console-{number}"
        process = subprocess.Popen(
            ["qemu-system-x86_64", "-accel", "tcg", "-m", str(MIB), "-display", "none",
             "-nodefaults", "-no-reboot", "-kernel", self.kernel, "-initrd", self.initrd,
             "-append", "console=ttyS0 quiet", "-serial", f"file:{console}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            end = time.monotonic() + READY_SECONDS
            while not console.exists() or b"ready" not in console.read_bytes():
                assert process.poll() is None, "QEMU has ended"
                assert time.monotonic() < end, "the guest is not ready"
                time.sleep(0.05)
            yield process.pid
        finally:
            process.kill()
            process.wait()
