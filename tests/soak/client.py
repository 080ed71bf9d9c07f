"""Client processes of the soak: in each some threads that make and take back sessions at random, and tell everything.

What they tell goes to one socket, which all processes share, before each question and after each answer: `soak.course` hears it. The
other ends of what they preserve go there too, for who watches them must live longer than a client that can be killed at any moment.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import threading
import time
import traceback
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

import attrs

import luod_client
from luod_client import Code, Deserializer, Disconnected, NoDaemon, Refusal, Session
from luod_protocol import wire
from luod_protocol.errors import ProtocolFault
from luod_protocol.fds import OwnedFd, close_all
from processes import Talk
from soak.contents import emptied, fault, make, who
from soak.plan import ID_BYTES, Entry, is_large, plan
from soak.plan import fault as described_wrong

PATIENCE_S: Final = 0.25
"""How long a client may do nothing in the middle of something, in seconds."""

NICE: Final = 10
"""Clients leave processor time for the luod that starts."""

_PR_SET_PDEATHSIG: Final = 1


@attrs.frozen(kw_only=True)
class Orders:
    """What client processes are told.

    Attributes:
        seed: of the soak.
        where: the runtime directory.
        threads: how many clients one process is.
        large: whether large sessions are wanted.
        enough: sessions from which on they rather take than make.
        require: what finalize is to demand.
    """

    seed: int
    where: str
    threads: int
    large: bool
    enough: int
    require: tuple[str, ...]


class Broken(Exception):
    """Something came back that isn't what it was."""


