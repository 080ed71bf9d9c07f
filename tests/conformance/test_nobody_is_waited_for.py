"""A client that holds one of the kernel's locks for ever: whoever asks luod to take its fd must not be able to stop luod.

The kernel copies from and to a process's memory while it holds a lock of a pipe, a socket, the network. userfaultfd(2) lets a process
decide when such a copy goes on; a file of a FUSE mount that is mapped does the same for an ordinary user.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

import pytest

from conformance.making import Maker, available, making
from conformance.specimens import SPECIMENS
from conformance.vmm import SYSCALLS, called
from luod_protocol.fds import OwnedFd
from processes import Talk, readable, spawn_client

PAGE = mmap.PAGESIZE
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_ZEROPAGE = 0xC020AA04
_TUNSETTXFILTER = 0x400454D1

libc = ctypes.CDLL(None, use_errno=True)


def _userfaultfd() -> int:
    return called(libc.syscall(SYSCALLS["userfaultfd"], os.O_CLOEXEC | os.O_NONBLOCK))


class Trap:
    """A page of memory that whoever touches it waits for, the kernel included, until it is opened."""

    def __init__(self, watcher: int) -> None:
        self._watcher = watcher
        self._memory = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        fcntl.ioctl(watcher, _UFFDIO_API, bytearray(struct.pack("3Q", 0xAA, 0, 0)))
        fcntl.ioctl(watcher, _UFFDIO_REGISTER, bytearray(struct.pack("4Q", self.address, PAGE, 1, 0)))

    def open(self) -> None:
        fcntl.ioctl(self._watcher, _UFFDIO_ZEROPAGE, bytearray(struct.pack("3Qq", self.address, PAGE, 0, 0)))


@contextmanager
def caught(touch: Callable[[int], object]) -> Generator[None]:
    """Somebody in the middle of `touch`, which is given the address of a trap."""
    with OwnedFd(_userfaultfd()) as watcher:
        trap = Trap(watcher.fileno())
        thread = threading.Thread(target=touch, args=(trap.address,))
        thread.start()
        try:
            assert readable(watcher.fileno()), "nobody has touched the trap"
            yield
        finally:
            trap.open()
            thread.join()


def take_it(talk: Talk) -> None:
    from luod.handlers import recognize
    from luod.handlers.base import Probe

    fd = talk.hear()
    handler = recognize(Probe(fd))
    handler.verify(Probe(fd), handler.record(Probe(fd)))
    talk.tell(handler.kind)


@contextmanager
def _full_pipe() -> Generator[int]:
    read, write = os.pipe2(os.O_CLOEXEC)
    with OwnedFd(read), OwnedFd(write):
        os.write(write, b"x")
        yield read


@contextmanager
def _tcp() -> Generator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            accepted.sendall(b"x")
            yield client.fileno()


@contextmanager
def _corked_udp() -> Generator[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", 9))
        sock.setsockopt(socket.IPPROTO_UDP, 1, 1)  # UDP_CORK
        yield sock.fileno()


def _made(name: str) -> Maker:
    """As the specimen of that name; where there is none, nothing that can be made."""
    found = [specimen.make for specimen in SPECIMENS if specimen.name == name]
    return found[0] if found else making(lambda: os.open("", 0))


def _read(fd: int, address: int) -> object:
    return libc.read(fd, ctypes.c_void_p(address), 8)


def _write(fd: int, address: int) -> object:
    return libc.write(fd, ctypes.c_void_p(address), 8)


CASES: dict[str, tuple[Maker, Callable[[int, int], object]]] = {
    "pipe": (_full_pipe, _read),
    "tcp": (_tcp, _read),
    "udp": (_corked_udp, _write),
    "vsock": (_made("socket-vsock"), lambda fd, address: libc.setsockopt(fd, 40, 0, ctypes.c_void_p(address), 8)),
    "netlink": (_made("socket-netlink-notified"), _write),
    "unix": (_made("socket-unix-stream"), _read),
    "memfd": (_made("memfd"), _write),
    "eventfd": (_made("eventfd-signalled"), _read),
    "inotify": (_made("inotify-watching"), lambda fd, address: libc.read(fd, ctypes.c_void_p(address), PAGE)),
    "pty-master": (_made("pty-master"), _write),
    "pty-slave": (_made("pty-slave"), _read),
    "tap": (_made("tap"), lambda fd, address: libc.ioctl(fd, _TUNSETTXFILTER, ctypes.c_void_p(address))),
}


@pytest.mark.root
@pytest.mark.parametrize("case", CASES)
def test_looking_at_a_fd_waits_for_nobody(case: str) -> None:
    make, touch = CASES[case]
    if not available(make) or not available(making(_userfaultfd)):
        pytest.skip("not on this machine")
    with make() as fd, spawn_client(take_it, pass_fds=[fd]) as luod, caught(lambda address: touch(fd, address)):
        luod.tell(fd)
        assert luod.hear(10) == case.partition("-")[0] or case in ("tcp", "udp", "vsock", "netlink", "unix")


@pytest.mark.root
@pytest.mark.parametrize("kind", ["bpf-link", "macvtap", "pidfd", "timerfd"])
def test_looking_waits_for_no_network_configuration(kind: str) -> None:
    """The lock that a tap's filter holds is one for all of them."""
    if not available(_made(kind)) or not available(_made("tap")) or not available(making(_userfaultfd)):
        pytest.skip("not on this machine")
    with (
        _made("tap")() as tap,
        _made(kind)() as fd,
        spawn_client(take_it, pass_fds=[fd]) as luod,
        caught(lambda address: libc.ioctl(tap, _TUNSETTXFILTER, ctypes.c_void_p(address))),
    ):
        luod.tell(fd)
        assert luod.hear(10) == kind
