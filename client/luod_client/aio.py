"""The trio client: the names of `luod_client`, with `async`.

Arguments, results and errors are those of the blocking client, see there. Each request is a checkpoint. Several tasks may use one
connection: their requests go one after the other.

Cancelled in the middle of a request, the connection is closed, since what became of the request is unknown: an open session is rolled
back, a claim released; after `finalize` and `finish`, `show` by id tells. Cancelled before it began, nothing happened.
"""

from __future__ import annotations

import os
import select
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, closing
from typing import Final, Self, TypeVar

import trio

from luod_client.operations import Conversation, Steps
from luod_client.transport import NoDaemon as NoDaemon
from luod_client.transport import address, blame, end, new_socket, not_connected
from luod_protocol import messages as m
from luod_protocol.errors import Disconnected, Refusal
from luod_protocol.fds import OwnedFd
from luod_protocol.limits import SESSION_ID_BYTES
from luod_protocol.messages import Endpoint
from luod_protocol.wire import receive_async, send_async

T = TypeVar("T")

_AGAIN_SECONDS: Final = 0.001


class _Link:
    """A socket and the conversation on it."""

    def __init__(self, endpoint: Endpoint, sock: trio.socket.SocketType) -> None:
        self.talk = Conversation(endpoint)
        self._sock = sock
        self._turn = trio.Lock()

    def close(self) -> None:
        end(self._sock)

    async def run(self, steps: Steps[T]) -> T:
        with closing(steps):
            async with self._turn:
                if self._sock.fileno() == -1:
                    raise Disconnected("this connection is closed: open another")
                try:
                    return await self._drive(steps)
                except Refusal:
                    raise
                except trio.ClosedResourceError:
                    raise Disconnected("this connection was closed while a request was under way: what became of it is unknown") from None
                except BaseException:
                    self.close()
                    raise

    async def notice(self) -> m.Notice | None:
        """The next notice; requests go first, and what comes with their answers counts."""
        while not self.talk.has_notice:
            if self._sock.fileno() == -1:
                return None
            try:
                await trio.lowlevel.wait_readable(self._sock)
            except trio.ClosedResourceError:
                return None
            async with self._turn:
                # A request's answer is what came, and its task has read it.
                if not self.talk.has_notice and self._sock.fileno() != -1 and not self._is_readable():
                    continue
            break
        return await self.run(self.talk.notice())

    def _is_readable(self) -> bool:
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def _drive(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                packet = None
                try:
                    if step is None:
                        packet = await receive_async(self._sock, resets=True)
                    else:
                        await send_async(self._sock, step.data, step.fds)
                except (OSError, Refusal) as error:
                    step = steps.throw(blame(error, step))
                else:
                    step = steps.send(packet)
        except StopIteration as done:
            result: T = done.value
            return result


async def _connect(endpoint: Endpoint, runtime_dir: str | None) -> _Link:
    path = address(endpoint, runtime_dir)
    sock = new_socket()
    sock.setblocking(False)
    try:
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:
                # unix(7): the backlog is full, and no event tells when it isn't. trio's own connect would take this for under way.
                await trio.sleep(_AGAIN_SECONDS)
            else:
                return _Link(endpoint, trio.socket.from_stdlib_socket(sock))
    except OSError as error:
        sock.close()
        raise not_connected(path, error) from error
    except BaseException:
        sock.close()
        raise


@asynccontextmanager
async def _greeted(endpoint: Endpoint, runtime_dir: str | None) -> AsyncGenerator[_Link, None]:
    with closing(await _connect(endpoint, runtime_dir)) as link:
        await link.run(link.talk.hello())
        yield link


class Connection:
    """A connection to one of luod's endpoints."""

    def __init__(self, link: _Link) -> None:
        self._link = link
        self._talk = link.talk
        self._run = link.run

    async def status(self) -> m.DaemonStatus:
        """How the daemon is."""
        return await self._run(self._talk.status())

    async def capabilities(self) -> m.DaemonCapabilities:
        """The kinds of fds that this daemon takes, and what a finalized session survives."""
        return await self._run(self._talk.capabilities())

    async def update(self) -> m.UpdateStatus:
        """How an update of the kernel is going, or went."""
        return await self._run(self._talk.update())

    def close(self) -> None:
        """End the connection: an open session is rolled back, a claim released. Does nothing the second time."""
        self._link.close()


class Session(Connection):
    """An open session, see `luod_client.Session`."""

    def __init__(self, link: _Link, name: str, session_id: bytes) -> None:
        super().__init__(link)
        self.name = name
        self.id = session_id

    async def preserve(
        self,
        fds: Mapping[str, int],
        *,
        metadata: Mapping[str, bytes] | None = None,
        needs: Mapping[str, Iterable[str]] | None = None,
    ) -> dict[str, m.EntryInfo]:
        """Add entries, see `luod_client.Session.preserve`. The fds must stay open until this returns."""
        return await self._run(self._talk.preserve(fds, metadata or {}, needs or {}))

    async def unpreserve(self, *names: str) -> None:
        """Take entries out again, see `luod_client.Session.unpreserve`."""
        await self._run(self._talk.unpreserve(names))

    async def finalize(self, *, require: Iterable[str] = (), seal: Mapping[str, Iterable[str]] | None = None) -> m.Finalized:
        """Give the session into luod's custody, see `luod_client.Session.finalize`."""
        return await self._run(self._talk.finalize(self.id, require, seal or {}))

    async def notice(self) -> m.Notice | None:
        """The next notice, see `luod_client.Session.notice`. Other tasks can go on with the session meanwhile; cancelled: nothing is
        lost."""
        return await self._link.notice()

    async def cancel(self) -> None:
        """Drop the session; luod has closed its duplicates when this returns."""
        await self._run(self._talk.cancel())


class _Looker(Connection):
    async def list(self, *, owner: int | None = None) -> tuple[m.SessionInfo, ...]:
        """The sessions that this user may see, see `luod_client.Deserializer.list`."""
        return await self._run(self._talk.sessions(owner))

    async def show(self, session: str = "", *, session_id: bytes = b"", owner: int | None = None) -> m.Shown:
        """One session and its entries, by name or by id."""
        return await self._run(self._talk.show(session, session_id, owner))


class Deserializer(_Looker):
    """A connection for looking at sessions and for taking one back at a time."""

    @asynccontextmanager
    async def claim(
        self, session: str = "", *, session_id: bytes = b"", owner: int | None = None, force: bool = False
    ) -> AsyncGenerator[Claim, None]:
        """The exclusive right to a preserved session for a block, see `luod_client.Deserializer.claim`."""
        claim = Claim(self._link, await self._run(self._talk.claim(session, session_id, owner, force)))
        try:
            yield claim
        finally:
            if claim.held:
                try:
                    await claim.release()
                except Disconnected:
                    pass  # the claim ended with the connection
                except BaseException:
                    self.close()  # cancelled before it was sent: this ends the claim as well
                    raise

    async def finish(self, session_id: bytes) -> m.Finished:
        """Say again that the session with this id is finished, see `luod_client.Deserializer.finish`."""
        return await self._run(self._talk.finish(session_id))

    async def discard(self, session: str = "", *, session_id: bytes = b"", owner: int | None = None, force: bool = False) -> m.Discarded:
        """Drop a preserved session that nobody will claim, see `luod_client.Deserializer.discard`."""
        return await self._run(self._talk.discard(session, session_id, owner, force))


class Claim:
    """The right to a session, see `luod_client.Claim`."""

    def __init__(self, link: _Link, claimed: m.Claimed) -> None:
        self._run = link.run
        self._talk = link.talk
        self.held = True
        self.info = claimed.info
        self.metadata = claimed.metadata
        self.entries = {entry.name: entry for entry in claimed.entries}

    async def retrieve(self, *names: str) -> dict[str, OwnedFd]:
        """Fresh duplicates of entries' fds, see `luod_client.Claim.retrieve`. Cancelled: those that came are closed."""
        return await self._run(self._talk.retrieve(names or self.entries))

    async def finish(self) -> m.Finished:
        """luod has let go of every fd of the session when this returns, see `luod_client.Claim.finish`."""
        finished = await self._run(self._talk.finish(self.info.session_id))
        self.held = False
        return finished

    async def release(self) -> None:
        """Give the claim back; the session stays preserved."""
        await self._run(self._talk.release())
        self.held = False


class Control(_Looker):
    """A connection to the daemon itself."""

    async def upgrade(self, program: str = "") -> m.Upgraded:
        """Have luod replaced by a fresh one, see `luod_client.Control.upgrade`. Cancelled: the upgrade goes on."""
        return await self._run(self._talk.upgrade(program))

    async def preflight(self) -> m.PreflightReport:
        """What an update of the kernel would carry, see `luod_client.Control.preflight`."""
        return await self._run(self._talk.preflight())

    async def prepare(self, *, deadline_s: float, leave_behind: Iterable[str] = (), force: bool = False) -> m.UpdateStatus:
        """Begin to prepare for an update of the kernel, see `luod_client.Control.prepare`."""
        return await self._run(self._talk.prepare(deadline_s, leave_behind, force))

    async def freeze(self) -> m.UpdateStatus:
        """Have nothing change until this connection ends, see `luod_client.Control.freeze`."""
        return await self._run(self._talk.freeze())

    async def cancel_update(self, reason: str = "") -> m.UpdateStatus:
        """Have a prepared update undone, see `luod_client.Control.cancel_update`."""
        return await self._run(self._talk.cancel_update(reason))

    async def monitor(self) -> Events:
        """What happens from now on. The connection takes no other request after this."""
        await self._run(self._talk.monitor())
        return Events(self._link)


class Events(AsyncIterator[m.Event]):
    """The events of a monitoring connection; ends when luod does."""

    def __init__(self, link: _Link) -> None:
        self._run = link.run
        self._talk = link.talk

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> m.Event:
        event = await self._run(self._talk.event())
        if event is None:
            raise StopAsyncIteration
        return event


@asynccontextmanager
async def serialize(
    name: str,
    *,
    metadata: bytes = b"",
    session_id: bytes | None = None,
    owner: int | None = None,
    notices: bool = False,
    runtime_dir: str | None = None,
) -> AsyncGenerator[Session, None]:
    """An open session for a block, see `luod_client.serialize`; without `finalize` it is rolled back at the end of the block."""
    with closing(await _connect(Endpoint.SERIALIZE, runtime_dir)) as link:
        session = Session(link, name, os.urandom(SESSION_ID_BYTES) if session_id is None else session_id)
        await link.run(link.talk.open(name, session.id, metadata, owner, notices))
        yield session


@asynccontextmanager
async def deserialize(*, runtime_dir: str | None = None) -> AsyncGenerator[Deserializer, None]:
    """A connection, for a block, to look at sessions and take them back, see `luod_client.deserialize`."""
    async with _greeted(Endpoint.DESERIALIZE, runtime_dir) as link:
        yield Deserializer(link)


@asynccontextmanager
async def control(*, runtime_dir: str | None = None) -> AsyncGenerator[Control, None]:
    """A connection, for a block, to the daemon itself, see `luod_client.control`."""
    async with _greeted(Endpoint.CONTROL, runtime_dir) as link:
        yield Control(link)


async def finalize_again(session_id: bytes, *, runtime_dir: str | None = None) -> m.Finalized:
    """Ask for the answer to a `finalize` whose connection ended before it came, see `luod_client.finalize_again`."""
    async with _greeted(Endpoint.SERIALIZE, runtime_dir) as link:
        return await link.run(link.talk.finalize(session_id, (), {}))
