"""The soak's model notices what it is there to notice, and nothing else."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import attrs
import pytest

from luod_protocol.fds import OwnedFd
from luod_protocol.records import EntryInfo, SessionInfo
from soak.contents import emptied, fault, make, who
from soak.model import TABLE, Breach, Event, Model, State, Violation
from soak.peers import Peers
from soak.plan import Entry, Kind, plan
from soak.plan import fault as described_wrong
from things import pipe

ONE, TWO = b"\x10" * 16, b"\x20" * 16
MAKER, OTHER = (1, 0), (2, 0)
SURVIVES = ("daemon-upgrade",)


def listed(session_id: bytes, state: str = "preserved", owner: int = 7, name: str = "") -> SessionInfo:
    whole = plan(session_id)
    return SessionInfo(
        session_id=session_id,
        session=name or whole.name,
        owner=owner,
        state=state,
        entries=len(whole.kept),
        opened_at=1.0,
        finalized_at=2.0,
        generation=1,
        claimed_by=0,
        retrieved_by=(),
        survives=SURVIVES,
    )


def held(*session_ids: bytes) -> Model:
    """A model in which these are held."""
    model = Model()
    for session_id in session_ids:
        model.open(session_id, 7, MAKER)
        model.step(session_id, Event.FINALIZING)
        model.step(session_id, Event.FINALIZED)
    return model


def breach(model: Model, *infos: SessionInfo, asked_at: int | None = None) -> Breach | None:
    """What is wrong with this list."""
    try:
        model.check_list(infos, model.changes if asked_at is None else asked_at, SURVIVES)
    except Violation as violation:
        return violation.breach
    return None


def test_a_held_session_must_be_listed_once_and_whole() -> None:
    model = held(ONE, TWO)
    assert breach(model, listed(ONE), listed(TWO, "claimed")) is None
    assert breach(model, listed(ONE)) is Breach.LOST
    assert breach(model, listed(ONE), listed(TWO), listed(ONE)) is Breach.DUPLICATED
    assert breach(model, listed(ONE), attrs.evolve(listed(TWO), session=plan(ONE).name)) is Breach.DUPLICATED
    assert breach(model, listed(ONE), listed(TWO, "open")) is Breach.WRONG
    assert breach(model, listed(ONE), listed(TWO, owner=8)) is Breach.WRONG
    assert breach(model, listed(ONE), attrs.evolve(listed(TWO), survives=())) is Breach.WRONG
    assert breach(model, listed(ONE), attrs.evolve(listed(TWO), entries=99)) is Breach.LOST


def test_one_that_ended_is_not_listed_and_one_that_may_have_ended_may_be() -> None:
    model = held(ONE)
    model.step(ONE, Event.ENDING, OTHER, "finish")
    assert breach(model, listed(ONE)) is None
    assert breach(model) is None
    before = model.changes
    model.step(ONE, Event.ENDED, OTHER)
    assert breach(model, listed(ONE)) is Breach.REVIVED
    assert breach(model, listed(ONE), asked_at=before) is None, "it may have ended after the list"
    assert breach(model) is None
    assert breach(model, listed(TWO)) is Breach.REVIVED, "nobody ever made it"
    assert model.take_ended() == [ONE]


def test_who_was_refused_has_not_ended_it_but_another_may_have() -> None:
    model = held(ONE)
    for asker in (MAKER, OTHER):
        model.step(ONE, Event.ENDING, asker, "discard")
    assert model.step(ONE, Event.NOT_ENDED, MAKER) is State.ENDING
    assert model.step(ONE, Event.NOT_ENDED, OTHER) is State.HELD
    assert breach(model) is Breach.LOST


def test_an_answer_that_nobody_got_is_asked_again() -> None:
    model = held(ONE)
    model.open(TWO, 7, MAKER)
    model.step(TWO, Event.FINALIZING)
    model.step(ONE, Event.ENDING, OTHER, "finish")
    assert model.unknown() == []
    model.orphan(MAKER)
    model.orphan(OTHER)
    assert model.unknown() == [(TWO, "finalize"), (ONE, "finish")]
    model.not_ended(ONE)
    model.step(TWO, Event.FINALIZED)
    assert model.unknown() == []
    assert breach(model, listed(TWO)) is Breach.LOST
    assert breach(model, listed(ONE), listed(TWO)) is None


def test_an_open_session_ends_with_its_client() -> None:
    model = Model()
    model.open(ONE, 7, MAKER)
    assert breach(model, listed(ONE, "open")) is None
    model.orphan(MAKER)
    assert model.take_ended() == [ONE]
    assert breach(model, listed(ONE)) is Breach.WRONG, "nobody has finalized it"
    assert breach(model) is None
    assert breach(model, listed(ONE, "open")) is Breach.REVIVED


def test_what_clients_find_is_held_against_what_is_known() -> None:
    model = held(ONE)
    with pytest.raises(Violation, match="doesn't know"):
        model.check_missing(ONE, float("inf"))
    model.check_found(ONE, float("inf"))
    model.step(ONE, Event.ENDING, OTHER, "finish")
    model.check_missing(ONE, float("inf"))
    model.step(ONE, Event.ENDED, OTHER)
    with pytest.raises(Violation, match="ended was claimed"):
        model.check_found(ONE, float("inf"))


def test_who_has_retrieved_is_who_has_told_so() -> None:
    model = held(ONE)
    known = model.get(ONE)
    assert known is not None
    known.retrieving |= {10, 11}
    known.retrieved[10] = 5.0
    model.check_holders(ONE, {10: True}, 6.0, {})
    model.check_holders(ONE, {10: True, 11: True}, 6.0, {11: 7.0})
    model.check_holders(ONE, {}, 4.0, {})
    for holders, dead in (({}, {}), ({10: True, 12: True}, {}), ({10: True}, {10: 5.5})):
        with pytest.raises(Violation):
            model.check_holders(ONE, holders, 6.0, dead)


def test_no_second_session_of_a_name() -> None:
    model = held(ONE)
    model.open(TWO, 7, OTHER)
    model.check_name_was_free(TWO, float("inf"))
    known = model.get(TWO)
    assert known is not None
    known.name = plan(ONE).name
    with pytest.raises(Violation, match="second session"):
        model.check_name_was_free(TWO, float("inf"))


def test_what_can_not_be_is_said() -> None:
    model = Model()
    model.open(ONE, 7, MAKER)
    with pytest.raises(Violation, match="can't be finalized"):
        model.step(ONE, Event.FINALIZED)
    assert {state for state, _ in TABLE} == set(State)
    assert {event for _, event in TABLE} == set(Event)


# ---- contents


def entries() -> Iterator[Entry]:
    for kind in Kind:
        yield next(entry for number in range(1000) for entry in plan(random.Random(number).randbytes(16)).entries if entry.kind is kind)


@pytest.mark.parametrize("entry", list(entries()), ids=lambda entry: str(entry.kind))
def test_contents_are_as_planned_and_what_is_not_is_noticed(entry: Entry) -> None:
    entry = attrs.evolve(entry, sealed=())
    fd, peer = make(entry)
    with fd, peer or fd:
        assert (peer is not None) is entry.kind.has_peer
        assert fault(entry, entry.metadata + who(fd.fileno()), fd.fileno()) == ""
        assert "another file" in fault(entry, entry.metadata + b"other", fd.fileno())
        if entry.kind is not Kind.WRITE_END:
            wrong = attrs.evolve(entry, content=entry.content + b"!", number=entry.number + 1)
            assert fault(wrong, entry.metadata + who(fd.fileno()), fd.fileno()) or emptied(wrong, fd.fileno())
            return
        assert emptied(entry, fd.fileno()) == ""


def test_descriptions_are_held_against_the_plan() -> None:
    whole = next(found for number in range(100) if len((found := plan(random.Random(number).randbytes(16))).kept) > 2)
    infos = [
        EntryInfo(name=each.name, kind=each.kind.kind, compatible="x", metadata=each.metadata + b"12345678", needs=each.needs, facts={})
        for each in whole.kept.values()
    ]
    info = listed(whole.session_id)
    assert described_wrong(whole, info, whole.metadata, infos) == ""
    assert "metadata" in described_wrong(whole, info, whole.metadata + b"!", infos)
    assert "entries" in described_wrong(whole, info, whole.metadata, infos[::-1])
    assert "entries" in described_wrong(whole, info, whole.metadata, infos[1:])
    assert infos[0].name in described_wrong(whole, info, whole.metadata, [attrs.evolve(infos[0], kind="odd"), *infos[1:]])
    assert "guest" in described_wrong(whole, attrs.evolve(info, session="other"), whole.metadata, infos)


# ---- other ends


def test_an_entry_that_nobody_holds_any_more_and_one_that_somebody_still_holds() -> None:
    peers = Peers(limit_s=0.0)
    with pipe() as (read, write), pipe() as (other, kept):
        peers.add(ONE, "closed", OwnedFd(os.dup(read.fileno())))
        peers.add(ONE, "kept", OwnedFd(os.dup(other.fileno())))
        assert list(peers.look(lambda _: False)) == []
        write.close()
        assert list(peers.look(lambda _: False)) == [(ONE, "closed")]
        assert list(peers.look(lambda _: True)) == []
        peers.check(0.0)
        peers.leave(ONE)
        assert list(peers.look(lambda _: False)) == []
        assert (len(peers), peers.ended) == (1, 1)
        with pytest.raises(Violation, match="somebody has entry 'kept' open") as caught:
            peers.check(0.0)
        assert caught.value.breach is Breach.LEAKED
        peers.check(float("inf"))
        kept.close()
        assert list(peers.look(lambda _: False)) == []
        assert len(peers) == 0
        peers.close()
