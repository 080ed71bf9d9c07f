"""`luoctl demo`: it tells the whole story, notices what differs, and leaves nothing behind however it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from harness import LIMIT_S
from luod_client.demo.checks import Answer, Seen, compare
from luod_client.demo.guest import Moved, Resumed, Stopped
from luod_client.demo.story import show
from machine import KVM, kvm_is_for_everybody, kvm_is_there
from processes import ALICE, folder_for, start

DEMO = (sys.executable, "-P", "-m", "luod_client.demo")
LUOCTL = (sys.executable, "-P", "-m", "luod_client.cli", "demo")

STOPPED = Stopped(count=50, wrong="", register=50, in_ram=50, sha256="cd" * 32, identity="1:9", stopped_s=100.0)
RESUMED = Resumed(sha256="cd" * 32, identity="1:9", first=51, last=550, wrong="", pause_s=0.3, rebuild_s=0.001)

GOOD = Seen(
    size=1 << 20,
    sha256_before="ab" * 32,
    sha256_said="ab" * 32,
    sha256_after="ab" * 32,
    identity_before="1:7",
    identity_after="1:7",
    seals_asked=["grow", "write"],
    seals_after=["grow", "write"],
    backlog=Answer(question="q1", answer="q1 answered by pid 12", pid=12, waited_s=1.0),
    caller=Answer(question="q2", answer="q2 answered by pid 12", pid=12, waited_s=1.0),
    generation_before=1,
    generation_after=2,
    predecessor_status=0,
    looper_fault="",
    looper_trips=100,
    counters=[1, 2, 3],
    counter_asked=3,
    written=4,
    resets_exit=0,
    resets_upgrade=0,
    resets_retrieved=0,
    resets_finish=0,
    resets_close=1,
    counter_close=0,
    guest=Moved(stopped=STOPPED, resumed=RESUMED),
    guest_left_out="",
    sessions_left=0,
    pause_s=0.001,
    longest_s=0.002,
    usual_s=0.0001,
    retrieve_s=0.001,
    copy_s=0.1,
)


def moved(*, stopped: Stopped = STOPPED, resumed: Resumed = RESUMED) -> dict[str, Any]:
    return {"guest": Moved(stopped=stopped, resumed=resumed)}


WRONG = [
    ({"sha256_after": "ac" * 32}, "memory: SHA-256, computed by the new process"),
    ({"sha256_said": "ac" * 32}, "memory: SHA-256, in the entry's metadata"),
    ({"identity_after": "1:8"}, "memory: device and inode"),
    ({"seals_after": ["grow"]}, "memory: seals added by finalize"),
    ({"backlog": attrs.evolve(GOOD.backlog, answer="")}, "TCP: who waited in the backlog"),
    ({"caller": attrs.evolve(GOOD.caller, answer="q2 answered by pid 11")}, "TCP: who had been accepted"),
    ({"generation_after": 1}, "luod: generation"),
    ({"predecessor_status": -9}, "luod: exit status of the old daemon"),
    ({"looper_fault": "luod ended the connection"}, "looping client: faults, on one connection"),
    ({"looper_trips": 0}, "looping client: round trips"),
    ({"counters": [1, 2, 2]}, "device: counter along the way"),
    ({"counters": [1]}, "device: counter along the way"),
    ({"written": 3}, "device: DMA reaches the new process's memory"),
    ({"resets_exit": 1}, "device: resets when the old process was gone"),
    ({"resets_upgrade": 1}, "device: resets after luod was replaced"),
    ({"resets_retrieved": 1}, "device: resets when the new process had it"),
    ({"resets_finish": 1}, "device: resets after finish"),
    ({"resets_close": 0}, "device: resets after the last close"),
    ({"resets_close": 2}, "device: resets after the last close"),
    ({"counter_close": 5}, "device: counter after the last close"),
    (moved(stopped=attrs.evolve(STOPPED, register=0)), "guest: count when stopped, in its register, in its RAM"),
    (moved(stopped=attrs.evolve(STOPPED, in_ram=49)), "guest: count when stopped, in its register, in its RAM"),
    (moved(resumed=attrs.evolve(RESUMED, sha256="ce" * 32)), "guest: RAM: SHA-256 before it went on"),
    (moved(resumed=attrs.evolve(RESUMED, identity="1:8")), "guest: RAM: device and inode"),
    (moved(resumed=attrs.evolve(RESUMED, first=50)), "guest: first count in the new process"),
    (moved(resumed=attrs.evolve(RESUMED, first=52)), "guest: first count in the new process"),
    (moved(stopped=attrs.evolve(STOPPED, wrong="7 came after 5")), "guest: counts lost or repeated"),
    (moved(resumed=attrs.evolve(RESUMED, wrong="its journal lacks 50")), "guest: counts lost or repeated"),
    ({"sessions_left": 1}, "luod: sessions left after finish"),
]


def test_what_is_as_it_must_be_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(GOOD, 3.0, as_json=False) == 0
    out = capsys.readouterr().out
    assert "DIFFERS" not in out
    assert "Everything as it must be, in 3.0 s." in out


@pytest.mark.parametrize(("change", "what"), WRONG)
def test_each_thing_that_differs_is_named_and_exits_with_1(change: dict[str, Any], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen = attrs.evolve(GOOD, **change)
    assert [check.what for check in compare(seen) if not check.ok] == [what]
    assert show(seen, 3.0, as_json=False) == 1
    out = capsys.readouterr().out
    assert next(line for line in out.splitlines() if line.endswith("DIFFERS")).startswith(what)
    assert "NOT as it must be" in out
    assert show(seen, 3.0, as_json=True) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert [check["what"] for check in document["checks"] if not check["ok"]] == [what]


def test_every_check_has_a_case_in_which_it_fails() -> None:
    assert {check.what for check in compare(GOOD)} == {what for _, what in WRONG}


def test_a_guest_that_is_left_out_is_said_and_changes_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    seen = attrs.evolve(GOOD, guest=None, guest_left_out="/dev/kvm is not for everybody")
    assert show(seen, 3.0, as_json=False) == 0
    assert "Left out, a guest in a virtual machine: /dev/kvm is not for everybody." in capsys.readouterr().out
    assert show(seen, 3.0, as_json=True) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["left_out"] == {"guest": "/dev/kvm is not for everybody"}
    assert [check["what"] for check in document["checks"]] == [check.what for check in compare(GOOD) if "guest" not in check.what]
    assert set(document["measured"]).isdisjoint({"guest_pause_s", "guest_rebuild_s"})


# ---- the real thing


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder)}


@pytest.mark.slow
def test_tells_its_story_in_one_json_document(tmp_path: Path) -> None:
    done = subprocess.run([*LUOCTL, "--json", "--size", "4"], capture_output=True, env=environment(tmp_path), timeout=LIMIT_S, check=False)
    assert done.stderr == b""
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert document["ok"] is True
    assert document["size"] == 4 << 20
    assert 0 < document["seconds"] < LIMIT_S
    checks = {check["what"]: check for check in document["checks"]}
    assert set(document["left_out"]) == (set() if kvm_is_there() else {"guest"})
    assert set(checks) == {check.what for check in compare(GOOD if kvm_is_there() else attrs.evolve(GOOD, guest=None))}
    assert all(check["ok"] is True for check in checks.values())
    assert len(checks["memory: SHA-256, computed by the new process"]["seen"]) == 64
    assert checks["device: resets after finish"]["seen"] == "0"
    assert checks["device: resets after the last close"]["seen"] == "1"
    assert all(seconds > 0 for seconds in document["measured"].values())
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.root
def test_who_may_not_use_kvm_is_told_so_and_sees_the_rest() -> None:
    if kvm_is_for_everybody():
        pytest.skip(f"everybody may use {KVM} here")
    with folder_for(ALICE) as folder:
        pipe = subprocess.PIPE
        with start([*LUOCTL, "--json", "--size", "4"], ALICE, stdout=pipe, stderr=pipe, env=environment(Path(folder))) as process:
            out, err = process.communicate(timeout=LIMIT_S)
        assert os.listdir(folder) == []
    assert (process.returncode, err) == (0, b"")
    document = json.loads(out)
    assert document["ok"] is True
    assert document["left_out"]["guest"].startswith(f"{KVM} can't be opened: ")
    assert {check["what"] for check in document["checks"]} == {check.what for check in compare(attrs.evolve(GOOD, guest=None))}


@contextmanager
def demo(folder: Path) -> Generator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([*DEMO, "--size", "4"], stdout=pipe, stderr=pipe, env=environment(folder), text=True)
    try:
        with process:
            yield process
    finally:
        process.kill()


def read_until(process: subprocess.Popen[str], what: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if what in line:
            return line
    raise AssertionError(f"the demo never said {what!r}")


@pytest.mark.slow
def test_prints_each_step_as_it_happens_and_a_table(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        for step in (
            "generation 1) serves",
            "4 MiB of real data",
            "in mid-DMA",
            "in custody",
            "old client is gone",
            "generation 2) serves",
        ):
            read_until(process, step)
            assert process.poll() is None
        out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    assert "Everything as it must be" in out
    assert "\r" not in out + err
    assert err == ""


@pytest.mark.slow
def test_a_device_that_dies_is_a_failure(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        line = read_until(process, "in mid-DMA")
        os.kill(int(line.split("(pid ")[1].split(")")[0]), signal.SIGKILL)
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert "the demo can't go on" in err
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", ["generation 1) serves", "generation 2) serves"])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, step: str) -> None:
    with demo(tmp_path) as process:
        read_until(process, step)
        process.send_signal(number)
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}" in err
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_its_deadline_is_a_failure_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        read_until(process, "generation 1) serves")
        process.send_signal(signal.SIGALRM)
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert "the demo was not done within" in err
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_without_the_daemon_it_says_so(tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    for name in ("luod_client", "luod_protocol", "attr", "attrs", "cattrs", "msgpack", "tabulate", "tqdm", "typing_extensions"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        origin = Path(spec.origin)
        place = origin.parent if origin.name == "__init__.py" else origin
        (library / place.name).symlink_to(place)
    # -S: no site-packages, so luod isn't found.
    command = [sys.executable, "-S", *DEMO[1:], "--json"]
    done = subprocess.run(
        command, capture_output=True, env={**environment(tmp_path), "PYTHONPATH": str(library)}, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 1
    assert b"the daemon isn't installed beside the client" in done.stderr
    assert "isn't installed" in json.loads(done.stdout)["error"]["message"]
    assert os.listdir(tmp_path) == ["library"]


@pytest.mark.parametrize("size", ["0", "-1", "65537", "x"])
def test_refuses_a_size_that_makes_no_sense(size: str) -> None:
    done = subprocess.run([*DEMO, f"--size={size}"], capture_output=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 2
    assert b"--size" in done.stderr
