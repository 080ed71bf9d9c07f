"""systemd shuts luod down, for another kernel and for a soft-reboot, and clients get back what they had. One boot for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab.travelling import told
from lab.vm import in_vm, missing

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(bool(missing(systemd=True)), reason="; ".join(missing(systemd=True)) or "nothing is missing"),
]


def leave() -> None:
    import subprocess

    from lab.travelling import away, keep, look, sessions, tell

    keep(sessions())
    tell("before", look())
    subprocess.run(["lab-kexec", "load"], check=True)
    away("systemctl", "kexec")


def take_back() -> dict[str, Any]:
    import luod_client
    from lab.travelling import look, luoctl

    with luod_client.control() as control:
        before = control.status(), control.update()
    luoctl("status")
    seen = look(finish=True)
    with luod_client.control() as control:
        after = control.update()
    return {"generation": before[0].generation, "steps": before[1].steps_us, "states": (before[1].state, after.state), "seen": seen}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    run = in_vm(leave, take_back, systemd=True, shared=folder, limit_s=1500)
    (folder / "taken-back").write_text(repr(run.values[1]))
    return folder


def test_everything_is_as_it_was_in_the_next_kernel(shared: Path) -> None:
    assert told(shared / "taken-back")["seen"] == told(shared / "before")
