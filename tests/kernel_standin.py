"""A kernel with a Live Update Orchestrator, for tests: real fds, the kernel's rules, a record of the calls, and faults on demand.

The rules are those of Linux 7.3: memfds only (a later one may have `learned` more), each once; a session ends with its fd; what was
retrieved counts as preserved until it is finished. A memfd comes back as another one, open for reading and writing, with the position,
size, contents and seals it had.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

import attrs

from luod.succession.liveupdate import MAX_FILES, LiveUpdateFault
from luod_protocol.fds import OwnedFd, duplicate
from luod_protocol.sealed import memfd_device

SEALABLE: Final = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING


@attrs.define(kw_only=True, eq=False)
class KernelStandin:
    """`opening` opens its device. `calls` has what was done; `fault(call)` may raise what the kernel shall answer.

    `learned` has what it carries besides, as links in /proc/self/fd begin: `anon_inode:[eventfd]`. `refuses` has what a kernel says of a fd
    of which it knows the kind: errno(3) by such a beginning.

    `boot` counts kernels, `outgoing` are the sessions for the next kernel, `incoming` those from the last.
    """

    calls: list[str] = attrs.Factory(list[str])
    fault: Callable[[str], None] = lambda _: None
    outgoing: dict[str, SessionStandin] = attrs.Factory(dict[str, "SessionStandin"])
    incoming: dict[str, SessionStandin] = attrs.Factory(dict[str, "SessionStandin"])
    learned: tuple[str, ...] = ()
    refuses: Mapping[str, int] = attrs.Factory(dict[str, int])
    boot: int = 1
    is_there: bool = True
    is_open: bool = False

    def opening(self, *, patience_s: float) -> DeviceStandin:
        """As `Device.open`."""
        self.note("open")
        if not self.is_there:
            raise LiveUpdateFault("there is no /dev/liveupdate", errno.ENOENT)
        if self.is_open:
            raise LiveUpdateFault(f"/dev/liveupdate has been in use by another process for {patience_s:g} s", errno.EBUSY)
        self.is_open = True
        return DeviceStandin(self)

    def note(self, call: str) -> None:
        """Something is about to be done."""
        self.calls.append(call)
        self.fault(call)

    def preserved(self) -> set[tuple[int, int]]:
        """Which files are."""
        sessions = [*self.outgoing.values(), *self.incoming.values()]
        return {_key(fd) for session in sessions for fd in session.files.values()}

    def kexec(self) -> KernelStandin:
        """The next kernel, with what was preserved; this one is gone."""
        following = KernelStandin(boot=self.boot + 1, learned=self.learned)
        for name, session in list(self.outgoing.items()):
            copies = {token: _copied(fd) for token, fd in session.files.items()}
            following.incoming[name] = SessionStandin(kernel=following, name=name, files=copies, came=True)
        self.close()
        return following

    def close(self) -> None:
        """Let go of everything."""
        for session in [*self.outgoing.values(), *self.incoming.values()]:
            session.drop()


class DeviceStandin:
    """The device, open."""

    def __init__(self, kernel: KernelStandin) -> None:
        self._kernel = kernel

    def create(self, name: str) -> SessionStandin:
        self._kernel.note(f"create {name}")
        if name in self._kernel.outgoing:
            raise LiveUpdateFault(f"{name}: a kernel session of this name exists already", errno.EEXIST)
        session = self._kernel.outgoing[name] = SessionStandin(kernel=self._kernel, name=name)
        return session

    def retrieve(self, name: str) -> SessionStandin:
        self._kernel.note(f"retrieve {name}")
        session = self._kernel.incoming.get(name)
        if session is None:
            raise LiveUpdateFault(f"{name}: the last kernel left no kernel session of this name", errno.ENOENT)
        if session.retrieved:
            raise LiveUpdateFault(f"{name}: it was retrieved already", errno.EINVAL)
        session.retrieved = True
        return session

    def close(self) -> None:
        self._kernel.is_open = False


@attrs.define(kw_only=True, eq=False)
class SessionStandin:
    """A kernel session."""

    kernel: KernelStandin
    name: str
    files: dict[int, OwnedFd] = attrs.Factory(dict[int, OwnedFd])
    came: bool = False
    retrieved: bool = False
    marker: OwnedFd = attrs.Factory(lambda: OwnedFd(os.memfd_create("kernel session", os.MFD_CLOEXEC)))
    """Stands in for its fd."""

    def preserve(self, fd: int, token: int) -> None:
        self.kernel.note(f"preserve {self.name} {token}")
        status = os.fstat(fd)
        link = os.readlink(f"/proc/self/fd/{fd}")
        for beginning, number in self.kernel.refuses.items():
            if link.startswith(beginning):
                raise LiveUpdateFault(f"{self.name}, token {token}: not this one", number, "not this one")
        is_memfd = stat.S_ISREG(status.st_mode) and status.st_dev == memfd_device()
        if not is_memfd and not link.startswith(self.kernel.learned):
            why = "this kernel can't carry fds of this kind"
            raise LiveUpdateFault(f"{self.name}, token {token}: {why}", errno.ENOENT, why)
        if is_memfd and (status.st_dev, status.st_ino) in self.kernel.preserved():
            raise LiveUpdateFault(f"{self.name}, token {token}: a kernel session has it already", errno.EBUSY)
        if token in self.files:
            raise LiveUpdateFault(f"{self.name}, token {token}: this token is used already", errno.EEXIST)
        if len(self.files) == MAX_FILES:
            raise LiveUpdateFault(f"{self.name}: full", errno.ENOSPC)
        self.files[token] = duplicate(fd)

    def retrieve(self, token: int) -> OwnedFd:
        self.kernel.note(f"retrieve {self.name} {token}")
        if token not in self.files:
            raise LiveUpdateFault(f"{self.name}: this kernel session has no such token", errno.ENOENT)
        return duplicate(self.files[token].fileno())

    def fileno(self) -> int:
        return self.marker.fileno()

    def finish(self) -> None:
        self.kernel.note(f"finish {self.name}")
        self.drop()

    def close(self) -> None:
        self.kernel.note(f"close {self.name}")
        self.drop()

    def drop(self) -> None:
        """Let go of its files."""
        for fd in self.files.values():
            fd.close()
        self.marker.close()
        self.files = {}
        with suppress(KeyError):
            del (self.kernel.incoming if self.came else self.kernel.outgoing)[self.name]


def _key(fd: OwnedFd) -> tuple[int, int]:
    status = os.fstat(fd.fileno())
    return status.st_dev, status.st_ino


def _copied(fd: OwnedFd) -> OwnedFd:
    if not stat.S_ISREG(os.fstat(fd.fileno()).st_mode):
        return duplicate(fd.fileno())
    copy = OwnedFd(os.memfd_create("", SEALABLE))
    size = os.fstat(fd.fileno()).st_size
    with OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", os.O_RDONLY | os.O_CLOEXEC)) as readable:
        os.write(copy.fileno(), os.pread(readable.fileno(), size, 0))
    os.lseek(copy.fileno(), os.lseek(fd.fileno(), 0, os.SEEK_CUR), os.SEEK_SET)
    fcntl.fcntl(copy.fileno(), fcntl.F_ADD_SEALS, fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS))
    return copy
