"""The books: what each uid has is what its sessions cost, whatever happens to them; driven through the verbs, with real descriptors."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, RuleBasedStateMachine, consumes, invariant, multiple, rule

from kernel_standin import KernelStandin
from luod.capacity import Capacity
from luod.custody import Client, Custody, Outcome, Pending, Working
from luod.handlers import kinds
from luod.handlers.recognizer import Recognizer
from luod.orchestrator import Orchestrator
from luod.policy import Peer, Policy
from luod.quota import NOTHING, Cost, Quota, Share
from luod.session import Session, weigh
from luod.succession.carriable import Carriable
from luod.system import Process, System
from luod_protocol import messages as m
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import OwnedFd, close_all, duplicate

SHARE = Share(sessions=3, connections=2, preserved_fds=6, staged_fds=5, metadata_bytes=60)
ALICE, BOB, OWN = 1001, 1002, 1003
UIDS = (ALICE, BOB, 0, OWN)
EXEMPT = (0, OWN)
NONE: MultipleResults[Any] = multiple()
"""Nothing new for a bundle."""


def custody_of(share: Share = SHARE) -> Custody:
    capacity = Capacity(sessions=1000, connections=1000, staged_fds=1000, preserved_fds=1000, closing_fds=1000, share=share)

    def publish(event: str, session: Session, detail: str) -> None:
        """Nobody monitors."""

    carriable = Carriable(KernelStandin(is_there=False).opening)
    return Custody(system=System(uid=OWN), capacity=capacity, policy=Policy(), generation=1, publish=publish, carriable=carriable)


def real_cost(session: Session) -> Cost:
    """What a session costs, from its entries."""
    entries = list(session.contents)
    return Cost(
        sessions=1,
        preserved_fds=len(entries) if session.sealed is not None else 0,
        staged_fds=len(entries) if session.sealed is None else 0,
        metadata_bytes=len(session.name) + len(session.metadata) + weigh(entries),
    )


def exceeds(used: Cost, more: Cost) -> bool:
    """Whether a share is too small for `more`."""
    return any(
        getattr(more, key) and getattr(used, key) + getattr(more, key) > getattr(SHARE, key)
        for key in ("sessions", "preserved_fds", "staged_fds", "metadata_bytes")
    )


class Books(RuleBasedStateMachine):
    """Clients of several uids do what clients do; the books must agree with the sessions after each step."""

    opened = Bundle("opened")
    finalized = Bundle("finalized")
    claimed = Bundle("claimed")

    def __init__(self) -> None:
        super().__init__()
        self.custody = custody_of()
        self.orchestrator = Orchestrator(self.custody, Recognizer(kinds=kinds(), files=()))
        self.numbers = 0
        self.fd = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC))

    def teardown(self) -> None:
        for session in self.custody.store:
            close_all(session.take_fds())
        self.fd.close()

    def client(self, uid: int) -> Client:
        return Client(peer=Peer(uid=uid), process=Process(pid=1, start=0))

    def ask(self, client: Client, request: m.Request, fds: list[OwnedFd] | None = None) -> Outcome:
        given = fds if fds is not None else []
        try:
            outcome = self.orchestrator.handle(client, request, given)
            while isinstance(outcome, Pending):
                if isinstance(outcome.waits_for, Working):
                    outcome.waits_for.work()
                outcome = outcome.act("")
        finally:
            close_all(given)
        close_all([*outcome.closing.fds, *outcome.fds])
        return outcome

    def expect(self, owner: int, more: Cost, act: Callable[[], object]) -> bool:
        """Act, which must be refused exactly when the owner's share is too small."""
        too_much = owner not in EXEMPT and exceeds(self.model(owner), more)
        if not too_much:
            act()
            return True
        with pytest.raises(Refusal, match=rf"^uid {owner} has .*limits\.per_uid\.max_") as caught:
            act()
        assert caught.value.code is Code.LIMIT_REACHED
        return False

    def model(self, uid: int) -> Cost:
        return sum((real_cost(session) for session in self.custody.store if session.owner == uid), NOTHING)

    @rule(target=opened, uid=st.sampled_from(UIDS), metadata=st.binary(max_size=30), for_alice=st.booleans())
    def open(self, uid: int, metadata: bytes, for_alice: bool) -> Any:
        self.numbers += 1
        client, name = self.client(uid), f"s{self.numbers}"
        owner = ALICE if uid == 0 and for_alice else uid
        request = m.Open(seq=1, session=name, session_id=self.numbers.to_bytes(16, "big"), metadata=metadata, owner=owner)
        cost = Cost(sessions=1, metadata_bytes=len(name) + len(metadata))
        return client if self.expect(owner, cost, lambda: self.ask(client, request)) else NONE

    @rule(client=opened, names=st.sets(st.sampled_from("abcdefgh"), min_size=1, max_size=4), metadata=st.binary(max_size=9))
    def preserve(self, client: Client, names: set[str], metadata: bytes) -> None:
        session = client.session
        assert session is not None
        specs = tuple(m.EntrySpec(name=name, metadata=metadata, needs=() if name == "a" else ("a",)) for name in names)
        if names & set(session.staged):
            with pytest.raises(Refusal):
                self.ask(client, m.Preserve(seq=1, entries=specs), [duplicate(self.fd.fileno()) for _ in names])
            return
        cost = Cost(staged_fds=len(names), metadata_bytes=sum(1 + len(metadata) + len(spec.needs) for spec in specs))
        self.expect(
            session.owner, cost, lambda: self.ask(client, m.Preserve(seq=1, entries=specs), [duplicate(self.fd.fileno()) for _ in names])
        )

    @rule(client=opened, names=st.sets(st.sampled_from("abcdefgh"), max_size=3))
    def unpreserve(self, client: Client, names: set[str]) -> None:
        with suppress(Refusal):
            self.ask(client, m.Unpreserve(seq=1, names=tuple(names)))

    @rule(target=finalized, client=consumes(opened))
    def finalize(self, client: Client) -> Any:
        session = client.session
        assert session is not None
        if "a" not in session.staged:
            # Its entries need one that isn't there, unless it has none.
            self.ask(client, m.Unpreserve(seq=1, names=tuple(session.staged)))
        request = m.Finalize(seq=1, session_id=session.session_id)
        if self.expect(session.owner, Cost(preserved_fds=session.size), lambda: self.ask(client, request)):
            return session
        self.ask(client, m.Cancel(seq=1))
        return NONE

    @rule(client=consumes(opened))
    def cancel(self, client: Client) -> None:
        self.ask(client, m.Cancel(seq=1))

    @rule(client=consumes(opened))
    def roll_back(self, client: Client) -> None:
        self.custody.lost(client).now()

    @rule(session=consumes(finalized))
    def discard(self, session: Session) -> None:
        self.ask(self.client(session.owner), m.Discard(seq=1, session_id=session.session_id))

    @rule(target=claimed, session=consumes(finalized))
    def claim(self, session: Session) -> Client:
        client = self.client(0)
        self.ask(client, m.Claim(seq=1, session_id=session.session_id))
        return client

    @rule(client=consumes(claimed))
    def finish(self, client: Client) -> None:
        assert client.session is not None
        self.ask(client, m.Finish(seq=1, session_id=client.session.session_id))

    @rule(target=finalized, client=consumes(claimed))
    def release(self, client: Client) -> Session:
        session = client.session
        assert session is not None
        self.custody.lost(client).now()
        return session

    @rule(session=consumes(finalized))
    def drop(self, session: Session) -> None:
        """As a successor does when its predecessor says that the session is gone."""
        self.custody.drop(session.session_id).now()

    @rule()
    def hand_over(self) -> None:
        """A successor adopts what there is."""
        heir = custody_of()
        for session in self.custody.store:
            heir.adopt(session)
        self.custody = heir
        self.orchestrator = Orchestrator(heir, Recognizer(kinds=kinds(), files=()))

    @invariant()
    def the_books_agree_with_the_sessions(self) -> None:
        quota = self.custody.quota
        for uid in UIDS:
            assert quota.used(uid) == self.model(uid)
            assert uid in EXEMPT or not exceeds(quota.used(uid), NOTHING)
        assert quota.total == sum((real_cost(session) for session in self.custody.store), NOTHING)
        assert (self.custody.preserved_fds, self.custody.staged_fds) == (quota.total.preserved_fds, quota.total.staged_fds)


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBooks = pytest.mark.slow(Books.TestCase)


