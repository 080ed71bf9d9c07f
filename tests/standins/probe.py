"""Do, in the sandbox of luod.service, all that luod does, and some things that it must not be able to do; say how each went."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import socket
import stat
import struct
import sys
import termios
from collections.abc import Callable, Mapping
from typing import Final

import trio

from luod.capacity import all_uids_are_mapped, overflow_uid
from luod.handlers import kernel
from luod.handlers.base import Probe
from luod.system import System, process
from luod_protocol import box
from luod_protocol.fds import OwnedFd, close_all

CLONE_NEWUSER: Final = 0x10000000
TERMINAL: Final = struct.Struct("HHHH")


def _look_at(fds: Mapping[str, int]) -> None:
    for name, fd in fds.items():
        seen = Probe(fd)
        assert seen.link, name
        assert "flags" in seen.info, name
        assert seen.type == stat.S_IFMT(os.fstat(fd).st_mode), name
        assert kernel.stat_of(fd).st_ino == os.fstat(fd).st_ino, name


def _box(fds: Mapping[str, int]) -> None:
    with box.seal(b"manifest", list(fds.values())) as sealed:
        assert box.manifest_of(sealed.fileno()) == b"manifest"
        copies = box.look(sealed.fileno())
        assert [os.fstat(copy.fileno()) for copy in copies] == [os.fstat(fd) for fd in fds.values()]
        close_all(copies)


def _memfd() -> None:
    with OwnedFd(os.memfd_create("probe", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), 4096)
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS) == fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


def _ioctl(fds: Mapping[str, int]) -> None:
    assert struct.unpack("i", fcntl.ioctl(fds["pipe"], termios.FIONREAD, b"\0" * 4)) == (4,)
    assert TERMINAL.unpack(fcntl.ioctl(fds["terminal"], termios.TIOCGWINSZ, b"\0" * TERMINAL.size)) == (11, 22, 0, 0)


def _inet(fds: Mapping[str, int]) -> None:
    """A socket of another network namespace and of another control group carries data, also after a way through a box."""
    with box.seal(b"", [fds["tcp"]]) as sealed:
        (copy,) = box.look(sealed.fileno())
        with socket.socket(fileno=copy.take()) as tcp:
            assert tcp.getsockname()[0] == "127.0.0.1"
            tcp.sendall(b"through the sandbox")


def _pidfd() -> None:
    with OwnedFd(os.pidfd_open(os.getpid())) as fd:
        signal.pidfd_send_signal(fd.fileno(), 0)


def _spawn() -> None:
    command = [sys.executable, "-P", "-c", "import luod.__main__"]
    pid = os.posix_spawn(command[0], command, os.environ)
    with OwnedFd(os.pidfd_open(pid)) as fd:
        ended = os.waitid(os.P_PIDFD, fd.fileno(), os.WEXITED)
    assert ended is not None
    assert (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0), ended


def _limits(most: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == most, hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, hard - 1))


def _lock() -> None:
    with OwnedFd(os.open("/run/luod/probe", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)) as fd:
        fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd.fileno(), 0)
    os.unlink("/run/luod/probe")


def _identify(client: int) -> None:
    assert process(client).start
    assert System().boot_id
    assert overflow_uid()
    assert all_uids_are_mapped()


def _trio() -> None:
    async def work() -> None:
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            async for _ in signals:
                break
        left, right = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with left, right:
            await left.send(b"x")
            assert await right.recv(2) == b"x"
        assert await trio.to_thread.run_sync(lambda: 7) == 7

    trio.run(work)


def _ctypes() -> None:
    """Calls into C, and calls back, for which libffi makes code at run time."""
    pointer = ctypes.POINTER(ctypes.c_int)

    def compare(one: ctypes.Array[ctypes.c_int], other: ctypes.Array[ctypes.c_int]) -> int:
        return int(one[0] - other[0])

    numbers = (ctypes.c_int * 3)(3, 1, 2)
    ctypes.CDLL(None).qsort(numbers, 3, ctypes.sizeof(ctypes.c_int), ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer)(compare))
    assert list(numbers) == [1, 2, 3]


def _unshare() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if child == 0:
        os._exit(ctypes.get_errno() if libc.unshare(CLONE_NEWUSER) else 0)
    error = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if error:
        raise OSError(error, os.strerror(error))


def _status() -> dict[str, str]:
    with open("/proc/self/status", encoding="ascii") as file:
        return dict(line.strip().split(":\t", 1) for line in file if ":\t" in line)


def _unprivileged() -> None:
    status = _status()
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert os.getuid() != 0


def _forbidden(attempt: Callable[[], object], *with_errno: int) -> Callable[[], None]:
    def check() -> None:
        try:
            attempt()
        except OSError as error:
            if error.errno not in with_errno:
                raise
        else:
            raise AssertionError("it is not forbidden")

    return check


def probe(client: int, folder: str, device: str, most: int, fds: Mapping[str, int]) -> dict[str, str]:
    """Try everything.

    Args:
        client: the pid of a client of another user.
        folder: one that everybody may write to, but for the sandbox.
        device: one that everybody may write to, but for the sandbox.
        most: how many descriptors the service may have.
        fds: borrowed, of many kinds; among them a `pipe` with 4 bytes in it, a `terminal` of 11 rows and 22 columns, and a connected `tcp`.

    Returns:
        For each attempt by its name what went wrong; nothing: it went as it should.
    """
    attempts: dict[str, Callable[[], object]] = {
        "look at fds": lambda: _look_at(fds),
        "box": lambda: _box(fds),
        "memfd and seals": _memfd,
        "ioctl": lambda: _ioctl(fds),
        "inet sockets": lambda: _inet(fds),
        "pidfd": _pidfd,
        "spawn": _spawn,
        "limits": lambda: _limits(most),
        "lock": _lock,
        "identify": lambda: _identify(client),
        "no namespaces": _forbidden(_unshare, errno.EPERM),  # before there are threads: EINVAL then
        "trio": _trio,
        "ctypes": _ctypes,
        "unprivileged": _unprivileged,
        "no devices": _forbidden(lambda: os.open(device, os.O_WRONLY), errno.EPERM),
        "no files": _forbidden(lambda: os.open(f"{folder}/file", os.O_WRONLY | os.O_CREAT), errno.EROFS),
        "no network": _forbidden(lambda: socket.socket(socket.AF_INET), errno.EAFNOSUPPORT),
        "no netlink": _forbidden(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW), errno.EAFNOSUPPORT),
        "no code": _forbidden(lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC), errno.EPERM),
        "no root": _forbidden(lambda: os.setuid(0), errno.EPERM),
    }
    said: dict[str, str] = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            said[name] = repr(error)
    return said
