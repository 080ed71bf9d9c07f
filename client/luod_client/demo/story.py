"""`luoctl demo`: the whole story on this machine, on real data, in seconds.

Theory. An old client holds what lives only as open fds: memory full of data, a listening socket and a connection with people waiting, a
device in mid-DMA. It gives them to luod and exits. Another process runs a virtual machine, whose guest counts; it stops the guest, gives
its RAM and its state to luod, and exits as well. luod is replaced by a fresh process. The guest goes on in a new process, and a new client
takes everything else back and goes on. Nobody who waited noticed, the device was never reset, no count is missing. Then luod and the client
let go, and the device is reset, once, as it must be.

Happy path: `tell` directs the roles and gathers what was seen; `compare` says what should have been seen; `show` prints it; 0.

Unhappy paths:
1. Something differs: it is in the table, 1.
2. The story can't be told (no daemon installed, a process fails, a refusal, no answer within `DEADLINE_S`): `Refusal`, and what the
   daemons said on stderr.
3. Ctrl-C, SIGTERM, SIGHUP: everything is cleaned up, 128 plus the signal's number.
4. Where /dev/kvm can't be used the guest is left out, which is said with the reason, and all else is as ever.
5. SIGKILL: the kernel kills the roles and the device; the daemon and its directory are left, since nobody is there to end them.

Invariants: the director never holds the device fd while anybody else counts on its last close. Needs no root, no systemd, no other luod;
works in a temporary runtime directory. On every way out but 5 the processes have ended and the directory is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from types import FrameType
from typing import Final

import attrs
from tabulate import tabulate

import luod_client
from luod_client.commands.output import write_json
from luod_client.demo import client
from luod_client.demo.checks import Answer, Seen, compare, measured
from luod_client.demo.data import MIB
from luod_client.demo.device import Device
from luod_client.demo.guest import Moved, Resumed, Stopped
from luod_client.demo.prctl import subreaper
from luod_client.demo.processes import Daemons, DemoFault, Role
from luod_protocol.errors import Code, LuodError, Refusal

DEADLINE_S: Final = 120
"""For the whole story. It takes about five seconds; slow machines may need more."""

_CELL: Final = 44
_LARGEST_MIB: Final = 64 * 1024

Say = Callable[[str], None]


class _Stopped(BaseException):
    """A signal that asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def _stoppable() -> Generator[Callable[[], None]]:
    """Turn the signals that end a process into exceptions: the first one only, and none once the function was called that is given."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)

    def no_more() -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)

    def stop(number: int, _: FrameType | None) -> None:
        no_more()
        if number == signal.SIGALRM:
            raise DemoFault(f"the demo was not done within {DEADLINE_S} s")
        raise _Stopped(number)

    before = {number: signal.signal(number, stop) for number in numbers}
    signal.alarm(DEADLINE_S)
    try:
        yield no_more
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


class _GuestStory:
    """The guest's part of the story: two processes, or none where no guest can run. `stack` ends them when it is closed.

    Attributes:
        left_out: why there is no guest; empty when there is one.
        moved: its way, once `resume` was called and unless it is left out.
    """

    def __init__(self, say: Say, runtime_dir: str, stack: contextlib.ExitStack) -> None:
        self.moved: Moved | None = None
        self._say = say
        self._old = stack.enter_context(Role("the guest's old process", "guest", ["before", runtime_dir]))
        # The new one is there in time: the guest's pause has no start of a Python interpreter in it.
        self._new = stack.enter_context(Role("the guest's new process", "guest", ["after", runtime_dir]))
        self._stopped: Stopped | None = None
        self.left_out = ""

    def begin(self) -> None:
        """Wait until it counts, or not."""
        self.left_out = self._old.hear("counting")["left_out"]
        if self.left_out:
            self._say(f"left out, a guest in a virtual machine: {self.left_out}")
        else:
            self._say(f"a guest in a virtual machine (pid {self._old.pid}) counts, in a register and in memfd RAM")

    def stop(self) -> None:
        """Have the old process stop and preserve it; that process is gone when this returns."""
        if self.left_out:
            return
        self._old.tell("stop")
        self._stopped = stopped = Stopped(**self._old.hear("stopped"))
        self._old.join()
        self._say(f"the guest is stopped at {stopped.count}; luod has its RAM and its vCPU's state, its process is gone")

    def resume(self) -> None:
        """Have the new process go on with it."""
        if self._stopped is None:
            return
        self._new.tell("resume")
        resumed = Resumed(**self._new.hear("resumed"))
        self._new.join()
        self.moved = Moved(stopped=self._stopped, resumed=resumed)
        self._say(f"the guest goes on in another process (pid {self._new.pid}) with {resumed.first}, and to {resumed.last}")


def tell(say: Say, runtime_dir: str, size: int, stack: contextlib.ExitStack) -> Seen:
    """Tell the story.

    Args:
        say: is told each step as it happens.
        runtime_dir: where luod shall be.
        size: of the memory, in bytes.
        stack: ends the processes when it is closed.

    Raises:
        LuodError: unhappy path 2.
    """
    daemons = stack.enter_context(Daemons(runtime_dir))
    control = stack.enter_context(luod_client.control(runtime_dir=runtime_dir))
    device = stack.enter_context(Device())
    status = control.status()
    say(f"luod (pid {status.pid}, generation {status.generation}) serves {runtime_dir}")

    with device.open() as fd:
        number = fd.fileno()
        old = stack.enter_context(Role("the old client", "client", ["before", runtime_dir, str(size), str(number)], fds=[number]))
    caller = stack.enter_context(Role("the accepted caller", "peer"))
    waiting = stack.enter_context(Role("the caller in the backlog", "peer"))
    looper = stack.enter_context(Role("the looping client", "looper", [runtime_dir]))
    guest = _GuestStory(say, runtime_dir, stack)
    filled = old.hear("filled")
    say(f"old client (pid {old.pid}): {size // MIB} MiB of real data, sha256 {filled['sha256']:.16}…, in {filled['seconds']:.2f} s")

    port = str(old.hear("listening")["port"])
    caller.tell(f"port {port}")
    caller_asked = caller.hear("asked")["question"]
    old.hear("accepted")
    waiting.tell(f"port {port}")
    waiting_asked = waiting.hear("asked")["question"]
    say(f"two callers ask on 127.0.0.1:{port}, one is accepted, one waits in the backlog; nobody answers yet")
    say(f"device (pid {device.pid}) in mid-DMA into the client's memory, counter {old.hear('dma')['counter']}")
    guest.begin()

    old.tell("finalize")
    finalized = old.hear("finalized")
    counters = [finalized["counter"]]
    say(f"luod has {finalized['entries']} fds in custody, which survive: {', '.join(finalized['survives'])}")
    old.join()
    alone = device.state(counter=counters[-1] + 1)
    counters.append(alone.counter)
    say(f"the old client is gone; device: counter {alone.counter}, resets {alone.resets}")

    guest.stop()

    looper.tell("loop")
    looper.hear("looping")
    upgraded = control.upgrade()
    predecessor_status = daemons.join_first()
    looper.tell("stop")
    looped = looper.hear("looped")
    replaced = device.state(counter=counters[-1] + 1)
    counters.append(replaced.counter)
    say(
        f"luod replaced: pid {upgraded.predecessor_pid} is gone, pid {upgraded.pid} (generation {upgraded.generation}) serves, "
        f"pause {upgraded.pause_us / 1000:.2f} ms; device: counter {replaced.counter}, resets {replaced.resets}"
    )

    guest.resume()
    new = stack.enter_context(Role("the new client", "client", ["after", runtime_dir]))
    retrieved = new.hear("retrieved")
    say(f"new client (pid {new.pid}) has {', '.join(retrieved['names'])}, in {retrieved['seconds'] * 1000:.2f} ms")
    new.hear("answered")
    answers = [
        Answer(question=question, pid=new.pid, **role.hear("answered"))
        for role, question in ((waiting, waiting_asked), (caller, caller_asked))
    ]
    say(f"both callers have their answer, after {answers[0].waited_s:.2f} s and {answers[1].waited_s:.2f} s")
    taken = new.hear("device")
    counters.append(taken["counter"])
    held = device.state()
    say(f"the device writes into the new client's memory: {taken['written']}, resets {held.resets}")
    compared = new.hear("compared")
    say(f"sha256 {compared['sha256']:.16}…; to copy the memory instead takes {compared['copy_s'] * 1000:.0f} ms, once")

    new.tell("finish")
    counters.append(new.hear("finished")["counter"])
    finished = device.state()
    left = control.list()
    say(f"finished, luod has let go; device: counter {finished.counter}, resets {finished.resets}")
    new.tell("close")
    new.hear("closed")
    closed = device.state()
    say(f"the new client has closed the device; resets {closed.resets}")
    new.tell("exit")
    for role in (new, caller, waiting, looper):
        role.join()

    return Seen(
        size=size,
        sha256_before=filled["sha256"],
        sha256_said=compared["sha256_said"],
        sha256_after=compared["sha256"],
        identity_before=filled["identity"],
        identity_after=compared["identity"],
        seals_asked=list(client.SEALS),
        seals_after=compared["seals"],
        backlog=answers[0],
        caller=answers[1],
        generation_before=status.generation,
        generation_after=control.status().generation,
        predecessor_status=predecessor_status,
        looper_fault=looped["fault"],
        looper_trips=looped["round_trips"],
        counters=counters,
        counter_asked=taken["counter"],
        written=taken["written"],
        resets_exit=alone.resets,
        resets_upgrade=replaced.resets,
        resets_retrieved=held.resets,
        resets_finish=finished.resets,
        resets_close=closed.resets,
        counter_close=closed.counter,
        guest=guest.moved,
        guest_left_out=guest.left_out,
        sessions_left=len(left),
        pause_s=upgraded.pause_us / 1e6,
        longest_s=looped["longest_s"],
        usual_s=looped["usual_s"],
        retrieve_s=retrieved["seconds"],
        copy_s=compared["copy_s"],
    )


def _cell(text: str) -> str:
    return text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"


def show(seen: Seen, seconds: float, *, as_json: bool) -> int:
    """Print what was seen, as a table or as one JSON document; the exit status: 0 when all is as it must be, else 1."""
    checks = compare(seen)
    ok = all(check.ok for check in checks)
    times = measured(seen)
    if as_json:
        left_out = {"guest": seen.guest_left_out} if seen.guest is None else {}
        write_json(
            {
                "ok": ok,
                "size": seen.size,
                "seconds": seconds,
                "measured": times,
                "checks": [attrs.asdict(check) for check in checks],
                "left_out": left_out,
            }
        )
        return 0 if ok else 1
    rows = [[check.what, _cell(check.expected), _cell(check.seen), "ok" if check.ok else "DIFFERS"] for check in checks]
    print()
    print(tabulate(rows, headers=["what", "expected", "seen", ""], disable_numparse=True))
    print()
    print(f"Pause of luod, from freeze to serving: {times['pause_s'] * 1000:.2f} ms.")
    print(
        f"Seen by a client that asks in a loop: {times['longest_round_trip_s'] * 1000:.2f} ms at worst, "
        f"{times['usual_round_trip_s'] * 1000:.2f} ms as a rule."
    )
    print(
        f"To copy the {seen.size // MIB} MiB once would have taken {times['copy_s'] * 1000:.0f} ms, "
        f"{times['copy_to_pause']:.0f} times the pause; luod passed the memory itself."
    )
    if seen.guest is None:
        print(f"Left out, a guest in a virtual machine: {seen.guest_left_out}.")
    else:
        print(
            f"The guest stood still for {times['guest_pause_s'] * 1000:.0f} ms, while luod was replaced; "
            f"to make its machine again took {times['guest_rebuild_s'] * 1000:.2f} ms of that."
        )
    print(f"{'Everything as it must be' if ok else 'NOT as it must be'}, in {seconds:.1f} s.")
    return 0 if ok else 1


def _mib(text: str) -> int:
    size = int(text)
    if not 1 <= size <= _LARGEST_MIB:
        raise argparse.ArgumentTypeError(f"{size} is not between 1 and {_LARGEST_MIB}")
    return size


def main(argv: Sequence[str]) -> int:
    """Run the demo; to be called in the main thread.

    Args:
        argv: without the program's name: `--size MiB`, `--json`.

    Returns:
        The exit status: 0, or 1 when something differs, or 128 plus a signal's number.

    Raises:
        Refusal: unhappy path 2.
    """
    parser = argparse.ArgumentParser(prog="luoctl demo", description="The whole story on this machine, on real data, in seconds.")
    parser.add_argument("--size", type=_mib, default=256, metavar="MIB", help="of the memory that is preserved, in MiB (default: 256)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, and nothing else")
    arguments = parser.parse_args(argv)
    began = time.monotonic()

    def say(text: str) -> None:
        if not arguments.json:
            print(f"{time.monotonic() - began:6.2f} s  {text}", flush=True)

    try:
        with (
            _stoppable() as no_more_signals,
            subreaper(),
            tempfile.TemporaryDirectory(prefix="luod-demo-") as runtime_dir,
            contextlib.ExitStack() as stack,
        ):
            try:
                seen = tell(say, runtime_dir, arguments.size * MIB, stack)
            finally:
                no_more_signals()
    except BrokenPipeError:
        raise  # who reads stdout has seen enough
    except (LuodError, OSError) as error:
        raise Refusal(Code.SYSTEM_ERROR, f"the demo can't go on: {error}") from error
    except _Stopped as stopped:
        print(f"luoctl demo: stopped by {stopped}; nothing is left behind", file=sys.stderr)
        return 128 + stopped.number
    return show(seen, time.monotonic() - began, as_json=arguments.json)
