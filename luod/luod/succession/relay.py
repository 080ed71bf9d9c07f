"""The kernel's sessions on their way through the service manager: how a luod that is shut down for a kexec hands them on.

Theory. A kernel session goes to the next kernel only while somebody has it open. `luoctl kexec run --now` reboots with luod alive; but
`systemctl kexec` stops luod first. systemd 261 and later carry kernel sessions that lie in the store of a unit (with
FileDescriptorStorePreserve=yes) through the kexec, by name; PID 1 of the next kernel retrieves them and passes them on in LISTEN_FDS. It
can't carry boxes, which are sockets: it says so for each, and they end. So a luod that is told to stop puts the kernel sessions beside
the boxes. Whichever way it goes, one of both is there.

Happy path: `name` for each, 0 for the index, the others as the index has them; in the next kernel `sort` finds them.

Unhappy paths:
1. The reboot does not happen, or is a soft-reboot: the next luod, on the same kernel, finds boxes and kernel sessions. It lets go of the
   latter (`of_this_boot`), which unpreserves all, and serves from the boxes.
2. A luod of the next kernel crashes before the boxes that it makes are in the store: the kernel sessions are still there. They are
   removed when all boxes are. So are those that luod had to retrieve itself, no manager having brought them: it stores them first, as
   those of a `FORMER` boot.
3. Kernel sessions of two other boots: those of the index are taken, others are of no use.

Invariants: a name tells of which boot its kernel session is. Asking the session would not do: retrieving from one that goes to the next
kernel is not for this one.

Sources: src/core/luo.c, src/shared/luo-util.c and src/shutdown/shutdown.c of systemd 262; test/units/TEST-91-LIVEUPDATE.sh there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import attrs

from luod_protocol.fds import OwnedFd

BOOT_LENGTH: Final = 12
"""Hex digits of a boot's id that are in a name: enough to tell boots apart, and the names of all that a kernel takes fit (`fdstore`)."""

FORMER: Final = "0" * BOOT_LENGTH
"""In place of a boot's id: of a kernel before this one, which one isn't known."""

_NAME: Final = re.compile(rf"k([0-9a-f]{{{BOOT_LENGTH}}})\.(\d{{1,4}})")


@attrs.frozen(kw_only=True)
class Relayed:
    """What was stored, sorted. All fds are owned.

    Attributes:
        others: names and fds that are no kernel sessions.
        came: kernel sessions from another kernel, by number: 0 is the index.
        names: what these are called in the store.
        of_this_boot: names of kernel sessions for a reboot that did not happen, which are to be removed. Closed here.
    """

    others: list[tuple[str, OwnedFd]]
    came: dict[int, OwnedFd]
    names: list[str]
    of_this_boot: list[str]


def name(boot_id: str, number: int) -> str:
    """What the manager calls kernel session `number` of those that a luod of the boot `boot_id` hands on."""
    return f"k{_short(boot_id)}.{number}"


def sort(stored: Iterable[tuple[str, OwnedFd]], boot_id: str) -> Relayed:
    """Sort what the manager passed on: names and fds, which are owned and moved."""
    relayed = Relayed(others=[], came={}, names=[], of_this_boot=[])
    foreign: dict[str, dict[int, tuple[str, OwnedFd]]] = {}
    for stored_name, fd in stored:
        found = _NAME.fullmatch(stored_name)
        if found is None:
            relayed.others.append((stored_name, fd))
        elif found[1] == _short(boot_id):
            fd.close()
            relayed.of_this_boot.append(stored_name)
        else:
            of_boot = foreign.setdefault(found[1], {})
            if int(found[2]) in of_boot:
                fd.close()
            else:
                of_boot[int(found[2])] = (stored_name, fd)
    whole = max(foreign, key=lambda boot: 0 in foreign[boot], default="")
    for boot, sessions in foreign.items():
        for number, (stored_name, fd) in sessions.items():
            relayed.names.append(stored_name)
            if boot == whole:
                relayed.came[number] = fd
            else:
                fd.close()
    return relayed


def _short(boot_id: str) -> str:
    return boot_id.replace("-", "")[:BOOT_LENGTH]
