"""One soak: clients at random, disturbances at random, and the model that knows what must exist.

Theory. This thread hears what the clients tell and keeps the model; again and again it asks luod what there is. Whatever was told before it
asked must be true of the answer, unless something told before the answer came changed it: so it hears everything, asks, hears everything
again, and then compares. The disturber has a thread of its own.

Happy path: `run` for the given time, then `_settle`: everybody stops, what is unknown is asked again, and each session that must be there
is taken back, looked at and finished. Then luod must hold nothing.

Unhappy paths:
1. A promise is broken: `Violation`.
2. A client's connection ends: a violation too, unless luod crashed while it had it.
3. luod doesn't answer this thread in a crash: it asks again later.
"""

from __future__ import annotations

import ast
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs

import luod_client
from luod_client import Code, Disconnected, NoDaemon, Refusal
from luod_protocol.errors import ProtocolFault
from luod_protocol.fds import close_all
from luod_protocol.records import SessionInfo
from processes import LIMIT_S
from soak.asking import Again
from soak.client import EXPECTED
from soak.contents import fault
from soak.crew import THREADS, Crew
from soak.disturber import Disturber
from soak.hosts import Host, status
from soak.model import LIMIT_S as LIMIT_NOTICED_S
from soak.model import Asker, Breach, Event, Known, Model, State, Violation
from soak.peers import Peers
from soak.plan import fault as described_wrong
from soak.plan import plan

T = TypeVar("T")

LOOK_S: Final = 0.25
"""How often luod is asked what there is, in seconds."""
REPORT_S: Final = 5.0
"""How often is said how far it is, in seconds."""
_GONE: Final = (Disconnected, NoDaemon, ProtocolFault)


class NotNow(Exception):
    """luod didn't answer, which a crash explains."""


@attrs.frozen(kw_only=True)
class Progress:
    """How far a soak is; RSS in KiB."""

    seconds: float
    operations: int
    upgrades: int
    failed: int
    kills: int
    held: int
    rss_kib: int


