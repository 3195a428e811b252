"""The key of a study: with it alone fingerprints of one scan can be made to fit another's.

Without it they tell nothing: not even whether a page that one knows was in the memory.
Source: SipHash-2-4, J.-P. Aumasson and D. J. Bernstein, 2012.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.errors import BadInput, NotPermitted, OutputFailed, Refused

if TYPE_CHECKING:
    from pathlib import Path

    from dedup.pages import U64

KEY_BYTES: Final = 32
NAME: Final = ".dedup-key"
"""Of the key that files in a folder have, where none is named."""
OTHERS: Final = 0o077
"""Permissions that a key must not have."""
SLICE: Final = 1 << 16
"""Hashes at a time: they stay in the cache."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key, and the three that are made from it."""

    secret: bytes

    def __repr__(self) -> str:
        return f"Key({self.id})"

    @property
    def id(self) -> str:
        """What tells two keys apart and says nothing of them."""
        return self._derive(b"id", 8).hex()

    @property
    def seed(self) -> int:
        """Seed of the pages' hash: scans of one study must have the same."""
        return int.from_bytes(self._derive(b"seed", 8), "little")

    def fingerprints(self, hashes: U64) -> U64:
        """Keyed fingerprints of hashes made with `seed`: SipHash-2-4 of each one's 8 bytes."""
        key = np.frombuffer(self._derive(b"sip", 16), "<u8").astype(np.uint64)
        out = np.empty(len(hashes), np.uint64)
        for start in range(0, len(hashes), SLICE):
            out[start : start + SLICE] = siphash(hashes[start : start + SLICE], key)
        return out

    def tag(self, text: str) -> str:
        """A keyed hash of some text: equal for equal ones, and nothing else."""
        return hashlib.blake2b(
            text.encode(), key=self._derive(b"tag", 32), digest_size=8
        ).hexdigest()

    def _derive(self, purpose: bytes, size: int) -> bytes:
        return hashlib.blake2b(key=self.secret, person=purpose, digest_size=size).digest()


def siphash(words: U64, key: U64) -> U64:
    """SipHash-2-4 of messages of 8 bytes, all at once.

    Parameters
    ----------
    words : array of uint64
        The messages, little-endian.
    key : array of uint64, shape (2,)
    """
    constants = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)
    v = [np.full(len(words), np.uint64(c) ^ key[i % 2]) for i, c in enumerate(constants)]
    for message in (words, np.uint64(8 << 56)):
        v[3] ^= message
        _rounds(v, 2)
        v[0] ^= message
    v[2] ^= np.uint64(0xFF)
    _rounds(v, 4)
    return np.asarray(v[0] ^ v[1] ^ v[2] ^ v[3])


def _rounds(v: list[U64], times: int) -> None:
    a, b, c, d = v
    for _ in range(times):
        a += b
        b[:] = _rotated(b, 13) ^ a
        a[:] = _rotated(a, 32)
        c += d
        d[:] = _rotated(d, 16) ^ c
        a += d
        d[:] = _rotated(d, 21) ^ a
        c += b
        b[:] = _rotated(b, 17) ^ c
        c[:] = _rotated(c, 32)


def _rotated(x: U64, bits: int) -> U64:
    return np.asarray((x << np.uint64(bits)) | (x >> np.uint64(64 - bits)))


def of_file(path: Path) -> Key:
    """The key in a file, made there if it does not exist (mode 0600).

    Raises
    ------
    BadInput
        It holds no key.
    Refused
        Others may read it.
    NotPermitted, OutputFailed
    """
    try:
        if not path.exists():
            _make(path)
        # Not to wait for the other end, where it is a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise BadInput(f"{path} is no regular file", "name another with `--key-file`")
            if status.st_mode & OTHERS:
                raise Refused(
                    f"others may read the key in {path}",
                    f"`chmod 600 {path}`, or name another with `--key-file`",
                )
            text = file.read(2 * KEY_BYTES + 2)
    except PermissionError as e:
        raise NotPermitted(
            f"may not open the key {path}: {e.strerror}",
            "save where you may write, name another key with `--key-file`, or run it as root: "
            "`sudo dedup ...`",
        ) from e
    except OSError as e:
        raise OutputFailed(
            f"opening the key {path} failed: {e.strerror}", "name another with `--key-file`"
        ) from e
    found = re.fullmatch(rb"([0-9a-f]{%d})\n?" % (2 * KEY_BYTES), text)
    if not found:
        raise BadInput(
            f"{path} holds no key of dedup's",
            "name a file that does not exist yet, and a key is made there",
        )
    return Key(bytes.fromhex(found[1].decode()))


def _make(path: Path) -> None:
    """A new key, whole or not at all; another's that is there first stays."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
            file.flush()
            os.fsync(fd)
        try:
            os.link(part, path)
        except FileExistsError:
            pass
    finally:
        part.unlink()
