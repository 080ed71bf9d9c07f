"""What a successor must know of before it is answered: the changes to the set of finalized sessions."""

from __future__ import annotations

from typing import TypeAlias

import attrs

from luod.session import Session
from luod.system import Process


@attrs.frozen(kw_only=True)
class Sealing:
    """A session was finalized."""

    session: Session


@attrs.frozen(kw_only=True)
class Departure:
    """A finalized session is gone; `finished` by its claimer, else discarded."""

    session_id: bytes
    owner: int
    finished: bool


@attrs.frozen(kw_only=True)
class Retrieval:
    """A process got fds of a session for the first time."""

    session_id: bytes
    process: Process


Change: TypeAlias = Sealing | Departure | Retrieval
