"""Replacing the daemon under its clients: what is preserved stays the same, and whoever is connected notices nothing."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

import luod_client
from faulty import Faulty, ask_upgrade, meanwhile, run_module, scene
from harness import LIMIT_S, Daemon, Talk, spawn_client, until
from luod.system import process
from luod_client import Refusal
from luod_protocol import messages as m
from luod_protocol.fds import OwnedFd, close_all
from luod_protocol.messages import Endpoint
from pipelining import Pipeline
from processes import PYTHON
from things import eventfd, let_go, memfd, pipe, preserve_pipe, same_file, unix_pair

STARTED_S = 3.0
"""In which a successor has long started, in seconds."""


def finish(runtime_dir: str, name: str) -> None:
    with luod_client.deserialize(runtime_dir=runtime_dir) as looker, looker.claim(name) as claim:
        claim.finish()


def serves(runtime_dir: str) -> bool:
    try:
        luod_client.control(runtime_dir=runtime_dir).close()
    except luod_client.NoDaemon:
        return False
    return True


# What is preserved.


@pytest.mark.slow
def test_memfds_are_identical_after_three_generations(daemon: Daemon) -> None:
    where = daemon.runtime_dir
    content = os.urandom(3 << 20)
    with memfd(content) as ram, memfd(b"sealed") as rom, memfd() as empty:
        before = [os.fstat(fd.fileno()) for fd in (ram, rom, empty)]
        with luod_client.serialize("guest", metadata=b"boot", runtime_dir=where) as session:
            session.preserve({"ram": ram.fileno(), "rom": rom.fileno(), "empty": empty.fileno()}, metadata={"rom": b"firmware"})
            session.finalize(seal={"rom": {"write", "shrink", "grow", "seal"}})
    with luod_client.deserialize(runtime_dir=where) as looker:
        shown = looker.show("guest")
        for generation in (2, 3, 4):
            done = run_module("luod_client.cli", "--runtime-dir", where, "--json", "upgrade")
            assert (done.returncode, done.stderr) == (0, "")
            answer = json.loads(done.stdout)
            assert answer["generation"] == generation
            assert daemon.status().last_pause_us == answer["pause_us"] > 0
            assert looker.show("guest").entries == shown.entries
            assert looker.show("guest").info == shown.info
        with looker.claim("guest") as claim:
            assert claim.metadata == b"boot"
            got = claim.retrieve("ram", "rom", "empty")
            with got["ram"] as ram, got["rom"] as rom, got["empty"] as empty:
                after = [os.fstat(fd.fileno()) for fd in (ram, rom, empty)]
                assert [(each.st_dev, each.st_ino, each.st_size) for each in after] == [(e.st_dev, e.st_ino, e.st_size) for e in before]
                assert os.pread(ram.fileno(), len(content) + 1, 0) == content
                assert os.lseek(ram.fileno(), 0, os.SEEK_CUR) == len(content)
                assert fcntl.fcntl(ram.fileno(), fcntl.F_GET_SEALS) == 0
                assert os.pread(rom.fileno(), 10, 0) == b"sealed"
                assert fcntl.fcntl(rom.fileno(), fcntl.F_GET_SEALS) == (
                    fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
                )
            claim.finish()


def test_every_kind_works_after_upgrades(daemon: Daemon) -> None:
    where = daemon.runtime_dir
    with ExitStack() as stack:
        read, write = stack.enter_context(pipe())
        os.write(write.fileno(), b"in the pipe")
        count_7 = stack.enter_context(eventfd(7))
        ours, theirs = unix_pair()
        datagrams, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        unconnected = socket.socket(socket.AF_INET6, socket.SOCK_STREAM) if socket.has_ipv6 else socket.socket()
        for each in (ours, theirs, datagrams, sender, udp, unconnected):
            stack.enter_context(each)
        theirs.send(b"in the stream")
        sender.send(b"one")
        sender.send(b"two")
        udp.bind(("127.0.0.1", 0))
        here = {
            "ram": stack.enter_context(memfd(b"content")).fileno(),
            "read": read.fileno(),
            "write": write.fileno(),
            "event": count_7.fileno(),
            "stream": ours.fileno(),
            "datagrams": datagrams.fileno(),
            "udp": udp.fileno(),
            "unconnected": unconnected.fileno(),
        }
        with luod_client.serialize("all", runtime_dir=where) as session:
            kinds = {name: entry.kind for name, entry in session.preserve(here).items()}
            daemon.upgrade()
            session.finalize()
        daemon.upgrade()
        with luod_client.deserialize(runtime_dir=where) as looker, looker.claim("all") as claim:
            assert {name: entry.kind for name, entry in claim.entries.items()} == kinds
            got = claim.retrieve()
            for fd in got.values():
                stack.enter_context(fd)
            assert all(same_file(got[name].fileno(), fd) for name, fd in here.items() if name != "event")
            claim.finish()
        assert os.eventfd_read(got["event"].fileno()) == 7
        assert os.read(got["read"].fileno(), 100) == b"in the pipe"
        os.write(got["write"].fileno(), b"more")
        assert os.read(got["read"].fileno(), 100) == b"more"
        stream = stack.enter_context(socket.socket(fileno=got["stream"].take()))
        assert stream.recv(100) == b"in the stream"
        stream.send(b"answer")
        assert theirs.recv(100) == b"answer"
        dgram = stack.enter_context(socket.socket(fileno=got["datagrams"].take()))
        assert [dgram.recv(100), dgram.recv(100)] == [b"one", b"two"]
        again = stack.enter_context(socket.socket(fileno=got["udp"].take()))
        assert again.getsockname() == udp.getsockname()


def serve_what_was_retrieved(talk: Talk, runtime_dir: str) -> None:
    """The server's successor: takes the sockets back, answers whoever waits, then says so."""
    import socket

    import luod_client

    with luod_client.deserialize(runtime_dir=runtime_dir) as looker, looker.claim("server") as claim:
        got = claim.retrieve()
        claim.finish()
    with socket.socket(fileno=got["connected"].take()) as connected:
        connected.sendall(b"answer to " + connected.recv(100))
    for name in ("listener", "local"):
        with socket.socket(fileno=got[name].take()) as listener:
            for _ in range(3):
                accepted, _ = listener.accept()
                with accepted:
                    accepted.sendall(b"welcome " + accepted.recv(100))
    talk.tell("done")


