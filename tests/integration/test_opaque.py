"""Sessions of a newer luod, left in the service manager's store before a downgrade: kept, counted, handed on, and had again."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio

import luod_client
from entries import entry_of
from faulty import run_module
from harness import Daemon, until
from luod.manifest import Manifest
from luod.store import Ended
from luod.succession import ledger
from luod.succession.ledger import Ending, Ledger, Record, Retrieval
from luod.system import System, process
from luod_client import Code, Refusal
from luod_protocol import box
from luod_protocol.fds import OwnedFd
from releases import NEWER, newer_manifest, other_release
from standin_manager import StandinManager, standin_manager
from things import find, let_go, pipe, preserve_pipe, state

pytestmark = pytest.mark.slow

SESSION_ID: Final = b"of a newer luod."


@contextmanager
def newer_box(name: str = "guest", session_id: bytes = SESSION_ID, at: float = 1.0) -> Generator[tuple[OwnedFd, OwnedFd]]:
    """A box as `NEWER` makes it, of a session with a pipe. Yields it, and the end to read."""
    with pipe() as (read, write):
        entry = entry_of(write.fileno(), "pipe")
        description = Manifest(
            version=2,
            session_id=session_id,
            session=name,
            owner=os.geteuid(),
            metadata=b"newer",
            boot_id=System().boot_id,
            generation=5,
            opened_at=0.0,
            finalized_at=at,
            entries=(entry,),
        )
        with box.seal(newer_manifest(description), [write.fileno()]) as sealed:
            write.close()
            yield sealed, read


@attrs.frozen(kw_only=True)
class Downgraded:
    """A luod of this release that was started with what a newer one had left in the store, as `b7` and after.

    Attributes:
        manager: who keeps it.
        ends: the ends to read of the pipes.
    """

    daemon: Daemon
    manager: StandinManager
    ends: list[OwnedFd]

    @property
    def where(self) -> str:
        return self.daemon.runtime_dir

    def upgrade(self, program: str = "") -> None:
        """Have it followed, and wait until the successor has begun with the manager."""
        generation = self.daemon.upgrade(program).generation
        until(lambda: self.manager.names.count(ledger.name(generation)) == 1, "the ledger of the successor")
        until(lambda: ledger.name(generation - 1) not in self.manager.names, "the end of the ledger of the luod before")

    def names(self) -> list[str]:
        """The boxes in the store."""
        return sorted(name for name in self.manager.names if name.startswith("b"))


def downgraded(scenario: Callable[[Downgraded], None], boxes: list[dict[str, Any]], records: tuple[Record, ...] = ()) -> None:
    """Run `scenario` with a luod that finds `boxes` and a ledger with `records` in the store."""

    async def main() -> None:
        async with standin_manager() as (manager, _):
            await trio.to_thread.run_sync(run, manager)

    def run(manager: StandinManager) -> None:
        with ExitStack() as stack:
            made = [stack.enter_context(newer_box(**each)) for each in boxes]
            left = Ledger(records)
            stored = {f"b{number}": sealed for number, (sealed, _) in enumerate(made, 7)} | {ledger.name(5): left.memfd}
            numbers = {name: fd.fileno() for name, fd in stored.items()}
            manager.stored += [(name, OwnedFd(fd.take())) for name, fd in stored.items()]
            daemon = stack.enter_context(Daemon(stored=numbers, env={"NOTIFY_SOCKET": manager.info.address}))
            until(lambda: ledger.name(5) not in manager.names, "the end of the ledger that was left")
            scenario(Downgraded(daemon=daemon, manager=manager, ends=[read for _, read in made]))

    trio.run(main)


def test_it_is_kept_and_handed_on_and_had_again(tmp_path: Path) -> None:
    def scenario(here: Downgraded) -> None:
        other, _ = preserve_pipe(here.where, "other")
        with other:
            for generation in (6, 7):
                status = here.daemon.status()
                assert (status.generation, status.sessions_opaque, status.sessions_preserved) == (generation, 1, 1)
                assert status.preserved_fds == 2
                assert (here.names(), status.stored_fds) == (["b0", "b7"], 3)
                assert find(here.where) is None
                assert not let_go(here.ends[0], 0)
                assert "not shown    1 sessions that this luod can't read" in said("status", here.where)
                here.upgrade()
            here.upgrade(other_release(tmp_path, NEWER))
            status = here.daemon.status()
            assert (status.sessions_opaque, status.sessions_preserved, status.preserved_fds, status.stored_fds) == (0, 2, 2, 3)
            with luod_client.deserialize(runtime_dir=here.where) as looker:
                shown = looker.show("guest")
                assert (shown.metadata, shown.info.session_id, shown.info.survives) == (
                    b"newer",
                    SESSION_ID,
                    looker.show("other").info.survives,
                )
                with looker.claim("guest") as claim:
                    with claim.retrieve()["pipe"] as fd:
                        os.write(fd.fileno(), b"written")
                    claim.finish()
                assert here.names() == ["b0"]
                assert os.read(here.ends[0].fileno(), 100) == b"written"
                assert let_go(here.ends[0])
                looker.discard("other")
            assert here.names() == []
            assert here.daemon.upgrade().generation == 10

    downgraded(scenario, [{}])


def said(command: str, runtime_dir: str) -> str:
    done = run_module("luod_client.cli", "--runtime-dir", runtime_dir, command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_name_that_is_taken_meanwhile_keeps_it_opaque_until_it_is_free(tmp_path: Path) -> None:
    def scenario(here: Downgraded) -> None:
        newer = other_release(tmp_path, NEWER)
        mine, session_id = preserve_pipe(here.where, "guest")
        with mine, luod_client.serialize("open", runtime_dir=here.where) as session:
            here.upgrade(newer)
            assert here.daemon.status().sessions_opaque == 2
            here.daemon.wait_stderr(r"kept for a luod that can read them: b7 \(uid \d+ has another session 'guest'\), b8 \(.* 'open'\)")
            found = find(here.where)
            assert found is not None
            assert found.session_id == session_id
            session.cancel()
            with luod_client.deserialize(runtime_dir=here.where) as looker:
                looker.discard("guest")
            assert let_go(mine)
            assert here.names() == ["b7", "b8"]
            here.upgrade(newer)
            status = here.daemon.status()
            assert (status.sessions_opaque, status.sessions_preserved) == (0, 2)
            found = find(here.where)
            assert found is not None
            assert found.session_id == SESSION_ID
            assert state(here.where, "open") == "preserved"

    downgraded(scenario, [{}, {"name": "open", "session_id": b"of a newer luod:"}])


def test_of_two_with_one_name_the_first_is_had_and_the_other_waits(tmp_path: Path) -> None:
    def scenario(here: Downgraded) -> None:
        here.upgrade(other_release(tmp_path, NEWER))
        status = here.daemon.status()
        assert (status.sessions_opaque, status.sessions_preserved) == (1, 1)
        found = find(here.where)
        assert found is not None
        assert found.session_id == b"the first one..."
        # Of what is opaque there, the older release needs to know nothing; what it can't read is in its way.
        with pytest.raises(Refusal, match=r"it reads manifests of version 1, and version 2 is that of session 'guest' of uid \d+ "):
            here.upgrade()
        with luod_client.deserialize(runtime_dir=here.where) as looker:
            looker.discard("guest")
        assert let_go(here.ends[1])
        here.upgrade()
        assert here.daemon.status().sessions_opaque == 1
        assert not let_go(here.ends[0], 0)
        assert here.names() == ["b7"]

    downgraded(scenario, [{"at": 2.0}, {"at": 1.0, "session_id": b"the first one..."}])


def test_one_that_was_ending_when_its_luod_died_is_let_go_of_by_the_luod_that_can_read_it(tmp_path: Path) -> None:
    def scenario(here: Downgraded) -> None:
        assert here.daemon.status().sessions_opaque == 1
        here.upgrade()
        assert here.names() == ["b7"]
        here.upgrade(other_release(tmp_path, NEWER))
        assert let_go(here.ends[0])
        until(lambda: here.names() == [], "the end of the box")
        status = here.daemon.status()
        assert (status.sessions_opaque, status.sessions_preserved, status.preserved_fds, status.stored_fds) == (0, 0, 0, 1)
        with luod_client.deserialize(runtime_dir=here.where) as looker:
            assert looker.finish(SESSION_ID).session_id == SESSION_ID

    downgraded(scenario, [{}], (Ending(ended=Ended(session_id=SESSION_ID, owner=os.geteuid(), finished=True)),))


def test_who_has_retrieved_from_it_is_remembered(tmp_path: Path) -> None:
    def scenario(here: Downgraded) -> None:
        here.upgrade()
        here.upgrade(other_release(tmp_path, NEWER))
        found = find(here.where)
        assert found is not None
        assert [(each.pid, each.alive) for each in found.retrieved_by] == [(os.getppid(), True)]
        with luod_client.deserialize(runtime_dir=here.where) as looker, pytest.raises(Refusal) as refused:
            looker.claim("guest")
        assert refused.value.code is Code.STILL_HELD

    downgraded(scenario, [{}], (Retrieval(session_id=SESSION_ID, process=process(os.getppid())),))
