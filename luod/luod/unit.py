"""What systemd says of luod's own unit: whether it keeps the unit's store of descriptors over a stop, and so over a soft-reboot.

The store of a unit with FileDescriptorStorePreserve=yes goes through `systemctl soft-reboot` (systemd.service(5), systemd-soft-reboot(8)).
luod can't see that setting in its environment. PID 1 tells it over Varlink, to everybody, in newer releases (seen with 262).

Unhappy paths:
1. PID 1 has no such socket, is slow, or tells less: it isn't known, and luod promises nothing.
"""

from __future__ import annotations

import json
import socket
from typing import Final

import trio

ADDRESS: Final = "/run/systemd/io.systemd.Manager"
PATIENCE_S: Final = 5.0
"""How long PID 1 is waited for, in seconds. It answers when it is done with what it does."""
MAX_BYTES: Final = 1024 * 1024
"""Of an answer; some 8 KB are usual."""


def name(cgroups: str) -> str:
    """The unit that a process is in, by its cgroups(7) as /proc tells them; empty when it is in none that is a service."""
    _, _, path = cgroups.strip().rpartition("::")
    last = path.rpartition("/")[2]
    return last if last.endswith(".service") else ""


async def keeps_store(unit: str, *, address: str = ADDRESS) -> bool | None:
    """Whether systemd keeps the store of the unit called `unit` over a stop; None where it can't be known."""
    request = {"method": "io.systemd.Unit.List", "parameters": {"name": unit}}
    with trio.move_on_after(PATIENCE_S), trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            await sock.connect(address)
            await trio.SocketStream(sock).send_all(json.dumps(request).encode() + b"\0")
            answer = b""
            while not answer.endswith(b"\0") and len(answer) < MAX_BYTES:
                part = await sock.recv(65536)
                if not part:
                    return None
                answer += part
            found = json.loads(answer.rstrip(b"\0"))["parameters"]["context"]["Service"]["FileDescriptorStorePreserve"]
        except (OSError, trio.BrokenResourceError, ValueError, KeyError, TypeError):
            return None
        return bool(found == "yes")
    return None
