"""Clients with several requests under way on one connection, and load from them on all endpoints."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from threading import Event, Thread
from typing import Final

import luod_client
from harness import LIMIT_S, readable
from luod_protocol import messages as m
from luod_protocol import wire
from luod_protocol.connection import ClientConnection
from luod_protocol.fds import OwnedFd, close_all
from luod_protocol.messages import Endpoint, EntrySpec
from things import memfd, preserve_pipe

WINDOW: Final = 4
"""Requests that a client of a `Load` has under way."""


class Pipeline:
    """A connection on which requests are sent before earlier ones are answered."""

    def __init__(self, runtime_dir: str, endpoint: Endpoint, *, greet: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(f"{runtime_dir}/{endpoint}")
        self.sock.settimeout(LIMIT_S)
        self._protocol = ClientConnection(endpoint)
        self.seq = self._protocol.next_seq
        self.fds: list[OwnedFd] = []
        if greet:
            self.ask(m.Hello(seq=self.seq(), low=1, high=1))
            self.answers(1)

    def ask(self, request: m.Request, fds: Sequence[int] = ()) -> None:
        wire.send(self.sock, self._protocol.send(request, len(fds)), fds)

    def answers(self, number: int) -> list[m.Reply]:
        """The next answers; each is to the oldest request not yet answered, which `ClientConnection` checks. Their fds are put by."""
        replies: list[m.Reply] = []
        for _ in range(number):
            packet = wire.receive(self.sock)
            assert packet is not None, "luod ended the connection"
            with packet:
                replies.append(self._protocol.receive(packet.data, len(packet.fds)))
                self.fds += packet.take_fds()
        return replies

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        close_all(self.fds)


class Looping(Thread):
    """A client that keeps `WINDOW` requests under way on one connection until it is stopped."""

    def __init__(self, raw: Pipeline, request: Callable[[int], tuple[m.Request, Sequence[int]]]) -> None:
        super().__init__()
        self._raw = raw
        self._request = request
        self._stop_asking = Event()
        self.asked = 0
        self.answered = 0
        self.refused: list[m.Reply] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stop_asking.is_set():
                while self.asked - self.answered < WINDOW:
                    self._raw.ask(*self._request(self.asked))
                    self.asked += 1
                self._take(1)
            self._take(self.asked - self.answered)
        except BaseException as error:
            self.failure = error

    def _take(self, number: int) -> None:
        self.refused += [reply for reply in self._raw.answers(number) if isinstance(reply, m.Refused)]
        self.answered += number
        close_all(self._raw.fds)
        self._raw.fds.clear()

    def stop(self) -> None:
        """Stop asking and wait for the last answers; each request has had exactly one."""
        self._stop_asking.set()
        self.join(LIMIT_S)
        assert not self.is_alive()
        if self.failure is not None:
            raise self.failure
        assert self.refused == []
        assert self.answered == self.asked > WINDOW
        assert not readable(self._raw.sock.fileno(), 0)


class Load:
    """Clients on all endpoints, each with requests under way all the time; leaving the block checks what they have got and done."""

    def __init__(self, runtime_dir: str) -> None:
        self.runtime_dir = runtime_dir
        self._stack = ExitStack()
        self._loops: list[Looping] = []

    def __enter__(self) -> Load:
        where = self.runtime_dir
        preserve_pipe(where, "kept")[0].close()
        ram = self._stack.enter_context(memfd(b"load")).fileno()

        def line(endpoint: Endpoint) -> Pipeline:
            return self._stack.enter_context(Pipeline(where, endpoint))

        def preserve_and_unpreserve(number: int) -> tuple[m.Request, Sequence[int]]:
            # Done twice, either would be refused.
            if number % 2:
                return m.Unpreserve(seq=serializer.seq(), names=("ram",)), ()
            return m.Preserve(seq=serializer.seq(), entries=(EntrySpec(name="ram"),)), [ram]

        def retrieve(_: int) -> tuple[m.Request, Sequence[int]]:
            return m.Retrieve(seq=claimer.seq(), names=("pipe",)), ()

        def claim_and_release(number: int) -> tuple[m.Request, Sequence[int]]:
            if number % 2:
                return m.Release(seq=second.seq()), ()
            return m.Claim(seq=second.seq(), session="also kept", force=True), ()

        def ask_all(number: int) -> tuple[m.Request, Sequence[int]]:
            seq = controller.seq()
            return (m.Status(seq=seq), m.List(seq=seq), m.Capabilities(seq=seq), m.Show(seq=seq, session="kept"))[number % 4], ()

        preserve_pipe(where, "also kept")[0].close()
        serializer, claimer, second, controller = map(
            line, (Endpoint.SERIALIZE, Endpoint.DESERIALIZE, Endpoint.DESERIALIZE, Endpoint.CONTROL)
        )
        self.serializer = serializer
        self.session_id = os.urandom(16)
        serializer.ask(m.Open(seq=serializer.seq(), session="made under load", session_id=self.session_id))
        serializer.answers(1)
        claimer.ask(m.Claim(seq=claimer.seq(), session="kept"))
        claimer.answers(1)
        self._loops = [
            Looping(connection, request)
            for connection, request in (
                (serializer, preserve_and_unpreserve),
                (claimer, retrieve),
                (second, claim_and_release),
                (controller, ask_all),
            )
        ]
        for loop in self._loops:
            loop.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            for loop in self._loops:
                loop.stop()
            if kind is None:
                self.serializer.ask(m.Finalize(seq=self.serializer.seq(), session_id=self.session_id))
                (finalized,) = self.serializer.answers(1)
                assert isinstance(finalized, m.Finalized)
                with luod_client.deserialize(runtime_dir=self.runtime_dir) as looker:
                    assert len(looker.show("made under load").entries) == self._loops[0].asked % 2
