"""What the conformance kit tries the handlers with. A new handler joins by adding its specimens here.

A specimen makes a fd, knows what its handler must say of it, and what whoever has a copy of the fd may do to it at any time. A refused
specimen makes a fd that no handler may take. What only a VMM has is in `vmm`; what this machine has not, in `recorded`.
"""

from __future__ import annotations

import fcntl
import functools
import os
import select
import socket
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Final

from conformance import vmm
from conformance.making import HOSTILE, Maker, Refused, Specimen, available, making, reopened
from luod_protocol.fds import OwnedFd, own

# ---- memfd

ALL_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def _memfd(content: bytes = b"contents", *, seals: int = 0, position: int = 0, name: str = "specimen") -> Maker:
    def make() -> int:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(fd, content)
        os.lseek(fd, position, os.SEEK_SET)
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd

    return making(make)


def _write_and_grow(fd: int) -> None:
    os.pwrite(fd, b"CONTENTS and more", 0)
    os.ftruncate(fd, 1 << 20)


def _write_and_shrink(fd: int) -> None:
    os.ftruncate(fd, 1)
    os.lseek(fd, 1, os.SEEK_SET)


def _seal(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL_SEALS)


def _huge_pages() -> list[Specimen]:
    """One for each size of huge pages that the kernel has; none of the pages needs to be free."""
    found: list[Specimen] = []
    for shift in range(16, 35):
        flags = os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_ALLOW_SEALING | shift << os.MFD_HUGE_SHIFT
        try:
            OwnedFd(os.memfd_create("specimen", flags)).close()
        except OSError:
            continue
        found.append(
            Specimen(
                name=f"memfd-huge-{shift}",
                kind="memfd",
                make=making(functools.partial(os.memfd_create, "specimen", flags)),
                facts={"access": "rw", "seals": "", "huge_page_size": 1 << shift, "size": 0},
                unlike=("memfd",),
            )
        )
    return found


MEMFDS: Final = (
    Specimen(
        name="memfd",
        kind="memfd",
        make=_memfd(position=3),
        facts={"size": 8, "seals": "", "access": "rw", "huge_page_size": 0},
        use=_write_and_grow,
        unlike=("memfd-read-only", "memfd-sealed", "memfd-no-shrink"),
    ),
    Specimen(name="memfd-empty", kind="memfd", make=_memfd(b""), facts={"size": 0}, use=_seal),
    Specimen(name="memfd-hostile-name", kind="memfd", make=_memfd(name=os.fsdecode(HOSTILE)), facts={"size": 8}, use=_write_and_shrink),
    Specimen(
        name="memfd-sealed",
        kind="memfd",
        make=_memfd(seals=ALL_SEALS),
        facts={"size": 8, "seals": "seal,shrink,grow,write"},
        unlike=("memfd-sealed-larger",),
    ),
    Specimen(
        name="memfd-sealed-larger",
        kind="memfd",
        make=_memfd(b"larger contents", seals=ALL_SEALS),
        facts={"size": 15},
        unlike=("memfd-sealed",),
    ),
    Specimen(
        name="memfd-no-shrink",
        kind="memfd",
        make=_memfd(seals=fcntl.F_SEAL_SHRINK),
        facts={"seals": "shrink"},
        use=_write_and_grow,
        unlike=("memfd-no-shrink-larger", "memfd-no-grow"),
    ),
    Specimen(
        name="memfd-no-shrink-larger",
        kind="memfd",
        make=_memfd(b"larger contents", seals=fcntl.F_SEAL_SHRINK),
        facts={"size": 15},
    ),
    Specimen(
        name="memfd-no-grow",
        kind="memfd",
        make=_memfd(seals=fcntl.F_SEAL_GROW),
        facts={"seals": "grow"},
        use=_write_and_shrink,
        unlike=("memfd-no-shrink",),
    ),
    Specimen(
        name="memfd-larger-no-grow",
        kind="memfd",
        make=_memfd(b"larger contents", seals=fcntl.F_SEAL_GROW),
        facts={"size": 15},
        unlike=("memfd-no-grow",),
    ),
    Specimen(
        name="memfd-future-write",
        kind="memfd",
        make=_memfd(seals=0x10),
        facts={"seals": "future-write"},
    ),
    Specimen(
        name="memfd-read-only",
        kind="memfd",
        make=reopened(_memfd(), os.O_RDONLY),
        facts={"access": "r", "size": 8},
        unlike=("memfd", "memfd-write-only", "memfd-no-access"),
    ),
    Specimen(
        name="memfd-write-only", kind="memfd", make=reopened(_memfd(), os.O_WRONLY), facts={"access": "w"}, unlike=("memfd-read-only",)
    ),
    # open(2): access mode 3 gives a descriptor that can neither be read nor written.
    Specimen(name="memfd-no-access", kind="memfd", make=reopened(_memfd(), os.O_ACCMODE), facts={"access": "none"}, unlike=("memfd",)),
    *_huge_pages(),
)

