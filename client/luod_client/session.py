"""The blocking client: sessions over plain sockets, without trio.

Each connection is one object; it is for one thread at a time. What goes wrong raises `Refusal` (nothing changed, go on), `ProtocolFault`
or `Disconnected` (the connection is closed), `NoDaemon` (nothing listens). A KeyboardInterrupt in the middle of a request closes the
connection, since what became of the request is unknown. Fds given as `int` are borrowed: luod gets duplicates.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from types import TracebackType
from typing import Self, TypeVar

from luod_client.operations import Conversation, Steps
from luod_client.transport import address, blame, end, new_socket, not_connected
from luod_protocol import messages as m
from luod_protocol.errors import Disconnected, Refusal
from luod_protocol.fds import OwnedFd
from luod_protocol.limits import SESSION_ID_BYTES
from luod_protocol.messages import Endpoint
from luod_protocol.wire import receive, send

T = TypeVar("T")


class _Link:
    """A socket and the conversation on it."""

    def __init__(self, endpoint: Endpoint, runtime_dir: str | None) -> None:
        path = address(endpoint, runtime_dir)
        self.talk = Conversation(endpoint)
        self.sock = new_socket()
        try:
            self.sock.connect(path)
        except OSError as error:
            self.sock.close()
            raise not_connected(path, error) from error

    def close(self) -> None:
        end(self.sock)

    def run(self, steps: Steps[T]) -> T:
        if self.sock.fileno() == -1:
            raise Disconnected("this connection is closed: open another")
        try:
            with closing(steps):
                return self._drive(steps)
        except Refusal:
            raise
        except BaseException:
            self.close()
            raise

    def _drive(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                packet = None
                try:
                    if step is None:
                        packet = receive(self.sock, resets=True)
                    else:
                        send(self.sock, step.data, step.fds)
                except (OSError, Refusal) as error:
                    step = steps.throw(blame(error, step))
                else:
                    step = steps.send(packet)
        except StopIteration as done:
            result: T = done.value
            return result


class Connection:
    """A connection to one of luod's endpoints; leaving its block closes it."""

    def __init__(self, link: _Link) -> None:
        self._link = link
        self._talk = link.talk
        self._run = link.run

    def fileno(self) -> int:
        """The socket, borrowed. Readable while no request is under way, and not monitoring: luod has ended the connection."""
        return self._link.sock.fileno()

    def status(self) -> m.DaemonStatus:
        """How the daemon is."""
        return self._run(self._talk.status())

    def capabilities(self) -> m.DaemonCapabilities:
        """The kinds of fds that this daemon takes, and what a finalized session survives."""
        return self._run(self._talk.capabilities())

    def update(self) -> m.UpdateStatus:
        """How an update of the kernel is going, or went."""
        return self._run(self._talk.update())

    def close(self) -> None:
        """End the connection: an open session is rolled back, a claim released. Does nothing the second time."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Session(Connection):
    """An open session. Leaving its block without `finalize` rolls it back: luod keeps nothing of it.

    Attributes:
        id: 16 bytes; names the session in every later request, and when an answer was lost.
        name: as given.
    """

    def __init__(self, link: _Link, name: str, session_id: bytes) -> None:
        super().__init__(link)
        self.name = name
        self.id = session_id

    def preserve(
        self,
        fds: Mapping[str, int],
        *,
        metadata: Mapping[str, bytes] | None = None,
        needs: Mapping[str, Iterable[str]] | None = None,
    ) -> dict[str, m.EntryInfo]:
        """Add entries: all of them, or none. Any number; they are sent in batches.

        Args:
            fds: name -> borrowed fd; luod gets duplicates and the caller may close its own as soon as this returns.
            metadata: name -> what to keep with the entry, at most 32 KiB each.
            needs: name -> names of entries that must be in the session as well when it is finalized.

        Returns:
            What luod recognized each fd as.

        Raises:
            Refusal: luod refuses one of them, or the kernel refuses to pass it (sendmsg(2) answers EINVAL for an io_uring), or the user
                has too many fds in flight (ETOOMANYREFS, unix(7): can be tried again). `entry` names it where it is about one.
        """
        return self._run(self._talk.preserve(fds, metadata or {}, needs or {}))

    def unpreserve(self, *names: str) -> None:
        """Take entries out again; luod has closed its duplicates when this returns.

        Raises:
            Refusal: one of them isn't in the session; then none was taken out.
        """
        self._run(self._talk.unpreserve(names))

    def finalize(self, *, require: Iterable[str] = (), seal: Mapping[str, Iterable[str]] | None = None) -> m.Finalized:
        """Give the session into luod's custody; it outlives this connection.

        Args:
            require: what it must survive (`daemon-upgrade`, `daemon-crash`, ...), else it is refused.
            seal: name of a memfd entry -> seals to add, F_ADD_SEALS of fcntl(2): `seal`, `shrink`, `grow`, `write`, `future-write`,
                `exec`.

        Returns:
            What it survives.

        Raises:
            Refusal: the session is still open, as it was.
            Disconnected: whether it happened is unknown: `show` by id, or `finalize_again`.
        """
        return self._run(self._talk.finalize(self.id, require, seal or {}))

    def notice(self) -> m.Notice | None:
        """Wait for the next notice that an update of the kernel is coming (`prepare`), or isn't any more (`cancelled`).

        For a session that was opened with `notices`. It can be finalized until the notice's deadline, also with more entries; after that it
        ends with the kernel. `fileno` becomes readable when there is one, unless `has_notice`.

        Returns:
            None when luod has ended the connection.
        """
        return self._run(self._talk.notice())

    @property
    def has_notice(self) -> bool:
        """Whether a notice came with the answer to a request, so that `notice` doesn't wait."""
        return self._talk.has_notice

    def cancel(self) -> None:
        """Drop the session; luod has closed its duplicates when this returns."""
        self._run(self._talk.cancel())


