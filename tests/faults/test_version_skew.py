"""A luod meets an older and a newer one: it carries everything, or refuses before anything is frozen and names what is in the way."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

import luod_client
from faulty import Faulty, Scene, ask_upgrade, meanwhile, scene
from harness import LIMIT_S, Daemon
from luod_client import Code, Refusal
from luod_protocol import messages as m
from raw import Raw
from releases import NEWER, other_release
from things import memfd, pipe

UPGRADE: Final = "upgrade"
TAKEOVER: Final = "takeover"

Release = dict[str, Any]


@attrs.frozen(kw_only=True)
class Case:
    """One luod is to follow another, and clients hold what `scene` has.

    Attributes:
        name: of the case.
        old: the release that hands over.
        new: the one that is to follow.
        before: the sessions are made by a luod of this release, before `old` follows it.
        wire: the wire version of a client that is connected besides.
        refused: what the refusal must say; empty: all is carried.
        unheard: what a takeover is told that has no wire version in common; empty where it has.
    """

    name: str
    old: Release = attrs.Factory(dict[str, Any])
    new: Release = attrs.Factory(dict[str, Any])
    before: bool = False
    wire: int = 1
    refused: str = ""
    unheard: str = ""


CASES: Final = (
    Case(name="the next release", new=NEWER),
    Case(name="the release before, and nothing is held that only the later one knows", old=NEWER, before=True),
    Case(name="two of the next release", old=NEWER, new=NEWER),
    Case(name="the release before says less, the next one more", old={**NEWER, "adds": True}, before=True),
    Case(name="the next release says more, this one less", new={**NEWER, "adds": True}),
    Case(name="no kind that is held is missing", new={"without": ["eventfd"], "kinds": {"socket": "socket-v2"}}),
    Case(name="handover", new={"handover": [2, 2]}, refused="it speaks handover version 2, this luod 1"),
    Case(name="handover, told with more", new={"handover": [2, 2], "adds": True}, refused="it speaks handover version 2, this luod 1"),
    Case(name="handover of the release before", old={"handover": [2, 3]}, refused="it speaks handover version 1, this luod 2 to 3"),
    Case(
        name="manifest of the next release",
        old={"manifest": [1, 2]},
        refused=r"it reads manifests of version 1, and version 2 is that of session 'first' of uid \d+, .*'second' .*'claimed' of uid \d+$",
    ),
    Case(
        name="manifest that the next release reads no more",
        new={"manifest": [2, 3]},
        refused="it reads manifests of version 2 to 3, and version 1 is that of session 'first' of uid",
    ),
    Case(
        name="wire of the next release",
        old={"wire": [1, 2]},
        wire=2,
        refused=rf"it speaks wire version 1 to clients, and version 2 is that of process {os.getpid()}",
    ),
    Case(
        name="wire that the next release speaks no more",
        new={"wire": [2, 2]},
        refused=rf"it speaks wire version 2 to clients, and version 1 is that of process {os.getpid()}, ",
        unheard="the client speaks wire version 2, this luod 1: update the older of them",
    ),
    Case(
        name="a kind is missing",
        new={"without": ["pipe"]},
        refused=r"entries of kind pipe are pipe-v1, it knows no such kind: "
        r"'pipe' of session 'first' of uid \d+, 'pipe' of session 'second' .* and 1 more",
    ),
    Case(
        name="a kind of another version",
        new={"kinds": {"memfd": "memfd-v2"}},
        refused="entries of kind memfd are memfd-v1, it knows memfd-v2: 'ram' of session 'first' of uid",
    ),
    Case(
        name="a kind of the next release",
        old={"kinds": {"memfd": "memfd-v2"}},
        refused="entries of kind memfd are memfd-v2, it knows memfd-v1: 'ram' of session 'first' of uid",
    ),
    Case(
        name="all at once",
        new={"handover": [2, 2], "manifest": [2, 2], "wire": [2, 2], "without": ["pipe", "memfd"]},
        refused="handover version 2, .*; .*manifests of version 2, .*; .*wire version 2 .*; .*kind memfd .*; .*kind pipe",
        unheard="the client speaks wire version 2, this luod 1: update the older of them",
    ),
)


def follow(daemon: Daemon, folder: Path, how: str, new: Release) -> str:
    """Have a luod of release `new` follow. Returns why that was refused; empty when it serves."""
    program = other_release(folder, new)
    if how == UPGRADE:
        try:
            daemon.upgrade(program)
        except Refusal as refusal:
            return f"{refusal.code}: {refusal.message}"
        return ""
    command = [program, "--runtime-dir", daemon.runtime_dir, "--takeover"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 1
    return done.stderr.strip()


@contextmanager
def never_frozen(daemon: Daemon, *, heard: bool = True) -> Generator[None]:
    """A monitor that sees an upgrade fail in the block (or none begin, where nobody is `heard`), and no freeze."""
    with luod_client.control(runtime_dir=daemon.runtime_dir) as control:
        events = control.monitor()
        yield
        last = "upgrade-failed" if heard else "rolled-back"
        luod_client.serialize("the last event", runtime_dir=daemon.runtime_dir).close()
        seen: list[str] = []
        while last not in seen:
            seen.append(next(events).event)
        expected = ["upgrading", "upgrade-failed"] if heard else []
        assert [name for name in seen if "upgrad" in name or "freez" in name] == expected


@contextmanager
def speaking(daemon: Daemon, version: int) -> Generator[Raw]:
    """A client that speaks this version of the wire."""
    with Raw(daemon.runtime_dir, greet=False) as client:
        welcome = client.ask(m.Hello(seq=1, low=version, high=version))
        assert isinstance(welcome, m.Welcome)
        assert welcome.version == version
        yield client


@contextmanager
def held(daemon: Daemon, folder: Path, case: Case) -> Generator[tuple[Scene, Raw]]:
    """A luod of the release `case.old` that holds a scene, and a client besides."""
    with ExitStack() as stack:
        if not case.before and case.old:
            if case.old.get("handover", [1])[0] > 1:
                daemon.upgrade(other_release(folder, NEWER))  # or it could not follow this one
            daemon.upgrade(other_release(folder, case.old))
        made = stack.enter_context(scene(daemon.runtime_dir))
        if case.before:
            daemon.upgrade(other_release(folder, case.old))
        yield made, stack.enter_context(speaking(daemon, case.wire))


def check_all(made: Scene, client: Raw) -> None:
    """Everything is there and can be had."""
    assert isinstance(client.ask(m.Status(seq=2)), m.DaemonStatus)
    made.check_finalized_is_there("first", "second", "claimed")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if not case.refused], ids=lambda case: case.name)
def test_everything_is_carried(daemon: Daemon, tmp_path: Path, case: Case) -> None:
    with held(daemon, tmp_path, case) as (made, client):
        generation = daemon.status().generation
        assert follow(daemon, tmp_path, UPGRADE, case.new) == ""
        assert daemon.status().generation == generation + 1
        check_all(made, client)
        made.check_live()
        made.check_finalized("first", "second")


@pytest.mark.slow
@pytest.mark.parametrize("how", [UPGRADE, TAKEOVER])
@pytest.mark.parametrize("case", [case for case in CASES if case.refused], ids=lambda case: case.name)
def test_it_is_refused_before_anything_is_frozen(daemon: Daemon, tmp_path: Path, case: Case, how: str) -> None:
    with held(daemon, tmp_path, case) as (made, client):
        before = daemon.status()
        refused = (case.unheard if how == TAKEOVER else "") or case.refused
        with never_frozen(daemon, heard=refused == case.refused):
            said = follow(daemon, tmp_path, how, case.new)
        assert re.search(refused, re.sub(r" \(it ended with status 1\)$", "", said)), said
        assert how == TAKEOVER or said.startswith(f"{Code.UPGRADE_FAILED}: the upgrade failed, ")
        after = daemon.status()
        assert (after.pid, after.generation, after.last_pause_us) == (before.pid, before.generation, before.last_pause_us)
        check_all(made, client)
        # One that fits: of the release that serves.
        assert follow(daemon, tmp_path, UPGRADE, case.old) == ""
        assert daemon.status().generation == before.generation + 1
        check_all(made, client)
        made.check_live()
        made.check_finalized("first", "second")


def test_a_downgrade_works_again_when_what_was_in_its_way_is_gone(daemon: Daemon, tmp_path: Path) -> None:
    daemon.upgrade(other_release(tmp_path, NEWER))
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session, memfd() as ram:
        session.preserve({"ram": ram.fileno()})
        session.finalize()
    with pytest.raises(Refusal, match="version 2 is that of session 'guest'"):
        ask_upgrade(daemon.runtime_dir)
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
        looker.discard("guest")
    assert daemon.upgrade().generation == 3


# What clients do after the successor said what it knows.


@pytest.fixture
def waiting(daemon: Daemon, tmp_path: Path) -> Iterator[Faulty]:
    """A successor without pipes that waits before it has verified all."""
    waiting = Faulty(tmp_path, "before-send:meet=no-pipes,before-send:verified=wait")
    yield waiting
    waiting.give_up()


@pytest.mark.parametrize("finalized", [False, True])
def test_what_comes_while_it_copies_is_refused_before_the_freeze_too(daemon: Daemon, waiting: Faulty, finalized: bool) -> None:
    where = daemon.runtime_dir
    with (
        luod_client.serialize("late", runtime_dir=where) as session,
        pipe() as (_, write),
        never_frozen(daemon),
        meanwhile(lambda: ask_upgrade(where, waiting.program)) as upgrade,
    ):
        waiting.wait_for("before-send:verified")
        session.preserve({"pipe": write.fileno()})
        if finalized:
            session.finalize()
        waiting.go_on()
        with pytest.raises(Refusal) as refused:
            upgrade.result()
    assert refused.value.code is Code.UPGRADE_FAILED
    assert "entries of kind pipe are pipe-v1, it knows no such kind: 'pipe' of session 'late'" in refused.value.message
    assert daemon.upgrade().generation == 2
    if finalized:
        with luod_client.deserialize(runtime_dir=where) as looker, looker.claim("late") as claim:
            assert list(claim.entries) == ["pipe"]
            claim.finish()