# ---- eventfd


def _eventfd(count: int, flags: int = 0) -> Maker:
    return making(lambda: os.eventfd(count, os.EFD_CLOEXEC | os.EFD_NONBLOCK | flags))


def _signal(fd: int) -> None:
    os.eventfd_write(fd, 7)


EVENTFDS: Final = (
    Specimen(name="eventfd", kind="eventfd", make=_eventfd(0), facts={"semaphore": 0}, use=_signal, unlike=("eventfd-semaphore",)),
    Specimen(name="eventfd-signalled", kind="eventfd", make=_eventfd(5), facts={"semaphore": 0}, use=_signal),
    Specimen(
        name="eventfd-semaphore",
        kind="eventfd",
        make=_eventfd(2, os.EFD_SEMAPHORE),
        facts={"semaphore": 1},
        use=_signal,
        unlike=("eventfd",),
    ),
)

# ---- pipe


def _pipe(end: int, content: bytes = b"in the pipe", *, alone: bool = False) -> Maker:
    @contextmanager
    def make() -> Generator[int]:
        with ExitStack() as stack:
            ends = [stack.enter_context(each) for each in own(os.pipe2(os.O_CLOEXEC))]
            os.write(ends[1].fileno(), content)
            if alone:
                ends[1 - end].close()
            yield ends[end].fileno()

    return make


def _resize(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 1 << 14)


def _drain(fd: int) -> None:
    os.read(fd, 100)


PIPES: Final = (
    Specimen(name="pipe-read", kind="pipe", make=_pipe(0), facts={"end": "read"}, use=_drain, unlike=("pipe-write", "pipe-both")),
    Specimen(name="pipe-write", kind="pipe", make=_pipe(1), facts={"end": "write"}, use=_resize, unlike=("pipe-read",)),
    Specimen(name="pipe-both", kind="pipe", make=reopened(_pipe(0), os.O_RDWR), facts={"end": "both"}, use=_resize, unlike=("pipe-read",)),
    Specimen(name="pipe-at-its-end", kind="pipe", make=_pipe(0, alone=True), facts={"end": "read"}),
    Specimen(name="pipe-broken", kind="pipe", make=_pipe(1, alone=True), facts={"end": "write"}),
)

# ---- socket


def _socket(family: int, kind: int, bind: tuple[str, int] | bytes | None = None) -> Maker:
    @contextmanager
    def make() -> Generator[int]:
        with socket.socket(family, kind) as sock:
            if bind is not None:
                sock.bind(bind)
            yield sock.fileno()

    return make


def _pair(kind: int) -> Maker:
    @contextmanager
    def make() -> Generator[int]:
        mine, peer = socket.socketpair(socket.AF_UNIX, kind)
        with mine, peer:
            peer.send(b"unread")
            yield mine.fileno()

    return make


@contextmanager
def _hung_up() -> Generator[int]:
    mine, peer = socket.socketpair()
    peer.close()
    with mine:
        yield mine.fileno()


@contextmanager
def _listening_tcp() -> Generator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        yield server.fileno()


@contextmanager
def _connected_tcp() -> Generator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            accepted.sendall(b"unread")
            yield client.fileno()


@contextmanager
def _listening_at_a_hostile_path() -> Generator[int]:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fsencode(folder) + b"/" + HOSTILE)
        server.listen()
        yield server.fileno()


@contextmanager
def _mapped_udp6() -> Generator[int]:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.connect(("::ffff:127.0.0.1", 9))
        yield sock.fileno()


def _leave_inet6(fd: int) -> None:
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, 1, socket.AF_INET)  # IPV6_ADDRFORM of ipv6(7)


def _shut_down(fd: int) -> None:
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.shutdown(socket.SHUT_RDWR)


