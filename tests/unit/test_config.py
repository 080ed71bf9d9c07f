"""luod.toml: defaults, every key, and errors that name the file and the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from luod.config import (
    PRIVILEGED_PRESERVED_FDS,
    SHARED_UID_PRESERVED_FDS,
    Config,
    ConfigFault,
    HandoverTable,
    LimitsTable,
    load,
    preserved_fds,
)


def written(folder: Path, text: str) -> str:
    path = folder / "luod.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert load(None) == Config() == load(written(tmp_path, ""))
    assert Config().limits.max_sessions == 16_384
    assert Config().handover.freeze_s == 5.0


def test_every_key(tmp_path: Path) -> None:
    text = """
        [limits]
        max_sessions = 1
        max_connections = 2
        max_preserved_fds = 3
        [handover]
        meet_s = 4
        copy_s = 0.5
        freeze_s = 6.0
        commit_s = 7.25
    """
    assert load(written(tmp_path, text)) == Config(
        limits=LimitsTable(max_sessions=1, max_connections=2, max_preserved_fds=3),
        handover=HandoverTable(meet_s=4.0, copy_s=0.5, freeze_s=6.0, commit_s=7.25),
    )


def test_one_key_leaves_the_others(tmp_path: Path) -> None:
    assert load(written(tmp_path, "handover.meet_s = 1")) == Config(handover=HandoverTable(meet_s=1.0))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("limits = 3", "limits"),
        ("[limits]\nmax_sesions = 3", "max_sesions"),
        ("[limit]\nmax_sessions = 3", "limit"),
        ("[limits]\nmax_sessions = '3'", r"limits\.max_sessions"),
        ("[limits]\nmax_sessions = 3.0", r"limits\.max_sessions"),
        ("[limits]\nmax_sessions = true", r"limits\.max_sessions"),
        ("[limits]\nmax_sessions = 0", r"limits\.max_sessions = 0: it must be more than 0"),
        ("[limits]\nmax_connections = -1", r"limits\.max_connections = -1: it must be more than 0"),
        ("[limits]\nmax_preserved_fds = -1", r"limits\.max_preserved_fds"),
        ("[handover]\nmeet_s = 0", r"handover\.meet_s = 0.0: it must be more than 0"),
        ("[handover]\ncommit_s = -0.5", r"handover\.commit_s = -0.5: it must be more than 0"),
        ("[handover]\ncopy_s = nan", r"handover\.copy_s = nan: it must be more than 0"),
        ("[handover]\nfreeze_s = '1'", r"handover\.freeze_s"),
        ("[handover]\nfreeze_s = true", r"handover\.freeze_s"),
        ("[limits", "Expected"),
        ("\0", "Invalid"),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path: Path, text: str, named: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigFault, match=named) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "luod.toml"
    path.write_bytes(b"[limits]\n# \xff\n")
    with pytest.raises(ConfigFault, match=str(path)):
        load(str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigFault, match="No such file"):
        load(str(tmp_path / "none.toml"))


def test_zero_preserved_fds_mean_by_privilege() -> None:
    assert preserved_fds(LimitsTable(max_preserved_fds=7)) == 7
    with open("/proc/self/status", encoding="ascii") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    with open("/proc/self/uid_map", encoding="ascii") as file:
        initial = file.read().split() == ["0", "0", "4294967295"]
    privileged = initial and bool(effective & (1 << 21 | 1 << 24))
    assert preserved_fds(LimitsTable()) == (PRIVILEGED_PRESERVED_FDS if privileged else SHARED_UID_PRESERVED_FDS)
