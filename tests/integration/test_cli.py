"""luoctl, as a process, with a real luod."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import luod_client
from harness import Daemon
from luod_client import OwnedFd
from luod_client.cli import main
from processes import ALICE, LIMIT_S, PYTHON, readable, start

LUOCTL = (*PYTHON, "-m", "luod_client.cli")


def run(*arguments: str, pass_fds: Sequence[int] = (), status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run luoctl to its end, which must be with `status`. Unless that is an error, nothing may be on stderr."""
    done = subprocess.run(
        [*LUOCTL, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, pass_fds=pass_fds, timeout=LIMIT_S
    )
    assert done.returncode == status, done.stderr
    assert bool(done.stderr) is bool(status)
    return done


def call(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Like `run`, in this process: a twentieth of the time."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        returned = main(arguments)
    assert returned == status, err.getvalue()
    assert bool(err.getvalue()) is bool(status)
    return subprocess.CompletedProcess(arguments, returned, out.getvalue(), err.getvalue())


class Ctl:
    """luoctl for one luod: as a process when it is to inherit fds or to become a command."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.options = ("--runtime-dir", daemon.runtime_dir)

    def __call__(self, *arguments: str, pass_fds: Sequence[int] = ()) -> str:
        """What it writes."""
        if pass_fds or "--" in arguments:
            return run(*self.options, *arguments, pass_fds=pass_fds).stdout
        return call(*self.options, *arguments).stdout

    def json(self, *arguments: str, pass_fds: Sequence[int] = ()) -> Any:
        """The document that it writes."""
        return json.loads(self("--json", *arguments, pass_fds=pass_fds))

    def refused(self, *arguments: str) -> str:
        """The reason that it gives on stderr; nothing may be on stdout."""
        done = call(*self.options, *arguments, status=1)
        assert done.stdout == ""
        assert done.stderr.startswith("luoctl: ")
        return done.stderr.removeprefix("luoctl: ").strip()

    @contextmanager
    def started(self, *arguments: str, stderr: int = subprocess.PIPE) -> Generator[subprocess.Popen[str]]:
        """A luoctl that runs while the test does something; the test waits for its end."""
        with subprocess.Popen(
            [*LUOCTL, *self.options, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def ctl(daemon: Daemon) -> Ctl:
    """luoctl for this test's luod."""
    return Ctl(daemon)


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """A file with a megabyte that says where each part belongs."""
    path = tmp_path / "content"
    path.write_bytes(b"".join(number.to_bytes(8) for number in range(1 << 17)))
    return path


def error_of(done: subprocess.CompletedProcess[str]) -> Any:
    """The document of a command that failed."""
    return json.loads(done.stdout)["error"]


# ----------------------------------------------------------------------------------------------- there and back again


def test_the_content_of_a_file_goes_there_and_back(ctl: Ctl, content: Path, tmp_path: Path) -> None:
    made = ctl.json(
        "preserve",
        "guest",
        f"ram=memfd:{content}",
        "--metadata",
        "for the next",
        "--entry-metadata",
        "ram=first",
        "--seal",
        "ram=write,grow",
    )
    assert (made["session"], made["state"]) == ("guest", "preserved")
    assert "daemon-upgrade" in made["survives"]
    (entry,) = made["entries"]
    assert (entry["name"], entry["kind"]) == ("ram", "memfd")

    shown = ctl.json("show", "guest")
    assert shown == ctl.json("show", "--id", made["session_id"])
    assert base64.b64decode(shown["metadata"]) == b"for the next"
    assert base64.b64decode(shown["entries"][0]["metadata"]) == b"first"

    got = ctl.json("retrieve", "guest", "--output-dir", str(tmp_path / "out"), "--finish")
    path = tmp_path / "out" / "ram"
    assert got["files"] == [{"name": "ram", "path": str(path), "size": content.stat().st_size}]
    assert path.read_bytes() == content.read_bytes()
    assert os.listdir(tmp_path / "out") == ["ram"]
    assert ctl.json("list") == {"sessions": []}


def test_inherited_and_opened_fds(ctl: Ctl) -> None:
    here, there = socket.socketpair()
    with here, there, OwnedFd(os.memfd_create("ram", os.MFD_CLOEXEC)) as memfd:
        opened = f"/proc/{os.getpid()}/fd/{memfd.fileno()}"
        made = ctl.json(
            "preserve", "guest", f"chat=fd:{there.fileno()}", f"ram=path:{opened}", "--needs", "chat=ram", pass_fds=[there.fileno()]
        )
        assert {entry["name"]: (entry["kind"], entry["needs"]) for entry in made["entries"]} == {
            "chat": ("socket", ["ram"]),
            "ram": ("memfd", []),
        }
        os.write(memfd.fileno(), b"written later")
        with luod_client.deserialize(runtime_dir=ctl.daemon.runtime_dir) as connection, connection.claim("guest") as claim:
            with claim.retrieve("ram")["ram"] as ram:
                assert os.pread(ram.fileno(), 100, 0) == b"written later"
            there.close()
            assert not readable(here.fileno(), 0)
            claim.finish()
            assert readable(here.fileno(), 0), "luod keeps the socket"


SHOW_FDS = """
import fcntl, json, os, sys
names = os.environ["LISTEN_FDNAMES"].split(":")
fds = range(3, 3 + int(os.environ["LISTEN_FDS"]))
json.dump({
    "names": names,
    "is for us": os.environ["LISTEN_PID"] == str(os.getpid()),
    "close-on-exec": [bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC) for fd in fds],
    "read": [os.read(fd, 8).decode() for fd in fds],
    "open": sorted(int(fd) for fd in os.listdir("/proc/self/fd")),
    "arguments": sys.argv[1:],
}, sys.stdout)
"""


def test_a_command_gets_the_fds_as_from_socket_activation(ctl: Ctl, tmp_path: Path) -> None:
    names = [f"part-{number}" for number in range(12)]
    for name in names:
        (tmp_path / name).write_text(name)
    ctl("preserve", "guest", *(f"{name}=memfd:{tmp_path / name}" for name in names))

    # The options of the command are its own, "--" as well.
    seen = ctl.json("retrieve", "guest", "part-7", "part-2", "--", sys.executable, "-c", SHOW_FDS, "--json", "--", "x")
    assert seen["names"] == ["part-7", "part-2"]
    assert seen["read"] == ["part-7", "part-2"]
    assert seen["is for us"]
    assert seen["close-on-exec"] == [False, False]
    assert seen["arguments"] == ["--json", "--", "x"]
    assert ctl.json("show", "guest")["info"]["state"] == "preserved"

    seen = ctl.json("retrieve", "guest", "--", sys.executable, "-c", SHOW_FDS)
    assert seen["names"] == names
    assert set(seen["open"]) - {0, 1, 2} <= set(range(3, 3 + len(names) + 1)), "the command got more than its fds and the listing's own"
    ctl("discard", "guest")


def test_with_finish_luod_has_let_go_before_the_command_starts(ctl: Ctl, content: Path) -> None:
    ctl("preserve", "guest", f"ram=memfd:{content}")
    look = f"import luod_client; print(luod_client.deserialize(runtime_dir={ctl.daemon.runtime_dir!r}).list())"
    assert ctl("retrieve", "guest", "--finish", "--", sys.executable, "-c", look) == "()\n"


def test_the_command_has_the_usual_signals(ctl: Ctl, content: Path) -> None:
    ctl("preserve", "guest", f"ram=memfd:{content}")
    (line,) = ctl("retrieve", "guest", "--finish", "--", "grep", "SigIgn", "/proc/self/status").splitlines()
    ignored = int(line.split()[1], 16)
    assert not ignored & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1))


