#!/usr/bin/env python3
"""An nginx that is replaced under load, and killed. See README.md beside this; `--help` for the arguments."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

try:
    import attrs
    from tabulate import tabulate

    import luod_client
    from luod_client.demo.prctl import die_with, subreaper
    from luod_client.demo.processes import Daemons, DemoFault
except ImportError as error:
    sys.exit(f"{error}: this needs luod: `pip install .` in luod's folder, or use .venv/bin/python there, which `make demo` makes")

HERE: Final = Path(__file__).parent
LUOCTL: Final = (sys.executable, "-P", "-m", "luod_client.cli")
SESSION: Final = "web"
PAGE: Final = b"what is served\n" * 256
CLIENTS: Final = 32
"""How many requests are under way at any time."""

STEP_REQUESTS: Final = 500
"""How many are answered between one step and the next."""

BACKLOG: Final = 511
TIMEOUT_S: Final = 10
"""How long a client waits for its answer."""

PATIENCE_S: Final = 20.0
LOAD_S: Final = 60.0
_POLL_S: Final = 0.005
_LISTEN: Final = "0A"
"""TCP_LISTEN as /proc/net/tcp writes it."""


@attrs.frozen(kw_only=True)
class Server:
    """A process that served, and how many whole answers to this load are in its log. A killed one may have had no time for the last."""

    pid: int
    answered: int


@attrs.frozen(kw_only=True)
class Outcome:
    """What one load saw, as its clients counted it, and who served it.

    `refused` requests got no connection; `cut_off` ones had one that ended early, or a wrong answer. `longest_ms` is the longest that any
    request took. `waiting` is how many connections waited when there was no server, None where there always was one.
    """

    what: str
    requests: int
    refused: int
    cut_off: int
    longest_ms: int
    waiting: int | None
    servers: Sequence[Server]
    luod_pids: Sequence[int]

    def faults(self) -> list[str]:
        """What is not as it must be, in words."""
        answered = sum(server.answered for server in self.servers)
        # What was in service when its server was killed is lost. Nothing else may be.
        lost_at_most = 0 if self.waiting is None else CLIENTS
        so = [
            (self.refused > 0, f"{self.refused} requests were refused"),
            (
                self.cut_off > lost_at_most,
                f"{self.cut_off} requests were cut off, {lost_at_most} can have been in the hands of a killed server",
            ),
            (
                self.waiting is None and answered < self.requests,
                f"the servers answered {answered} of {self.requests} requests",
            ),
            (self.waiting == 0, "no connection waited while there was no server"),
            (not all(server.answered for server in self.servers), f"not every server had something to do: {self.servers}"),
        ]
        return [f"{self.what}: {fault}" for is_so, fault in so if is_so]


def await_that(condition: Callable[[], bool], what: str) -> None:
    """Ask until it holds.

    Raises:
        DemoFault: not in time.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise DemoFault(f"{what}: not within {PATIENCE_S:.0f} s")
        time.sleep(_POLL_S)