class _Looker(Connection):
    def list(self, *, owner: int | None = None) -> tuple[m.SessionInfo, ...]:
        """The sessions that this user may see, oldest first; for root, all of them or `owner`'s."""
        return self._run(self._talk.sessions(owner))

    def show(self, session: str = "", *, session_id: bytes = b"", owner: int | None = None) -> m.Shown:
        """One session and its entries, by name or by id.

        Raises:
            Refusal: there is none that this user may see.
        """
        return self._run(self._talk.show(session, session_id, owner))


class Deserializer(_Looker):
    """A connection for looking at sessions and for taking one back at a time."""

    def claim(self, session: str = "", *, session_id: bytes = b"", owner: int | None = None, force: bool = False) -> Claim:
        """Take the exclusive right to a preserved session, until `finish`, `release` or the end of the connection.

        Args:
            session: its name, or empty when `session_id` is given.
            owner: whose session: for root, and for whom luod's configuration lets claim it.
            force: also when a process that retrieved from it is still alive.

        Raises:
            Refusal: there is none, somebody else has it, or a process that retrieved from it lives.
        """
        return Claim(self._link, self._run(self._talk.claim(session, session_id, owner, force)))

    def finish(self, session_id: bytes) -> m.Finished:
        """Say again that the session with this id is finished, when the answer to `Claim.finish` was lost.

        Raises:
            Refusal: this luod hasn't finished such a session: claim it first.
        """
        return self._run(self._talk.finish(session_id))

    def discard(self, session: str = "", *, session_id: bytes = b"", owner: int | None = None, force: bool = False) -> m.Discarded:
        """Drop a preserved session that nobody will claim; luod has closed every fd of it when this returns.

        Args:
            force: also when a process that retrieved from it is still alive.

        Raises:
            Refusal: there is none, or somebody has it.
        """
        return self._run(self._talk.discard(session, session_id, owner, force))


class Claim:
    """The right to a session; leaving its block without `finish` releases it, and the session stays preserved.

    Attributes:
        info: the session.
        metadata: what the client that made it left for this one.
        entries: name -> what luod knows of the entry.
    """

    def __init__(self, link: _Link, claimed: m.Claimed) -> None:
        self._run = link.run
        self._talk = link.talk
        self._held = True
        self.info = claimed.info
        self.metadata = claimed.metadata
        self.entries = {entry.name: entry for entry in claimed.entries}

    def retrieve(self, *names: str) -> dict[str, OwnedFd]:
        """Fresh duplicates of entries' fds, in any order, any number of times; in batches.

        Args:
            names: which entries; none for all.

        Returns:
            name -> fd, close-on-exec; the caller owns them.

        Raises:
            Refusal: there is no such entry.
            ProtocolFault: this process has reached its RLIMIT_NOFILE: raise it, or retrieve fewer.
        """
        return self._run(self._talk.retrieve(names or self.entries))

    def finish(self) -> m.Finished:
        """Everything needed has been retrieved: luod has let go of every fd of the session when this returns.

        Raises:
            Disconnected: whether it happened is unknown: `show` by id, or `Deserializer.finish` with the id.
        """
        finished = self._run(self._talk.finish(self.info.session_id))
        self._held = False
        return finished

    def release(self) -> None:
        """Give the claim back; the session stays preserved."""
        self._run(self._talk.release())
        self._held = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._held:
            with suppress(Disconnected):  # the claim ended with the connection
                self.release()