def test_a_command_that_is_not_there_loses_nothing(ctl: Ctl, content: Path) -> None:
    ctl("preserve", "guest", f"ram=memfd:{content}")
    assert "no such command" in ctl.refused("retrieve", "guest", "--finish", "--", "no-such-command-anywhere")
    ctl("discard", "guest")


def test_what_can_not_be_a_file_is_refused_and_nothing_is_written(ctl: Ctl, content: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with OwnedFd(os.eventfd(0)) as event:
        ctl(
            "preserve",
            "guest",
            f"ram=memfd:{content}",
            f"../up=memfd:{content}",
            f"event=fd:{event.fileno()}",
            pass_fds=[event.fileno()],
        )
    assert "'../up' can't be the name of a file" in ctl.refused("retrieve", "guest", "ram", "../up", "--output-dir", str(out))
    assert "'event' is a eventfd" in ctl.refused("retrieve", "guest", "ram", "event", "--output-dir", str(out))
    assert "no entry 'rom'" in ctl.refused("retrieve", "guest", "rom", "--output-dir", str(out))
    assert not out.exists()
    out.mkdir()
    (out / "ram").write_text("mine")
    assert "--overwrite" in ctl.refused("retrieve", "guest", "ram", "--output-dir", str(out))
    assert (out / "ram").read_text() == "mine"
    ctl("retrieve", "guest", "ram", "--output-dir", str(out), "--overwrite", "--finish")
    assert (out / "ram").read_bytes() == content.read_bytes()


# -------------------------------------------------------------------------------------------------------------- hold


@pytest.mark.parametrize("how", ["end of input", "Ctrl-C"])
def test_hold_keeps_the_session_open_until_it_is_told(ctl: Ctl, content: Path, how: str) -> None:
    with ctl.started("--json", "preserve", "guest", f"ram=memfd:{content}", "--hold") as process, watching(ctl) as events:
        assert process.stdout is not None
        assert process.stdin is not None
        made = json.loads(read_document(process))
        assert made["state"] == "open"
        assert ctl.json("show", "guest")["info"]["state"] == "open"
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, out, err) == (0, "", "")
        assert "rolled-back" in [next(events).event, next(events).event]


