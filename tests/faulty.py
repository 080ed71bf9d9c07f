"""Programs that are a luod which misbehaves at chosen steps of a handover (`standins/faulty_luod.py`), and the scene that it meets."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

import luod_client
from harness import LIMIT_S, until
from luod_protocol.fds import OwnedFd
from luod_protocol.messages import EntryInfo, Upgraded
from processes import PYTHON
from things import let_go, memfd, pipe

T = TypeVar("T")

STANDIN: Final = Path(__file__).parent / "standins" / "faulty_luod.py"


class Faulty:
    """An executable to upgrade to.

    Args:
        folder: where to put it.
        plan: steps and actions, see `standins/faulty_luod.py`.

    Attributes:
        program: its path.
    """

    def __init__(self, folder: Path, plan: str) -> None:
        number = len(list(folder.glob("faulty-*.report")))
        self._report = folder / f"faulty-{number}.report"
        self._report.touch()
        self._go = f"{self._report}.go"
        os.mkfifo(self._go)
        program = folder / f"faulty-{number}"
        command = shlex.join([sys.executable, "-P", str(STANDIN), plan, str(self._report)])
        program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        program.chmod(0o755)
        self.program = str(program)

    def hits(self) -> list[str]:
        """The steps of the plan that have come."""
        return self._report.read_text().split()

    def wait_for(self, step: str) -> None:
        """Wait until this step has come."""
        until(lambda: step in self.hits(), f"{step} of the plan of {self.program}")

    def go_on(self) -> None:
        """Let a luod that does `wait` go on. Blocks until it waits."""
        os.close(os.open(self._go, os.O_WRONLY | os.O_CLOEXEC))

    def give_up(self) -> None:
        """Let it go on if it waits: for a test that has failed."""
        with suppress(OSError):
            os.close(os.open(self._go, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))


def config(folder: Path, **bounds: float) -> tuple[str, str]:
    """Options for a luod with these bounds of a handover, in seconds."""
    path = folder / "luod.toml"
    path.write_text("[handover]\n" + "".join(f"{key} = {value}\n" for key, value in bounds.items()))
    return "--config", str(path)


class Scene:
    """What there is while luod is replaced: two preserved sessions `first` and `second`, one that a client is making, one that is claimed.

    Each session has the end to write of a pipe that nobody else has.

    Args:
        runtime_dir: where luod is.
        finalized: the finalized sessions, in the order in which they are made.

    Attributes:
        ends: session -> the end to read.
    """

    def __init__(self, runtime_dir: str, finalized: Sequence[str] = ("first", "second", "claimed")) -> None:
        self.runtime_dir = runtime_dir
        self.ends: dict[str, OwnedFd] = {}
        self.shown: dict[str, tuple[EntryInfo, ...]] = {}
        for name in finalized:
            with luod_client.serialize(name, metadata=name.encode(), runtime_dir=runtime_dir) as session:
                self.put(session)
                session.finalize(seal={"ram": {"grow"}})
        self.open = luod_client.serialize("open", runtime_dir=runtime_dir)
        self.put(self.open)
        self.looker = luod_client.deserialize(runtime_dir=runtime_dir)
        for name in finalized:
            self.shown[name] = self.looker.show(name).entries
        self.claim = self.looker.claim("claimed")

    def put(self, session: luod_client.Session) -> None:
        """Preserve what each session has."""
        with memfd(f"content of {session.name}".encode()) as ram, pipe() as (read, write):
            session.preserve({"ram": ram.fileno(), "pipe": write.fileno()}, metadata={"ram": b"at 0"}, needs={"ram": ["pipe"]})
            self.ends[session.name] = OwnedFd(read.take())

    def check_finalized(self, *names: str) -> None:
        """Assert that these sessions are there as they were, and that nothing holds their pipes when they are finished."""
        with luod_client.deserialize(runtime_dir=self.runtime_dir) as looker:
            for name in names:
                shown = looker.show(name)
                assert shown.entries == self.shown[name]
                assert (shown.metadata, shown.info.state) == (name.encode(), "preserved")
                with looker.claim(name) as claim:
                    _check_ram(claim, name)
                    assert not let_go(self.ends[name], 0)
                    claim.finish()
                assert let_go(self.ends[name], 0), f"somebody still holds a copy of session {name}"

    def check_finalized_is_there(self, *names: str) -> None:
        """Assert that these sessions are there as they were, and leave them."""
        for name in names:
            shown = self.looker.show(name)
            assert shown.entries == self.shown[name]
            assert not let_go(self.ends[name], 0)

    def check_live(self) -> None:
        """Assert that the clients go on with the connections that they have, to the end of what they do."""
        with memfd(b"more") as more:
            self.open.preserve({"more": more.fileno()})
        self.open.finalize()
        _check_ram(self.claim, "claimed")
        self.claim.finish()
        assert let_go(self.ends["claimed"], 0), "somebody still holds a copy of session claimed"
        with self.looker.claim("open") as claim:
            assert list(claim.entries) == ["ram", "pipe", "more"]
            _check_ram(claim, "open")
            assert not let_go(self.ends["open"], 0)
            claim.finish()
        assert let_go(self.ends["open"], 0), "somebody still holds a copy of session open"

    def close(self) -> None:
        """End the clients."""
        self.open.close()
        self.looker.close()
        for end in self.ends.values():
            end.close()


def _check_ram(claim: luod_client.Claim, name: str) -> None:
    got = claim.retrieve("pipe", "ram")
    with got["pipe"], got["ram"] as ram:
        assert os.pread(ram.fileno(), 100, 0) == f"content of {name}".encode()


@contextmanager
def scene(runtime_dir: str) -> Generator[Scene]:
    """A scene; its clients end with the block."""
    made = Scene(runtime_dir)
    try:
        yield made
    finally:
        made.close()


def children_of(parent: int) -> list[int]:
    """The processes that `parent` has started and that are not reaped."""
    children: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # proc_pid_stat(5): behind the name, which ends with the last ")", come the state and the parent.
            if int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1]) == parent:
                children.append(int(folder.name))
    return children


@contextmanager
def meanwhile(function: Callable[[], T]) -> Generator[Future[T]]:
    """Call `function` in a thread while the block runs; the block's end waits for it."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function)


def ask_upgrade(runtime_dir: str, program: str = "") -> Upgraded:
    """Ask for an upgrade on a connection of its own."""
    with luod_client.control(runtime_dir=runtime_dir) as control:
        return control.upgrade(program)


def run_module(*command: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m` with `command` to its end."""
    return subprocess.run([*PYTHON, "-m", *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S, check=False)