class Nginx:
    """An nginx, started through `luoctl retrieve`, in a folder of its own. Leaving the block kills it if it is still there.

    Args:
        folder: its prefix.
        port: what the preserved socket listens on.
        runtime_dir: where luod is.
        options: more of them for `luoctl retrieve`.
    """

    def __init__(self, folder: Path, port: int, runtime_dir: str, *options: str) -> None:
        self._folder = folder
        (self._folder / "www").mkdir(parents=True)
        (self._folder / "www" / "index.html").write_bytes(PAGE)
        conf = self._folder / "nginx.conf"
        conf.write_text((HERE / "nginx.conf").read_text(encoding="utf-8").replace("@PORT@", str(port)), encoding="utf-8")
        nginx = [program("nginx"), "-p", str(folder), "-c", str(conf), "-e", str(self._folder / "error.log")]
        self._process = subprocess.Popen(
            [*LUOCTL, "--runtime-dir", runtime_dir, "retrieve", SESSION, *options, "--", str(HERE / "with-listen-fds"), *nginx],
            stdin=subprocess.DEVNULL,
            process_group=0,
            # SIGTERM: its worker would outlive one that is killed.
            preexec_fn=functools.partial(die_with, os.getpid(), signal.SIGTERM),
        )
        self.pid = self._process.pid

    def answered(self) -> int:
        """How many requests it has answered, whole."""
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / "access.log").read_text(encoding="utf-8").splitlines().count(f"200 {len(PAGE)}")
        return 0

    def await_answers(self, number: int, load: Load | None = None) -> None:
        """Wait until it has answered so many more, while `load` goes on.

        Raises:
            DemoFault: it ends, or the load does, or it doesn't get there.
        """
        goal = self.answered() + number

        def there() -> bool:
            if (status := self._process.poll()) is not None:
                raise DemoFault(f"nginx (pid {self.pid}) ended with status {status}; what it says is above")
            over = load is not None and load.ended()
            enough = self.answered() >= goal
            if load is not None and over and not enough:
                load.counted()
                raise DemoFault("all requests were answered before everything was done: say --requests, and more of them")
            return enough

        await_that(there, f"nginx (pid {self.pid}) should answer {number} requests")

    def quit(self) -> None:
        """Have it finish what it has in service and end; wait for that.

        Raises:
            DemoFault: it ends badly, or not at all.
        """
        self._process.send_signal(signal.SIGQUIT)
        try:
            status = self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise DemoFault(f"nginx (pid {self.pid}) is still there {PATIENCE_S:.0f} s after SIGQUIT") from None
        if status != 0:
            raise DemoFault(f"nginx (pid {self.pid}) was told to quit and ended with status {status}")

    def kill(self) -> None:
        """Kill it, its worker included, and wait until nothing of it is left. Does nothing when it has ended."""
        with contextlib.suppress(ChildProcessError):  # raised when nothing of it is left
            os.waitid(os.P_PGID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            while True:
                os.waitpid(-self.pid, 0)  # its worker, whose parent is this process now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()


class Load:
    """`ab`, which sends requests, each on a connection of its own, `CLIENTS` at a time. Leaving the block kills it if it is still there.

    Args:
        port: on 127.0.0.1.
        requests: how many.
        out: a file for what it says.
    """

    def __init__(self, port: int, requests: int, out: Path) -> None:
        # -r: go on after an error; -v 1: say which.
        command = ["ab", "-q", "-r", "-v", "1", "-s", str(TIMEOUT_S), "-n", str(requests), "-c", str(CLIENTS), f"http://127.0.0.1:{port}/"]
        self._requests = requests
        self._out = out
        with out.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=functools.partial(die_with, os.getpid()),
            )

    def ended(self) -> bool:
        """Whether all requests are done."""
        return self._process.poll() is not None

    def counted(self) -> tuple[int, int, int]:
        """Wait for the end: how many requests were refused, how many failed otherwise, and the longest in milliseconds.

        Raises:
            DemoFault: it gave up.
        """
        status = self._process.wait(LOAD_S)
        said = self._out.read_text(encoding="utf-8", errors="replace")

        def number(name: str) -> int:
            """What stands after it; 0 where it is left out."""
            found = re.search(rf"^ *{name}:? +(\d+)", said, re.MULTILINE)
            return int(found[1]) if found else 0

        if status != 0 or number("Complete requests") != self._requests:
            raise DemoFault(f"ab gave up, with status {status}:\n{said}")
        kinds = re.search(r"\(Connect: (\d+), Receive: (\d+), Length: (\d+), Exceptions: (\d+)\)", said)
        if kinds is None and number("Failed requests") > 0:
            raise DemoFault(f"ab says in an unknown way what failed:\n{said}")
        # The kinds overlap: a request that was reset counts as Receive and, since it has no page, as Length. A bad status can overlap
        # too, and is rather counted twice than not at all.
        failed = max(map(int, kinds.groups() if kinds else ("0",))) + number("Non-2xx responses") + number("Write errors")
        refused = said.count("Connection refused")
        return refused, failed - refused, number("100%")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()