def test_hold_ends_when_luod_does(ctl: Ctl, content: Path) -> None:
    with ctl.started("--json", "preserve", "guest", f"ram=memfd:{content}", "--hold") as process:
        read_document(process)
        ctl.daemon.kill()
        ctl.daemon.wait_gone()
        assert process.wait(LIMIT_S) == 1
        assert process.stderr is not None
        assert "luod ended the connection" in process.stderr.read()


def read_document(process: subprocess.Popen[str]) -> str:
    """The first JSON document from a process that goes on."""
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or lines[-1] != "}\n":
        line = process.stdout.readline()
        assert line, "it ended"
        lines.append(line)
    return "".join(lines)


@contextmanager
def watching(ctl: Ctl) -> Generator[Any]:
    """What happens from here on."""
    with luod_client.control(runtime_dir=ctl.daemon.runtime_dir) as control:
        yield control.monitor()


# ------------------------------------------------------------------------------------------------------------ looking


def test_tables_for_people(ctl: Ctl, content: Path) -> None:
    assert ctl("list") == "no sessions\n"
    told = ctl("preserve", "guest", f"ram=memfd:{content}", "--metadata", "hello")
    assert "daemon-upgrade" in told
    assert ctl("list").splitlines()[0].split()[:4] == ["SESSION", "OWNER", "STATE", "ENTRIES"]
    assert ctl("list").splitlines()[1].split()[:4] == ["guest", str(os.geteuid()), "preserved", "1"]
    shown = ctl("show", "guest")
    assert "size 1 MiB" in shown
    assert "hello" in shown
    assert "1 preserved" in ctl("status")
    told = ctl("capabilities")
    assert "memfd-v1" in told
    assert "has taken over" in ctl("upgrade")
    assert "finished guest" in ctl("finish", "guest")


def test_one_document_a_command(ctl: Ctl, content: Path) -> None:
    made = ctl.json("preserve", "guest", f"ram=memfd:{content}")
    (session,) = ctl.json("list")["sessions"]
    assert session["session_id"] == made["session_id"]
    assert ctl.json("status")["pid"] == ctl.daemon.pid
    assert ctl.json("capabilities")["kinds"]["memfd"] == "memfd-v1"
    assert ctl.json("upgrade")["generation"] == 2
    assert ctl.json("discard", "guest") == {"session_id": made["session_id"], "discarded": True}


def test_options_are_taken_before_and_after_the_command(daemon: Daemon) -> None:
    assert json.loads(call("list", "--json", "--runtime-dir", daemon.runtime_dir).stdout) == {"sessions": []}


