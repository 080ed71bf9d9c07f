"""Bytes in a sealed memfd: how a message or a manifest travels that is too large for a packet.

The receiver trusts nothing: it must be a memfd (not a file of some FUSE mount, where fstat and read could hang), it must be sealed against
writing and shrinking (so that what was checked stays true), and it must have the size that was said.
"""

from __future__ import annotations

import fcntl
import functools
import os

from luod_protocol.errors import FaultCode, ProtocolFault
from luod_protocol.fds import OwnedFd

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@functools.cache
def memfd_device() -> int:
    """st_dev of every memfd of ordinary pages on this kernel: the internal tmpfs mount (mm/shmem.c, shm_mnt)."""
    with OwnedFd(os.memfd_create("luod-probe", os.MFD_CLOEXEC)) as fd:
        return os.fstat(fd.fileno()).st_dev


def seal_bytes(data: bytes, name: str) -> OwnedFd:
    """A sealed memfd called `name` (for /proc only) that holds `data`. The caller owns it."""
    memfd = OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(memfd.fileno(), view) :]
        fcntl.fcntl(memfd.fileno(), fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        memfd.close()
        raise
    return memfd


def read_sealed(fd: int, size: int) -> bytes:
    """The `size` bytes in the sealed memfd `fd` (borrowed).

    Raises:
        ProtocolFault: it isn't a memfd, isn't sealed, has another size, or wasn't opened for reading.
    """
    try:
        return _read(fd, size)
    except OSError as error:
        raise ProtocolFault(FaultCode.MALFORMED, f"the fd that should bring a message isn't a memfd that can be read: {error}") from None


def _read(fd: int, size: int) -> bytes:
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # first: it fails on what isn't in memory, where fstat may wait for a file server
    stat = os.fstat(fd)
    if stat.st_dev != memfd_device():
        raise ProtocolFault(FaultCode.MALFORMED, "the fd that should bring a message isn't a memfd")
    if seals & SEALS != SEALS:
        raise ProtocolFault(FaultCode.MALFORMED, "the memfd that brings a message must have the seals seal, shrink, grow and write")
    if stat.st_size != size:
        raise ProtocolFault(FaultCode.MALFORMED, f"the memfd has {stat.st_size} bytes, the packet said {size}")
    parts: list[bytes] = []
    offset = 0
    while offset < size:
        part = os.pread(fd, size - offset, offset)
        if not part:
            raise ProtocolFault(FaultCode.MALFORMED, f"the memfd ended at {offset} of {size} bytes")
        parts.append(part)
        offset += len(part)
    return b"".join(parts)
