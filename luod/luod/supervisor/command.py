"""The parent's own command line: `python -m luod.supervisor NAME=VALUE... -- PROGRAM ARGUMENT...`, which luod makes and nobody types.

The program is the daemon's, with its full path. An argument `first=OPTION` is given to it until it was ready once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple, NoReturn

from luod.interpreter import interpreter

LIMIT: Final = 16_500
"""How many descriptors can be stored, unless said otherwise: as many sessions as luod takes, and a few more."""


class Settings(NamedTuple):
    """Bounds, in seconds.

    Attributes:
        watchdog_s: a daemon that is ready says WATCHDOG=1 at least so often; 0: it need not.
        start_s: how long it may take to be ready.
        stop_s: how long it may take to end when it was told to, or said that it does. Shorter than the 10 s after which container managers
            kill everything.
        abort_s: how long it may take to die of SIGABRT; it may write a core dump.
        rest_s: how long what a dead daemon left may take to end on SIGTERM. Nobody serves meanwhile.
        kill_s: how often SIGKILL is sent again.
        back_off_s, longest_back_off_s: the first and the longest wait before a start; it doubles.
        stable_s: who was ready for so long has the first wait again.
    """

    watchdog_s: float = 30.0
    start_s: float = 90.0
    stop_s: float = 8.0
    abort_s: float = 10.0
    rest_s: float = 2.0
    kill_s: float = 1.0
    back_off_s: float = 0.1
    longest_back_off_s: float = 10.0
    stable_s: float = 10.0


class Order(NamedTuple):
    """What the parent is to do: run `program`, with `first` added until it was ready once, and store up to `limit` descriptors."""

    settings: Settings
    program: list[str]
    first: list[str]
    limit: int = LIMIT


def parse(arguments: Sequence[str]) -> Order:
    """The order that a command line gives.

    Raises:
        ValueError: it gives none.
    """
    at = list(arguments).index("--")
    program = list(arguments[at + 1 :])
    if not program:
        raise ValueError("no program")
    values: dict[str, float] = {}
    limit = LIMIT
    first: list[str] = []
    for argument in arguments[:at]:
        name, _, value = argument.partition("=")
        if name == "first":
            first.append(value)
        elif name == "limit":
            limit = int(value)
        elif name in Settings._fields:
            values[name] = float(value)
        else:
            raise ValueError(f"no setting {name}")
    return Order(Settings()._replace(**values), program, first, limit)


def become(options: Sequence[str], first: Sequence[str], watchdog_s: float) -> NoReturn:
    """Turn this process into the parent of a daemon with `options`.

    Raises:
        OSError: it can't be executed.
    """
    python = interpreter()
    settings = [f"watchdog_s={watchdog_s}", *(f"first={option}" for option in first)]
    command = [*python, "-m", "luod.supervisor", *settings, "--", *python, "-m", "luod", *options]
    sys.stderr.flush()
    os.execv(command[0], command)
