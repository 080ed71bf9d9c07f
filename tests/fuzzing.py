"""What takes bytes that others made, as targets for a fuzzer: each takes any bytes, and raises nothing but what it says it raises.

`make fuzz` runs one after the other under atheris (coverage-guided); tests/unit/test_fuzzing.py runs them in `make test`, with random bytes
and with what was found.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import attrs

from kernel_standin import KernelStandin
from luod import manifest
from luod.capacity import Capacity
from luod.custody import Client, Custody, Pending, Working
from luod.handlers import kinds
from luod.handlers.recognizer import Recognizer
from luod.manifest import ForeignManifest, ManifestFault
from luod.orchestrator import Orchestrator
from luod.policy import Peer, Policy
from luod.quota import Share
from luod.succession import ledger, messages
from luod.succession.carriable import Carriable
from luod.succession.ledger import LedgerFault
from luod.supervisor import message
from luod.system import Process, System
from luod_protocol import box, wire
from luod_protocol import messages as m
from luod_protocol.box import BoxFault
from luod_protocol.codec import REPLIES, REQUESTS, bulk_size, pack
from luod_protocol.connection import ServerConnection, agree
from luod_protocol.errors import Code, ProtocolFault, Refusal
from luod_protocol.fds import OwnedFd, close_all, own
from luod_protocol.limits import MAX_PACKET_BYTES
from luod_protocol.messages import Endpoint

SECONDS: Final = 60
"""How long each target is run by hand, unless said otherwise."""


def codec(data: bytes) -> None:
    """Messages of the wire and of a handover."""
    for each in (REQUESTS, REPLIES, messages.CODEC):
        with suppress(ProtocolFault):
            each.decode(data)
    with suppress(ProtocolFault):
        bulk_size(data)


def connection(data: bytes) -> None:
    """A conversation: packets of the length that the byte before each says."""
    server = ServerConnection(Endpoint.SERIALIZE)
    with suppress(ProtocolFault):
        while data:
            packet, data = data[1 : 1 + data[0]], data[1 + data[0] :]
            request = server.receive(packet, 0)
            with suppress(Refusal):
                server.begin(request)
                server.send(m.Welcome(**_WELCOME) if isinstance(request, m.Hello) else m.Cancelled(seq=request.seq))


def packet(data: bytes) -> None:
    """A packet with one fd: a memfd that isn't what bulk needs, or is."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, OwnedFd(os.memfd_create("fuzz", os.MFD_CLOEXEC)) as memfd:
        os.write(memfd.fileno(), data)
        theirs.sendmsg([data[:MAX_PACKET_BYTES]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, memfd.fileno().to_bytes(4, sys.byteorder))])
        with suppress(ProtocolFault):
            received = wire.receive(ours)
            if received is not None:
                received.close()


def a_manifest(data: bytes) -> None:
    """What a box says of its session."""
    with suppress(ManifestFault, ForeignManifest):
        manifest.decode(data)


