"""What was answered while a successor is being filled, it knows, whatever becomes of the old daemon after the answer.

The old daemon is held just before `copied`: it serves, its successor has been sent all that was preserved, and hears of every change.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

import luod_client
from faulty import Faulty, ask_upgrade, config, meanwhile
from harness import Daemon, until
from luod_client import Code, Disconnected, Refusal
from luod_protocol.messages import Upgraded
from things import find, let_go, memfd, preserve_pipe, state, watched_pipe

STEP_S = 1.0
"""The bound of a step of a handover, in seconds."""


@contextmanager
def filling(
    daemon: Daemon, folder: Path, *faults: str, at: str = "before-send:copied", program: str = ""
) -> Generator[tuple[Callable[[], None], Future[Upgraded]]]:
    """A luod of generation 2 that is held while it fills its successor (`program`). Yields what lets it go on, and the answer."""
    held = Faulty(folder, ",".join([f"{at}=wait", *faults]))
    daemon.upgrade(held.program)
    with meanwhile(lambda: ask_upgrade(daemon.runtime_dir, program)) as upgraded:
        held.wait_for(at)
        try:
            yield held.go_on, upgraded
        except BaseException:
            held.give_up()
            raise
        assert held.hits() == [at, *(fault.partition("=")[0] for fault in faults)]


def finish(runtime_dir: str, name: str) -> None:
    with luod_client.deserialize(runtime_dir=runtime_dir) as looker, looker.claim(name) as claim:
        claim.finish()


def refusal_of(runtime_dir: str, session_id: bytes) -> tuple[Code, str]:
    """Why `show` doesn't show the session with this id."""
    with luod_client.deserialize(runtime_dir=runtime_dir) as looker, pytest.raises(Refusal) as caught:
        looker.show(session_id=session_id)
    return caught.value.code, caught.value.message


def test_every_change_is_there_after_the_upgrade(daemon: Daemon, tmp_path: Path) -> None:
    where = daemon.runtime_dir
    (finished, finished_id), (discarded, discarded_id), (used, _) = (
        preserve_pipe(where, name) for name in ("finished", "discarded", "used")
    )
    with finished, discarded, used:
        with filling(daemon, tmp_path) as (go_on, upgraded):
            finish(where, "finished")
            assert let_go(finished, 0)
            with luod_client.deserialize(runtime_dir=where) as looker:
                looker.discard("discarded")
                assert let_go(discarded, 0)
                with looker.claim("used") as claim, claim.retrieve("pipe")["pipe"]:
                    pass
            made, made_id = preserve_pipe(where, "made")
            brief, brief_id = preserve_pipe(where, "brief")
            finish(where, "brief")
            assert let_go(brief, 0)
            assert not upgraded.done()
            go_on()
            assert upgraded.result().generation == 3
        with made, brief:
            with luod_client.deserialize(runtime_dir=where) as looker:
                assert [each.session for each in looker.list()] == ["used", "made"]
                looker.finish(finished_id)
                looker.finish(brief_id)
                assert refusal_of(where, finished_id) == refusal_of(where, brief_id)
                assert refusal_of(where, finished_id)[0] is Code.SESSION_FINISHED
                code, message = refusal_of(where, discarded_id)
                assert code is Code.SESSION_FINISHED
                assert "discarded" in message
                by = looker.show("used").info.retrieved_by
                assert [(each.pid, each.alive) for each in by] == [(os.getpid(), True)]
                assert looker.show(session_id=made_id).info.generation == 2
            for name, end in (("used", used), ("made", made)):
                assert not let_go(end, 0)
                finish(where, name)
                assert let_go(end, 0)


