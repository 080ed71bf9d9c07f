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

from luod import manifest
from luod.manifest import ForeignManifest, ManifestFault
from luod.succession import ledger, messages
from luod.succession.ledger import LedgerFault
from luod.supervisor import message
from luod_protocol import box, wire
from luod_protocol import messages as m
from luod_protocol.box import BoxFault
from luod_protocol.codec import REPLIES, REQUESTS, bulk_size, pack
from luod_protocol.connection import ServerConnection
from luod_protocol.errors import ProtocolFault, Refusal
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


def notification(data: bytes) -> None:
    """What is said to `luod --supervised`."""
    message.parse(data)


TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {
    each.__name__: each for each in (codec, connection, packet, a_manifest, a_box, a_ledger, notification)
}

_WELCOME: Final[dict[str, Any]] = {
    "seq": 1,
    "version": 1,
    "luod": "x",
    "generation": 1,
    "limits": m.Limits(**{field.name: 1 for field in attrs.fields(m.Limits)}),
}

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