def a_box(data: bytes) -> None:
    """A box's one packet, with two fds."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        read, write = own(os.pipe2(os.O_CLOEXEC))
        with read, write:
            socket.send_fds(theirs, [data[:MAX_PACKET_BYTES]], [read.fileno(), write.fileno()])
        with suppress(BoxFault):
            box.manifest_of(ours.fileno())
        with suppress(BoxFault):
            close_all(box.look(ours.fileno()))


def a_ledger(data: bytes) -> None:
    """What a dead luod left of its ledger."""
    with OwnedFd(os.memfd_create("fuzz", os.MFD_CLOEXEC)) as memfd:
        os.write(memfd.fileno(), data)
        with suppress(LedgerFault):
            ledger.read(memfd.fileno())


def daemon(data: bytes) -> None:
    """Three clients of a luod, one at each endpoint, without sockets: what is said is done. Before each packet there is whose it is, how
    many fds come with it, and whether what it waits for is done; then its length."""
    before = len(os.listdir("/proc/self/fd"))
    custody = Custody(
        system=System(boot_id="", uid=1),
        capacity=_CAPACITY,
        policy=Policy(),
        generation=1,
        publish=lambda event, session, detail: None,
        carriable=Carriable(KernelStandin(is_there=False).opening),
    )
    orchestrator = Orchestrator(custody, Recognizer(kinds=kinds(), files=()))
    clients = [(ServerConnection(each), Client(peer=Peer(uid=0), process=Process(pid=1, start=1))) for each in Endpoint]
    while len(data) > 1:
        how, size = data[0], data[1]
        packet, data = data[2 : 2 + size], data[2 + size :]
        line, client = clients[(how & 3) % 3]
        fds = [OwnedFd(os.eventfd(0, os.EFD_CLOEXEC)) for _ in range(how >> 2 & 3)]
        try:
            with suppress(ProtocolFault):
                request = line.receive(packet, len(fds))
                with suppress(Refusal):
                    line.begin(request)
                    line.send(_answer(orchestrator, client, request, fds, act=not how & 0x80))
        finally:
            close_all(fds)
    for _, client in clients:
        custody.lost(client).now()
    close_all(fd for session in custody.store for fd in session.take_fds())
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors have leaked"


def _answer(orchestrator: Orchestrator, client: Client, request: m.Request, fds: list[OwnedFd], *, act: bool) -> m.Reply:
    match request:
        case m.Hello():
            return attrs.evolve(m.Welcome(**_WELCOME), seq=request.seq, version=agree(request))
        case m.Monitor():
            return m.Monitoring(seq=request.seq)
        case m.Status() | m.Update() | m.Preflight() | m.Prepare() | m.Freeze() | m.CancelUpdate() | m.Upgrade() | m.Takeover():
            raise Refusal(Code.SYSTEM_ERROR, "not here")
        case _:
            outcome = orchestrator.handle(client, request, fds)
    while isinstance(outcome, Pending):
        pending = outcome
        try:
            if not act:
                raise Refusal(Code.SYSTEM_ERROR, "what it waits for is refused")
            if isinstance(pending.waits_for, Working):
                pending.waits_for.work()
            outcome = pending.act("")
        except Refusal:
            pending.undo()
            raise
    close_all([*outcome.closing.fds, *outcome.fds])
    return outcome.reply


def notification(data: bytes) -> None:
    """What is said to `luod --supervised`."""
    message.parse(data)


TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {
    each.__name__: each for each in (codec, connection, packet, a_manifest, a_box, a_ledger, daemon, notification)
}

_WELCOME: Final[dict[str, Any]] = {
    "seq": 1,
    "version": 1,
    "luod": "x",
    "generation": 1,
    "limits": m.Limits(**{field.name: 1 for field in attrs.fields(m.Limits)}),
}

_CAPACITY: Final = Capacity(
    sessions=3,
    connections=9,
    staged_fds=6,
    preserved_fds=9,
    closing_fds=9,
    share=Share(sessions=2, connections=9, preserved_fds=6, staged_fds=4, metadata_bytes=900),
)


def _said(client: int, fds: int, **message: Any) -> bytes:
    packet = pack({"seq": 1, **message})
    return bytes([client | fds << 2, len(packet)]) + packet


_ID: Final = bytes(16)
_HELLOS: Final = b"".join(_said(client, 0, type="hello", low=1, high=1) for client in range(3))
_FINALIZED: Final = (
    _HELLOS
    + _said(0, 0, type="open", session="a", session_id=_ID)
    + _said(0, 2, type="preserve", entries=[{"name": "b"}, {"name": "c", "needs": ["b"]}])
    + _said(0, 0, type="finalize", session_id=_ID)
)

SEEDS: Final[tuple[bytes, ...]] = (
    b"",
    pack({"type": "hello", "seq": 1, "low": 1, "high": 1}),
    pack({"type": "preserve", "seq": 3, "entries": [{"name": "a", "metadata": b"x", "needs": ["b"]}]}),
    pack({"type": "finalize", "seq": 5, "session_id": bytes(16), "require": [], "seal": {"a": ["write"]}}),
    pack({"type": "bulk", "size": 100}),
    b"luodbox1\0\0\0\0\2\0\0\0\0\0\0\0\0\0\0\0",
    b"luodbox1\1\0\0\0\2\0\0\0\0\0\0\0\0\0\0\0",
    b"luodldgr\1\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0",
    b"FDSTORE=1\nFDNAME=b1\nFDPOLL=0",
    b"MAINPID=12\nREADY=1",
    _FINALIZED,
    _FINALIZED
    + _said(1, 0, type="claim", session="a")
    + _said(1, 0, type="retrieve", names=["c"])
    + _said(1, 0, type="finish", session_id=_ID),
    _FINALIZED + _said(1, 0, type="discard", session_id=_ID, force=True) + _said(1, 0, type="list"),
)


def main(target: str, seconds: int) -> None:
    """Run one target for so long, from the seeds and what was found interesting before."""
    atheris: Any = importlib.import_module("atheris")
    corpus = Path(__file__).parents[1] / ".fuzz" / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", f"-artifact_prefix={corpus}/", str(corpus)], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else SECONDS)
