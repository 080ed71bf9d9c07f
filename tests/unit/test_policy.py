"""Who may do what: the rules, without a daemon."""

from __future__ import annotations

import pytest

from luod.policy import ClaimRule, EmptyRule, Peer, Policy, SerializeRule

ROOT = Peer(uid=0, groups=frozenset({0}))
ALICE = Peer(uid=1, groups=frozenset({10, 77}))
BOB = Peer(uid=2, groups=frozenset({20}))


def test_without_rules_a_session_is_its_owners_and_roots() -> None:
    policy = Policy()
    for peer in (ROOT, ALICE, BOB):
        assert policy.may_open(peer, "guest")
    assert policy.may_see(ALICE, 1, "guest")
    assert policy.may_see(ROOT, 1, "guest")
    assert not policy.may_see(BOB, 1, "guest")
    assert not policy.may_see(ALICE, 0, "guest")
    assert policy.may_look(ROOT, 1)
    assert policy.may_look(ALICE, 1)
    assert not policy.may_look(BOB, 1)


@pytest.mark.parametrize(
    ("rule", "alice", "bob"),
    [
        (SerializeRule(uid=1), True, False),
        (SerializeRule(uid=2), False, True),
        (SerializeRule(gid=10), True, False),
        (SerializeRule(gid=77), True, False),
        (SerializeRule(gid=0), False, False),
        (SerializeRule(uid=1, gid=77), True, False),
        (SerializeRule(uid=1, gid=20), False, False),
        (SerializeRule(uid=1, names=("guest-*",)), True, False),
        (SerializeRule(uid=1, names=("cache", "guest-?")), True, False),
        (SerializeRule(uid=1, names=("guest-[0-9]",)), True, False),
        (SerializeRule(uid=1, names=("Guest-*",)), False, False),
        (SerializeRule(uid=1, names=("guest",)), False, False),
        (SerializeRule(uid=1, names=("uest-7",)), False, False),
        (SerializeRule(uid=1, names=("guest-",)), False, False),
    ],
)
def test_a_serialize_rule_names_who_may_open_what(rule: SerializeRule, alice: bool, bob: bool) -> None:
    policy = Policy(serialize=(rule,))
    assert policy.may_open(ALICE, "guest-7") is alice
    assert policy.may_open(BOB, "guest-7") is bob
    assert policy.may_open(ROOT, "guest-7")
    assert policy.may_see(BOB, 2, "guest-7"), "what is there already is still its owner's"


def test_each_serialize_rule_has_its_own_names() -> None:
    policy = Policy(
        serialize=(SerializeRule(uid=1, names=("a*",)), SerializeRule(uid=2, names=("b*",)), SerializeRule(gid=77, names=("c",)))
    )
    assert [policy.may_open(ALICE, name) for name in ("abc", "bcd", "c")] == [True, False, True]
    assert [policy.may_open(BOB, name) for name in ("abc", "bcd", "c")] == [False, True, False]
    assert policy.openable(ALICE) == ["a*", "c"]
    assert policy.openable(BOB) == ["b*"]


@pytest.mark.parametrize(
    ("rule", "sees"),
    [
        (ClaimRule(uid=2), True),
        (ClaimRule(uid=1), False),
        (ClaimRule(gid=20), True),
        (ClaimRule(gid=10), False),
        (ClaimRule(uid=2, gid=20), True),
        (ClaimRule(uid=2, gid=10), False),
        (ClaimRule(uid=2, owner=1), True),
        (ClaimRule(uid=2, owner=3), False),
        (ClaimRule(uid=2, owner=1, names=("guest-*",)), True),
        (ClaimRule(uid=2, owner=1, names=("cache-*",)), False),
        (ClaimRule(uid=2, names=("GUEST-*",)), False),
    ],
)
def test_a_claim_rule_shows_sessions_of_others(rule: ClaimRule, sees: bool) -> None:
    policy = Policy(claim=(rule,))
    assert policy.may_see(BOB, 1, "guest-7") is sees
    assert policy.may_open(BOB, "guest-7"), "a claim rule says nothing of opening"
    for peer in (ALICE, ROOT):
        assert policy.may_see(peer, 1, "guest-7"), "no rule takes anything away"


def test_who_may_ask_for_the_sessions_of_an_owner() -> None:
    policy = Policy(claim=(ClaimRule(uid=2, owner=1, names=("guest-*",)), ClaimRule(gid=10)))
    assert policy.may_look(BOB, 1)
    assert not policy.may_look(BOB, 0)
    assert policy.may_look(ALICE, 0), "a rule without an owner is for all of them"


@pytest.mark.parametrize("kind", [SerializeRule, ClaimRule])
def test_a_rule_is_about_somebody_and_something(kind: type[SerializeRule] | type[ClaimRule]) -> None:
    with pytest.raises(EmptyRule, match="names nobody"):
        kind()
    with pytest.raises(EmptyRule, match="no name"):
        kind(uid=1, names=())
