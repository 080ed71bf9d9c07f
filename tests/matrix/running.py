"""Cells in a worker process. Not in `__main__`, which a spawned process doesn't import."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

import attrs

from leftovers import time_limit
from matrix.cell import TRIES, Cell, TooLate
from matrix.hosts import HOSTS, LONG, SHORT, Host
from matrix.steps import Step, needs_short_bounds

CELL_S: Final = 120.0
VIOLATION: Final = "VIOLATION"


@attrs.frozen
class Try:
    """A cell, and what came of it."""

    host: str
    step: Step
    fault: str
    outcome: str = ""
    violation: str = ""

    def __str__(self) -> str:
        return f"{self.step.name} {self.fault} ({self.host})"


def _one(host: Host, cell: Try) -> Try:
    try:
        with time_limit(CELL_S):
            return attrs.evolve(cell, outcome=Cell(host, cell.step, cell.fault).run().value)
    except TooLate:
        return attrs.evolve(cell, violation=traceback.format_exc())
    except Exception:
        return attrs.evolve(cell, outcome=VIOLATION, violation=traceback.format_exc())


def run_chunk(cells: Sequence[Try]) -> list[Try]:
    """Run cells of one kind of host, on one; on another after a violation. What was too late for a bound is tried again."""
    done: list[Try] = []
    with ExitStack() as stack:
        host: Host | None = None
        short = False
        for cell in cells:
            tried = cell
            for _ in range(TRIES):
                if host is None or short != needs_short_bounds(cell.fault):
                    stack.close()
                    short = needs_short_bounds(cell.fault)
                    host = stack.enter_context(HOSTS[cell.host](SHORT if short else LONG))
                tried = _one(host, cell)
                if tried.violation:
                    host = None
                if tried.outcome:
                    break
            done.append(attrs.evolve(tried, outcome=tried.outcome or VIOLATION))
    return done
