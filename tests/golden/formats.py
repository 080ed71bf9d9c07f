"""What crosses a boundary between luods, or between luod and its clients: specimens of each format, and how the code of today reads them.

The files of a format and version are in a folder, such as `wire-1`: the bytes in `NAME.bin`, what they say in `values.json`. `make golden`
writes those that are missing. Specimens are made from the classes, so that a field that is new needs nothing here.
"""

from __future__ import annotations

import json
import os
import socket
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import NoneType
from typing import Any, Final, get_args, get_origin, get_type_hints

import attrs

from conformance.specimens import SPECIMENS
from luod import manifest
from luod.handlers import recognize
from luod.handlers.base import Probe
from luod.manifest import Entry, Identity, Manifest
from luod.succession import ledger, parcel
from luod.succession import messages as handover
from luod.succession.ledger import Ledger, Record
from luod_protocol import box, wire
from luod_protocol.codec import REPLIES, REQUESTS, Codec, bulk_size, encode_bulk
from luod_protocol.fds import OwnedFd, close_all
from luod_protocol.limits import MAX_PACKET_BYTES
from luod_protocol.messages import Reply, Request
from luod_protocol.sealed import seal_bytes
from luod_protocol.version import WIRE, VersionRange
from things import memfd

RELEASED: Final[frozenset[str]] = frozenset()
"""Folders of versions that a release of luod has. Their files stay as they are, for ever; `make golden` refuses to write them anew.

With the release of 0.1.0 all that are there come in here. Until then a version 1 may be changed by `make golden ARGS=--again`.
"""

FOLDER: Final = Path(__file__).parent

Files = Mapping[str, bytes]
Values = dict[str, Any]


# ---- values as JSON has them


def plain(value: Any) -> Any:
    """`value` in what JSON has: records are objects, bytes are {"hex": ...}."""
    kind: type[Any] = value.__class__
    if attrs.has(kind):
        tag = {"type": value.type} if hasattr(value, "type") else {}
        return {**tag, **{field.name: plain(getattr(value, field.name)) for field in attrs.fields(kind)}}
    if kind is bytes:
        return {"hex": value.hex()}
    if kind in (tuple, list):
        return [plain(each) for each in value]
    return {key: plain(each) for key, each in value.items()} if kind is dict else value


def sample(kind: Any, name: str, *, full: bool) -> Any:
    """A value of the type `kind` for the field `name`: with something everywhere when `full`, else with as little as there can be."""
    if kind in (int, float):
        number = zlib.crc32(name.encode()) if full else 0
        return kind(number) + (0.5 if full and kind is float else 0)
    if kind in (str, bytes, bool):
        return {str: name, bytes: name.encode(), bool: True}[kind] if full else kind()
    if get_origin(kind) is tuple:
        return tuple(sample(get_args(kind)[0], f"{name} {place}", full=full) for place in range(2 * full))
    if get_origin(kind) is dict:
        return {key: sample(get_args(kind)[1], f"{name} {key}", full=full) for key in ("one", "two")[: 2 * full]}
    if isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{field.name: sample(hints[field.name], field.name, full=full) for field in attrs.fields(kind)})
    *some, last = get_args(kind)
    return None if last is NoneType and not full else sample(some[0] if full else last, name, full=full)


# ---- messages


def _messages(prefix: str, codec: Codec[Any], kinds: Sequence[Any]) -> Generator[tuple[str, bytes, Any]]:
    for kind in kinds:
        for full in (True, False):
            message = sample(kind, kind.type, full=full)
            yield f"{prefix}{kind.type}-{'full' if full else 'least'}", codec.encode(message), plain(message)


def _write_wire() -> Generator[tuple[str, bytes, Any]]:
    yield from _messages("request-", REQUESTS, get_args(Request))
    yield from _messages("reply-", REPLIES, get_args(Reply))
    yield "bulk", encode_bulk(70_000), {"type": "bulk", "size": 70_000}


def _read_wire(name: str, files: Files) -> Any:
    if name == "bulk":
        return {"type": "bulk", "size": bulk_size(files[name])}
    codec: Codec[Any] = REQUESTS if name.startswith("request-") else REPLIES
    return plain(codec.decode(files[name]))


def _write_handover() -> Generator[tuple[str, bytes, Any]]:
    yield from _messages("", handover.CODEC, get_args(handover.Handover))