def test_a_backlog_and_a_connected_client_are_served_by_a_new_process(daemon: Daemon, tmp_path: Path) -> None:
    where = daemon.runtime_dir
    with ExitStack() as stack:
        listener = socket.create_server(("127.0.0.1", 0), backlog=5)
        local = socket.socket(socket.AF_UNIX)
        with listener, local:
            local.bind(str(tmp_path / "local"))
            local.listen(5)
            connected = stack.enter_context(socket.create_connection(listener.getsockname()))
            accepted, _ = listener.accept()
            with accepted, luod_client.serialize("server", runtime_dir=where) as session:
                session.preserve({"listener": listener.fileno(), "local": local.fileno(), "connected": accepted.fileno()})
                session.finalize()
            address = listener.getsockname()
        waiting: list[socket.socket] = []
        for generation in (2, 3):
            tcp = stack.enter_context(socket.create_connection(address))
            unix = stack.enter_context(socket.socket(socket.AF_UNIX))
            unix.connect(str(tmp_path / "local"))
            waiting += [tcp, unix]
            assert daemon.upgrade().generation == generation
        waiting.append(stack.enter_context(socket.create_connection(address)))
        last = stack.enter_context(socket.socket(socket.AF_UNIX))
        last.connect(str(tmp_path / "local"))
        waiting.append(last)
        for number, each in enumerate([connected, *waiting]):
            each.settimeout(LIMIT_S)
            each.sendall(b"%d" % number)
        with spawn_client(serve_what_was_retrieved, where) as server:
            assert server.hear() == "done"
        assert connected.recv(100) == b"answer to 0"
        assert [each.recv(100) for each in waiting] == [b"welcome %d" % number for number in range(1, 7)]


