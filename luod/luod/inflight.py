"""What was sent over a unix socket and not received yet.

fds in flight: how many there may be is counted for a uid, so others of luod's uid can use it up (unix(7), ETOOMANYREFS). Then a send is
tried again for a while: whoever receives takes them out of the count.
"""

from __future__ import annotations

import errno
import fcntl
import sys
import termios
import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio

AGAIN_S: Final = 2.0
"""How long it is tried, in seconds: less than what a freeze gives a request (`handover.freeze_s`)."""

PAUSE_S: Final = 0.005
"""How long between two tries, in seconds: no event tells."""


def outstanding(sock: int) -> int:
    """How much that was sent on a socket (borrowed) nobody has received, in bytes of memory: SIOCOUTQ of unix(7), which is TIOCOUTQ."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


async def insist(send: Callable[[], Awaitable[object]]) -> None:
    """`await send()`, again and again while the count is used up.

    Raises:
        OSError: as `send`; ETOOMANYREFS after `AGAIN_S`.
    """
    deadline = time.monotonic() + AGAIN_S
    while True:
        try:
            await send()
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS or time.monotonic() > deadline:
                raise
            await trio.sleep(PAUSE_S)
        else:
            return
