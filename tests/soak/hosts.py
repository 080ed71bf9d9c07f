"""Where the soak runs luod, and what befalls luod there."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Final

import attrs

import luod_client
from faulty import Faulty, ask_upgrade, children_of, config
from harness import Daemon
from luod_client import LuodError, Refusal
from luod_protocol.fds import OwnedFd
from luod_protocol.messages import DaemonStatus
from processes import ALICE, LIMIT_S, PYTHON, User, folder_for, readable, until
from supervising import Supervised
from systemd_rig import Manager, why_not

SERVICE: Final = "luod.service"
WATCHDOG_S: Final = 10
"""Long enough for a luod that a busy machine lets wait, in seconds."""
START_S: Final = 120.0
"""How long a luod may take to start on a machine that is very busy, in seconds."""
STABLE_S: Final = 0.4
"""Who has served for so long after a crash stays, in seconds."""

FAULTS: Final = (
    "before-send:meet=kill",
    "after-send:meet=exit",
    "after-receive:offer=decline",
    "after-receive:box=kill",
    "after-receive:box=close",
    "after-receive:copied=garbage",
    "before-send:verified=kill",
    "after-send:verified=kill",
    "after-receive:connection=kill",
    "after-receive:frozen=exit",
    "after-receive:frozen=decline",
    "before-send:serving=kill",
)
"""What a successor does wrong before its commit: see `standins/faulty_luod.py`."""


class NotHere(Exception):
    """This machine can't have such a host; the text says why."""


@attrs.frozen(kw_only=True)
class Disturbance:
    """What befalls luod.

    Attributes:
        weight: how often, compared to the others.
        crash: whether clients may lose their connections, and open sessions.
        do: does it; returns when luod serves, what it comes to: `upgrades`, `failed`, `kills`.
    """

    weight: int
    crash: bool
    do: Callable[[random.Random], str]


@attrs.frozen(kw_only=True)
class Host:
    """A luod that runs.

    Attributes:
        runtime_dir: where it is for this process.
        where: and for its clients, whose commands begin with `within`.
        users: whose clients there are; None: of whoever runs the soak.
        require: what finalize must promise.
        disturbances: by name.
        pid: of the luod that serves, for this process.
        settled: asserts that it holds so many sessions and nothing else. It has no clients.
    """

    runtime_dir: str
    where: str
    within: Sequence[str]
    users: Sequence[User | None]
    require: tuple[str, ...]
    disturbances: Mapping[str, Disturbance]
    pid: Callable[[], int]
    settled: Callable[[int], None]


def status(runtime_dir: str) -> DaemonStatus:
    """How luod is."""
    with luod_client.control(runtime_dir=runtime_dir) as control:
        return control.status()


def _stable(runtime_dir: str, but_not: int = 0) -> None:
    """Wait until one luod has served for a while, another one than `but_not`."""
    seen: dict[int, float] = {}

    def same() -> bool:
        try:
            pid = status(runtime_dir).pid
        except LuodError:
            seen.clear()
            return False
        if pid not in seen:
            seen.clear()
        return pid != but_not and time.monotonic() - seen.setdefault(pid, time.monotonic()) > STABLE_S

    until(same, "a luod that stays", limit_s=START_S)


def _serving(runtime_dir: str, but_not: int) -> None:
    """Wait until another luod than `but_not` answers."""

    def answers() -> bool:
        with suppress(LuodError):
            return status(runtime_dir).pid != but_not
        return False

    until(answers, f"a luod after {but_not}", limit_s=START_S)


def _kill(pid: int, sig: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, sig)


def _check_held(now: DaemonStatus, before: DaemonStatus, sessions: int, stored: int) -> bool:
    busy = now.sessions_open or now.sessions_claimed or now.staged_fds or now.connections != 1
    is_stored = now.stored_fds == (sessions + stored if now.manager else 0)
    return not busy and is_stored and now.sessions_preserved == sessions and now.open_fds == before.open_fds + sessions


def _settled(runtime_dir: str, before: DaemonStatus, sessions: int) -> None:
    # In the store is the ledger, too.
    until(
        lambda: _check_held(status(runtime_dir), before, sessions, 1),
        lambda: f"luod with {sessions} sessions and nothing else; before the first: {before}\nnow: {status(runtime_dir)}",
    )


# ---- disturbances of any host


def _patient(folder: Path) -> tuple[str, str]:
    """Options of a luod that never takes a busy machine for a successor that hangs; bounds in seconds."""
    return config(folder, meet_s=300, copy_s=300, freeze_s=60, commit_s=60)