def test_what_ended_just_before_the_copy_is_remembered_as_ended(daemon: Daemon, tmp_path: Path) -> None:
    where = daemon.runtime_dir
    ended, session_id = preserve_pipe(where, "ended")
    kept, _ = preserve_pipe(where, "kept")
    with ended, kept:
        with filling(daemon, tmp_path, at="after-send:offer") as (go_on, upgraded):
            with meanwhile(lambda: finish(where, "ended")) as finished, luod_client.serialize("new", runtime_dir=where) as session:
                session.finalize()
                finished.result()
            go_on()
            assert upgraded.result().generation == 3
        with luod_client.deserialize(runtime_dir=where) as looker:
            looker.finish(session_id)
            assert sorted(each.session for each in looker.list()) == ["kept", "new"]
        assert daemon.status().preserved_fds == 1
        finish(where, "kept")
        assert let_go(kept, 0)


def test_what_was_answered_is_there_after_the_old_daemons_death(daemon: Daemon, tmp_path: Path) -> None:
    where = daemon.runtime_dir
    finished, finished_id = preserve_pipe(where, "finished")
    with finished:
        with filling(daemon, tmp_path) as (_, upgraded):
            finish(where, "finished")
            made, _ = preserve_pipe(where, "made")
            daemon.kill(signal.SIGKILL)
            with pytest.raises(Disconnected):
                upgraded.result()
        with made:
            assert daemon.status().generation == 3
            assert state(where, "made") == "preserved"
            with luod_client.deserialize(runtime_dir=where) as looker:
                looker.finish(finished_id)
            assert not let_go(made, 0)
            finish(where, "made")
            assert let_go(made, 0)


@pytest.mark.parametrize(("step", "there"), [("before-send:box:2", False), ("after-send:box:2", True)])
def test_killed_in_finalize(daemon: Daemon, tmp_path: Path, step: str, there: bool) -> None:
    where = daemon.runtime_dir
    with preserve_pipe(where, "before")[0] as before:
        with (
            filling(daemon, tmp_path, f"{step}=kill") as (_, upgraded),
            luod_client.serialize("made", runtime_dir=where) as session,
            watched_pipe(session) as made,
        ):
            with pytest.raises(Disconnected):
                session.finalize()
            with pytest.raises(Disconnected):
                upgraded.result()
            assert daemon.status().generation == 3
            assert state(where, "before") == "preserved"
            if there:
                assert luod_client.finalize_again(session.id, runtime_dir=where).session_id == session.id
                finish(where, "made")
            else:
                assert refusal_of(where, session.id)[0] is Code.NO_SUCH_SESSION
            assert let_go(made)
        finish(where, "before")
        assert let_go(before, 0)


@pytest.mark.parametrize(("step", "there"), [("before-send:gone", True), ("after-send:gone", False), ("after-receive:let-go", False)])
def test_killed_in_finish(daemon: Daemon, tmp_path: Path, step: str, there: bool) -> None:
    where = daemon.runtime_dir
    end, session_id = preserve_pipe(where)
    with end:
        with filling(daemon, tmp_path, f"{step}=kill") as (_, upgraded):
            with pytest.raises(Disconnected):
                finish(where, "guest")
            with pytest.raises(Disconnected):
                upgraded.result()
        assert daemon.status().generation == 3
        with luod_client.deserialize(runtime_dir=where) as looker:
            if there:
                assert not let_go(end, 0)
                assert state(where) == "preserved"
                with looker.claim("guest") as claim:
                    claim.finish()
            else:
                assert state(where) == "gone"
            looker.finish(session_id)
        assert let_go(end, 0)


@pytest.mark.parametrize(("step", "known"), [("before-send:retrieved", False), ("after-send:retrieved", True)])
def test_killed_in_retrieve(daemon: Daemon, tmp_path: Path, step: str, known: bool) -> None:
    where = daemon.runtime_dir
    with preserve_pipe(where)[0]:
        with filling(daemon, tmp_path, f"{step}=kill") as (_, upgraded):
            with luod_client.deserialize(runtime_dir=where) as looker:
                claim = looker.claim("guest")
                with pytest.raises(Disconnected):
                    claim.retrieve("pipe")
            with pytest.raises(Disconnected):
                upgraded.result()
        assert daemon.status().generation == 3
        found = find(where)
        assert found is not None
        assert [each.pid for each in found.retrieved_by] == ([os.getpid()] if known else [])
        finish(where, "guest")


