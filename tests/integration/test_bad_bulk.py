"""Messages in a memfd: only as they must be, whatever else a client sends for one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping
from typing import Final

from harness import Daemon
from luod_protocol import messages as m
from luod_protocol.codec import encode_bulk, pack
from luod_protocol.errors import FaultCode
from luod_protocol.fds import OwnedFd, own
from luod_protocol.limits import MAX_BULK_BYTES
from luod_protocol.sealed import SEALS, seal_bytes
from raw import HELLO, PRESERVE, STATUS, faults, open_session
from things import eventfd, let_go, memfd


def _sealed(data: bytes, seals: int = SEALS) -> OwnedFd:
    fd = memfd(data)
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seals)
    return fd


def _again(fd: OwnedFd, flags: int) -> OwnedFd:
    with fd:
        return OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", flags))


def _write_only() -> OwnedFd:
    with memfd(pack(STATUS)) as fd:
        other = OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", os.O_WRONLY))
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, SEALS)
    return other


def _pipe_end() -> OwnedFd:
    read, write = own(os.pipe2(os.O_CLOEXEC))
    write.close()
    return read


SIZE: Final = len(pack(STATUS))
BULK: Final[Mapping[str, tuple[Callable[[], OwnedFd], int, FaultCode, str]]] = {
    "not sealed": (lambda: memfd(pack(STATUS)), SIZE, FaultCode.MALFORMED, "must have the seals"),
    "no seal against seals": (lambda: _sealed(pack(STATUS), SEALS & ~fcntl.F_SEAL_SEAL), SIZE, FaultCode.MALFORMED, "must have the seals"),
    "no seal against writing": (
        lambda: _sealed(pack(STATUS), SEALS & ~fcntl.F_SEAL_WRITE),
        SIZE,
        FaultCode.MALFORMED,
        "must have the seals",
    ),
    "longer": (lambda: _sealed(pack(STATUS)), SIZE - 1, FaultCode.MALFORMED, f"{SIZE} bytes"),
    "shorter": (lambda: _sealed(pack(STATUS)), SIZE + 1, FaultCode.MALFORMED, f"{SIZE} bytes"),
    "far shorter": (lambda: _sealed(pack(STATUS)), MAX_BULK_BYTES, FaultCode.MALFORMED, f"{SIZE} bytes"),
    "size 0": (lambda: _sealed(b""), 0, FaultCode.PACKET_TOO_LARGE, "bulk of 0 bytes"),
    "a negative size": (lambda: _sealed(b""), -1, FaultCode.PACKET_TOO_LARGE, "bulk of -1 bytes"),
    "too large": (lambda: _sealed(b""), MAX_BULK_BYTES + 1, FaultCode.PACKET_TOO_LARGE, f"at most {MAX_BULK_BYTES}"),
    "2**64 - 1": (lambda: _sealed(b""), 2**64 - 1, FaultCode.PACKET_TOO_LARGE, f"at most {MAX_BULK_BYTES}"),
    "a pipe": (_pipe_end, SIZE, FaultCode.MALFORMED, "memfd"),
    "an eventfd": (eventfd, SIZE, FaultCode.MALFORMED, "memfd"),
    "a file": (lambda: OwnedFd(os.open(__file__, os.O_RDONLY)), SIZE, FaultCode.MALFORMED, "memfd"),
    "a directory": (lambda: OwnedFd(os.open("/", os.O_RDONLY)), SIZE, FaultCode.MALFORMED, "memfd"),
    "a device": (lambda: OwnedFd(os.open("/dev/zero", os.O_RDONLY)), SIZE, FaultCode.MALFORMED, "memfd"),
    "a memfd's place only": (lambda: _again(_sealed(pack(STATUS)), os.O_PATH), SIZE, FaultCode.MALFORMED, "memfd"),
    "a memfd for writing only": (_write_only, SIZE, FaultCode.MALFORMED, "memfd"),
    "nonsense inside": (lambda: _sealed(bytes(70_000)), 70_000, FaultCode.MALFORMED, "not one msgpack value"),
    "bulk inside": (lambda: _sealed(encode_bulk(SIZE)), len(encode_bulk(SIZE)), FaultCode.UNKNOWN_MESSAGE, "bulk"),
    "hello inside": (lambda: _sealed(pack(HELLO)), len(pack(HELLO)), FaultCode.UNEXPECTED_MESSAGE, "hello was said"),
    "its fds are missing": (lambda: _sealed(pack(PRESERVE)), len(pack(PRESERVE)), FaultCode.FD_COUNT, "takes 1 fds, 0 came"),
}


def test_bulk_that_is_not_as_it_must_be(daemon: Daemon) -> None:
    for make, size, code, says in BULK.values():
        with make() as fd:
            faults(daemon, code, says, lambda raw: raw.put(encode_bulk(size), [fd.fileno()]))  # noqa: B023  # called at once
    faults(daemon, FaultCode.FD_COUNT, "memfd", lambda raw: raw.put(encode_bulk(SIZE)))
    with _sealed(pack(STATUS)) as good, eventfd() as irq:
        for message in (
            {"type": "bulk"},
            {"type": "bulk", "size": str(SIZE)},
            {"type": "bulk", "size": True},
            {"type": "bulk", "size": 1, "x": 1},
        ):
            faults(daemon, FaultCode.MALFORMED, "bulk has exactly", lambda raw: raw.say(message, [good.fileno()]))  # noqa: B023  # called at once
        more = [good.fileno(), irq.fileno()]
        faults(daemon, FaultCode.FD_COUNT, "takes 0 fds, 1 came", lambda raw: raw.put(encode_bulk(SIZE), more))


def test_bulk_that_is_as_it_must_be(daemon: Daemon) -> None:
    names = [f"irq-{index}" for index in range(252)]
    big = pack({**PRESERVE, "entries": [{"name": name, "metadata": bytes(32_768)} for name in names]})
    small = pack({"type": "unpreserve", "seq": 9, "names": names})
    with open_session(daemon) as (raw, read), eventfd() as irq:
        with seal_bytes(big, "bulk") as first:
            raw.put(encode_bulk(len(big)), [first.fileno(), *[irq.fileno()] * 252])
            kept = raw.hear()
            assert isinstance(kept, m.Preserved)
            assert [entry.name for entry in kept.entries] == names
        with seal_bytes(small, "bulk") as second:
            raw.put(encode_bulk(len(small)), [second.fileno()])
            assert isinstance(raw.hear(), m.Unpreserved)
        assert isinstance(raw.ask({"type": "cancel", "seq": 1}), m.Cancelled)
        assert let_go(read, 0)
