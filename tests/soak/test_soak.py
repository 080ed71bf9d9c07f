"""A short soak on every host. `make soak` is the long one."""

from __future__ import annotations

import random
from pathlib import Path

import attrs
import pytest

import luod_client
from machine import unable
from soak.__main__ import main
from soak.course import Course
from soak.hosts import HOSTS, Disturbance, NotHere, plain
from soak.model import Breach, Violation

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", HOSTS)
def test_nothing_is_lost_duplicated_or_leaked(name: str, tmp_path: Path) -> None:
    try:
        with HOSTS[name](tmp_path) as host:
            quick = {name: each for name, each in host.disturbances.items() if name != "hang"}
            course = Course(attrs.evolve(host, disturbances=quick), seed=1, clients=8, pause_s=0.1)
            course.run(1.0, print, disturbances=5)
    except NotHere as reason:
        unable(str(reason))


def test_a_session_that_disappears_is_noticed(tmp_path: Path) -> None:
    """Here by the hand of somebody whom the model doesn't know."""
    with plain(tmp_path) as host:

        def steal(dice: random.Random) -> str:
            with luod_client.deserialize(runtime_dir=host.runtime_dir) as looker:
                there = [each for each in looker.list() if each.state == "preserved"]
                for each in dice.sample(there, len(there)):
                    try:
                        looker.discard(session_id=each.session_id, force=True)
                    except luod_client.Refusal:  # somebody was quicker
                        continue
                    return "stolen"
            return "nothing"

        course = Course(attrs.evolve(host, disturbances={"theft": Disturbance(weight=1, crash=False, do=steal)}), seed=1, clients=8)
        with pytest.raises(Violation) as caught:
            course.run(60.0, print)
        assert caught.value.breach in (Breach.LOST, Breach.WRONG)
        known = course.model.get(caught.value.session_id)
        assert known is not None
        assert any("finalize" in line for line in known.last)


def test_a_host_that_is_not_known() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--host", "nowhere"])
    assert ended.value.code == 2
