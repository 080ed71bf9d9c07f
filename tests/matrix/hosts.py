"""Where faults are tried: a luod without a manager, under `luod --supervised`, under a real systemd. All luods there are stand-ins."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Final

import attrs

import luod_client
from faulty import STANDIN
from luod_protocol import messages as m
from luod_protocol.errors import LuodError
from luod_protocol.messages import Endpoint
from processes import LIMIT_S, PLAIN_PYTHON, folder_for, start
from raw import STATUS, Raw
from systemd_rig import Manager, pid_inside

SERVICE: Final = "luod.service"
SHORT: Final = "[handover]\nmeet_s = 15.0\ncopy_s = 2.0\nfreeze_s = 2.0\ncommit_s = 2.0\n"
"""Bounds of a handover that are waited for."""
LONG: Final = "[handover]\nmeet_s = 60.0\ncopy_s = 60.0\nfreeze_s = 60.0\ncommit_s = 60.0\n"
"""Bounds that no machine is too busy for."""
WATCHDOG_S: Final = 4.0
START_S: Final = 8.0
ANSWER_S: Final = 0.3
"""Within which a luod that isn't busy answers; asked again where it matters."""


class Bench:
    """The files by which a test and the stand-ins understand each other, in the runtime directory.

    Args:
        outside: the directory for the test.
        inside: the same for luod.

    Attributes:
        command: runs a stand-in.
        program: the same as one executable, for an upgrade.
    """

    def __init__(self, outside: str, inside: str) -> None:
        self._folder = Path(outside)
        self.command = [sys.executable, "-P", str(STANDIN), f"@{inside}/plan", f"{inside}/report"]
        self.options = ["--runtime-dir", inside, "--config", f"{inside}/faults.toml"]
        self.program = f"{inside}/standin"
        self._number = 0

    def prepare(self, bounds: str) -> None:
        """Make the files."""
        (self._folder / "faults.toml").write_text(bounds)
        (self._folder / "standin").write_text(f'#!/bin/sh\nexec {shlex.join(self.command)} "$@"\n')
        (self._folder / "standin").chmod(0o755)
        os.mkfifo(self._folder / "report.go")
        self.clear()
        self.plan()

    def clear(self) -> None:
        """Forget what has come."""
        for name in ("report", "report.trace"):
            (self._folder / name).write_text("")
            (self._folder / name).chmod(0o666)

    def plan(self, *parts: str) -> None:
        """What the stand-ins are to do from now on."""
        self._number += 1
        (self._folder / "plan.new").write_text(",".join([*parts, f"#{self._number}"]))
        (self._folder / "plan.new").rename(self._folder / "plan")

    def came(self, step: str) -> bool:
        """Whether a step of the plan has come."""
        return step in (self._folder / "report").read_text().split()

    def trace(self) -> list[tuple[int, str, bytes]]:
        """The steps that have come: the process (as luod knows it), the step, the session that it is about."""
        lines = [line.split(" ") for line in (self._folder / "report.trace").read_text().splitlines()]
        return [(int(pid), step, bytes.fromhex(about)) for pid, step, about in lines]

    def go_on(self) -> bool:
        """Let a luod that holds go on. Returns whether one does."""
        with suppress(OSError):
            os.close(os.open(self._folder / "report.go", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            return True
        return False


@attrs.frozen(kw_only=True)
class Host:
    """A luod that runs.

    Attributes:
        managed: whether a service manager starts it again.
        runtime_dir: where clients find it.
        luods: its processes: as luod knows them, and as the test does.
        said: all that they wrote.
        start: start it, where nobody else does.
    """

    managed: bool
    runtime_dir: str
    bench: Bench
    luods: Callable[[], dict[int, int]]
    said: Callable[[], str]
    start: Callable[[], None]

    def answer(self) -> m.DaemonStatus | None:
        """What the luod that serves says, if it says something at once."""
        try:
            with Raw(self.runtime_dir, Endpoint.CONTROL, limit_s=ANSWER_S) as raw:
                reply = raw.ask(STATUS)
                return reply if isinstance(reply, m.DaemonStatus) else None
        except (OSError, LuodError, AssertionError):
            return None

    def upgrade(self) -> m.Upgraded:
        """Ask for an upgrade to another stand-in."""
        with luod_client.control(runtime_dir=self.runtime_dir) as control:
            return control.upgrade(self.bench.program)


def _processes(folder: str) -> dict[int, int]:
    mark = f"\0--runtime-dir\0{folder}\0".encode()
    found: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            if mark in command and b"luod.supervisor" not in command:
                found[int(entry.name)] = int(entry.name)
    return found


def _end(folder: str) -> None:
    for pid in _processes(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def plain(bounds: str = LONG) -> Generator[Host]:
    """Without a manager."""
    with folder_for() as folder, open(f"{folder}/stderr", "wb") as stderr:
        bench = Bench(folder, folder)
        bench.prepare(bounds)
        started: list[subprocess.Popen[bytes]] = []

        def run() -> None:
            started.append(start([*bench.command, *bench.options], stderr=stderr.fileno()))

        try:
            run()
            yield Host(
                managed=False,
                runtime_dir=folder,
                bench=bench,
                luods=lambda: _processes(folder),
                said=Path(f"{folder}/stderr").read_text,
                start=run,
            )
        finally:
            _end(folder)
            for each in started:
                each.wait(LIMIT_S)


@contextmanager
def supervised(bounds: str = LONG) -> Generator[Host]:
    """Under luod's own supervisor."""
    with folder_for() as folder, open(f"{folder}/stderr", "wb") as stderr:
        bench = Bench(folder, folder)
        bench.prepare(bounds)
        settings = [f"watchdog_s={WATCHDOG_S}", f"start_s={START_S}", "abort_s=2", "back_off_s=0.02", "longest_back_off_s=0.05"]
        command = [*PLAIN_PYTHON, "-m", "luod.supervisor", *settings, "--", *bench.command, *bench.options]
        parent = start(command, stderr=stderr.fileno())
        try:
            yield Host(
                managed=True,
                runtime_dir=folder,
                bench=bench,
                luods=lambda: _processes(folder),
                said=Path(f"{folder}/stderr").read_text,
                start=lambda: None,
            )
        finally:
            parent.kill()
            parent.wait()
            _end(folder)


@contextmanager
def systemd(bounds: str = LONG) -> Generator[Host]:
    """Under a real systemd, in the sandbox of the shipped unit."""
    inside = "/run/luod"
    program = Bench("", inside)
    settings = f"[Service]\nWatchdogSec={WATCHDOG_S}\nTimeoutAbortSec=2\nTimeoutStartSec={START_S}\nRestartSec=20ms\n"
    with Manager(program=[*program.command, *program.options], settings={SERVICE: settings}) as manager:
        bench = Bench(manager.runtime_dir, inside)
        bench.prepare(bounds)
        manager.ctl("start", SERVICE)

        def luods() -> dict[int, int]:
            found: dict[int, int] = {}
            with suppress(OSError):
                for pid in map(int, (manager.root / "sys/fs/cgroup/system.slice" / SERVICE / "cgroup.procs").read_text().split()):
                    with suppress(OSError):
                        found[int(pid_inside(pid))] = pid
            return found

        yield Host(
            managed=True,
            runtime_dir=manager.runtime_dir,
            bench=bench,
            luods=luods,
            said=lambda: manager.said(SERVICE),
            start=lambda: None,
        )


HOSTS: Final[dict[str, Callable[[str], AbstractContextManager[Host]]]] = {"plain": plain, "supervised": supervised, "systemd": systemd}
