"""The box: whole sessions in one descriptor, and everything that isn't one."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import socket
import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from luod_protocol import box, wire
from luod_protocol.box import BoxFault
from luod_protocol.codec import encode_bulk
from luod_protocol.fds import OwnedFd, close_all, own
from luod_protocol.limits import MAX_FDS_PER_PACKET, MAX_PACKET_BYTES
from luod_protocol.sealed import seal_bytes
from processes import ALICE, Talk, spawn_client
from things import eventfd, let_go, memfd, pipe, same_file

HEAD = struct.Struct("<8sBxxxIQ")
FLAT, NESTED, INNER, IN_MEMFD = 0, 1, 2, 0x80
SIZES = [0, 1, 2, 252, 253, 254, 505, 506, 507, 1000]
DESCRIPTORS = 4096
"""What the largest of these tests need."""


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """Enough descriptors, wherever the tests run."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def memfds(count: int) -> Generator[list[int]]:
    """That many different kernel objects, borrowed; each holds its number."""
    owned: list[OwnedFd] = []
    try:
        owned.extend(memfd(b"%d" % number) for number in range(count))
        yield [each.fileno() for each in owned]
    finally:
        close_all(owned)


@contextmanager
def looked(sealed: OwnedFd, wanted: Sequence[int] | None = None) -> Generator[list[int]]:
    """What a look gives, borrowed."""
    found = box.look(sealed.fileno(), wanted)
    try:
        yield [each.fileno() for each in found]
    finally:
        close_all(found)


def number_in(fd: int) -> int:
    return int(os.pread(fd, 20, 0))


def in_flight(sock: int) -> int:
    """How many fds wait in the queue of a unix socket (borrowed), by the kernel's count."""
    with open(f"/proc/self/fdinfo/{sock}", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("scm_fds:"))


def everything_in_flight(sealed: OwnedFd) -> int:
    """`in_flight` of a box and of the boxes in it."""
    with socket.socket(fileno=os.dup(sealed.fileno())) as sock:
        packet = wire.receive(sock, flags=socket.MSG_PEEK | socket.MSG_DONTWAIT)
    assert packet is not None
    with packet:
        nested = HEAD.unpack_from(packet.data)[1] & ~IN_MEMFD == NESTED
        inner = [each for each in packet.fds if os.readlink(f"/proc/self/fd/{each.fileno()}").startswith("socket:")] if nested else []
        return in_flight(sealed.fileno()) + sum(in_flight(each.fileno()) for each in inner)


