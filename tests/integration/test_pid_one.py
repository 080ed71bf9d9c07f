"""luod as process 1 of a container: it serves, and can't hand over; under its own supervisor it can."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Generator
from contextlib import contextmanager

import pytest

import luod_client
from luod_client import Code, Refusal
from processes import LIMIT_S, PLAIN_PYTHON, folder_for, start, until
from things import find, preserve_pipe

pytestmark = pytest.mark.root


@contextmanager
def contained(folder: str, *options: str) -> Generator[subprocess.Popen[bytes]]:
    """`luod` as process 1 of a pid namespace of its own; yields the process outside that waits for it."""
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--", *PLAIN_PYTHON, "-m", "luod"]
    popen = start([*command, "--runtime-dir", folder, *options], stderr=subprocess.DEVNULL)
    try:
        until(lambda: os.path.exists(f"{folder}/control"), "luod")
        yield popen
    finally:
        popen.kill()
        popen.wait(LIMIT_S)


def inside(popen: subprocess.Popen[bytes]) -> int:
    """Process 1, as it is called outside."""
    with open(f"/proc/{popen.pid}/task/{popen.pid}/children", encoding="ascii") as children:
        return int(children.read().split()[0])


def test_alone_it_serves_and_refuses_to_be_replaced() -> None:
    with folder_for() as folder, contained(folder) as popen:
        read, _ = preserve_pipe(folder)
        with luod_client.control(runtime_dir=folder) as control:
            assert control.status().pid == 1
            with pytest.raises(Refusal, match="run `luod --supervised` there") as refused:
                control.upgrade()
            assert refused.value.code is Code.UPGRADE_FAILED
        found = find(folder)
        assert found is not None
        assert found.state == "preserved"
        read.close()
        os.kill(inside(popen), signal.SIGTERM)
        assert popen.wait(LIMIT_S) == 0


def test_under_its_supervisor_it_is_replaced_and_survives() -> None:
    with folder_for() as folder, contained(folder, "--supervised") as popen:
        read, _ = preserve_pipe(folder)
        with luod_client.control(runtime_dir=folder) as control:
            upgraded = control.upgrade()
            assert upgraded.generation == 2
        with luod_client.control(runtime_dir=folder) as control:
            assert control.status().pid == upgraded.pid != 1
        found = find(folder)
        assert found is not None
        assert "daemon-crash" in found.survives
        read.close()
        os.kill(inside(popen), signal.SIGTERM)
        assert popen.wait(LIMIT_S) == 0
