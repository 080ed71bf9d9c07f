"""Sessions go through real kernels, two kexecs in a row, with luoctl as the operator has it. One boot for all: see `lab.vm`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab.travelling import MANY, told
from lab.vm import in_vm

pytestmark = pytest.mark.lab


def leave() -> None:
    import os
    import subprocess

    import luod_client
    from lab.travelling import keep, look, luoctl, luod, sessions, tell
    from luod_client import kexec
    from luod_protocol.fds import OwnedFd
    from processes import until

    with luod(), luod_client.serialize("left-open") as left_open:
        keep(sessions())
        tell("before", look())
        tell("no-kernel", luoctl("kexec", "run", "--now"))
        tell("bad-image", luoctl("kexec", "load", "--kernel", "/bin/sh", "--reuse-cmdline"))
        with luod_client.control() as control:
            control.prepare(deadline_s=0)
            until(lambda: control.update().state == "prepared", "prepared")
            control.freeze()
            try:
                kexec.jump()
            except luod_client.Refusal as refusal:
                control.cancel_update(str(refusal))
            tell("after-a-failure", (control.update().state, control.update().reason, look() == look()))
        with luod_client.serialize("mixed") as mixed, OwnedFd(os.eventfd(0)) as event:
            mixed.preserve({"event": event.fileno()})
            finalized = mixed.finalize()
            tell("mixed", finalized.survives)
        subprocess.run(["lab-kexec", "load"], check=True)
        tell("cannot-travel", luoctl("kexec", "run", "--now", "--deadline", "0"))
        tell("dry-run", luoctl("kexec", "run", "--dry-run", "--leave-behind", "mixed"))
        luoctl("kexec", "run", "--now", "--deadline", "0", "--leave-behind", "mixed")
        raise AssertionError(f"luoctl is back, {left_open.name}")


def pass_on() -> None:
    import subprocess

    from lab.travelling import look, luoctl, luod, tell

    with luod():
        tell("second", look())
        tell("second-status", luoctl("status"))
        tell("second-list", luoctl("list"))
        subprocess.run(["lab-kexec", "load"], check=True)
        luoctl("kexec", "run", "--now", "--deadline", "0")
        raise AssertionError("luoctl is back")


def take_back() -> dict[str, Any]:
    import luod_client
    from lab.travelling import look, luod

    with luod():
        with luod_client.control() as control:
            generation = control.status().generation
            before = control.update()
        seen = look(finish=True)
        with luod_client.control() as control:
            after = control.update()
        return {"generation": generation, "steps": before.steps_us, "states": (before.state, after.state), "seen": seen}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    run = in_vm(leave, pass_on, take_back, shared=folder, limit_s=1500)
    (folder / "third").write_text(repr(run.values[2]))
    return folder


def test_everything_is_as_it_was_after_one_kexec_and_after_two(shared: Path) -> None:
    before = told(shared / "before")
    assert len(before["many"][3]) == MANY
    assert before["guest"][3]["reader"][3:5] == (0, 12), "read-only, and where it was"
    assert told(shared / "second") == before
    assert told(shared / "third")["seen"] == before


def test_the_line_of_generations_goes_on(shared: Path) -> None:
    third = told(shared / "third")
    assert third["generation"] == 3
    assert third["states"] == ("updated", "normal")
    assert set(third["steps"]) == {"kernel", "boot", "start", "adopt"}


def test_what_was_left_is_told_in_the_next_kernel(shared: Path) -> None:
    _, out, _ = told(shared / "second-status")
    assert "session 'left-open' of uid 0" in out
    assert "session 'mixed' of uid 0" in out
    _, listed, _ = told(shared / "second-list")
    assert "left-open" not in listed
    assert "mixed" not in listed


def test_without_a_kernel_or_with_a_bad_one_nothing_happens(shared: Path) -> None:
    status, out, err = told(shared / "no-kernel")
    assert (status, "no kernel is loaded" in err) == (1, True)
    assert "holes are filled" in out
    status, _, err = told(shared / "bad-image")
    assert (status, "no kernel image" in err) == (1, True)


def test_after_a_reboot_that_failed_everything_is_served(shared: Path) -> None:
    state, reason, looked = told(shared / "after-a-failure")
    assert (state, looked) == ("normal", True)
    assert "the machine did not go to another kernel: no kernel is loaded" in reason


def test_what_cannot_travel_is_refused_before_anything_is_done(shared: Path) -> None:
    assert told(shared / "mixed") == ("daemon-upgrade",)
    status, _, err = told(shared / "cannot-travel")
    assert (status, "session 'mixed' of uid 0" in err) == (1, True)
    status, out, _ = told(shared / "dry-run")
    assert (status, "3 sessions, 303 fds" in out, "holes" in out) == (0, True, False), "an earlier preparation has filled them"