def most_in_flight(fds: int) -> int:
    """What a box of `fds` may have in flight: these, a memfd for the manifest, and the inner boxes."""
    return fds + 1 + (fds // MAX_FDS_PER_PACKET + 1 if fds >= MAX_FDS_PER_PACKET else 0)


# ---- what goes in comes out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "manifest", [b"", b"manifest", bytes(MAX_PACKET_BYTES - HEAD.size), bytes(MAX_PACKET_BYTES), bytes(1 << 20)], ids=len
)
def test_what_goes_in_comes_out(size: int, manifest: bytes) -> None:
    with memfds(min(size, 300)) as fds:
        sent = (fds * 4)[:size]
        with box.seal(manifest, sent) as sealed:
            assert box.manifest_of(sealed.fileno()) == manifest
            assert everything_in_flight(sealed) <= most_in_flight(size)
            with looked(sealed) as found:
                assert [number_in(fd) for fd in found] == [number_in(fd) for fd in sent]
                assert set(found).isdisjoint(sent)
                assert len(set(found)) == size
                assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in found)
            assert fcntl.fcntl(sealed.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


@pytest.mark.parametrize("size", SIZES)
def test_looking_takes_nothing_out(size: int) -> None:
    with memfd(b"0") as one, box.seal(b"manifest", [one.fileno()] * size) as sealed:
        before = everything_in_flight(sealed)
        for _ in range(3):
            with looked(sealed) as found:
                assert len(found) == size
            assert box.manifest_of(sealed.fileno()) == b"manifest"
        assert everything_in_flight(sealed) == before


@pytest.mark.parametrize("size", [5, 253, 600])
def test_some_are_looked_at_in_any_order(size: int) -> None:
    dice = random.Random(size)
    with memfds(size) as fds, box.seal(b"", fds) as sealed:
        last = size - 1
        orders: list[list[int]] = [[], [0], [last], [last, 0], [0, 0], [last, 0, last, last], list(range(size))[::-1]]
        orders += [dice.choices(range(size), k=20) for _ in range(5)]
        for wanted in orders:
            with looked(sealed, wanted) as found:
                assert [number_in(fd) for fd in found] == wanted
                assert len(set(found)) == len(wanted)


@pytest.mark.parametrize("size", [0, 1, 253, 600])
def test_a_place_that_is_not_there(size: int) -> None:
    with memfd(b"0") as one, box.seal(b"", [one.fileno()] * size) as sealed:
        for wanted in ([size], [-1], [*range(size), size], [2**40]):
            with pytest.raises(IndexError, match=f"of a box of {size}"):
                box.look(sealed.fileno(), wanted)


def test_boxes_go_into_boxes() -> None:
    with memfd(b"7") as deep, ExitStack() as stack:
        sealed = stack.enter_context(box.seal(b"0", [deep.fileno()]))
        for level in range(1, 4):
            sealed = stack.enter_context(box.seal(b"%d" % level, [sealed.fileno()]))
        for level in range(3, -1, -1):
            assert box.manifest_of(sealed.fileno()) == b"%d" % level
            (inside,) = own(fd.take() for fd in box.look(sealed.fileno()))
            sealed = stack.enter_context(inside)
        assert number_in(sealed.fileno()) == 7


@pytest.mark.parametrize("size", [1, 254])
def test_dropping_the_box_lets_go_of_all_at_once(size: int) -> None:
    with pipe() as (read, write):
        with box.seal(bytes(MAX_PACKET_BYTES), [write.fileno()] * size):
            write.close()
            assert not let_go(read, 0)
        assert let_go(read)


@pytest.mark.parametrize("size", [1, 254])
def test_what_was_looked_at_outlives_the_box(size: int) -> None:
    with pipe() as (read, write):
        with box.seal(b"", [write.fileno()] * size) as sealed:
            write.close()
            (found,) = box.look(sealed.fileno(), [size - 1])
        with found:
            assert os.write(found.fileno(), b"still here") == 10
            assert os.read(read.fileno(), 100) == b"still here"
        assert let_go(read)


def look_again_and_again(talk: Talk, number: int, size: int, seed: int) -> None:
    import os
    import random

    from luod_protocol import box
    from luod_protocol.fds import OwnedFd, close_all

    dice = random.Random(seed)
    with OwnedFd(number) as sealed:
        talk.tell("ready")
        talk.hear()
        for turn in range(20):
            wanted = None if turn % 3 == 0 else [dice.randrange(size) for _ in range(10)]
            found = box.look(sealed.fileno(), wanted)
            assert [int(os.pread(fd.fileno(), 20, 0)) for fd in found] == (list(range(size)) if wanted is None else wanted)
            close_all(found)
        talk.tell("right")


@pytest.mark.parametrize("size", [253, 400])
def test_processes_look_at_the_same_time(size: int) -> None:
    with memfds(size) as fds, box.seal(b"", fds) as sealed, ExitStack() as stack:
        number = sealed.fileno()
        clients = [stack.enter_context(spawn_client(look_again_and_again, number, size, seed, pass_fds=[number])) for seed in range(3)]
        assert [client.hear() for client in clients] == ["ready"] * 3
        for client in clients:
            client.tell()
        assert [client.hear() for client in clients] == ["right"] * 3


# ---- sealing that fails


@pytest.mark.parametrize("size", [1, 253, 600])
def test_a_bad_fd_leaves_nothing_behind(size: int) -> None:
    with pipe() as (read, write):
        fds = [write.fileno()] * (size - 1) + [2**20]
        with pytest.raises(OSError, match=f"Errno {errno.EBADF}"):
            box.seal(bytes(MAX_PACKET_BYTES), fds)
        write.close()
        assert let_go(read)


def test_too_many_fds_are_refused() -> None:
    assert box.MAX_FDS == 63_756
    with pytest.raises(ValueError, match="63757 fds, a box holds at most 63756"):
        box.seal(b"", [0] * (box.MAX_FDS + 1))


def seal_until_refused(talk: Talk, uid: int) -> None:
    import os
    import resource

    from luod_protocol import box
    from luod_protocol.fds import OwnedFd, close_all
    from unit.limited import open_fds

    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    read, write = os.pipe2(os.O_CLOEXEC)
    boxes: list[OwnedFd] = []
    with OwnedFd(read), OwnedFd(write):
        before = open_fds()
        for size in (20, 253, 300):
            try:
                while True:
                    boxes.append(box.seal(bytes(100_000), [write] * size))
            except OSError as error:
                talk.tell((error.errno, open_fds() - before - len(boxes)))
            close_all(boxes)
            boxes.clear()


def test_too_much_in_flight_leaves_nothing_behind() -> None:
    """An ordinary user has as many fds in flight as RLIMIT_NOFILE says, and what one packet adds."""
    with spawn_client(seal_until_refused, ALICE.uid) as client:
        for _ in range(3):
            assert client.hear() == (errno.ETOOMANYREFS, 0)


# ---- at the limit of descriptors


def look_at_the_limit(talk: Talk, number: int, free: int, wanted: list[int] | None) -> None:
    from luod_protocol import box
    from luod_protocol.fds import OwnedFd, close_all
    from unit.limited import open_fds, room_for

    with OwnedFd(number) as sealed:
        before = open_fds()
        try:
            with room_for(free):
                found = box.look(sealed.fileno(), wanted)
        except OSError as error:
            talk.tell((error.errno, open_fds() - before))
        else:
            talk.tell((0, len(found)))
            close_all(found)
        found = box.look(sealed.fileno(), wanted)
        talk.tell(len(found))
        close_all(found)


@pytest.mark.parametrize(
    ("size", "free", "wanted"),
    [
        (3, 0, None),
        (3, 2, None),
        (3, 5, [0, 0, 0, 1, 1, 1]),  # the duplicates don't fit
        (254, 1, None),  # an inner box doesn't fit
        (254, 100, None),  # what is in it doesn't
        (254, 254, None),  # what is in the second one doesn't
    ],
)
def test_no_room_to_look_is_emfile_and_nothing_is_kept(size: int, free: int, wanted: list[int] | None) -> None:
    with memfd(b"0") as one, box.seal(b"", [one.fileno()] * size) as sealed:
        number = sealed.fileno()
        with spawn_client(look_at_the_limit, number, free, wanted, pass_fds=[number]) as client:
            assert client.hear() == (errno.EMFILE, 0)
            assert client.hear() == (size if wanted is None else len(wanted))


# ---- what is no box


def packet(data: bytes, fds: Sequence[int] = ()) -> OwnedFd:
    """A socket that holds one packet, as a box does."""
    keep, give = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with keep, give:
        socket.send_fds(give, [data], list(fds))
        return OwnedFd(keep.detach())


def head(layout: int, count: int, size: int = 0, magic: bytes = b"luodbox1") -> bytes:
    return HEAD.pack(magic, layout, count, size)


def nothing_came() -> OwnedFd:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    return OwnedFd(ours.detach())


def with_memfd(memory: OwnedFd, size: int) -> OwnedFd:
    """A box whose manifest of `size` bytes is said to be in `memory`."""
    with memory:
        return packet(head(FLAT | IN_MEMFD, 0, size), [memory.fileno()])


def nesting(inside: Sequence[OwnedFd], count: int) -> OwnedFd:
    """A box of the boxes `inside`, which are closed."""
    try:
        return packet(head(NESTED, count), [each.fileno() for each in inside])
    finally:
        close_all(inside)


def inner(fds: int, said: int | None = None, layout: int = INNER) -> OwnedFd:
    with eventfd() as fd:
        return packet(head(layout, fds if said is None else said), [fd.fileno()] * fds)


NO_BOXES: dict[str, tuple[Callable[[], OwnedFd], str]] = {
    "nothing in it": (nothing_came, "the box is empty"),
    "an empty packet": (lambda: packet(b""), "the box is empty"),
    "some packet": (lambda: packet(b"hello"), "not a box"),
    "a large packet": (lambda: packet(bytes(MAX_PACKET_BYTES)), "not a box"),
    "a packet over the limit": (lambda: packet(bytes(MAX_PACKET_BYTES + 1)), "not a box"),
    "a bulk packet": (lambda: packet(encode_bulk(7)), "not a box"),
    "another magic": (lambda: packet(head(FLAT, 0, magic=b"luodbox2")), "not a box"),
    "a head cut off": (lambda: packet(head(FLAT, 0)[:-1]), "not a box"),
    "a layout of later": (lambda: packet(head(9, 0)), "layout 9"),
    "an inner box": (lambda: inner(1), "layout 2"),
    "fewer fds than said": (lambda: inner(1, 2, FLAT), "holds 1 fds, its head says 2"),
    "more fds than said": (lambda: inner(2, 1, FLAT), "holds 2 fds, its head says 1"),
    "more than any box holds": (lambda: packet(head(NESTED, 2**32 - 1)), "at most 63756"),
    "a manifest too short": (lambda: packet(head(FLAT, 0, 5) + b"1234"), "has 4 bytes, the head says 5"),
    "a manifest too long": (lambda: packet(head(FLAT, 0, 5) + b"123456"), "has 6 bytes, the head says 5"),
    "a manifest's memfd missing": (lambda: packet(head(FLAT | IN_MEMFD, 0, 5)), "memfd is missing"),
    "a manifest in what is no memfd": (lambda: with_memfd(eventfd(), 5), "isn't a memfd"),
    "a manifest that may change": (lambda: with_memfd(memfd(b"12345"), 5), "must have the seals"),
    "a manifest of another size": (lambda: with_memfd(seal_bytes(b"1234", "m"), 5), "has 4 bytes"),
    "an inner box missing": (lambda: nesting([inner(253)], 254), "number 1 is missing"),
    "no box inside": (lambda: nesting([packet(b"hello")], 1), "not a box"),
    "a whole box inside": (lambda: nesting([inner(1, layout=FLAT)], 1), "an inner box isn't one"),
    "an inner box with fewer": (lambda: nesting([inner(253), inner(1)], 255), "holds 1 fds, its head says 2"),
    "an inner box with more": (lambda: nesting([inner(253), inner(2)], 254), "holds 2 fds, its head says 1"),
}


@pytest.mark.parametrize("name", NO_BOXES)
def test_what_is_no_box_is_a_fault_and_stays_as_it_was(name: str) -> None:
    make, words = NO_BOXES[name]
    with make() as wrong:
        before = in_flight(wrong.fileno())
        for _ in range(3):
            with pytest.raises(BoxFault, match=words):
                box.look(wrong.fileno())
        assert in_flight(wrong.fileno()) == before


def test_an_empty_box_whose_other_end_is_there() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for call in (box.look, box.manifest_of):
            with pytest.raises(BoxFault, match="the box is empty"):
                call(ours.fileno())


@pytest.mark.parametrize("make", [memfd, eventfd, lambda: OwnedFd(os.open("/", os.O_RDONLY | os.O_CLOEXEC))])
def test_what_is_no_socket_is_an_error_and_nothing_is_left(make: Callable[[], OwnedFd]) -> None:
    with make() as wrong:
        for call in (box.look, box.manifest_of):
            with pytest.raises(OSError, match=f"Errno {errno.ENOTSOCK}"):
                call(wrong.fileno())


def test_what_was_looked_into_is_still_open() -> None:
    """The box is borrowed, also when it isn't one."""
    with memfd(b"0") as one, box.seal(b"", [one.fileno()]) as sealed, nothing_came() as wrong:
        with looked(sealed) as found:
            assert same_file(found[0], one.fileno())
        with pytest.raises(BoxFault):
            box.look(wrong.fileno())
        for each in (sealed, wrong):
            assert fcntl.fcntl(each.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
