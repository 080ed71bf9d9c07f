"""What systemd tells luod over Varlink: whether it keeps the store of luod's unit over a stop, its release, and whether it shuts down.

The store of a unit with FileDescriptorStorePreserve=yes goes through `systemctl soft-reboot` (systemd.service(5), systemd-soft-reboot(8)),
and what the kernel preserves goes with it through `systemctl kexec` from `FIRST` on. luod can't see that setting in its environment, nor
why it is stopped. PID 1 tells both to everybody, in newer releases (seen with 262).

Unhappy paths:
1. PID 1 has no such socket, is slow, or tells less: it isn't known, and luod promises nothing.
"""

from __future__ import annotations

import json
import re
import socket
from typing import Any, Final

import attrs
import trio

ADDRESS: Final = "/run/systemd/io.systemd.Manager"
FIRST: Final = 261
"""The first release that carries sessions of the kernel which lie in a store."""
PATIENCE_S: Final = 5.0
"""How long PID 1 is waited for, in seconds. It answers when it is done with what it does."""
MAX_BYTES: Final = 1024 * 1024
"""Of an answer; some 8 KB are usual."""


@attrs.frozen(kw_only=True)
class PidOne:
    """The systemd that runs: its release, and whether it stops everything."""

    release: int
    is_stopping: bool


def name(cgroups: str) -> str:
    """The unit that a process is in, by its cgroups(7) as /proc tells them; empty when it is in none that is a service."""
    _, _, path = cgroups.strip().rpartition("::")
    last = path.rpartition("/")[2]
    return last if last.endswith(".service") else ""


async def keeps_store(unit: str, *, address: str = ADDRESS) -> bool | None:
    """Whether systemd keeps the store of the unit called `unit` over a stop; None where it can't be known."""
    answer = await _call("io.systemd.Unit.List", {"name": unit}, address)
    try:
        return bool(answer["context"]["Service"]["FileDescriptorStorePreserve"] == "yes")
    except (KeyError, TypeError):
        return None


async def pid_one(*, address: str = ADDRESS) -> PidOne | None:
    """The systemd that runs; None where it doesn't say."""
    answer = await _call("io.systemd.Manager.Describe", {}, address)
    try:
        version, state = answer["runtime"]["Version"], answer["runtime"]["SystemState"]
        release = re.match(r"\d+", version)
    except (KeyError, TypeError):
        return None
    return PidOne(release=int(release[0]) if release else 0, is_stopping=state == "stopping")


async def _call(method: str, parameters: dict[str, str], address: str) -> Any:
    """The parameters of the answer; None when there is none."""
    with trio.move_on_after(PATIENCE_S), trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            await sock.connect(address)
            await trio.SocketStream(sock).send_all(json.dumps({"method": method, "parameters": parameters}).encode() + b"\0")
            answer = b""
            while not answer.endswith(b"\0") and len(answer) < MAX_BYTES:
                part = await sock.recv(65536)
                if not part:
                    return None
                answer += part
            return json.loads(answer.rstrip(b"\0"))["parameters"]
        except (OSError, trio.BrokenResourceError, ValueError, KeyError, TypeError):
            return None
    return None
