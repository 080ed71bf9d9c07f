"""The thread that has things befall luod, at random moments, and remembers when clients had to notice."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import attrs

from soak.hosts import Host


@attrs.define(kw_only=True)
class Window:
    """When a crash may have been noticed, in seconds of CLOCK_MONOTONIC."""

    since: float
    until: float = float("inf")


class Disturber(threading.Thread):
    """See the module's text.

    Args:
        pause_s: the mean pause between two disturbances, in seconds; 0: none ever happens.

    Attributes:
        counts: upgrades, failed upgrades, kills.
        failure: what went wrong with it; it has ended then.
        now: what befalls luod right now.
    """

    def __init__(self, host: Host, seed: int, pause_s: float) -> None:
        super().__init__()
        self._host = host
        self._dice = random.Random(f"{seed} disturber")
        self._pause_s = pause_s
        self._enough = threading.Event()
        self._windows: list[Window] = []
        self.counts = Counter[str]()
        self.failure: BaseException | None = None
        self.now = ""

    def run(self) -> None:
        """Until it is enough."""
        disturbances = self._host.disturbances
        weights = [each.weight for each in disturbances.values()]
        try:
            while self._pause_s and not self._enough.wait(self._dice.expovariate(1 / self._pause_s)):
                self.now = self._dice.choices(list(disturbances), weights)[0]
                chosen = disturbances[self.now]
                if chosen.crash:
                    self._windows.append(Window(since=time.monotonic()))
                self.counts[chosen.do(self._dice)] += 1
                if chosen.crash:
                    self._windows[-1].until = time.monotonic()
                self.now = ""
        except BaseException as error:
            self.failure = error

    def stop(self) -> None:
        """Have it end, and wait for that."""
        self._enough.set()
        self.join()

    def explains(self, since: float, until: float) -> bool:
        """Whether a crash can have been noticed between these times."""
        return any(window.since <= until and window.until >= since for window in self._windows[-100:])

    @property
    def calm_since(self) -> float:
        """Since when luod has been there, as far as crashes go; infinite when it may not be there."""
        return self._windows[-1].until if self._windows else 0.0
