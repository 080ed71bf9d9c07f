"""What every handler must do, tried with every specimen."""

from __future__ import annotations

import fcntl
import functools
import os
import socket
import stat
import struct
import termios
from contextlib import ExitStack, suppress

import attrs
import pytest

from conformance.making import Refused, Specimen
from conformance.recorded import RECORDED, RECORDED_REFUSED, Record, RecordedProbe
from conformance.specimens import REFUSED, SPECIMENS
from entries import entry_of
from luod import manifest, verify
from luod.handlers import HANDLERS, by_kind, devices, kinds, recognize
from luod.handlers.base import Handler, Mismatch, Probe
from luod.handlers.file import File
from luod.handlers.kernel import stat_of
from luod.manifest import Entry, Manifest
from luod_protocol import box, messages, wire
from luod_protocol.codec import REPLIES
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import OwnedFd, duplicate
from processes import Talk, spawn_client

BY_NAME = {specimen.name: specimen for specimen in SPECIMENS}

each_specimen = pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
each_refused = pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)


@functools.cache
def one_of_each() -> list[Entry]:
    """An entry of each kind, of things that are gone."""
    entries: list[Entry] = []
    for specimen in {specimen.kind: specimen for specimen in SPECIMENS}.values():
        with specimen.make() as fd:
            entries.append(entry_of(fd))
    return entries


def check(entry: Entry, fd: int, *, same_kernel: bool = True) -> None:
    """Check a borrowed fd against its entry, as a successor does."""
    with duplicate(fd) as copy:
        verify.entries([entry], [copy], same_kernel=same_kernel)


def sample(entry: Entry) -> Manifest:
    return Manifest(
        version=1,
        session_id=bytes(16),
        session="specimen",
        owner=0,
        metadata=b"",
        boot_id="",
        generation=1,
        opened_at=0.0,
        finalized_at=0.0,
        entries=(entry,),
    )