def nurse(talk: Talk, tellings: int, orders: dict[str, Any]) -> None:
    """Make client processes as told, `("start", number)`, and end them, `(signal, number)`, until there is no more to hear.

    They are forked, for a fresh interpreter would take longer to start than most of them live.
    """
    told = Orders(**orders)
    os.set_inheritable(tellings, False)
    pids: dict[int, int] = {}
    with socket.socket(fileno=tellings) as sock:
        try:
            while True:
                what, number = talk.hear(1e6)
                if what == "start":
                    pids[number] = _forked(told, number, sock, talk)
                    continue
                pid = pids.pop(number)
                os.kill(pid, what)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                wire.send(sock, repr(("ended", (number, 0), 0.0, b"", (what, code))).encode())
        finally:
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _forked(orders: Orders, number: int, sock: socket.socket, talk: Talk) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        talk.close()
        os.nice(NICE)
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
        clients = [threading.Thread(target=_Client(orders, (number, place), sock, stop).live) for place in range(orders.threads)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        code = 0
    finally:
        os._exit(code)


class _Client:
    def __init__(self, orders: Orders, asker: tuple[int, int], sock: socket.socket, stop: threading.Event) -> None:
        self._orders = orders
        self._asker = asker
        self._sock = sock
        self._stop = stop
        self._dice = random.Random(f"{orders.seed} {self._asker}")
        self._where = orders.where
        self._session_id = b""
        self._asked_at = 0.0
        self._connected_at = 0.0
        self._verb = ""
        self._number_there = orders.enough

    def _tell(self, what: str, *values: object, fds: Sequence[int] = ()) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # nobody listens any more
            wire.send(self._sock, repr((what, self._asker, self._asked_at, self._session_id, values)).encode(), fds)

    def _ask(self, verb: str) -> None:
        """Say what is asked next, and for which session."""
        self._verb, self._asked_at = verb, time.monotonic()
        self._tell(f"{verb}?")

    def live(self) -> None:
        self._tell("hello", os.getpid(), os.geteuid())
        try:
            while not self._stop.is_set():
                self._session_id = b""
                self._connected_at = time.monotonic()
                try:
                    self._play()
                except Refusal as refusal:
                    self._tell("refused", self._verb, refusal.code.value, refusal.message)
                except (Disconnected, NoDaemon, ProtocolFault) as error:
                    self._tell("lost", self._verb, self._connected_at, f"{type(error).__name__}: {error}")
                    self._stop.wait(self._dice.random() * 0.1)
        except Broken as error:
            self._tell("broken", str(error))
        except BaseException:
            self._tell("broken", traceback.format_exc())

    def _play(self) -> None:
        if self._dice.random() < 1.4 - self._number_there / self._orders.enough:
            self._make()
        else:
            self._take()

    def _idle(self, connection: Session | Deserializer) -> None:
        """Now and then do nothing for a while, or ask how luod is."""
        if self._dice.random() < 0.1:
            self._stop.wait(self._dice.random() * PATIENCE_S)
        if self._dice.random() < 0.2:
            self._ask("status")
            status = connection.status()
            self._tell("status", status.generation, status.pid)
            self._number_there = status.sessions_preserved

    # ---- make a session

    def _make(self) -> None:
        session_id = self._dice.randbytes(ID_BYTES)
        if is_large(session_id) and not self._orders.large:
            session_id = b"\xff" + session_id[1:]
        self._session_id = session_id
        whole = plan(session_id)
        self._ask("open")
        with luod_client.serialize(whole.name, metadata=whole.metadata, session_id=session_id, runtime_dir=self._where) as session:
            self._tell("open")
            entries = list(whole.entries)
            while entries:
                count = self._dice.randrange(1, len(entries) + 1)
                self._preserve(session, entries[:count])
                del entries[:count]
                self._idle(session)
                if self._dice.random() < 0.03:
                    session.close()
                    self._tell("left")
                    return
            others = [entry.name for entry in whole.entries if not entry.kept]
            if others:
                self._ask("unpreserve")
                session.unpreserve(*others)
                self._tell("unpreserve", others)
            if self._dice.random() < 0.05:
                self._ask("cancel")
                session.cancel()
                self._tell("cancel")
                return
            self._ask("finalize")
            session.finalize(require=self._orders.require, seal={entry.name: entry.sealed for entry in whole.kept.values() if entry.sealed})
            self._tell("finalize")
            self._number_there += 1

    def _preserve(self, session: luod_client.Session, entries: Sequence[Entry]) -> None:
        with ExitStack() as stack:
            fds: dict[str, int] = {}
            peers: dict[str, int] = {}
            for entry in entries:
                fd, peer = make(entry)
                fds[entry.name] = stack.enter_context(fd).fileno()
                if peer is not None:
                    peers[entry.name] = stack.enter_context(peer).fileno()
            self._tell("peers", list(peers), fds=list(peers.values()))
            self._ask("preserve")
            session.preserve(
                fds,
                metadata={entry.name: entry.metadata + who(fds[entry.name]) for entry in entries},
                needs={entry.name: entry.needs for entry in entries if entry.needs},
            )
        self._tell("preserve", list(fds))

    # ---- take sessions back

    def _take(self) -> None:
        self._verb, self._asked_at = "list", time.monotonic()
        with luod_client.deserialize(runtime_dir=self._where) as looker:
            for _ in range(self._dice.randrange(1, 5)):
                self._session_id = b""
                self._ask("list")
                listed = [each for each in looker.list() if each.state == "preserved"]
                self._tell("list", len(listed))
                self._number_there = len(listed)
                if not listed or self._stop.is_set():
                    return
                chosen = self._dice.choice(listed)
                self._session_id = chosen.session_id
                if self._dice.random() < 0.1:
                    self._ask("show")
                    shown = looker.show(session_id=chosen.session_id)
                    self._tell("show", [(held.pid, held.alive) for held in shown.info.retrieved_by])
                    wrong = described_wrong(plan(chosen.session_id), shown.info, shown.metadata, shown.entries)
                    if wrong:
                        raise Broken(wrong)
                elif self._dice.random() < 0.1:
                    self._ask("discard")
                    looker.discard(session_id=chosen.session_id, force=self._dice.random() < 0.8)
                    self._tell("discard")
                elif not self._claim(looker, chosen.session, chosen.owner):
                    return

    def _claim(self, looker: luod_client.Deserializer, name: str, owner: int) -> bool:
        """Claim a session and look at all of it; whether the connection can be used again."""
        self._ask("claim")
        force = self._dice.random() < 0.8
        # Whoever claims by name may get another session than was listed.
        by_name = self._dice.random() < 0.5
        self._verb = "claim by name" if by_name else "claim"
        found = looker.claim(name, owner=owner, force=force) if by_name else looker.claim(session_id=self._session_id, force=force)
        with found as claim:
            self._session_id = claim.info.session_id
            self._tell("claim", [(held.pid, held.alive) for held in claim.info.retrieved_by], claim.info.generation)
            whole = plan(self._session_id)
            wrong = described_wrong(whole, claim.info, claim.metadata, list(claim.entries.values()))
            if wrong:
                raise Broken(wrong)
            self._idle(looker)
            if self._dice.random() < 0.03:
                looker.close()
                self._tell("released")
                return False
            ending = self._dice.random() < 0.6
            with self._retrieved(claim) as fds:
                self._idle(looker)
                if ending:
                    self._ask("finish")
                    claim.finish()
                    for name, fd in fds.items():
                        wrong = emptied(whole.kept[name], fd.fileno())
                        if wrong:
                            raise Broken(wrong)
            if ending:
                self._tell("finish")
            else:
                self._ask("release")
                claim.release()
                self._tell("released")
        return True

    @contextmanager
    def _retrieved(self, claim: luod_client.Claim) -> Generator[dict[str, OwnedFd]]:
        names = list(claim.entries)
        names = self._dice.sample(names, self._dice.randrange(len(names) + 1)) if self._dice.random() < 0.3 else names
        if not names:
            yield {}
            return
        self._ask("retrieve")
        fds = claim.retrieve(*names)
        try:
            self._tell("retrieve")
            kept = plan(self._session_id).kept
            for name, fd in fds.items():
                wrong = fault(kept[name], claim.entries[name].metadata, fd.fileno())
                if wrong:
                    raise Broken(wrong)
            yield fds
        finally:
            close_all(fds.values())


EXPECTED: Final = {
    "open": {Code.SESSION_EXISTS},
    "claim": {Code.NO_SUCH_SESSION, Code.SESSION_FINISHED, Code.SESSION_CLAIMED, Code.STILL_HELD},
    # Its end may have freed its name, for one that is open.
    "claim by name": {Code.NO_SUCH_SESSION, Code.SESSION_FINISHED, Code.SESSION_CLAIMED, Code.STILL_HELD, Code.OUT_OF_ORDER},
    "show": {Code.NO_SUCH_SESSION, Code.SESSION_FINISHED},
    "discard": {Code.NO_SUCH_SESSION, Code.SESSION_FINISHED, Code.SESSION_CLAIMED, Code.STILL_HELD},
}
"""What others do may have these refused; whether it did is for the model to say."""