def test_finish_by_id_again_does_no_harm(ctl: Ctl, content: Path) -> None:
    session_id = ctl.json("preserve", "guest", f"ram=memfd:{content}")["session_id"]
    finished = {"session_id": session_id, "finished": True}
    assert ctl.json("finish", "--id", session_id) == finished
    assert ctl.json("finish", "--id", session_id) == finished
    assert "no session" in ctl.refused("finish", "guest")


def test_monitor_writes_a_document_a_line_until_interrupted(ctl: Ctl) -> None:
    with ctl.started("--json", "monitor") as process:
        assert process.stdout is not None
        # Whether it listens yet can't be seen from outside: sessions come and go until it says so.
        while not readable(process.stdout.fileno(), 0.02):
            luod_client.serialize("guest", runtime_dir=ctl.daemon.runtime_dir).close()
        event = json.loads(process.stdout.readline())
        assert (event["session"], event["owner"]) == ("guest", os.geteuid())
        assert len(event["session_id"]) == 32
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, err) == (0, "")


def test_monitor_ends_with_luod(ctl: Ctl) -> None:
    with ctl.started("monitor") as process:
        assert process.stdout is not None
        while not readable(process.stdout.fileno(), 0.02):
            luod_client.serialize("guest", runtime_dir=ctl.daemon.runtime_dir).close()
        assert "guest" in process.stdout.readline()
        ctl.daemon.kill()
        ctl.daemon.wait_gone()
        _, err = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, err) == (0, "")


