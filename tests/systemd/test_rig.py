"""The rig: what it starts is whole and apart from the machine, and nothing of it stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import systemd_rig
from leftovers import child_pids
from machine import unable
from processes import ALICE, Talk, spawn_client, until
from systemd_rig import SHIPPED, UNITS, Manager, why_not
from systemd_standin import SERVICE, service, standin, stored

ALONE = pytest.mark.usefixtures("require_systemd")


def traces(manager: Manager) -> list[Path]:
    """What lies outside of the namespaces."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    trees = [Path(line.split()[4]) for line in lines if " - cgroup2 " in line]
    return [each for each in [manager.folder, *(tree / f"luod-test-{manager.folder.name}" for tree in trees)] if each.exists()]


def fail(manager: Manager, pids: list[int]) -> None:
    manager.ctl("start", SERVICE)
    manager.run("sh", "-c", "sleep 1000 >/dev/null 2>&1 &")  # one more process, which has no parent any more
    assert len(traces(manager)) >= 1
    pids += [*manager.pids(SERVICE), manager.pid]
    raise ZeroDivisionError


@ALONE
def test_nothing_is_left_by_a_test_that_fails() -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    pids: list[int] = []
    with standin() as manager, pytest.raises(ZeroDivisionError):
        fail(manager, pids)
    assert len(pids) == 2
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []
    assert traces(manager) == []
    assert Path("/proc/self/mountinfo").read_text() == mounts


@ALONE
def test_the_shipped_units_are_unmodified(systemd_luod: Manager) -> None:
    for unit in UNITS:
        assert systemd_luod.run("cat", f"{systemd_luod.folder}/units/{unit}") == (SHIPPED / unit).read_text()
        assert systemd_luod.show(unit, "LoadState", "ActiveState") == {"LoadState": "loaded", "ActiveState": "inactive"}
    assert systemd_luod.run("cat", "/etc/luod/luod.toml") == (SHIPPED / "luod.toml").read_text()
    assert systemd_luod.log == ""


@ALONE
def test_several_at_once() -> None:
    with standin() as first, standin() as second:
        for manager in (first, second):
            manager.ctl("start", SERVICE)
        service(first, "store", "box", b"")
        assert (stored(first), stored(second)) == (1, 0)


@ALONE
def test_the_machine_is_read_only(systemd_luod: Manager) -> None:
    here = Path(__file__)
    with pytest.raises(AssertionError, match="Read-only file system"):
        systemd_luod.run("touch", "/luod-was-here")
    with pytest.raises(AssertionError, match="Read-only file system"):
        systemd_luod.run("sh", "-c", "echo 1 >/proc/sys/vm/overcommit_memory")
    assert systemd_luod.run("cat", str(here)) == here.read_text()


@ALONE
def test_users(systemd_luod: Manager) -> None:
    luod, alice = systemd_luod.user("luod"), systemd_luod.user("alice")
    assert systemd_luod.run("id", "luod") == f"uid={luod.uid}(luod) gid={luod.gid}(luod) groups={luod.gid}(luod)\n"
    assert (
        systemd_luod.run("id", user=alice) == f"uid={ALICE.uid}(alice) gid={ALICE.gid}(alice) groups={ALICE.gid}(alice),{luod.gid}(luod)\n"
    )


def wait_for_ever(talk: Talk) -> None:
    import os

    talk.tell(os.getpid())
    talk.hear()


@ALONE
def test_a_client_that_is_killed_ends_inside(systemd_luod: Manager) -> None:
    with spawn_client(wait_for_ever, user=systemd_luod.user("alice"), within=systemd_luod.inside) as client:
        inside = Path(f"{systemd_luod.root}/proc/{client.hear()}/status")
        assert "Uid:\t60001" in inside.read_text()
        client.kill()
        until(lambda: "State:\tZ" in inside.read_text(), "it ends")
    assert child_pids(), "it has come to this process, which has to reap it: PID 1 can't end before"


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    assert why_not.__wrapped__() == "a systemd can be started by root only"


@ALONE
def test_why_not_where_it_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(manager: Manager, systemd: str) -> str:
        return f"echo no such luck, {systemd}; exit 3\n"

    monkeypatch.setattr(Manager, "_boot_script", script)
    assert why_not.__wrapped__().startswith("a systemd can't be started here: no such luck, /")
    monkeypatch.setattr(systemd_rig, "_systemd", lambda: None)
    assert why_not.__wrapped__() == "systemd: not installed (Debian packages systemd, util-linux and mount)"


def test_in_ci_inability_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="a reason"):
        unable("a reason")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="a reason"):
        unable("a reason")


@ALONE
def test_luod_itself() -> None:
    """This checkout's luod, in the shipped sandbox. Type=exec: it need not say when it is ready."""
    with Manager(settings={SERVICE: "[Service]\nType=exec\n"}) as manager:
        manager.ctl("start", SERVICE)
        until(lambda: "serves /run/luod" in manager.said(SERVICE), lambda: manager.said(SERVICE))
        alice = manager.user("alice")
        manager.run("luoctl", "--runtime-dir", "/run/luod", "preserve", "guest", "file=memfd:/etc/passwd", user=alice)
        assert "guest" in manager.run("luoctl", "--runtime-dir", "/run/luod", "list", user=alice)
        assert "guest" not in manager.run("luoctl", "--runtime-dir", "/run/luod", "list", user=manager.user("bob"))
