"""What a daemon does ahead of time, so that nobody has to wait for it later.

A successor does it before it says that it is there, while the old daemon serves; a rehearsal too: it sends itself a few requests. The
first pass through Python code is several times slower than the next ones (the interpreter specializes what it runs again, and pages are
touched for the first time). Without this the first client after a handover pays for it, in the pause.

The first of a line serves at once, since nobody else does, and does it meanwhile, a millisecond at a time. A handover that begins within
the first moments finds less of it done: its pause is longer, nothing else.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from typing import Final

import trio

from luod import manifest
from luod.server import Server
from luod.succession.messages import CODEC, Connection, Frozen, Serving
from luod.system import Process
from luod_protocol import messages as m
from luod_protocol import wire
from luod_protocol.codec import REPLIES, REQUESTS
from luod_protocol.connection import ClientConnection, State
from luod_protocol.messages import Endpoint
from luod_protocol.version import WIRE

ROUNDS: Final = 20
"""Enough for CPython 3.11 and later to have specialized what runs in each."""


def _preparations() -> Iterator[None]:
    yield from manifest.CODEC.prepare(encode=True, decode=True)
    yield from REQUESTS.prepare(decode=True)
    yield from REPLIES.prepare(encode=True)
    yield from CODEC.prepare(encode=True, decode=True)


async def prepare_meanwhile() -> None:
    """Do it while clients are served, which have their turn between any two steps. In the end the garbage collector has only what is new:
    a collection that walks the rest costs 20 ms, which a client would wait for."""
    for _ in _preparations():
        await trio.lowlevel.checkpoint()
    gc.collect()
    gc.freeze()


async def rehearse(server: Server) -> None:
    """Do it now, and talk to `server`, which is open, has no sessions, and is not used for anything else."""
    for _ in _preparations():
        pass
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.welcome(Endpoint.DESERIALIZE, ours)
    protocol = ClientConnection(Endpoint.DESERIALIZE)
    with trio.socket.from_stdlib_socket(theirs) as client:
        requests: list[m.Request] = [m.Hello(seq=protocol.next_seq(), low=WIRE.low, high=WIRE.high)]
        requests += [m.Status(seq=protocol.next_seq()) for _ in range(ROUNDS)]
        for request in requests:
            await wire.send_async(client, protocol.send(request, 0))
            packet = await wire.receive_async(client)
            if packet is not None:
                protocol.receive(packet.data, len(packet.fds))
    live = Connection(
        endpoint=Endpoint.SERIALIZE,
        version=WIRE.high,
        state=State.OPEN,
        client=Process(pid=1, start=1),
        session_id=b"",
        upgrade_seq=-1,
        lost=0,
    )
    for _ in range(ROUNDS):
        for message in (live, Frozen(since_us=0, connections=0, sessions=0, opaque=0, stored_others=()), Serving()):
            CODEC.decode(CODEC.encode(message))
