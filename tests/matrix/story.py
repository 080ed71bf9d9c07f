"""What clients do while luod is replaced, what they were told, and what must hold of it afterwards."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import Final

import pytest

import luod_client
from faulty import Scene
from luod_client import Disconnected
from luod_protocol import messages as m
from luod_protocol.errors import LuodError
from luod_protocol.messages import Endpoint
from pipelining import Pipeline
from things import let_go, state

BEFORE: Final = ("ending", "first", "claimed", "second", "used", "stuck")
HELD_AT: Final = "old/hold:box:4"
"""With half of the boxes sent the old daemon is held, and the clients change things."""
ASKED: Final = 7
FDS_EACH: Final = 200
"""So many retrieves of so many fds are more than luod lets lie unread: the last replies wait in luod."""


class Story(Scene):
    """A scene with a client that doesn't read (`stuck`), and with changes in the middle of the copy (`meanwhile`).

    Attributes:
        ids: the sessions that were told to be finalized, and are not told to be finished.
        unsure: what may have become finalized, or have ended: the client wasn't told.
        ended: told to be finished.
    """

    def __init__(self, runtime_dir: str) -> None:
        super().__init__(runtime_dir, BEFORE)
        self.ids: dict[str, bytes] = {each.session: each.session_id for each in self.looker.list()}
        del self.ids["open"]
        self.unsure: set[str] = set()
        self.ended: set[str] = set()
        self._line = Pipeline(runtime_dir, Endpoint.DESERIALIZE)
        self._line.ask(m.Claim(seq=self._line.seq(), session="stuck"))
        self._line.answers(1)
        for _ in range(ASKED):
            self._line.ask(m.Retrieve(seq=self._line.seq(), names=("pipe",) * FDS_EACH))

    def meanwhile(self) -> None:
        """Finalize a session, retrieve from another, finish a third; as far as luod lives."""
        with suppress(LuodError):
            self._finalize()
        with suppress(LuodError), luod_client.deserialize(runtime_dir=self.runtime_dir) as looker, looker.claim("used") as claim:
            for fd in claim.retrieve("ram").values():
                fd.close()
        with suppress(LuodError), luod_client.deserialize(runtime_dir=self.runtime_dir) as looker, looker.claim("ending") as claim:
            self.unsure.add("ending")
            del self.ids["ending"]
            claim.finish()
            self.unsure.discard("ending")
            self.ended.add("ending")

    def _finalize(self) -> None:
        with luod_client.serialize("late", metadata=b"late", runtime_dir=self.runtime_dir) as session:
            self.put(session)
            self.unsure.add("late")
            session.finalize(seal={"ram": {"grow"}})
            self.unsure.discard("late")
            self.ids["late"] = session.id
        with luod_client.deserialize(runtime_dir=self.runtime_dir) as looker:
            self.shown["late"] = looker.show("late").entries

    def check(self, *, live: bool, lost: Collection[str]) -> list[str]:
        """Assert what holds of the connections and of what has ended. Returns the sessions that are there, to look at.

        Args:
            live: whether the connections live.
            lost: sessions that went with a daemon that crashed, where nobody had a copy.
        """
        if live:
            self.check_live()
            for reply in self._line.answers(ASKED):
                assert isinstance(reply, m.Retrieved), reply
            assert len(self._line.fds) == ASKED * FDS_EACH
        else:
            with pytest.raises(LuodError):
                self.open.status()
            with pytest.raises(Disconnected):
                self.looker.list()
            with pytest.raises((LuodError, OSError, AssertionError)):
                self._line.answers(ASKED + 1)
            assert let_go(self.ends["open"]), "somebody still holds a copy of the session that was open"
        self._line.__exit__()
        where = self.runtime_dir
        for name in self.unsure:
            if state(where, name) == "gone":
                assert name not in self.ends or let_go(self.ends[name])
            else:
                self._take_in(name)
        for name in self.ended | set(lost):
            assert state(where, name) == "gone", f"{name} is there"
            assert let_go(self.ends[name]), f"somebody still holds a copy of {name}"
        there = set(self.ids) - set(lost) - ({"claimed"} if live else set())
        with luod_client.deserialize(runtime_dir=where) as looker:
            found = {each.session: each.session_id for each in looker.list()}
        assert found == {name: self.ids[name] for name in there}, f"there are {sorted(found)}, not {sorted(there)}"
        return sorted(there)

    def _take_in(self, name: str) -> None:
        with luod_client.deserialize(runtime_dir=self.runtime_dir) as looker:
            shown = looker.show(name)
            self.shown[name] = shown.entries
            self.ids[name] = shown.info.session_id

    def close(self) -> None:
        """End the clients."""
        self._line.__exit__()
        super().close()
