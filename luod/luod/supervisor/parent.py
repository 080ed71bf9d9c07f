"""The parent's loop.

Theory. One round: wait, then take in what happened in an order that makes each part's facts complete. The dead are reaped before the
socket is read, and the socket is read to its end before a death counts: so all that a process had sent counts, and the pid in a datagram
can't be another's yet. Times that ran out come last: a sign of life that was only not read yet is none that was late.

Invariants: each part of a round is guarded on its own: an exception is logged, and the others go on. A phase without a main process that
should have one has lost it (`died`), however that came about; so a failed start is a death, too.
"""

from __future__ import annotations

import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Final

from luod.supervisor import message, processes
from luod.supervisor.channel import Channel, Datagram
from luod.supervisor.command import Order
from luod.supervisor.kernel import Closer, label, may_poll, say
from luod.supervisor.phases import Event, Phase, can, step
from luod.supervisor.store import Added, Store
from luod_protocol.fds import OwnedFd

MAX_DATAGRAMS: Final = 1024
"""How many are read in one round: signals and times must have their turn."""

PAUSE_S: Final = 0.1
"""After an exception, in seconds: it may come again at once."""

ALIVE: Final = (Phase.STARTING, Phase.READY, Phase.LEAVING, Phase.ABORTING, Phase.STOPPING)
"""The phases with a main process."""

FORWARDED: Final = signal.SIGHUP
ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
IGNORED: Final = (signal.SIGUSR1, signal.SIGUSR2)
"""Sent by mistake, they would end the parent."""


class Signals:
    """The signals that came, and a descriptor that wakes a poll(2) when one comes. PID 1 has no handlers but these."""

    def __init__(self) -> None:
        out, into = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._out, self._into = OwnedFd(out), OwnedFd(into)
        self._came: set[int] = set()
        signal.set_wakeup_fd(into, warn_on_full_buffer=False)
        # Who was started with nohup(1) goes on ignoring SIGHUP.
        forwarded = () if signal.getsignal(FORWARDED) is signal.SIG_IGN else (FORWARDED,)
        for number in (signal.SIGCHLD, *ENDING, *forwarded):
            signal.signal(number, self._note)
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        self.handled = (signal.SIGCHLD, *ENDING, *forwarded, *IGNORED)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.add(number)

    def fileno(self) -> int:
        """Readable when a signal came; borrowed."""
        return self._out.fileno()

    def take(self) -> set[int]:
        """The signals since the last call."""
        with suppress(BlockingIOError):
            os.read(self._out.fileno(), 65536)
        came, self._came = self._came, set()
        return came


class Main:
    """The main process, and a pidfd of it, which tells of its end also when somebody else is its parent."""

    def __init__(self, pid: int, pidfd: OwnedFd) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.ended = False
        self.code: int | None = None
        """As subprocess has it: the exit status, or minus the signal; None: somebody else was told."""

    def kill(self, number: int) -> None:
        """Send a signal, also to a process that is stopped."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd.fileno(), number)
            if number in (signal.SIGTERM, signal.SIGABRT):
                signal.pidfd_send_signal(self.pidfd.fileno(), signal.SIGCONT)


class BackOff:
    """The waits before starts: none at first, then `first_s`, doubled up to `longest_s`."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s, self._longest_s = first_s, longest_s
        self._next_s = 0.0

    def take(self) -> float:
        """The next wait, in seconds."""
        wait_s = self._next_s
        self._next_s = min(max(self._first_s, wait_s * 2), self._longest_s)
        return wait_s

    def reset(self) -> None:
        """The last one was well for a while."""
        self._next_s = self._first_s


