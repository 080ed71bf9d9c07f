"""Which handler takes a fd, as far as the configuration allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from luod.handlers import handler_of, kinds, unknown
from luod.handlers.base import Handler, Probe
from luod.handlers.file import AllowedFiles, File
from luod.handlers.socket import Socket, ends_at
from luod_protocol.errors import Code, Refusal

_NO_FILES: Final = (
    "of files and devices luod takes those whose path its configuration allows ([files]), and it allows none: preserve the path, or copy "
    "the content into a memfd"
)

_NOT_ALLOWED: Final = "luod's configuration does not allow ([kinds]); whoever runs luod can change that"


class Recognizer:
    """Made once from the configuration. It is asked when something is preserved, and at no other time: a successor that is stricter keeps
    what it takes over.

    Args:
        kinds: the kinds that are taken.
        files: paths that are taken as `file`, see `AllowedFiles`.
        own: the addresses (struct sockaddr) of luod's own sockets.
    """

    def __init__(self, *, kinds: Iterable[str], files: Iterable[str], own: Iterable[bytes] = ()) -> None:
        self._own: Final = frozenset(own)
        self._files: Final = AllowedFiles(files)
        self._allowed: Final = frozenset(kinds) - (frozenset() if self._files else {File.kind})

    @property
    def kinds(self) -> Mapping[str, str]:
        """Every kind that is taken and its handler's `compatible`."""
        return {kind: compatible for kind, compatible in kinds().items() if kind in self._allowed}

    @property
    def not_allowed(self) -> Mapping[str, str]:
        """Every other kind, and why it isn't taken."""
        why = f"a kind that {_NOT_ALLOWED}"
        return {kind: _NO_FILES if kind == File.kind and not self._files else why for kind in kinds() if kind not in self._allowed}

    def recognize(self, probe: Probe) -> Handler:
        """The handler of the fd's kind.

        Raises:
            Refusal: kind-not-supported, with what it seems to be, and what to do or whom to ask.
        """
        handler = handler_of(probe)
        if handler is None and File().recognize(probe):
            return self._file(probe)
        if handler is None:
            raise unknown(probe)
        if isinstance(handler, Socket) and ends_at(probe.fd, self._own):
            # Preserved with a session of its own it would never end, for luod would hold both ends.
            raise Refusal(
                Code.KIND_NOT_SUPPORTED, "this fd is a connection to luod itself, or a socket of luod's own: connect again instead"
            )
        if handler.kind not in self._allowed:
            raise Refusal(
                Code.KIND_NOT_SUPPORTED,
                f"this fd is of kind {handler.kind}, which {_NOT_ALLOWED} (`luoctl capabilities` lists the kinds that it allows)",
            )
        return handler

    def _file(self, probe: Probe) -> Handler:
        path = self._files.path_of(probe) if File.kind in self._allowed else None
        if path is None:
            refusal = unknown(probe)
            raise Refusal(
                refusal.code,
                f"{refusal.message}. Of files and devices it takes those whose path its configuration allows ([files]), and this is none; "
                "whoever runs luod can change that",
            )
        return File(path)
