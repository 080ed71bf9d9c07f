"""A run of two stages: the kernel itself, asked by its ioctls, keeps a memfd over a kexec. See `lab.vm` for how to write such a test."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from lab.vm import in_vm

pytestmark = pytest.mark.lab


def preserve(content: bytes) -> int:
    """Stage 1; returns the memfd's inode number. The session must be open when the kernel jumps: closing it would give it up."""
    import fcntl
    import os
    import struct
    import subprocess

    def liveupdate(fd: int, number: int, argument: bytes) -> bytes:
        """An ioctl of include/uapi/linux/liveupdate.h; the argument as the kernel has left it."""
        buffer = bytearray(argument)
        fcntl.ioctl(fd, 0xBA00 | number, buffer, True)
        return bytes(buffer)

    with open(os.environ["LAB"] + "/by-stage-1", "w") as file:
        file.write(os.environ["LAB_STAGE"])
    memfd = os.memfd_create("memory")
    os.write(memfd, content)
    device = os.open("/dev/liveupdate", os.O_RDWR)
    session = struct.unpack_from("<Ii", liveupdate(device, 0x00, struct.pack("<Ii64s", 72, 0, b"test")))[1]
    liveupdate(session, 0x40, struct.pack("<IiQ", 16, memfd, 7))
    print(f"a memfd with {content!r} is preserved as token 7; now the kernel jumps")
    subprocess.run(["lab-kexec"], check=True)
    raise AssertionError("lab-kexec has returned")


def retrieve() -> tuple[bytes, str, str]:
    """Stage 2; what is in the memfd, what stage 1 has left in the shared folder, and which stage this is."""
    import fcntl
    import os
    import struct

    def liveupdate(fd: int, number: int, argument: bytes) -> bytes:
        buffer = bytearray(argument)
        fcntl.ioctl(fd, 0xBA00 | number, buffer, True)
        return bytes(buffer)

    device = os.open("/dev/liveupdate", os.O_RDWR)
    session = struct.unpack_from("<Ii", liveupdate(device, 0x01, struct.pack("<Ii64s", 72, 0, b"test")))[1]
    memfd = struct.unpack_from("<Ii", liveupdate(session, 0x41, struct.pack("<IiQ", 16, 0, 7)))[1]
    found = os.pread(memfd, 100, 0)
    liveupdate(session, 0x42, struct.pack("<II", 8, 0))
    print(f"after the kexec: {found!r}")
    with open(os.environ["LAB"] + "/by-stage-1") as file:
        return found, file.read(), os.environ["LAB_STAGE"]


def test_the_kernel_keeps_a_memfd(tmp_path: Path) -> None:
    run = in_vm(partial(preserve, b"what must not be lost"), retrieve, shared=tmp_path)
    assert run.status == 0
    assert run.values == (None, (b"what must not be lost", "1", "2"))
    assert (tmp_path / "by-stage-1").read_text() == "1"


def test_commands_in_stages_and_what_a_failing_one_leaves() -> None:
    command = ["sh", "-c", 'echo "stage $LAB_STAGE"; [ $LAB_STAGE = 1 ] || exit 7']
    run = in_vm(command, command, command, check=False)
    assert run.status == 7
    assert run.trouble.startswith("in the lab, stage 2 ended with 7; ")
    assert run.said.splitlines() == ["stage 1", "stage 2"]
