"""A luod for a test, with its generations.

A `Daemon` is a real luod in a process of its own, followed through its generations. When its block is left, it must be well, idle, and hold
no more descriptors than at its start, one for each preserved session added; it must end on SIGTERM with 0, and nothing of it may remain.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import luod_client
from luod_protocol.fds import OwnedFd
from luod_protocol.messages import DaemonStatus, Upgraded
from processes import ALICE as ALICE
from processes import BOB as BOB
from processes import LIMIT_S as LIMIT_S
from processes import PLAIN_PYTHON, PYTHON
from processes import Client as Client
from processes import Talk as Talk
from processes import User as User
from processes import adopt_orphans as adopt_orphans
from processes import folder_for as folder_for
from processes import readable as readable
from processes import spawn_client as spawn_client
from processes import start as start
from processes import until as until

_SERVES: Final = re.compile(r"^luod \S+ \(pid (\d+), generation (\d+)\) serves (.*)$", re.MULTILINE)
_TROUBLE: Final = re.compile(r"Traceback|Warning|Exception ignored|Fatal Python error|never awaited")
_ACTIVATED: Final = Path(__file__).parent / "standins" / "activated.py"
_PIPE_BYTES: Final = 1024 * 1024
"""What luod can write before anybody reads it; the limit for ordinary users of fs.pipe-max-size."""


class _Generation:
    """One luod process: a pidfd of it, and its end."""

    def __init__(self, pid: int, popen: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self._popen = popen
        self._pidfd = OwnedFd(os.pidfd_open(pid))

    def fileno(self) -> int:
        return self._pidfd.fileno()

    def ended(self, limit_s: float = 0.0) -> bool:
        return self._pidfd.closed or readable(self._pidfd.fileno(), limit_s)

    def kill(self, sig: int) -> None:
        signal.pidfd_send_signal(self._pidfd.fileno(), sig)

    def reap(self) -> int | None:
        """Wait for its end. Its exit code (minus the signal), or None when it isn't our child to ask."""
        assert self.ended(LIMIT_S), f"luod process {self.pid} is still there"
        if self._popen is not None:
            self._pidfd.close()
            return self._popen.wait()
        if self._pidfd.closed:
            return None
        with self._pidfd as pidfd, suppress(ChildProcessError):
            end = os.waitid(os.P_PIDFD, pidfd.fileno(), os.WEXITED | os.WNOHANG)
            if end is not None:
                return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        return None

    def close(self) -> None:
        self._pidfd.close()


