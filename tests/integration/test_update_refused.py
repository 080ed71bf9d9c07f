"""The commands of an update of the kernel where there is none to be had: this machine has no /dev/liveupdate, or it is nobody's to try."""

from __future__ import annotations

import json
import os

import pytest

import luod_client
from harness import Daemon
from luod_client import kexec
from luod_client.cli import main
from luod_protocol.errors import Code, Refusal

pytestmark = pytest.mark.skipif(os.path.exists("/dev/liveupdate"), reason="this machine could really go to another kernel")


def luoctl(daemon: Daemon, *words: str) -> int:
    return main(["--runtime-dir", daemon.runtime_dir, *words])


def test_prepare_is_refused_with_what_the_kernel_needs(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert luoctl(daemon, "prepare") == 1
    assert "the kernel needs CONFIG_LIVEUPDATE" in capsys.readouterr().err
    assert luoctl(daemon, "cancel") == 1
    assert "no update of the kernel is prepared" in capsys.readouterr().err
    assert luoctl(daemon, "--json", "kexec", "status") == 0
    assert json.loads(capsys.readouterr().out)["state"] == "normal"


@pytest.mark.parametrize("option", ["--dry-run", "--now"])
def test_run_says_all_that_stands_in_the_way(daemon: Daemon, capsys: pytest.CaptureFixture[str], option: str) -> None:
    with luod_client.serialize("still open", runtime_dir=daemon.runtime_dir):
        assert luoctl(daemon, "kexec", "run", option) == 1
    said = capsys.readouterr()
    assert "still open" in said.out
    assert "CONFIG_LIVEUPDATE" in said.err
    assert "no kernel is loaded" in said.err


def test_freeze_needs_a_prepared_update(daemon: Daemon) -> None:
    with luod_client.control(runtime_dir=daemon.runtime_dir) as control:
        with pytest.raises(Refusal) as caught:
            control.freeze()
        assert caught.value.code is Code.OUT_OF_ORDER
        with pytest.raises(Refusal) as caught:
            control.prepare(deadline_s=-1)
        assert caught.value.code is Code.BAD_REQUEST


@pytest.mark.parametrize(
    ("next_line", "running", "missing"),
    [
        ("root=/dev/sda kho=on liveupdate=on", "kho=on liveupdate=on", []),
        ("root=/dev/sda", "kho=on liveupdate=1", ["kho=on", "liveupdate=on"]),
        ("kho=on liveupdate=on liveupdate=off", "kho=on liveupdate=on", ["liveupdate=on"]),
        ("", "", []),
        ("xkho=on", "kho=on", ["kho=on"]),
    ],
)
def test_a_command_line_that_switches_live_updates_off(next_line: str, running: str, missing: list[str]) -> None:
    assert kexec.missing_switches(next_line, running) == missing


def test_a_deadline_is_a_number_of_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("soon", "-1", "nan", "86401"):
        with pytest.raises(SystemExit) as caught:
            main(["prepare", f"--deadline={text}"])
        assert caught.value.code == 2
    assert "no number of seconds" in capsys.readouterr().err
