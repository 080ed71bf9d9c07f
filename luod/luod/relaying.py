"""The last thing that a luod does that systemd shuts down: what the kernel is to carry goes into the manager's store (`succession/relay`).

Theory. `systemctl kexec` tells luod nothing but SIGTERM. An update that is prepared shall go on all the same. Where none is, but systemd
shuts down (it says so), a kernel is loaded and there are sessions, the reason is most likely a kexec: it is prepared now, and whatever
can't travel is left behind. Were it another reboot, only time is lost.

Unhappy paths:
1. Something can't be preserved or stored, or it takes longer than `RELAY_S`: all is undone. luod ends as ever, its sessions are in the
   store as boxes, and a kexec costs them.
2. The manager isn't systemd, or an older one, or doesn't keep anything: nothing is done. An update that was prepared ends with luod, which
   says what would have done.

Invariants: what was stored is what is frozen; nobody is served between the freeze and the end.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import trio

from luod.gate import Gate
from luod.managing import Managing
from luod.notify import SYSTEMD, ManagerFault
from luod.succession.fdstore import NotKept
from luod.succession.keeping import Keeper
from luod.system import System
from luod.unit import FIRST, PidOne, pid_one
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
    managing: Managing


async def relay(host: Host, ask: Callable[[], Awaitable[PidOne | None]] = pid_one) -> bool:
    """Have systemd hold what the kernel is to carry, if there is anything. Returns whether it does.

    Args:
        host: the server.
        ask: asks for the systemd that runs.
    """
    keeper, is_prepared = host.managing.keeper, host.updates.is_prepared
    is_systemd = keeper is not None and keeper.manager.info.name == SYSTEMD
    systemd = await ask() if is_systemd and (is_prepared or host.system.kexec_loaded()) else None
    if not is_prepared and not (systemd is not None and systemd.is_stopping and host.updates.has_what_travels):
        return False
    why = _why_not(keeper, systemd)
    if keeper is None or why:
        log.error("a kexec will cost the sessions that luod has: %s. `luoctl kexec run --now` goes to another kernel with luod alive", why)
        return False
    await host.managing.tell(f"EXTEND_TIMEOUT_USEC={int(RELAY_S * 1e6)}")
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


def _why_not(keeper: Keeper | None, systemd: PidOne | None) -> str:
    if keeper is None or keeper.manager.info.name != SYSTEMD:
        return "luod does not run as a service of systemd, which would carry them on"
    if systemd is None or systemd.release < FIRST:
        return f"this systemd is older than {FIRST}, the first that carries what the kernel preserves"
    return keeper.fault
