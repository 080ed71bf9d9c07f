"""What a handler is: the one that knows one kind of fd.

Theory. A handler is asked three things about a borrowed fd. *Is it yours?* (`recognize`), decided by what the kernel says of it, never by
what a client claims. *What can be told about it?* (`record`), facts that go into the manifest. *Is it still the same?* (`verify`), on the
other side of a succession. Handlers have no state and change nothing; `luod.handlers` holds the table of them.

Happy path: `probe(fd)` once, `recognize` by one handler, `record`; later `probe` again and `verify`.

Unhappy paths:
1. No handler recognizes the fd: `luod.handlers.recognize` refuses it, with what it seems to be and what to do instead.
2. The fd isn't what was recorded: `Mismatch`.

Invariants: exactly one handler recognizes a fd; `verify(probe, record(probe))` never raises while the object stays as it is; contents may
change between the two (their owners are alive), what `record` says of the object's nature may not. `recognize` and `verify` check nothing
that whoever has a copy of the fd can change: a client could stop an upgrade with it. No question to the kernel waits for another process;
`luod.handlers.kernel` has those that do. Nothing is read from, written to, or ended by looking: a tty, a queue, a device stays as it is.
All that a handler asks goes through the `Probe`, except of sockets and memfds; so a recorded one tells a handler what a fd did.
"""

from __future__ import annotations

import fcntl
import functools
import os
import stat
from collections.abc import Mapping
from typing import ClassVar, Final, Protocol

from luod.handlers import devices
from luod.handlers.kernel import printable, stat_of
from luod.manifest import Identity
from luod_protocol.errors import LuodError
from luod_protocol.fds import OwnedFd
from luod_protocol.records import Fact

_ACCESS: Final[Mapping[int, str]] = {os.O_RDONLY: "r", os.O_WRONLY: "w", os.O_RDWR: "rw", os.O_ACCMODE: "none"}
"""The last is for open(2) with neither; the kernel gives such a fd."""


class Mismatch(LuodError):
    """A fd isn't what its manifest says."""


class Probe:
    """A borrowed fd and what the kernel says of it, each asked once and only when needed."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.stat = stat_of(fd)

    @property
    def type(self) -> int:
        """The file type bits of st_mode (inode(7))."""
        return stat.S_IFMT(self.stat.st_mode)

    @property
    def identity(self) -> Identity:
        """The kernel object; of a device its number, for the server of a FUSE mount can change the inode number of a file that is open."""
        return Identity(device=self.stat.st_dev, inode=self.stat.st_rdev if self.type == stat.S_IFCHR else self.stat.st_ino)

    @functools.cached_property
    def flags(self) -> int:
        """The file status flags, F_GETFL of fcntl(2)."""
        return fcntl.fcntl(self.fd, fcntl.F_GETFL)

    @property
    def access(self) -> str:
        """What it is open for: r, w, rw or none."""
        return _ACCESS[self.flags & os.O_ACCMODE]

    @property
    def opened(self) -> bool:
        """Whether it refers to an open file, and not only to a place (O_PATH of open(2)): most calls answer EBADF for such a fd."""
        return not self.flags & os.O_PATH

    @functools.cached_property
    def link(self) -> str:
        """Where /proc/self/fd/N points (proc(5)): `anon_inode:[eventfd]`, `pipe:[123]`, a path. Never a proof of identity.

        Empty when it can't be read: the path is longer than a page, or there is no /proc.
        """
        try:
            return printable(os.readlink(b"/proc/self/fd/%d" % self.fd))
        except OSError:
            return ""

    @functools.cached_property
    def info(self) -> dict[str, str]:
        """The lines of /proc/self/fdinfo/N (proc(5)), of its first page; of keys that repeat, the first.

        Only for kinds that fill less than a page without waiting for anybody. Not for an inotify or an epoll (a line for each watch, and
        the kernel writes all of them at once), a tun, or a BPF link (both wait for the lock of all network configuration).
        """
        # Not `open`, which takes twice the time.
        with OwnedFd(os.open(f"/proc/self/fdinfo/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)) as file:
            text = os.read(file.fileno(), 4096)
        return fields_of(text)

    @functools.cached_property
    def driver(self) -> str:
        """Whose device it is, see `luod.handlers.devices.driver`; empty for everything but an open character device."""
        return devices.driver(self.stat.st_rdev) if self.type == stat.S_IFCHR and self.opened else ""

    @functools.cached_property
    def sysfs(self) -> str:
        """Where the device is in /sys/devices, for people, see `luod.handlers.devices.sysfs`. Never a proof of anything."""
        return devices.sysfs(self.stat.st_rdev)


def fields_of(info: bytes) -> dict[str, str]:
    """The lines of a fdinfo: key to value."""
    fields: dict[str, str] = {}
    for line in info.decode("ascii", "backslashreplace").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


class Handler(Protocol):
    """One kind of fd."""

    kind: ClassVar[str]
    compatible: ClassVar[str]
    """Kind and version of what `record` writes, such as `memfd-v1`."""

    def recognize(self, probe: Probe) -> bool:
        """Whether the fd is an open file of this kind."""
        ...

    def record(self, probe: Probe) -> dict[str, Fact]:
        """What can be told about the fd, for people and for `verify`."""
        ...

    def verify(self, probe: Probe, facts: dict[str, Fact]) -> None:
        """Check a recognized fd against what was recorded of it.

        Raises:
            Mismatch: it isn't the same.
        """
        ...