# ---- manifest


def _entry(kind: str, **facts: int | str) -> Entry:
    return Entry(
        name=f"a {kind}",
        kind=kind,
        compatible=f"{kind}-v1",
        metadata=b"\0\xff" if kind == "memfd" else b"",
        needs=("a memfd", "a pipe") if kind == "socket" else (),
        identity=Identity(device=2**32, inode=2**63),
        facts=facts,
    )


_ENTRIES: Final = (
    _entry("memfd", size=2**40, seals="seal,grow", access="rw", huge_page_size=0),
    _entry("eventfd", semaphore=-1),
    _entry("pipe", end="write", capacity=65536),
    _entry("socket", family="inet", type="stream", protocol=6, listening=1, connected=0, address="127.0.0.1:80"),
)
"""The kinds of the first release. What a kind records has a version of its own: `kinds.json`."""


def _write_manifest() -> Generator[tuple[str, bytes, Any]]:
    for name, full in (("full", True), ("least", False)):
        found: Manifest = sample(Manifest, "manifest", full=full)
        found = attrs.evolve(found, version=manifest.VERSIONS.high, entries=(*_ENTRIES, *found.entries) if full else ())
        yield name, manifest.encode(found), plain(found)


# ---- box

_LONG: Final = b"m" * MAX_PACKET_BYTES
_BOXES: Final[Mapping[str, tuple[bytes, int]]] = {
    "flat": (b"a manifest", 3),
    "empty": (b"", 0),
    "long": (_LONG, 1),
    "nested": (b"a manifest", 300),
    "nested-long": (_LONG, 300),
}
"""The manifest and the number of fds of each."""


def _packet(sealed: int) -> tuple[bytes, list[OwnedFd]]:
    with socket.socket(fileno=os.dup(sealed)) as sock:
        packet = wire.receive(sock, flags=socket.MSG_PEEK | socket.MSG_DONTWAIT)
    assert packet is not None
    return packet.data, packet.take_fds()


def _summed(content: bytes, fds: int) -> Any:
    return {"fds": fds, "manifest_bytes": len(content), "manifest_crc32": zlib.crc32(content)}


def _write_box() -> Generator[tuple[str, bytes, Any]]:
    for name, (content, count) in _BOXES.items():
        with memfd() as fd, box.seal(content, [fd.fileno()] * count) as sealed:
            data, fds = _packet(sealed.fileno())
            yield name, data, _summed(content, count)
            if name.startswith("nested"):
                for place, inner in enumerate(fds[-2:]):
                    data, inside = _packet(inner.fileno())
                    yield f"{name}-inner-{place}", data, {"fds": len(inside)}
                    close_all(inside)
            close_all(fds)


@contextmanager
def _holding(data: bytes, fds: Sequence[int]) -> Generator[OwnedFd]:
    """A socket that holds one packet."""
    keep, give = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with give, OwnedFd(keep.detach()) as held:
        wire.send(give, data, fds)
        yield held


def _read_box(name: str, files: Files) -> Any:
    with ExitStack() as stack:
        fd = stack.enter_context(memfd()).fileno()
        name, _, inner = name.partition("-inner-")
        content, count = _BOXES[name]
        inside = [fd] * count
        if name.startswith("nested"):
            parts = (inside[:253], inside[253:])
            if inner:
                return {"fds": len(parts[int(inner)])}  # it is read with the outer one
            inside = [stack.enter_context(_holding(files[f"{name}-inner-{place}"], part)).fileno() for place, part in enumerate(parts)]
        if content is _LONG:
            inside = [stack.enter_context(seal_bytes(content, "golden")).fileno(), *inside]
        sealed = stack.enter_context(_holding(files[name], inside)).fileno()
        found = box.look(sealed)
        close_all(found)
        assert box.size(sealed) == len(found)
        return _summed(box.manifest_of(sealed), len(found))


# ---- ledger

_HEAD_BYTES: Final = 32
"""Of a ledger's head; the last eight say where its records are. A file has the head and the records only."""


def _write_ledger() -> Generator[tuple[str, bytes, Any]]:
    records: list[Record] = [sample(kind, kind.type, full=full) for kind in get_args(Record) for full in (True, False)]
    written = Ledger(records[:2])
    try:
        for record in records[2:]:
            written.write(record)
        yield "begun", _ledger_bytes(written), plain(records)
        written.begin_anew(records[1:])
        yield "begun-anew", _ledger_bytes(written), plain(records[1:])
    finally:
        written.close()


