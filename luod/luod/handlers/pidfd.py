"""pidfds (pidfd_open(2)).

Since Linux 6.9 each process has an inode of its own for them, on a file system of their own (fs/pidfs.c), so the identity of an entry tells
the process. File type (none) and name are still those of an anonymous inode.

Preserved: which process it is, for ever; its pid is never reused for it. The client must know that only a parent can wait(2), and that a
new process isn't the parent. It holds nobody alive. A pidfd of luod itself goes through an upgrade, and then is one of a process that is
gone.
"""

from __future__ import annotations

from typing import ClassVar, Final

from luod.handlers.anonymous import Anonymous, Told, number
from luod.handlers.base import Mismatch, Probe
from luod_protocol.records import Fact

_NOT_SEEN: Final = (-1, 0)
"""What fdinfo says of a process that was waited for, and of one outside luod's pid namespace."""


class Pidfd(Anonymous):
    """pidfds. Told: the pid in luod's pid namespace; 0 when it isn't there, -1 when the process is gone."""

    kind: ClassVar[str] = "pidfd"
    compatible: ClassVar[str] = "pidfd-v1"
    inode: ClassVar[str] = "[pidfd]"
    told: ClassVar[dict[str, Told]] = {"pid": Told("Pid", number, -1, fixed=False)}

    def verify(self, probe: Probe, facts: dict[str, Fact]) -> None:
        """It is the same process, or one that is not seen any more."""
        pid = self.record(probe)["pid"]
        if pid not in (facts.get("pid"), *_NOT_SEEN):
            raise Mismatch(f"the pidfd's process is {pid}, it was {facts.get('pid')}")
