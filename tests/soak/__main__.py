"""`make soak`: clients at random, over hundreds of upgrades and crashes, and nothing may be lost, duplicated or leaked.

A violation ends it at once, with the seed and the last that concerns the session. Clients and disturbances are drawn from the seed, but how
they interleave is the machine's to choose: another run with the same seed does about the same.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from processes import adopt_orphans, folder_for
from soak.course import Course, Progress
from soak.hosts import HOSTS, NotHere
from soak.model import Breach, Violation


def _report(progress: Progress) -> None:
    print(
        f"{progress.seconds:6.0f} s  {progress.operations:9,} operations  {progress.upgrades:5} upgrades  "
        f"{progress.failed:4} failed upgrades  {progress.kills:5} kills  {progress.held:4} sessions held  "
        f"RSS {progress.rss_kib / 1024:.1f} MiB",
        flush=True,
    )


def _summary(course: Course, violation: Violation | None) -> None:
    counts, progress = course.model.counts, course.progress()
    first, last = course.rss
    print(
        f"sessions: {counts['opened']:,} opened, {counts['held']:,} held, {counts['gone']:,} ended; "
        f"{course.killed} client processes killed\n"
        f"operations: {', '.join(f'{verb} {count:,}' for verb, count in course.operations.most_common())}\n"
        f"luod: {progress.upgrades} upgrades, {progress.failed} failed upgrades, {progress.kills} kills; "
        f"RSS first {first / 1024:.1f} MiB, last {last / 1024:.1f} MiB, growth {(last - first) / 1024:.1f} MiB"
    )
    found = {breach: int(violation is not None and violation.breach is breach) for breach in Breach}
    print(", ".join(f"{breach} {count}" for breach, count in found.items()))


def _explain(course: Course, violation: Violation, seed: int) -> None:
    print(f"\n{violation.breach}: {violation}", file=sys.stderr)
    known = course.model.get(violation.session_id)
    if known is not None:
        print(f"session {known.name!r} of uid {known.owner}, id {known.session_id.hex()}, is known to be {known.state}:", file=sys.stderr)
        for line in known.last:
            print(f"  {line}", file=sys.stderr)
    print(f"now {time.monotonic():.3f}, seed {seed}, luod: {course.disturber.now or 'nothing befalls it'}", file=sys.stderr)


def soak(host: str, *, seconds: float, seed: int, clients: int, pause_s: float) -> None:
    """One soak, with its output.

    Raises:
        Violation: luod broke a promise; it is explained already.
        NotHere: this machine can't have the host.
    """
    with folder_for() as folder, HOSTS[host](Path(folder)) as running:
        course = Course(running, seed=seed, clients=clients, pause_s=pause_s)
        try:
            course.run(seconds, _report)
        except Violation as violation:
            _summary(course, violation)
            _explain(course, violation, seed)
            raise
        _summary(course, None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make soak", description="Try for a long time whether luod loses, duplicates or leaks anything.")
    parser.add_argument("--host", choices=[*HOSTS, "all"], default="all", help="where luod runs (default: each in turn that can be here)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="how long, for each host (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="of all that is random (default: another one each time)")
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="at a time (default: %(default)s)")
    parser.add_argument(
        "--pause",
        type=float,
        default=0.3,
        metavar="N",
        help="mean seconds between two disturbances, 0: none (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    seed = options.seed if options.seed is not None else time.time_ns() % 1_000_000
    adopt_orphans()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for host in HOSTS if options.host == "all" else [options.host]:
        print(f"== {host}, seed {seed}", flush=True)
        try:
            soak(host, seconds=options.seconds, seed=seed, clients=options.clients, pause_s=options.pause)
        except NotHere as reason:
            print(reason)
            if options.host != "all":
                return 1
        except Violation:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
