"""The soak's client processes: as many as are wanted, of each user, and what they tell."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self

import attrs

from luod_protocol import wire
from luod_protocol.wire import Packet
from processes import Client, Talk, User, spawn_client
from soak.client import Orders
from soak.hosts import Host
from soak.model import Asker

THREADS: Final = 4
"""Clients in one process."""


def play(talk: Talk, tellings: int, orders: dict[str, Any]) -> None:
    """The parent of a user's client processes."""
    from soak.client import nurse

    nurse(talk, tellings, orders)


@attrs.define(kw_only=True)
class Member:
    """A client process: its parent, its pid as luod sees it, and its uid."""

    parent: Client
    pid: int = 0
    uid: int = 0
    ending: bool = False


class Crew:
    """See the module's text; use it as a context manager.

    Args:
        host: where luod is.
        seed: of all that is random.
        processes: how many there are to be.
        enough: sessions from which on clients rather take than make.
    """

    def __init__(self, host: Host, *, seed: int, processes: int, enough: int) -> None:
        self._host = host
        self._seed = seed
        self._enough = enough
        self._wanted = processes
        self._dice = random.Random(f"{seed} crew")
        self._ending = ExitStack()
        self._parents: list[Client] = []
        self._members: dict[int, Member] = {}
        self._started = 0
        self._markers = 0
        self._hear, self._tell = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def __enter__(self) -> Self:
        try:
            for end in (self._hear, self._tell):
                self._ending.enter_context(end)
            self._parents = [self._parent(user) for user in self._host.users]
        except BaseException:
            self._ending.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.__exit__(kind, error, trace)

    def _parent(self, user: User | None) -> Client:
        orders = Orders(
            seed=self._seed,
            where=self._host.where,
            threads=THREADS,
            large=user is None and os.geteuid() == 0,
            enough=self._enough,
            require=self._host.require,
        )
        told, fd, within = attrs.asdict(orders), self._tell.fileno(), self._host.within
        return self._ending.enter_context(spawn_client(play, fd, told, user=user, pass_fds=[fd], dev=False, within=within))

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self._members)

    def member(self, asker: Asker) -> Member:
        """The process of a client."""
        return self._members[asker[0]]

    def man(self) -> None:
        """Have as many as are wanted."""
        while sum(not member.ending for member in self._members.values()) < self._wanted:
            self._started += 1
            parent = self._parents[self._started % len(self._parents)]
            self._members[self._started] = Member(parent=parent)
            parent.tell(("start", self._started))

    def end(self, sig: signal.Signals) -> None:
        """End one of them; that it has ended is told."""
        staying = [number for number, member in self._members.items() if not member.ending]
        if staying:
            number = self._dice.choice(staying)
            self._members[number].ending = True
            self._members[number].parent.tell((int(sig), number))

    def end_all(self, signals: Sequence[signal.Signals]) -> None:
        """End all of them, by these signals in turn."""
        for count in range(len(self._members)):
            self.end(signals[count % len(signals)])

    def buried(self, number: int) -> int:
        """One has ended. Its pid."""
        return self._members.pop(number).pid

    def tellings(self, limit_s: float) -> Generator[Packet]:
        """What was told by now; waits for so many seconds for the first."""
        if limit_s and not select.select([self._hear], [], [], limit_s)[0]:
            return
        self._markers += 1
        marker = b"told %d" % self._markers
        sent = False
        while True:
            if not sent:
                try:
                    wire.send(self._tell, marker, flags=socket.MSG_DONTWAIT)
                    sent = True
                except BlockingIOError:  # it is full
                    pass
            packet = wire.receive(self._hear)
            assert packet is not None, "this process has the other end as well"
            if packet.data == marker:
                return
            if packet.data.startswith(b"told "):
                continue  # of a time when what was told was wrong
            yield packet
