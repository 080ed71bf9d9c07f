"""What luod costs, beside a bare C program that moves the same fds (benchmarks/c/fdmove.c). Run it with `make bench`.

All numbers are medians of interleaved repetitions in one run: look at the ratios, absolute times belong to this machine and this minute.

* store, retrieve: a fd to the daemon and back, a request each and 253 a request, beside a C client and a C keeper.
* upgrade: a client with an open session asks for `status` in a loop while luod is replaced. Its pause is the largest gap between two
  answers from before the call for the upgrade to a while after it, minus the median round trip. *At the switch* leaves out what happened
  while the old daemon served: it is the gap between the last answers of the old daemon and the first of the new one. Beside it, C's
  stop-and-copy: stop serving, send all fds to the successor, which serves.
* start: from the start of a process until it says something: Python that has imported trio, and luod when it serves. Of a reboot into
  another kernel (docs/kexec.md) that is the part that is luod's. Bytecode is there already, as in any installation.

Where it is allowed everything runs under SCHED_RR (sched(7)), the C program too: whatever else the machine does is then no part of the
numbers. It also keeps sender and receiver on two processors, which the C program gains most from.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import attrs
from tabulate import tabulate

import luod_client
from harness import Daemon, Talk, adopt_orphans, folder_for, spawn_client
from luod_protocol.fds import close_all, own
from luod_protocol.limits import MAX_FDS_PER_PACKET

PER_SESSION: Final = 1000
SINGLE: Final = 253
BATCHED: Final = 10 * MAX_FDS_PER_PACKET
EXPECTED_AT: Final = 10_000
"""Preserved fds from which on luod's pause, which doesn't depend on them, should be below a stop-and-copy of them."""
MOST_RATIO: Final = 1.5
MOST_RSS_KIB: Final = 32 * 1024
MOST_OPEN_FDS: Final = 200


@attrs.frozen(kw_only=True)
class Upgrade:
    """One upgrade as its client saw it; microseconds."""

    worst_us: float
    switch_us: float
    trip_us: float
    said_us: float

    @property
    def pause_us(self) -> float:
        return self.worst_us - self.trip_us


@attrs.frozen(kw_only=True)
class Copy:
    """A stop-and-copy in C as its client saw it; microseconds."""

    pause_us: float


@attrs.frozen(kw_only=True)
class Moving:
    """What a fd took to store and to retrieve; microseconds."""

    store_us: float
    retrieve_us: float


def fdmove(program: str, *args: object) -> dict[str, Any]:
    """What the C program measured."""
    done = subprocess.run([program, *map(str, args)], stdout=subprocess.PIPE, check=True, timeout=60)
    return dict(json.loads(done.stdout))


# ---- store and retrieve


def _memfds(count: int) -> dict[str, int]:
    return {f"fd-{number}": os.memfd_create("bench", os.MFD_CLOEXEC) for number in range(count)}


def move(daemon: Daemon, count: int, batch: int) -> Moving:
    """Store and retrieve `count` fds, `batch` a request."""
    fds = _memfds(count)
    names = list(fds)
    batches = [names[start : start + batch] for start in range(0, count, batch)]
    try:
        with luod_client.serialize("moved", runtime_dir=daemon.runtime_dir) as session:
            requests = [{name: fds[name] for name in each} for each in batches]
            start = time.perf_counter()
            for request in requests:
                session.preserve(request)
            stored = time.perf_counter() - start
            session.finalize()
    finally:
        close_all(own(fds.values()))
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as connection, connection.claim("moved") as claim:
        retrieved = 0.0
        for each in batches:
            start = time.perf_counter()
            back = claim.retrieve(*each)
            retrieved += time.perf_counter() - start
            close_all(back.values())
        claim.finish()
    return Moving(store_us=stored / count * 1e6, retrieve_us=retrieved / count * 1e6)


# ---- start


def first_line(command: Sequence[str]) -> float:
    """How long until a process says its first line on stderr, in milliseconds. It is ended then."""
    start = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        took = time.perf_counter() - start
        process.terminate()
        process.stderr.read()
    if not said or process.returncode not in (0, -signal.SIGTERM):
        raise AssertionError(f"{command} ended with {process.returncode}: {said!r}")
    return took * 1e3


def starts(folder: str) -> dict[str, Sequence[str]]:
    """What is started, by what it is called."""
    code = "import sys{}; print('there', file=sys.stderr, flush=True); sys.stdin.read()"
    python = [sys.executable, "-P", "-c"]
    return {
        "python": [*python, code.format("")],
        "python, import trio": [*python, code.format(", trio")],
        "luod": [sys.executable, "-P", "-m", "luod", "--runtime-dir", folder],
    }


# ---- upgrade


def fill(daemon: Daemon, count: int) -> None:
    """Have `count` memfds preserved, in sessions of `PER_SESSION`."""
    for start in range(0, count, PER_SESSION):
        fds = _memfds(min(PER_SESSION, count - start))
        try:
            with luod_client.serialize(f"held-{start}", runtime_dir=daemon.runtime_dir) as session:
                session.preserve(fds)
                session.finalize()
        finally:
            close_all(own(fds.values()))


def loop(talk: Talk, runtime_dir: str) -> None:
    """A client with an open session that asks for `status` until another generation has answered for a while."""
    import gc
    import statistics
    import time

    import luod_client

    with luod_client.serialize("looping", runtime_dir=runtime_dir) as session:
        generation = session.status().generation
        for _ in range(200):
            session.status()
        gc.collect()
        gc.disable()
        talk.tell()
        trips: list[float] = []
        switch, worst, before, last, more = 0.0, 0.0, 0.0, time.perf_counter(), 100
        while more:
            start = time.perf_counter()
            answered_by = session.status().generation
            end = time.perf_counter()
            gap = end - last
            trips.append(end - start)
            worst = max(worst, gap)
            if answered_by != generation:
                # An answer that the client had not read when the old daemon froze comes from the new one, ahead of its own first.
                switch = switch or max(gap, before)
                more -= 1
            before, last = gap, end
        talk.tell((worst * 1e6, switch * 1e6, statistics.median(trips) * 1e6))


def upgrade(daemon: Daemon) -> Upgrade:
    """Upgrade `daemon` under the eyes of a looping client."""
    with spawn_client(loop, daemon.runtime_dir, dev=False) as client:
        client.hear()
        upgraded = daemon.upgrade()
        worst, switch, trip = client.hear()
    return Upgrade(worst_us=worst, switch_us=switch, trip_us=trip, said_us=upgraded.pause_us)


def copy(program: str, count: int) -> Copy:
    """A stop-and-copy of `count` fds in C."""
    seen = fdmove(program, "handover", count)
    return Copy(pause_us=seen["gap_us"] - seen["round_trip_us"])


# ---- the whole


def real_time() -> bool:
    """Run this process, and all that it starts, ahead of everything else; whether that is allowed."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        return False
    return True


