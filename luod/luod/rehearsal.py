"""A rehearsal: a successor sends itself a few requests before it says that it is there.

The first pass through Python code is several times slower than the next ones (the interpreter specializes what it runs again, and pages are
touched for the first time). Without this the first client after a handover pays for it, in the pause.
"""

from __future__ import annotations

import socket
from typing import Final

import trio

from luod.server import Server
from luod.succession.messages import CODEC, Connection, Frozen, Serving
from luod.system import Process
from luod_protocol import messages as m
from luod_protocol import wire
from luod_protocol.connection import ClientConnection, State
from luod_protocol.messages import Endpoint
from luod_protocol.version import WIRE

ROUNDS: Final = 20
"""Enough for CPython 3.11 and later to have specialized what runs in each."""


async def rehearse(server: Server) -> None:
    """Talk to `server`, which is open, has no sessions, and is not used for anything else."""
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
