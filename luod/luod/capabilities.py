"""What a session survives, for each sort of fd: a matrix, and where each of its answers comes from.

What luod and the host are replaced by is the same for all sorts that are taken (`survival`); what goes through a kexec the running kernel
says, of each sort (`succession/carriable`). finalize, preflight and prepare ask the same two, so the matrix can't say another thing than
they. What isn't taken survives nothing, for the reason for which it is refused.
"""

from __future__ import annotations

from luod.custody import Custody
from luod.handlers.recognizer import Recognizer
from luod.handlers.refused import NEVER
from luod.succession.samples import sorts
from luod.survival import Survives
from luod_protocol import messages as m


def matrix(custody: Custody, recognizer: Recognizer) -> tuple[m.SortSurvival, ...]:
    """A row for each sort; samples of those that are taken are tried first."""
    taken = [(kind, sort) for kind in recognizer.kinds for sort in sorts(kind)]
    custody.carriable.look(sort for _, sort in taken)
    rows = [_row(custody, kind, sort) for kind, sort in taken]
    rows += [_refused(kind, sort, reason) for kind, reason in recognizer.not_allowed.items() for sort in sorts(kind)]
    rows += [_refused("", name, reason) for name, reason in NEVER.items()]
    return tuple(rows)


def _row(custody: Custody, kind: str, sort: str) -> m.SortSurvival:
    carriable = custody.carriable
    outlook = custody.outlook.with_kernel(carriable.reason(sort))
    untried = () if carriable.fault or carriable.finding(sort).answered else (Survives.KEXEC.value,)
    return m.SortSurvival(sort=sort, kind=kind, survives={each.value: why for each, why in outlook.reasons.items()}, untried=untried)


def _refused(kind: str, sort: str, reason: str) -> m.SortSurvival:
    return m.SortSurvival(sort=sort, kind=kind, survives={each.value: reason for each in Survives}, untried=())
