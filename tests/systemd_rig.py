"""A real systemd with the shipped units, for a test: PID 1 of namespaces of its own, over this machine's files.

How a test is written (the fixture `systemd_luod` is in tests/systemd/conftest.py, and such tests lie in that folder):

    def test_a_killed_luod_comes_back(systemd_luod: Manager) -> None:
        manager = systemd_luod                                  # booted; luod's units are installed, nothing is started
        manager.ctl("start", "luod.service")                    # returns when luod has said READY=1
        with spawn_client(preserve, "/run/luod", within=manager.inside, user=manager.user("alice")) as alice:
            ...                                                 # a client process inside, which luod sees as alice's
        manager.kill("luod.service")
        manager.until_shows("luod.service", SubState="running", NRestarts="1", NFileDescriptorStore="1")
        assert manager.run("luoctl", "--json", "list")          # this checkout's luoctl, as root, inside

A test with settings or another program makes its own, and asks `require_systemd` (the fixture) for the permission to:

    @pytest.mark.usefixtures("require_systemd")
    def test_a_full_store() -> None:
        with Manager(settings={"luod.service": "[Service]\\nFileDescriptorStoreMax=4\\n"}) as manager:
            ...

What is as in production: the units, the configuration and the user from systemd/, unmodified; the sandbox; the manager. What differs is in
drop-ins: where luod is installed, that interpreter and checkout are visible in the sandbox wherever they lie, and output goes to files
(`said`, `log`), for there is no journald. Nothing else of a system runs there.

Inside is a private /run, /tmp, /var/tmp, /etc and network, the rest is the machine's, read-only. A client that connects from outside
has pid 0 for luod; one that was started with `inside` has a pid, and its uid either way. A process that is started with `inside` doesn't
outlive its parent, and when that is killed comes to this process (`adopt_orphans`), which reaps it at the end.

Several managers can run at once. The end kills everything inside, whatever it was doing, and leaves nothing behind.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from leftovers import child_pids
from luod_protocol.fds import OwnedFd
from processes import ALICE, BOB, LIMIT_S, User, folder_for, readable, start, until

CHECKOUT: Final = Path(__file__).resolve().parents[1]
SHIPPED: Final = CHECKOUT / "systemd"
UNITS: Final = ("luod.service", "luod-serialize.socket", "luod-deserialize.socket", "luod-control.socket")
SOCKETS: Final = UNITS[1:]

_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TOOLS: Final = ("mount", "nsenter", "setpriv", "systemctl", "systemd-sysusers", "systemd-tmpfiles", "unshare")
_NAMESPACES: Final = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
_OF_THE_MACHINE: Final = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "nsswitch.conf", "os-release")
"""What is copied of /etc, as far as it is there."""
_STUBS: Final = (
    *("basic", "default", "emergency", "final", "local-fs", "multi-user", "paths", "rescue"),
    *("shutdown", "slices", "sockets", "swap", "sysinit", "timers", "umount"),
)
"""The targets that others refer to."""
_CLIENTS: Final = {"alice": ALICE, "bob": BOB}

# The cgroup can be made before its namespace only, and removed after its last process only; so one shell stays outside.
_OUTER: Final = r"""
set -e
mount -t cgroup2 none "$1/cgroup"
group=$1/cgroup/$2; shift 2
mkdir "$group"
setpriv --pdeathsig KILL -- sh -c 'echo $$ >"$0/cgroup.procs"; exec "$@"' "$group" "$@" &
trap 'kill -KILL $!' TERM
wait $! || :
for try in $(seq 200); do
    find "$group" -depth -type d -exec rmdir {} + 2>/dev/null && exit
    sleep 0.02
done
echo "$group can't be removed"; exit 1
"""


class _NoSystemd(AssertionError):
    """It can't be booted; the text says why."""


def _systemd() -> str | None:
    return next((path for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if os.access(path, os.X_OK)), None)


@functools.cache
def why_not() -> str:
    """Why no systemd can be started on this machine; empty when one can. Found out by starting one."""
    if os.geteuid() != 0:
        return "a systemd can be started by root only"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None] + ([] if _systemd() else ["systemd"])
    if missing:
        return f"{', '.join(missing)}: not installed (Debian packages systemd, util-linux and mount)"
    try:
        with Manager(install=False):
            return ""
    except AssertionError as error:
        return f"a systemd can't be started here: {error}"