class Parent:
    """See the package's head. It owns nothing that it is given; `run` is the whole life."""

    def __init__(self, order: Order, channel: Channel, signals: Signals, store: Store, now: Callable[[], float] = time.monotonic) -> None:
        self._order = order
        self._settings = order.settings
        self._channel = channel
        self._signals = signals
        self._store = store
        self._now = now
        self._closer = Closer()
        self._phase = Phase.WAITING
        self._due: float | None = now()
        self._back_off = BackOff(self._settings.back_off_s, self._settings.longest_back_off_s)
        self._back_off.take()
        self._main: Main | None = None
        self._was_ready = False
        self._ready_since: float | None = None
        self._told = False
        self._status = 0
        self._said = ""
        self._read_all = True
        self._readable: set[int] = set()

    def run(self) -> int:
        """Supervise until told to end. Returns the exit status."""
        parts = (
            self._wait,
            self._drop_hung_up,  # before anything is closed or opened: these are numbers
            self._take_signals,
            self._reap,
            self._receive,
            self._closer.close_rest,
            self._notice_death,
            self._notice_alone,
            self._notice_due,
        )
        while self._phase is not Phase.ENDED:
            for part in parts:
                try:
                    part()
                except Exception:
                    say(f"a bug, or a lack of something; going on: {traceback.format_exc()}")
                    time.sleep(PAUSE_S)
        return self._status

    # ---- a round, part by part

    def _wait(self) -> None:
        self._readable = set()
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        poll.register(self._signals.fileno(), select.POLLIN)
        if self._main is not None:
            poll.register(self._main.pidfd.fileno(), select.POLLIN)
        for fd in self._store.polled():
            poll.register(fd, 0)
        wait_ms = None if self._due is None else max(0.0, self._due - self._now()) * 1000 + 1
        self._readable = {fd for fd, _ in poll.poll(wait_ms)}

    def _drop_hung_up(self) -> None:
        hung_up = self._readable.intersection(self._store.polled())
        if hung_up:
            say(f"{len(hung_up)} stored descriptors hung up, and are dropped")
            self._closer.close(self._store.remove_numbers(hung_up))

    def _take_signals(self) -> None:
        came = self._signals.take()
        if FORWARDED in came:
            if self._phase is Phase.READY:
                self._signal_main(FORWARDED)
            else:  # it may have no handler yet, and would die
                say(f"{FORWARDED.name} is not passed on: the daemon is not ready")
        if came.intersection(ENDING):
            if len(self._store):
                say(f"told to end: {len(self._store)} stored descriptors (preserved sessions) end with it")
            self._stop()

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (end := os.waitpid(-1, os.WNOHANG))[0]:
                if self._main is not None and end[0] == self._main.pid:
                    self._main.ended, self._main.code = True, os.waitstatus_to_exitcode(end[1])
        if self._main is not None and self._main.pidfd.fileno() in self._readable:
            self._main.ended = True

    def _receive(self) -> None:
        self._read_all = False
        for _ in range(MAX_DATAGRAMS):
            datagram = self._channel.receive()
            if datagram is None:
                self._read_all = True
                return
            try:
                self._hear(datagram)
            finally:
                self._closer.close(datagram.fds)

    def _notice_death(self) -> None:
        if self._main is not None and self._main.ended and self._read_all:
            main, self._main = self._main, None
            main.pidfd.close()
            say(f"the daemon, process {main.pid}, {_ended(main.code)}{self._said}")
            if self._phase is Phase.STARTING and main.code is not None and main.code >= 0 and not self._was_ready and not len(self._store):
                say("it was never ready, and nothing is stored: giving up")
                self._told, self._status = True, main.code
        if self._main is None and self._phase in ALIVE:
            self._fire(Event.DIED)

    def _notice_alone(self) -> None:
        if self._main is None and can(self._phase, Event.ALONE) and not processes.left(self._channel.address):
            self._fire(Event.ALONE)

    def _notice_due(self) -> None:
        if self._due is not None and self._now() >= self._due and self._read_all:
            self._fire(Event.DUE)

    # ---- phases

    def _stop(self) -> None:
        self._told = True
        if can(self._phase, Event.STOP):
            self._fire(Event.STOP)

    def _fire(self, event: Event) -> None:
        before, self._phase = self._phase, step(self._phase, event)
        self._due = self._now() + PAUSE_S  # for a beginning that fails: no phase is for ever
        bound_s = self._enter(self._phase, before)
        self._due = None if bound_s is None else self._now() + bound_s
        if self._phase is Phase.WAITING and self._told:
            self._fire(Event.STOP)

    def _enter(self, phase: Phase, before: Phase) -> float | None:
        """Do what belongs to the beginning of `phase`. Returns its bound in seconds."""
        settings = self._settings
        match phase:
            case Phase.WAITING:
                return self._wait_for_start()
            case Phase.STARTING:
                self._start()
                return settings.start_s
            case Phase.READY:
                self._was_ready, self._ready_since = True, self._now()
                return settings.watchdog_s or None
            case Phase.LEAVING:
                return settings.stop_s
            case Phase.ABORTING:
                say("the daemon hangs, or says so (watchdog): SIGABRT")
                self._signal_main(signal.SIGABRT)
                return settings.abort_s
            case Phase.STOPPING:
                self._signal_main(signal.SIGTERM)
                return settings.stop_s
            case Phase.CLEARING:
                if before is Phase.STARTING and self._main is not None:
                    say(f"the daemon wasn't ready within {settings.start_s:g} s: SIGTERM")
                self._signal_all(signal.SIGTERM)
                return settings.rest_s
            case Phase.KILLING:
                say("processes of the daemon are still there: SIGKILL")
                self._signal_all(signal.SIGKILL)
                return settings.kill_s
            case Phase.ENDED:
                return None

    def _wait_for_start(self) -> float:
        if self._ready_since is not None and self._now() - self._ready_since >= self._settings.stable_s:
            self._back_off.reset()
        self._ready_since = None
        wait_s = self._back_off.take()
        if not self._told:
            if wait_s == self._settings.longest_back_off_s:
                say("THE DAEMON FAILS AGAIN AND AGAIN: see what it says. This parent goes on, for what is stored would end with it")
            kept = f"{len(self._store)} stored descriptors are kept for it" if len(self._store) else "nothing is stored"
            say(f"starting the daemon again in {wait_s:g} s; {kept}")
        return wait_s

    def _start(self) -> None:
        self._said = ""
        watchdog_us = int(self._settings.watchdog_s * 1e6)
        given = processes.Given(self._channel.address, watchdog_us, self._store.limit, self._store.listed())
        command = [*self._order.program, *([] if self._was_ready else self._order.first)]
        try:
            pid = processes.start(command, given, self._signals.handled)
            try:
                self._main = Main(pid, OwnedFd(os.pidfd_open(pid)))
            except BaseException:
                os.kill(pid, signal.SIGKILL)
                raise
        except OSError as error:
            say(f"no process can be made: {error.strerror}")

    def _signal_main(self, number: int) -> None:
        if self._main is not None:
            self._main.kill(number)

    def _signal_all(self, number: int) -> None:
        self._signal_main(number)
        for pid in processes.left(self._channel.address):
            # Nobody but this thread reaps it, so the pid is still its own.
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    # ---- what the daemon says

    def _hear(self, datagram: Datagram) -> None:
        if not datagram.whole:
            say(f"a message of process {datagram.pid} did not arrive whole (too long, or too many files are open), and is ignored")
            return
        said = message.parse(datagram.data)
        # A barrier is answered by closing its descriptor, as everything before it was done; anybody may ask.
        if said.barrier or self._main is None or datagram.pid != self._main.pid or datagram.uid not in (0, os.geteuid()):
            return
        if said.main_pid:
            self._follow(said.main_pid)
        for event, is_said in ((Event.SAID_READY, said.ready), (Event.SAID_STOPPING, said.stopping), (Event.SAID_TRIGGER, said.trigger)):
            if is_said and can(self._phase, event):
                self._fire(event)
        if said.ping:
            self._reset_watchdog()
        if said.status is not None:
            self._said = f"; it had last said: {said.status!a:.200}"
        if said.remove:
            self._closer.close(self._store.remove(said.name))
        if said.store:
            self._keep(datagram.fds, said.name, poll=said.poll)

    def _reset_watchdog(self) -> None:
        if self._phase is Phase.READY and self._due is not None:
            self._due = self._now() + self._settings.watchdog_s

    def _keep(self, fds: list[OwnedFd], name: str, *, poll: bool) -> None:
        for fd in fds:
            what = label(fd.fileno())
            if self._store.add(fd, name, what, poll=poll and may_poll(what)) is Added.FULL:
                say(f"{name!r} is not stored: the store is full with {len(self._store)} descriptors (the limit is {self._store.limit})")

    def _follow(self, pid: int) -> None:
        """Take `pid` for the main process, if it is one of ours. The last one goes on as an ordinary child."""
        if self._main is None or pid == self._main.pid:
            return
        try:
            pidfd = OwnedFd(os.pidfd_open(pid))
        except OSError as error:
            say(f"process {pid} can't be the main process: {error.strerror}")
            return
        # The pidfd first: if it lives after the look at its parents, they were its parents.
        if not processes.descends(pid, os.getpid()) or _is_over(pidfd):
            pidfd.close()
            say(f"process {pid} can't be the main process: it isn't alive below this one")
            return
        self._main.pidfd.close()
        self._main = Main(pid, pidfd)
        self._reset_watchdog()


def _is_over(pidfd: OwnedFd) -> bool:
    poll = select.poll()
    poll.register(pidfd.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _ended(code: int | None) -> str:
    if code is None:
        return "ended"
    return f"ended with status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
