"""Clients that send files whose close never ends: only they wait. Nobody else does, and neither does an upgrade or the end of luod."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Generator
from contextlib import contextmanager

import pytest

import luod_client
from harness import ALICE, BOB, Client, Daemon, Talk, User, spawn_client, until
from luod.capacity import CLOSING_FDS
from luod.closing import THREADS_PER_UID
from puppets import ask as have
from puppets import everybody_may_connect, puppet_of
from things import let_go, preserve_pipe

pytestmark = [pytest.mark.root, pytest.mark.slow]


HANGS = "closing what uid [0-9]+ sent has taken more than"


def _hostile(talk: Talk, where: str, mount: str, uid: int, at_end: bool) -> None:
    from hanging import hostile

    hostile(talk, where, mount, uid, at_end)


@contextmanager
def hostile(daemon: Daemon, folder: object, user: User | None = None, *, at_end: bool = False) -> Generator[Client]:
    """A client with files that hang. At the end its server is ended, and nothing hangs any more."""
    mount = f"{folder}/file"
    with open(mount, "xb"):
        pass
    with spawn_client(_hostile, daemon.runtime_dir, mount, user.uid if user else os.geteuid(), at_end) as client:
        said = client.hear()
        if said != "ready":
            pytest.skip(said)
        try:
            yield client
        finally:
            client.tell(("abort",))
            while client.hear() != "aborted":  # what was not listened to when the test failed
                pass


def ask(client: Client, *what: object) -> object:
    client.tell(what)
    return client.hear()


def others_are_served(daemon: Daemon) -> None:
    """A whole session of another client, to the promise at its end."""
    read, _ = preserve_pipe(daemon.runtime_dir, "other")
    with read, luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker, looker.claim("other") as claim:
        with claim.retrieve()["pipe"]:
            claim.finish()
            assert not let_go(read, 0)
        assert let_go(read, 0)


def nobody_serves(runtime_dir: str) -> bool:
    """Whether the lock of the directory is free."""
    with open(f"{runtime_dir}/lock", "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def upgrade(daemon: Daemon) -> int:
    """Upgrade; the generation that serves. The old process can't end while a close hangs in it."""
    with luod_client.control(runtime_dir=daemon.runtime_dir) as control:
        return control.upgrade().generation


@pytest.mark.parametrize("how", ["preserve", "bulk", "empty"])
def test_a_file_that_is_not_taken(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory, how: str) -> None:
    with hostile(daemon, tmp_path_factory.mktemp("fuse")) as client:
        ask(client, "connect")
        ask(client, how)
        assert ask(client, "hangs"), "luod never closed it"
        others_are_served(daemon)
        assert upgrade(daemon) == 2
        others_are_served(daemon)
        daemon.wait_stderr(HANGS)


def test_a_file_in_the_queue_of_a_socket(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> None:
    with hostile(daemon, tmp_path_factory.mktemp("fuse"), at_end=True) as client:
        ask(client, "connect")
        assert ask(client, "hide") == "preserved"
        client.tell(("unpreserve",))
        # While that request is at work, and waits.
        assert upgrade(daemon) == 2
        assert client.hear() == "unpreserved"
        daemon.wait_stderr(HANGS)
        others_are_served(daemon)
        assert ask(client, "status") == "daemon-status"


def test_a_file_that_luod_never_read(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It lies in the queue of luod's own end of the connection."""
    with hostile(daemon, tmp_path_factory.mktemp("fuse"), at_end=True) as client:
        ask(client, "connect")
        daemon.kill(signal.SIGSTOP)
        ask(client, "behind")
        daemon.kill(signal.SIGCONT)
        daemon.wait_stderr(HANGS)
        others_are_served(daemon)
        assert upgrade(daemon) == 2
        others_are_served(daemon)


def test_one_user_has_nobody_elses_threads(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> None:
    everybody_may_connect(daemon, "serialize", "deserialize")
    with hostile(daemon, tmp_path_factory.mktemp("fuse"), ALICE) as alice, puppet_of(daemon, BOB) as bob:
        at_once = 100
        for number in range(CLOSING_FDS // at_once + 1):
            ask(alice, "connect")
            assert ask(alice, "preserve", at_once) == "refused"
            assert number >= THREADS_PER_UID or ask(alice, "hangs")
        ask(alice, "say")
        have(bob, "preserve", name="his")
        assert have(bob, "claim", session="his")
        others_are_served(daemon)
        assert not ask(alice, "answered", 0), "luod reads on, whatever it can't close"
        assert upgrade(daemon) == 2
        have(bob, "preserve", name="his")
        assert have(bob, "discard", session="his")
        assert ask(alice, "answered", 20), "the successor has nothing of hers that hangs"


def test_the_end_of_luod(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Daemon() as daemon:
        with hostile(daemon, tmp_path_factory.mktemp("fuse")) as client:
            ask(client, "connect")
            assert ask(client, "preserve") == "refused"
            assert ask(client, "hangs")
            read, _ = preserve_pipe(daemon.runtime_dir, "kept")
            with read:
                daemon.kill(signal.SIGTERM)
                assert let_go(read), "what hangs keeps others' fds"
            until(lambda: nobody_serves(daemon.runtime_dir), "luod to let go of its directory")
            with Daemon(daemon.runtime_dir) as following:
                assert following.status().generation == 1
        assert daemon.wait_gone() == 0


def test_the_end_of_luod_with_a_session_that_hangs(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Daemon() as daemon:
        everybody_may_connect(daemon, "serialize")
        with hostile(daemon, tmp_path_factory.mktemp("fuse"), ALICE, at_end=True) as client:
            ask(client, "connect")
            assert ask(client, "hide") == "preserved"
            read, _ = preserve_pipe(daemon.runtime_dir, "kept")
            with read:
                daemon.kill(signal.SIGTERM)
                assert let_go(read), "what hangs keeps others' fds"
            until(lambda: nobody_serves(daemon.runtime_dir), "luod to let go of its directory")
            with Daemon(daemon.runtime_dir) as following:
                assert following.status().generation == 1
        assert daemon.wait_gone() == 0
