"""The sandbox of luod.service permits all that luod does, and little more: standins/probe.py tries."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import socket
import stat
import tempfile
import termios
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

import pytest

from processes import Talk, spawn_client
from standins.probe import TERMINAL
from systemd_standin import SERVICE, service, standin

pytestmark = pytest.mark.usefixtures("require_systemd")

KMSG = os.makedev(1, 11)


def visit(talk: Talk) -> None:
    import os
    import socket

    from luod.system import process

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            sock.connect("/run/luod/serialize")
        except OSError as error:
            talk.tell(error.errno)
        else:
            talk.tell([os.getuid(), os.getgid(), process(os.getpid()).start])
        talk.hear()


@contextmanager
def many_kinds() -> Generator[tuple[dict[str, int], Callable[[], bytes]]]:
    """Descriptors of all kinds that are easily made, and what has come through the `tcp` one."""
    with ExitStack() as ending:

        def own(*fds: int) -> int:
            for fd in fds:
                ending.callback(os.close, fd)
            return fds[0]

        def sock(made: socket.socket) -> socket.socket:
            return ending.enter_context(made)

        read, write = os.pipe2(os.O_CLOEXEC)
        os.write(write, b"four")
        master, slave = os.openpty()
        own(slave, read, write)
        fcntl.ioctl(master, termios.TIOCSWINSZ, TERMINAL.pack(11, 22, 0, 0))
        listening = sock(socket.create_server(("127.0.0.1", 0)))
        tcp = sock(socket.create_connection(listening.getsockname()))
        other_end = sock(listening.accept()[0])
        epoll = ending.enter_context(select.epoll())
        unix, other = socket.socketpair()
        fds = {
            "pipe": read,
            "terminal": own(master),
            "tcp": tcp.fileno(),
            "listening": listening.fileno(),
            "udp": sock(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)).fileno(),
            "netlink": sock(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)).fileno(),
            "unix": sock(unix).fileno(),
            "other": sock(other).fileno(),
            "memfd": own(os.memfd_create("test", os.MFD_ALLOW_SEALING)),
            "eventfd": own(os.eventfd(3)),
            "epoll": epoll.fileno(),
            "pidfd": own(os.pidfd_open(os.getpid())),
            "folder": own(os.open("/", os.O_RDONLY)),
            "path": own(os.open("/", os.O_PATH)),
            "file": ending.enter_context(tempfile.TemporaryFile()).fileno(),
            "device": own(os.open("/dev/zero", os.O_RDWR)),
            "kernel log": own(os.open("/dev/kmsg", os.O_WRONLY)),
        }
        yield fds, lambda: other_end.recv(100)


def try_all(settings: str = "") -> tuple[dict[str, str], bytes]:
    """What the probe says in the sandbox, with settings in place of its own, and what came through the `tcp` descriptor."""
    with standin(settings) as manager, many_kinds() as (fds, come_through):
        manager.ctl("start", SERVICE)
        folder, device = manager.root / "etc" / "everybody", manager.root / "run" / "device"
        folder.mkdir()
        folder.chmod(0o777)
        os.mknod(device, stat.S_IFCHR, KMSG)
        device.chmod(0o666)
        _, most = resource.prlimit(manager.pid, resource.RLIMIT_NOFILE)
        most = min(most, int(manager.show(SERVICE, "LimitNOFILE")["LimitNOFILE"]))
        with spawn_client(visit, user=manager.user("alice"), within=manager.inside) as alice:
            assert service(manager, "who", "serialize") == alice.hear()
            said = service(manager, "probe", 0, "/etc/everybody", "/run/device", most, list(fds), fds=list(fds.values()))
        return said, come_through()


def test_it_permits_what_luod_does_and_little_more() -> None:
    said, came = try_all()
    assert (said, came) == ({}, b"through the sandbox")


def test_what_it_forbids_is_forbidden_by_its_settings() -> None:
    off = {
        "no network": "RestrictAddressFamilies=\n",
        "no netlink": "",
        "no code": "MemoryDenyWriteExecute=no\n",
        "no files": "ProtectSystem=no\n",
        "no devices": "DevicePolicy=auto\nDeviceAllow=\nProtectClock=no\n",
        "no namespaces": "RestrictNamespaces=no\nSystemCallFilter=\n",
    }
    said, _ = try_all("".join(off.values()))
    assert said == dict.fromkeys(off, "AssertionError('it is not forbidden')")


def test_clients_are_told_apart_and_others_kept_out() -> None:
    with standin() as manager:
        manager.ctl("start", SERVICE)
        for name in ("alice", "bob"):
            with spawn_client(visit, user=manager.user(name), within=manager.inside) as client:
                said = client.hear()
                assert (said[0], said[2] > 0) == (manager.user(name).uid, True)
                assert service(manager, "who", "serialize") == said
        with spawn_client(visit, user=manager.user("nobody"), within=manager.inside) as nobody:
            assert nobody.hear() == errno.EACCES
