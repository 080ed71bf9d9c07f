"""The rules of the configuration, with real users: who may open sessions, and who may take those of others; also across an upgrade."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs
import pytest

import luod_client
from harness import ALICE, BOB, Client, Daemon, User, folder_for
from luod_client import Code
from puppets import ask, everybody_may_connect, puppet_of, refused

pytestmark = pytest.mark.root

TEAM = 60_010
CAROL = User(uid=60_003, gid=60_003, groups=(60_005, TEAM))
"""In a group that isn't her first."""

DAVE = User(uid=60_004, gid=60_004, groups=(*range(70_000, 70_400), TEAM))
"""In more groups than Python's getsockopt can tell."""

RULES = f"""
[[serialize]]
uid = {ALICE.uid}
names = ["guest-*", "Cache"]
[[serialize]]
gid = {BOB.gid}
[[claim]]
gid = {TEAM}
owner = {ALICE.uid}
names = ["guest-*"]
"""


@contextmanager
def serving(folder: Path, rules: str) -> Generator[tuple[Daemon, Path]]:
    file = folder / "luod.toml"
    file.write_text(rules)
    with Daemon(options=("--config", str(file))) as daemon:
        everybody_may_connect(daemon, "serialize", "deserialize")
        yield daemon, file


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Daemon, Path]]:
    with serving(tmp_path, RULES) as daemon:
        yield daemon


@contextmanager
def puppets(daemon: Daemon, *users: User) -> Generator[list[Client]]:
    with ExitStack() as stack:
        yield [stack.enter_context(puppet_of(daemon, user)) for user in users]


def test_who_may_open_what(served: tuple[Daemon, Path]) -> None:
    daemon, _ = served
    with puppets(daemon, ALICE, BOB, CAROL) as (alice, bob, carol):
        ask(alice, "preserve", name="guest-7")
        ask(alice, "preserve", name="Cache")
        for name in ("cache", "guest", "other"):
            text = refused(alice, Code.NOT_PERMITTED, "preserve", name=name)
            assert f"don't let uid {ALICE.uid} open a session '{name}', only those named guest-* or Cache" in text
            assert "whoever runs luod can change them" in text
        ask(bob, "preserve", name="anything")
        assert f"don't let uid {CAROL.uid} open sessions" in refused(carol, Code.NOT_PERMITTED, "preserve", name="guest-7")
        with luod_client.serialize("of root", runtime_dir=daemon.runtime_dir):
            pass
        with luod_client.serialize("of carol", owner=CAROL.uid, runtime_dir=daemon.runtime_dir) as session:
            session.finalize()
        assert ask(carol, "discard", session="of carol") == session.id
        assert ask(bob, "discard", session="anything")
        for name in ("guest-7", "Cache"):
            ask(alice, "discard", session=name)


