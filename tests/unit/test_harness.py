"""The harness itself: what a test leaves behind fails it, and a luod that isn't well at the end does too."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import luod_client
from harness import ALICE, BOB, Daemon, Talk, User, spawn_client
from processes import until

ROOT = Path(__file__).parents[2]

SAMPLES = """
import os, subprocess, sys, time, socket, warnings
import pytest
import leftovers
from luod_protocol.fds import OwnedFd

def test_clean():
    os.close(os.memfd_create("clean"))

async def test_clean_async():
    os.close(os.memfd_create("clean"))

def test_leaks_fd():
    os.memfd_create("leaked")

async def test_leaks_fd_async():
    os.memfd_create("leaked")

def test_replaces_fd():
    os.dup2(HELD, OTHER)

def test_leaks_process():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    child.returncode = 0  # keeps Popen quiet about it

def test_leaks_orphan():
    out, into = os.pipe()
    code = "import os, subprocess, sys; subprocess.Popen(['sleep', '600'], stdout=2)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    os.close(out), os.close(into)

def test_leaves_one_that_ends():
    subprocess.run(["sh", "-c", "sleep 0.05 &"], check=True)

def test_drops_owned_fd():
    OwnedFd(os.memfd_create("dropped"))

def test_drops_owned_fd_in_a_cycle():
    cycle = [OwnedFd(os.memfd_create("dropped"))]
    cycle.append(cycle)

def test_drops_socket():
    socket.socket()

def test_drops_socket_in_a_cycle():
    cycle = [socket.socket()]
    cycle.append(cycle)

def test_clean_at_the_end():
    pass

leftovers.GRACE_S = 0.3
HELD = os.memfd_create("held")
OTHER = os.memfd_create("other")
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What pytest complains about in each sample, with this project's conftest and settings."""
    sample = tmp_path_factory.mktemp("samples") / "test_samples.py"
    sample.write_text(SAMPLES)
    report = sample.with_name("report.xml")
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "conftest", f"--junitxml={report}", sample.name]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    subprocess.run(command, env=env, cwd=sample.parent, stdout=subprocess.DEVNULL, check=False, timeout=50)
    said: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["name"]
        said[name] = said.get(name, "") + "".join(f"{part.get('message')}\n{part.text}" for part in case)
    return said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_clean", "test_clean_async", "test_leaves_one_that_ends", "test_clean_at_the_end"])
def test_a_clean_test_passes(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("test_leaks_fd", "memfd:leaked"),
        ("test_leaks_fd_async", "memfd:leaked"),
        ("test_replaces_fd", "memfd:held"),
        ("test_leaks_process", "process "),
        ("test_leaks_orphan", "sleep 600"),
        ("test_drops_owned_fd", "dropped without close"),
        ("test_drops_owned_fd_in_a_cycle", "dropped without close"),
        ("test_drops_socket", "unclosed <socket"),
        ("test_drops_socket_in_a_cycle", "unclosed <socket"),
    ],
)
def test_what_is_left_behind_is_found(outcomes: dict[str, str], name: str, why: str) -> None:
    assert why in outcomes[name]


def test_a_daemon_is_started_upgraded_and_ended(daemon: Daemon) -> None:
    first = daemon.pid
    upgraded = daemon.upgrade()
    assert upgraded.predecessor_pid == first
    assert daemon.pid == upgraded.pid
    assert daemon.status().generation == 2
    daemon.takeover()
    assert daemon.status().generation == 3
    # It says so after it has served who waited.
    until(lambda: len(re.findall("serves", daemon.stderr)) == 3, "all three have said that they serve")


def test_a_preserved_session_is_one_descriptor(daemon: Daemon) -> None:
    with luod_client.OwnedFd(os.memfd_create("kept")) as fd, luod_client.serialize("kept", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"a": fd.fileno(), "b": fd.fileno()})
        session.finalize()
    daemon.check_idle()
    assert daemon.status().sessions_preserved == 1


def test_a_daemon_that_holds_a_client_at_the_end_is_found(daemon: Daemon) -> None:
    left_open = luod_client.serialize("left open", runtime_dir=daemon.runtime_dir)
    with left_open, pytest.raises(AssertionError, match="sessions_open=1"):
        daemon.check_idle(limit_s=0.2)


def test_a_killed_daemon_is_awaited(daemon: Daemon) -> None:
    daemon.upgrade()
    daemon.kill()
    assert daemon.wait_gone() == -signal.SIGKILL


def test_a_daemon_that_dies_unexpectedly_is_found() -> None:
    with pytest.raises(AssertionError, match="isn't well"), Daemon() as daemon:
        daemon.kill()


def test_a_daemon_that_cannot_start_says_why() -> None:
    with pytest.raises(AssertionError, match="unrecognized arguments: --nonsense"), Daemon(options=["--nonsense"]):
        raise RuntimeError("it started")


def test_trouble_on_stderr_is_found(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("#!/bin/sh\necho Traceback of a successor >&2\nexit 1\n")
    bad.chmod(0o755)
    with pytest.raises(AssertionError, match="luod wrote 'Traceback'"), Daemon() as daemon, pytest.raises(luod_client.Refusal):
        daemon.upgrade(str(bad))
    with Daemon() as daemon:
        daemon.tolerate("Traceback of a successor")
        with pytest.raises(luod_client.Refusal):
            daemon.upgrade(str(bad))


def _hold(talk: Talk, runtime_dir: str, fd: int) -> None:
    import luod_client

    with luod_client.serialize("held", runtime_dir=runtime_dir) as session:
        session.preserve({"fd": fd})
        talk.tell(session.id)
        talk.hear()
        talk.tell(session.finalize().session_id)


def test_a_client_process_talks(daemon: Daemon) -> None:
    with (
        luod_client.OwnedFd(os.memfd_create("passed")) as fd,
        spawn_client(_hold, daemon.runtime_dir, fd.fileno(), pass_fds=[fd.fileno()]) as client,
    ):
        session_id = client.hear()
        client.tell("go on")
        assert client.hear() == session_id
        assert client.wait() == 0


def test_a_client_process_is_killed(daemon: Daemon) -> None:
    with (
        luod_client.OwnedFd(os.memfd_create("passed")) as fd,
        spawn_client(_hold, daemon.runtime_dir, fd.fileno(), pass_fds=[fd.fileno()]) as client,
    ):
        client.hear()
        client.kill()
        assert client.wait() == -signal.SIGKILL


def _fail(talk: Talk) -> None:
    raise RuntimeError("on purpose")


def test_a_client_process_that_fails_is_found(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="ended with 1"), spawn_client(_fail) as client:
        client.hear()
    assert "RuntimeError: on purpose" in capfd.readouterr().err


def _who(talk: Talk) -> None:
    import os

    talk.tell((os.getresuid(), os.getresgid(), sorted(os.getgroups())))


@pytest.mark.root
@pytest.mark.parametrize("user", [ALICE, BOB, User(uid=60_003, gid=60_004, groups=(60_005, 60_006))])
def test_a_client_process_of_somebody_else(user: User) -> None:
    with spawn_client(_who, user=user) as client:
        assert client.hear() == ((user.uid,) * 3, (user.gid,) * 3, list(user.groups))


@pytest.mark.root
def test_a_daemon_of_somebody_else() -> None:
    with Daemon(user=ALICE) as daemon:
        assert os.stat(f"/proc/{daemon.pid}").st_uid == ALICE.uid
        daemon.upgrade()
        assert os.stat(f"/proc/{daemon.pid}").st_uid == ALICE.uid