def _upgrades(runtime_dir: Callable[[], str], folder: Path) -> dict[str, Disturbance]:
    programs = [Faulty(folder, fault).program for fault in FAULTS]

    def upgrade(_: random.Random) -> str:
        generation = status(runtime_dir()).generation
        upgraded = ask_upgrade(runtime_dir())
        assert upgraded.generation == generation + 1, f"generation {upgraded.generation} follows {generation}"
        return "upgrades"

    def fail(dice: random.Random) -> str:
        before = status(runtime_dir())
        with suppress(Refusal):
            ask_upgrade(runtime_dir(), dice.choice(programs))
            return "upgrades"  # what it waited for didn't come
        after = status(runtime_dir())
        assert (after.pid, after.generation) == (before.pid, before.generation)
        return "failed"

    return {"upgrade": Disturbance(weight=10, crash=False, do=upgrade), "fail": Disturbance(weight=5, crash=False, do=fail)}


# ---- luod alone


@contextmanager
def plain(folder: Path) -> Generator[Host]:
    """luod, which a crash would end with all that it holds: it is upgraded only."""
    with Daemon(options=_patient(folder)) as daemon:
        daemon.tolerate(r"(?s).*")  # looked at below, without what faulty successors say
        before = daemon.status()

        def takeover(_: random.Random) -> str:
            daemon.takeover()
            return "upgrades"

        def settled(sessions: int) -> None:
            _settled(daemon.runtime_dir, before, sessions)
            pid = daemon.pid
            assert children_of(pid) == [], "luod has children left over"

        yield Host(
            runtime_dir=daemon.runtime_dir,
            where=daemon.runtime_dir,
            within=(),
            users=_users(ALICE),
            require=("daemon-upgrade",),
            disturbances={
                **_upgrades(lambda: daemon.runtime_dir, folder),
                "takeover": Disturbance(weight=5, crash=False, do=takeover),
            },
            pid=lambda: daemon.pid,
            settled=settled,
        )
        _check_words(daemon.stderr)


def _users(other: User) -> list[User | None]:
    # Of the group that may connect.
    return [None, attrs.evolve(other, gid=os.getegid())] if os.geteuid() == 0 else [None]


def _check_words(said: str) -> None:
    found = re.search(r"Traceback|Exception ignored|never awaited|ResourceWarning|a bug", said)
    assert found is None, said[max(0, found.start() - 3000) : found.end() + 3000]


# ---- luod under its supervisor


@contextmanager
def supervised(folder: Path) -> Generator[Host]:
    """luod with its supervisor, which starts it again at once."""
    said = folder / "stderr"
    with folder_for() as where, said.open("wb") as stderr:
        program = (*PYTHON, "-m", "luod", "--runtime-dir", where, *_patient(folder))
        with Supervised(f"watchdog_s={WATCHDOG_S}", "abort_s=1", program=program, stderr=stderr.fileno()) as parent:
            until(lambda: _answers(where), said.read_text)
            before, fds = status(where), parent.open_fds()

            def hang_up(_: random.Random) -> str:
                pid = status(where).pid
                parent.popen.send_signal(signal.SIGHUP)
                _serving(where, pid)
                # The predecessor has confirmed it, so the next disturbance meets one luod.
                until(lambda: pid not in children_of(parent.popen.pid), "the end of the predecessor")
                return "upgrades"

            def kill(_: random.Random) -> str:
                pid = status(where).pid
                _kill(pid)
                _serving(where, pid)
                return "kills"

            def processes() -> list[int]:
                mains = children_of(parent.popen.pid)
                return mains + [child for main in mains for child in children_of(main)]

            def settled(sessions: int) -> None:
                _settled(where, before, sessions)
                until(lambda: parent.open_fds() == fds + sessions, lambda: f"{fds + sessions} descriptors: {parent.open_fds()}")
                until(lambda: processes() == [status(where).pid], lambda: f"one luod: {processes()}")

            host = Host(
                runtime_dir=where,
                where=where,
                within=(),
                users=_users(ALICE),
                require=("daemon-upgrade", "daemon-crash"),
                disturbances={
                    **_upgrades(lambda: where, folder),
                    # Who was started with nohup(1) ignores it, and so do those below.
                    "hang-up": Disturbance(weight=0 if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else 5, crash=False, do=hang_up),
                    "kill": Disturbance(weight=8, crash=True, do=kill),
                    "kill in an upgrade": Disturbance(weight=8, crash=True, do=lambda dice: _kill_in_upgrade(where, processes, dice)),
                    "kill a successor": Disturbance(weight=6, crash=True, do=lambda dice: _kill_successor(where, int, dice)),
                    "hang": Disturbance(weight=1, crash=True, do=lambda _: _hang(where, status(where).pid, status(where).pid)),
                },
                pid=lambda: status(where).pid,
                settled=settled,
            )
            try:
                yield host
            except BaseException:
                for pid in processes():
                    _kill(pid)
                print(f"luod said: {said.read_text()[-6000:]}", file=sys.stderr)
                raise
        _check_words(said.read_text())


