"""Processes that tests start: bounded waits, other users, and client processes to talk to.

A client process (`spawn_client`) runs a function of the test in a fresh interpreter; the two talk in lines of Python literals.
Every wait is for an event or a condition, and ends with an AssertionError after `LIMIT_S` seconds.
"""

from __future__ import annotations

import ast
import ctypes
import inspect
import os
import select
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs

import luod_client
from luod_protocol.fds import OwnedFd

T = TypeVar("T")

LIMIT_S: Final = float(os.environ.get("LUOD_TESTS_LIMIT_S", "20"))
"""The lab, which is slow, sets another."""
PLAIN_PYTHON: Final = (sys.executable, "-P")
PYTHON: Final = (*PLAIN_PYTHON, "-X", "dev", "-W", "error::ResourceWarning")
"""How daemons and clients are started in tests; a daemon passes the options on to its successor."""

_PR_SET_CHILD_SUBREAPER: Final = 36


def adopt_orphans() -> None:
    """Make this process the parent of every process below it whose parent dies, prctl(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def until(condition: Callable[[], T], what: Callable[[], str] | str, *, limit_s: float = LIMIT_S) -> T:
    """The first true value of `condition`, which is asked again and again; `what` says what was waited for."""
    deadline = time.monotonic() + limit_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit_s} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.002)


def readable(fd: int, limit_s: float = LIMIT_S) -> bool:
    """Whether the borrowed `fd` becomes readable, or is at its end, within `limit_s` seconds."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(limit_s * 1000))


# ---- other users


@attrs.frozen(kw_only=True)
class User:
    """Somebody else, for tests that run as root. No such name needs to exist on the machine."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ALICE: Final = User(uid=60_001, gid=60_001)
BOB: Final = User(uid=60_002, gid=60_002)


def _everybody_may_enter(path: str) -> bool:
    return all(os.stat(folder).st_mode & 0o001 for folder in Path(path).resolve().parents)


def start(
    command: Sequence[str],
    user: User | None = None,
    *,
    stdout: int | None = None,
    stderr: int | None = None,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    within: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """A process of `user` (None: of whoever runs the test), with nothing on stdin. The rest as for Popen.

    Args:
        within: the beginning of a command that runs the rest of it elsewhere, as root, and as its child: `systemd_rig.Manager.inside`.
            The process dies with that parent.
    """
    by_popen = user
    places = (sys.executable, f"{sys.prefix}/lib", f"{sys.base_prefix}/lib", __file__, str(luod_client.__file__))
    if user is not None and (within or not all(_everybody_may_enter(place) for place in places)):
        # The interpreter or the checkout is in root's home: the user gets to read everything there, and may do no more than that.
        groups = ["--groups", ",".join(map(str, user.groups))] if user.groups else ["--clear-groups"]
        who = ["--reuid", str(user.uid), "--regid", str(user.gid), *groups, *(["--pdeathsig", "KILL"] if within else [])]
        command = ["setpriv", *who, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--", *command]
        by_popen = None
    return subprocess.Popen(
        [*within, *command],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        env=env,
        user=by_popen.uid if by_popen else None,
        group=by_popen.gid if by_popen else None,
        extra_groups=by_popen.groups if by_popen else None,
    )


@contextmanager
def folder_for(user: User | None = None) -> Generator[str]:
    """A short temporary folder, `user`'s own, that everybody may enter."""
    folder = tempfile.mkdtemp(prefix="luod-")
    try:
        os.chmod(folder, 0o755)
        if user is not None:
            os.chown(folder, user.uid, user.gid)
        yield folder
    finally:
        shutil.rmtree(folder)


# ---- client processes


