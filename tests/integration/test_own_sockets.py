"""Connections to luod itself: preserved they would hold themselves, so they are refused where that shows, and ended where it doesn't."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

import luod_client
from harness import Daemon, folder_for
from luod_client import Code
from luod_protocol import messages as m
from luod_protocol.errors import FaultCode
from luod_protocol.messages import Endpoint
from raw import PRESERVE, Raw
from things import let_go, pipe, state, unix_pair


@pytest.mark.parametrize("endpoint", Endpoint)
def test_a_connection_to_luod_is_not_taken(daemon: Daemon, endpoint: Endpoint) -> None:
    with Raw(daemon.runtime_dir) as raw, Raw(daemon.runtime_dir, endpoint) as other:
        raw.open()
        for each in (raw, other):
            text = raw.refused(PRESERVE, Code.KIND_NOT_SUPPORTED, [each.sock.fileno()], entry="ram")
            assert "a connection to luod itself" in text
        daemon.upgrade()
        assert "a connection to luod itself" in raw.refused(PRESERVE, Code.KIND_NOT_SUPPORTED, [other.sock.fileno()], entry="ram")


def test_other_sockets_are_taken(daemon: Daemon) -> None:
    with folder_for() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server, Raw(daemon.runtime_dir) as raw:
        server.bind(f"{folder}/serialize")
        server.listen()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client, socket.socket(socket.AF_UNIX) as unbound:
            client.connect(f"{folder}/serialize")
            raw.open()
            raw.preserve(server=server.fileno(), client=client.fileno(), unbound=unbound.fileno())


def test_an_open_session_that_nobody_uses_ends(tmp_path: Path) -> None:
    """Its client is gone, and its connection lies in the queue of a socket that it holds itself."""
    config = tmp_path / "luod.toml"
    config.write_text("[limits]\nidle_open_s = 0.5\n", encoding="utf-8")
    with (
        Daemon(options=("--config", str(config))) as daemon,
        pipe() as (read, write),
        Raw(daemon.runtime_dir, Endpoint.DESERIALIZE) as idle,
    ):
        with Raw(daemon.runtime_dir) as raw, Raw(daemon.runtime_dir) as kept:
            kept.open("kept", bytes(16))
            raw.open()
            ours, theirs = unix_pair()
            with ours, theirs:
                socket.send_fds(ours, [b"x"], [raw.sock.fileno()])
                raw.preserve(pipe=write.fileno(), hidden=theirs.fileno())
            write.close()
            text = kept.faulted(FaultCode.TOO_SLOW)
            assert "no request for 0.5 s" in text
            assert "limits.idle_open_s" in text
        assert let_go(read)
        assert state(daemon.runtime_dir) == "gone"
        daemon.upgrade()
        with Raw(daemon.runtime_dir) as raw:
            raw.open()
            raw.faulted(FaultCode.TOO_SLOW)
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
            assert looker.list() == ()
        assert isinstance(idle.ask({"type": "list", "seq": 1}), m.Listed)
