"""What is shipped in systemd/, without starting it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import attrs
import pytest

from luod.config import Config, LimitsTable, load
from luod.succession.fdstore import NAMES_BYTES
from machine import unable
from systemd_rig import CHECKOUT, SHIPPED, UNITS

MAX_ARG_STRLEN = 128 * 1024
"""The longest string that execve(2) takes."""

OWN = ["luod-witness", "luod-ledger-1000000", "luod-ledger-1000001"]
"""What luod stores besides boxes."""


def _value(unit: str, key: str) -> str:
    (value,) = re.findall(rf"^{key}=(.*)$", (SHIPPED / unit).read_text(), re.MULTILINE)
    return str(value)


@pytest.fixture
def analyze() -> str:
    """systemd-analyze. Where it isn't, the test is skipped, in CI it fails."""
    found = shutil.which("systemd-analyze")
    if found is None:
        unable("there is no systemd-analyze: Debian package systemd")
    return found


def _output(*command: str) -> tuple[int, str]:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def test_exposure(analyze: str) -> None:
    code, said = _output(analyze, "security", "--no-pager", "--offline=true", "--threshold=20", str(SHIPPED / "luod.service"))
    found = re.search(r"Overall exposure level for luod.service: ([0-9.]+)", said)
    assert found, said
    assert (code, float(found[1]) <= 2.0) == (0, True), said


def test_no_word_is_wrong(analyze: str, tmp_path: Path) -> None:
    for unit in UNITS:
        text = (SHIPPED / unit).read_text()
        # It asks whether the programs are there.
        (tmp_path / unit).write_text(re.sub(r"^(Exec\w+=)/usr/bin/\w+", r"\1/bin/true", text, flags=re.MULTILINE))
    _, version = _output(analyze, "--version")
    code, said = _output(analyze, "verify", "--man=no", *(str(tmp_path / unit) for unit in UNITS))
    complaints = [line for line in said.splitlines() if str(tmp_path) in line or "luod" in line]
    if int(version.split()[1].split(".")[0]) < 254:
        complaints = [line for line in complaints if "Unknown key 'FileDescriptorStorePreserve'" not in line]
    assert (code, complaints) == (0, []), said


def test_the_configuration() -> None:
    config = load(str(SHIPPED / "luod.toml"))
    assert config == Config(limits=LimitsTable(max_preserved_fds=500_000))
    assert 2 * config.limits.max_preserved_fds <= int(_value("luod.service", "LimitNOFILE"))
    stop_s = int(_value("luod.service", "TimeoutStopSec").removesuffix("s"))
    assert stop_s > config.handover.freeze_s + config.handover.commit_s


def test_what_the_configuration_leaves_out_are_the_defaults(tmp_path: Path) -> None:
    text = re.sub(r"^# (\w+ = )", r"\1", (SHIPPED / "luod.toml").read_text(), flags=re.MULTILINE)
    for table in ("limits", "handover"):
        for key, value in attrs.asdict(Config())[table].items():
            if isinstance(value, dict):  # a table of its own
                continue
            assert re.search(rf"^{key} = ", text, re.MULTILINE), f"{table}.{key} is missing"
    (tmp_path / "luod.toml").write_text(text)
    assert load(str(tmp_path / "luod.toml")) == Config(limits=LimitsTable(max_preserved_fds=500_000))


def test_the_names_of_a_full_store_fit_into_one_variable() -> None:
    sockets = [_value(unit, "FileDescriptorName") for unit in UNITS[1:]]
    boxes = [f"b{number}" for number in range(int(_value("luod.service", "FileDescriptorStoreMax")) - len(OWN))]
    assert len(boxes) >= Config().limits.max_sessions
    assert len(f"LISTEN_FDNAMES={':'.join(sockets + OWN + boxes)}\0") <= MAX_ARG_STRLEN
    assert sum(len(name) + 1 for name in OWN + boxes) <= NAMES_BYTES


def test_install(tmp_path: Path) -> None:
    command = ["make", "-C", str(CHECKOUT), "install-systemd", f"DESTDIR={tmp_path}", "PREFIX=/opt/luod"]
    subprocess.run(command, check=True, capture_output=True)
    etc = tmp_path / "etc"
    unit = (etc / "systemd" / "system" / "luod.service").read_text()
    assert unit == (SHIPPED / "luod.service").read_text().replace("=/usr/bin/luo", "=/opt/luod/bin/luo")
    assert unit.count("/opt/luod/bin/") == 2
    for name, where in {
        "luod-serialize.socket": "systemd/system",
        "luod-deserialize.socket": "systemd/system",
        "luod-control.socket": "systemd/system",
        "60-luod.rules": "udev/rules.d",
        "luod.toml": "luod",
    }.items():
        assert (etc / where / name).read_text() == (SHIPPED / name).read_text()
    for what in ("sysusers", "tmpfiles"):
        assert (etc / f"{what}.d" / "luod.conf").read_text() == (SHIPPED / f"luod-{what}.conf").read_text()
    (etc / "luod" / "luod.toml").write_text("# an administrator's\n")
    subprocess.run(command, check=True, capture_output=True)
    assert (etc / "luod" / "luod.toml").read_text() == "# an administrator's\n"
