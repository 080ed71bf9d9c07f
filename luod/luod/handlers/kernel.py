"""What the kernel says of a fd without asking, or waiting for, whoever else has a copy of it.

fstat(2) on a file of a FUSE mount asks the process that serves the mount, which may be the hostile client that sent the fd and may never
answer. statx(2) with AT_STATX_DONT_SYNC takes what the kernel knows; Python has no name for it.

Some questions wait for a lock that the kernel holds while it copies from or to a process's memory. That memory can be a mapped file of
a FUSE mount, or userfaultfd(2) can watch over it, and then the lock is held for as long as that process likes. Seen on Linux 6.18, each of
them without an end: F_GETPIPE_SZ (somebody reads the pipe), getsockname(2) of TCP, UDP and vsock sockets (recv, send, setsockopt), the
fdinfo of any tun (TUNSETTXFILTER on any other takes the lock that all network configuration shares), F_ADD_SEALS (write). Handlers ask
none of these. Python's socket objects call getsockname(2) when they are made of a fd; so there are none here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from typing import Final, NamedTuple

from luod_protocol.fds import OwnedFd

_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_WANTED: Final = 0x303
"""STATX_TYPE, STATX_MODE, STATX_INO and STATX_SIZE of include/uapi/linux/stat.h, where struct statx is as well."""
_STATX: Final = struct.Struct("=28xH2xQQ80xIIII112x")
_SOCKADDR_BYTES: Final = 128
"""struct sockaddr_storage."""

_OPENAT2: Final = 437
"""The number of openat2(2), the same on every machine. include/uapi/linux/openat2.h has struct open_how and the flags."""
_AT_FDCWD: Final = -100
_OPEN_HOW: Final = struct.Struct("=QQQ")
_RESOLVE_NO_SYMLINKS: Final = 0x04
_RESOLVE_CACHED: Final = 0x20
_TRIES: Final = 3
"""A mount or a rename elsewhere at the same moment makes the cache look incomplete."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]
_libc.syscall.restype = ctypes.c_long


class Stat(NamedTuple):
    """The fields of stat(2) that tell what a fd is, under the names that os.stat_result has for them.

    `st_rdev` of a character device is what was opened, also on a FUSE mount, whose server makes up its inodes: the kernel keeps the type
    and the device number of an inode as they were when it came to be (fs/fuse/inode.c: fuse_init_inode, fuse_stale_inode), and opens by
    them (fs/char_dev.c: chrdev_open); it takes no inode without a type from the server. Tried on Linux 6.18 with a server that changes all
    it can: only `st_ino` changes. A mount that only an ordinary user could make is `nodev`. Of a fd that isn't open (O_PATH) `st_rdev` says
    nothing.
    """

    st_mode: int
    st_ino: int
    st_size: int
    st_dev: int
    st_rdev: int = 0


def stat_of(fd: int) -> Stat:
    """What the kernel knows of the borrowed `fd`. Doesn't block.

    Raises:
        OSError: as statx(2).
    """
    buffer = ctypes.create_string_buffer(_STATX.size)
    _check(_libc.statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, _WANTED, buffer))
    mode, inode, size, rdev_major, rdev_minor, major, minor = _STATX.unpack(buffer.raw)
    return Stat(st_mode=mode, st_ino=inode, st_size=size, st_dev=os.makedev(major, minor), st_rdev=os.makedev(rdev_major, rdev_minor))


def socket_option(fd: int, option: int) -> int:
    """An option of the level SOL_SOCKET (socket(7)) of a borrowed socket.

    SO_DOMAIN, SO_TYPE, SO_PROTOCOL and SO_ACCEPTCONN wait for nobody (net/core/sock.c), unless the administrator has attached a BPF
    program for getsockopt to the socket's cgroup.

    Raises:
        OSError: as getsockopt(2).
    """
    value, size = ctypes.c_int(), ctypes.c_uint(4)
    _check(_libc.getsockopt(fd, socket.SOL_SOCKET, option, ctypes.byref(value), ctypes.byref(size)))
    return value.value


def socket_name(fd: int, *, peer: bool = False) -> bytes:
    """The struct sockaddr of a borrowed socket, or of its peer. Only for families where this waits for nobody, see above.

    Raises:
        OSError: as getsockname(2) and getpeername(2).
    """
    buffer, size = ctypes.create_string_buffer(_SOCKADDR_BYTES), ctypes.c_uint(_SOCKADDR_BYTES)
    _check((_libc.getpeername if peer else _libc.getsockname)(fd, buffer, ctypes.byref(size)))
    return buffer.raw[: size.value]


def _check(result: int) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def cached_stat(path: str, *, follow: bool) -> Stat | None:
    """What lies at `path`, as far as the kernel knows without asking a disk, a network or a FUSE server. Doesn't block.

    Args:
        path: absolute.
        follow: whether symlinks are followed; else a path that has one anywhere leads nowhere.

    Returns:
        None: nothing, or nothing that the kernel knows.
    """
    how = _OPEN_HOW.pack(os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_CACHED | (0 if follow else _RESOLVE_NO_SYMLINKS))
    for _ in range(_TRIES):
        fd = _libc.syscall(ctypes.c_long(_OPENAT2), ctypes.c_long(_AT_FDCWD), os.fsencode(path), how, ctypes.c_size_t(_OPEN_HOW.size))
        if fd >= 0:
            with OwnedFd(fd) as place:
                return stat_of(place.fileno())
        if ctypes.get_errno() != errno.EAGAIN:
            break
    return None


def is_fuse(device: int) -> bool:
    """Whether `device`, a st_dev, is of a FUSE file system that is mounted here: proc_pid_mountinfo(5). statfs(2) would ask its server."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            mount, _, system = line.partition(" - ")
            if mount.split()[2] == number and system.split()[0].partition(".")[0] in ("fuse", "fuseblk"):
                return True
    return False


def printable(text: bytes) -> str:
    """`text` as a client chose it (a path, a name), such that a terminal shows it and does nothing else."""
    decoded = text.decode("utf-8", "backslashreplace")
    if decoded.isprintable():
        return decoded
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in decoded)
