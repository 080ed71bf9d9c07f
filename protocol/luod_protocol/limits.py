"""The limits of the protocol, each with its unit and the reason for its value."""

from __future__ import annotations

from typing import Final

MAX_PACKET_BYTES: Final = 64 * 1024
"""One packet on any endpoint. A larger message travels as `bulk`. Well below the 212,960 bytes that a default socket buffer takes."""

MAX_BULK_BYTES: Final = 16 * 1024 * 1024
"""A message that travels in a sealed memfd."""

MAX_REQUEST_VALUES: Final = 131_072
"""msgpack values in a request, of strangers: room for 16,384 entries with all their seals."""

MAX_VALUES: Final = 4_194_304
"""msgpack values in any other message, of one's own kind."""

MAX_FDS_PER_PACKET: Final = 253
"""SCM_MAX_FD of include/net/scm.h: sendmsg(2) answers EINVAL beyond."""

MAX_NAME_BYTES: Final = 255
"""A session's or an entry's name: printable ASCII without `:` (systemd's FDNAME= has the same rule)."""

MAX_METADATA_BYTES: Final = 32 * 1024
"""What a client may attach to a session, and to each entry. More belongs into a memfd of its own."""

MAX_NEEDS_PER_ENTRY: Final = 256
"""Names in `needs`."""

MAX_ENTRIES_PER_SESSION: Final = 16_384
"""A box of boxes holds 63,756; this leaves room and keeps a `show` reply within MAX_BULK_BYTES."""

MAX_MANIFEST_BYTES: Final = 15 * 1024 * 1024
"""The manifest of one session, metadata included: below MAX_BULK_BYTES, so that `show` and `claim` can always tell it."""

MAX_SEQ: Final = 2**32 - 1
"""The number of a request."""

MAX_CLIENT_CHARACTERS: Final = 255
"""What a client calls itself in `hello`."""

SESSION_ID_BYTES: Final = 16
"""A session's random id."""

RESERVED_PREFIX: Final = "luod"
"""Names of sessions that begin so are luod's own."""


def name_fault(name: str) -> str | None:
    """Why `name` can't be a session's or an entry's name, or None when it can."""
    if not name:
        return "it is empty"
    if len(name) > MAX_NAME_BYTES:
        return f"it has {len(name)} characters, at most {MAX_NAME_BYTES} are allowed"
    for character in name:
        if not " " <= character <= "~":
            return f"it contains {character!r}, only printable ASCII is allowed"
        if character == ":":
            return "it contains ':', which service managers can't store"
    return None
