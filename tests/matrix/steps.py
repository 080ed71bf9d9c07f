"""The steps of a handover and the faults that each can have. The steps are not listed here: a healthy handover says which there are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Final, Self, get_args

import attrs

from luod.succession.messages import Declined, Handover

OPAQUE: Final = "opaque"
"""Sent only where a box of a newer luod was found in a manager's store (test_version_skew, test_opaque), which no story here has."""
DECLINED: Final = Declined.type

ALWAYS: Final = ("kill", "hang", "pause")
"""A hang is left to those who must end it; a pause is a hang that ends with SIGCONT."""

FAULTS: Final = (*ALWAYS, "ENOMEM", "EPIPE", "ETOOMANYREFS", "EMFILE", "no", "version")

_ACTIONS: Final = {"hang": "stop", "pause": "stop", "no": "mismatch", "version": "far-handover"}
_STEP: Final = re.compile(r"(old|new|first)/(before|after)-(send|receive|tell|call):([\w-]+)(?::(\d+))?")
_PERIODIC: Final = "WATCHDOG"
_WITH_FDS: Final = ("offer", "box", "staged", "unread-fds", "connection")


@attrs.frozen
class Step:
    """One step: SIDE/WHEN-VERB:WHAT:N, see standins/faulty_luod.py."""

    name: str
    side: str
    when: str
    verb: str
    what: str

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The step with this name; None: it is none for a fault."""
        found = _STEP.fullmatch(name)
        return None if found is None or found[4] == _PERIODIC else cls(name, found[1], found[2], found[3], found[4])

    def faults(self) -> Iterable[str]:
        """The faults that it can have."""
        yield from ALWAYS
        if self.when == "before" and self.verb in ("send", "receive", "tell"):
            yield "ENOMEM"
            if self.verb == "send":
                yield "EPIPE"
            if self.verb == "send" and self.what in _WITH_FDS:
                yield "ETOOMANYREFS"
            if self.verb != "tell":
                yield "EMFILE"
        if self.name == "new/before-send:verified" or (self.side == "new" and (self.when, self.verb) == ("after", "receive")):
            yield "no"
        if self.name == "new/before-send:meet":
            yield "version"


def needs_short_bounds(fault: str) -> bool:
    """Whether the fault ends with a bound of the handover. (A send that says EPIPE though nobody has closed is waited for as well.)"""
    return fault in ("hang", "EPIPE")


def action(fault: str) -> str:
    """What a stand-in does for a fault."""
    return _ACTIONS.get(fault, fault)


def choose(traced: Iterable[str]) -> list[Step]:
    """Of the steps that came, those to try: of each kind the first, and the last when there are several."""
    ends: dict[tuple[str, ...], list[Step]] = {}
    for name in traced:
        step = Step.parse(name)
        if step is not None:
            ends.setdefault((step.side, step.when, step.verb, step.what), []).append(step)
    chosen: list[Step] = []
    for found in ends.values():
        chosen += [found[0], *found[1:][-1:]]
    return chosen


def missing(steps: Collection[Step]) -> set[str]:
    """The messages that no step is about: the story must be extended by what makes luod send them."""
    sides = {(step.verb, step.what) for step in steps}
    return {
        f"{verb} {message.type}"
        for message in get_args(Handover)
        for verb in ("send", "receive")
        if message.type not in (DECLINED, OPAQUE) and (verb, message.type) not in sides
    }
