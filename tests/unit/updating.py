"""A luod in this process with a kernel that stands in, and what clients do with both."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

import attrs
import trio

from kernel_standin import SEALABLE, KernelStandin
from luod import listening
from luod.capacity import capacity
from luod.config import Config
from luod.notify import ManagerInfo
from luod.server import Server
from luod.succession.kernel import collect, unload
from luod.system import System
from luod.updates import steps_us
from luod_client import aio
from luod_protocol import messages as m
from luod_protocol.fds import OwnedFd, close_all
from processes import LIMIT_S, folder_for

NO_WAIT: Final = 0.0


@attrs.frozen(kw_only=True)
class Luod:
    """A luod in this process."""

    server: Server
    directory: str
    kernel: KernelStandin

    async def until(self, state: str, carried: int | None = None) -> m.UpdateStatus:
        """Wait until the update is so, with so many sessions."""
        with trio.fail_after(LIMIT_S):
            while True:
                found = self.server.updates.status(0)
                if found.state == state and carried in (None, found.carried):
                    return found
                await trio.sleep(0.001)


def boot_id(kernel: KernelStandin) -> str:
    """Of the machine, while this kernel runs."""
    return f"{kernel.boot:08x}-0000-0000-0000-000000000000"


@asynccontextmanager
async def luod(kernel: KernelStandin, *, manager: ManagerInfo | None = None, kexec_loaded: bool = False) -> AsyncGenerator[Luod, None]:
    """A luod of this kernel, with what the last one brought. At its end the kernel lets go of all, as when a process ends."""
    system = System(boot_id=boot_id(kernel), kexec_loaded=lambda: kexec_loaded)
    with folder_for() as directory:
        arrival = unload(collect(kernel.opening), system.boot_id) if kernel.is_there else None
        lock = listening.lock(directory)
        listeners = listening.bind(directory)
        async with trio.open_nursery() as nursery:
            server = Server(
                nursery=nursery,
                config=Config(),
                options=(),
                system=system,
                directory=directory,
                lock=lock,
                listeners=listeners,
                generation=arrival.index.generation + 1 if arrival is not None else 1,
                capacity=capacity(Config().limits),
                manager=manager,
                opening=kernel.opening,
            )
            for session in arrival.sessions if arrival is not None else ():
                server.adopt_session(session)
            if arrival is not None:
                arrival.settle()
                server.updates.begin(arrival, steps_us(arrival.index.frozen_at, system.monotonic_us(), system))
            await server.managing.begin(others=(), leaving=(), is_main=True)
            server.start()
            try:
                yield Luod(server=server, directory=directory, kernel=kernel)
                with trio.fail_after(LIMIT_S):
                    await idle(nursery, server)
            finally:
                nursery.cancel_scope.cancel()
        for listener in listeners.values():
            listener.close()
        lock.close()
        kernel.close()
        server.managing.close()
        close_all(fd for session in server.store for fd in session.take_fds())


async def idle(nursery: trio.Nursery, server: Server) -> None:
    """Wait until every connection has ended and all is closed."""
    while True:
        if not server.closer.total and not any(task.name.endswith("Connection.run") for task in nursery.child_tasks):
            return
        await trio.sleep(0.001)


def memfd(content: bytes, position: int = 0) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("content", SEALABLE))
    os.write(fd.fileno(), content)
    os.lseek(fd.fileno(), position, os.SEEK_SET)
    return fd


def read_only(fd: OwnedFd, position: int = 0) -> OwnedFd:
    other = OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", os.O_RDONLY | os.O_CLOEXEC))
    os.lseek(other.fileno(), position, os.SEEK_SET)
    return other


async def keep(luod: Luod, name: str, fds: dict[str, OwnedFd], require: tuple[str, ...] = ()) -> m.Finalized:
    try:
        async with aio.serialize(name, runtime_dir=luod.directory) as session:
            await session.preserve({name: fd.fileno() for name, fd in fds.items()}, metadata={name: name.encode() for name in fds})
            return await session.finalize(require=require)
    finally:
        close_all(fds.values())


async def prepared(luod: Luod, *, deadline_s: float = NO_WAIT, force: bool = False) -> m.UpdateStatus:
    async with aio.control(runtime_dir=luod.directory) as control:
        await control.prepare(deadline_s=deadline_s, force=force)
    return await luod.until("prepared")


async def jump(luod: Luod) -> KernelStandin:
    """Prepare, freeze, and go to the next kernel."""
    await prepared(luod, force=True)
    async with aio.control(runtime_dir=luod.directory) as control:
        frozen = await control.freeze()
        assert frozen.state == "frozen"
        return luod.kernel.kexec()


async def back(luod: Luod, name: str) -> dict[str, OwnedFd]:
    async with aio.deserialize(runtime_dir=luod.directory) as connection, connection.claim(name) as claim:
        fds = await claim.retrieve()
        await claim.finish()
        return fds