class Manager:
    """A systemd; use it as a context manager.

    Args:
        program: the command of luod.service instead of this checkout's luod with the shipped options.
        reload: the command of its ExecReload= instead of this checkout's luoctl with the shipped options.
        settings: by unit, the text of one more drop-in.
        install: whether luod's units are there at all.

    Attributes:
        folder: temporary, the same path inside and outside; everybody may enter, root may write.
        inside: a command starts with this to run in the namespaces, as root; it dies with its parent.
        pid: PID 1, as this process knows it.
        root: the path, from outside, of what is / inside.
        runtime_dir: the path, from outside, of /run/luod.
    """

    def __init__(
        self,
        *,
        program: Sequence[str] | None = None,
        reload: Sequence[str] | None = None,
        settings: Mapping[str, str] | None = None,
        install: bool = True,
    ) -> None:
        self._commands = {"ExecStart": program, "ExecReload": reload}
        self._settings = dict(settings or {})
        self._install = install
        self._ending = ExitStack()
        self.folder = Path()
        self.inside: Sequence[str] = ()
        self.pid = 0
        self.root = Path()
        self.runtime_dir = ""

    def __enter__(self) -> Self:
        try:
            self.folder = Path(self._ending.enter_context(folder_for()))
            for name in ("cgroup", "etc", "log", "nothing", "units"):
                (self.folder / name).mkdir()
            self._write_etc()
            self._write_units()
            self._boot()
            if self._install:
                self.run("systemd-tmpfiles", "--create", str(SHIPPED / "luod-tmpfiles.conf"))
        except BaseException:
            self._ending.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.close()

    # ---- what it is started with

    def _write_etc(self) -> None:
        etc = self.folder / "etc"
        for name in _OF_THE_MACHINE:
            there = Path("/etc", name)
            if there.is_dir():
                shutil.copytree(there, etc / name, symlinks=True)
            elif there.exists():
                shutil.copy(there, etc / name)
        for name in ("passwd", "group"):
            shutil.copy(Path("/etc", name), etc / name)
        (etc / "machine-id").write_text(f"{os.urandom(16).hex()}\n")
        (etc / "systemd").mkdir()
        (etc / "systemd" / "system.conf").write_text("[Manager]\nDefaultStandardOutput=null\nDefaultTimeoutStopSec=10s\n")
        (etc / "luod").mkdir()
        shutil.copy(SHIPPED / "luod.toml", etc / "luod")
        users = etc / "sysusers.d"
        users.mkdir()
        shutil.copy(SHIPPED / "luod-sysusers.conf", users / "luod.conf")
        (users / "clients.conf").write_text("".join(f"u {name} {user.uid}\nm {name} luod\n" for name, user in _CLIENTS.items()))
        subprocess.run(["systemd-sysusers", f"--root={self.folder}"], check=True, capture_output=True)

    def user(self, name: str) -> User:
        """`alice` and `bob`, who may connect to serialize and deserialize, `luod`, or another user of the machine."""

        def rows(file: str) -> list[list[str]]:
            return [line.split(":") for line in (self.folder / "etc" / file).read_text().splitlines()]

        (uid, gid), *_ = [(int(row[2]), int(row[3])) for row in rows("passwd") if row[0] == name]
        groups = tuple(int(row[2]) for row in rows("group") if name in row[3].split(","))
        return User(uid=uid, gid=gid, groups=groups)

    def _write_units(self) -> None:
        units = self.folder / "units"
        for name in _STUBS:
            (units / f"{name}.target").write_text(f"[Unit]\nDescription=stub {name}\nDefaultDependencies=no\n")
        if not self._install:
            return
        for name in UNITS:
            shutil.copy(SHIPPED / name, units)
        commands = "".join(f"{key}=\n{key}={self._command(key)}\n" for key in self._commands)
        self.drop_in("luod.service", f"[Service]\n{commands}", "10-program")
        self.drop_in("luod.service", "[Service]\n" + "".join(_visible(_needed())), "11-visible")
        self.drop_in("luod.service", self._output("luod.service"), "12-output")
        for name, text in self._settings.items():
            self.drop_in(name, text, "90-test")

    def _command(self, key: str) -> str:
        own = self._commands[key]
        if own is not None:
            return shlex.join(own)
        (shipped,) = [line for line in (SHIPPED / "luod.service").read_text().splitlines() if line.startswith(f"{key}=/usr/bin/")]
        return f"{sysconfig.get_path('scripts')}/{shipped.removeprefix(f'{key}=/usr/bin/')}"

    def _output(self, name: str) -> str:
        file = self.folder / "log" / name
        return f"[Service]\nStandardOutput=append:{file}\nStandardError=append:{file}\n"

    def drop_in(self, unit: str, text: str, name: str = "95-test") -> None:
        """Write a drop-in of `unit`. `ctl("daemon-reload")` is for the caller, once it runs."""
        folder = self.folder / "units" / f"{unit}.d"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.conf").write_text(text)

    def add_service(self, name: str, text: str) -> None:
        """Write one more unit, whose output goes to a file as luod's does. `ctl("daemon-reload")` is for the caller, once it runs."""
        (self.folder / "units" / name).write_text(text)
        self.drop_in(name, self._output(name), "12-output")

    # ---- start and end

    def _boot(self) -> None:
        systemd = _systemd()
        assert systemd is not None, why_not()
        inner = self.folder / "boot"
        inner.write_text(self._boot_script(systemd))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, (self.folder / "log" / "systemd").open("wb") as log:
            ready.bind(str(self.folder / "ready"))
            unshare = ["unshare", *_NAMESPACES, "--propagation", "private", "--fork", "--kill-child", "sh", str(inner)]
            shell = ["sh", "-c", _OUTER, "luod-rig", str(self.folder), f"luod-test-{self.folder.name}"]
            outer = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "--", "unshare", "--mount", "--propagation", "private", *shell, *unshare],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"PATH": _PATH},
            )
            self._ending.callback(self._end, outer)
            with OwnedFd(os.pidfd_open(outer.pid)) as ended:
                until(lambda: self._is_ready(ready, ended), lambda: f"systemd doesn't get ready: {self.log}")
        self.pid = self._init_pid()
        self.inside = ("nsenter", "--target", str(self.pid), *_NAMESPACES, "--", "setpriv", "--pdeathsig", "KILL", "--")
        self.root = Path(f"/proc/{self.pid}/root")
        self.runtime_dir = f"{self.root}/run/luod"

    def _is_ready(self, ready: socket.socket, ended: OwnedFd) -> bool:
        if readable(ended.fileno(), 0):
            raise _NoSystemd(self.log.strip() or "it ended at once")
        # container interface of systemd: PID 1 says READY=1 when the boot is complete, sd_notify(3).
        return readable(ready.fileno(), 0.05) and b"READY=1" in ready.recv(65536).splitlines()

    def _init_pid(self) -> int:
        return int((self.folder / "init").read_text())

    def _boot_script(self, systemd: str) -> str:
        here = shlex.quote(str(self.folder))
        environment = {
            "container": "other",
            "PATH": _PATH,
            "NOTIFY_SOCKET": f"{self.folder}/ready",
            "SYSTEMD_UNIT_PATH": f"{self.folder}/units",
            "SYSTEMD_GENERATOR_PATH": f"{self.folder}/nothing",
            "SYSTEMD_ENVIRONMENT_GENERATOR_PATH": f"{self.folder}/nothing",
        }
        lines = [
            "set -e",
            f"read -r pid rest </proc/self/stat; echo $pid >{here}/init",  # the machine's /proc still, with its pids
            "mount -t proc proc /proc",
            # Its own network, as if it had been booted: PID 1 raises this, and could not below.
            "echo 512 >/proc/sys/net/unix/max_dgram_qlen",
            # PID 1 may not change the machine.
            "mount --bind /proc/sys /proc/sys",
            "mount -o remount,bind,ro /proc/sys",
            "mount -t cgroup2 none /sys/fs/cgroup",
            "mount -t tmpfs -o mode=755 tmpfs /run",
            "mkdir /run/lock /run/systemd /run/new",
        ]
        # PrivateTmp= makes folders in /tmp and /var/tmp. What the test needs of the machine's stays visible there.
        for place in ("/tmp", "/var/tmp"):
            lines.append("mount -t tmpfs -o mode=1777 tmpfs /run/new")
            for path in map(str, {*_needed(), self.folder}):
                if path.startswith(f"{place}/"):
                    old, new = shlex.quote(path), shlex.quote(f"/run/new{path.removeprefix(place)}")
                    lines += [f"mkdir -p {new}", f"mount --rbind {old} {new}"]
            lines.append(f"mount --move /run/new {place}")
        lines += [
            f"mount --bind {here} {here}",
            f"mount --bind {here}/etc /etc",
            "mount -o remount,bind,ro /",
            f"exec env -i {shlex.join(f'{key}={value}' for key, value in environment.items())} {systemd} --system --log-target=console "
            "--log-level=notice --show-status=0 --unit=default.target",
        ]
        return "\n".join(lines) + "\n"

    def _end(self, outer: subprocess.Popen[bytes]) -> None:
        """With PID 1 everything inside ends, and the mounts with it; the outer shell removes the cgroup, and ends."""
        try:
            # None: it never got so far, or is at its end.
            if (self.folder / "init").exists() and outer.poll() is None:
                os.kill(self._init_pid(), signal.SIGKILL)
            until(lambda: self._has_ended(outer), lambda: f"systemd doesn't end: {self.log}")
        except BaseException:
            outer.terminate()
            until(lambda: self._has_ended(outer), "the shell that ends systemd")
            raise
        assert outer.returncode == 0, f"the namespaces of systemd ended with {outer.returncode}: {self.log}"

    def _has_ended(self, outer: subprocess.Popen[bytes]) -> bool:
        _reap_inside()
        return outer.poll() is not None

    # ---- what a test does with it

    def run(self, *command: str, user: User | None = None) -> str:
        """Run a command inside, this checkout's luoctl and luod among those that are found; returns its stdout. It must end with 0."""
        popen = start(
            command,
            user,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PATH": f"{sysconfig.get_path('scripts')}:{_PATH}"},
            within=self.inside,
        )
        with popen:
            try:
                out, err = (text.decode("utf-8", "backslashreplace") for text in popen.communicate(timeout=LIMIT_S))
            except BaseException:
                popen.kill()
                raise
        assert popen.returncode == 0, f"{shlex.join(command)} ended with {popen.returncode}: {out}{err}{self.log}"
        return out

    def ctl(self, *arguments: str) -> str:
        """systemctl; it must succeed. Returns its stdout."""
        return self.run("systemctl", "--no-pager", "--no-ask-password", *arguments)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit, as `systemctl show` has them."""
        lines = self.ctl("show", unit, *(f"--property={name}" for name in properties)).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def until_shows(self, unit: str, **properties: str) -> None:
        """Wait until the properties of a unit have these values."""

        def say() -> str:
            return f"{unit} with {properties}: it is {self.show(unit, *properties)}\n{self.said(unit)}{self.log}"

        until(lambda: self.show(unit, *properties) == properties, say)

    def pids(self, unit: str) -> list[int]:
        """The processes of a unit, as this process knows them."""
        group = self.show(unit, "ControlGroup")["ControlGroup"]
        text = (self.root / "sys/fs/cgroup" / group.lstrip("/") / "cgroup.procs").read_text() if group else ""
        return [int(line) for line in text.split()]

    def main_pid(self, unit: str) -> int:
        """The main process of a unit, as this process knows it, to signal it."""
        inner = self.show(unit, "MainPID")["MainPID"]
        assert inner != "0", f"{unit} has no main process: {self.said(unit)}{self.log}"
        found = [pid for pid in self.pids(unit) if pid_inside(pid) == inner]
        assert found, f"the main process {inner} of {unit} isn't there: {self.said(unit)}{self.log}"
        return found[0]

    def kill(self, unit: str) -> None:
        """Kill the main process of a unit, and wait for its end: from here on nobody answers but the next one."""
        with OwnedFd(os.pidfd_open(self.main_pid(unit))) as pidfd:
            signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
            assert readable(pidfd.fileno()), f"the main process of {unit} doesn't end"

    def said(self, unit: str) -> str:
        """All that a service has written to stdout and stderr."""
        file = self.folder / "log" / unit
        return file.read_text("utf-8", "backslashreplace") if file.exists() else ""

    @property
    def log(self) -> str:
        """What systemd has logged."""
        return (self.folder / "log" / "systemd").read_text("utf-8", "backslashreplace")


def pid_inside(pid: int) -> str:
    """What a process is called in the innermost namespace that it is in."""
    # proc_pid_status(5): NSpid has the pids from ours to the innermost namespace's.
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[-1] for line in lines if line.startswith("NSpid:"))


def _reap_inside() -> None:
    """Reap what ended in a PID namespace below ours and has become our child (`adopt_orphans`): its PID 1 can't end before."""
    for pid in child_pids():
        if pid_inside(pid) != str(pid):
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _needed() -> list[Path]:
    """Where what a test runs lies: the checkout, the virtual environment, the Python that it was made with."""
    places = {Path(place) for place in (CHECKOUT, sys.prefix, sys.base_prefix)}
    return sorted(places | {place.resolve() for place in places})


def _visible(paths: Iterable[Path]) -> list[str]:
    """Settings by which `paths` can be read in the sandbox, whoever runs there. Of what a path lies in only the path itself shows."""
    closed = {"/home": "ProtectHome=tmpfs\n", "/root": "ProtectHome=tmpfs\n", "/run/user": "ProtectHome=tmpfs\n"}
    settings: list[str] = []
    for path in paths:
        if path == Path("/usr"):
            continue
        parents = list(reversed(path.parents))
        covered = next((closed[str(parent)] for parent in parents if str(parent) in closed), None)
        shut = next((parent for parent in parents if not parent.stat().st_mode & 0o001), None)
        if covered is None and shut is not None:
            covered = f"TemporaryFileSystem={shut}:ro\n"
        temporary = any(path.is_relative_to(place) for place in ("/tmp", "/var/tmp"))
        if covered is not None or temporary:
            settings += [covered or "", f"BindReadOnlyPaths={path}\n"]
    return list(dict.fromkeys(settings))
