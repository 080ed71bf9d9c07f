"""What an earlier luod left in the service manager's store, adopted by one that starts: after a crash, a restart, a stop and a start.

Theory. Every box says itself which session it is; its name in the store and the order in which it comes mean nothing. The newest ledger
says what happened since: which sessions were about to end, and who has retrieved.

Happy path: each box becomes a preserved session of the new generation.

Unhappy paths:
1. The ledger says that a session ends: its box was on its way out. It is let go of, and remembered as ended.
2. A box can't be read or isn't what its manifest says: it stays in the store untouched.
3. A box is of a newer luod, or two are of one session, or of one owner's name, and the other was finalized first: it is kept as it is and
   handed on (`opaque`), and stays in the store.
4. The ledger can't be read: the boxes are adopted without, and the ledger stays.

Invariants: nothing is dropped here but what has ended. Open sessions and claims died with their connections.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import attrs

from luod.session import Session
from luod.store import Ended, Opaque
from luod.succession import ledger
from luod.succession.fdstore import WITNESS
from luod.succession.ledger import Ending, LedgerFault, Record, Retrieval, Staying, Successor
from luod.succession.opaque import as_session, decide, examine
from luod.system import Process
from luod_protocol.fds import OwnedFd

log = logging.getLogger("luod")


@attrs.frozen(kw_only=True)
class Adopted:
    """What a store had.

    Attributes:
        generation: of the last luod that may have served; 0 without a ledger.
        sessions: preserved, oldest first.
        opaque: boxes that are kept for another luod.
        retrieved: who has retrieved from sessions that are not among `sessions`, by id.
        ended: sessions that are gone, oldest first.
        others: names in the store that are no adopted session's box.
        leaving: those of them that are to be removed.
    """

    generation: int
    sessions: list[Session]
    opaque: list[Opaque]
    retrieved: dict[bytes, set[Process]]
    ended: list[Ended]
    others: list[str]
    leaving: list[str]


def adopt(stored: Iterable[tuple[str, OwnedFd]], boot_id: str) -> Adopted:
    """Adopt what was stored: names and fds, which are owned and moved."""
    boxes: list[tuple[str, OwnedFd]] = []
    ledgers: dict[int, tuple[str, OwnedFd]] = {}
    left_over: list[str] = []
    for name, fd in stored:
        generation = ledger.generation(name)
        if name == WITNESS:
            # luod died in the middle of an operation.
            fd.close()
            left_over = [WITNESS]
        elif generation is None:
            boxes.append((name, fd))
        elif generation in ledgers:
            fd.close()
        else:
            ledgers[generation] = (name, fd)
    others = left_over + [name for name, _ in ledgers.values()]
    newest = max(ledgers, default=0)
    # Also the newest, once there is a newer one; unless it is of a later version, which a later luod may need.
    leaving = list(others)
    records: list[Record] = []
    for generation, (name, fd) in ledgers.items():
        with fd:
            if generation == newest:
                try:
                    records = ledger.read(fd.fileno())
                except LedgerFault as error:
                    log.error("%s in the service manager's store can't be used and stays there: %s", name, error)
                    leaving.remove(name)
    ended, retrieved = _summed_up(records)
    last = max([newest, *(record.generation for record in records if isinstance(record, Successor))])
    adopted = Adopted(
        generation=last, sessions=[], opaque=[], retrieved=retrieved, ended=list(ended.values()), others=others, leaving=leaving
    )
    found: list[Opaque] = []
    for name, fd in boxes:
        each = examine(fd, name, boot_id)
        if each.manifest is None and not each.foreign:
            log.error("%s in the service manager's store can't be used and stays there: %s", name, each.why)
            adopted.others.append(name)
            fd.close()
        else:
            found.append(each)
    decided = decide(found, (), ended)
    adopted.sessions.extend(as_session(each, description, retrieved, boot_id) for each, description in decided.sessions)
    for _, description in decided.sessions:
        retrieved.pop(description.session_id, None)
    adopted.opaque.extend(decided.opaque)
    for each in decided.ended:
        each.box.close()
        adopted.leaving.append(each.stored)
    adopted.others.extend(each.stored for each in (*decided.opaque, *decided.ended))
    return adopted


def _summed_up(records: Iterable[Record]) -> tuple[dict[bytes, Ended], dict[bytes, set[Process]]]:
    """What the records say in the end: the sessions that ended, oldest first, and who has retrieved."""
    ended: dict[bytes, Ended] = {}
    retrieved: dict[bytes, set[Process]] = {}
    for record in records:
        match record:
            case Ending():
                ended[record.ended.session_id] = record.ended
            case Staying():
                ended.pop(record.session_id, None)
            case Retrieval():
                retrieved.setdefault(record.session_id, set()).add(record.process)
            case Successor():
                pass
    return ended, retrieved
