"""Each uid has its share: ALICE at her limit is refused and told why, BOB and root notice nothing; also across an upgrade."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import luod_client
from harness import ALICE, BOB, Client, Daemon, until
from luod_client import Code, FaultCode
from puppets import ask, everybody_may_connect, puppet_of, refused
from things import eventfd

pytestmark = pytest.mark.root

LIMITS = """
[limits.per_uid]
max_sessions = 3
max_connections = 6
max_preserved_fds = 5
max_staged_fds = 4
max_metadata_bytes = 100
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "luod.toml"
    path.write_text(LIMITS)
    return path


@pytest.fixture
def limited(file: Path) -> Iterator[tuple[Daemon, Client, Client]]:
    """A luod with these limits, ALICE and BOB."""
    with Daemon(options=("--config", str(file))) as daemon:
        everybody_may_connect(daemon, "serialize", "deserialize")
        with puppet_of(daemon, ALICE) as alice, puppet_of(daemon, BOB) as bob:
            yield daemon, alice, bob


def at_limit(puppet: Client, says: str, key: str, verb: str, **arguments: object) -> None:
    """What is asked must be refused, for this limit of ALICE's."""
    text = refused(puppet, Code.LIMIT_REACHED, verb, **arguments)
    assert f"uid {ALICE.uid} has {says}" in text
    assert f"limits.per_uid.{key} of luod's configuration" in text


def everything_works(bob: Client) -> None:
    """BOB makes all that his share lets him, and lets it go again."""
    ask(bob, "open", name="his", metadata=b"x" * 60)
    ask(bob, "add", name="his", entries="abcd")
    ask(bob, "finalize_held", name="his")
    ask(bob, "preserve", name="his-2")
    ask(bob, "open", name="his-3")
    ask(bob, "close", name="his-3")
    assert ask(bob, "claim", session="his-2")
    assert ask(bob, "discard", session="his")
    assert ask(bob, "list") == []


def test_sessions(limited: tuple[Daemon, Client, Client]) -> None:
    daemon, alice, bob = limited
    ask(alice, "preserve", name="s1")
    ask(alice, "preserve", name="s2")
    ask(alice, "open", name="s3")
    at_limit(alice, "3 sessions", "max_sessions", "open", name="s4")
    everything_works(bob)
    with luod_client.serialize("by-root", owner=BOB.uid, runtime_dir=daemon.runtime_dir):
        pass
    with pytest.raises(luod_client.Refusal, match=f"uid {ALICE.uid} has 3 sessions"):
        luod_client.serialize("by-root", owner=ALICE.uid, runtime_dir=daemon.runtime_dir)
    daemon.upgrade()
    at_limit(alice, "3 sessions", "max_sessions", "open", name="s4")
    ask(alice, "close", name="s3")
    until(lambda: ask(alice, "list") == [("s1", ALICE.uid), ("s2", ALICE.uid)], "the open session to be rolled back")
    ask(alice, "preserve", name="s4")
    at_limit(alice, "3 sessions", "max_sessions", "preserve", name="s5")
    for name in ("s1", "s2", "s4"):
        ask(alice, "claim", session=name)
    ask(alice, "preserve", name="s5")
    ask(alice, "discard", session="s5")


def test_fds_of_open_sessions(limited: tuple[Daemon, Client, Client]) -> None:
    daemon, alice, bob = limited
    ask(alice, "open", name="s1")
    ask(alice, "open", name="s2")
    ask(alice, "add", name="s1", entries="abc")
    at_limit(alice, "3 fds in open sessions", "max_staged_fds", "add", name="s2", entries="ab")
    ask(alice, "add", name="s2", entries="a")
    everything_works(bob)
    daemon.upgrade()
    at_limit(alice, "4 fds in open sessions", "max_staged_fds", "add", name="s2", entries="b")
    ask(alice, "unpreserve", name="s1", entries=("a",))
    ask(alice, "add", name="s2", entries="b")
    ask(alice, "finalize_held", name="s1")
    ask(alice, "add", name="s2", entries="cd")
    ask(alice, "close", name="s2")
    ask(alice, "discard", session="s1")


