"""systemd stops luod for a soft-reboot and for other kernels, and clients get back what they had. One boot for all: see `lab.vm`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab.travelling import told
from lab.vm import in_vm, systemd_root

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(not systemd_root().exists(), reason="there is no systemd for the lab: `make lab-systemd`"),
]


def soft_reboot() -> None:
    import subprocess

    from lab.travelling import away, keep, look, luoctl, sessions, tell

    keep(sessions(), require={"kexec", "soft-reboot", "service-restart"})
    tell("before", look())
    subprocess.run(["lab-kexec", "load"], check=True)
    luoctl("prepare", "--deadline", "0")
    away("systemctl", "soft-reboot")


def kexec_by_luoctl() -> None:
    import luod_client
    from lab.travelling import away, look, luoctl, tell

    tell("after-soft-reboot", look())
    with luod_client.control() as control:
        tell("state-after-soft-reboot", (control.status().generation, control.update().state, control.status().stored_fds))
    tell("plan", luoctl("kexec", "run", "--dry-run"))
    status, _, err = luoctl("kexec", "run", "--deadline", "0")
    assert (status, err) == (0, "")
    away("true")


def kexec_by_systemctl() -> None:
    import os
    import signal
    import subprocess

    import luod_client
    from lab.travelling import away, look, serves, tell
    from processes import until

    with luod_client.control() as control:
        status, update = control.status(), control.update()
    tell("state-after-kexec", (status.generation, update.state, update.arrived, update.lost, status.stored_fds))
    tell("after-kexec", look())
    os.kill(status.pid, signal.SIGKILL)
    until(lambda: serves() and not os.path.exists(f"/proc/{status.pid}"), "luod serves again")
    tell("after-crash", look())
    subprocess.run(["lab-kexec", "load"], check=True)
    away("systemctl", "kexec")


def take_back() -> dict[str, Any]:
    import luod_client
    from lab.travelling import look

    with luod_client.control() as control:
        status, update = control.status(), control.update()
    seen = look(finish=True)
    with luod_client.control() as control:
        after = control.status()
    return {"state": (status.generation, update.state, update.arrived, update.lost), "seen": seen, "stored": after.stored_fds}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    run = in_vm(soft_reboot, kexec_by_luoctl, kexec_by_systemctl, take_back, systemd=True, shared=folder, limit_s=2400)
    (folder / "taken-back").write_text(repr(run.values[3]))
    return folder


def test_boxes_outlast_a_soft_reboot_and_what_was_prepared_is_let_go_of(shared: Path) -> None:
    assert told(shared / "after-soft-reboot") == told(shared / "before")
    assert told(shared / "state-after-soft-reboot") == (2, "normal", 4), "three boxes and a ledger"
    assert "did not happen" in (shared / "luod.log").read_text()


def test_luoctl_says_how_it_would_go_and_has_systemd_do_it(shared: Path) -> None:
    status, out, _ = told(shared / "plan")
    assert (status, "systemctl kexec" in out, "reboots at once" in out) == (0, True, True)
    assert told(shared / "state-after-kexec")[0] == 3, "the next kernel's luod is that of generation 3"


def test_everything_is_as_it_was_in_the_next_kernel_and_after_a_crash_there(shared: Path) -> None:
    assert told(shared / "after-kexec") == told(shared / "before")
    assert told(shared / "state-after-kexec") == (3, "updated", 3, (), 4)
    assert told(shared / "after-crash") == told(shared / "before")


def test_systemctl_alone_is_enough(shared: Path) -> None:
    taken_back = told(shared / "taken-back")
    assert taken_back["seen"] == told(shared / "before")
    assert taken_back["state"] == (5, "updated", 3, ())
    assert taken_back["stored"] == 1, "the ledger"
