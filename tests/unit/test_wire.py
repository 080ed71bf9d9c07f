"""Packets and their fds over real socket pairs, blocking and trio's."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress

import pytest
import trio
import trio.testing

from luod_protocol import wire
from luod_protocol.codec import encode_bulk, pack
from luod_protocol.errors import Code, FaultCode, ProtocolFault, Refusal
from luod_protocol.fds import OwnedFd, close_all, duplicate
from luod_protocol.limits import MAX_BULK_BYTES, MAX_FDS_PER_PACKET, MAX_PACKET_BYTES
from luod_protocol.sealed import SEALS, seal_bytes
from processes import Talk, spawn_client
from things import eventfd, let_go, memfd, pipe, same_file, unix_pair

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two connected SEQPACKET sockets."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


class Blocking:
    """The calls for blocking sockets, awaited like the others."""

    async def send(self, sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
        wire.send(sock, data, fds)

    async def receive(self, sock: socket.socket, *, resets: bool = False) -> wire.Packet | None:
        return wire.receive(sock, resets=resets)


class Trio:
    """The calls for trio's sockets."""

    async def send(self, sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
        with trio.socket.from_stdlib_socket(sock.dup()) as mine:
            await wire.send_async(mine, data, fds)

    async def receive(self, sock: socket.socket, *, resets: bool = False) -> wire.Packet | None:
        with trio.socket.from_stdlib_socket(sock.dup()) as mine:
            return await wire.receive_async(mine, resets=resets)


@pytest.fixture(params=[Blocking, Trio])
def calls(request: pytest.FixtureRequest) -> Blocking | Trio:
    """Both ways to send and receive."""
    made: Blocking | Trio = request.param()
    return made


async def packet_of(calls: Blocking | Trio, sock: socket.socket) -> wire.Packet:
    """The next packet, which must come."""
    packet = await calls.receive(sock)
    assert packet is not None
    return packet


async def fault_of(calls: Blocking | Trio, sock: socket.socket) -> ProtocolFault:
    """The fault that receiving must end with."""
    with pytest.raises(ProtocolFault) as caught:
        await calls.receive(sock)
    return caught.value


def raw_send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """What a client may send that doesn't use our code."""
    socket.send_fds(sock, [data], list(fds))


async def test_a_message_comes_as_it_was_sent(pair: Pair, calls: Blocking | Trio) -> None:
    for data in (b"x", bytes(MAX_PACKET_BYTES), pack(["bulk"]), bytes(range(256))):
        await calls.send(pair[0], data)
        with await packet_of(calls, pair[1]) as packet:
            assert packet.data == data
            assert packet.fds == []


@pytest.mark.parametrize("count", [1, 2, MAX_FDS_PER_PACKET])
async def test_fds_come_in_order_and_close_on_exec(pair: Pair, calls: Blocking | Trio, count: int) -> None:
    with memfd() as even, memfd() as odd:
        sent = [(even, odd)[number % 2].fileno() for number in range(count)]
        await calls.send(pair[0], b"fds", sent)
        with await packet_of(calls, pair[1]) as packet:
            assert len(packet.fds) == count
            for came, went in zip(packet.fds, sent, strict=True):
                assert same_file(came.fileno(), went)
                assert came.fileno() not in sent
                assert fcntl.fcntl(came.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


async def test_one_fd_too_many_is_not_sent(pair: Pair, calls: Blocking | Trio) -> None:
    with eventfd() as fd:
        with pytest.raises(OSError, match=f"Errno {errno.EINVAL}"):
            await calls.send(pair[0], b"fds", [fd.fileno()] * (MAX_FDS_PER_PACKET + 1))
        await calls.send(pair[0], b"next")
        with await packet_of(calls, pair[1]) as packet:
            assert packet.data == b"next"


async def test_packets_keep_their_order_and_bounds(pair: Pair, calls: Blocking | Trio) -> None:
    for number in range(20):
        await calls.send(pair[0], b"%d" % number * 10)
    for number in range(20):
        with await packet_of(calls, pair[1]) as packet:
            assert packet.data == b"%d" % number * 10


async def test_a_packet_closes_what_nobody_took(pair: Pair, calls: Blocking | Trio) -> None:
    with pipe() as (taken, first), pipe() as (left, second):
        await calls.send(pair[0], b"a", [first.fileno()])
        await calls.send(pair[0], b"b", [second.fileno()])
        first.close()
        second.close()
        with await packet_of(calls, pair[1]) as packet:
            kept = packet.take_fds()
            assert packet.fds == []
        (await packet_of(calls, pair[1])).close()
        assert let_go(left)
        assert not let_go(taken, 0)
        close_all(kept)


# ---- the end


async def test_the_end_is_none(pair: Pair, calls: Blocking | Trio) -> None:
    await calls.send(pair[0], b"last")
    pair[0].close()
    with await packet_of(calls, pair[1]) as packet:
        assert packet.data == b"last"
    assert await calls.receive(pair[1]) is None
    assert await calls.receive(pair[1]) is None


async def test_an_empty_packet_is_the_end_and_its_fds_are_closed(pair: Pair, calls: Blocking | Trio) -> None:
    with pipe() as (read, write):
        raw_send(pair[0], b"", [write.fileno()])
        write.close()
        assert await calls.receive(pair[1]) is None
        assert let_go(read)


async def test_a_peer_that_died_with_our_message_unread_is_at_its_end(pair: Pair, calls: Blocking | Trio) -> None:
    await calls.send(pair[1], b"unread")
    pair[0].close()
    assert await calls.receive(pair[1]) is None


async def test_what_such_a_peer_had_sent_can_still_be_read(pair: Pair, calls: Blocking | Trio) -> None:
    with eventfd() as fd:
        await calls.send(pair[1], b"unread")
        await calls.send(pair[0], b"last words", [fd.fileno()])
        pair[0].close()
        packet = await calls.receive(pair[1], resets=True)
        assert packet is not None
        with packet:
            assert packet.data == b"last words"
            assert len(packet.fds) == 1
        assert await calls.receive(pair[1], resets=True) is None


async def test_sending_to_nobody_is_an_error_and_no_signal(pair: Pair, calls: Blocking | Trio) -> None:
    pair[1].close()
    for size in (1, MAX_PACKET_BYTES + 1):
        with pytest.raises(BrokenPipeError):
            await calls.send(pair[0], bytes(size))


def fill(sock: socket.socket) -> int:
    """Send until no more is taken; how many packets were."""
    sent = 0
    with suppress(BlockingIOError):
        while True:
            wire.send(sock, bytes(MAX_PACKET_BYTES), flags=socket.MSG_DONTWAIT)
            sent += 1
    return sent


def test_a_full_socket_takes_nothing(pair: Pair) -> None:
    assert fill(pair[0]) > 0
    with pytest.raises(BlockingIOError):  # as bulk, whose memfd must not stay
        wire.send(pair[0], bytes(MAX_PACKET_BYTES * 2), flags=socket.MSG_DONTWAIT)


# ---- too much


async def test_a_packet_over_the_limit_is_a_fault_and_its_fds_are_closed(pair: Pair, calls: Blocking | Trio) -> None:
    with pipe() as (read, write):
        raw_send(pair[0], bytes(MAX_PACKET_BYTES + 1), [write.fileno()])
        write.close()
        assert (await fault_of(calls, pair[1])).code is FaultCode.PACKET_TOO_LARGE
        assert let_go(read)
    await calls.send(pair[0], b"next")
    with await packet_of(calls, pair[1]) as packet:
        assert packet.data == b"next"


def receive_at_the_limit(talk: Talk, number: int, free: int) -> None:
    """Receive from the socket `number`: with both calls and room for `free` more descriptors, then with room for all."""
    import socket

    import trio

    from luod_protocol import wire
    from luod_protocol.errors import ProtocolFault
    from unit.limited import open_fds, room_for

    async def receive_async() -> None:
        with trio.socket.from_stdlib_socket(sock.dup()) as mine:
            before = open_fds()
            try:
                with room_for(free):
                    await wire.receive_async(mine)
            except ProtocolFault as error:
                talk.tell((str(error.code), error.message, open_fds() - before))

    with socket.socket(fileno=number) as sock:
        before = open_fds()
        try:
            with room_for(free):
                wire.receive(sock)
        except ProtocolFault as error:
            talk.tell((str(error.code), error.message, open_fds() - before))
        trio.run(receive_async)
        packet = wire.receive(sock)
        assert packet is not None
        with packet:
            talk.tell((packet.data, len(packet.fds)))


@pytest.mark.parametrize("free", [0, 1, 3])
def test_fds_that_do_not_fit_are_a_fault_and_none_is_kept(pair: Pair, free: int) -> None:
    with pipe() as (read, write):
        for data in (b"sync", b"trio"):
            wire.send(pair[0], data, [write.fileno()] * 5)
        wire.send(pair[0], b"next", [write.fileno()] * 5)
        write.close()
        with spawn_client(receive_at_the_limit, pair[1].fileno(), free, pass_fds=[pair[1].fileno()]) as client:
            for _ in range(2):
                code, message, leaked = client.hear()
                assert code == FaultCode.TRUNCATED
                assert f"only {free} of the fds arrived" in message
                assert "RLIMIT_NOFILE" in message
                assert leaked == 0
            assert client.hear() == (b"next", 5)
        assert let_go(read)


# ---- bulk


@pytest.mark.parametrize("size", [MAX_PACKET_BYTES + 1, 1_000_000, MAX_BULK_BYTES])
@pytest.mark.parametrize("fds", [0, 2, MAX_FDS_PER_PACKET - 1])
async def test_a_large_message_comes_as_it_was_sent(pair: Pair, calls: Blocking | Trio, size: int, fds: int) -> None:
    data = os.urandom(1000) * (size // 1000) + bytes(size % 1000)
    with eventfd() as fd:
        await calls.send(pair[0], data, [fd.fileno()] * fds)
        with await packet_of(calls, pair[1]) as packet:
            assert packet.data == data
            assert len(packet.fds) == fds
            assert all(same_file(came.fileno(), fd.fileno()) for came in packet.fds)


async def test_a_large_message_leaves_room_for_one_fd_fewer(pair: Pair, calls: Blocking | Trio) -> None:
    with eventfd() as fd:
        with pytest.raises(Refusal, match="one fd fewer") as caught:
            await calls.send(pair[0], bytes(MAX_PACKET_BYTES + 1), [fd.fileno()] * MAX_FDS_PER_PACKET)
        assert caught.value.code is Code.TOO_LARGE


async def test_a_message_can_be_too_large_for_bulk(pair: Pair, calls: Blocking | Trio) -> None:
    with pytest.raises(Refusal, match="split it") as caught:
        await calls.send(pair[0], bytes(MAX_BULK_BYTES + 1))
    assert caught.value.code is Code.TOO_LARGE


SIZE = 100


def reopened(flags: int) -> OwnedFd:
    """A sealed memfd of SIZE bytes, opened with `flags`."""
    with seal_bytes(bytes(SIZE), "bulk") as sealed:
        return OwnedFd(os.open(f"/proc/self/fd/{sealed.fileno()}", flags | os.O_CLOEXEC))


def sealed_but(missing: int) -> OwnedFd:
    """A memfd of SIZE bytes with all seals but one."""
    fd = memfd(bytes(SIZE))
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, SEALS & ~missing)
    return fd


def tmpfs_file() -> OwnedFd:
    """A file that answers F_GETSEALS as a memfd does."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.write(bytes(SIZE))
        file.flush()
        return duplicate(file.fileno())


def one_end() -> OwnedFd:
    """An end of a socket pair that nobody writes to: reading it would hang."""
    ours, theirs = unix_pair()
    theirs.close()
    return OwnedFd(ours.detach())


@contextmanager
def bulk(pair: Pair, said: int, make: Callable[[], OwnedFd]) -> Generator[OwnedFd]:
    """A bulk packet, with the fd that `make` makes and a pipe's end to write on the way; yields the end to read."""
    with make() as fd, pipe() as (read, write):
        raw_send(pair[0], encode_bulk(said), [fd.fileno(), write.fileno()])
        fd.close()
        write.close()
        yield read


HOSTILE: dict[str, tuple[int, Callable[[], OwnedFd], str]] = {
    "unsealed": (SIZE, lambda: memfd(bytes(SIZE)), "must have the seals"),
    "not sealed against seals": (SIZE, lambda: sealed_but(fcntl.F_SEAL_SEAL), "must have the seals"),
    "not sealed against shrinking": (SIZE, lambda: sealed_but(fcntl.F_SEAL_SHRINK), "must have the seals"),
    "not sealed against growing": (SIZE, lambda: sealed_but(fcntl.F_SEAL_GROW), "must have the seals"),
    "not sealed against writing": (SIZE, lambda: sealed_but(fcntl.F_SEAL_WRITE), "must have the seals"),
    "larger than said": (SIZE - 1, lambda: seal_bytes(bytes(SIZE), "bulk"), f"has {SIZE} bytes"),
    "smaller than said": (SIZE + 1, lambda: seal_bytes(bytes(SIZE), "bulk"), f"has {SIZE} bytes"),
    "empty": (SIZE, lambda: seal_bytes(b"", "bulk"), "has 0 bytes"),
    "opened for writing only": (SIZE, lambda: reopened(os.O_WRONLY), "isn't a memfd"),
    "only a place": (SIZE, lambda: reopened(os.O_PATH), "isn't a memfd"),
    "a file in memory": (SIZE, tmpfs_file, "isn't a memfd"),
    "a device": (SIZE, lambda: OwnedFd(os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)), "isn't a memfd"),
    "a directory": (SIZE, lambda: OwnedFd(os.open("/", os.O_RDONLY | os.O_CLOEXEC)), "isn't a memfd"),
    "an eventfd": (SIZE, eventfd, "isn't a memfd"),
    "a socket": (SIZE, one_end, "isn't a memfd"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_bulk_is_a_fault_and_all_fds_are_closed(pair: Pair, calls: Blocking | Trio, name: str) -> None:
    said, make, words = HOSTILE[name]
    with bulk(pair, said, make) as read:
        error = await fault_of(calls, pair[1])
        assert let_go(read)
    assert error.code is FaultCode.MALFORMED
    assert words in error.message
    await calls.send(pair[0], b"next")
    with await packet_of(calls, pair[1]) as packet:
        assert packet.data == b"next"


async def test_bulk_that_says_too_much_is_a_fault_before_it_is_read(pair: Pair, calls: Blocking | Trio) -> None:
    for size in (MAX_BULK_BYTES + 1, 2**64 - 1, 0):
        with bulk(pair, size, lambda: seal_bytes(bytes(SIZE), "bulk")) as read:
            assert (await fault_of(calls, pair[1])).code is FaultCode.PACKET_TOO_LARGE
            assert let_go(read)


async def test_bulk_without_its_fd_is_a_fault(pair: Pair, calls: Blocking | Trio) -> None:
    raw_send(pair[0], encode_bulk(SIZE))
    assert (await fault_of(calls, pair[1])).code is FaultCode.FD_COUNT


async def test_bulk_with_more_fields_is_a_fault(pair: Pair, calls: Blocking | Trio) -> None:
    raw_send(pair[0], pack({"type": "bulk", "size": SIZE, "more": 1}))
    assert (await fault_of(calls, pair[1])).code is FaultCode.MALFORMED


async def test_bulk_within_bulk_is_no_more_than_its_bytes(pair: Pair, calls: Blocking | Trio) -> None:
    inside = encode_bulk(SIZE)
    with bulk(pair, len(inside), lambda: seal_bytes(inside, "bulk")), await packet_of(calls, pair[1]) as packet:
        assert packet.data == inside
        assert len(packet.fds) == 1


# ---- cancellation


async def test_a_cancelled_receive_takes_nothing(pair: Pair) -> None:
    with trio.socket.from_stdlib_socket(pair[1].dup()) as theirs, eventfd() as fd:
        async with trio.open_nursery() as nursery:
            waiting = trio.CancelScope()

            async def wait() -> None:
                with waiting:
                    await wire.receive_async(theirs)

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            waiting.cancel()
        assert waiting.cancelled_caught
        wire.send(pair[0], b"whole", [fd.fileno()])
        with trio.CancelScope() as scope:
            scope.cancel()
            await wire.receive_async(theirs)
        assert scope.cancelled_caught
        packet = await wire.receive_async(theirs)
        assert packet is not None
        with packet:
            assert packet.data == b"whole"
            assert len(packet.fds) == 1


async def test_a_cancelled_send_sends_nothing(pair: Pair) -> None:
    full = fill(pair[0])
    with trio.socket.from_stdlib_socket(pair[0].dup()) as ours:
        for data in (b"never", bytes(MAX_PACKET_BYTES * 2)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wire.send_async, ours, data)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
    pair[0].close()
    came = 0
    while packet := await Trio().receive(pair[1]):
        assert packet.data == bytes(MAX_PACKET_BYTES)
        came += 1
    assert came == full
