"""What must come of a fault, from the rules. Pure.

1. The successor fails before it has sent `serving`: the old daemon serves as if nothing had happened.
2. It dies later: the one that serves has crashed. A manager starts another one from its store; without one it was the end.
3. The old daemon dies, without a manager: a successor that was sent an offer serves, with the sessions whose boxes it was sent, and with
   the clients' connections when it was sent `frozen`. Before the offer it was the end.
4. The old daemon dies, with a manager: another one is started from the store; once it has named its successor that serves.
5. Nobody dies: the successor serves if it has sent `serving`, else the old daemon does, and the clients notice nothing.

A daemon that hangs is killed: by the old daemon when it is the successor, by the manager when it is the main process. Without a manager the
test does it, as an operator would.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import attrs

from matrix.steps import Step


class Word(enum.StrEnum):
    """Who serves in the end."""

    OLD = "old serves"
    NEW = "new serves"
    RESTARTED = "restarted"
    NOBODY = "nobody"


@attrs.frozen(kw_only=True)
class Facts:
    """What was sent until it was over. `boxes` are the sessions whose boxes were."""

    offered: bool
    frozen: bool
    serving: bool
    named: bool
    boxes: frozenset[bytes]

    @classmethod
    def of(cls, trace: Iterable[tuple[int, str, bytes]]) -> Facts:
        """From a trace: processes, steps, and the sessions they are about."""
        lines = list(trace)
        came = {name for _, name, _ in lines}
        boxes = frozenset(about for _, name, about in lines if name.startswith("old/after-send:box"))
        return cls(
            offered="old/after-send:offer" in came,
            frozen="old/after-send:frozen" in came,
            serving="new/after-send:serving" in came,
            named="old/after-tell:MAINPID" in came,
            boxes=boxes,
        )


def expected(step: Step, fault: str, facts: Facts, *, managed: bool) -> Word:
    """Who must serve."""
    if step.side == "first":
        return Word.RESTARTED
    if fault not in ("kill", "hang"):
        return Word.NEW if facts.serving and fault not in ("no", "version") else Word.OLD
    if step.side == "new":
        crashed = facts.serving
        return (Word.RESTARTED if managed else Word.NOBODY) if crashed else Word.OLD
    if managed:
        return Word.NEW if facts.named else Word.RESTARTED
    return Word.NEW if facts.offered else Word.NOBODY


def lives(word: Word, facts: Facts) -> bool:
    """Whether the clients' connections live on."""
    return word is Word.OLD or (word is Word.NEW and facts.frozen)


def nobody_else_ends_it(step: Step, facts: Facts, *, managed: bool) -> bool:
    """Whether a daemon that hangs is for an operator to kill."""
    if step.side == "new":
        return facts.serving and not managed
    # A successor that serves kills its predecessor, but with a manager not within a test's time.
    return facts.named if managed else not facts.serving