def test_finish_is_not_answered_again_before_nobody_has_a_copy(daemon: Daemon, tmp_path: Path) -> None:
    """It is asked for on a second connection, while the first waits for the successor."""
    where = daemon.runtime_dir
    end, session_id = preserve_pipe(where)
    step = "before-send:let-go"
    slow = Faulty(tmp_path, f"{step}=wait")

    def finish_again(looker: luod_client.Deserializer) -> bool:
        looker.finish(session_id)
        return let_go(end, 0)

    with (
        end,
        filling(daemon, tmp_path, program=slow.program) as (go_on, upgraded),
        luod_client.deserialize(runtime_dir=where) as looker,
        meanwhile(lambda: finish(where, "guest")) as finished,
    ):
        slow.wait_for(step)
        assert not let_go(end, 0)
        with meanwhile(lambda: finish_again(looker)) as again:
            # For a luod that would answer at once.
            until(lambda: daemon.status().sessions_claimed == 0, "the session has ended")
            slow.go_on()
            finished.result()
            assert again.result()
        go_on()
        assert upgraded.result().generation == 3


def fill(runtime_dir: str, name: str, number: int) -> float:
    """Preserve `number` sessions. Returns how long the slowest `finalize` took, in seconds."""
    slowest = 0.0
    with memfd(b"x") as ram:
        for index in range(number):
            with luod_client.serialize(f"{name}-{index}", runtime_dir=runtime_dir) as session:
                session.preserve({"ram": ram.fileno()})
                before = time.monotonic()
                session.finalize()
                slowest = max(slowest, time.monotonic() - before)
    return slowest


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 400])
@pytest.mark.parametrize("action", ["stop", "kill"])
def test_a_successor_that_takes_no_log_costs_the_clients_an_upgrade_and_nothing_else(tmp_path: Path, number: int, action: str) -> None:
    """With 400 sessions the handover socket is full, the copy itself is stuck, and so is the log of what is finalized meanwhile."""
    with Daemon(options=config(tmp_path, copy_s=STEP_S, freeze_s=STEP_S)) as daemon:
        where = daemon.runtime_dir
        fill(where, "before", number)
        ended, ended_id = preserve_pipe(where, "ended")
        stuck = Faulty(tmp_path, f"after-receive:offer={action}" if action == "stop" else "after-receive:offer=wait,after-receive:box=kill")

        def refused() -> str:
            with pytest.raises(Refusal) as caught:
                ask_upgrade(where, stuck.program)
            return caught.value.message

        with ended, meanwhile(refused) as upgraded:
            stuck.wait_for("after-receive:offer")
            if action == "stop":
                # No synchronisation: the log shall be stuck still when the copy gives up.
                time.sleep(STEP_S / 2)
            with meanwhile(lambda: fill(where, "during", 50)) as slowest, meanwhile(lambda: finish(where, "ended")) as finished:
                if action == "kill":
                    until(lambda: find(where, "during-5") or slowest.done() or number, "finalizing goes on")
                    stuck.go_on()
                finished.result()
                assert let_go(ended, 0)
                if action == "stop" and number:
                    assert slowest.result() > STEP_S / 2, "no finalize was stuck: this test tested nothing"
            assert "generation 1 goes on serving: the successor" in upgraded.result()
        assert daemon.upgrade().generation == 2
        with luod_client.deserialize(runtime_dir=where) as looker:
            looker.finish(ended_id)
            assert {each.session for each in looker.list()} == {
                *(f"before-{index}" for index in range(number)),
                *(f"during-{index}" for index in range(50)),
            }
