"""Every test: nothing may be left behind, neither a descriptor nor a process nor something that should have been closed."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest

from harness import Daemon, adopt_orphans
from leftovers import Watch, time_limit

LIMIT_S = 60
SLOW_LIMIT_S = 180
LAB_LIMIT_S = 900
_FAILED = pytest.StashKey[bool]()
_LEFT_OUT = pytest.StashKey[int]()


def pytest_configure() -> None:
    """A daemon's successor that outlives its parent comes to us, to be seen. Daemons start as if nobody had used nohup(1)."""
    adopt_orphans()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only root can do, `pytest_report_collectionfinish` says so; and the lab, unless -m names it."""
    without = [*(["root"] if os.geteuid() != 0 else []), *(["lab"] if "lab" not in str(config.option.markexpr) else [])]
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in without)]
    items[:] = [item for item in items if item not in left_out]
    config.stash[_LEFT_OUT] = sum(1 for item in left_out if item.get_closest_marker("root"))
    config.hook.pytest_deselected(items=left_out)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Whether all tests run."""
    left_out = config.stash.get(_LEFT_OUT, 0)
    return [f"not root: {left_out} tests that need root are left out"] if left_out else []


def pytest_collection_finish() -> None:
    """What was imported stays: the collections after each test need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Remember that a test failed, for its fixtures."""
    if call.excinfo is not None:
        item.stash[_FAILED] = True


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves something behind, or that takes for ever."""
    watch = Watch()
    limits = {"lab": LAB_LIMIT_S, "slow": SLOW_LIMIT_S}
    with time_limit(max((limit for marker, limit in limits.items() if request.node.get_closest_marker(marker)), default=LIMIT_S)):
        yield
    left = watch.left_behind()
    if left:
        pytest.fail("left behind: " + "; ".join(left), pytrace=False)


@pytest.fixture
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A luod of the test's own; see `Daemon` for what must hold at its end."""
    with Daemon() as daemon:
        yield daemon
        if request.node.stash.get(_FAILED, False):
            print(f"luod's stderr:\n{daemon.stderr}")
            daemon.abandon()