def rss_kib(pid: int) -> int:
    """VmRSS of a process (proc(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


@attrs.frozen(kw_only=True)
class Bound:
    """A number and what it should be."""

    what: str
    value: str
    expected: str
    met: bool


class Bench:
    """One run; `bounds` collects what was expected."""

    def __init__(self, program: str, repetitions: int, counts: Sequence[int], options: Sequence[str]) -> None:
        self._program = program
        self._repetitions = repetitions
        self._counts = counts
        self._options = options
        self.bounds: list[Bound] = []

    def _daemon(self) -> Daemon:
        return Daemon(options=self._options, dev=False)

    def starting(self) -> None:
        """Process start to serving."""
        with folder_for() as folder:
            commands = starts(folder)
            for command in commands.values():
                first_line(command)
            seen: dict[str, list[float]] = {what: [] for what in commands}
            for _ in range(self._repetitions):
                for what, command in commands.items():
                    seen[what].append(first_line(command))
        trio = median(seen["python, import trio"])
        rows = [[what, f"{median(took):.0f}", f"{median(took) / trio:.2f}"] for what, took in seen.items()]
        heads = ["milliseconds to the first line", "", "/ import trio"]
        print(tabulate(rows, headers=heads, colalign=("left", "right", "right"), disable_numparse=True))

    def moving(self) -> None:
        """Store and retrieve, single and batched."""
        rows: list[list[str]] = []
        with self._daemon() as daemon:
            move(daemon, SINGLE, 1)
            for batch, count in ((1, SINGLE), (MAX_FDS_PER_PACKET, BATCHED)):
                ours: list[Moving] = []
                theirs: list[Moving] = []
                for _ in range(self._repetitions):
                    ours.append(move(daemon, count, batch))
                    theirs.append(Moving(**fdmove(self._program, "pass", count, batch)))
                for what, us, them in (
                    ("store", median(each.store_us for each in ours), median(each.store_us for each in theirs)),
                    ("retrieve", median(each.retrieve_us for each in ours), median(each.retrieve_us for each in theirs)),
                ):
                    rows.append([f"{what}, {batch} a request", f"{us:.2f}", f"{them:.2f}", f"{us / them:.1f}"])
        print(tabulate(rows, headers=["microseconds a fd", "luod", "C", "luod / C"], colalign=("left", "right", "right", "right")))

    def upgrading(self) -> None:
        """The pause of an upgrade by the number of preserved fds, and what a daemon takes."""
        with ExitStack() as stack:
            daemons = {count: stack.enter_context(self._daemon()) for count in self._counts}
            idle = rss_kib(daemons[self._counts[0]].pid)
            for count, daemon in daemons.items():
                fill(daemon, count)
            most = self._counts[-1]
            held = daemons[most].status()
            full = rss_kib(held.pid)
            gc.collect()
            ours: dict[int, list[Upgrade]] = {count: [] for count in self._counts}
            theirs: dict[int, list[Copy]] = {count: [] for count in self._counts}
            for _ in range(self._repetitions):
                for count, daemon in daemons.items():
                    ours[count].append(upgrade(daemon))
                    theirs[count].append(copy(self._program, count))
            after = rss_kib(daemons[most].pid)
        pause = {count: median(each.pause_us for each in seen) for count, seen in ours.items()}
        switch = {count: median(each.switch_us - each.trip_us for each in seen) for count, seen in ours.items()}
        said = {count: median(each.said_us for each in seen) for count, seen in ours.items()}
        trip = {count: median(each.trip_us for each in seen) for count, seen in ours.items()}
        bare = {count: median(each.pause_us for each in seen) for count, seen in theirs.items()}
        none = self._counts[0]
        rows = [
            [
                f"{count:,}",
                f"{pause[count] / 1e3:.2f}",
                f"{switch[count] / 1e3:.2f}",
                f"{said[count] / 1e3:.2f}",
                f"{trip[count] / 1e3:.2f}",
                f"{bare[count] / 1e3:.2f}",
                f"{pause[count] / pause[none]:.2f}",
                f"{pause[count] / bare[count]:.2f}",
            ]
            for count in self._counts
        ]
        heads = [
            "preserved fds",
            "pause",
            "at the switch",
            "luod's own",
            "round trip",
            "C stop-and-copy",
            f"pause / {none}",
            "pause / C",
        ]
        print(tabulate(rows, headers=heads, colalign=("right",) * len(heads), disable_numparse=True))
        print(f"milliseconds; medians of {self._repetitions}")
        self._expect(f"pause with {most:,} / with {none:,}", pause[most] / pause[none], MOST_RATIO, ".2f")
        if most >= EXPECTED_AT:
            self._expect(f"pause with {most:,}, ms; C's stop-and-copy", pause[most] / 1e3, bare[most] / 1e3, ".2f")
        self._expect("idle RSS, MiB", idle / 1024, MOST_RSS_KIB / 1024, ".1f")
        self._expect(f"open descriptors with {most:,} preserved", held.open_fds, MOST_OPEN_FDS, ".0f")
        print(f"RSS with {most:,} preserved: {full / 1024:.1f} MiB, after {self._repetitions} upgrades {after / 1024:.1f} MiB")

    def _expect(self, what: str, value: float, most: float, form: str) -> None:
        self.bounds.append(Bound(what=what, value=format(value, form), expected=f"at most {most:{form}}", met=value <= most))


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure luod beside a bare C program. Numbers are medians of interleaved repetitions.")
    parser.add_argument("--fdmove", metavar="PROGRAM", required=True, help="the C program, benchmarks/c/fdmove.c compiled")
    parser.add_argument("--repetitions", metavar="N", type=int, default=9, help="how often each thing is measured (default: %(default)s)")
    parser.add_argument(
        "--counts", metavar="N,N", default="0,100,1000,10000", help="how many fds are preserved in an upgrade (default: %(default)s)"
    )
    parser.add_argument("--ordinary", action="store_true", help="don't run under SCHED_RR, even where it is allowed (CAP_SYS_NICE)")
    parser.add_argument("--check", action="store_true", help="exit with 1 when something isn't as expected")
    options = parser.parse_args(argv)
    counts = sorted({int(count) for count in options.counts.split(",")})
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        os.environ.pop(name, None)
    adopt_orphans()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if options.ordinary or not real_time():
        print("not under SCHED_RR: whatever else this machine does is part of the numbers\n")
    with folder_for() as folder:
        config = Path(folder, "luod.toml")
        # An ordinary user's luod takes 512 fds; here it is alone, and RLIMIT_NOFILE decides.
        config.write_text(f"[limits]\nmax_preserved_fds = {max(counts) + BATCHED}\n")
        bench = Bench(options.fdmove, options.repetitions, counts, ["--config", str(config)])
        try:
            bench.starting()
            print()
            bench.moving()
            print()
            bench.upgrading()
        except luod_client.Refusal as refusal:
            print(f"bench: {refusal.message}\nbench: run it as root, or with a higher RLIMIT_NOFILE", file=sys.stderr)
            return 1
    print()
    rows = [[bound.what, bound.value, bound.expected, "yes" if bound.met else "NO"] for bound in bench.bounds]
    print(tabulate(rows, headers=["expected", "is", "should be", "met"], colalign=("left", "right", "left", "left"), disable_numparse=True))
    return 1 if options.check and not all(bound.met for bound in bench.bounds) else 0


if __name__ == "__main__":
    sys.exit(main())
