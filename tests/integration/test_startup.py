"""How luod starts and ends: with nothing said, beside a dead one, beside a living one, and where it can't."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

import luod_client
from harness import ALICE, LIMIT_S, Daemon, Talk, User, folder_for, readable, spawn_client, start
from luod_protocol.version import RELEASE
from processes import PYTHON
from things import preserve_pipe

AS_ROOT = os.geteuid() == 0
SOMEBODY: User | None = ALICE if AS_ROOT else None
"""An ordinary user."""


@contextmanager
def started(*options: str, env: Mapping[str, str] | None = None, user: User | None = None) -> Generator[subprocess.Popen[bytes]]:
    """A luod with these options and nothing else said. It is killed at the end, when it still lives."""
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"} | dict(env or {})
    popen = start([*PYTHON, "-m", "luod", *options], user, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with popen:
        try:
            yield popen
        finally:
            popen.kill()


def run(*options: str, env: Mapping[str, str] | None = None, user: User | None = None) -> tuple[int, str, str]:
    """Run luod to its end: exit code, stdout, stderr."""
    with started(*options, env=env, user=user) as popen:
        out, err = popen.communicate(timeout=LIMIT_S)
        return popen.returncode, out.decode(), err.decode()


def refused(code: int, *options: str, user: User | None = None) -> str:
    """Run a luod that can't start, and ends with `code` and one line on stderr, which is returned."""
    got, out, err = run(*options, user=user)
    assert (got, out) == (code, ""), err
    assert err.startswith("luod: "), err
    assert len(err.splitlines()) == 1, err
    return err


def first_line(popen: subprocess.Popen[bytes]) -> str:
    """The first line that it writes to stderr."""
    assert popen.stderr is not None
    assert readable(popen.stderr.fileno())
    return popen.stderr.readline().decode()


# ---------------------------------------------------------------------------------------------------------------- alone


def _ask_who_serves(talk: Talk) -> None:
    import luod_client

    with luod_client.deserialize() as looker:
        talk.tell(looker.status().pid)


def test_with_no_configuration_and_no_options() -> None:
    with folder_for(SOMEBODY) as base, started(env={"XDG_RUNTIME_DIR": base}, user=SOMEBODY) as popen:
        assert first_line(popen) == f"luod {RELEASE} (pid {popen.pid}, generation 1) serves {base}/luod\n"
        folder = os.stat(f"{base}/luod")
        assert (stat.S_IMODE(folder.st_mode), folder.st_uid) == (0o755, SOMEBODY.uid if SOMEBODY else os.geteuid())
        with spawn_client(_ask_who_serves, user=SOMEBODY, env={"XDG_RUNTIME_DIR": base}) as client:
            assert client.hear() == popen.pid
        popen.terminate()
        assert popen.wait(LIMIT_S) == 0


def test_the_modes_of_the_sockets(daemon: Daemon) -> None:
    modes = {name: os.stat(f"{daemon.runtime_dir}/{name}").st_mode for name in os.listdir(daemon.runtime_dir)}
    assert {name: oct(stat.S_IMODE(mode)) for name, mode in modes.items()} == {
        "serialize": "0o660",
        "deserialize": "0o660",
        "control": "0o600",
        "lock": "0o644",
    }
    assert {name for name, mode in modes.items() if stat.S_ISSOCK(mode)} == {"serialize", "deserialize", "control"}


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_its_sockets(sig: signal.Signals) -> None:
    with folder_for() as folder, started("--runtime-dir", folder) as popen:
        first_line(popen)
        popen.send_signal(sig)
        assert popen.wait(LIMIT_S) == 0
        assert os.listdir(folder) == ["lock"]
        with pytest.raises(luod_client.NoDaemon):
            luod_client.control(runtime_dir=folder)


def test_it_says_what_ends_with_it() -> None:
    with folder_for() as folder, Daemon(folder) as daemon:
        read, _ = preserve_pipe(folder)
        with read:
            daemon.kill(signal.SIGTERM)
            assert daemon.wait_gone() == 0
        assert "ending with 1 preserved sessions, which end with this luod: 'guest'" in daemon.stderr


def test_help_and_version() -> None:
    code, out, err = run("--version")
    assert (code, out, err) == (0, f"luod {RELEASE}\n", "")
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert all(option in out for option in ("--runtime-dir", "--config", "--takeover", "--version"))


def test_an_unknown_option() -> None:
    code, _, err = run("--frobnicate")
    assert code == 2
    assert "--frobnicate" in err


# ------------------------------------------------------------------------------------------------------------- another one


def test_a_dead_one_is_replaced() -> None:
    with folder_for() as folder:
        with Daemon(folder) as dead:
            dead.kill()
            assert dead.wait_gone() == -signal.SIGKILL
        with pytest.raises(luod_client.NoDaemon):
            luod_client.control(runtime_dir=folder)
        assert set(os.listdir(folder)) == {"serialize", "deserialize", "control", "lock"}
        with Daemon(folder) as alive:
            assert alive.status().generation == 1
            read, _ = preserve_pipe(folder)
            with read, luod_client.deserialize(runtime_dir=folder) as looker:
                looker.discard("guest")


