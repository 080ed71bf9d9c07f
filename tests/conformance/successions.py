"""What the conformance kit tries the successions with. A new succession joins by adding its host here.

A host runs one real luod in a way of its own and can have it succeeded: by a handover, or by a crash and whoever starts it again.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, TypeAlias

import attrs

import luod_client
from harness import Daemon
from machine import unable
from processes import LIMIT_S, PYTHON, folder_for, start, until
from systemd_rig import Manager, why_not

SERVICE: Final = "luod.service"


@attrs.frozen(kw_only=True)
class Host:
    """A luod that runs.

    Attributes:
        runtime_dir: where its clients find it.
        succeed: has it succeeded once; returns when the successor serves.
    """

    runtime_dir: str
    succeed: Callable[[], None]


@attrs.frozen(kw_only=True)
class Succession:
    """A way in which one luod follows another.

    Attributes:
        live: whether connections, with their open sessions and claims, go on.
        host: runs a luod.
        survives: what `finalize` must promise there, at least.
    """

    name: str
    live: bool
    host: Callable[[], AbstractContextManager[Host]]
    survives: frozenset[str]


Hosting: TypeAlias = Callable[[], AbstractContextManager[Host]]


def _status(runtime_dir: str) -> tuple[int, int]:
    with luod_client.control(runtime_dir=runtime_dir) as control:
        status = control.status()
        return status.pid, status.generation


def until_succeeded(runtime_dir: str, generation: int) -> None:
    """Wait until a luod of a later generation than `generation` answers."""

    def answers() -> bool:
        try:
            return _status(runtime_dir)[1] > generation
        except luod_client.LuodError:
            return False

    until(answers, f"a luod after generation {generation}")


def _handed_over(step: Callable[[Daemon], object]) -> Hosting:
    @contextmanager
    def host() -> Generator[Host]:
        with Daemon() as daemon:
            yield Host(runtime_dir=daemon.runtime_dir, succeed=lambda: void(step(daemon)))

    return host


def void(_: object) -> None:
    """Nothing."""


def _supervised(succeed: Callable[[str, int], None]) -> Hosting:
    @contextmanager
    def host() -> Generator[Host]:
        with folder_for() as folder:
            said = f"{folder}/stderr"
            with open(said, "wb") as stderr:
                parent = start([*PYTHON, "-m", "luod", "--supervised", "--runtime-dir", folder], stderr=stderr.fileno())
            try:
                until_succeeded(folder, 0)
                yield Host(runtime_dir=folder, succeed=lambda: succeed(folder, parent.pid))
                parent.send_signal(signal.SIGTERM)
                assert parent.wait(LIMIT_S) == 0
                with open(said, encoding="utf-8") as text:
                    assert not re.search(r"Traceback|Warning|Exception ignored|never awaited", words := text.read()), words
            finally:
                parent.kill()
                parent.wait()

    return host


def _crash(runtime_dir: str, _: int) -> None:
    pid, generation = _status(runtime_dir)
    os.kill(pid, signal.SIGKILL)
    until_succeeded(runtime_dir, generation)


def _upgrade(runtime_dir: str, _: int) -> None:
    with luod_client.control(runtime_dir=runtime_dir) as control:
        control.upgrade()


def _hang_up(runtime_dir: str, parent: int) -> None:
    generation = _status(runtime_dir)[1]
    os.kill(parent, signal.SIGHUP)
    until_succeeded(runtime_dir, generation)


def _systemd(succeed: Callable[[Manager, str], None]) -> Hosting:
    @contextmanager
    def host() -> Generator[Host]:
        reason = why_not()
        if reason:
            unable(reason)
        with Manager() as manager:
            manager.ctl("start", SERVICE)
            yield Host(runtime_dir=manager.runtime_dir, succeed=lambda: succeed(manager, manager.runtime_dir))
            assert not re.search(r"Traceback|Exception ignored|never awaited", manager.said(SERVICE)), manager.said(SERVICE)

    return host


def _systemd_crash(manager: Manager, runtime_dir: str) -> None:
    generation = _status(runtime_dir)[1]
    manager.kill(SERVICE)
    until_succeeded(runtime_dir, generation)


_UPGRADED: Final = frozenset({"daemon-upgrade"})
_STORED: Final = _UPGRADED | {"daemon-crash"}
_RESTARTED: Final = _STORED | {"service-restart"}

SUCCESSIONS: Final = (
    Succession(name="upgrade", live=True, host=_handed_over(Daemon.upgrade), survives=_UPGRADED),
    Succession(name="takeover", live=True, host=_handed_over(Daemon.takeover), survives=_UPGRADED),
    Succession(name="supervised-upgrade", live=True, host=_supervised(_upgrade), survives=_STORED),
    Succession(name="supervised-sighup", live=True, host=_supervised(_hang_up), survives=_STORED),
    Succession(name="supervised-crash", live=False, host=_supervised(_crash), survives=_STORED),
    Succession(
        name="systemd-reload", live=True, host=_systemd(lambda manager, _: void(manager.ctl("reload", SERVICE))), survives=_RESTARTED
    ),
    Succession(
        name="systemd-restart", live=False, host=_systemd(lambda manager, _: void(manager.ctl("restart", SERVICE))), survives=_RESTARTED
    ),
    Succession(name="systemd-crash", live=False, host=_systemd(_systemd_crash), survives=_RESTARTED),
)
