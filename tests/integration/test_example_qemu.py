"""examples/qemu: as its user runs it; and that its guest and its table would show what was lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import guest
import pytest
from qemu import PROGRAM, Console, Qemu, QemuFault, identity
from run import Moved, memfd

from luod_protocol.fds import OwnedFd
from machine import need_program
from processes import Talk, readable, spawn_client, until

RUN = str(Path(__file__).parents[2] / "examples" / "qemu" / "run.py")
MIB = 1024 * 1024
LIMIT_S = 120.0
STATE_AT_MOST = 4 * MIB


def example(*arguments: str, path: str | None = None, folder: Path) -> tuple[int, str, str]:
    environment = {**os.environ, "TMPDIR": str(folder)} | ({} if path is None else {"PATH": path})
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", RUN, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=LIMIT_S,
        check=False,
    )
    assert os.listdir(folder) == []
    return done.returncode, done.stdout, done.stderr


# ---- as its user runs it


def expect_moved(seen: dict[str, Any]) -> None:
    """What must hold of a guest that was moved, from what was seen and not from what the example makes of it."""
    assert int(seen["first_after"]) == int(seen["last_before"]) + 1
    assert int(seen["last_after"]) > int(seen["first_after"])
    assert seen["wrong"] == ""
    assert seen["ram_file"] == seen["ram_file_after"]
    assert seen["old_mapped_bytes"] == seen["new_mapped_bytes"] == seen["ram_bytes"]
    assert seen["holders"] == []
    assert 0 < seen["state_bytes"] < STATE_AT_MOST
    assert seen["old_pid"] != seen["new_pid"]
    old_luod, new_luod = seen["luod_pids"]
    assert old_luod != new_luod
    assert seen["pause_ms"] >= seen["out_ms"] + seen["luod_ms"] + seen["in_ms"]


@pytest.mark.slow
def test_a_guest_changes_its_qemu_with_little_and_with_much_ram(tmp_path: Path) -> None:
    need_program(PROGRAM, "qemu-system-x86")
    status, out, err = example("--json", folder=tmp_path)
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert (told["ok"], told["faults"]) == (True, [])
    small, large = told["runs"]
    assert (small["ram_bytes"], large["ram_bytes"]) == (256 * MIB, 4096 * MIB)
    for seen in (small, large):
        expect_moved(seen)
        assert seen["in_use_bytes"] < 64 * MIB
    assert abs(large["state_bytes"] - small["state_bytes"]) < MIB


@pytest.mark.slow
def test_it_tells_a_person(tmp_path: Path) -> None:
    need_program(PROGRAM, "qemu-system-x86")
    status, out, err = example("--ram-mib", "64", folder=tmp_path)
    assert (status, err) == (0, "")
    assert out.startswith("A guest with 64 MiB of RAM, a memfd, boots in a QEMU")
    assert "\n64 MiB " in out
    assert out.endswith("\nEverything as it must be.\n")


@pytest.mark.slow
def test_without_qemu_it_says_what_to_install(tmp_path: Path) -> None:
    status, out, err = example(path="/nonexistent", folder=tmp_path)
    assert (status, out) == (1, "")
    assert err == ("run.py: qemu-system-x86_64 is not installed: on Debian: apt-get install --no-install-recommends qemu-system-x86\n")


@pytest.mark.slow
def test_a_qemu_that_does_not_start_fails_it(tmp_path: Path) -> None:
    folder, programs = tmp_path / "tmp", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    fake = programs / PROGRAM
    fake.write_text("#!/bin/sh\necho 'no such machine' >&2\nexit 1\n")
    fake.chmod(0o755)
    status, _, err = example(path=f"{programs}:{os.environ['PATH']}", folder=folder)
    assert status == 1
    assert "no such machine" in err
    assert "it has ended" in err


@pytest.mark.parametrize(
    "arguments", [("--ram-mib", "63"), ("--ram-mib", "x"), ("stop",), ("--kexec", "now"), ("--kexec", "after", "--json")]
)
def test_it_has_a_usage(arguments: tuple[str, ...], tmp_path: Path) -> None:
    status, out, err = example(*arguments, folder=tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith("usage: run.py")


# ---- what would be lost shows


@pytest.fixture
def ram() -> Generator[int]:
    with memfd("ram", 64 * MIB) as fd:
        yield fd.fileno()


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "kernel"
    path.write_bytes(guest.kernel(64 * MIB))
    return str(path)


def registers(qemu: Qemu) -> str:
    return str(qemu.tell("human-monitor-command", (), **{"command-line": "info registers"}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("offset", "wrong"),
    [
        (guest.MARK_EVERY, "the mark at 0x1000000 is 0xffffffff"),
        (0x200000, "4294967295 was counted, and "),
        (0x400000 + 4 * 3, "the journal has "),
    ],
    ids=["mark", "count", "journal"],
)
def test_what_changes_in_its_ram_shows(offset: int, wrong: str, ram: int, kernel: str) -> None:
    need_program(PROGRAM, "qemu-system-x86")
    ours, theirs = socket.socketpair()
    with ours, theirs, Qemu(kernel, ram=ram, console=theirs.fileno(), incoming=False) as qemu:
        assert qemu.maps(identity(ram)) == 64 * MIB
        console = Console(ours)
        console.await_lines(10)
        if wrong.startswith("the journal"):
            qemu.tell("stop")  # the guest doesn't read it: it is for whoever comes after
        os.pwrite(ram, b"\xff\xff\xff\xff", offset)
        if not wrong.startswith("the journal"):
            until(lambda: "HLT=1" in registers(qemu), "the guest should halt")
        qemu.quit()
        console.drain()
        assert console.wrong() == ""
        assert guest.wrong_in_ram(ram, len(console.said)).startswith(wrong)


@pytest.mark.slow
def test_a_qemu_on_other_ram_is_not_on_this_one(ram: int, kernel: str) -> None:
    need_program(PROGRAM, "qemu-system-x86")
    ours, theirs = socket.socketpair()
    with ours, theirs, memfd("other", 64 * MIB) as other, Qemu(kernel, ram=other.fileno(), console=theirs.fileno(), incoming=True) as qemu:
        assert qemu.maps(identity(ram)) == 0
        with pytest.raises(QemuFault, match="nonexistent"):
            qemu.tell("nonexistent")
        with OwnedFd(os.memfd_create("no state", os.MFD_CLOEXEC)) as state:
            os.write(state.fileno(), b"no state" * 100)
            os.lseek(state.fileno(), 0, os.SEEK_SET)
            qemu.tell("getfd", [state.fileno()], fdname="state")
            qemu.tell("migrate-incoming", uri="fd:state")
            with pytest.raises(QemuFault):
                qemu.migrated()


def launch(talk: Talk, folder: str, kernel: str) -> None:
    import socket
    import sys

    sys.path.insert(0, folder)
    from qemu import Qemu
    from run import memfd

    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        memfd("ram", 64 * 1024 * 1024) as ram,
        Qemu(kernel, ram=ram.fileno(), console=theirs.fileno(), incoming=False) as qemu,
    ):
        talk.tell(qemu.pid)
        talk.hear()


@pytest.mark.slow
def test_a_qemu_does_not_outlive_its_launcher(kernel: str) -> None:
    need_program(PROGRAM, "qemu-system-x86")
    with spawn_client(launch, str(Path(RUN).parent), kernel) as client:
        pid = client.hear()
        with OwnedFd(os.pidfd_open(pid)) as process:
            assert not readable(process.fileno(), 0)
            client.kill()
            assert readable(process.fileno())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def said(text: bytes) -> Console:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(text)
        console = Console(ours)
        console.drain()
        return console


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (b"1\n2\n3\n", ""),
        (b"1\n2\n3", ""),
        (b"1\n3\n4\n", "the guest said '3' where 2 was due"),
        (b"1\n2\n2\n", "the guest said '2' where 3 was due"),
        (b"1\n\xff\n", "the guest said '\N{REPLACEMENT CHARACTER}' where 2 was due"),
    ],
)
def test_a_count_that_is_lost_or_repeated_shows(text: bytes, wrong: str) -> None:
    assert said(text).wrong() == wrong


def test_a_serial_port_that_ends_in_the_middle_of_a_line_goes_on_with_another_one() -> None:
    first = said(b"1\n2\n3")
    assert (first.said, first.begun) == (["1", "2"], b"3")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"\n4\n")
        second = Console(ours, begun=first.begun)
        second.drain()
    assert (second.said, second.wrong(3)) == (["3", "4"], "")
    assert second.wrong(4) == "the guest said '3' where 4 was due"


GOOD: dict[str, Any] = {
    "ram_bytes": 100,
    "in_use_bytes": 10,
    "state_bytes": 10,
    "pause_ms": 1.0,
    "out_ms": 1.0,
    "luod_ms": 1.0,
    "in_ms": 1.0,
    "old_pid": 1,
    "new_pid": 2,
    "luod_pids": (3, 4),
    "ram_file": "00:01 1",
    "ram_file_after": "00:01 1",
    "old_mapped_bytes": 100,
    "new_mapped_bytes": 100,
    "holders": (),
    "last_before": "1",
    "first_after": "2",
    "last_after": "3",
    "wrong": "",
}


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ({}, None),
        ({"wrong": "the mark"}, "the mark"),
        ({"ram_file_after": "00:01 2"}, "the RAM was file 00:01 1 and is 00:01 2"),
        ({"new_mapped_bytes": 0}, "of 100 bytes of RAM the old QEMU had 100 mapped, the new one 0"),
        ({"holders": (5,)}, "the RAM was open in processes (5,) when only luod should have had it"),
        ({"state_bytes": STATE_AT_MOST + 1}, f"the state has {STATE_AT_MOST + 1} bytes: RAM was copied"),
    ],
)
def test_what_differs_is_said(what: dict[str, Any], fault: str | None) -> None:
    assert Moved(**(GOOD | what)).faults() == ([] if fault is None else [fault])