def _answers(runtime_dir: str) -> bool:
    with suppress(LuodError):
        return status(runtime_dir).pid > 0
    return False


def _kill_in_upgrade(runtime_dir: str, processes: Callable[[], Sequence[int]], dice: random.Random) -> str:
    def upgrade() -> None:
        with suppress(LuodError):
            ask_upgrade(runtime_dir)

    asking = Thread(target=upgrade)
    asking.start()
    time.sleep(dice.random() * 0.8)
    there = processes()
    for pid in dice.sample(there, min(len(there), dice.choice((1, 1, 1, 2)))):
        _kill(pid)
    asking.join()
    _stable(runtime_dir)
    return "kills"


def _kill_successor(runtime_dir: str, pid_of: Callable[[int], int], dice: random.Random) -> str:
    """As soon as it serves."""
    pid = ask_upgrade(runtime_dir).pid
    time.sleep(dice.choice((0.0, 0.02)) * dice.random())
    _kill(pid_of(pid))
    _stable(runtime_dir, pid)
    return "kills"


def _hang(runtime_dir: str, stopped: int, pid: int) -> str:
    """Stop the luod `stopped`, which calls itself `pid`, until it was killed for that."""
    with OwnedFd(os.pidfd_open(stopped)) as pidfd:
        _kill(stopped, signal.SIGSTOP)
        # Not asked in the meantime: a connection to it would be answered by nobody.
        assert readable(pidfd.fileno(), WATCHDOG_S + LIMIT_S), "a luod that hangs is not killed"
    _serving(runtime_dir, pid)
    return "kills"


# ---- luod as a service of systemd


@contextmanager
def systemd(folder: Path) -> Generator[Host]:
    """luod.service, as it is shipped, but for a shorter watchdog."""
    reason = why_not()
    if reason:
        raise NotHere(reason)
    with Manager(settings={SERVICE: f"[Service]\nWatchdogSec={WATCHDOG_S}s\nTimeoutAbortSec=1s\n"}) as manager:
        manager.ctl("start", SERVICE)
        where = manager.runtime_dir
        before = status(where)

        def reload(_: random.Random) -> str:
            manager.ctl("reload", SERVICE)
            return "upgrades"

        def restart(_: random.Random) -> str:
            manager.ctl("restart", SERVICE)
            return "kills"

        def kill(_: random.Random) -> str:
            pid = status(where).pid
            manager.kill(SERVICE)
            _serving(where, pid)
            return "kills"

        def kill_in_reload(dice: random.Random) -> str:
            manager.ctl("reload", "--no-block", SERVICE)
            time.sleep(dice.random() * 0.8)
            there = manager.pids(SERVICE)
            for pid in dice.sample(there, min(len(there), dice.choice((1, 1, 2)))):
                _kill(pid)
            manager.until_shows(SERVICE, SubState="running")
            _stable(where)
            return "kills"

        def stored(sessions: int) -> bool:
            return int(manager.show(SERVICE, "NFileDescriptorStore")["NFileDescriptorStore"]) == sessions + 1

        def settled(sessions: int) -> None:
            _settled(where, before, sessions)
            until(lambda: stored(sessions), lambda: f"{sessions} sessions stored: {manager.show(SERVICE, 'NFileDescriptorStore')}")
            until(lambda: len(manager.pids(SERVICE)) == 1, lambda: f"one luod: {manager.pids(SERVICE)}")

        yield Host(
            runtime_dir=where,
            where="/run/luod",
            within=manager.inside,
            users=[manager.user("alice"), manager.user("bob"), None],
            require=("daemon-upgrade", "daemon-crash", "service-restart"),
            disturbances={
                "reload": Disturbance(weight=10, crash=False, do=reload),
                "restart": Disturbance(weight=5, crash=True, do=restart),
                "kill": Disturbance(weight=5, crash=True, do=kill),
                "kill in a reload": Disturbance(weight=8, crash=True, do=kill_in_reload),
                "kill a successor": Disturbance(
                    weight=5, crash=True, do=lambda dice: _kill_successor(where, lambda _: manager.main_pid(SERVICE), dice)
                ),
                "hang": Disturbance(weight=1, crash=True, do=lambda _: _hang(where, manager.main_pid(SERVICE), status(where).pid)),
            },
            pid=lambda: manager.main_pid(SERVICE),
            settled=settled,
        )
        _check_words(manager.said(SERVICE))


HOSTS: Final[Mapping[str, Callable[[Path], AbstractContextManager[Host]]]] = {
    "plain": plain,
    "supervised": supervised,
    "systemd": systemd,
}