def test_many_sessions_and_fds(daemon: Daemon) -> None:
    where, sessions, entries = daemon.runtime_dir, 50, 40
    with memfd(b"shared") as ram:
        for number in range(sessions):
            with luod_client.serialize(f"s{number}", runtime_dir=where) as session:
                session.preserve({f"e{index}": ram.fileno() for index in range(entries)}, metadata={"e7": b"%d" % number})
                session.finalize()
        with luod_client.serialize("open", runtime_dir=where) as session:
            session.preserve({f"e{index}": ram.fileno() for index in range(600)})
            assert daemon.upgrade().generation == 2
            status = daemon.status()
            assert (status.sessions_preserved, status.preserved_fds, status.staged_fds) == (sessions, sessions * entries, 600)
            assert daemon.upgrade().generation == 3
            session.finalize()
        with luod_client.deserialize(runtime_dir=where) as looker:
            assert [each.session for each in looker.list()] == [*(f"s{number}" for number in range(sessions)), "open"]
            for name, size in (("s0", entries), ("s49", entries), ("open", 600)):
                with looker.claim(name) as claim:
                    got = claim.retrieve()
                    assert len(got) == size
                    assert all(same_file(fd.fileno(), ram.fileno()) for fd in got.values())
                    close_all(got.values())
                    assert name == "open" or claim.entries["e7"].metadata == name[1:].encode()
    until(lambda: daemon.status().open_fds == daemon.baseline + sessions + 1, "luod to have one descriptor for each session")


# Who is connected.


def test_open_sessions_and_claims_go_on_with_their_connections(daemon: Daemon) -> None:
    with scene(daemon.runtime_dir) as made:
        for generation in (2, 3, 4):
            assert daemon.upgrade().generation == generation
            assert made.looker.show("claimed").info.state == "claimed"
            made.open.status()
        made.check_live()
        made.check_finalized("first", "second")


def test_what_is_tied_to_a_carried_connection_ends_with_it(daemon: Daemon) -> None:
    with scene(daemon.runtime_dir) as made:
        daemon.upgrade()
        made.open.close()
        assert let_go(made.ends["open"])
        made.looker.close()
        made.check_finalized("claimed")


def test_a_client_that_ends_while_luod_is_frozen(daemon: Daemon, tmp_path: Path) -> None:
    held = Faulty(tmp_path, "after-receive:frozen=wait")
    with scene(daemon.runtime_dir) as made:
        with meanwhile(lambda: ask_upgrade(daemon.runtime_dir, held.program)) as upgraded:
            held.wait_for("after-receive:frozen")
            made.open.close()
            made.looker.close()
            assert not let_go(made.ends["open"], 0)
            held.go_on()
            assert upgraded.result().generation == 2
        assert let_go(made.ends["open"])
        made.check_finalized("claimed")


def test_a_connection_that_has_said_nothing_yet_and_one_that_is_not_accepted_yet(daemon: Daemon, tmp_path: Path) -> None:
    held = Faulty(tmp_path, "after-receive:frozen=wait")
    with (
        Pipeline(daemon.runtime_dir, Endpoint.DESERIALIZE, greet=False) as before,
        meanwhile(lambda: ask_upgrade(daemon.runtime_dir, held.program)) as up,
    ):
        held.wait_for("after-receive:frozen")
        with Pipeline(daemon.runtime_dir, Endpoint.DESERIALIZE, greet=False) as during:
            during.ask(m.Hello(seq=during.seq(), low=1, high=1))
            held.go_on()
            assert up.result().generation == 2
            (welcome,) = during.answers(1)
            assert isinstance(welcome, m.Welcome)
            assert welcome.generation == 2
        before.ask(m.Hello(seq=before.seq(), low=1, high=1))
        assert isinstance(before.answers(1)[0], m.Welcome)


def test_a_monitor_goes_on(daemon: Daemon) -> None:
    where = daemon.runtime_dir
    with luod_client.control(runtime_dir=where) as control:
        events = control.monitor()
        daemon.upgrade()
        daemon.upgrade()
        end, session_id = preserve_pipe(where)
        with end:
            finish(where, "guest")
        seen: list[luod_client.Event] = []
        while not seen or seen[-1].event != "finished":
            seen.append(next(events))
        assert [(event.event, event.lost) for event in seen] == [
            (name, 0) for name in (*2 * ("upgrading", "freezing", "upgraded"), "opened", "finalized", "claimed", "finished")
        ]
        assert seen[0].detail == "generation 1"
        assert seen[5].detail.startswith("generation 3, pause ")
        assert seen[-1].session_id == session_id


def test_a_lost_answer_to_finalize_can_be_asked_for_in_a_later_generation(daemon: Daemon) -> None:
    where = daemon.runtime_dir
    end, session_id = preserve_pipe(where)
    with end:
        daemon.upgrade()
        assert luod_client.finalize_again(session_id, runtime_dir=where).session_id == session_id
        finish(where, "guest")
        daemon.upgrade()
        with luod_client.deserialize(runtime_dir=where) as looker:
            assert looker.finish(session_id).session_id == session_id