def state_of(fd: int) -> tuple[object, ...]:
    """All that a handler could change by accident: flags, offset, count, times, bytes waiting."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        text = file.read()
    waiting = b""
    with suppress(OSError):
        waiting = fcntl.ioctl(fd, termios.FIONREAD, struct.pack("i", 0))
    return text, os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GETFD), waiting


def open_fds() -> list[str]:
    return os.listdir("/proc/self/fd")


def test_every_handler_has_specimens_and_a_versioned_name() -> None:
    tried = {each.kind for each in SPECIMENS} | {each.kind for each in RECORDED}
    assert {handler.kind for handler in HANDLERS} == tried == set(kinds()) - {File.kind}
    assert len(BY_NAME) == len(SPECIMENS)
    for handler in HANDLERS:
        assert by_kind(handler.kind) is handler
        name, _, version = handler.compatible.rpartition("-v")
        assert name == handler.kind
        assert int(version) >= 1
    assert by_kind("no such kind") is None


@pytest.mark.parametrize("made", [*SPECIMENS, *REFUSED], ids=lambda made: made.name)
def test_the_kernel_is_asked_the_right_thing(made: Specimen | Refused) -> None:
    """`stat_of` reads a struct of its own."""
    with made.make() as fd:
        said = os.fstat(fd)
        assert tuple(stat_of(fd)) == (said.st_mode, said.st_ino, said.st_size, said.st_dev, said.st_rdev)


@each_specimen
def test_exactly_one_handler_recognizes_it(specimen: Specimen) -> None:
    with specimen.make() as fd:
        assert [handler.kind for handler in HANDLERS if handler.recognize(Probe(fd))] == [specimen.kind]
        assert recognize(Probe(fd)).kind == specimen.kind


@each_specimen
def test_the_record_is_stable_and_travels(specimen: Specimen) -> None:
    with specimen.make() as fd:
        entry = entry_of(fd)
        assert entry_of(fd) == entry
        with duplicate(fd) as copy:
            assert entry_of(copy.fileno()) == entry
    assert {name: entry.facts.get(name) for name in specimen.facts} == specimen.facts
    for name, fact in entry.facts.items():
        assert type(name) is str
        assert type(fact) in (int, str)
        assert str(fact).isprintable(), name
    assert manifest.decode(manifest.encode(sample(entry))).entries == (entry,)
    info = messages.EntryInfo(name=entry.name, kind=entry.kind, compatible=entry.compatible, metadata=b"", needs=(), facts=entry.facts)
    reply = messages.Preserved(seq=1, entries=(info,))
    assert REPLIES.decode(REPLIES.encode(reply)) == reply


@each_specimen
def test_the_same_object_passes_wherever_the_fd_went(specimen: Specimen) -> None:
    with specimen.make() as fd:
        entry = entry_of(fd)
        check(entry, fd)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            wire.send(ours, b"fd", [fd])
            packet = wire.receive(theirs)
        assert packet is not None
        with packet:
            check(entry, packet.fds[0].fileno())
        with box.seal(b"", [fd]) as sealed:
            for _ in range(2):
                (peeked,) = box.look(sealed.fileno())
                with peeked:
                    check(entry, peeked.fileno())


def verify_here(talk: Talk) -> None:
    from luod import verify
    from luod.manifest import Entry, Identity
    from luod_protocol.fds import OwnedFd

    passed = 0
    for fd, device, inode, fields in talk.hear():
        with OwnedFd(fd) as owned:
            verify.entries([Entry(identity=Identity(device=device, inode=inode), **fields)], [owned], same_kernel=True)
        passed += 1
    talk.tell(passed)


def test_the_same_objects_pass_in_another_process() -> None:
    with ExitStack() as stack:
        fds = [stack.enter_context(specimen.make()) for specimen in SPECIMENS]
        told: list[tuple[object, ...]] = []
        for fd in fds:
            entry = entry_of(fd)
            names = ("name", "kind", "compatible", "metadata", "needs", "facts")
            told.append((fd, entry.identity.device, entry.identity.inode, {name: getattr(entry, name) for name in names}))
        with spawn_client(verify_here, pass_fds=fds) as client:
            client.tell(told)
            assert client.hear() == len(SPECIMENS)


@each_specimen
def test_another_kind_does_not_pass(specimen: Specimen) -> None:
    others = [entry for entry in one_of_each() if entry.kind != specimen.kind]
    assert others
    with specimen.make() as fd:
        for entry in others:
            with pytest.raises(Mismatch, match=entry.kind):
                check(entry, fd, same_kernel=False)


@pytest.mark.parametrize(
    ("specimen", "other"),
    [(specimen, BY_NAME[other]) for specimen in SPECIMENS for other in specimen.unlike],
    ids=lambda specimen: specimen.name,
)
def test_another_nature_does_not_pass(specimen: Specimen, other: Specimen) -> None:
    assert other.kind == specimen.kind
    with specimen.make() as fd, other.make() as before, pytest.raises(Mismatch, match=r"it was|it had|has lost"):
        check(entry_of(before), fd, same_kernel=False)


@pytest.mark.parametrize("kind", ["memfd", "pipe", "socket"])
def test_another_object_of_the_same_nature_does_not_pass_on_the_same_kernel(kind: str) -> None:
    """Not so for eventfds: all of them have one inode."""
    specimen = next(each for each in SPECIMENS if each.kind == kind)
    with specimen.make() as fd, specimen.make() as other:
        entry = entry_of(other)
        check(entry, fd, same_kernel=False)
        with pytest.raises(Mismatch, match="another object"):
            check(entry, fd)


@each_specimen
def test_what_its_owners_do_meanwhile_changes_nothing(specimen: Specimen) -> None:
    with specimen.make() as fd:
        entry = entry_of(fd)
        specimen.use(fd)
        check(entry, fd)


@each_specimen
def test_it_is_left_as_it_was(specimen: Specimen) -> None:
    with specimen.make() as fd:
        entry_of(fd)  # what a handler asks the kernel once is asked now
        before, fds = state_of(fd), open_fds()
        check(entry_of(fd), fd)
        for handler in HANDLERS:
            handler.recognize(Probe(fd))
        assert state_of(fd) == before
        assert open_fds() == fds


@each_refused
def test_it_is_refused_with_the_reason(refused: Refused) -> None:
    with refused.make() as fd:
        before, fds = state_of(fd), open_fds()
        assert [handler.kind for handler in HANDLERS if handler.recognize(Probe(fd))] == []
        with pytest.raises(Refusal) as caught:
            recognize(Probe(fd))
        assert state_of(fd) == before
        assert open_fds() == fds
    assert caught.value.code is Code.KIND_NOT_SUPPORTED
    message = caught.value.message
    assert message.isprintable()
    assert len(message.encode()) < 500
    for words in (*refused.words, "luoctl capabilities"):
        assert words in message


@each_refused
def test_it_does_not_pass_for_what_was_preserved(refused: Refused) -> None:
    with refused.make() as fd:
        for entry in one_of_each():
            with pytest.raises(Mismatch):
                check(entry, fd, same_kernel=False)


def test_a_closed_fd_is_an_error_of_the_caller() -> None:
    with OwnedFd(os.dup(0)) as owned:
        closed = owned.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        Probe(closed)


# ---- recorded


@pytest.mark.parametrize("record", RECORDED, ids=lambda record: record.name)
def test_what_was_recorded_elsewhere_is_taken(record: Record) -> None:
    probe = RecordedProbe(record)
    assert [handler.kind for handler in HANDLERS if handler.recognize(probe)] == [record.kind]
    handler = recognize(probe)
    facts = handler.record(probe)
    assert facts == record.facts
    handler.verify(probe, facts)


@pytest.mark.parametrize("record", RECORDED_REFUSED, ids=lambda record: record.name)
def test_what_was_recorded_elsewhere_is_refused(record: Record) -> None:
    probe = RecordedProbe(record)
    with pytest.raises(Refusal) as caught:
        recognize(probe)
    for words in record.words:
        assert words in caught.value.message


def test_an_unplugged_device_is_still_the_same() -> None:
    records = {record.name: RecordedProbe(record) for record in RECORDED}
    before, after = records["vfio-cdev"], records["vfio-cdev-unplugged"]
    handler = recognize(before)
    assert handler.recognize(after)
    assert after.identity == before.identity
    handler.verify(after, handler.record(before))


@pytest.mark.parametrize("record", [record for record in RECORDED if record.link.startswith("anon_inode:")], ids=lambda record: record.name)
@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFDIR], ids=hex)
def test_a_name_alone_is_nothing(record: Record, kind: int) -> None:
    """A file with a type has a path, and so a name that somebody chose."""
    mode = kind | stat.S_IMODE(record.stat.st_mode)
    probe = RecordedProbe(attrs.evolve(record, stat=record.stat._replace(st_mode=mode), flags=os.O_RDWR))
    assert not by_kind_of(record).recognize(probe)


@pytest.mark.parametrize("record", [record for record in RECORDED if record.stat.st_rdev], ids=lambda record: record.name)
def test_a_path_is_nothing(record: Record) -> None:
    handler = by_kind_of(record)
    assert handler.recognize(RecordedProbe(attrs.evolve(record, link="/tmp/of a client's choice")))
    another = attrs.evolve(record, driver="mem", stat=record.stat._replace(st_rdev=os.makedev(1, 3)))
    assert not handler.recognize(RecordedProbe(another))


def by_kind_of(record: Record) -> Handler:
    handler = by_kind(record.kind)
    assert handler is not None
    return handler


def test_a_driver_is_told_of_open_devices_only() -> None:
    with OwnedFd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) as fd:
        assert Probe(fd.fileno()).driver == "mem"
    with OwnedFd(os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)) as place:
        assert Probe(place.fileno()).driver == ""


def test_a_number_with_two_names_has_none() -> None:
    """The table as a CUSE device called "x\\n241 vfio" made it, on Linux 6.1, and then another of major 241."""
    table = "Character devices:\n  5 /dev/tty\n  5 /dev/ptmx\n 10 misc\n242 x\n241 vfio\n241 y\n243 vfio\n243 vfio\n"
    assert {number: devices.named(table, number) for number in (5, 10, 242, 241, 243, 7)} == {
        5: "",
        10: "misc",
        242: "x",
        241: "",
        243: "vfio",
        7: "",
    }
