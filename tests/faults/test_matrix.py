"""A part of the matrix of faults (`make faults` runs the whole): a kill at every step without a manager, and a handful with one."""

from __future__ import annotations

import pytest

from machine import unable
from matrix.cell import Cell, find_steps
from matrix.hosts import HOSTS, LONG
from matrix.rules import Word
from matrix.steps import Step, missing
from systemd_rig import why_not

pytestmark = pytest.mark.slow

SHARES = 8
"""In so many tests: they run beside each other."""

HANDFUL = (
    ("old/after-send:frozen", "kill", Word.RESTARTED),
    ("new/before-send:verified", "no", Word.OLD),
    ("new/after-send:serving", "kill", Word.RESTARTED),
    ("old/before-send:frozen", "EMFILE", Word.NEW),
    ("old/before-tell:MAINPID", "hang", Word.RESTARTED),
    ("old/after-tell:MAINPID", "kill", Word.NEW),
)


@pytest.mark.parametrize("share", range(SHARES))
def test_killed_at_every_step_without_a_manager(share: int) -> None:
    with HOSTS["plain"](LONG) as host:
        steps = find_steps(host)
        assert not missing(steps), "the story must make luod send every message"
        # To be killed before a message is received is, for all others, to be killed after it was sent.
        tried = [step for step in steps if (step.when, step.verb) != ("before", "receive")]
        assert len(tried) > SHARES
        for step in tried[share::SHARES]:
            try:
                Cell(host, step, "kill").run()
            except AssertionError as error:
                raise AssertionError(f"kill at {step.name}: {error}") from error


@pytest.mark.parametrize("name", ["supervised", "systemd"])
def test_some_faults_under_a_manager(name: str) -> None:
    if name == "systemd" and (reason := why_not()):
        unable(reason)
    with HOSTS[name](LONG) as host:
        for step_name, fault, word in HANDFUL:
            step = Step.parse(step_name)
            assert step is not None
            assert Cell(host, step, fault).run() is word, f"{fault} at {step_name}"
