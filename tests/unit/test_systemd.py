"""What systemd is asked, by luod and by luoctl, with a PID 1 that stands in; tests/lab/test_systemd.py asks a real one."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from luod import survival, unit
from luod.survival import Survives
from luod.unit import PidOne
from luod_client import systemd
from luod_protocol.errors import Code, Refusal

KEEPS = {"parameters": {"context": {"ID": "luod.service", "Service": {"FileDescriptorStorePreserve": "yes"}}}}
LETS_GO = {"parameters": {"context": {"ID": "luod.service", "Service": {"FileDescriptorStorePreserve": "restart"}}}}


@asynccontextmanager
async def pid_one(folder: Path, *answers: bytes) -> AsyncGenerator[tuple[str, list[bytes]]]:
    """A PID 1 that answers in these parts and hangs up, its address, and what it was asked."""
    address, asked = str(folder / "io.systemd.Manager"), list[bytes]()
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(address)
        listener.listen()

        async def answer() -> None:
            sock, _ = await listener.accept()
            with sock:
                asked.append(await sock.recv(4096))
                for part in answers:
                    await trio.SocketStream(sock).send_all(part)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            yield address, asked
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("told", "keeps"), [(KEEPS, True), (LETS_GO, False)])
async def test_luod_asks_whether_its_store_is_kept(tmp_path: Path, told: object, keeps: bool) -> None:
    data = json.dumps(told).encode()
    async with pid_one(tmp_path, data[:9], data[9:] + b"\0") as (address, asked):
        assert await unit.keeps_store("luod.service", address=address) is keeps
    assert json.loads(asked[0].rstrip(b"\0")) == {"method": "io.systemd.Unit.List", "parameters": {"name": "luod.service"}}


@pytest.mark.parametrize(
    "told",
    [
        b"",
        b'{"error":"io.systemd.Unit.NoSuchUnit","parameters":{}}\0',
        b"no json\0",
        b"[]\0",
        b'{"parameters":{"context":{"Service":null}}}\0',
    ],
)
async def test_what_an_older_or_odd_systemd_tells_is_no_promise(tmp_path: Path, told: bytes) -> None:
    async with pid_one(tmp_path, told) as (address, _):
        assert await unit.keeps_store("luod.service", address=address) is None
    assert await unit.keeps_store("luod.service", address=str(tmp_path / "nothing")) is None


@pytest.mark.parametrize(
    ("version", "state", "found"),
    [
        ("262.1-1", "stopping", PidOne(release=262, is_stopping=True)),
        ("261~rc1", "degraded", PidOne(release=261, is_stopping=False)),
        ("new", "running", PidOne(release=0, is_stopping=False)),
        (None, None, None),
    ],
)
async def test_luod_asks_which_systemd_it_is_and_whether_it_shuts_down(
    tmp_path: Path, version: str | None, state: str | None, found: PidOne | None
) -> None:
    data = json.dumps({"parameters": {"runtime": {"Version": version, "SystemState": state}}}).encode()
    async with pid_one(tmp_path, data + b"\0") as (address, asked):
        assert await unit.pid_one(address=address) == found
    assert b"io.systemd.Manager.Describe" in asked[0]


def test_which_unit_it_is() -> None:
    assert unit.name("0::/system.slice/luod.service\n") == "luod.service"
    assert unit.name("1:name=systemd:/x\n0::/a.slice/luod@7.service\n") == "luod@7.service"
    assert [unit.name(text) for text in ("", "0::/\n", "0::/user.slice/session-1.scope\n")] == ["", "", ""]
    assert systemd.unit_of(os.getpid()) == unit.name(Path("/proc/self/cgroup").read_text())
    assert systemd.unit_of(0) == ""


def test_a_soft_reboot_is_survived_where_the_store_is_kept() -> None:
    reasons = [survival.kept(restarts=True, stops=stops).reasons[Survives.SOFT_REBOOT] for stops in (True, False, None)]
    assert reasons[0] == ""
    assert "FileDescriptorStorePreserve=yes" in reasons[1]
    assert "doesn't tell" in reasons[2]
    assert survival.kept(restarts=False, stops=True).reasons[Survives.SOFT_REBOOT] != "", "its manager ends with it"


@pytest.mark.parametrize(
    ("manager", "version", "kept", "says"),
    [
        ("systemd", "262.1-1", "yes", ""),
        ("systemd", "261~rc1", "yes", ""),
        ("systemd", "252.39-1~deb12u1", "yes", "systemd 252.39-1~deb12u1 runs here, and 261 is the first"),
        ("systemd", "", "", "of an unknown version"),
        ("luod --supervised", "262", "yes", "under luod --supervised"),
        ("", "262", "yes", "on its own"),
        ("systemd", "262", "restart", "FileDescriptorStorePreserve=yes"),
    ],
)
def test_luoctl_says_why_systemd_can_not_take_sessions_along(tmp_path: Path, manager: str, version: str, kept: str, says: str) -> None:
    def ask(words: Sequence[str]) -> str:
        assert words[0] == "show"
        return kept if "luod.service" in words else version

    found = systemd.why_not(manager, "luod.service", runs=tmp_path, ask=ask)
    assert (found == "", says in found) == (not says, True)


def test_without_systemd_nobody_is_asked(tmp_path: Path) -> None:
    def ask(words: Sequence[str]) -> str:
        raise AssertionError(words)

    assert systemd.why_not("", "", runs=tmp_path / "nothing", ask=ask) == "the machine doesn't run systemd"


def put_systemctl(folder: Path, script: str) -> None:
    (folder / "systemctl").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "systemctl").chmod(0o755)


def test_systemctl_is_run_and_what_it_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    put_systemctl(tmp_path, f'echo "$@" >>{tmp_path}/said; echo 262')
    assert systemd.ask(["show", "x"]) == "262"
    systemd.kexec()
    assert (tmp_path / "said").read_text() == "show x\nkexec\n"
    put_systemctl(tmp_path, "echo no kernel >&2; exit 1")
    assert systemd.ask(["show", "x"]) == ""
    with pytest.raises(Refusal, match="systemctl kexec failed: no kernel") as caught:
        systemd.kexec()
    assert caught.value.code is Code.SYSTEM_ERROR


def test_without_systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert systemd.ask(["show"]) == ""
    with pytest.raises(Refusal, match="systemctl can't be run"):
        systemd.kexec()