def program(name: str) -> str:
    """Where a program is, also one of those that only root has in PATH.

    Raises:
        DemoFault: nowhere.
    """
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        packages = "nginx apache2-utils"
        raise DemoFault(f"{name} is not installed: on Debian: apt-get install --no-install-recommends {packages}")
    return found


def waiting(port: int) -> int:
    """How many connections wait in the backlog of the socket that listens on 127.0.0.1:`port` (proc(5), net/tcp: its rx_queue)."""
    address = f"{socket.htonl(0x7F000001):08X}:{port:04X}"
    with open("/proc/net/tcp", encoding="ascii") as table:
        for line in table:
            _, local, _, state, queues, *_ = line.split()
            if local == address and state == _LISTEN:
                return int(queues.partition(":")[2], 16)
    return 0


def preserve(runtime_dir: str) -> int:
    """Make the socket that the servers will listen on, give it to luod, and keep nothing of it. Returns its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener:
        port: int = listener.getsockname()[1]
        fd = listener.fileno()
        subprocess.run(
            [*LUOCTL, "--runtime-dir", runtime_dir, "preserve", SESSION, f"http=fd:{fd}"],
            pass_fds=[fd],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return port


class Story:
    """The example: what it does, said as it happens."""

    def __init__(self, folder: str, *, requests: int, quiet: bool) -> None:
        self._folder = Path(folder)
        self._runtime_dir = str(self._folder / "luod")
        self._requests = requests
        self._quiet = quiet
        self._port = preserve(self._runtime_dir)
        self._say(f"A socket listens on 127.0.0.1:{self._port}. luod has it, as session {SESSION!r}, and nobody else.")

    def _say(self, text: str) -> None:
        if not self._quiet:
            print(text, flush=True)

    def _nginx(self, number: int, *options: str) -> Nginx:
        return Nginx(self._folder / f"nginx-{number}", self._port, self._runtime_dir, *options)

    def _load(self) -> Load:
        self._say(f"{self._requests:,} requests are sent, {CLIENTS} at a time, each on a connection of its own:")
        return Load(self._port, self._requests, self._folder / "ab.out")

    def _upgrade(self) -> tuple[int, int]:
        with luod_client.control(runtime_dir=self._runtime_dir) as control:
            upgraded = control.upgrade()
        self._say(f"  luod is replaced: process {upgraded.predecessor_pid} by process {upgraded.pid}.")
        return upgraded.predecessor_pid, upgraded.pid

    def tell(self) -> list[Outcome]:
        """All of it; what the two loads saw."""
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(self._nginx(1))
            self._await_start(first)
            replaced, second = self._replace(first, stack)
            killed, third = self._kill(second, stack)
            third.quit()
        self._expect_nothing_left()
        return [replaced, killed]

    def _await_start(self, server: Nginx) -> None:
        """Send one request, which waits until the server is there."""
        with socket.create_connection(("127.0.0.1", self._port)) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            server.await_answers(1)

    def _replace(self, old: Nginx, stack: contextlib.ExitStack) -> tuple[Outcome, Nginx]:
        """Under load, luod is replaced, and then nginx: its successor serves before it is told to quit."""
        before = old.answered()
        with self._load() as load:
            old.await_answers(STEP_REQUESTS, load)
            self._say(f"  nginx {old.pid} answers them.")
            luod_pids = self._upgrade()
            old.await_answers(STEP_REQUESTS, load)
            # --force: luod asks for it where a process that has retrieved the session lives. Two servers may share a listening socket.
            new = stack.enter_context(self._nginx(2, "--force"))
            new.await_answers(1, load)
            old.quit()
            new.await_answers(1, load)  # there is load still
            self._say(f"  nginx {new.pid} has come from luod and answers; nginx {old.pid} has finished what it had, and ended.")
            refused, cut_off, longest_ms = load.counted()
        outcome = Outcome(
            what="replaced",
            requests=self._requests,
            refused=refused,
            cut_off=cut_off,
            longest_ms=longest_ms,
            waiting=None,
            servers=[Server(pid=old.pid, answered=old.answered() - before), Server(pid=new.pid, answered=new.answered())],
            luod_pids=luod_pids,
        )
        return outcome, new

    def _kill(self, old: Nginx, stack: contextlib.ExitStack) -> tuple[Outcome, Nginx]:
        """Under load, nginx is killed. While no server is there, clients wait and luod is replaced. Then there is a server again."""
        before = old.answered()
        with self._load() as load:
            old.await_answers(STEP_REQUESTS, load)
            self._say(f"  nginx {old.pid} answers them.")
            old.kill()
            await_that(lambda: waiting(self._port) >= CLIENTS, f"{CLIENTS} connections should wait")
            waited = waiting(self._port)
            self._say(f"  nginx {old.pid} is killed. Nobody serves; {waited} connections wait in the socket, which luod has.")
            luod_pids = self._upgrade()
            new = stack.enter_context(self._nginx(3, "--finish"))
            new.await_answers(1, load)
            self._say(f"  nginx {new.pid} has come from luod and answers; luod has let go of the socket (--finish).")
            refused, cut_off, longest_ms = load.counted()
        outcome = Outcome(
            what="killed",
            requests=self._requests,
            refused=refused,
            cut_off=cut_off,
            longest_ms=longest_ms,
            waiting=waited,
            servers=[Server(pid=old.pid, answered=old.answered() - before), Server(pid=new.pid, answered=new.answered())],
            luod_pids=luod_pids,
        )
        return outcome, new

    def _expect_nothing_left(self) -> None:
        with luod_client.deserialize(runtime_dir=self._runtime_dir) as luod:
            if luod.list():
                raise DemoFault("luod still has the session, which was retrieved with --finish")
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", self._port)) != errno.ECONNREFUSED:
                raise DemoFault(f"the last server has ended, and port {self._port} is still open: somebody has kept the socket")


def told(outcomes: Sequence[Outcome]) -> str:
    """What was seen, for a person."""
    rows = [
        (
            outcome.what,
            f"{outcome.requests:,}",
            f"{outcome.requests - outcome.refused - outcome.cut_off:,}",
            outcome.refused,
            outcome.cut_off,
            f"{outcome.longest_ms:,} ms",
            " -> ".join(f"{server.pid} ({server.answered:,})" for server in outcome.servers),
        )
        for outcome in outcomes
    ]
    headers = ["nginx was", "requests", "answered", "refused", "cut off in service", "longest wait", "nginx: pid (answers in its log)"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="An nginx that is replaced under load, and killed.",
        epilog="Exit status: 0 done, 1 a step failed or a request that needn't be was lost (it is said what), 2 usage.",
    )
    parser.add_argument("--json", action="store_true", help="what was seen as one JSON document on stdout, and nothing else there")
    parser.add_argument(
        "--requests",
        type=int,
        default=8000,
        metavar="N",
        help="how many to send, twice; about 1,000 are answered a second (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.requests < 2 * STEP_REQUESTS:
        parser.error(f"--requests {arguments.requests}: at least {2 * STEP_REQUESTS}")
    return arguments


def main() -> int:
    """Do what the command line says; the exit status."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    arguments = _arguments()
    try:
        for each in ("nginx", "ab"):
            program(each)
        with subreaper(), tempfile.TemporaryDirectory(prefix="luod-nginx-") as folder:
            os.chmod(folder, 0o755)  # the worker of root's nginx is somebody else, and has to read what it serves
            with Daemons(os.path.join(folder, "luod")):
                outcomes = Story(folder, requests=arguments.requests, quiet=arguments.json).tell()
    except (luod_client.LuodError, OSError, subprocess.SubprocessError) as error:
        print(f"{os.path.basename(__file__)}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    faults = [fault for outcome in outcomes for fault in outcome.faults()]
    if arguments.json:
        print(json.dumps({"ok": not faults, "faults": faults, "loads": [attrs.asdict(outcome) for outcome in outcomes]}))
    else:
        print("", told(outcomes), "", *faults, "NOT as it must be." if faults else "Everything as it must be.", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
