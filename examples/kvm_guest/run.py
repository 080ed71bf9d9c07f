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
from collections.abc import Generator, Sequence

try:
    import attrs
    from tabulate import tabulate

    import luod_client
    from luod_client import cli
    from luod_client.demo import guest, kvm
    from luod_client.demo.checks import compare_guest
    from luod_client.demo.lab import add_kexec_option, play_a_kexec
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
    how = " (known to a second: the next kernel's clock begins with a whole one)" if moved.to_another_kernel else ""
    print(f"The guest stood still for {pause_ms:.0f} ms{how}; to make its machine again took {rebuild_ms:.2f} ms of that.", flush=True)
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


@attrs.frozen(kw_only=True)
class Story:
    """Both halves, each in a process of its own, and a luod for them if there is none.

    Args:
        session: its name.
        runtime_dir: where luod is; None: in the usual place, or nowhere yet.
        counts: how far to count, in each process.
        require: what the preserved guest must survive.
    """

    session: str
    runtime_dir: str | None
    counts: int
    require: Sequence[str]

    def over_an_upgrade(self) -> bool:
        """One after the other; a luod that was started here is replaced in between."""
        with self._luod() as (directory, ours):
            if not self._preserve(directory, self.require):
                return False
            if ours:
                with luod_client.control(runtime_dir=directory) as control:
                    upgraded = control.upgrade()
                print(f"luod is replaced: process {upgraded.predecessor_pid} by process {upgraded.pid}", flush=True)
            return self._half(directory, "resume")

    def before_a_kexec(self) -> bool:
        """Preserve a guest, and go to the kernel that is loaded. Returns only when something fails."""
        with self._luod() as (directory, _):
            if not self._preserve(directory, [*self.require, "kexec"]):
                return False
            print("the process has ended, and the machine goes to the next kernel: luoctl kexec run --now", flush=True)
            cli.main([*_where(directory), "kexec", "run", "--now"])
            return False

    def after_a_kexec(self) -> bool:
        """In the next kernel: take the guest back."""
        with self._luod() as (directory, _):
            with luod_client.control(runtime_dir=directory) as control:
                status, update = control.status(), control.update()
            said = f"{update.arrived} session{'' if update.arrived == 1 else 's'} came from the last kernel"
            print(f"the next kernel: luod is process {status.pid}, of generation {status.generation}; {said}", flush=True)
            if not self._half(directory, "resume"):
                return False
            steps = ", ".join(f"{name} {us / 1000:.0f} ms" for name, us in update.steps_us.items())
            print(f"Of that, the way through the kexec: {steps}.", flush=True)
            return True

    @contextlib.contextmanager
    def _luod(self) -> Generator[tuple[str | None, bool]]:
        """Where luod is, and whether it was started here."""
        if why := kvm.works():
            raise kvm.KvmFault(why)
        if _served(self.runtime_dir):
            yield self.runtime_dir, False
            return
        with subreaper(), tempfile.TemporaryDirectory(prefix="luod-kvm-") as directory, Daemons(directory):
            print(f"no luod is running: one is started, in {directory}", flush=True)
            yield directory, True

    def _preserve(self, directory: str | None, require: Sequence[str]) -> bool:
        return self._half(directory, *(word for each in require for word in ("--require", each)), "preserve")

    def _half(self, directory: str | None, *arguments: str) -> bool:
        common = ["--session", self.session, "--counts", str(self.counts), *_where(directory)]
        return subprocess.run([sys.executable, __file__, *common, *arguments], check=False).returncode == 0


def _where(directory: str | None) -> list[str]:
    return [] if directory is None else ["--runtime-dir", directory]


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
    add_kexec_option(parser)
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
    if arguments.kexec and arguments.half:
        parser.error(f"--kexec {arguments.kexec} goes without {arguments.half!r}")
    return arguments


def _judged(ok: bool) -> bool:
    print("Everything as it must be." if ok else "NOT as it must be.")
    return ok


def main() -> int:
    """Do what the command line says; the exit status."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    arguments = _arguments()
    session, runtime_dir, counts = arguments.session, arguments.runtime_dir, arguments.counts
    story = Story(session=session, runtime_dir=runtime_dir, counts=counts, require=arguments.require)
    try:
        match arguments.kexec or arguments.half:
            case "preserve":
                ok = preserve(session, runtime_dir, counts, arguments.require)
            case "resume":
                ok = resume(session, runtime_dir, counts)
            case "lab":
                play_a_kexec(__file__, ["--counts", str(counts)])
            case "before":
                ok = story.before_a_kexec()
            case "after":
                ok = _judged(story.after_a_kexec())
            case _:
                ok = _judged(story.over_an_upgrade())
    except luod_client.LuodError as error:
        print(f"{os.path.basename(__file__)}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
