"""What every handler must do, tried with every specimen."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
from contextlib import ExitStack, suppress

import pytest

from conformance.specimens import REFUSED, SPECIMENS, Refused, Specimen
from luod import manifest, verify
from luod.handlers import HANDLERS, by_kind, kinds, recognize
from luod.handlers.base import Mismatch, Probe
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


def recorded(fd: int) -> Entry:
    """The entry of a borrowed fd, as the daemon writes it."""
    probe = Probe(fd)
    handler = recognize(probe)
    return Entry(
        name="it",
        kind=handler.kind,
        compatible=handler.compatible,
        metadata=b"",
        needs=(),
        identity=probe.identity,
        facts=handler.record(probe),
    )


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
    assert {handler.kind for handler in HANDLERS} == {specimen.kind for specimen in SPECIMENS} == set(kinds()) - {File.kind}
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
        stat = os.fstat(fd)
        assert tuple(stat_of(fd)) == (stat.st_mode, stat.st_ino, stat.st_size, stat.st_dev, stat.st_rdev)


@each_specimen
def test_exactly_one_handler_recognizes_it(specimen: Specimen) -> None:
    with specimen.make() as fd:
        assert [handler.kind for handler in HANDLERS if handler.recognize(Probe(fd))] == [specimen.kind]
        assert recognize(Probe(fd)).kind == specimen.kind


@each_specimen
def test_the_record_is_stable_and_travels(specimen: Specimen) -> None:
    with specimen.make() as fd:
        entry = recorded(fd)
        assert recorded(fd) == entry
        with duplicate(fd) as copy:
            assert recorded(copy.fileno()) == entry
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
        entry = recorded(fd)
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
            entry = recorded(fd)
            names = ("name", "kind", "compatible", "metadata", "needs", "facts")
            told.append((fd, entry.identity.device, entry.identity.inode, {name: getattr(entry, name) for name in names}))
        with spawn_client(verify_here, pass_fds=fds) as client:
            client.tell(told)
            assert client.hear() == len(SPECIMENS)


@each_specimen
def test_another_kind_does_not_pass(specimen: Specimen) -> None:
    with specimen.make() as fd, ExitStack() as stack:
        others = {other.kind: other for other in SPECIMENS if other.kind != specimen.kind}
        assert others
        for other in others.values():
            entry = recorded(stack.enter_context(other.make()))
            with pytest.raises(Mismatch, match=other.kind):
                check(entry, fd, same_kernel=False)


@pytest.mark.parametrize(
    ("specimen", "other"),
    [(specimen, BY_NAME[other]) for specimen in SPECIMENS for other in specimen.unlike],
    ids=lambda specimen: specimen.name,
)
def test_another_nature_does_not_pass(specimen: Specimen, other: Specimen) -> None:
    assert other.kind == specimen.kind
    with specimen.make() as fd, other.make() as before, pytest.raises(Mismatch, match=r"it was|it had|has lost"):
        check(recorded(before), fd, same_kernel=False)


@pytest.mark.parametrize("kind", ["memfd", "pipe", "socket"])
def test_another_object_of_the_same_nature_does_not_pass_on_the_same_kernel(kind: str) -> None:
    """Not so for eventfds: all of them have one inode."""
    specimen = next(each for each in SPECIMENS if each.kind == kind)
    with specimen.make() as fd, specimen.make() as other:
        entry = recorded(other)
        check(entry, fd, same_kernel=False)
        with pytest.raises(Mismatch, match="another object"):
            check(entry, fd)


@each_specimen
def test_what_its_owners_do_meanwhile_changes_nothing(specimen: Specimen) -> None:
    with specimen.make() as fd:
        entry = recorded(fd)
        specimen.use(fd)
        check(entry, fd)


@each_specimen
def test_it_is_left_as_it_was(specimen: Specimen) -> None:
    with specimen.make() as fd:
        recorded(fd)  # what a handler asks the kernel once is asked now
        before, fds = state_of(fd), open_fds()
        check(recorded(fd), fd)
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
    for words in (*refused.words, *(handler.kind for handler in HANDLERS)):
        assert words in message


@each_refused
def test_it_does_not_pass_for_what_was_preserved(refused: Refused) -> None:
    one_of_each = {specimen.kind: specimen for specimen in SPECIMENS}
    with refused.make() as fd, ExitStack() as stack:
        for specimen in one_of_each.values():
            entry = recorded(stack.enter_context(specimen.make()))
            with pytest.raises(Mismatch):
                check(entry, fd, same_kernel=False)


def test_a_closed_fd_is_an_error_of_the_caller() -> None:
    with OwnedFd(os.dup(0)) as owned:
        closed = owned.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        Probe(closed)
