#!/usr/bin/env python3
"""A KVM guest that changes its process in mid-count. See README.md beside this; `--help` for the arguments."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile

try:
    from tabulate import tabulate

    import luod_client
    from luod_client.demo import guest, kvm
    from luod_client.demo.checks import compare_guest
    from luod_client.demo.prctl import subreaper
    from luod_client.demo.processes import Daemons
except ImportError as error:
    sys.exit(f"{error}: this needs luod: `pip install .` in luod's folder, or use .venv/bin/python there, which `make demo` makes")


def say(text: str) -> None:
    """A line, to whoever looks on, from this process."""
    print(f"process {os.getpid()}: {text}", flush=True)


def preserve(session: str, runtime_dir: str | None, counts: int, require: list[str]) -> bool:
    """Run a new guest for `counts` counts, stop it, and give it into luod's custody."""
    with guest.boot() as vm:
        say("a guest counts, in a register and in its RAM, a memfd:")
        for _ in range(counts):
            count = vm.step()
            if count <= 3:
                say(f"  {count}")
        stopped = guest.stop(vm, session=session, runtime_dir=runtime_dir, require=require)
    say(f"  … {stopped.count}. Stopped.")
    say(f"luod has its RAM and its vCPU's {kvm.STATE_BYTES} bytes of state, as session {session!r}. This process ends.")
    return not stopped.wrong


def resume(session: str, runtime_dir: str | None, counts: int) -> bool:
    """Take the guest back, let it go on for `counts` counts, and show whether anything differs."""
    moved = guest.go_on(session=session, runtime_dir=runtime_dir, counts=counts)
    resumed = moved.resumed
    say("the guest is back, in a new virtual machine on the same RAM, and goes on:")
    say(f"  {resumed.first}")
    say(f"  … {resumed.last}")
    checks = compare_guest(moved)
    rows = [[check.what, f"{check.expected:.20}", f"{check.seen:.20}", "ok" if check.ok else "DIFFERS"] for check in checks]
    print("", tabulate(rows, headers=["what", "expected", "seen", ""], disable_numparse=True), "", sep="\n")
    pause_ms, rebuild_ms = resumed.pause_s * 1000, resumed.rebuild_s * 1000
    print(f"The guest stood still for {pause_ms:.0f} ms; to make its machine again took {rebuild_ms:.2f} ms of that.", flush=True)
    return all(check.ok for check in checks)


def _served(runtime_dir: str | None) -> bool:
    """Whether a luod is there for this user. One that was asked for must be."""
    try:
        luod_client.deserialize(runtime_dir=runtime_dir).close()
    except (luod_client.NoDaemon, luod_client.Refusal):
        if runtime_dir is not None:
            raise
        return False
    return True


def story(session: str, runtime_dir: str | None, counts: int, require: list[str]) -> bool:
    """Both halves, each in a process of its own, and a luod for them if there is none; that one is replaced in between."""
    if why := kvm.works():
        raise kvm.KvmFault(why)

    def half(*arguments: str) -> bool:
        where = [] if runtime_dir is None else ["--runtime-dir", runtime_dir]
        common = ["--session", session, "--counts", str(counts), *where]
        return subprocess.run([sys.executable, __file__, *common, *arguments], check=False).returncode == 0

    with contextlib.ExitStack() as stack:
        ours = not _served(runtime_dir)
        if ours:
            stack.enter_context(subreaper())
            runtime_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="luod-kvm-"))
            stack.enter_context(Daemons(runtime_dir))
            print(f"no luod is running: one is started, in {runtime_dir}", flush=True)
        if not half(*(word for each in require for word in ("--require", each)), "preserve"):
            return False
        if ours:
            with luod_client.control(runtime_dir=runtime_dir) as control:
                upgraded = control.upgrade()
            print(f"luod is replaced: process {upgraded.predecessor_pid} by process {upgraded.pid}", flush=True)
        return half("resume")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A KVM guest that changes its process in mid-count.",
        epilog="Exit status: 0 done, 1 a step failed or something differs (it is said what), 2 usage.",
    )
    parser.add_argument(
        "half",
        nargs="?",
        choices=("preserve", "resume"),
        help="only run a guest, stop it and leave it with luod; or only take it back and go on. Without it: both, one after the other",
    )
    parser.add_argument("--runtime-dir", metavar="DIR", help="where luod is (default: the usual place; for both, else one is started)")
    parser.add_argument("--session", default="kvm-guest", metavar="NAME", help="its session in luod (default: %(default)s)")
    parser.add_argument("--counts", type=int, default=10_000, metavar="N", help="how far to count, in each process (default: %(default)s)")
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="WHAT",
        help="what the preserved guest must survive, as `luoctl capabilities` names it; may be repeated",
    )
    arguments = parser.parse_args()
    if arguments.counts < 1:
        parser.error(f"--counts {arguments.counts}: at least 1")
    return arguments


def main() -> int:
    """Do what the command line says; the exit status."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    arguments = _arguments()
    session, runtime_dir, counts = arguments.session, arguments.runtime_dir, arguments.counts
    try:
        match arguments.half:
            case "preserve":
                ok = preserve(session, runtime_dir, counts, arguments.require)
            case "resume":
                ok = resume(session, runtime_dir, counts)
            case _:
                ok = story(session, runtime_dir, counts, arguments.require)
                print("Everything as it must be." if ok else "NOT as it must be.")
    except luod_client.LuodError as error:
        print(f"{os.path.basename(__file__)}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