# Who lets go.


def test_nobody_holds_a_copy_after_finished_also_right_after_an_upgrade(daemon: Daemon) -> None:
    where = daemon.runtime_dir
    for number in range(3):
        with preserve_pipe(where)[0] as end, luod_client.deserialize(runtime_dir=where) as looker, looker.claim("guest") as claim:
            assert ask_upgrade(where).generation == number + 2
            claim.finish()
            assert let_go(end, 0)


@pytest.mark.parametrize("verb", ["finish", "discard", "cancel", "unpreserve"])
def test_while_the_predecessor_is_still_ending_nothing_is_said_to_be_let_go(daemon: Daemon, tmp_path: Path, verb: str) -> None:
    where = daemon.runtime_dir
    held = Faulty(tmp_path, "after-receive:serving=wait")
    daemon.upgrade(held.program)
    with scene(where) as made:
        assert ask_upgrade(where).generation == 3
        held.wait_for("after-receive:serving")
        verbs: dict[str, tuple[str, Callable[[], object]]] = {
            "finish": ("claimed", made.claim.finish),
            "cancel": ("open", made.open.cancel),
            "unpreserve": ("open", lambda: made.open.unpreserve("pipe")),
        }
        with luod_client.deserialize(runtime_dir=where) as other:
            verbs["discard"] = ("first", lambda: other.discard("first"))
            name, call = verbs[verb]
            with meanwhile(call) as done:
                # The other side of the handover holds a copy still, so that is how it must stay.
                assert not let_go(made.ends[name], 0.1)
                assert not done.done()
                held.go_on()
                done.result()
                assert let_go(made.ends[name], 0)


@pytest.mark.slow
def test_an_upgrade_waits_for_the_end_of_the_one_before(daemon: Daemon, tmp_path: Path) -> None:
    """Else the successor, which knows of one predecessor, would answer `finished` while another one holds a copy."""
    where = daemon.runtime_dir
    held = Faulty(tmp_path, "after-receive:serving=wait")
    daemon.upgrade(held.program)
    with preserve_pipe(where)[0] as end:
        first = ask_upgrade(where)
        held.wait_for("after-receive:serving")
        with meanwhile(lambda: ask_upgrade(where)) as second:
            # No synchronisation: an upgrade that doesn't wait shall have the time to come through.
            assert not let_go(end, STARTED_S)
            assert not second.done()
            assert daemon.status().generation == 3
            held.go_on()
            assert second.result().generation == 4
        assert not process(first.predecessor_pid).start, "it is neither gone nor waiting to be reaped"
        finish(where, "guest")
        assert let_go(end, 0)


@pytest.mark.slow
def test_a_predecessor_that_does_not_end_is_killed(daemon: Daemon, tmp_path: Path) -> None:
    where = daemon.runtime_dir
    held = Faulty(tmp_path, "after-receive:serving=stop")
    daemon.upgrade(held.program)
    with preserve_pipe(where)[0] as end:
        assert ask_upgrade(where).generation == 3
        finish(where, "guest")
        assert let_go(end, 0)
    daemon.wait_stderr("the predecessor did not end within 10 s of the handover and was killed")


@pytest.mark.parametrize("stderr", ["broken pipe", "/dev/full"])
def test_a_luod_to_which_nobody_listens(tmp_path: Path, stderr: str) -> None:
    """What can't be said must not end a daemon, above all not right after its commit."""
    where = str(tmp_path)
    with ExitStack() as stack:
        if stderr == "broken pipe":
            read, write = stack.enter_context(pipe())
            read.close()
        else:
            write = stack.enter_context(OwnedFd(os.open(stderr, os.O_WRONLY | os.O_CLOEXEC)))
        first = subprocess.Popen([*PYTHON, "-m", "luod", "--runtime-dir", where], stdin=subprocess.DEVNULL, stderr=write.fileno())
    with first:
        until(lambda: serves(where), "luod serves")
        with scene(where) as made:
            for generation in (2, 3):
                assert ask_upgrade(where).generation == generation
                assert made.open.status().generation == generation
            with pytest.raises(Refusal):
                ask_upgrade(where, "/bin/false")
            made.check_live()
            made.check_finalized("first")
            with luod_client.control(runtime_dir=where) as control:
                pid = control.status().pid
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert first.wait(LIMIT_S) == 0
