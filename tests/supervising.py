"""A supervisor for a test, and the stand-in daemons (standins/notifying.py) that it starts, each with a conversation of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from luod_protocol.fds import OwnedFd
from processes import LIMIT_S, PYTHON, Talk, User, folder_for, readable, start, until

STANDIN: Final = Path(__file__).parent / "standins" / "notifying.py"
_TROUBLE: Final = re.compile(r"Traceback|Warning|Exception ignored|Fatal Python error|a bug")


class Standin:
    """One stand-in daemon."""

    def __init__(self, connection: socket.socket) -> None:
        fd = connection.detach()
        self._talk = Talk(OwnedFd(os.dup(fd)), OwnedFd(fd))
        self.pid, self.arguments, self.env = self._talk.hear()

    def do(self, name: str, *arguments: object) -> Any:
        """Have it call one of its functions. Returns the answer."""
        self.order(name, *arguments)
        return self._talk.hear()

    def order(self, name: str, *arguments: object) -> None:
        """Have it call one of its functions, which doesn't answer as usual."""
        self._talk.tell((name, *(int(each) if isinstance(each, signal.Signals) else each for each in arguments)))

    def hear(self) -> Any:
        """What it says next."""
        return self._talk.hear()

    def ready(self) -> Self:
        """Have it say READY=1, and wait until that was heard."""
        self.do("notify", "READY=1")
        assert self.do("barrier")
        return self

    def gone(self) -> None:
        """Wait for its end; it must say nothing more."""
        try:
            said = self._talk.hear()
        except (EOFError, ConnectionResetError):
            return
        raise AssertionError(f"process {self.pid} goes on and says {said}")

    def kill(self) -> None:
        """Kill it as a crash would."""
        os.kill(self.pid, signal.SIGKILL)
        self.gone()

    def close(self) -> None:
        """No more of it."""
        self._talk.close()


class Supervised:
    """A supervisor of stand-ins; use it as a context manager. At the end it must end on SIGTERM with 0, unless the test has seen it end.

    Args:
        settings: as on its command line; the waits are short unless said otherwise.
        prefix: a command that runs it.
        pass_fds: borrowed; it inherits them.
        program: what it supervises instead.
        stderr: borrowed; its stderr, which is then not looked at.
        user: as whom it runs; None: as the test does.
    """

    def __init__(
        self,
        *settings: str,
        prefix: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        program: Sequence[str] = (),
        stderr: int | None = None,
        user: User | None = None,
    ) -> None:
        self._folder = folder_for(user)
        self.folder = self._folder.__enter__()
        self._settings = ("back_off_s=0.01", "longest_back_off_s=0.02", *settings)
        self._prefix = prefix
        self._pass_fds = pass_fds
        self._stderr = stderr
        self._user = user
        self._program = program or (sys.executable, "-I", "-S", str(STANDIN), f"{self.folder}/talk")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"{self.folder}/talk")
        os.chmod(f"{self.folder}/talk", 0o666)
        self._listener.listen()
        self._standins: list[Standin] = []

    def __enter__(self) -> Self:
        command = [*self._prefix, *PYTHON, "-m", "luod.supervisor", *self._settings, "--", *self._program]
        with open(f"{self.folder}/stderr", "wb") as stderr:
            self.popen = start(
                command,
                self._user,
                stdout=subprocess.DEVNULL,
                stderr=stderr.fileno() if self._stderr is None else self._stderr,
                pass_fds=self._pass_fds,
            )
        return self

    @property
    def stderr(self) -> str:
        """All that it and the stand-ins have written."""
        return Path(f"{self.folder}/stderr").read_text(encoding="utf-8")

    def wait_stderr(self, pattern: str) -> None:
        """Wait until what was written matches `pattern`."""
        until(lambda: re.search(pattern, self.stderr), lambda: f"{pattern!r} was never said: {self.stderr}")

    def standin(self) -> Standin:
        """The next stand-in that says hello."""
        assert readable(self._listener.fileno()), f"no stand-in was started: {self.stderr}"
        standin = Standin(self._listener.accept()[0])
        self._standins.append(standin)
        return standin

    def no_other(self) -> None:
        """Assert that no stand-in has said hello that the test doesn't know."""
        assert not readable(self._listener.fileno(), 0)

    def open_fds(self) -> int:
        """How many descriptors the supervisor has open."""
        return len(os.listdir(f"/proc/{self.popen.pid}/fd"))

    def terminate(self, sig: int = signal.SIGTERM) -> None:
        """Tell it to end."""
        self.popen.send_signal(sig)

    def wait(self) -> int:
        """Wait for its end. Its exit code."""
        return self.popen.wait(LIMIT_S)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                if self.popen.poll() is None:
                    self.terminate()
                    assert self.wait() == 0, self.stderr
                assert _TROUBLE.search(self.stderr) is None, self.stderr
            else:
                print(f"the supervisor's stderr:\n{self.stderr}")
        finally:
            self.popen.kill()
            self.popen.wait()
            for standin in self._standins:
                standin.close()
            self._listener.close()
            self._folder.__exit__(None, None, None)


def ends(pid: int) -> bool:
    """Whether the process ends, or has ended, within the usual bound."""
    deadline = time.monotonic() + LIMIT_S
    try:
        with OwnedFd(os.pidfd_open(pid)) as pidfd:
            return readable(pidfd.fileno(), max(0.0, deadline - time.monotonic()))
    except ProcessLookupError:
        return True
