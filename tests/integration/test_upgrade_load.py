"""Requests that are under way while the daemon is replaced: each gets exactly one answer, in order, and takes effect once."""

from __future__ import annotations

import os
import select

import pytest

from faulty import ask_upgrade
from harness import LIMIT_S, Daemon, Talk, spawn_client
from luod_protocol import messages as m
from luod_protocol.messages import Endpoint
from pipelining import Load, Pipeline
from things import preserve_pipe


@pytest.mark.slow
def test_each_request_gets_one_answer_while_luod_is_replaced(daemon: Daemon) -> None:
    with Load(daemon.runtime_dir):
        for generation in (2, 3, 4):
            assert ask_upgrade(daemon.runtime_dir).generation == generation


@pytest.mark.slow
def test_many_upgrades_in_a_row_under_load(daemon: Daemon) -> None:
    with Load(daemon.runtime_dir):
        for generation in range(2, 13):
            assert ask_upgrade(daemon.runtime_dir).generation == generation
    assert daemon.status().generation == 12


def sessions_one_after_another(talk: Talk, runtime_dir: str) -> None:
    """Whole lives of sessions, until the test has no more to say; says how many."""
    import os
    import threading

    import luod_client
    from luod_protocol.fds import OwnedFd

    asked = threading.Event()
    number = 0

    def listen() -> None:
        talk.hear()
        asked.set()

    listener = threading.Thread(target=listen)
    listener.start()
    while not asked.is_set():
        read, write = os.pipe2(os.O_CLOEXEC)
        with OwnedFd(read), OwnedFd(write):
            with luod_client.serialize(f"life-{os.getpid()}", runtime_dir=runtime_dir) as session:
                session.preserve({"write": write})
                session.finalize(require={"daemon-upgrade"})
            os.close(os.dup(read))
            with luod_client.deserialize(runtime_dir=runtime_dir) as looker:
                with looker.claim(session_id=session.id) as claim:
                    with claim.retrieve("write")["write"] as again:
                        os.write(again.fileno(), b"%d" % number)
                    assert os.read(read, 100) == b"%d" % number
                    claim.finish()
                assert not [each for each in looker.list() if each.session_id == session.id]
        number += 1
    listener.join()
    talk.tell(number)


@pytest.mark.slow
def test_whole_lives_of_sessions_while_luod_is_replaced(daemon: Daemon) -> None:
    with (
        spawn_client(sessions_one_after_another, daemon.runtime_dir) as one,
        spawn_client(sessions_one_after_another, daemon.runtime_dir) as two,
    ):
        for generation in (2, 3, 4, 5):
            assert ask_upgrade(daemon.runtime_dir).generation == generation
        for client in (one, two):
            client.tell("enough")
        assert one.hear() + two.hear() > 10


@pytest.mark.parametrize("upgrades", [1, 3])
def test_unread_answers_arrive_after_upgrades(daemon: Daemon, upgrades: int) -> None:
    """A client asks until its socket is full, and reads nothing: luod has an answer under way, with fds, that it can't get rid of."""
    where = daemon.runtime_dir
    with preserve_pipe(where)[0] as end, Pipeline(where, Endpoint.DESERIALIZE) as line:
        line.ask(m.Claim(seq=line.seq(), session="guest"))
        line.answers(1)
        line.sock.setblocking(False)
        asked: list[int] = []
        poll = select.poll()
        poll.register(line.sock, select.POLLOUT)
        while poll.poll(200):
            asked.append(line.seq())
            line.ask(m.Retrieve(seq=asked[-1], names=("pipe", "pipe")))
        assert len(asked) > 100
        for _ in range(upgrades):
            daemon.upgrade()
        line.sock.settimeout(LIMIT_S)
        replies = line.answers(len(asked))
        assert [(reply.type, getattr(reply, "seq", None)) for reply in replies] == [("retrieved", seq) for seq in asked]
        assert len(line.fds) == 2 * len(asked)
        assert all(os.fstat(fd.fileno()).st_ino == os.fstat(end.fileno()).st_ino for fd in line.fds)
        line.ask(m.Release(seq=line.seq()))
        assert isinstance(line.answers(1)[0], m.Released)
