"""fds of luod's own, to ask the running kernel with what it carries, before a client gives one.

A *sort* is a kind, or a part of one where a kernel may make a difference (huge pages, the family of a socket). Of a sort a sample is made
where that costs nothing and changes nothing that anybody could see: no module is loaded, no device or interface comes to be, nothing that
exists is touched. A device's file is opened only where its driver is there already (`luod.handlers.devices`), for the first open(2) of a
node in /dev may load it. So there is no sample of vsock and packet sockets (either may load a module), of pseudoterminals (each is a node
in /dev/pts), of taps (closing one waits for the lock of all network configuration), of what belongs to a piece of hardware or an interface
(vfio devices and groups, macvtap), and of BPF objects.

Happy path: `sample(sort)`.

Unhappy paths:
1. There is no sample of it, or this machine or luod's sandbox doesn't let luod make one: `NoSample` says why. It is no answer of the
   kernel's: the first fd of that sort that a client gives is tried.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable, Mapping
from typing import Final

from luod.handlers import devices
from luod.handlers.iommufd import Iommufd
from luod.handlers.socket import FAMILIES
from luod.handlers.vfio import VfioContainer
from luod_protocol.errors import LuodError
from luod_protocol.fds import OwnedFd, own

_SIGSET_BYTES: Final = 128
"""The C library's sigset_t; with all of it zero it has no signal."""
_CLOCK_MONOTONIC: Final = 1

_libc = ctypes.CDLL(None, use_errno=True)


class NoSample(LuodError):
    """luod has no fd of this sort to try."""


def sorts(kind: str) -> tuple[str, ...]:
    """The sorts of a kind, as `Entry.sort` of `luod.manifest` names them."""
    match kind:
        case "memfd":
            return ("memfd", "memfd of huge pages")
        case "socket":
            return tuple(f"{family} socket" for family in FAMILIES.values())
        case _:
            return (kind,)


def sample(sort: str) -> OwnedFd:
    """A fd of this sort; the caller owns it.

    Raises:
        NoSample: there is none.
    """
    make = _MAKERS.get(sort)
    if make is None:
        raise NoSample("")
    try:
        return make()
    except OSError as error:
        raise NoSample(f"luod can't make one of its own here: {error.strerror}") from None


def _memfd(flags: int = 0) -> OwnedFd:
    return OwnedFd(os.memfd_create("luod-trial", os.MFD_CLOEXEC | flags))


def _pipe() -> OwnedFd:
    reader, writer = own(os.pipe2(os.O_CLOEXEC))
    writer.close()
    return reader


def _socket(family: int, kind: int = socket.SOCK_STREAM) -> OwnedFd:
    return OwnedFd(socket.socket(family, kind | socket.SOCK_CLOEXEC).detach())


def _inet6() -> OwnedFd:
    # Else socket(2) would load the module.
    if not os.path.exists("/proc/self/net/if_inet6"):
        raise NoSample("this machine has no IPv6 now")
    return _socket(socket.AF_INET6)


def _libc_fd(function: str, *arguments: int | bytes) -> OwnedFd:
    fd = getattr(_libc, function)(*arguments)
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return OwnedFd(fd)


def _device(path: str, drivers: tuple[str, ...]) -> OwnedFd:
    try:
        there = devices.driver(os.stat(path).st_rdev) in drivers
    except FileNotFoundError:
        there = False
    if not there:
        raise NoSample(f"there is no {path} on this machine, or not its driver")
    try:
        return OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise NoSample(f"luod can't open {path}: {error.strerror}") from None


_MAKERS: Final[Mapping[str, Callable[[], OwnedFd]]] = {
    "memfd": _memfd,
    "memfd of huge pages": lambda: _memfd(os.MFD_HUGETLB),
    "eventfd": lambda: OwnedFd(os.eventfd(0, os.EFD_CLOEXEC)),
    "pipe": _pipe,
    "unix socket": lambda: _socket(socket.AF_UNIX),
    "inet socket": lambda: _socket(socket.AF_INET),
    "inet6 socket": _inet6,
    "netlink socket": lambda: _socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "timerfd": lambda: _libc_fd("timerfd_create", _CLOCK_MONOTONIC, os.O_CLOEXEC),
    "signalfd": lambda: _libc_fd("signalfd", -1, bytes(_SIGSET_BYTES), os.O_CLOEXEC),
    "inotify": lambda: _libc_fd("inotify_init1", os.O_CLOEXEC),
    "pidfd": lambda: OwnedFd(os.pidfd_open(os.getpid())),
    "vfio-container": lambda: _device("/dev/vfio/vfio", VfioContainer.drivers),
    "iommufd": lambda: _device("/dev/iommu", Iommufd.drivers),
}
