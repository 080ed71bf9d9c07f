"""The two ways in which a server comes to be: from nothing or from what others kept, and from a luod that hands over.

Theory. `fresh` gathers what there is of earlier luods: boxes and a ledger in the service manager's store, kernel sessions that the last
kernel brought, by way of the manager or not. Then it serves, and the rest is done meanwhile. `succeed` has time, for another luod serves;
from its commit on it has none.

Unhappy paths:
1. The lock or a socket can't be had: nothing was adopted, and this process ends.
2. What was kept can't be read: it is left where it is, and said; see `adopt`, `unload`.
3. The handover fails: `Left`.

Invariants: what is needed for a client's first request is done before `start`; nothing else is.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import attrs
import trio

from luod import activation, listening, lowest, notify
from luod.capacity import capacity
from luod.config import Config
from luod.handlers import kinds
from luod.notify import ManagerInfo
from luod.rehearsal import prepare_meanwhile, rehearse
from luod.server import Server
from luod.succession.adoption import adopt
from luod.succession.channel import Channel
from luod.succession.keeping import secure
from luod.succession.kernel import collect, unload
from luod.succession.liveupdate import Device, Kept, KernelSession, LiveUpdateFault
from luod.succession.messages import Offer
from luod.succession.new import NewSide
from luod.succession.opaque import tell
from luod.succession.relay import sort
from luod.system import System
from luod.updates import steps_us
from luod_protocol.fds import OwnedFd
from luod_protocol.messages import Endpoint

COURTESY_S: Final = 0.005
"""How long a successor leaves its first moments to the clients that waited, in seconds."""

log = logging.getLogger("luod")


@attrs.frozen(kw_only=True)
class Start:
    """The two ways in which a server comes to be."""

    nursery: trio.Nursery
    config: Config
    options: Sequence[str]
    system: System

    async def fresh(self, directory: str) -> Server:
        """Serve as the first of a line, or after one that did not hand over, with what the service manager kept of it."""
        manager = notify.of_this_process(os.environ, self.system.pid, os.getppid())
        passed = activation.take(os.environ, self.system.pid)
        lowest.occupy()
        for name in passed.unknown:
            log.warning("the service manager passed a fd named %r, of which luod knows nothing", name)
        lock = listening.lock(directory)
        try:
            bound = listening.bind(directory, [each for each in Endpoint if each not in passed.listeners])
            listening.sign(lock.fileno())
        except BaseException:
            lock.close()
            raise
        relayed = sort(passed.stored, self.system.boot_id)
        if relayed.of_this_boot:
            log.warning("the reboot into another kernel that luod was prepared for did not happen: it serves on")
        adopted = adopt(relayed.others, self.system.boot_id)
        began_us = self.system.monotonic_us()
        collected = {number: KernelSession(f"{number} of systemd", fd) for number, fd in relayed.came.items()} or self._collect()
        securing: Sequence[str] = () if relayed.came else await self._secure(manager, [name for name, _ in passed.stored], collected)
        known = {each.session_id for each in adopted.sessions} | {each.session_id for each in adopted.ended}
        arrival = unload(collected, self.system.boot_id, known=known)
        generation = max(adopted.generation, arrival.index.generation if arrival is not None else 0) + 1
        server = self._server(directory, lock, {**passed.listeners, **bound}, generation=generation, bound=bound, manager=manager)
        for session in adopted.sessions:
            server.adopt_session(session)
        for opaque in adopted.opaque:
            server.adopt_opaque(opaque)
        tell(adopted.opaque)
        for session_id, processes in adopted.retrieved.items():
            for process in processes:
                server.note_retrieval(session_id, process)
        for ended in adopted.ended:
            server.remember(ended)
        if arrival is not None:
            for session in arrival.sessions:
                server.adopt_session(session)
            for ended in arrival.index.ended:
                server.remember(ended)
        brought, leaving = (*relayed.names, *securing), (*adopted.leaving, *relayed.of_this_boot)
        others = (*adopted.others, *relayed.of_this_boot, *brought)
        # Without an arrival another luod may know more: a newer one.
        spent = brought if arrival is not None else ()
        await server.managing.begin(others=others, leaving=leaving, is_main=True, spent=spent)
        if arrival is not None:
            if not {*spent}.intersection(server.managing.others):
                arrival.settle()
            server.updates.begin(arrival, steps_us(arrival.index.frozen_at, began_us, self.system))
            came, lost = len(arrival.sessions), len(arrival.lost)
            log.info("%d sessions came from the last kernel, %d were lost", came, lost)
            for text in arrival.index.left_behind:
                log.warning("%s ended with the last kernel: it was left behind", text)
        server.start()
        self.nursery.start_soon(prepare_meanwhile)
        return server

    def _collect(self) -> Mapping[int, Kept | LiveUpdateFault]:
        try:
            return collect(Device.open)
        except LiveUpdateFault as error:
            if not error.is_absent:
                log.warning("whether the last kernel brought sessions can't be told: %s", error)
            return {}

    async def _secure(
        self, manager: ManagerInfo | None, stored: Sequence[str], collected: Mapping[int, Kept | LiveUpdateFault]
    ) -> Sequence[str]:
        sessions = {number: each.fileno() for number, each in collected.items() if not isinstance(each, LiveUpdateFault)}
        return await secure(manager, stored, sessions) if manager is not None and sessions else ()

    async def succeed(self, handover: socket.socket) -> Server:
        """Serve as the successor of the luod at the other end of `handover`."""
        own_manager = notify.of_this_process(os.environ, self.system.pid, os.getppid())
        activation.close(activation.take(os.environ, self.system.pid))
        lowest.occupy()
        servers: list[Server] = []

        def build(offer: Offer, lock: OwnedFd, fds: Mapping[str, OwnedFd]) -> Server:
            listeners = {Endpoint(name): socket.socket(fileno=fd.take()) for name, fd in fds.items()}
            generation, manager = offer.generation + 1, offer.manager or own_manager
            bound = map(Endpoint, offer.bound)
            server = self._server(offer.directory, lock, listeners, generation=generation, bound=bound, manager=manager, frozen=True)
            for ended in offer.ended:
                server.remember(ended)
            if offer.last_update is not None:
                server.updates.inherit(offer.last_update)
            servers.append(server)
            return server

        with OwnedFd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)) as nothing:
            await rehearse(self._server("", nothing, {}, generation=0))
        side = NewSide(channel=Channel(handover), kinds=kinds(), build=build)
        gc.disable()
        await side.run()
        (server,) = servers
        pause_us = self.system.monotonic_us() - side.since_us if side.since_us else 0
        server.thaw(
            pause_us=pause_us,
            predecessor=side.predecessor,
            predecessor_pid=side.offer.pid if side.offer else 0,
            stored_others=side.stored_others,
        )
        server.start()
        # The clients that waited go first.
        await trio.sleep(COURTESY_S)
        gc.freeze()
        gc.enable()
        with suppress(OSError):  # for people only
            listening.sign(server.inheritance()[1][0])
        return server

    def _server(
        self,
        directory: str,
        lock: OwnedFd,
        listeners: Mapping[Endpoint, socket.socket],
        *,
        generation: int,
        bound: Iterable[Endpoint] = (),
        manager: ManagerInfo | None = None,
        frozen: bool = False,
    ) -> Server:
        return Server(
            nursery=self.nursery,
            config=self.config,
            options=self.options,
            system=self.system,
            directory=directory,
            lock=lock,
            listeners=listeners,
            generation=generation,
            capacity=capacity(self.config.limits),
            bound=bound,
            manager=manager,
            frozen=frozen,
        )