def test_a_living_one_is_left_alone(daemon: Daemon) -> None:
    before = {name: os.stat(f"{daemon.runtime_dir}/{name}").st_ino for name in os.listdir(daemon.runtime_dir)}
    err = refused(3, "--runtime-dir", daemon.runtime_dir)
    assert f"another luod (process {daemon.pid}) serves {daemon.runtime_dir}" in err
    assert "luoctl upgrade" in err
    assert {name: os.stat(f"{daemon.runtime_dir}/{name}").st_ino for name in os.listdir(daemon.runtime_dir)} == before
    assert daemon.status().generation == 1


def test_a_living_one_of_a_later_generation_is_left_alone(daemon: Daemon) -> None:
    daemon.upgrade()
    err = refused(3, "--runtime-dir", daemon.runtime_dir)
    assert f"process {daemon.pid}" in err


def test_takeover_of_nobody() -> None:
    with folder_for() as folder:
        err = refused(1, "--runtime-dir", folder, "--takeover")
        assert f"no luod to take over in {folder}" in err
        assert os.listdir(folder) == []


def test_a_foreign_socket_is_replaced_and_a_folder_is_not() -> None:
    with folder_for() as folder:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as foreign:
            foreign.bind(f"{folder}/serialize")
        with Daemon(folder):
            pass
        os.mkdir(f"{folder}/deserialize")
        err = refused(1, "--runtime-dir", folder)
        assert f"{folder}/deserialize can't be bound" in err
        assert sorted(os.listdir(folder)) == ["deserialize", "lock"]


# -------------------------------------------------------------------------------------------------------- where it can't


def test_no_runtime_directory_to_be_found() -> None:
    err = refused(2, user=SOMEBODY)
    assert "XDG_RUNTIME_DIR is not set" in err
    assert "--runtime-dir" in err


def test_a_runtime_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    err = refused(1, "--runtime-dir", str(tmp_path / "file"))
    assert f"{tmp_path}/file is not a directory" in err


def test_a_runtime_directory_without_a_parent(tmp_path: Path) -> None:
    err = refused(1, "--runtime-dir", str(tmp_path / "none" / "luod"))
    assert f"{tmp_path}/none/luod can't be used: No such file" in err


def test_a_runtime_directory_with_a_name_too_long() -> None:
    with folder_for() as folder:
        long = f"{folder}/{'x' * 100}"
        err = refused(1, "--runtime-dir", long)
        assert f"{long}/serialize can't be bound: AF_UNIX path too long" in err


@pytest.mark.root
def test_a_runtime_directory_of_somebody_else() -> None:
    with folder_for(ALICE) as folder:
        err = refused(1, "--runtime-dir", folder)
        assert f"{folder} belongs to uid {ALICE.uid}, luod runs as uid 0" in err
        assert os.listdir(folder) == []


# ------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[limits]\nmax_session = 7\n", "max_session"),
        (b"[limits]\nmax_sessions = '7'\n", "limits.max_sessions"),
        (b"[limits]\nmax_sessions = true\n", "limits.max_sessions"),
        (b"[limits]\nmax_sessions = 0\n", "limits.max_sessions"),
        (b"[limits]\nmax_connections = -1\n", "limits.max_connections"),
        (b"[handover]\ncopy_s = 'long'\n", "handover.copy_s"),
        (b"[handover]\ncopy_s = nan\n", "handover.copy_s"),
        (b"limits = 7\n", "limits"),
        (b"[limit]\n", "limit"),
        (b"max_sessions 7\n", "line 1"),
        (b"\xff\xfe\x00", "utf-8"),
    ],
    ids=["key", "text", "bool", "zero", "negative", "text-for-float", "nan", "no-table", "table", "no-toml", "no-text"],
)
def test_bad_configuration(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "luod.toml"
    file.write_bytes(content)
    with folder_for() as folder:
        err = refused(2, "--runtime-dir", folder, "--config", str(file))
        assert f"luod: {file}: " in err
        assert says in err.removeprefix(f"luod: {file}: ")
        assert os.listdir(folder) == []


def test_no_such_configuration(tmp_path: Path) -> None:
    err = refused(2, "--runtime-dir", str(tmp_path / "luod"), "--config", str(tmp_path / "none.toml"))
    assert f"{tmp_path}/none.toml" in err
    assert "No such file" in err


def test_a_whole_configuration(tmp_path: Path) -> None:
    file = tmp_path / "luod.toml"
    file.write_text(
        "[limits]\nmax_sessions = 7\nmax_connections = 20\nmax_preserved_fds = 30\n[handover]\nmeet_s = 9\ncopy_s = 9.5\nfreeze_s = 1\n"
    )
    with Daemon(options=("--config", str(file))) as daemon:
        daemon.upgrade()
        assert daemon.status().generation == 2


def test_one_whose_stderr_nobody_reads_goes_on(tmp_path: Path) -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    where = str(tmp_path / "run")
    with subprocess.Popen([*PYTHON, "-m", "luod", "--runtime-dir", where], stdin=subprocess.DEVNULL, stderr=writer) as luod:
        os.close(writer)
        assert b"serves" in os.read(reader, 4096)
        os.close(reader)
        with luod_client.control(runtime_dir=where) as control:
            assert control.upgrade().generation == 2
            pid = control.status().pid
            assert luod.wait(LIMIT_S) == 0
            assert control.upgrade().generation == 3
            third = control.status().pid
        # The tests adopt orphans: both successors are ours to reap.
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        os.kill(third, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(third, 0)[1]) == 0