def _listen(fd: int) -> None:
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _inet6() -> list[Specimen]:
    """None on a machine without IPv6."""
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        return []
    return [
        Specimen(
            name="socket-tcp6",
            kind="socket",
            make=_socket(socket.AF_INET6, socket.SOCK_STREAM),
            facts={"family": "inet6", "type": "stream", "protocol": 6},
            unlike=("socket-tcp", "socket-udp6"),
        ),
        Specimen(
            name="socket-udp6",
            kind="socket",
            make=_mapped_udp6,
            facts={"family": "inet6", "type": "dgram", "protocol": 17},
            use=_leave_inet6,
            unlike=("socket-udp", "socket-tcp6"),
        ),
    ]


@contextmanager
def _notified() -> Generator[int]:
    """A netlink socket that has a port and is in a group."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.bind((0x7FFF_0000 | os.getpid() & 0xFFFF, 1))
        yield sock.fileno()


def _leave_group(fd: int) -> None:
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.setsockopt(_SOL_NETLINK, 2, 1)  # NETLINK_DROP_MEMBERSHIP, RTNLGRP_LINK


def _follow_lo(fd: int) -> None:
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.bind(("lo", 3))


_SOL_NETLINK: Final = 270
_OTHER_FAMILIES: Final = (
    Specimen(
        name="socket-netlink",
        kind="socket",
        make=_socket(socket.AF_NETLINK, socket.SOCK_RAW),
        facts={"family": "netlink", "type": "raw", "protocol": 0, "listening": 0, "port": 0, "groups": 0},
        unlike=("socket-unix-dgram", "socket-netlink-audit"),
    ),
    Specimen(
        name="socket-netlink-notified",
        kind="socket",
        make=_notified,
        facts={"port": 0x7FFF_0000 | os.getpid() & 0xFFFF, "groups": 1},
        use=_leave_group,
    ),
    Specimen(
        name="socket-netlink-audit",
        kind="socket",
        make=making(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16).detach()),
        facts={"protocol": 16},
        unlike=("socket-netlink",),
    ),
    Specimen(
        name="socket-vsock",
        kind="socket",
        make=_socket(40, socket.SOCK_STREAM),
        facts={"family": "vsock", "type": "stream", "protocol": 0, "listening": 0},
        unlike=("socket-tcp",),
    ),
    Specimen(
        name="socket-packet",
        kind="socket",
        make=_socket(socket.AF_PACKET, socket.SOCK_RAW),
        facts={"family": "packet", "type": "raw", "interface": 0},
        use=_follow_lo,
        unlike=("socket-netlink",),
    ),
)

SOCKETS: Final = (
    Specimen(
        name="socket-unix-stream",
        kind="socket",
        make=_pair(socket.SOCK_STREAM),
        facts={"family": "unix", "type": "stream", "protocol": 0, "listening": 0, "connected": 1, "address": ""},
        use=_shut_down,
        unlike=("socket-unix-dgram", "socket-unix-seqpacket", "socket-tcp"),
    ),
    Specimen(name="socket-unix-dgram", kind="socket", make=_pair(socket.SOCK_DGRAM), facts={"type": "dgram", "connected": 1}),
    Specimen(
        name="socket-unix-seqpacket",
        kind="socket",
        make=_pair(socket.SOCK_SEQPACKET),
        facts={"type": "seqpacket"},
        unlike=("socket-unix-stream",),
    ),
    Specimen(name="socket-unix-hung-up", kind="socket", make=_hung_up, facts={"family": "unix", "type": "stream"}),
    Specimen(
        name="socket-unix-abstract",
        kind="socket",
        make=_socket(socket.AF_UNIX, socket.SOCK_DGRAM, b"\0luod-specimen-%d" % os.getpid() + HOSTILE),
        facts={"connected": 0, "address": f"@luod-specimen-{os.getpid()}" + r"\xff\x1b[31m\n:"},
    ),
    Specimen(name="socket-unix-path", kind="socket", make=_listening_at_a_hostile_path, facts={"listening": 1, "connected": 0}),
    Specimen(
        name="socket-tcp",
        kind="socket",
        make=_socket(socket.AF_INET, socket.SOCK_STREAM),
        facts={"family": "inet", "type": "stream", "protocol": 6, "listening": 0},
        use=_listen,
        unlike=("socket-udp", "socket-unix-stream"),
    ),
    Specimen(
        name="socket-tcp-listening",
        kind="socket",
        make=_listening_tcp,
        facts={"listening": 1},
        use=_shut_down,
        unlike=("socket-udp",),
    ),
    Specimen(name="socket-tcp-connected", kind="socket", make=_connected_tcp, facts={"listening": 0}, use=_shut_down),
    Specimen(
        name="socket-udp",
        kind="socket",
        make=_socket(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
        facts={"type": "dgram", "protocol": 17},
        unlike=("socket-tcp",),
    ),
    *_inet6(),
    *filter(lambda specimen: available(specimen.make), _OTHER_FAMILIES),
)

SPECIMENS: Final = (*MEMFDS, *EVENTFDS, *PIPES, *SOCKETS, *vmm.SPECIMENS)

# ---- refused

_XDP: Final = 44
"""AF_XDP."""


def _file(folder: str | None = None, name: bytes = b"file", *, flags: int = 0, unlink: bool = False) -> Maker:
    @contextmanager
    def make() -> Generator[int]:
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            path = os.fsencode(inside) + b"/" + name
            with OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)) as fd:
                if unlink:
                    os.unlink(path)
                with OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", os.O_RDWR | os.O_CLOEXEC | flags)) as again:
                    yield again.fileno()

    return make


@contextmanager
def _far_away() -> Generator[int]:
    """A directory whose path is longer than the kernel can tell."""
    with tempfile.TemporaryDirectory() as top, ExitStack() as stack:
        folder = stack.enter_context(OwnedFd(os.open(top, os.O_DIRECTORY | os.O_CLOEXEC)))
        for _ in range(20):
            os.mkdir("d" * 250, dir_fd=folder.fileno())
            folder = stack.enter_context(OwnedFd(os.open("d" * 250, os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder.fileno())))
        yield folder.fileno()


@contextmanager
def _fifo() -> Generator[int]:
    with tempfile.TemporaryDirectory() as folder:
        os.mkfifo(f"{folder}/fifo")
        with OwnedFd(os.open(f"{folder}/fifo", os.O_RDWR | os.O_CLOEXEC)) as fd:
            yield fd.fileno()


@contextmanager
def _symlink() -> Generator[int]:
    with tempfile.TemporaryDirectory() as folder:
        os.symlink("nowhere", f"{folder}/link")
        with OwnedFd(os.open(f"{folder}/link", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
            yield fd.fileno()


def _epoll() -> int:
    with select.epoll() as epoll:
        return os.dup(epoll.fileno())


REFUSED: Final = (
    Refused(name="regular-file", make=_file(), words=("/file", "a regular file", "its path")),
    Refused(name="regular-file-unlinked", make=_file(unlink=True), words=("a regular file", "into a memfd")),
    Refused(name="regular-file-hostile", make=_file(name=HOSTILE), words=("a regular file", r"/\xff\x1b[31m\n:")),
    # F_GET_SEALS works there, and so it does not tell a memfd.
    Refused(name="tmpfs-file", make=_file("/dev/shm"), words=("/dev/shm/", "a regular file", "its path")),
    Refused(name="tmpfs-file-like-a-memfd", make=_file("/dev/shm", b"memfd:name", unlink=True), words=("a regular file",)),
    Refused(name="directory", make=making(lambda: os.open("/", os.O_RDONLY | os.O_CLOEXEC)), words=("a directory", "by its path")),
    Refused(name="directory-far-away", make=_far_away, words=("a directory", "by its path")),
    Refused(name="null", make=making(lambda: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)), words=("/dev/null", "a character device")),
    Refused(name="fifo", make=_fifo, words=("/fifo", "a named FIFO", "by its path")),
    Refused(name="symlink", make=_symlink, words=("O_PATH",)),
    Refused(name="epoll", make=making(_epoll), words=("an epoll", "make a new one and add")),
    Refused(name="network-namespace", make=making(lambda: os.open("/proc/self/ns/net", os.O_CLOEXEC)), words=("a network namespace",)),
    *(
        refused
        for refused in (
            Refused(
                name="socket-alg",
                make=_socket(socket.AF_ALG, socket.SOCK_SEQPACKET),
                words=(f"a socket of address family {int(socket.AF_ALG)}", "unix, inet, inet6"),
            ),
            Refused(name="socket-xdp", make=_socket(_XDP, socket.SOCK_RAW), words=(f"a socket of address family {_XDP}",)),
        )
        if available(refused.make)
    ),
    *vmm.REFUSED,
    *(
        Refused(name=f"{specimen.name}-place", make=reopened(specimen.make, os.O_PATH), words=("O_PATH", "preserve the fd"))
        for specimen in {specimen.kind: specimen for specimen in SPECIMENS}.values()
    ),
)
