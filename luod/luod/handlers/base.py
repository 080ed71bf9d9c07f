"""What a handler is: the one that knows one kind of fd.

Theory. A handler is asked three things about a borrowed fd. *Is it yours?* (`recognize`), decided by what the kernel says of it, never by
what a client claims. *What can be told about it?* (`record`), facts that go into the manifest. *Is it still the same?* (`verify`), on the
other side of a succession. Handlers have no state and change nothing; `luod.handlers` holds the table of them.

Happy path: `probe(fd)` once, `recognize` by one handler, `record`; later `probe` again and `verify`.

Unhappy paths:
1. No handler recognizes the fd: `luod.handlers.recognize` refuses it, with what it seems to be and what to do instead.
2. The fd isn't what was recorded: `Mismatch`.

Invariants: exactly one handler recognizes a fd; `verify(probe, record(probe))` never raises while the object stays as it is; contents may
change between the two (their owners are alive), what `record` says of the object's nature may not.
"""

from __future__ import annotations

import functools
import os
import stat
from typing import ClassVar, Protocol

from luod.manifest import Identity
from luod_protocol.errors import LuodError
from luod_protocol.records import Fact


class Mismatch(LuodError):
    """A fd isn't what its manifest says."""


class Probe:
    """A borrowed fd and what the kernel says of it, each asked once and only when needed."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.stat = os.fstat(fd)

    @property
    def type(self) -> int:
        """The file type bits of st_mode (inode(7))."""
        return stat.S_IFMT(self.stat.st_mode)

    @property
    def identity(self) -> Identity:
        """The kernel object."""
        return Identity(device=self.stat.st_dev, inode=self.stat.st_ino)

    @functools.cached_property
    def link(self) -> str:
        """Where /proc/self/fd/N points (proc(5)): `anon_inode:[eventfd]`, `pipe:[123]`, a path. Never a proof of identity."""
        return os.readlink(f"/proc/self/fd/{self.fd}")

    @functools.cached_property
    def info(self) -> dict[str, str]:
        """The lines of /proc/self/fdinfo/N (proc(5)); of keys that repeat, the first."""
        fields: dict[str, str] = {}
        with open(f"/proc/self/fdinfo/{self.fd}", encoding="ascii", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                fields.setdefault(key.strip(), value.strip())
        return fields


class Handler(Protocol):
    """One kind of fd."""

    kind: ClassVar[str]
    compatible: ClassVar[str]
    """Kind and version of what `record` writes, such as `memfd-v1`."""

    def recognize(self, probe: Probe) -> bool:
        """Whether the fd is of this kind."""
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
