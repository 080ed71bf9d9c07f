"""Asking again, as any client can, what became of a request whose answer nobody got."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import luod_client
from luod_client import Code, Refusal
from soak.model import Breach, Event, Model, State, Violation


class Again:
    """See the module's text.

    Args:
        model: is told what was found out.
        where: the runtime directory.
        hear: hears all that clients have told by now.
    """

    def __init__(self, model: Model, where: str, hear: Callable[[], None]) -> None:
        self._model = model
        self._where = where
        self._hear = hear

    def ask(self, session_id: bytes, verb: str) -> None:
        """Ask about one request. When its client may still be read by luod, nothing is found out yet.

        Raises:
            Violation: luod has lost the session.
            Disconnected, NoDaemon, ProtocolFault: luod doesn't answer.
        """
        said = "nothing"
        try:
            self._repeat(session_id, verb)
            said = "done"
            self._model.step(session_id, Event.FINALIZED if verb == "finalize" else Event.ENDED)
        except Refusal as refusal:
            said = f"{refusal.code}: {refusal.message}"
            self._hear()  # somebody else may have ended it
            known = self._model.get(session_id)
            if known is not None and known.state is not State.GONE:
                self._not_done(session_id, verb, refusal.code)
        finally:
            self._model.note(session_id, f"asked again: {verb}: {said}"[:200])

    def _repeat(self, session_id: bytes, verb: str) -> None:
        if verb == "finalize":
            luod_client.finalize_again(session_id, runtime_dir=self._where)
            return
        with luod_client.deserialize(runtime_dir=self._where) as looker:
            if verb == "finish":
                looker.finish(session_id)
            else:
                looker.discard(session_id=session_id, force=True)

    def _not_done(self, session_id: bytes, verb: str, code: Code) -> None:
        known = self._model.get(session_id)
        if verb == "finalize":
            if code is Code.NO_SUCH_SESSION and known is not None and known.state is State.SEALING:
                self._model.step(session_id, Event.ABSENT)
        elif code is Code.NO_SUCH_SESSION:
            raise Violation(Breach.LOST, f"luod knows nothing of a session of which {verb} was asked", session_id)
        elif code is Code.SESSION_FINISHED:
            self._model.step(session_id, Event.ENDED)
        elif verb == "finish" and code is Code.OUT_OF_ORDER:
            # It is claimed as long as luod may still read what its claimer asked.
            with luod_client.deserialize(runtime_dir=self._where) as looker, suppress(Refusal):
                if looker.show(session_id=session_id).info.state == "preserved":
                    self._model.not_ended(session_id)
