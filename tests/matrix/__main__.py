"""Run the matrix and print it: `python -m matrix [--host plain] [--fault kill] [--step TEXT] [--jobs N]`.

A cell says who serves in the end, which is what the rules (`rules`) say, or `VIOLATION`, whose text is on stderr. Exit status: 0; 1
after a violation; 2 when a host can't be had.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Final

from tabulate import tabulate
from tqdm import tqdm

from matrix.cell import find_steps
from matrix.hosts import HOSTS, LONG
from matrix.running import VIOLATION, Try, run_chunk
from matrix.steps import FAULTS, missing, needs_short_bounds
from processes import adopt_orphans
from systemd_rig import why_not

CHUNK: Final = 5
"""Cells that share a host."""


def _chunks(cells: Sequence[Try]) -> Iterable[Sequence[Try]]:
    for name, short in product(HOSTS, (False, True)):
        own = [cell for cell in cells if cell.host == name and needs_short_bounds(cell.fault) == short]
        # Neighbours take as long as each other: spread them.
        count = -(-len(own) // CHUNK)
        yield from (own[first::count] for first in range(count))


def table(cells: Sequence[Try], host: str) -> str:
    """The cells of a host: steps, faults, outcomes."""
    outcomes = {(cell.step.name, cell.fault): cell.outcome for cell in cells if cell.host == host}
    faults = [fault for fault in FAULTS if any(fault == each for _, each in outcomes)]
    steps = dict.fromkeys(name for name, _ in outcomes)
    return tabulate([[name, *(outcomes.get((name, fault), "") for fault in faults)] for name in steps], [host, *faults])


def _all_cells(hosts: Sequence[str]) -> list[Try]:
    cells: list[Try] = []
    for name in hosts:
        with HOSTS[name](LONG) as host:
            steps = find_steps(host)
        if lacking := missing(steps):
            raise AssertionError(f"no step is about {', '.join(sorted(lacking))}: the story must make luod send it")
        cells += [Try(name, step, fault) for step in steps for fault in step.faults()]
    return cells


def main() -> int:
    """Run. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="matrix", description="Faults at every step of a handover.")
    parser.add_argument("--host", action="append", choices=list(HOSTS), help="only there; may be repeated")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="only this one; may be repeated")
    parser.add_argument("--step", default="", metavar="TEXT", help="only steps with TEXT in their names")
    parser.add_argument("--jobs", type=int, default=2 * (os.cpu_count() or 1), metavar="N", help="so many at the same time")
    options = parser.parse_args()
    adopt_orphans()
    hosts: list[str] = options.host or list(HOSTS)
    if "systemd" in hosts and (reason := why_not()):
        if options.host or os.environ.get("CI") == "true":
            print(reason, file=sys.stderr)
            return 2
        print(f"without systemd: {reason}")
        hosts.remove("systemd")
    faults: list[str] = options.fault or list(FAULTS)
    cells = [cell for cell in _all_cells(hosts) if cell.fault in faults and options.step in cell.step.name]
    done: dict[str, Try] = {}
    # Not forked: each worker has its own children and its own signals.
    with (
        multiprocessing.get_context("spawn").Pool(options.jobs, adopt_orphans) as pool,
        tqdm(total=len(cells), unit="cell", mininterval=0.1 if sys.stderr.isatty() else 10) as progress,
    ):
        for chunk in pool.imap_unordered(run_chunk, list(_chunks(cells))):
            for cell in chunk:
                done[str(cell)] = cell
                progress.update()
                if cell.violation:
                    progress.write(f"{VIOLATION}: {cell}\n{cell.violation}", file=sys.stderr)
    ordered = [done[str(cell)] for cell in cells]
    for name in hosts:
        print(table(ordered, name), end="\n\n")
    violations = [cell for cell in ordered if cell.violation]
    for cell in violations:
        print(f"{VIOLATION}: {cell}")
    print(f"{len(ordered)} faults, {len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
