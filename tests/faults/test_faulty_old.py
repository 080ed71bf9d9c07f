"""An old daemon that dies in the middle of a handover: its successor serves, with everything finalized that it was sent.

Before `frozen` was sent the clients' connections end, from then on they live.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import luod_client
from faulty import Faulty, Scene, ask_upgrade, meanwhile, scene
from harness import Daemon, until
from luod_client import Code, Disconnected, NoDaemon, Refusal
from things import let_go, state

FINALIZED = ("first", "second", "claimed")
"""The scene's finalized sessions, in the order in which they are sent."""


def faulty_old(daemon: Daemon, folder: Path, step: str, action: str = "kill") -> Faulty:
    """Make `daemon` a luod of generation 2 that is killed at `step` of its own handover."""
    old = Faulty(folder, f"{step}={action}")
    daemon.upgrade(old.program)
    return old


def check_ended(made: Scene) -> None:
    """The connections have ended, and what was tied to them is undone."""
    with pytest.raises(Disconnected):
        made.open.status()
    with pytest.raises(Disconnected):
        made.looker.list()
    assert let_go(made.ends["open"]), "somebody still holds a copy of the session that was open"


@pytest.mark.parametrize(
    ("step", "sent"),
    [
        ("after-send:offer", 0),
        ("before-send:box", 0),
        ("after-send:box", 1),
        ("before-send:box:2", 1),
        ("before-send:copied", 3),
        ("after-send:copied", 3),
        ("after-receive:verified", 3),
        ("after-send:open-session", 3),
        ("after-send:staged", 3),
        ("after-send:connection", 3),
        ("after-send:connection:3", 3),
        ("before-send:frozen", 3),
    ],
)
def test_killed_before_all_was_sent(daemon: Daemon, tmp_path: Path, step: str, sent: int) -> None:
    old = faulty_old(daemon, tmp_path, step)
    with scene(daemon.runtime_dir) as made:
        with pytest.raises(Disconnected):
            ask_upgrade(daemon.runtime_dir)
        assert old.hits() == [step]
        status = daemon.status()
        assert (status.generation, status.sessions_open, status.sessions_claimed) == (3, 0, 0)
        assert (status.sessions_preserved, status.preserved_fds, status.staged_fds) == (sent, 2 * sent, 0)
        check_ended(made)
        for name in FINALIZED[sent:]:
            assert state(daemon.runtime_dir, name) == "gone"
            assert let_go(made.ends[name])
        made.check_finalized(*FINALIZED[: min(sent, 1)])
        assert daemon.upgrade().generation == 4
        made.check_finalized(*FINALIZED[1:sent])


@pytest.mark.parametrize("step", ["after-send:frozen", "after-receive:serving"])
def test_killed_when_all_was_sent(daemon: Daemon, tmp_path: Path, step: str) -> None:
    old = faulty_old(daemon, tmp_path, step)
    with scene(daemon.runtime_dir) as made:
        with luod_client.control(runtime_dir=daemon.runtime_dir) as control:
            assert control.upgrade().generation == 3
            assert control.status().generation == 3
        old.wait_for(step)  # the successor serves before the old daemon has read that it does
        assert old.hits() == [step]
        made.check_live()
        made.check_finalized("first")
        assert daemon.upgrade().generation == 4
        made.check_finalized("second")


@pytest.mark.parametrize("step", ["after-receive:meet", "before-send:offer"])
def test_killed_before_it_offered_anything(daemon: Daemon, tmp_path: Path, step: str) -> None:
    """Nothing was sent, so nobody has anything; the successor leaves and the directory is free for another luod."""
    where = daemon.runtime_dir
    old = faulty_old(daemon, tmp_path, step)
    with scene(where) as made:
        with pytest.raises(Disconnected):
            ask_upgrade(where)
        assert old.hits() == [step]
        check_ended(made)
        assert all(let_go(made.ends[name]) for name in FINALIZED)
        with pytest.raises(NoDaemon):
            luod_client.control(runtime_dir=where)
    daemon.wait_stderr("the old daemon ended the handover")
    daemon.wait_gone()
    with Daemon(where) as fresh:
        assert fresh.status().generation == 1


def test_a_second_upgrade_is_refused_while_one_runs(daemon: Daemon, tmp_path: Path) -> None:
    where = daemon.runtime_dir
    held = faulty_old(daemon, tmp_path, "before-send:copied", "wait")
    with meanwhile(lambda: ask_upgrade(where)) as upgraded:
        held.wait_for("before-send:copied")
        with pytest.raises(Refusal, match="wait for its end") as caught:
            ask_upgrade(where)
        assert caught.value.code is Code.UPGRADE_RUNNING
        held.go_on()
        assert upgraded.result().generation == 3
    assert ask_upgrade(where).generation == 4
    until(lambda: daemon.status().generation == 4, "generation 4 serves")


@pytest.mark.parametrize("failing", ["ENOMEM", "ETOOMANYREFS"])
@pytest.mark.parametrize(
    "step", ["before-send:offer", "before-send:box", "before-send:copied", "before-send:connection", "before-send:frozen"]
)
def test_what_it_can_not_send_ends_the_upgrade_and_nothing_else(daemon: Daemon, tmp_path: Path, step: str, failing: str) -> None:
    """Such as ETOOMANYREFS, when too many fds of luod's user are in flight."""
    old = faulty_old(daemon, tmp_path, step, failing)
    with scene(daemon.runtime_dir) as made:
        with pytest.raises(Refusal, match="can't be sent"):
            ask_upgrade(daemon.runtime_dir)
        assert old.hits() == [step]
        assert daemon.status().generation == 2
        made.check_live()
        made.check_finalized("first")
        assert daemon.upgrade().generation == 3
        made.check_finalized("second")


@pytest.mark.parametrize("step", ["before-receive:meet", "before-receive:verified"])
def test_what_it_can_not_receive_at_once_it_receives_later(daemon: Daemon, tmp_path: Path, step: str) -> None:
    old = faulty_old(daemon, tmp_path, step, "ENOMEM")
    with scene(daemon.runtime_dir) as made:
        with pytest.raises(Refusal, match="can't be heard"):
            ask_upgrade(daemon.runtime_dir)
        assert old.hits() == [step]
        made.check_live()
        assert daemon.upgrade().generation == 3
        made.check_finalized("first", "second")


def test_a_commit_that_it_can_not_receive_at_once_is_a_commit(daemon: Daemon, tmp_path: Path) -> None:
    """The successor serves by then: an old daemon that took the failure for the end of the queue would be a second one."""
    old = faulty_old(daemon, tmp_path, "before-receive:serving", "ENOMEM")
    with scene(daemon.runtime_dir) as made:
        assert ask_upgrade(daemon.runtime_dir).generation == 3
        # The successor answers, perhaps before the old daemon has looked.
        old.wait_for("before-receive:serving")
        assert old.hits() == ["before-receive:serving"]
        assert daemon.status().generation == 3
        made.check_live()
        assert daemon.upgrade().generation == 4
        made.check_finalized("first", "second")


def test_an_upgrade_without_descriptors_to_spare_fails_with_the_reason(daemon: Daemon, tmp_path: Path) -> None:
    old = faulty_old(daemon, tmp_path, "after-receive:meet", "EMFILE")
    with scene(daemon.runtime_dir) as made:
        with pytest.raises(Refusal, match="Too many open files"):
            ask_upgrade(daemon.runtime_dir)
        assert old.hits() == ["after-receive:meet"]
        made.check_live()
        assert daemon.upgrade().generation == 3
        made.check_finalized("first", "second")
