"""What luod does for its clients: from a request to its verb.

Theory. The orchestrator is called with one request at a time and answers at once: no verb waits, so nothing can come between its checks and
its act. What has to be waited for it returns with the reply, as an `Outcome`: changes that a successor must know of first, and descriptors
to close first. The server does that, then sends the reply. Where a service manager holds copies it comes before the act: such a verb
returns a `Pending`, whose session nobody else can touch until the server has had the manager do its part and calls for the act.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from luod.capabilities import matrix
from luod.custody import Client, Custody, Outcome, Pending
from luod.deserializing import Deserializing
from luod.handlers.recognizer import Recognizer
from luod.serializing import Serializing
from luod_protocol import messages as m
from luod_protocol.fds import OwnedFd


class Orchestrator:
    """The verbs of one daemon, over its custody; `recognizer` says what is taken."""

    def __init__(self, custody: Custody, recognizer: Recognizer) -> None:
        self._custody = custody
        self._recognizer = recognizer
        serializing = Serializing(custody, recognizer)
        deserializing = Deserializing(custody)
        self._verbs: Mapping[type[m.Request], Callable[[Client, Any, list[OwnedFd]], Outcome | Pending]] = {
            m.Capabilities: self._capabilities,
            m.Open: serializing.open,
            m.Preserve: serializing.preserve,
            m.Unpreserve: serializing.unpreserve,
            m.Finalize: serializing.finalize,
            m.Cancel: serializing.cancel,
            m.List: deserializing.list_sessions,
            m.Show: deserializing.show,
            m.Claim: deserializing.claim,
            m.Retrieve: deserializing.retrieve,
            m.Release: deserializing.release,
            m.Finish: deserializing.finish,
            m.Discard: deserializing.discard,
        }

    def handle(self, client: Client, request: m.Request, fds: list[OwnedFd]) -> Outcome | Pending:
        """Do what `request` asks. `fds` came with it: those that are kept are taken out of the list.

        Raises:
            Refusal: it is not granted; nothing changed.
        """
        self._custody.admit(request)
        return self._verbs[type(request)](client, request, fds)

    def _capabilities(self, _: Client, request: m.Capabilities, __: list[OwnedFd]) -> Outcome:
        rows = matrix(self._custody, self._recognizer)
        outlook = self._custody.outlook.with_kernel(self._custody.carriable.fault)
        survives = {each.value: reason for each, reason in outlook.reasons.items()}
        kinds = dict(self._recognizer.kinds)
        return Outcome(reply=m.DaemonCapabilities(seq=request.seq, kinds=kinds, survives=survives, matrix=rows))
