"""A configuration that changes: `--check-config`, a successor that can't use it, and one that is stricter than its predecessor."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

import luod_client
from faulty import run_module, scene
from harness import Daemon, folder_for
from luod.config import Config, load
from luod_client import Code, Refusal
from luod_protocol.fds import OwnedFd, close_all
from things import eventfd, let_go, memfd, pipe, preserve_pipe, watched_pipe

BAD = "[limits]\nmax_sesions = 7\nmax_connections = 0\n"
SAYS = (
    "limits.max_connections = 0: it must be more than 0",
    "limits.max_sesions: unknown key; there are max_sessions, max_connections, max_preserved_fds, idle_open_s, per_uid",
)


@contextmanager
def configured(tmp_path: Path, text: str) -> Generator[tuple[Daemon, Path]]:
    """A luod with this configuration, and the file to change."""
    file = tmp_path / "luod.toml"
    file.write_text(text)
    with Daemon(options=("--config", str(file))) as daemon:
        yield daemon, file


def check(*options: str) -> subprocess.CompletedProcess[str]:
    return run_module("luod", "--check-config", *options)


# ------------------------------------------------------------------------------------------------------------ --check-config


def test_a_good_configuration_is_printed(tmp_path: Path) -> None:
    file = tmp_path / "luod.toml"
    file.write_text("[limits.per_uid]\nmax_sessions = 7\n[[claim]]\ngid = 0\n")
    done = check("--config", str(file), "--runtime-dir", str(tmp_path / "run"))
    assert (done.returncode, done.stderr) == (0, "")
    again = tmp_path / "again.toml"
    again.write_text(done.stdout)
    assert load(str(again)) == load(str(file)) != Config()
    assert sorted(os.listdir(tmp_path)) == ["again.toml", "luod.toml"]


def test_without_a_file_the_defaults_are_printed(tmp_path: Path) -> None:
    done = check()
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "luod.toml").write_text(done.stdout)
    assert load(str(tmp_path / "luod.toml")) == Config()


def test_a_bad_configuration_is_told_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "luod.toml"
    file.write_text(BAD)
    done = check("--config", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [f"luod: {file}: {problem}" for problem in SAYS]


def test_beside_a_luod_that_serves(daemon: Daemon) -> None:
    assert check("--runtime-dir", daemon.runtime_dir).returncode == 0
    assert daemon.status().generation == 1


# ------------------------------------------------------------------------------------------------- one that can't be used


def test_an_upgrade_to_a_bad_configuration_says_why_and_costs_nothing(tmp_path: Path) -> None:
    with configured(tmp_path, "") as (daemon, file), scene(daemon.runtime_dir) as made:
        pid = daemon.pid
        file.write_text(BAD)
        with pytest.raises(Refusal) as caught:
            daemon.upgrade()
        assert caught.value.code is Code.UPGRADE_FAILED
        reason = f"the successor declined: {file}: {'; '.join(SAYS)} (it ended with status 2)"
        assert caught.value.message == f"the upgrade failed, generation 1 goes on serving: {reason}"

        done = run_module("luod_client.cli", "--runtime-dir", daemon.runtime_dir, "upgrade")
        assert (done.returncode, done.stderr) == (1, f"luoctl: {caught.value.message}\n")

        file.unlink()
        with pytest.raises(Refusal, match=f"declined: {file}: No such file or directory"):
            daemon.upgrade()
        assert daemon.pid == pid
        made.check_live()
        file.write_text("handover.meet_s = 20")
        assert daemon.upgrade().generation == 2
        made.check_finalized("first", "second")


def test_a_takeover_with_a_bad_configuration_says_why_and_bothers_nobody(tmp_path: Path) -> None:
    file = tmp_path / "luod.toml"
    file.write_text(BAD)
    with Daemon() as daemon:
        done = run_module("luod", "--runtime-dir", daemon.runtime_dir, "--takeover", "--config", str(file))
        assert (done.returncode, done.stderr) == (2, f"luod: {file}: {'; '.join(SAYS)}\n")
        assert daemon.status().generation == 1
        assert "upgrade" not in daemon.stderr


# ------------------------------------------------------------------------------------------------ one that is stricter

GENEROUS = "[files]\nallow = ['/dev/zero', '{folder}/*']\n"
STRICT = """
[limits]
max_sessions = 1
max_preserved_fds = 1
[kinds]
allow = ["eventfd"]
[[serialize]]
uid = 4000000
"""


@pytest.mark.slow
def test_what_is_held_stays_under_a_stricter_configuration(tmp_path: Path) -> None:
    with folder_for() as folder, configured(tmp_path, GENEROUS.format(folder=folder)) as (daemon, file):
        where = daemon.runtime_dir
        with (
            luod_client.serialize("open", runtime_dir=where) as session,
            luod_client.deserialize(runtime_dir=where) as claimer,
            memfd(b"content") as ram,
            OwnedFd(os.open(f"{folder}/disk.img", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)) as disk,
            OwnedFd(os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)) as zero,
            watched_pipe(session) as read,
        ):
            infos = session.preserve({"ram": ram.fileno(), "disk": disk.fileno(), "zero": zero.fileno()})
            assert infos["disk"].facts == {"path": f"{folder}/disk.img", "type": "regular", "access": "rw", "device": ""}
            assert infos["zero"].facts["device"] == "1:5"
            kept, _ = preserve_pipe(where, "kept")
            claimed, _ = preserve_pipe(where, "claimed")
            claim = claimer.claim("claimed")
            os.rename(f"{folder}/disk.img", f"{folder}/renamed")

            file.write_text(STRICT)
            daemon.upgrade()
            assert set(claimer.capabilities().kinds) == {"eventfd"}

            with pytest.raises(Refusal, match=r"kind memfd, which luod's configuration does not allow \(\[kinds\]\); whoever runs luod"):
                session.preserve({"more": ram.fileno()})
            with pytest.raises(Refusal, match=r"a regular file.*\(\[files\]\)"):
                session.preserve({"more": disk.fileno()})
            with eventfd() as irq:
                session.preserve({"irq": irq.fileno()})
            with pytest.raises(Refusal, match=r"5 fds, luod holds 2 .*limits\.max_preserved_fds"):
                session.finalize()
            assert not let_go(read, 0), "it is still open, and nothing of it was dropped"
            reason = r"luod holds 3 sessions.*limits\.max_sessions" if os.geteuid() == 0 else r"\[\[serialize\]\] rules"
            with pytest.raises(Refusal, match=reason):
                luod_client.serialize("new", runtime_dir=where)

            file.write_text("")
            daemon.upgrade()
            session.finalize()
            file.write_text(STRICT)
            daemon.upgrade()
            daemon.upgrade()
            with claimer, claim:
                close_all(claim.retrieve().values())
                claim.finish()
                with claimer.claim("open") as second, claimed, kept:
                    fds = second.retrieve()
                    assert os.path.sameopenfile(fds["disk"].fileno(), disk.fileno())
                    close_all(fds.values())
                    second.finish()
                    assert let_go(claimed, 0)
                    assert not let_go(kept, 0)
                    claimer.discard("kept")
                    assert let_go(kept, 0)
            assert let_go(read, 0)


def test_a_denied_kind_is_not_taken_by_another_handler(tmp_path: Path) -> None:
    with (
        configured(tmp_path, "kinds.deny = ['memfd', 'pipe']\nfiles.allow = ['/*', '/dev/*']\n") as (daemon, _),
        luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session,
        memfd() as ram,
        pipe() as (read, _),
    ):
        for fd in (ram, read):
            with pytest.raises(Refusal) as caught:
                session.preserve({"it": fd.fileno()})
            assert (caught.value.code, caught.value.entry) == (Code.KIND_NOT_SUPPORTED, "it")
            assert "which luod's configuration does not allow ([kinds])" in caught.value.message
