"""The demo's processes: how they are started, talked to, and never left behind.

Theory. The director starts every other process. Roles are Python modules of this package: they get words on stdin, one a line, and
report what happened as JSON on stdout, one object a line with an `event`. The kernel kills them when the director dies. The daemons can't
be tied to the director so: a successor is started by its predecessor. They share a process group and the pipe of their stderr, and the
director, as their subreaper, can wait for every one of them.

Happy path: `Role(...)`, `hear` what is due, `tell` it to go on, `join`. `Daemons(dir)`, its first daemon serves when that returns.

Unhappy paths:
1. A role ends, or says something else, where an event was due: `DemoFault` names the role and the event.
2. The daemon ends before it serves: `DemoFault` with what it said.
3. The director leaves, in whatever way: a role is killed and waited for; the daemons are asked to end, and killed if they don't within
   `_PATIENCE_S`.

Invariants: no process outlives the block of its `Role` or `Daemons`. Nobody waits here for ever: the director has one deadline for all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

from luod_client.demo.prctl import die_with
from luod_protocol.errors import LuodError

_PATIENCE_S: Final = 5.0
_POLL_S: Final = 0.005


class DemoFault(LuodError):
    """The demo can't go on."""


class Role:
    """A process that plays `module`. Leaving the block kills it if it is still there.

    Args:
        name: what to call it.
        module: in this package.
        arguments: of its own.
        fds: borrowed; inherited under the same numbers.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str] = (), *, fds: Sequence[int] = ()) -> None:
        self.name = name
        command = [sys.executable, "-P", "-m", f"{__package__}.{module}", str(os.getpid()), *arguments]
        # Not in the terminal's foreground group: Ctrl-C is for the director.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds, process_group=0)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def hear(self, event: str) -> dict[str, Any]:
        """Wait for its next report and return the fields.

        Raises:
            DemoFault: that isn't `event`.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise DemoFault(f"{self.name} (pid {self.pid}) ended with status {self._process.wait()}, where {event!r} was due")
        fields: dict[str, Any] = json.loads(line)
        came = fields.pop("event")
        if came != event:
            raise DemoFault(f"{self.name} (pid {self.pid}) reported {came!r}, where {event!r} was due")
        return fields

    def tell(self, word: str) -> None:
        """Give it a word.

        Raises:
            DemoFault: it has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise DemoFault(f"{self.name} (pid {self.pid}) ended with status {self._process.wait()} before it was told {word!r}") from None

    def join(self) -> None:
        """Wait for its end.

        Raises:
            DemoFault: it failed.
        """
        if (status := self._process.wait()) != 0:
            raise DemoFault(f"{self.name} (pid {self.pid}) ended with status {status}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            # A word that was never read is flushed again by close.
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


def played(arguments: Sequence[str]) -> list[str]:
    """In a role's process, first of all: tie it to the director. Returns its own arguments."""
    die_with(int(arguments[0]))
    return list(arguments[1:])


def report(event: str, **fields: object) -> None:
    """In a role's process: tell the director what happened."""
    print(json.dumps({"event": event, **fields}), flush=True)


def await_word(word: str) -> str:
    """In a role's process: wait for the director's next word, which begins with `word`; what follows is returned."""
    line = sys.stdin.readline().strip()
    if not line.startswith(word):
        raise SystemExit(f"told {line!r}, where {word!r} was due")
    return line.removeprefix(word).strip()


class Daemons:
    """luod in `runtime_dir`, with more `options`, and whoever succeeds it. This process must be a subreaper. Leaving the block ends them.

    Attributes:
        said: the lines they wrote to stderr, complete when they have ended.

    Raises:
        DemoFault: luod isn't installed, or unhappy path 2.
    """

    def __init__(self, runtime_dir: str, *options: str) -> None:
        spec = importlib.util.find_spec("luod")
        if spec is None or spec.origin is None:
            raise DemoFault(f"the daemon isn't installed beside the client, for {sys.executable}: install the whole distribution (luod)")
        command = [sys.executable, "-P", "-m", "luod", "--runtime-dir", runtime_dir, *options]
        null, pipe = subprocess.DEVNULL, subprocess.PIPE
        self.said: list[str] = []
        self._first = subprocess.Popen(command, stdin=null, stdout=null, stderr=pipe, process_group=0)
        try:
            self._await_service()
        except BaseException:
            self._end()
            raise

    def _await_service(self) -> None:
        assert self._first.stderr is not None
        for line in self._first.stderr:
            self.said.append(line.decode(errors="replace").rstrip())
            if " serves " in self.said[-1]:
                return
        raise DemoFault("\n".join([f"luod ended with status {self._first.wait()} before it served:", *self.said]))

    def join_first(self) -> int:
        """Wait for the end of the first daemon, which has a successor; its exit status."""
        return self._first.wait()

    def _end(self) -> None:
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE_S
        while self._reap():
            if time.monotonic() > deadline:
                self._signal(signal.SIGKILL)
            time.sleep(_POLL_S)
        if self._first.stderr is not None:
            with self._first.stderr as pipe:
                os.set_blocking(pipe.fileno(), False)
                self.said += (pipe.read() or b"").decode(errors="replace").splitlines()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._first.pid, number)

    def _reap(self) -> bool:
        """Wait for those that have ended; whether any is left."""
        # poll() first, so that Popen knows of its own.
        left = self._first.poll() is None
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, _ = os.waitpid(-self._first.pid, os.WNOHANG)
                if pid == 0:
                    return True
        return left

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()
        if isinstance(error, LuodError):
            print(*self.said, sep="\n", file=sys.stderr)
