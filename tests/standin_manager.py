"""A service manager for tests, inside the test: it takes messages as systemd does, and can be told to be full, slow or deaf."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from luod.notify import SYSTEMD, Manager, ManagerInfo
from luod.succession.fdstore import WITNESS
from luod_protocol.fds import OwnedFd, close_all, own


class StandinManager:
    """What it was told, and what it keeps.

    Attributes:
        stored: names and fds, in the order in which they were kept.
        told: every message, without BARRIER's.
        limit: how many fds it keeps.
        listens: whether it takes anything but barriers; as systemd towards a process that isn't the main one.
        goes_on: while not set it takes nothing at all.
    """

    def __init__(self, address: str, limit: int) -> None:
        self.stored: list[tuple[str, OwnedFd]] = []
        self.told: list[dict[str, str]] = []
        self.limit = limit
        self.listens = True
        self.goes_on = trio.Event()
        self.goes_on.set()
        self.info = ManagerInfo(name=SYSTEMD, address=address)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.bind(address)
        self._sock = trio.socket.from_stdlib_socket(sock)

    @property
    def names(self) -> list[str]:
        """What is stored, without a witness that is still to be removed."""
        return [name for name, _ in self.stored if name != WITNESS]

    def fd(self, name: str) -> int:
        """A stored fd, borrowed."""
        return next(fd for stored, fd in self.stored if stored == name).fileno()

    async def run(self) -> None:
        """Take messages for ever."""
        while True:
            await self.goes_on.wait()
            data, ancillary, _, _ = await self._sock.recvmsg(4096, socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC)
            fds = own(memoryview(ancillary[0][2]).cast("i")) if ancillary else []
            try:
                await self.goes_on.wait()
            except trio.Cancelled:
                close_all(fds)
                raise
            self._take(dict(line.split("=", 1) for line in data.decode().splitlines()), fds)

    def _take(self, fields: dict[str, str], fds: list[OwnedFd]) -> None:
        if "BARRIER" not in fields:
            self.told.append(fields)
        if self.listens and fields.get("FDSTORE") == "1":
            for fd in list(fds):
                same = any(os.path.sameopenfile(fd.fileno(), kept.fileno()) and name == fields["FDNAME"] for name, kept in self.stored)
                if len(self.stored) < self.limit and not same:
                    self.stored.append((fields["FDNAME"], fd))
                    fds.remove(fd)
        if self.listens and fields.get("FDSTOREREMOVE") == "1":
            going = [(name, fd) for name, fd in self.stored if name == fields["FDNAME"]]
            self.stored = [each for each in self.stored if each not in going]
            close_all(fd for _, fd in going)
        close_all(fds)

    def close(self) -> None:
        """Keep nothing any more."""
        self._sock.close()
        close_all(fd for _, fd in self.stored)


@asynccontextmanager
async def standin_manager(limit: int = 16) -> AsyncGenerator[tuple[StandinManager, Manager]]:
    """A manager, and how luod reaches it."""
    with tempfile.TemporaryDirectory(prefix="luod-") as folder:
        there = StandinManager(f"{folder}/notify", limit)
        here = Manager(there.info)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(there.run)
                yield there, here
                nursery.cancel_scope.cancel()
        finally:
            here.close()
            there.close()
