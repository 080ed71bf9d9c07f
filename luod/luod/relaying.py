"""The last thing that a luod does that systemd shuts down: what the kernel is to carry goes into the manager's store (`succession/relay`).

Theory. `systemctl kexec` tells luod nothing but SIGTERM. An update that is prepared shall go on all the same. Where none is, but a kernel
is loaded and there are sessions, the reason is most likely a kexec: it is prepared now, and whatever can't travel is left behind. Were it
another reason, only time is lost: the next luod finds itself on the same kernel and lets go of it all.

Unhappy paths:
1. Something can't be preserved or stored, or it takes longer than `RELAY_S`: all is undone. luod ends as ever, its sessions are in the
   store as boxes, and a kexec costs them.
2. The manager isn't systemd, or doesn't keep anything: nothing is done.

Invariants: what was stored is what is frozen; nobody is served between the freeze and the end.
"""

from __future__ import annotations

import logging
from typing import Final, Protocol

import trio

from luod.gate import Gate
from luod.notify import SYSTEMD, ManagerFault
from luod.succession.fdstore import NotKept
from luod.succession.keeping import Keeper
from luod.system import System
from luod.updates import Updates
from luod_protocol import messages as m
from luod_protocol.errors import Refusal

RELAY_S: Final = 120.0
"""How long all of it may take, in seconds. The manager is told to wait so long (EXTEND_TIMEOUT_USEC= of sd_notify(3))."""

log = logging.getLogger("luod")


class Host(Protocol):
    """What is needed of the server."""

    gate: Gate
    updates: Updates
    system: System

    @property
    def keeper(self) -> Keeper | None: ...

    async def tell_manager(self, *fields: str) -> None: ...


async def relay(host: Host) -> bool:
    """Have systemd hold what the kernel is to carry, if there is anything. Returns whether it does."""
    keeper = host.keeper
    if keeper is None or keeper.gone or keeper.fault or keeper.manager.info.name != SYSTEMD:
        return False
    if not host.updates.is_to_travel(kexec_loaded=host.system.kexec_loaded()):
        return False
    await host.tell_manager(f"EXTEND_TIMEOUT_USEC={int(RELAY_S * 1e6)}")
    try:
        with trio.fail_after(RELAY_S):
            kept = await host.updates.end()
            await keeper.relay([each.fileno() for each in kept], host.system.boot_id)
    except trio.TooSlowError:
        why = f"it took longer than {RELAY_S:g} s"
    except (Refusal, NotKept, ManagerFault) as error:
        why = str(error)
    else:
        status = host.updates.status(0)
        log.info("%d sessions are with systemd, for the next kernel", status.carried)
        for text in status.left_behind:
            log.warning("%s is left behind: it ends with this kernel", text)
        return True
    log.error("a kexec will cost the sessions that luod has: %s", why)
    if host.updates.is_running:
        await host.updates.cancel(m.CancelUpdate(seq=0, reason=why))
    host.gate.open()
    return False
