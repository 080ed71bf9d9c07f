"""`luod --supervised`: the real daemon under its supervisor."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

import luod_client
from faulty import Faulty, ask_upgrade
from harness import LIMIT_S, User, folder_for, start, until
from processes import PYTHON
from supervising import ends


@contextmanager
def supervised(folder: str, *options: str, user: User | None = None) -> Generator[tuple[subprocess.Popen[bytes], Path]]:
    """A supervised luod in `folder`, of `user`'s, and where its stderr goes. It is ended at the end."""
    said = Path(folder) / "stderr"
    with open(said, "wb") as stderr:
        popen = start([*PYTHON, "-m", "luod", "--supervised", "--runtime-dir", folder, *options], user, stderr=stderr.fileno())
    try:
        yield popen, said
        popen.terminate()
        assert popen.wait(LIMIT_S) == 0, said.read_text(encoding="utf-8")
    finally:
        popen.kill()
        popen.wait()


def serving(said: Path, times: int) -> int:
    """Wait until a luod has said for the so manieth time that it serves. Its pid."""
    pids = until(
        lambda: re.findall(r"\(pid (\d+), generation", text)[times - 1 :] if (text := said.read_text(encoding="utf-8")) else [], str(said)
    )
    return int(pids[0])


def status(folder: str) -> tuple[int, int]:
    """The pid and the generation of who serves."""
    with luod_client.control(runtime_dir=folder) as control:
        answer = control.status()
        return answer.pid, answer.generation


def test_it_serves_and_comes_back() -> None:
    with folder_for() as folder, supervised(folder) as (popen, said):
        first = serving(said, 1)
        assert status(folder) == (first, 1)
        assert first != popen.pid
        os.kill(first, signal.SIGKILL)
        second = serving(said, 2)
        assert status(folder)[0] == second != first
        popen.terminate()
        assert popen.wait(LIMIT_S) == 0
        assert ends(second)
        assert sorted(os.listdir(folder)) == ["lock", "stderr"]


def test_generations_go_on_when_a_successor_dies_as_soon_as_it_serves(tmp_path: Path) -> None:
    """It had no ledger yet: its predecessor's tells that it was there."""
    with folder_for() as folder, supervised(folder) as (_, said):
        first = serving(said, 1)
        faulty = Faulty(tmp_path, "after-send:serving=kill")
        with pytest.raises(luod_client.LuodError):
            ask_upgrade(folder, faulty.program)
        assert faulty.hits() == ["after-send:serving"]
        second = serving(said, 2)
        assert second != first
        assert status(folder) == (second, 3)


def test_where_another_one_serves_it_ends_like_luod() -> None:
    with folder_for() as folder, supervised(folder) as (_, said):
        serving(said, 1)
        second = subprocess.run(
            [*PYTHON, "-m", "luod", "--supervised", "--runtime-dir", folder], capture_output=True, text=True, check=False
        )
        assert second.returncode == 3
        assert "another luod" in second.stderr


def test_wrong_options_are_refused_before_anything_is_started() -> None:
    for options in (
        ["--watchdog", "5"],
        ["--supervised", "--watchdog", "-1"],
        ["--supervised", "--watchdog", "1e9"],
        ["--supervised", "--watchdog", "nan"],
        ["--supervised", "--config", "/nowhere.toml"],
        ["--supervised", "--odd"],
    ):
        done = subprocess.run([*PYTHON, "-m", "luod", *options], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, ""), options
        assert "supervisor:" not in done.stderr


def test_the_watchdog_and_the_options_are_passed_on() -> None:
    with folder_for() as folder, supervised(folder, "--watchdog", "7") as (popen, said):
        pid = serving(said, 1)
        env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert b"WATCHDOG_USEC=7000000" in env
        assert f"NOTIFY_SOCKET=/proc/{popen.pid}/fd/".encode() in b"\n".join(env)
        assert b"msgpack" not in Path(f"/proc/{popen.pid}/maps").read_bytes()
        assert b"luod.supervisor" in Path(f"/proc/{popen.pid}/cmdline").read_bytes()