@pytest.mark.parametrize("member", [CAROL, DAVE], ids=["in-a-few-groups", "in-very-many-groups"])
def test_who_may_claim_sessions_of_others(served: tuple[Daemon, Path], member: User) -> None:
    daemon, _ = served
    with puppets(daemon, ALICE, BOB, member) as (alice, bob, carol):
        hers, cache = ask(alice, "preserve", name="guest-7"), ask(alice, "preserve", name="Cache")
        his = ask(bob, "preserve", name="guest-7")

        assert ask(carol, "list") == [("guest-7", ALICE.uid)]
        assert ask(carol, "list", owner=ALICE.uid) == [("guest-7", ALICE.uid)]
        assert "a [[claim]] rule" in refused(carol, Code.NOT_PERMITTED, "list", owner=BOB.uid)
        assert ask(carol, "show", session="guest-7", owner=ALICE.uid) == ALICE.uid
        assert ask(carol, "show", session_id=hers) == ALICE.uid
        refused(carol, Code.NO_SUCH_SESSION, "show", session="guest-7")  # her own
        for verb in ("show", "claim", "discard"):
            refused(carol, Code.NO_SUCH_SESSION, verb, session="Cache", owner=ALICE.uid)
            refused(carol, Code.NO_SUCH_SESSION, verb, session_id=cache)
            refused(carol, Code.NO_SUCH_SESSION, verb, session_id=his)
            refused(carol, Code.NOT_PERMITTED, verb, session="guest-7", owner=BOB.uid)
            refused(bob, Code.NO_SUCH_SESSION, verb, session_id=hers)
            refused(bob, Code.NOT_PERMITTED, verb, session="guest-7", owner=ALICE.uid)
        refused(carol, Code.NOT_PERMITTED, "preserve", name="guest-8", owner=ALICE.uid)

        assert ask(carol, "claim", session="guest-7", owner=ALICE.uid) == hers
        assert ask(carol, "finish", session_id=hers) == hers, "the answer may have been lost"
        refused(bob, Code.NO_SUCH_SESSION, "finish", session_id=hers)
        refused(alice, Code.SESSION_FINISHED, "show", session_id=hers)

        again = ask(alice, "preserve", name="guest-7")
        assert ask(carol, "discard", session_id=again) == again
        assert ask(alice, "discard", session="Cache") == cache
        assert ask(bob, "discard", session="guest-7") == his


def test_the_rules_change_with_an_upgrade_and_connections_keep_their_groups(served: tuple[Daemon, Path]) -> None:
    daemon, file = served
    with puppets(daemon, ALICE, BOB, CAROL, DAVE) as (alice, bob, carol, dave):
        hers = ask(alice, "preserve", name="guest-7")
        ask(alice, "open", name="guest-8")
        ask(alice, "add", name="guest-8", entries=("a",))
        for puppet in (carol, dave):
            ask(puppet, "connect")
            assert ask(puppet, "held", what="show", session_id=hers) == ALICE.uid
        daemon.upgrade()
        for puppet in (carol, dave):
            assert ask(puppet, "held", what="show", session_id=hers) == ALICE.uid, "the same connection, in a successor"
        assert ask(dave, "held", what="claim", session_id=hers) == ALICE.uid

        file.write_text(f"[[serialize]]\nuid = {BOB.uid}\n[[claim]]\nuid = {BOB.uid}\n")
        daemon.upgrade()
        refused(carol, Code.NO_SUCH_SESSION, "held", what="show", session_id=hers)
        assert ask(dave, "finish_held") == hers, "a claim goes on to its end"
        refused(alice, Code.NOT_PERMITTED, "preserve", name="guest-9")
        ask(alice, "add", name="guest-8", entries=("b",))
        ask(alice, "finalize_held", name="guest-8")
        assert ask(bob, "list") == [("guest-8", ALICE.uid)]
        refused(bob, Code.NO_SUCH_SESSION, "show", session="guest-8")
        assert ask(bob, "discard", session="guest-8", owner=ALICE.uid)


def test_a_rule_for_both_a_user_and_a_group(tmp_path: Path) -> None:
    rule = f"[[serialize]]\nuid = {CAROL.uid}\ngid = {TEAM}\n"
    outsider = attrs.evolve(CAROL, groups=())
    with serving(tmp_path, rule) as (daemon, _), puppets(daemon, CAROL, outsider, DAVE) as (carol, alone, dave):
        ask(carol, "preserve", name="guest")
        refused(alone, Code.NOT_PERMITTED, "preserve", name="guest-2")
        refused(dave, Code.NOT_PERMITTED, "preserve", name="guest-2")
        assert ask(alone, "discard", session="guest"), "an owner's session is theirs, whatever the rules"


def test_luods_own_user_needs_a_rule_like_any_other() -> None:
    with folder_for() as folder:
        file = Path(folder) / "luod.toml"
        file.write_text(f"[[serialize]]\nuid = {BOB.uid}\n")
        with Daemon(user=ALICE, options=("--config", str(file))) as daemon, puppets(daemon, ALICE) as (alice,):
            refused(alice, Code.NOT_PERMITTED, "preserve", name="guest")