def test_fds_of_finalized_sessions(limited: tuple[Daemon, Client, Client]) -> None:
    daemon, alice, bob = limited
    ask(alice, "preserve", name="s1", count=3)
    ask(alice, "open", name="s2")
    ask(alice, "add", name="s2", entries="abc")
    at_limit(alice, "3 fds in finalized sessions", "max_preserved_fds", "finalize_held", name="s2")
    everything_works(bob)
    ask(alice, "unpreserve", name="s2", entries=("b",))
    ask(alice, "finalize_held", name="s2")
    daemon.upgrade()
    at_limit(alice, "5 fds in finalized sessions", "max_preserved_fds", "preserve", name="s3")
    ask(alice, "discard", session="s2")
    ask(alice, "preserve", name="s3", count=2)
    for name in ("s1", "s3"):
        ask(alice, "discard", session=name)


def test_metadata(limited: tuple[Daemon, Client, Client]) -> None:
    daemon, alice, bob = limited
    ask(alice, "open", name="s1", metadata=b"x" * 40)
    at_limit(alice, "42 bytes", "max_metadata_bytes", "open", name="s2", metadata=b"x" * 57)
    ask(alice, "add", name="s1", entries=("a",), metadata=b"x" * 57)
    everything_works(bob)
    daemon.upgrade()
    at_limit(alice, "100 bytes", "max_metadata_bytes", "add", name="s1", entries=("b",))
    at_limit(alice, "100 bytes", "max_metadata_bytes", "open", name="s2")
    ask(alice, "finalize_held", name="s1")
    daemon.upgrade()
    at_limit(alice, "100 bytes", "max_metadata_bytes", "open", name="s2")
    ask(alice, "discard", session="s1")
    ask(alice, "open", name="s2", metadata=b"x" * 98)
    ask(alice, "close", name="s2")


def test_connections(limited: tuple[Daemon, Client, Client]) -> None:
    daemon, alice, bob = limited
    for _ in range(5):
        ask(alice, "connect")
    ask(alice, "open", name="s1")
    for verb in ("connect", "list"):
        text = refused(alice, FaultCode.TOO_MANY_CONNECTIONS, verb)
        assert f"uid {ALICE.uid} has 6 connections, its limit" in text
        assert "limits.per_uid.max_connections" in text
    everything_works(bob)
    daemon.upgrade()
    refused(alice, FaultCode.TOO_MANY_CONNECTIONS, "connect")
    ask(alice, "disconnect")
    until(lambda: daemon.status().connections == 6, "luod to have seen the end of the connection")
    ask(alice, "list")
    ask(alice, "add", name="s1", entries="a")
    ask(alice, "close", name="s1")


def test_root_and_luods_own_user_have_no_limits_of_their_own(limited: tuple[Daemon, Client, Client]) -> None:
    daemon, _, _ = limited
    where = daemon.runtime_dir
    with eventfd() as irq, luod_client.serialize("big", metadata=b"x" * 200, runtime_dir=where) as session:
        session.preserve({f"irq-{number}": irq.fileno() for number in range(9)})
        session.finalize()
        with luod_client.deserialize(runtime_dir=where) as looker:
            looker.discard("big")


def test_more_than_a_new_limit_is_kept(limited: tuple[Daemon, Client, Client], file: Path) -> None:
    daemon, alice, bob = limited
    for name in ("s1", "s2"):
        ask(alice, "preserve", name=name, count=2)
    ask(alice, "open", name="s3", metadata=b"x" * 20)
    ask(alice, "add", name="s3", entries="a")
    file.write_text("[limits.per_uid]\nmax_sessions = 1\nmax_connections = 1\nmax_preserved_fds = 2\nmax_metadata_bytes = 1\n")
    daemon.upgrade()
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
        assert [each.session for each in looker.list(owner=ALICE.uid)] == ["s1", "s2", "s3"]
    refused(alice, FaultCode.TOO_MANY_CONNECTIONS, "connect")
    at_limit(alice, "4 fds in finalized sessions", "max_preserved_fds", "finalize_held", name="s3")
    file.write_text(LIMITS)
    daemon.upgrade()
    ask(alice, "finalize_held", name="s3")
    ask(alice, "close", name="s3")
    for name in ("s1", "s2", "s3"):
        ask(alice, "claim" if name != "s3" else "discard", session=name)
    everything_works(bob)
