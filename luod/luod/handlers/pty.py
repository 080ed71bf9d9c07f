"""Pseudoterminals (pty(7)), either end: masters (/dev/ptmx) and slaves (/dev/pts/N).

Told by the device number, which is fixed: 5:2 is a master, the major 136 has all slaves (devices.txt).

Preserved: the end with its terminal settings and what is in its buffers. While luod has a master, its slave sees no hang-up, and whoever
writes to the slave waits once about 20 kB are unread. While luod has a slave, its master sees no end.

What does not happen: luod opens no tty and writes to none, so none becomes its controlling terminal (that needs open(2) without O_NOCTTY
or TIOCSCTTY by a session leader), and receiving one isn't opening. Closing the last copy of a master sends SIGHUP to the slave's session,
as it always does; luod is in that session only when it was started there.

The client must set SIGWINCH's size again if its own terminal has another, and TIOCSCTTY if the slave was its controlling terminal.
"""

from __future__ import annotations

import os
import stat
from typing import ClassVar, Final

from luod.handlers.base import Mismatch, Probe
from luod_protocol.records import Fact

_PTMX: Final = os.makedev(5, 2)
_SLAVES: Final = 136
_UNSAID: Final = -1


class Pty:
    """Ends of pseudoterminals."""

    kind: ClassVar[str] = "pty"
    compatible: ClassVar[str] = "pty-v1"

    def recognize(self, probe: Probe) -> bool:
        """By the device number."""
        return probe.type == stat.S_IFCHR and _end(probe) != "" and probe.opened

    def record(self, probe: Probe) -> dict[str, Fact]:
        """Which end it is, and its number in its devpts (-1 when the kernel doesn't say)."""
        return {"end": _end(probe), "index": _index(probe)}

    def verify(self, probe: Probe, facts: dict[str, Fact]) -> None:
        """End and number are the same. A master that was hung up (TIOCVHANGUP) doesn't tell its number any more."""
        for fact, value in self.record(probe).items():
            if value not in (facts.get(fact), _UNSAID):
                raise Mismatch(f"the pty's {fact} is {value}, it was {facts.get(fact)}")


def _end(probe: Probe) -> str:
    number = probe.stat.st_rdev
    if number == _PTMX:
        return "master"
    return "slave" if os.major(number) == _SLAVES else ""


def _index(probe: Probe) -> int:
    if _end(probe) == "slave":
        return os.minor(probe.stat.st_rdev)
    return int(probe.info.get("tty-index", _UNSAID))
