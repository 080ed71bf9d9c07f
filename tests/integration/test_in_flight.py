"""Another process of luod's own uid has as many fds in flight as the uid may have: luod refuses what it can't pass, loses nothing,
waits for nobody for ever, and goes on when there is room again."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

import luod_client
from harness import ALICE, Client, Daemon, Talk, spawn_client
from luod_client import Code
from luod_protocol.errors import Refusal

pytestmark = pytest.mark.root


def _neighbour(talk: Talk, where: str) -> None:
    """Puts fds in flight, and is a client too."""
    import contextlib
    import os
    import resource
    import socket

    import luod_client

    flying: list[socket.socket] = []
    session: luod_client.Session | None = None
    while True:
        verb = talk.hear()
        if verb == "fill":
            null = os.open(os.devnull, os.O_RDONLY)
            with contextlib.suppress(OSError):
                while len(flying) < 20:
                    pair = socket.socketpair()
                    flying.extend(pair)
                    socket.send_fds(pair[0], [b"x"], [null] * 100)
            os.close(null)
            talk.tell(len(flying) // 2)
        elif verb[0] == "limit":
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.prlimit(verb[1], resource.RLIMIT_NOFILE, (verb[2], hard))
            talk.tell("limited")
        elif verb == "land":
            for each in flying:
                each.close()
            flying.clear()
            talk.tell("landed")
        elif verb == "open":
            session = luod_client.serialize("guest", runtime_dir=where)
            read, write = os.pipe()
            session.preserve({"pipe": write})
            os.close(write)
            os.close(read)
            talk.tell("opened")
        elif verb == "finalize":
            assert session is not None
            try:
                session.finalize()
                talk.tell("finalized")
            except luod_client.Refusal as refusal:
                talk.tell((refusal.code.value, refusal.message))


@contextmanager
def _few_in_flight(daemon: Daemon) -> Generator[Client]:
    """The neighbour has more fds in flight than luod's RLIMIT_NOFILE is then."""
    with spawn_client(_neighbour, daemon.runtime_dir, user=ALICE) as neighbour:
        neighbour.tell("open")
        assert neighbour.hear() == "opened"
        neighbour.tell("fill")
        assert neighbour.hear() >= 5
        neighbour.tell(("limit", daemon.pid, 200))
        assert neighbour.hear() == "limited"
        yield neighbour


def _says(client: Client, verb: str) -> Any:
    client.tell(verb)
    return client.hear()


@pytest.mark.slow
def test_others_of_luods_uid_have_all_in_flight() -> None:
    with Daemon(user=ALICE) as daemon, _few_in_flight(daemon) as neighbour:
        where = daemon.runtime_dir
        code, message = _says(neighbour, "finalize")
        assert code == Code.LIMIT_REACHED.value
        assert "ETOOMANYREFS" in message
        with luod_client.control(runtime_dir=where) as control, pytest.raises(Refusal) as caught:
            control.upgrade()
        assert caught.value.code is Code.UPGRADE_FAILED
        assert "Too many references" in caught.value.message
        assert daemon.status().generation == 1
        assert _says(neighbour, "land") == "landed"
        with luod_client.control(runtime_dir=where) as control:
            assert control.upgrade().generation == 2
        assert _says(neighbour, "finalize") == "finalized"
        with luod_client.control(runtime_dir=where) as control:
            assert [each.session for each in control.list()] == ["guest"]
        with luod_client.deserialize(runtime_dir=where) as looker:
            looker.discard(session_id=looker.list()[0].session_id)