class Talk:
    """One end of a conversation in lines of Python literals (bytes, tuples, None and so on, as well)."""

    def __init__(self, hear: OwnedFd, tell: OwnedFd) -> None:
        self._hear, self._tell = hear, tell
        self._read = b""

    def tell(self, value: object = None) -> None:
        """Say a value."""
        line = repr(value).encode() + b"\n"
        while line:
            line = line[os.write(self._tell.fileno(), line) :]

    def hear(self, limit_s: float = LIMIT_S) -> Any:
        """The next value that the other side says.

        Raises:
            EOFError: it ended.
        """
        while b"\n" not in self._read:
            assert readable(self._hear.fileno(), limit_s), f"nothing was said within {limit_s} s"
            part = os.read(self._hear.fileno(), 65536)
            if not part:
                raise EOFError("the other side has ended")
            self._read += part
        line, self._read = self._read.split(b"\n", 1)
        return ast.literal_eval(line.decode())

    def close(self) -> None:
        """Say no more, and hear no more."""
        self._hear.close()
        self._tell.close()


class Client:
    """A client process. `tell` and `hear` talk to its function; it must end with 0 unless the test killed it."""

    def __init__(self, popen: subprocess.Popen[bytes], talk: Talk) -> None:
        self._popen = popen
        self._killed = False
        self._talk = talk
        self.pid = popen.pid
        self.tell = talk.tell

    def hear(self, limit_s: float = LIMIT_S) -> Any:
        """The next value that it says. When it failed instead, its traceback is on the test's stderr."""
        try:
            return self._talk.hear(limit_s)
        except EOFError:
            raise AssertionError(f"the client process ended with {self.wait()}") from None

    def signal(self, sig: int) -> None:
        """Send `sig`."""
        self._popen.send_signal(sig)

    def kill(self) -> None:
        """Kill it, and wait for its end."""
        self._killed = True
        self._popen.kill()
        self.wait()

    def wait(self) -> int:
        """Wait for its end. Its exit code, minus the signal."""
        return self._popen.wait(LIMIT_S)

    def rest(self) -> Generator[Any]:
        """What an ended one has said and was not heard yet."""
        while True:
            try:
                yield self._talk.hear()
            except EOFError:
                return

    def finish(self) -> None:
        """Say no more and wait for its end, which must be a good one."""
        self._talk.close()
        code = self.wait()
        assert self._killed or code == 0, f"the client process ended with {code}"


@contextmanager
def spawn_client(
    function: Callable[..., None],
    *args: object,
    user: User | None = None,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    dev: bool = True,
    within: Sequence[str] = (),
) -> Generator[Client]:
    """Run `function(talk, *args)` in a client process of its own.

    Args:
        function: stands on its own: its source is all that the process gets, so it imports what it uses. `talk.hear()` ends the process
            when the test has no more to say.
        args: Python literals.
        pass_fds: borrowed; the process has them under the same numbers.
        dev: with Python's development mode and ResourceWarning as an error; off for benchmarks.
        within: as for `start`. `Client.pid` is then the process that waits for it, which to kill kills it; other signals don't reach it.
    """
    to_client, to_test = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    hear, tell, theirs = OwnedFd(to_test[0]), OwnedFd(to_client[1]), (OwnedFd(to_client[0]), OwnedFd(to_test[1]))
    numbers = [each.fileno() for each in theirs]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        popen = start(
            [*(PYTHON if dev else PLAIN_PYTHON), "-c", f"import processes; processes.run_client({numbers[0]}, {numbers[1]})"],
            user,
            pass_fds=[*pass_fds, *numbers],
            env={**os.environ, **(env or {}), "PYTHONPATH": path},
            within=within,
        )
    except BaseException:
        hear.close()
        tell.close()
        raise
    finally:
        for each in theirs:
            each.close()
    talk = Talk(hear, tell)
    client = Client(popen, talk)
    try:
        talk.tell((function.__name__, textwrap.dedent(inspect.getsource(function)), args))
        yield client
        client.finish()
    finally:
        talk.close()
        if popen.poll() is None:
            popen.kill()
        popen.wait()


def run_client(hear: int, tell: int) -> None:
    """The other side of `spawn_client`, in the client process."""
    for fd in (hear, tell):
        os.set_inheritable(fd, False)
    talk = Talk(OwnedFd(hear), OwnedFd(tell))
    try:
        name, source, args = talk.hear()
        names: dict[str, Any] = {}
        exec(compile(f"from __future__ import annotations\n{source}", f"<{name}>", "exec"), names)
        with suppress(EOFError):
            names[name](talk, *args)  # when there is no more to hear, it has done its part
    finally:
        talk.close()
