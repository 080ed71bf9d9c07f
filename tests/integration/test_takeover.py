"""`luod --takeover`: a successor that was started by somebody else."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from faulty import Faulty, run_module, scene
from harness import LIMIT_S, Daemon


def takeover(where: str, *options: str) -> subprocess.CompletedProcess[str]:
    return run_module("luod", "--runtime-dir", where, "--takeover", *options)


def test_takeover(daemon: Daemon) -> None:
    before = daemon.pid
    with scene(daemon.runtime_dir) as made:
        daemon.takeover()
        status = daemon.status()
        assert (status.generation, status.pid != before, status.sessions_preserved) == (2, True, 2)
        daemon.takeover()
        assert daemon.upgrade().generation == 4
        made.check_live()
        made.check_finalized("first", "second")


def test_takeover_of_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        done = takeover(str(folder))
        assert done.returncode == 1
        assert done.stderr == f"luod: no luod to take over in {folder}: No such file or directory; start one without --takeover\n"
    assert list(tmp_path.iterdir()) == []


def test_takeover_of_a_dead_luod(daemon: Daemon) -> None:
    daemon.kill(signal.SIGKILL)
    daemon.wait_gone()
    done = takeover(daemon.runtime_dir)
    assert done.returncode == 1
    assert done.stderr == f"luod: no luod to take over in {daemon.runtime_dir}: Connection refused; start one without --takeover\n"


def test_a_second_takeover_is_refused_at_once(daemon: Daemon, tmp_path: Path) -> None:
    where = daemon.runtime_dir
    held = Faulty(tmp_path, "before-send:verified=wait")
    first = subprocess.Popen([held.program, "--runtime-dir", where, "--takeover"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with first:
        held.wait_for("before-send:verified")
        done = takeover(where)
        assert done.returncode == 1
        assert done.stderr == "luod: an upgrade is under way: wait for its end\n"
        assert daemon.status().generation == 1
        held.go_on()
        assert first.stderr is not None
        assert b"generation 2) serves" in first.stderr.readline()
        assert daemon.status().generation == 2
        assert daemon.upgrade().generation == 3
        assert first.wait(LIMIT_S) == 0


@pytest.mark.parametrize(
    ("step", "action"),
    [
        ("before-send:meet", "kill"),
        ("after-receive:box", "mismatch"),
        ("after-receive:copied", "raise"),
        ("after-receive:frozen", "kill"),
        ("after-receive:frozen", "mismatch"),
    ],
)
def test_a_takeover_that_fails_costs_nothing(daemon: Daemon, tmp_path: Path, step: str, action: str) -> None:
    pid = daemon.pid
    faulty = Faulty(tmp_path, f"{step}={action}")
    with scene(daemon.runtime_dir) as made:
        command = [faulty.program, "--runtime-dir", daemon.runtime_dir, "--takeover"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert faulty.hits() == [step]
        assert done.returncode == (-signal.SIGKILL if action == "kill" else 1)
        assert action != "mismatch" or done.stderr.endswith("declined the handover: a mismatch that a test wants\n")
        daemon.wait_stderr("upgrade failed, generation 1 goes on serving")
        assert daemon.pid == pid
        made.check_live()
        daemon.takeover()
        made.check_finalized("first", "second")
