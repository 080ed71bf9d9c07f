"""Who may do what with whose sessions: pure decisions over the rules of the configuration.

Theory. Without rules everybody who can connect may open sessions, and a session is its owner's and root's. Two kinds of rules change that.
The first `[[serialize]]` rule closes the door that was open: from then on only whom a rule names may open a session, and only with a name
that this rule has. A `[[claim]]` rule opens one that was closed: whom it names may see and take sessions of others.

Happy path: `may_open` when a session is opened; `may_see` whenever one is looked for.

Unhappy paths:
1. A rule that is about nobody, or about no name: `EmptyRule`, when the configuration is read.

Invariants: root may always do everything, and an owner may always see what is theirs: no rule takes that away. A decision depends on the
rules, on who asked and on the session, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Final, TypeAlias

import attrs

from luod_protocol.errors import LuodError

ROOT: Final = 0

Uid: TypeAlias = Annotated[int, "uid"]
"""In the file a number or a user's name."""

Gid: TypeAlias = Annotated[int, "gid"]
"""In the file a number or a group's name."""

NamePattern: TypeAlias = Annotated[str, "name pattern"]
"""As fnmatch.fnmatchcase takes it: `*`, `?`, `[abc]`; it must match the whole name, and case counts."""


class EmptyRule(LuodError):
    """A rule that can't ever apply. The text continues the rule's key."""


@attrs.frozen(kw_only=True)
class Peer:
    """Who is at the other end of a connection. `groups` are the primary group and all others."""

    uid: int
    groups: frozenset[int] = frozenset()


@attrs.frozen(kw_only=True)
class SerializeRule:
    """[[serialize]]: who may open sessions of these names. `uid` and `gid`: both must fit where both are given."""

    uid: Uid | None = None
    gid: Gid | None = None
    names: tuple[NamePattern, ...] = ("*",)

    def __attrs_post_init__(self) -> None:
        _refuse_empty(self)


@attrs.frozen(kw_only=True)
class ClaimRule:
    """[[claim]]: who may see and take sessions of these names that belong to `owner` (None: to anybody)."""

    uid: Uid | None = None
    gid: Gid | None = None
    owner: Uid | None = None
    names: tuple[NamePattern, ...] = ("*",)

    def __attrs_post_init__(self) -> None:
        _refuse_empty(self)


@attrs.frozen(kw_only=True)
class Policy:
    """The rules of one configuration."""

    serialize: tuple[SerializeRule, ...] = ()
    claim: tuple[ClaimRule, ...] = ()

    def may_open(self, peer: Peer, name: str) -> bool:
        """Whether `peer` may open a session of this name."""
        return peer.uid == ROOT or not self.serialize or _matches(name, self.openable(peer))

    def openable(self, peer: Peer) -> Sequence[str]:
        """The patterns of the names that the rules let `peer` open."""
        return [pattern for rule in self.serialize if _names(rule, peer) for pattern in rule.names]

    def may_see(self, peer: Peer, owner: int, name: str) -> bool:
        """Whether the session `name` of `owner` exists for `peer`, who may then take it as well."""
        return peer.uid in (ROOT, owner) or any(_matches(name, rule.names) for rule in self._reaching(peer, owner))

    def may_look(self, peer: Peer, owner: int) -> bool:
        """Whether `peer` may ask for sessions of `owner` at all."""
        return peer.uid in (ROOT, owner) or bool(self._reaching(peer, owner))

    def _reaching(self, peer: Peer, owner: int) -> Sequence[ClaimRule]:
        return [rule for rule in self.claim if _names(rule, peer) and rule.owner in (None, owner)]


def _refuse_empty(rule: SerializeRule | ClaimRule) -> None:
    if rule.uid is None and rule.gid is None:
        raise EmptyRule(": it names nobody: give uid, gid, or both")
    if not rule.names:
        raise EmptyRule(".names = []: it matches no name: leave names out for all of them")


def _names(rule: SerializeRule | ClaimRule, peer: Peer) -> bool:
    return rule.uid in (None, peer.uid) and (rule.gid is None or rule.gid in peer.groups)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
