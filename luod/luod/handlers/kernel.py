"""What the kernel says of a fd without asking whoever is behind it.

fstat(2) on a file of a FUSE mount asks the process that serves the mount, which may be the hostile client that sent the fd and may never
answer. statx(2) with AT_STATX_DONT_SYNC takes what the kernel knows; Python has no name for it.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final, NamedTuple

_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_WANTED: Final = 0x303
"""STATX_TYPE, STATX_MODE, STATX_INO and STATX_SIZE of include/uapi/linux/stat.h, where struct statx is as well."""
_STATX: Final = struct.Struct("=28xH2xQQ88xII112x")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]


class Stat(NamedTuple):
    """The fields of stat(2) that tell what a fd is, under the names that os.stat_result has for them."""

    st_mode: int
    st_ino: int
    st_size: int
    st_dev: int


def stat_of(fd: int) -> Stat:
    """What the kernel knows of the borrowed `fd`. Doesn't block.

    Raises:
        OSError: as statx(2).
    """
    buffer = ctypes.create_string_buffer(_STATX.size)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, _WANTED, buffer):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    mode, inode, size, major, minor = _STATX.unpack(buffer.raw)
    return Stat(st_mode=mode, st_ino=inode, st_size=size, st_dev=os.makedev(major, minor))


def printable(text: bytes) -> str:
    """`text` as a client chose it (a path, a name), such that a terminal shows it and does nothing else."""
    decoded = text.decode("utf-8", "backslashreplace")
    if decoded.isprintable():
        return decoded
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in decoded)
