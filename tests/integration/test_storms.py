"""Too much of everything: connects, requests, signals, upgrades. luod goes on, and whoever asks for little is served."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress

import pytest

import luod_client
from harness import ALICE, Daemon, Talk, spawn_client, until
from luod_client import Code
from luod_protocol import messages as m
from luod_protocol.codec import pack
from luod_protocol.errors import Refusal
from luod_protocol.messages import Endpoint
from puppets import everybody_may_connect
from raw import Raw
from things import eventfd, let_go, preserve_pipe


def others_are_served(runtime_dir: str) -> None:
    """A whole session of another client."""
    read, _ = preserve_pipe(runtime_dir, "other")
    with read, luod_client.deserialize(runtime_dir=runtime_dir) as looker, looker.claim("other") as claim:
        with claim.retrieve()["pipe"]:
            claim.finish()
        assert let_go(read, 0)


def _connect_without_end(talk: Talk, where: str) -> None:
    import socket
    import threading

    over = threading.Event()
    refused = threading.Event()

    def connect() -> None:
        kept: list[socket.socket] = []
        while not over.is_set():
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.settimeout(0.2)
            try:
                sock.connect(f"{where}/serialize")
                if len(kept) < 300:
                    kept.append(sock)
                    continue
                refused.set()
            except OSError:
                pass
            sock.close()
        for each in kept:
            each.close()

    threads = [threading.Thread(target=connect) for _ in range(3)]
    for thread in threads:
        thread.start()
    refused.wait()
    talk.tell("connecting")
    talk.hear()
    over.set()
    for thread in threads:
        thread.join()
    talk.tell("done")


@pytest.mark.root
@pytest.mark.slow
def test_one_user_who_connects_without_end(daemon: Daemon) -> None:
    everybody_may_connect(daemon, "serialize")
    with spawn_client(_connect_without_end, daemon.runtime_dir, user=ALICE) as client:
        assert client.hear() == "connecting"
        others_are_served(daemon.runtime_dir)
        with luod_client.control(runtime_dir=daemon.runtime_dir) as control:
            assert control.upgrade().generation == 2
        others_are_served(daemon.runtime_dir)
        client.tell("end")
        assert client.hear() == "done"


def test_each_connection_has_its_turn(daemon: Daemon) -> None:
    """A client with many requests in its queue does one of them for each that another does."""
    with Raw(daemon.runtime_dir) as greedy, Raw(daemon.runtime_dir, Endpoint.DESERIALIZE) as modest, eventfd() as irq:
        greedy.open()
        daemon.kill(signal.SIGSTOP)
        greedy.sock.setblocking(False)
        queued = 0
        with suppress(BlockingIOError):
            while queued < 100:
                greedy.put(pack({"type": "preserve", "seq": 3, "entries": [{"name": f"irq-{queued}"}]}), [irq.fileno()])
                queued += 1
        assert queued > 20
        modest.say({"type": "list", "seq": 1})
        daemon.kill(signal.SIGCONT)
        listed = modest.hear()
        assert isinstance(listed, m.Listed)
        (session,) = listed.sessions
        assert session.entries <= 5, f"{session.entries} of {queued} were done before the only one of another"


def test_many_upgrades_at_once(daemon: Daemon) -> None:
    generations: list[int] = []
    refusals: list[Refusal] = []

    def ask() -> None:
        with luod_client.control(runtime_dir=daemon.runtime_dir) as control:
            try:
                generations.append(control.upgrade().generation)
            except Refusal as refusal:
                refusals.append(refusal)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(generations) + len(refusals) == len(threads)
    assert {each.code for each in refusals} <= {Code.UPGRADE_RUNNING}
    assert daemon.status().generation == 1 + len(generations) == max(generations)
    others_are_served(daemon.runtime_dir)


def test_a_storm_of_sighups(daemon: Daemon) -> None:
    read, _ = preserve_pipe(daemon.runtime_dir, "kept")
    with read:
        first = daemon.pid
        for _ in range(200):
            daemon.kill(signal.SIGHUP)
        until(lambda: daemon.status().pid != first, "the upgrade")
        assert not let_go(read, 0)
        others_are_served(daemon.runtime_dir)
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
            looker.discard("kept")


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_storm_of_signals_that_end_it(sig: signal.Signals) -> None:
    with Daemon() as daemon:
        with suppress(ProcessLookupError, luod_client.NoDaemon):
            for _ in range(1000):
                daemon.kill(sig)
        assert daemon.wait_gone() == 0