class Daemon:
    """A luod and its successors, in `runtime_dir`; use it as a context manager.

    Args:
        runtime_dir: None: a temporary one, which is removed at the end.
        options: more of them for `luod`.
        user: as whom it runs; None: as the test does.
        dev: with Python's development mode and ResourceWarning as an error; off for benchmarks.
        stored: what a service manager had in its store, by name, and passes to the first generation; borrowed.
        env: variables for it.

    Attributes:
        baseline: open descriptors of the daemon at its start, with one control connection.
    """

    def __init__(
        self,
        runtime_dir: str | None = None,
        *,
        options: Sequence[str] = (),
        user: User | None = None,
        dev: bool = True,
        stored: Mapping[str, int] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder_for(user) if runtime_dir is None else None
        self.runtime_dir = self._folder.__enter__() if self._folder is not None else str(runtime_dir)
        self.baseline = 0
        self._python = PYTHON if dev else PLAIN_PYTHON
        self._options = tuple(options)
        self._user = user
        self._stored = stored or {}
        self._env = env
        self._generations: dict[int, _Generation] = {}
        self._current = 0
        self._expected_end = False
        self._abandoned = False
        self._tolerated: list[str] = []
        self._text = bytearray()
        out, into = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stderr, self._stderr_in = OwnedFd(out), OwnedFd(into)
        os.set_blocking(into, True)
        with suppress(PermissionError):
            fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def __enter__(self) -> Self:
        try:
            self._launch()
            status = self.status()
            self.baseline = status.open_fds - status.sessions_preserved - status.sessions_opaque
        except BaseException:
            self._remove()
            raise
        return self

    def _launch(self, *options: str) -> _Generation:
        seen = len(_SERVES.findall(self.stderr))
        command = [*self._python, "-m", "luod", "--runtime-dir", self.runtime_dir, *self._options, *options]
        if self._stored and not self._generations:
            command = [sys.executable, str(_ACTIVATED), ",".join(f"{name}={fd}" for name, fd in self._stored.items()), *command]
        popen = start(
            command,
            self._user,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr_in.fileno(),
            pass_fds=list(self._stored.values()),
            env=None if self._env is None else {**os.environ, **self._env},
        )
        generation = self._generations[popen.pid] = _Generation(popen.pid, popen)
        deadline = time.monotonic() + LIMIT_S
        while len(_SERVES.findall(self.stderr)) == seen:
            assert not generation.ended(), f"luod ended with {generation.reap()}: {self.stderr}"
            assert time.monotonic() < deadline, f"luod doesn't serve: {self.stderr}"
            select.select([self._stderr.fileno(), generation.fileno()], [], [], LIMIT_S)
        self._current = popen.pid
        return generation

    @property
    def stderr(self) -> str:
        """All that every generation has written so far."""
        with suppress(BlockingIOError, ValueError):
            while part := os.read(self._stderr.fileno(), 65536):
                self._text += part
        return self._text.decode("utf-8", "backslashreplace")

    def wait_stderr(self, pattern: str) -> re.Match[str]:
        """Wait until what was written matches `pattern`."""
        deadline = time.monotonic() + LIMIT_S
        while (found := re.search(pattern, self.stderr)) is None:
            assert readable(self._stderr.fileno(), max(0.0, deadline - time.monotonic())), f"luod never said {pattern!r}: {self.stderr}"
        return found

    def status(self) -> DaemonStatus:
        """How the daemon is; from here on its process is the one that is signalled and awaited."""
        with luod_client.control(runtime_dir=self.runtime_dir) as control:
            status = control.status()
        self._follow(status.pid)
        return status

    @property
    def pid(self) -> int:
        """The process that serves now."""
        return self.status().pid

    def _follow(self, pid: int) -> None:
        if pid not in self._generations:
            self._generations[pid] = _Generation(pid)
        self._current = pid

    def upgrade(self, program: str = "") -> Upgraded:
        """Have it replaced, and wait for the end of the one that was. A `Refusal` passes through."""
        before = self._generations[self.pid]
        with luod_client.control(runtime_dir=self.runtime_dir) as control:
            upgraded = control.upgrade(program)
        self._follow(upgraded.pid)
        assert before.reap() in (0, None), f"the old luod ended badly: {self.stderr}"
        return upgraded

    def takeover(self) -> None:
        """Start another luod with `--takeover`, and wait until it serves and the old one has ended."""
        before = self._generations[self.pid]
        self._launch("--takeover")
        assert before.reap() in (0, None), f"the old luod ended badly: {self.stderr}"

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send `sig` to the process that serves. `wait_gone` is for what should follow."""
        if self._generations[self._current].ended():
            self.status()
        self._generations[self._current].kill(sig)

    def wait_gone(self) -> int | None:
        """Wait until no process of this luod is left, which the test meant to happen. The exit code of the last, if it was our child."""
        self._expected_end = True
        code = self._generations[self._current].reap()
        for generation in self._generations.values():
            generation.reap()
        self._wait_silent()
        return code

    def _wait_silent(self) -> None:
        """Wait for the end of stderr, which all generations, known or not, hold open."""
        self._stderr_in.close()
        deadline = time.monotonic() + LIMIT_S
        while True:
            assert readable(self._stderr.fileno(), max(0.0, deadline - time.monotonic())), (
                f"some process still holds luod's stderr: {self.stderr}"
            )
            with suppress(BlockingIOError):
                part = os.read(self._stderr.fileno(), 65536)
                if not part:
                    return
                self._text += part

    def check_idle(self, limit_s: float = LIMIT_S) -> None:
        """Assert that no client is connected any more and that no descriptor is held but for preserved sessions."""
        until(self._is_idle, self._what_is_held, limit_s=limit_s)

    def _is_idle(self) -> bool:
        status = self.status()
        busy = status.sessions_open or status.sessions_claimed or status.staged_fds or status.connections != 1
        return not busy and status.open_fds == self.baseline + status.sessions_preserved + status.sessions_opaque

    def _what_is_held(self) -> str:
        folder = f"/proc/{self._current}/fd"
        held: dict[str, str] = {}
        for fd in sorted(os.listdir(folder), key=int):
            with suppress(FileNotFoundError):  # closed meanwhile
                held[fd] = os.readlink(f"{folder}/{fd}")
        return f"luod idle with {self.baseline} descriptors and one a session: {self.status()}\n{held}"

    def tolerate(self, pattern: str) -> None:
        """Take no offence at what matches `pattern` on stderr, such as the traceback of a successor that shall fail."""
        self._tolerated.append(pattern)

    def abandon(self) -> None:
        """The test has failed already: only clean up."""
        self._abandoned = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None and not self._abandoned:
                self._check()
        finally:
            self._remove()

    def _check(self) -> None:
        if not self._expected_end:
            try:
                self.check_idle()
            except luod_client.LuodError as error:
                raise AssertionError(f"luod isn't well: {error}\n{self.stderr}") from None
            self.kill(signal.SIGTERM)
            code = self.wait_gone()
            assert code in (0, None), f"luod ended with {code} on SIGTERM: {self.stderr}"
        said = self.stderr
        for pattern in self._tolerated:
            said = re.sub(pattern, "", said)
        found = _TROUBLE.search(said)
        assert found is None, f"luod wrote {found and found[0]!r}: {said}"

    def _remove(self) -> None:
        for generation in self._generations.values():
            if not generation.ended():
                generation.kill(signal.SIGKILL)
            generation.reap()
            generation.close()
        self._stderr.close()
        self._stderr_in.close()
        if self._folder is not None:
            self._folder.__exit__(None, None, None)
