"""The machine of test_lives: clients, their connections' ends, a service manager, a thread that adds seals, and a real custody."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import ClassVar, Final, TypeVar

import attrs
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kernel_standin import KernelStandin
from luod import manifest, survival
from luod.capacity import Capacity
from luod.changes import Departure, Retrieval, Sealing
from luod.closing import Closing
from luod.custody import Client, Custody, Forgetting, Outcome, Pending, Storing, Working
from luod.handlers import kinds
from luod.handlers.recognizer import Recognizer
from luod.orchestrator import Orchestrator
from luod.policy import ClaimRule, Peer, Policy
from luod.quota import Cost, Share
from luod.session import Session
from luod.succession.carriable import Carriable
from luod.system import Process, System
from luod_protocol import box
from luod_protocol import messages as m
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import OwnedFd, close_all, duplicate, own
from model.lives import ALICE, BOB, OWN, ROOT, SHARED, Life, Limits, Lives, Object, Part, Stage, Wait
from things import let_go

EACH: Final = Limits(sessions=3, preserved=5, staged=4, weight=60)
TOGETHER: Final = Limits(sessions=7, preserved=9, staged=7)
UIDS: Final = (ALICE, ALICE, BOB, BOB, ROOT, ROOT)
"""Of the connections."""
NAMES: Final = ("a", "b", SHARED)
ENTRIES: Final = "abcde"
CRASH: Final = survival.Survives.DAEMON_CRASH.value
SEALABLE: Final = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING

T = TypeVar("T")
Move = Callable[["Machine"], None]

MOVES: Final[list[tuple[Move, int, Callable[[Machine], object]]]] = []
"""What may be done next, how likely that is, and when."""


def move(weight: int, when: Callable[[Machine], object] = lambda _: True) -> Callable[[Move], Move]:
    """Put a method into `MOVES`."""

    def put(method: Move) -> Move:
        MOVES.append((method, weight, when))
        return method

    return put


@attrs.define(kw_only=True, eq=False)
class Connection:
    """One that may have a session, and a request that waits."""

    client: Client
    life: Life | None = None
    pending: Pending | None = None
    kept: bool = False
    """Whether the request that waits requires that the session survives a crash."""


class Machine(RuleBasedStateMachine):
    """All of them; `test_lives` says what must hold after each step.

    Attributes:
        seen: each request and how it was answered, and what became of what was waited for.
    """

    seen: ClassVar[set[tuple[str, str]]] = set()

    def __init__(self) -> None:
        super().__init__()
        self.lives = Lives(each=EACH, together=TOGETHER)
        self.random = random.Random(0)
        self.ids = 0
        self.pids = 0
        self.stored = 0
        self.closing: list[Closing] = []
        self.taken: list[OwnedFd] = []
        """What clients have retrieved."""
        self.pipes: dict[Object, OwnedFd] = {}
        """The end to read of each pipe, by what its end to write is."""
        self.baseline = len(os.listdir("/proc/self/fd"))
        self.begin()
        self.connections = [Connection(client=self.client(uid)) for uid in UIDS]

    def begin(self) -> None:
        """A luod that has nothing."""
        share = Share(
            sessions=EACH.sessions,
            connections=100,
            preserved_fds=EACH.preserved,
            staged_fds=EACH.staged,
            metadata_bytes=EACH.weight,
        )
        capacity = Capacity(
            sessions=TOGETHER.sessions,
            connections=100,
            staged_fds=TOGETHER.staged,
            preserved_fds=TOGETHER.preserved,
            closing_fds=100,
            share=share,
        )
        self.custody = Custody(
            system=System(uid=OWN, is_alive=lambda process: process.pid in self.lives.alive),
            capacity=capacity,
            policy=Policy(claim=(ClaimRule(uid=BOB, owner=ALICE, names=(SHARED,)),)),
            generation=1,
            publish=lambda event, session, detail: None,
            carriable=Carriable(KernelStandin(is_there=False).opening),
            being_closed=lambda: sum(len(each.fds) for each in self.closing),
        )
        self.orchestrator = Orchestrator(self.custody, Recognizer(kinds=kinds(), files=()))
        self.lives.kept = False

    def client(self, uid: int) -> Client:
        """Somebody who connects, with a process of their own."""
        self.pids += 1
        self.lives.alive.add(self.pids)
        return Client(peer=Peer(uid=uid), process=Process(pid=self.pids, start=1))

    def teardown(self) -> None:
        for connection in self.connections:
            if connection.pending is not None:
                connection.pending.undo()
            self.custody.lost(connection.client).now()
        for session in self.custody.store:
            close_all(session.take_fds())
        for closing in self.closing:
            closing.now()
        close_all([*self.taken, *self.pipes.values()])

    @rule()
    def step(self) -> None:
        """Somebody does something."""
        likely = [method for method, weight, when in MOVES if when(self) for _ in range(weight)]
        chosen = self.random.choice(likely)
        note(chosen.__name__)
        chosen(self)

    # -------------------------------------------------------------------------------------------------------- asking

    def fit(self, *stages: Stage) -> list[Connection]:
        """Those that wait for nothing and have a session in one of these stages; none of them: that have no session."""
        free = [each for each in self.connections if each.pending is None]
        return [each for each in free if (each.life.stage in stages if each.life is not None else not stages)]

    def perhaps(self) -> bool:
        """Yes or no."""
        return self.random.random() < 0.5

    def idle(self) -> Connection:
        """One that waits for nothing and has no session."""
        return self.random.choice(self.fit())

    def busy(self, *stages: Stage) -> tuple[Connection, Life]:
        """One that waits for nothing and has a session in one of these stages, and that session."""
        connection = self.random.choice(self.fit(*stages))
        assert connection.life is not None
        return connection, connection.life

    def any_id(self) -> bytes:
        """Some session's id, mostly of one that is there."""
        return self.random.choice([*self.lives.lives, *self.lives.lives, *list(self.lives.ended)[-3:], b"nobody's".ljust(16)])

    def refused_or(self, verb: Callable[..., T], *arguments: object, why_not: Code | None) -> T | None:
        """What the verb gives; None when it is refused, which must be for this reason, if there is one."""
        try:
            given = verb(*arguments)
        except Refusal as refusal:
            if refusal.code is not why_not:
                raise
            return None
        if why_not is not None and isinstance(given, Pending):
            given.undo()
        assert why_not is None, (arguments, given, why_not)
        return given

    def ask(self, connection: Connection, request: m.Request, why_not: Code | None, fds: Sequence[OwnedFd] = ()) -> Outcome | None:
        """Ask; it must be refused for this reason, or be granted. Returns the answer, unless it waits or is a refusal."""
        given = list(fds)
        try:
            outcome = self.refused_or(self.orchestrator.handle, connection.client, request, given, why_not=why_not)
            assert given == ([] if outcome is not None else [*fds]), "a refused request has kept a fd, or a granted one hasn't"
        finally:
            close_all(given)
        self.seen.add((request.type, why_not or "granted"))
        if outcome is None:
            return None
        if isinstance(outcome, Pending):
            connection.pending = outcome
            return None
        return self.answered(outcome)

    def answered(self, outcome: Outcome) -> Outcome:
        """The same; what it lets go of is closed later."""
        self.later(outcome.closing)
        return outcome

    def later(self, closing: Closing) -> None:
        """These are closed later."""
        if closing.fds:
            self.closing.append(closing)
            self.lives.closing += len(closing.fds)

    # ------------------------------------------------------------------------------------------------------ serialize

    @initialize(seed=st.integers(0, 2**32))
    def some_are_there(self, seed: int) -> None:
        """What others have finalized before, perhaps claimed again. All choices are by one seed: what hypothesis would choose itself is
        too much alike to come far in a session's life."""
        self.random = random.Random(seed)
        owners, claims = self.random.sample([0, 2, 4], self.random.randint(0, 3)), self.perhaps()
        for number in owners:
            connection = self.connections[number]
            uid = connection.client.uid
            life = Life(session_id=bytes([number + 1] * 16), name=SHARED, owner=uid, metadata=b"")
            assert self.ask(connection, m.Open(seq=1, session=SHARED, session_id=life.session_id), None) is not None
            connection.life = self.lives.lives[life.session_id] = life
            self.put(connection, life, [("a", "pipe", "b", 0), ("b", "memfd", "", 1)])
            self.seal(connection, life, (), kept=False)
            self.do(connection)
            if claims:
                self.take(connection, life, force=False)

    @move(6, lambda self: self.fit())
    def open(self) -> None:
        connection = self.idle()
        name, metadata = self.random.choice(NAMES), self.random.choice([b"", b"x" * 9])
        fresh, for_alice = self.random.randint(0, 7), self.random.randint(0, 3) == 0
        self.ids += 1
        session_id = self.ids.to_bytes(16, "big") if fresh else self.any_id()
        uid = connection.client.uid
        owner = ALICE if for_alice else uid
        why_not = self.lives.open(uid, owner, name, session_id, metadata)
        request = m.Open(seq=1, session=name, session_id=session_id, metadata=metadata, owner=ALICE if for_alice else None)
        if self.ask(connection, request, why_not) is not None:
            connection.life = self.lives.lives[session_id] = Life(session_id=session_id, name=name, owner=owner, metadata=metadata)

    @move(12, lambda self: self.fit(Stage.OPEN))
    def preserve(self) -> None:
        self.put(*self.busy(Stage.OPEN), self.specs())

    def put(self, connection: Connection, life: Life, specs: Sequence[tuple[str, str, str, int]]) -> None:
        """Preserve this."""
        fds, parts = list[OwnedFd](), dict[str, Part]()
        entries: list[m.EntrySpec] = []
        for name, kind, need, size in specs:
            fd = OwnedFd(os.memfd_create("life", SEALABLE)) if kind == "memfd" else self.pipe()
            needs = (need,) if need else ()
            fds.append(fd)
            entries.append(m.EntrySpec(name=name, needs=needs, metadata=bytes(size)))
            weight = len(name) + size + len(need)
            parts[name] = Part(object=identity(fd.fileno()), is_memfd=kind == "memfd", needs=needs, weight=weight)
        why_not = self.lives.preserve(life, [spec.name for spec in entries], sum(part.weight for part in parts.values()))
        if self.ask(connection, m.Preserve(seq=1, entries=tuple(entries)), why_not, fds) is not None:
            life.parts.update(parts)

    def specs(self) -> list[tuple[str, str, str, int]]:
        """Some entries: name, what it is, what it needs, bytes of metadata."""
        choose = self.random.choice
        return [
            (choose(ENTRIES), choose(["pipe", "memfd"]), choose([""] * 9 + ["a", "b"]), choose([0, 0, 0, 9]))
            for _ in range(self.random.randint(1, 3))
        ]

    def pipe(self) -> OwnedFd:
        """The end to write of one of which the other is watched."""
        read, write = own(os.pipe2(os.O_CLOEXEC))
        self.pipes[identity(write.fileno())] = read
        return write

    @move(2, lambda self: self.fit(Stage.OPEN))
    def unpreserve(self) -> None:
        connection, life = self.busy(Stage.OPEN)
        names = [self.random.choice(ENTRIES) for _ in range(self.random.randint(0, 2))]
        if self.ask(connection, m.Unpreserve(seq=1, names=tuple(names)), self.lives.unpreserve(life, names)) is not None:
            for name in names:
                del life.parts[name]

    @move(10, lambda self: self.fit(Stage.OPEN))
    def finalize(self) -> None:
        connection, life = self.busy(Stage.OPEN)
        mostly = self.random.randint(0, 3) > 0
        memfds = [name for name, part in life.parts.items() if part.is_memfd]
        kept = self.perhaps() and (self.lives.kept or not mostly)
        sealable = memfds if mostly else ENTRIES
        seal = {self.random.choice(sealable) for _ in range(self.random.randint(0, 2))} if sealable else set[str]()
        self.seal(connection, life, sorted(seal), kept=kept)

    def seal(self, connection: Connection, life: Life, seal: Sequence[str], *, kept: bool) -> None:
        """Finalize."""
        seals: tuple[str, ...] = ("grow",)
        require = (CRASH,) if kept else ()
        request = m.Finalize(seq=1, session_id=life.session_id, require=require, seal=dict.fromkeys(seal, seals))
        self.ask(connection, request, self.lives.finalize(life, seal, kept=kept))
        if connection.pending is not None:
            connection.kept = kept
            life.waits, life.sealing = Wait.SEALS if seal else Wait.STORING, len(seal)

    @move(1, lambda self: self.fit(Stage.OPEN))
    def cancel(self) -> None:
        connection, life = self.busy(Stage.OPEN)
        assert self.ask(connection, m.Cancel(seq=1), None) is not None
        self.lives.end(life)
        connection.life = None

    @move(1, lambda self: self.fit())
    def finalize_again(self) -> None:
        """By somebody who did not get the answer."""
        connection, session_id = self.idle(), self.any_id()
        why_not = self.lives.finalize_again(connection.client.uid, session_id)
        outcome = self.ask(connection, m.Finalize(seq=1, session_id=session_id), why_not)
        assert outcome is None or (outcome.again == session_id and not outcome.changes)

    # ---------------------------------------------------------------------------------------------------- deserialize

    @move(5, lambda self: self.fit())
    def claim(self) -> None:
        connection, session_id, force = self.idle(), self.any_id(), self.perhaps()
        why_not = self.lives.find(connection.client.uid, session_id)
        if why_not is None:
            self.take(connection, self.lives.lives[session_id], force=force)
        else:
            assert self.ask(connection, m.Claim(seq=1, session_id=session_id, force=force), why_not) is None

    def take(self, connection: Connection, life: Life, *, force: bool) -> None:
        """Claim one that may be seen."""
        why_not = self.lives.take(life, connection.client.process.pid, force=force)
        if self.ask(connection, m.Claim(seq=1, session_id=life.session_id, force=force), why_not) is not None:
            life.stage, connection.life = Stage.CLAIMED, life

    @move(5, lambda self: self.fit(Stage.CLAIMED))
    def retrieve(self) -> None:
        connection, life = self.busy(Stage.CLAIMED)
        names = [self.random.choice([*life.parts] * 5 + ["e"]) for _ in range(self.random.randint(1, 3))]
        process = connection.client.process
        outcome = self.ask(
            connection, m.Retrieve(seq=1, names=tuple(names)), None if set(names) <= life.parts.keys() else Code.NO_SUCH_ENTRY
        )
        if outcome is not None:
            self.taken += outcome.fds
            assert [identity(fd.fileno()) for fd in outcome.fds] == [life.parts[name].object for name in names]
            first = [] if process.pid in life.takers else [Retrieval(session_id=life.session_id, process=process)]
            assert outcome.changes == first
            life.takers.add(process.pid)

    @move(2, lambda self: self.fit(Stage.CLAIMED))
    def release(self) -> None:
        connection, life = self.busy(Stage.CLAIMED)
        assert self.ask(connection, m.Release(seq=1), None) is not None
        life.stage, connection.life = Stage.PRESERVED, None

    @move(5, lambda self: self.fit(Stage.CLAIMED))
    def finish(self) -> None:
        connection, life = self.busy(Stage.CLAIMED)
        right = self.random.randint(0, 3) > 0
        session_id = life.session_id if right else b"another".ljust(16)
        self.ask(connection, m.Finish(seq=1, session_id=session_id), None if right else Code.BAD_REQUEST)
        if connection.pending is not None:
            life.waits = Wait.FINISH

    @move(1, lambda self: self.fit())
    def finish_again(self) -> None:
        """By somebody who did not get the answer."""
        connection, session_id = self.idle(), self.any_id()
        why_not = self.lives.finish_again(connection.client.uid, session_id)
        outcome = self.ask(connection, m.Finish(seq=1, session_id=session_id), why_not)
        assert outcome is None or (outcome.again == session_id and not outcome.changes)

    @move(2, lambda self: self.fit())
    def discard(self) -> None:
        connection, force = self.idle(), self.perhaps()
        owner, name = self.random.choice([(ALICE, "a"), (BOB, "a"), (ALICE, SHARED), (BOB, SHARED), (ROOT, SHARED)])
        life = next((each for each in self.lives.of(owner) if each.name == name), None)
        why_not = self.lives.find_named(connection.client.uid, owner, name)
        if why_not is None and life is not None:
            why_not = self.lives.take(life, connection.client.process.pid, force=force)
        self.ask(connection, m.Discard(seq=1, session=name, owner=owner, force=force), why_not)
        if connection.pending is not None:
            assert life is not None
            life.waits, connection.life = Wait.DISCARD, life

    # -------------------------------------------------------------------------------------------------- what they wait for

    def waiting(self) -> list[Connection]:
        """Those whose request waits."""
        return [each for each in self.connections if each.pending is not None]

    @move(10, lambda self: self.waiting())
    def it_is_done(self) -> None:
        """What is waited for."""
        self.do(self.random.choice(self.waiting()))

    def do(self, connection: Connection) -> None:
        """Have done what this one waits for, and act."""
        life, pending = connection.life, connection.pending
        assert life is not None
        assert pending is not None
        stored, why_not = "", None
        match pending.waits_for:
            case Working(work=work):
                assert life.waits is Wait.SEALS
                work()
                life.sealing, why_not = 0, self.lives.fits(life)
            case Storing(box=there):
                assert life.waits is Wait.STORING
                assert identities(there) == [part.object for part in life.parts.values()]
                self.stored += 1
                stored = f"b{self.stored}" if self.lives.kept else ""
                why_not = Code.CANNOT_SURVIVE if connection.kept and not self.lives.kept else None
            case Forgetting(ended=ended, box=there):
                assert (ended.session_id, ended.finished) == (life.session_id, life.waits is Wait.FINISH)
                assert identities(there) == [part.object for part in life.parts.values()]
        following = self.refused_or(pending.act, stored, why_not=why_not)
        if following is None:
            self.seen.add((life.waits.name, str(why_not)))
            pending.undo()
            self.as_it_was(connection, life)
        elif isinstance(following, Pending):
            self.seen.add((life.waits.name, "granted"))
            connection.pending, life.waits = following, Wait.STORING
        else:
            connection.pending = None
            self.acted(connection, life, self.answered(following), stored)

    def acted(self, connection: Connection, life: Life, outcome: Outcome, stored: str) -> None:
        """What was waited for is done, and answered."""
        waited, life.waits, connection.life = life.waits, Wait.NOTHING, None
        self.seen.add((waited.name, "granted"))
        if waited is Wait.STORING:
            life.stage = Stage.PRESERVED
            (change,) = outcome.changes
            assert isinstance(change, Sealing)
            assert isinstance(outcome.reply, m.Finalized)
            assert (CRASH in outcome.reply.survives) is bool(stored)
        else:
            finished = waited is Wait.FINISH
            assert outcome.changes == [Departure(session_id=life.session_id, owner=life.owner, finished=finished)]
            self.lives.end(life, finished=finished)

    def as_it_was(self, connection: Connection, life: Life) -> None:
        """What was waited for isn't done, and is refused."""
        connection.pending = None
        if life.waits is Wait.DISCARD:
            connection.life = None
        life.waits, life.sealing = Wait.NOTHING, 0

    @move(4, lambda self: self.waiting())
    def it_is_not_done(self) -> None:
        """The manager refuses, or does not answer, or the wait is interrupted; what is done in a thread is done late, or never begun."""
        connection = self.random.choice(self.waiting())
        life, pending = connection.life, connection.pending
        assert life is not None
        assert pending is not None
        work = pending.waits_for.work if isinstance(pending.waits_for, Working) else None
        if work is not None and self.perhaps():
            work()
        pending.undo()
        self.seen.add((life.waits.name, "undone"))
        if work is not None and self.perhaps():
            work()
        self.as_it_was(connection, life)
        if self.perhaps():
            self.lose(connection)

    @move(2)
    def the_manager_comes_or_goes(self) -> None:
        self.lives.kept = self.random.choice([True, True, False])
        self.custody.outlook = survival.kept(restarts=True) if self.lives.kept else survival.not_kept("it is gone")

    # ------------------------------------------------------------------------------------------------------------- ends

    @move(2, lambda self: self.fit(Stage.OPEN, Stage.CLAIMED))
    def lost(self) -> None:
        """A connection ends, perhaps with its process."""
        connection, _ = self.busy(Stage.OPEN, Stage.CLAIMED)
        if self.perhaps():
            self.lives.alive.discard(connection.client.process.pid)
        self.lose(connection)

    def lose(self, connection: Connection) -> None:
        """A connection ends, and another one comes."""
        self.later(self.custody.lost(connection.client))
        life = connection.life
        if life is not None and life.stage is Stage.OPEN:
            self.lives.end(life)
        elif life is not None:
            life.stage = Stage.PRESERVED
        connection.client, connection.life = self.client(connection.client.uid), None

    @move(3, lambda self: self.taken)
    def clients_let_go(self) -> None:
        """Of all that they have retrieved."""
        close_all(self.taken)
        self.taken.clear()

    @move(5, lambda self: self.closing)
    def closed(self) -> None:
        """What ended is closed."""
        self.closing.pop().now()
        self.lives.closing = sum(len(each.fds) for each in self.closing)

    @move(2, lambda self: self.lives.lives and not self.waiting())
    def another_luod(self) -> None:
        """luod dies, and the next one has the boxes and what is remembered of those that ended."""
        before = self.custody
        for connection in self.connections:
            self.lose(connection)
        self.begin()
        for ended in before.store.all_ended:
            self.custody.store.remember(ended)
        for session in before.store:
            assert session.sealed is not None
            there = duplicate(session.sealed.box.fileno())
            description = manifest.decode(box.manifest_of(there.fileno()))
            self.custody.adopt(Session.adopted(description, there, session.retrieved_by, stored=session.stored))
            close_all(session.take_fds())

    # -------------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def what_must_exist_exists_and_nothing_else(self) -> None:
        store = self.custody.store
        assert {session.session_id for session in store} == self.lives.lives.keys()
        for session in store:
            life = self.lives.lives[session.session_id]
            assert (session.name, session.owner, session.metadata) == (life.name, life.owner, life.metadata)
            assert session.state.name == life.stage.name
            assert store.by_name(life.owner, life.name) is session
            expected = [(name, part.object) for name, part in life.parts.items()]
            if session.sealed is None:
                assert [(name, identity(each.fd.fileno())) for name, each in session.staged.items()] == expected
            else:
                assert not session.staged
                assert list(zip(session.sealed.places, identities(session.sealed.box.fileno()), strict=True)) == expected
            assert {process.pid for process in session.retrieved_by} == life.takers
        assert len({(life.owner, life.name) for life in self.lives.of()}) == len(self.lives.lives) == len(store)

    @invariant()
    def what_ended_is_remembered(self) -> None:
        assert {ended.session_id: (ended.owner, ended.finished) for ended in self.custody.store.all_ended} == self.lives.ended
        assert not self.lives.ended.keys() & self.lives.lives.keys()

    @invariant()
    def the_books_say_what_there_is(self) -> None:
        for uid in {ALICE, BOB, ROOT, OWN}:
            assert self.custody.quota.used(uid) == cost(self.lives.used(uid))
        total = self.lives.used()
        assert self.custody.quota.total == cost(total)
        assert (self.custody.preserved_fds, self.custody.staged_fds) == (total.preserved, total.staged)

    @invariant()
    def no_descriptor_is_leaked_or_closed_twice(self) -> None:
        ours = len(self.pipes) + len(self.taken) + sum(len(each.fds) for each in self.closing)
        assert len(os.listdir("/proc/self/fd")) == self.baseline + ours + self.lives.descriptors

    @invariant()
    def pipes_hang_up_when_nobody_has_them(self) -> None:
        if self.closing or self.taken:
            return  # somebody has
        kept = {part.object for life in self.lives.of() for part in life.parts.values()}
        for end, read in list(self.pipes.items()):
            assert let_go(read, 0) is (end not in kept)
            if end not in kept:
                self.pipes.pop(end).close()


def identity(fd: int) -> Object:
    """What a borrowed fd is of."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def identities(there: int) -> list[Object]:
    """What is in a box (borrowed), in order."""
    fds = box.look(there)
    try:
        return [identity(fd.fileno()) for fd in fds]
    finally:
        close_all(fds)


def cost(used: Limits) -> Cost:
    return Cost(sessions=used.sessions, preserved_fds=used.preserved, staged_fds=used.staged, metadata_bytes=used.weight)
