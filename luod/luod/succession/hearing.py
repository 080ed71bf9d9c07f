"""What the old daemon hears of its successor, as events for `old_table`.

Theory. The successor's packets are read by one task from the beginning to the end of the queue, whatever the handover is doing meanwhile:
what a step waits for lies in order behind what it doesn't, and `let-go` is for others, who wait for it in the log.

Happy path: `listen` as a task; `next` for each step; `let_go` for each session that ends.

Unhappy paths:
1. A packet can't be understood, or isn't the successor's to send: told as `declined`, and read on, for a commit may lie behind it.
2. A packet can't be received for want of memory or descriptors: told once, and tried again. It isn't the end of the queue.
3. The end: `lost`.

Invariants: when `deaf` returns the queue was read to its end, or to `serving`: `has_heard_serving` won't change any more.
"""

from __future__ import annotations

import errno
import math
from typing import Final

import trio

from luod.succession.channel import Channel
from luod.succession.messages import Declined, Handover, LetGo, Meet, Serving, Verified
from luod.succession.old_table import OldEvent
from luod_protocol.errors import ProtocolFault
from luod_protocol.fds import close_all

HEAR_AGAIN_S: Final = 0.01
"""How long until what could not be received is received again, in seconds."""


class Hearing:
    """See the module's text.

    Args:
        channel: the socket to the successor; borrowed.

    Attributes:
        has_heard_serving: whether the successor has said that it serves.
    """

    def __init__(self, channel: Channel) -> None:
        self.has_heard_serving = False
        self._channel: Final = channel
        self._deaf: Final = trio.Event()
        self._waiting: Final[dict[bytes, trio.Event]] = {}
        self._post, self._events = trio.open_memory_channel[tuple[OldEvent, Handover | str]](math.inf)

    def tell(self, event: OldEvent, said: Handover | str) -> None:
        """An event, with what was said or why: behind those that are there."""
        self._post.send_nowait((event, said))

    async def next(self) -> tuple[OldEvent, Handover | str]:
        """The next event."""
        return await self._events.receive()

    async def deaf(self) -> None:
        """Return when all is read that counts."""
        await self._deaf.wait()

    def let_go(self, session_id: bytes) -> trio.Event:
        """Set when the successor says that it has let go of this session, or by `all_let_go`."""
        return self._waiting.setdefault(session_id, trio.Event())

    def all_let_go(self) -> None:
        """The successor is gone, and with it its copies."""
        for waiting in self._waiting.values():
            waiting.set()

    async def listen(self) -> None:
        """Turn what the successor sends into events, to the end of the queue, or of the channel here."""
        try:
            await self._listen_to_end()
        finally:
            self._deaf.set()

    async def _listen_to_end(self) -> None:
        is_told = False
        while True:
            try:
                received = await self._channel.receive()
            except ProtocolFault as error:
                # Read on: a commit may lie behind it.
                self.tell(OldEvent.DECLINED, f"the successor can't be understood: {error}")
                continue
            except trio.ClosedResourceError:
                return
            except OSError as error:
                if error.errno == errno.EBADF:
                    return  # closed: this attempt is over
                # It isn't the end of the queue.
                if not is_told:
                    self.tell(OldEvent.DECLINED, f"the successor can't be heard: {error.strerror}")
                    is_told = True
                await trio.sleep(HEAR_AGAIN_S)
                continue
            if received is None:
                self.tell(OldEvent.LOST, "the successor ended without taking over: see its messages on luod's stderr")
                return
            message, fds = received
            close_all(fds)
            match message:
                case LetGo():
                    waiting = self._waiting.pop(message.session_id, None)
                    if waiting is not None:
                        waiting.set()
                case Meet():
                    self.tell(OldEvent.ACCEPTED, message)
                case Verified():
                    self.tell(OldEvent.VERIFIED, message)
                case Serving():
                    self.has_heard_serving = True
                    self.tell(OldEvent.SERVING_READ, message)
                    return
                case Declined():
                    self.tell(OldEvent.DECLINED, f"the successor declined: {message.reason}")
                case _:
                    self.tell(OldEvent.DECLINED, f"the successor sent {message.type}, which is not its to send")
            # A successor that sends without end must not keep the clients waiting.
            await trio.lowlevel.checkpoint()