def session_of(owner: int, number: int, weight: int = 0) -> Session:
    return Session(session_id=bytes([number] * 16), name="s", owner=owner, metadata=b"", opened_at=0.0, weight=weight)


def test_more_than_a_share_is_kept_and_does_not_grow() -> None:
    """What a more generous predecessor took."""
    quota = Quota(SHARE, exempt=())
    sessions = [session_of(ALICE, number, weight=100) for number in range(5)]
    for session in sessions:
        quota.charge(session)
    with pytest.raises(Refusal, match=r"has 5 sessions, with 1 more it would pass its limit of 3: .*limits\.per_uid\.max_sessions"):
        quota.refuse_beyond(ALICE, Cost(sessions=1))
    with pytest.raises(Refusal, match="bytes of names, needs and metadata"):
        quota.refuse_beyond(ALICE, Cost(metadata_bytes=1))
    quota.refuse_beyond(ALICE, Cost(preserved_fds=6))
    quota.refuse_beyond(BOB, Cost(sessions=3))
    for session in sessions[2:]:
        quota.release(session)
    quota.refuse_beyond(ALICE, Cost(sessions=1))


def test_charging_twice_is_charging_once() -> None:
    quota = Quota(SHARE, exempt=())
    session = session_of(ALICE, 1)
    quota.charge(session)
    session.weight = 7
    quota.charge(session)
    assert quota.used(ALICE) == quota.total == Cost(sessions=1, metadata_bytes=8)
    quota.release(session)
    quota.release(session)
    assert quota.used(ALICE) == quota.total == NOTHING


def test_connections() -> None:
    quota = Quota(SHARE, exempt=(0,))
    for uid in (ALICE, ALICE, BOB, 0, 0, 0):
        assert quota.too_many(uid) == ""
        quota.connected(uid)
    assert "uid 1001 has 2 connections, its limit" in quota.too_many(ALICE)
    assert "limits.per_uid.max_connections" in quota.too_many(ALICE)
    assert quota.too_many(BOB) == quota.too_many(0) == ""
    quota.disconnected(ALICE)
    assert quota.too_many(ALICE) == ""
    assert Counter({uid: quota.connections(uid) for uid in UIDS}) == Counter({0: 3, ALICE: 1, BOB: 1, OWN: 0})