class Course:
    """See the module's text.

    Args:
        host: where luod runs.
        seed: of all that is random.
        clients: how many there are at a time.
        pause_s: the mean pause between two disturbances, in seconds; 0: none.
        enough: sessions from which on clients rather take than make.

    Attributes:
        model: what must exist.
        operations: how many requests there were, by verb.
        killed: client processes that were killed.
        rss: the first and the last RSS of luod, in KiB.
    """

    def __init__(self, host: Host, *, seed: int, clients: int = 16, pause_s: float = 0.3, enough: int = 60) -> None:
        self.model = Model()
        self.operations = Counter[str]()
        self.killed = 0
        self.rss: tuple[int, int] = (0, 0)
        self.disturber = Disturber(host, seed, pause_s)
        self._host = host
        self._seed = seed
        self._dice = random.Random(f"{seed} course")
        self._crew = Crew(host, seed=seed, processes=max(1, clients // THREADS), enough=enough)
        self._again = Again(self.model, host.runtime_dir, self._hear_all)
        self._peers = Peers(LIMIT_NOTICED_S)
        self._dead: dict[int, float] = {}
        self._answers = deque[tuple[float, int, int]](maxlen=200)
        self._pids: dict[int, int] = {}
        self._began = time.monotonic()

    # ---- the whole

    def run(self, seconds: float, report: Callable[[Progress], None], *, disturbances: int = 0) -> None:
        """Soak for so long, and see that everything is as it must be.

        Args:
            report: called now and then.
            disturbances: go on until there were so many, and something was held.

        Raises:
            Violation: it isn't.
        """
        with ExitStack() as stack:
            stack.callback(self._peers.close)
            stack.enter_context(self._crew)
            stack.callback(self.disturber.stop)
            self.disturber.start()
            self._began = time.monotonic()
            looked = reported = killed = self._began
            while time.monotonic() < self._began + seconds or not self._is_enough(disturbances):
                self._crew.man()
                self._hear_all(0.05)
                now = time.monotonic()
                if now > looked + LOOK_S:
                    looked = now
                    self._look()
                if now > killed + self._dice.random() * 3:
                    killed = now
                    self._crew.end(self._dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
                if now > reported + REPORT_S:
                    reported = now
                    self._weigh()
                    report(self.progress())
                self._check_disturber()
            self._settle()
            self._weigh()
            report(self.progress())

    def _weigh(self) -> None:
        with suppress(OSError, AssertionError, luod_client.LuodError):  # in a crash there may be none
            rss = rss_kib(self._host.pid())
            self.rss = (self.rss[0] or rss, rss)

    def _is_enough(self, disturbances: int) -> bool:
        return self.disturber.counts.total() >= disturbances and (not disturbances or self.model.counts["held"] > 0)

    def progress(self) -> Progress:
        """How far it is."""
        counts = self.disturber.counts
        return Progress(
            seconds=time.monotonic() - self._began,
            operations=self.operations.total(),
            upgrades=counts["upgrades"],
            failed=counts["failed"],
            kills=counts["kills"],
            held=sum(known.state is State.HELD for known in self.model),
            rss_kib=self.rss[1],
        )

    def _check_disturber(self) -> None:
        if self.disturber.failure is not None:
            raise Violation(Breach.WRONG, f"{self.disturber.now}: {self.disturber.failure!r}") from self.disturber.failure

    # ---- what clients tell

    def _hear_all(self, limit_s: float = 0.0) -> None:
        """Hear all that was told by now, or in so many seconds."""
        for packet in self._crew.tellings(limit_s):
            with packet:
                what, asker, asked_at, session_id, values = ast.literal_eval(packet.data.decode())
                if what == "peers":
                    for name, fd in zip(values[0], packet.take_fds(), strict=True):
                        self._peers.add(session_id, name, fd)
                else:
                    self._heard(what, asker, asked_at, session_id, values)

    def _heard(self, what: str, asker: Asker, asked_at: float, session_id: bytes, values: tuple[Any, ...]) -> None:
        model = self.model
        if what == "open?":
            model.open(session_id, self._crew.member(asker).uid, asker)
        model.note(session_id, f"client {asker[0]}.{asker[1]}: {what} {values if values else ''}"[:300])
        if what.endswith("?"):
            self.operations[what[:-1]] += 1
        member = self._crew.member(asker)
        known = model.get(session_id)
        match what:
            case "hello":
                member.pid, member.uid = values
                self._dead.pop(member.pid, None)
            case "ended":
                self._ended(asker[0], *values)
            case "open":
                model.check_name_was_free(session_id, asked_at)
            case "unpreserve":
                self._peers.leave(session_id, values[0])
            case "left":
                model.step(session_id, Event.LEFT)
            case "cancel":
                model.step(session_id, Event.ABSENT)
            case "finalize?":
                model.step(session_id, Event.FINALIZING)
            case "finalize":
                model.step(session_id, Event.FINALIZED)
            case "claim" | "show":
                model.check_found(session_id, asked_at)
                model.check_holders(session_id, dict(values[0]), asked_at, self._dead)
            case "retrieve?" if known is not None:
                known.retrieving.add(member.pid)
            case "retrieve" if known is not None:
                known.retrieved.setdefault(member.pid, time.monotonic())
            case "finish?" | "discard?":
                model.step(session_id, Event.ENDING, asker, what[:-1])
            case "finish" | "discard":
                model.step(session_id, Event.ENDED, asker)
            case "status":
                self._check_generation(asked_at, *values)
            case "refused":
                self._refused(asker, asked_at, session_id, *values)
            case "lost":
                verb, connected_at, why = values
                if not self.disturber.explains(connected_at, time.monotonic()):
                    raise Violation(Breach.WRONG, f"{verb}: a client lost its connection, and luod has not crashed: {why}", session_id)
                model.orphan(asker)
            case "broken":
                raise Violation(Breach.WRONG, values[0], session_id)
            case _:
                pass
        self._expect_ends()

    def _ended(self, number: int, sig: int, code: int) -> None:
        if code not in (0, -sig):
            raise Violation(Breach.WRONG, f"client process {number} ended with {code}")
        self._dead[self._crew.buried(number)] = time.monotonic()
        self.killed += sig == signal.SIGKILL
        for place in range(THREADS):
            self.model.orphan((number, place))

    def _refused(self, asker: Asker, asked_at: float, session_id: bytes, verb: str, code: str, message: str) -> None:
        refused = Code(code)
        if refused not in EXPECTED.get(verb, ()):
            raise Violation(Breach.WRONG, f"{verb} was refused: {code}: {message}", session_id)
        if refused in (Code.NO_SUCH_SESSION, Code.SESSION_FINISHED, Code.OUT_OF_ORDER):
            self.model.check_missing(session_id, asked_at)
        if verb == "open":
            self.model.step(session_id, Event.ABSENT)
        elif verb == "discard":
            self.model.step(session_id, Event.NOT_ENDED, asker)

    def _expect_ends(self) -> None:
        for session_id in self.model.take_ended():
            self._peers.leave(session_id)

    def _check_generation(self, asked_at: float, generation: int, pid: int) -> None:
        """Generations only go up: an answer is not of an older luod than one that came before it was asked for."""
        for answered_at, before, before_pid in self._answers:
            if answered_at >= asked_at:
                continue
            if generation < before or (generation == before and pid != before_pid):
                text = f"process {pid}, generation {generation}, answers after process {before_pid}, generation {before}"
                raise Violation(Breach.DUPLICATED, text)
        if self._pids.setdefault(generation, pid) != pid:
            raise Violation(Breach.DUPLICATED, f"processes {self._pids[generation]} and {pid} are both generation {generation}")
        self._answers.append((time.monotonic(), generation, pid))

    # ---- what luod says

    def _asking(self, ask: Callable[[], T]) -> T:
        since = time.monotonic()
        try:
            return ask()
        except _GONE as error:
            if self.disturber.explains(since, time.monotonic()):
                raise NotNow from None
            raise Violation(Breach.WRONG, f"luod doesn't answer, and it has not crashed: {error}") from error

    def _list(self) -> tuple[SessionInfo, ...]:
        with luod_client.deserialize(runtime_dir=self._host.runtime_dir) as looker:
            return looker.list()

    def _look(self) -> None:
        """Ask luod what there is, and hold it against the model."""
        with suppress(NotNow):
            self._hear_all()
            asked_at, asked = self.model.changes, time.monotonic()
            now = self._asking(lambda: status(self._host.runtime_dir))
            listed = self._asking(self._list)
            self._hear_all()
            self._check_generation(asked, now.generation, now.pid)
            self.model.check_list(listed, asked_at, self._host.require)
            self._expect_ends()
            self._look_at_peers()
            self._ask_again()

    def _look_at_peers(self) -> None:
        asked_at = self.model.changes

        def allowed(session_id: bytes) -> bool:
            known = self.model.get(session_id)
            return known is None or known.state is not State.HELD or known.since > asked_at

        closed = list(self._peers.look(allowed))
        if closed:
            self._hear_all()
            for session_id, name in closed:
                if not allowed(session_id):
                    raise Violation(Breach.LOST, f"nobody holds entry {name!r} any more", session_id)
        self._peers.check(self.disturber.calm_since)

    def _ask_again(self) -> None:
        """Find out what became of requests whose answer nobody got."""
        for session_id, verb in self.model.unknown():
            self._asking(lambda session_id=session_id, verb=verb: self._again.ask(session_id, verb))  # type: ignore[misc]
            self._expect_ends()

    # ---- the end

    def _settle(self) -> None:
        self.disturber.stop()
        self._check_disturber()
        self._stop_clients()
        self._until(lambda: not self.model.unknown() and not self._unsettled(), "what is unknown")
        taken = [known for known in self.model if known.state is State.HELD]
        self._settled(len(taken))
        for known in taken:
            self._take_back(known)
        self._expect_ends()
        self._until(lambda: not len(self._peers), "the end of all entries")
        self._settled(0)

    def _settled(self, sessions: int) -> None:
        try:
            self._host.settled(sessions)
        except AssertionError as error:
            raise Violation(Breach.LEAKED, str(error)) from error

    def _stop_clients(self) -> None:
        """Half of them by a kill, in the middle of what they do."""
        self._crew.end_all((signal.SIGKILL, signal.SIGTERM))
        deadline = time.monotonic() + LIMIT_S
        while self._crew.size:
            self._hear_all(0.02)
            if time.monotonic() > deadline:
                raise Violation(Breach.WRONG, f"{self._crew.size} client processes wait for ever")

    def _unsettled(self) -> bool:
        return any(known.state not in (State.HELD, State.GONE) for known in self.model)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 2 * LIMIT_S
        while not condition():
            if time.monotonic() > deadline:
                known = next((each for each in self.model if each.state is not State.HELD), None)
                raise Violation(Breach.LEAKED, f"not settled: {what}", known.session_id if known else b"")
            self._look()
            time.sleep(0.02)

    def _take_back(self, known: Known) -> None:
        try:
            with (
                luod_client.deserialize(runtime_dir=self._host.runtime_dir) as looker,
                looker.claim(session_id=known.session_id, force=True) as claim,
            ):
                whole = plan(known.session_id)
                wrong = described_wrong(whole, claim.info, claim.metadata, list(claim.entries.values()))
                fds = claim.retrieve() if claim.entries else {}
                try:
                    wrong = wrong or next(self._faults(whole.kept, claim, fds), "")
                finally:
                    close_all(fds.values())
                if wrong:
                    raise Violation(Breach.WRONG, wrong, known.session_id)
                claim.finish()
        except Refusal as refusal:
            raise Violation(Breach.LOST, f"it can't be taken back: {refusal.message}", known.session_id) from None
        self.model.step(known.session_id, Event.ENDING)
        self.model.step(known.session_id, Event.ENDED)

    @staticmethod
    def _faults(kept: Any, claim: luod_client.Claim, fds: Any) -> Iterator[str]:
        for name, fd in fds.items():
            if wrong := fault(kept[name], claim.entries[name].metadata, fd.fileno()):
                yield wrong


def rss_kib(pid: int) -> int:
    """VmRSS of a process (proc(5)), in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
