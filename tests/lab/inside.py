"""What functions that run in the lab import: a luod with the patience that the lab needs."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager

from harness import Daemon

CONFIG = "[handover]\nmeet_s = 200\ncopy_s = 200\nfreeze_s = 60\ncommit_s = 60\n"


@contextmanager
def daemon() -> Generator[Daemon]:
    """A luod, as in the tests outside."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(CONFIG)
        file.flush()
        with Daemon(options=["--config", file.name], dev=False) as daemon:
            yield daemon