def _write_parcel() -> Generator[tuple[str, bytes, Any]]:
    for kind in (parcel.Parcel, parcel.Index):
        for full in (True, False):
            name = f"{kind.type}-{'full' if full else 'least'}"
            record: parcel.Parcel | parcel.Index = attrs.evolve(sample(kind, name, full=full), version=parcel.VERSION)
            yield name, parcel.encode(record), plain(record)


def _read_parcel(name: str, files: Files) -> Any:
    decode = parcel.decode_parcel if name.startswith("parcel") else parcel.decode_index
    return plain(decode(files[name]))


def _ledger_bytes(written: Ledger) -> bytes:
    memory = written.memfd.fileno()
    data = os.pread(memory, _HEAD_BYTES, 0)
    place = _records_place(data)
    # Each record has its size in front; memory that was never written is zero.
    while size := int.from_bytes(os.pread(memory, 4, place), "little"):
        data += os.pread(memory, 8 + size, place)
        place += 8 + size
    return data


def _records_place(head: bytes) -> int:
    return int.from_bytes(head[_HEAD_BYTES - 8 :], "little")


def _read_ledger(name: str, files: Files) -> Any:
    head, records = files[name][:_HEAD_BYTES], files[name][_HEAD_BYTES:]
    with memfd() as memory:
        os.pwrite(memory.fileno(), head, 0)
        os.pwrite(memory.fileno(), records, _records_place(head))
        return plain(ledger.read(memory.fileno()))


# ---- the formats


@attrs.frozen(kw_only=True)
class Format:
    """One format.

    Attributes:
        name: of the format; its folders are `NAME-VERSION`.
        versions: that the code reads; it writes the highest.
        where: where the code has that, for a person.
        write: what the code writes today: file, bytes, and what they say.
        read: what the code reads in a file of a folder.
    """

    name: str
    versions: VersionRange
    where: str
    write: Callable[[], Generator[tuple[str, bytes, Any]]]
    read: Callable[[str, Files], Any]

    def folder(self, version: int, top: Path = FOLDER) -> Path:
        """Where the files of a version are."""
        return top / f"{self.name}-{version}"


FORMATS: Final = (
    Format(name="wire", versions=WIRE, where="WIRE in luod_protocol/version.py", write=_write_wire, read=_read_wire),
    Format(
        name="handover",
        versions=handover.VERSIONS,
        where="VERSIONS in luod/succession/messages.py",
        write=_write_handover,
        read=lambda name, files: plain(handover.CODEC.decode(files[name])),
    ),
    Format(
        name="manifest",
        versions=manifest.VERSIONS,
        where="VERSIONS in luod/manifest.py",
        write=_write_manifest,
        read=lambda name, files: plain(manifest.decode(files[name])),
    ),
    Format(
        name="box",
        versions=VersionRange(low=1, high=1),
        where="the magic or the layouts in luod_protocol/box.py, and here",
        write=_write_box,
        read=_read_box,
    ),
    Format(
        name="ledger",
        versions=VersionRange(low=1, high=ledger.VERSION),
        where="VERSION in luod/succession/ledger.py",
        write=_write_ledger,
        read=_read_ledger,
    ),
    Format(
        name="parcel",
        versions=VersionRange(low=1, high=parcel.VERSION),
        where="VERSION in luod/succession/parcel.py",
        write=_write_parcel,
        read=_read_parcel,
    ),
)


def load(folder: Path) -> tuple[Files, Values]:
    """The files in a folder, and what they say."""
    return {path.stem: path.read_bytes() for path in folder.glob("*.bin")}, json.loads((folder / "values.json").read_text())


# ---- what kinds record

KINDS: Final = "kinds.json"
"""compatible -> fact -> `int` or `str`."""


def recorded() -> dict[str, dict[str, str]]:
    """What the handlers of today record, each of those of which there can be a specimen on this machine."""
    found: dict[str, dict[str, str]] = {}
    for specimen in SPECIMENS:
        with suppress(OSError), specimen.make() as fd:
            probe = Probe(fd)
            handler = recognize(probe)
            types = {fact: type(value).__name__ for fact, value in handler.record(probe).items()}
            found.setdefault(handler.compatible, {}).update(types)
    return found
