"""A successor that fails before the commit, at each step and in each way: the old daemon serves as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import luod_client
from faulty import Faulty, Scene, ask_upgrade, children_of, config, meanwhile, scene
from harness import Daemon
from luod_client import Code, Refusal

STEP_S = 1.0
"""The bound of each step of a handover, in seconds."""

STEPS = (
    "before-send:meet",
    "after-send:meet",
    "after-receive:offer",
    "after-receive:box",
    "verify:box:2",
    "after-receive:copied",
    "before-send:verified",
    "after-send:verified",
    "after-receive:open-session",
    "after-receive:staged",
    "after-receive:connection",
    "after-receive:frozen",
    "before-send:serving",
)
"""The way of a successor, up to its commit, in the scene of these tests."""


@pytest.fixture
def bounded(tmp_path: Path) -> Iterator[Daemon]:
    """A luod that gives its successor little time once it has said who it is."""
    with Daemon(options=config(tmp_path, copy_s=STEP_S, freeze_s=STEP_S, commit_s=STEP_S)) as daemon:
        yield daemon


def refused_upgrade(daemon: Daemon, program: str) -> str:
    """Try to upgrade to `program`. Returns why luod says that it failed."""
    with luod_client.control(runtime_dir=daemon.runtime_dir) as control:
        with pytest.raises(Refusal) as caught:
            control.upgrade(program)
        assert caught.value.code is Code.UPGRADE_FAILED
        assert control.status().generation == 1
    return caught.value.message


def check_as_before(daemon: Daemon, pid: int, made: Scene) -> None:
    """The old daemon serves, and has nobody left over; a healthy upgrade works, then all that it carried can be had."""
    assert daemon.pid == pid
    assert children_of(pid) == []
    made.check_finalized_is_there("first", "second", "claimed")
    made.check_live()
    made.check_finalized("first")
    assert daemon.upgrade().generation == 2
    made.check_finalized("second")


def check_fault(daemon: Daemon, folder: Path, step: str, action: str, reason: str) -> None:
    """At `step` the successor does `action`, and luod reports `reason`."""
    pid = daemon.pid
    with scene(daemon.runtime_dir) as made:
        faulty = Faulty(folder, f"{step}={action}")
        said = refused_upgrade(daemon, faulty.program)
        assert faulty.hits() == [step]
        assert re.search(reason, said), said
        assert "the upgrade failed, generation 1 goes on serving" in said
        check_as_before(daemon, pid, made)


@pytest.mark.parametrize("step", STEPS)
def test_it_is_killed(bounded: Daemon, tmp_path: Path, step: str) -> None:
    check_fault(bounded, tmp_path, step, "kill", r"ended without taking over.*it ended with signal 9")


@pytest.mark.parametrize(
    "step", ["before-send:meet", "after-receive:box", "before-send:verified", "after-receive:staged", "before-send:serving"]
)
def test_it_has_a_bug(bounded: Daemon, tmp_path: Path, step: str) -> None:
    check_fault(bounded, tmp_path, step, "raise", r"the successor declined: the successor is ending.*it ended with status 1")


@pytest.mark.parametrize("step", ["after-receive:offer", "verify:box:2", "verify:entries:4", "after-receive:frozen"])
def test_it_finds_that_something_is_not_what_it_should_be(bounded: Daemon, tmp_path: Path, step: str) -> None:
    check_fault(bounded, tmp_path, step, "mismatch", r"the successor declined: a mismatch that a test wants.*it ended with status 1")


@pytest.mark.parametrize("step", ["before-send:meet", "after-receive:copied", "after-receive:connection:2"])
def test_it_exits(bounded: Daemon, tmp_path: Path, step: str) -> None:
    check_fault(bounded, tmp_path, step, "exit", r"ended without taking over.*it ended with status 7")


@pytest.mark.parametrize("step", ["before-send:meet", "after-receive:box", "before-send:verified"])
def test_it_says_no_and_nothing_else(bounded: Daemon, tmp_path: Path, step: str) -> None:
    check_fault(bounded, tmp_path, step, "decline", "the successor declined: not today")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["after-receive:offer", "before-send:verified", "after-receive:frozen"])
def test_it_closes_the_handover(bounded: Daemon, tmp_path: Path, step: str) -> None:
    check_fault(bounded, tmp_path, step, "close", "ended without taking over")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("after-receive:offer", "did not verify what it was sent within 1 s"),
        ("verify:box:2", "did not verify what it was sent within 1 s"),
        ("before-send:verified", "did not verify what it was sent within 1 s"),
        ("after-receive:connection", "after the freeze: the successor did not serve within 1 s"),
        ("before-send:serving", "after the freeze: the successor did not serve within 1 s"),
    ],
)
def test_it_hangs(bounded: Daemon, tmp_path: Path, step: str, reason: str) -> None:
    check_fault(bounded, tmp_path, step, "stop", rf"{reason}.*it ended with signal {signal.SIGKILL:d}")


@pytest.mark.slow
def test_it_hangs_before_it_has_said_who_it_is(tmp_path: Path) -> None:
    with Daemon(options=config(tmp_path, meet_s=4 * STEP_S)) as daemon:
        check_fault(daemon, tmp_path, "before-send:meet", "stop", r"did not say who it is within 4 s.*it ended with signal 9")


@pytest.mark.parametrize(
    ("step", "action", "reason"),
    [
        ("before-send:meet", "garbage", "can't be understood: .*not one msgpack value"),
        ("after-receive:copied", "garbage", "can't be understood: .*not one msgpack value"),
        ("after-receive:box", "say-fd", "can't be understood: verified takes 0 fds, 1 came"),
        ("after-send:meet", "say-meet", "the successor sent accepted out of order"),
        ("before-send:meet", "say-verified", "the successor sent verified out of order"),
        ("after-receive:box", "say-copied", "the successor sent copied, which is not its to send"),
        ("before-send:meet", "say-serving", "the successor sent serving-read out of order"),
        ("after-receive:offer", "say-serving", "the successor sent serving-read out of order"),
    ],
)
def test_it_says_what_is_not_in_order(bounded: Daemon, tmp_path: Path, step: str, action: str, reason: str) -> None:
    check_fault(bounded, tmp_path, step, action, reason)


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("far-handover", "it speaks handover version 8 to 9, this luod 1"),
        ("far-manifest", r"it reads manifests of version 8 to 9, and version 1 is that of session 'first' of uid \d+, .* 'claimed' of uid"),
        ("far-wire", "it speaks wire version 8 to 9 to clients, and version 1 is that of process"),
        ("no-pipes", "entries of kind pipe are pipe-v1, it knows no such kind: 'pipe' of session 'first'"),
        ("far-memfds", "entries of kind memfd are memfd-v1, it knows memfd-v2: 'ram' of session 'first' .* and 1 more"),
    ],
)
def test_it_is_of_a_release_that_can_not_carry_what_is_held(bounded: Daemon, tmp_path: Path, action: str, reason: str) -> None:
    check_fault(bounded, tmp_path, "before-send:meet", action, f"luod 0.1.0 can't carry what is held here: {reason}")


@pytest.mark.parametrize(
    ("step", "action"),
    [
        *(("after-receive:frozen", action) for action in ("garbage", "say-verified", "say-meet", "say-copied", "decline")),
        ("before-send:serving", "garbage"),
        ("before-send:serving", "say-verified"),
    ],
)
def test_it_says_what_is_not_in_order_and_commits(bounded: Daemon, tmp_path: Path, step: str, action: str) -> None:
    """Whether the commit came in time or not: one of the two serves, with everything, and the other is gone."""
    pid = bounded.pid
    with scene(bounded.runtime_dir) as made:
        faulty = Faulty(tmp_path, f"{step}={action}")
        with luod_client.control(runtime_dir=bounded.runtime_dir) as control:
            serving = pid
            with suppress(Refusal):
                serving = control.upgrade(faulty.program).pid
        assert faulty.hits() == [step]
        assert bounded.pid == serving
        assert children_of(serving) == []
        made.check_live()
        made.check_finalized("first")
        generation = bounded.status().generation
        assert generation == (1 if serving == pid else 2)
        assert bounded.upgrade().generation == generation + 1
        made.check_finalized("second")


@pytest.mark.slow
def test_it_wants_to_commit_when_the_old_daemon_has_given_it_up(bounded: Daemon, tmp_path: Path) -> None:
    pid = bounded.pid
    with scene(bounded.runtime_dir) as made:
        late = Faulty(tmp_path, "before-send:serving=wait")
        with meanwhile(lambda: refused_upgrade(bounded, late.program)) as refused:
            late.wait_for("before-send:serving")
            # Parked with all others, and answered by the old daemon when it has thawed.
            assert made.open.status().pid == pid
            late.go_on()
            assert "the successor did not serve within 1 s after the freeze (it ended with status 1)" in refused.result()
        bounded.wait_stderr("luod: the old daemon declined: after the freeze")
        check_as_before(bounded, pid, made)


@pytest.mark.parametrize(
    ("step", "action", "reason"),
    [
        ("instead-of:box:2", "nothing", r"3 of 4 sessions came"),
        ("instead-of:box:2", "another-session", r"a box has another session's manifest"),
        ("instead-of:staged", "turn-round", r"entry 'ram' is another object"),
        ("instead-of:staged", "one-less", r"staged takes 2 fds, 1 came"),
        ("instead-of:staged", "nothing", r"open session 'open' came with 0 of 2 entries"),
        ("instead-of:open-session", "nothing", r"staged entries came without a session"),
        ("instead-of:connection", "nothing", r"connections came|open session 'open'"),
        ("instead-of:connection", "another-session", r"open session 'open' came"),
        ("instead-of:offer", "one-less", r"offer takes 5 fds, 4 came"),
    ],
)
def test_a_healthy_one_declines_what_is_not_what_it_should_be(daemon: Daemon, tmp_path: Path, step: str, action: str, reason: str) -> None:
    """Here the old daemon is faulty, once."""
    old = Faulty(tmp_path, f"{step}={action}")
    daemon.upgrade(old.program)
    pid = daemon.pid
    with scene(daemon.runtime_dir) as made:
        with pytest.raises(Refusal, match=rf"the successor declined: .*({reason})") as caught:
            ask_upgrade(daemon.runtime_dir)
        assert caught.value.code is Code.UPGRADE_FAILED
        assert old.hits() == [step]
        assert (daemon.pid, daemon.status().generation) == (pid, 2)
        made.check_live()
        made.check_finalized("first")
        assert daemon.upgrade().generation == 3
        made.check_finalized("second")


def test_a_program_that_is_no_luod(daemon: Daemon, tmp_path: Path) -> None:
    pid = daemon.pid
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\nexit 3\n")
    with scene(daemon.runtime_dir) as made:
        assert "Permission denied" in refused_upgrade(daemon, str(script))
        script.chmod(0o755)
        assert "it ended with status 3" in refused_upgrade(daemon, str(script))
        assert "No such file or directory" in refused_upgrade(daemon, str(tmp_path / "none"))
        assert "Permission denied" in refused_upgrade(daemon, str(tmp_path))
        with luod_client.control(runtime_dir=daemon.runtime_dir) as control:
            with pytest.raises(Refusal, match="absolute path") as caught:
                control.upgrade(os.path.relpath(script))
            assert caught.value.code is Code.BAD_REQUEST
        check_as_before(daemon, pid, made)
