"""A luod that is told to stop (SIGTERM) in the middle of handing over: before the freeze it gives up, after it the successor decides."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import luod_client
from faulty import Faulty, meanwhile
from harness import Daemon, readable, until
from luod_protocol.fds import OwnedFd
from luod_protocol.messages import Upgraded
from things import let_go, preserve_pipe


def test_before_the_freeze_it_ends_and_so_does_the_successor(daemon: Daemon, tmp_path: Path) -> None:
    where = daemon.runtime_dir
    held = Faulty(tmp_path, "before-send:verified=wait")
    end, _ = preserve_pipe(where, "kept")
    with end, luod_client.control(runtime_dir=where) as control:
        with meanwhile(lambda: control.upgrade(program=held.program)) as upgrading:
            held.wait_for("before-send:verified")
            daemon.kill(signal.SIGTERM)
            assert daemon.wait_gone() == 0
            with pytest.raises((luod_client.Refusal, luod_client.Disconnected)):
                upgrading.result()
        assert let_go(end), "luod is gone and nobody has taken over, so nobody may hold a copy"
    assert not os.path.exists(f"{where}/serialize")


def test_after_the_freeze_the_successor_serves(daemon: Daemon, tmp_path: Path) -> None:
    where = daemon.runtime_dir
    held = Faulty(tmp_path, "before-send:serving=wait")
    end, _ = preserve_pipe(where, "kept")
    with end, luod_client.control(runtime_dir=where) as control:
        old = daemon.pid
        with meanwhile(lambda: control.upgrade(program=held.program)) as upgrading:
            held.wait_for("before-send:serving")
            with OwnedFd(os.pidfd_open(old)) as pidfd:
                os.kill(old, signal.SIGTERM)
                assert not readable(pidfd.fileno(), 0.5), "it has left before it was decided who serves"
            assert os.path.exists(f"{where}/serialize")
            held.go_on()
            answer = upgrading.result()
        assert isinstance(answer, Upgraded)
        assert (answer.generation, answer.predecessor_pid) == (2, old)
        until(lambda: daemon.status().generation == 2, "the successor to serve")
        assert not let_go(end, 0)
        with luod_client.deserialize(runtime_dir=where) as look:
            look.discard("kept")
        assert let_go(end)
