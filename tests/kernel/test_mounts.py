"""File systems by device number, from mountinfo."""

from __future__ import annotations

from dedup.kernel import mounts, processes


class Handle(processes.Handle):
    """With a mountinfo of its own."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    def read(self, name: str, *_: object, **__: object) -> bytes:
        assert name == "mountinfo"
        return self.text


def test_types_by_number() -> None:
    text = (
        b"29 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        b"31 29 0:27 /a\\040-\\040b /a\r0 ro - tmpfs odd\\040name rw\n"
    )
    assert mounts.file_systems(Handle(text)) == {(253, 0): "ext4", (0, 27): "tmpfs"}