def writing_to(ctl: Ctl, stdout: int) -> tuple[int, str]:
    """The exit status and stderr of a luoctl that keeps what it writes back, as Python does, until it ends."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [*LUOCTL, *ctl.options, "capabilities"], stdout=stdout, stderr=subprocess.PIPE, env=environment, text=True, timeout=LIMIT_S
    )
    return done.returncode, done.stderr


def test_a_reader_that_leaves_ends_it_quietly(ctl: Ctl) -> None:
    read_end, write_end = map(OwnedFd, os.pipe2(os.O_CLOEXEC))
    read_end.close()
    with write_end:
        assert writing_to(ctl, write_end.fileno()) == (0, "")


def test_what_can_not_be_written_is_an_error(ctl: Ctl) -> None:
    with OwnedFd(os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)) as full:
        assert writing_to(ctl, full.fileno()) == (1, "luoctl: standard output: No space left on device\n")


# ----------------------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_copy_shows_progress_on_a_terminal_and_nothing_when_piped(ctl: Ctl, content: Path, terminal: bool) -> None:
    if not terminal:
        run(*ctl.options, "preserve", "guest", f"ram=memfd:{content}")  # nothing on stderr, `run` sees to that
    else:
        master, slave = map(OwnedFd, pty.openpty())
        termios.tcsetwinsize(slave.fileno(), (24, 80))  # tqdm shows nothing on a terminal without columns
        with master, slave, ctl.started("preserve", "guest", f"ram=memfd:{content}", stderr=slave.fileno()) as process:
            process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0
            assert readable(master.fileno(), 0), "nothing was shown"
            shown = os.read(master.fileno(), 65536).decode()
        assert "ram:" in shown
        assert "1.00M" in shown
    ctl("discard", "guest")


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_refusal_has_its_reason_on_stderr_and_exit_status_1(ctl: Ctl, content: Path) -> None:
    assert "guest" in ctl.refused("show", "guest")
    assert "kexec" in ctl.refused("preserve", "guest", f"ram=memfd:{content}", "--require", "kexec")
    assert ctl.refused("show", "--id", "0" * 32)
    done = run(*ctl.options, "--json", "finish", "guest", status=1)  # a process: the exit status is its own
    assert error_of(done)["code"] == "no-such-session"
    assert done.stderr == f"luoctl: {error_of(done)['message']}\n"
    assert ctl.json("list") == {"sessions": []}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("memfd:/no/such/file", "/no/such/file: No such file or directory"),
        ("path:/no/such/file", "/no/such/file: No such file or directory"),
        ("memfd:/", "it is a directory"),
        ("path:/dev/null", "entry 'ram' refused"),
        ("fd:77", "luoctl has inherited no fd 77"),
        ("fd:99999999999999999999", "luoctl has inherited no fd"),
    ],
)
def test_a_source_that_is_none(ctl: Ctl, source: str, reason: str) -> None:
    assert reason in ctl.refused("preserve", "guest", f"ram={source}")


def test_what_luoctl_itself_has_open_is_not_inherited(ctl: Ctl, content: Path) -> None:
    # Whatever number luoctl's own files get, none of them can be meant.
    for number in range(3, 8):
        reason = ctl.refused("preserve", "guest", f"ram=memfd:{content}", f"other=fd:{number}")
        assert f"inherited no fd {number}" in reason


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("fly",),
        ("preserve", "guest"),
        ("preserve", "guest", "ram"),
        ("preserve", "guest", "ram=disk:0"),
        ("preserve", "guest", "ram=fd:one"),
        ("preserve", "guest", "ram=fd:0", "ram=fd:1"),
        ("show",),
        ("show", "guest", "--id", "0" * 32),
        ("show", "--id", "0"),
        ("retrieve", "guest"),
        ("retrieve", "guest", "--output-dir", "x", "--", "cat"),
        ("list", "--owner", "me"),
        ("list", "--colour"),
    ],
    ids=" ".join,
)
def test_wrong_usage_has_exit_status_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: luoctl")


def test_without_a_daemon_the_exit_status_is_3(tmp_path: Path) -> None:
    done = run("--runtime-dir", str(tmp_path), "list", status=3)
    assert done.stdout == ""
    assert "no luod serves" in done.stderr
    assert error_of(call("--runtime-dir", str(tmp_path), "--json", "status", status=3))["code"] == "no-daemon"


def test_without_a_place_to_look_the_exit_status_is_2() -> None:
    user = ALICE if os.geteuid() == 0 else None
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    process = start([*LUOCTL, "list"], user, stderr=subprocess.PIPE, env=environment)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2
    assert b"XDG_RUNTIME_DIR is not set; say --runtime-dir" in err


def test_root_acts_for_an_owner_and_others_may_not(ctl: Ctl, content: Path) -> None:
    if os.geteuid() == 0:
        ctl("--owner", "60001", "preserve", "guest", f"ram=memfd:{content}")
        assert ctl.json("list", "--owner", "60001")["sessions"][0]["owner"] == 60001
        assert ctl.json("list", "--owner", "60002") == {"sessions": []}
        ctl("discard", "guest", "--owner", "60001")
    else:
        assert "only root" in ctl.refused("list", "--owner", "0")


def test_a_seal_is_there(ctl: Ctl, content: Path) -> None:
    ctl("preserve", "guest", f"ram=memfd:{content}", "--seal", "ram=write")
    with (
        luod_client.deserialize(runtime_dir=ctl.daemon.runtime_dir) as connection,
        connection.claim("guest") as claim,
        claim.retrieve()["ram"] as fd,
    ):
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS) == fcntl.F_SEAL_WRITE
        claim.finish()


def test_the_matrix_fits_a_terminal_and_every_no_has_its_reason(ctl: Ctl) -> None:
    told = ctl("capabilities")
    assert max(map(len, told.splitlines())) < 80
    table, reasons, _ = told.split("\n\n")
    head = table.splitlines()
    assert [" ".join(pair).replace("- ", "-") for pair in zip(head[0].split()[2:-1], head[1].split()[1:], strict=True)] == [
        "DAEMON-UPGRADE",
        "DAEMON-CRASH",
        "SERVICE-RESTART",
        "SOFT-REBOOT",
    ]
    used = set(re.findall(r"(?:no|\?) (\d+)", table))
    assert used == set(re.findall(r"^ *(\d+)  ", reasons, flags=re.M))
    memfd = next(line for line in head if line.startswith("memfd "))
    assert memfd.split()[1] == "yes"
    rows = {row["sort"]: row for row in ctl.json("capabilities")["matrix"]}
    assert rows["memfd"]["survives"]["daemon-upgrade"] == ""
    assert rows["KVM vCPU"]["survives"]["kexec"].startswith("a KVM vCPU, which works in the process that made it only")