class Control(_Looker):
    """A connection to the daemon itself."""

    def upgrade(self, program: str = "") -> m.Upgraded:
        """Have luod replaced by a fresh one, which answers.

        Args:
            program: the executable to start; empty for the daemon's own.

        Raises:
            Refusal: it failed, with the reason; the old one serves on.
        """
        return self._run(self._talk.upgrade(program))

    def preflight(self) -> m.PreflightReport:
        """What an update of the kernel would carry now, and what not. Changes nothing."""
        return self._run(self._talk.preflight())

    def prepare(self, *, deadline_s: float, leave_behind: Iterable[str] = (), force: bool = False) -> m.UpdateStatus:
        """Begin to prepare for an update of the kernel; `update` tells when all is prepared.

        Args:
            deadline_s: how long to wait for open sessions to be finalized, in seconds.
            leave_behind: names, or ids in hexadecimal, of sessions that may end with this kernel.
            force: all that can't travel may.

        Raises:
            Refusal: something can't travel, or nothing can; nothing was begun.
        """
        return self._run(self._talk.prepare(deadline_s, leave_behind, force))

    def freeze(self) -> m.UpdateStatus:
        """Have nothing change until this connection ends: for whoever reboots now.

        Raises:
            Refusal: `update-running`: not this moment, ask again.
        """
        return self._run(self._talk.freeze())

    def cancel_update(self, reason: str = "") -> m.UpdateStatus:
        """Have a prepared update undone; everything is as before when this returns.

        Args:
            reason: what `update` shall tell.
        """
        return self._run(self._talk.cancel_update(reason))

    def monitor(self) -> Iterator[m.Event]:
        """What happens from now on; ends when luod does. The connection takes no other request after this."""
        self._run(self._talk.monitor())
        return self._events()

    def _events(self) -> Iterator[m.Event]:
        while (event := self._run(self._talk.event())) is not None:
            yield event


def serialize(
    name: str,
    *,
    metadata: bytes = b"",
    session_id: bytes | None = None,
    owner: int | None = None,
    notices: bool = False,
    runtime_dir: str | None = None,
) -> Session:
    """Connect, and open a session. Use it as a context manager.

    Args:
        name: of the session: 1 to 255 printable ASCII characters without `:`.
        metadata: kept with the session, at most 32 KiB.
        session_id: 16 bytes, unique for ever; None: random.
        owner: for root: the uid that shall own it.
        notices: whether to be told of an update of the kernel while the session is open, see `Session.notice`.
        runtime_dir: where luod is; None: /run/luod for root, else $XDG_RUNTIME_DIR/luod.

    Raises:
        NoDaemon: nothing listens there.
        Refusal: the name is bad or in use, or there is no place to look.
    """
    link = _Link(Endpoint.SERIALIZE, runtime_dir)
    session = Session(link, name, os.urandom(SESSION_ID_BYTES) if session_id is None else session_id)
    with _closed_on_error(link):
        link.run(link.talk.open(name, session.id, metadata, owner, notices))
    return session


def deserialize(*, runtime_dir: str | None = None) -> Deserializer:
    """Connect, to look at sessions and take them back. Arguments and errors as `serialize`."""
    return Deserializer(_greeted(Endpoint.DESERIALIZE, runtime_dir))


def control(*, runtime_dir: str | None = None) -> Control:
    """Connect to the daemon itself: its owner only. Arguments and errors as `serialize`."""
    return Control(_greeted(Endpoint.CONTROL, runtime_dir))


def finalize_again(session_id: bytes, *, runtime_dir: str | None = None) -> m.Finalized:
    """Ask for the answer to a `finalize` whose connection ended before it came.

    Raises:
        Refusal: no such session was finalized: its client's end rolled it back.
    """
    with closing(_greeted(Endpoint.SERIALIZE, runtime_dir)) as link:
        return link.run(link.talk.finalize(session_id, (), {}))


def _greeted(endpoint: Endpoint, runtime_dir: str | None) -> _Link:
    link = _Link(endpoint, runtime_dir)
    with _closed_on_error(link):
        link.run(link.talk.hello())
    return link


@contextmanager
def _closed_on_error(link: _Link) -> Generator[None]:
    try:
        yield
    except BaseException:
        link.close()
        raise
