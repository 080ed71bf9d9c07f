"""Tests with a real systemd: each has one of its own, see systemd_rig.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from machine import unable
from systemd_rig import Manager, why_not


@pytest.fixture
def require_systemd() -> None:
    """Skip where no systemd can be started; in CI (CI=true), where it must be possible, fail."""
    reason = why_not()
    if reason:
        unable(reason)


@pytest.fixture
def systemd_luod(require_systemd: None) -> Iterator[Manager]:
    """A booted systemd with luod's units installed, none of them started."""
    with Manager() as manager:
        yield manager
        print(f"systemd's log:\n{manager.log}", f"luod said:\n{manager.said('luod.service')}", sep="\n")
