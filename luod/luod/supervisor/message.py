"""What one datagram of sd_notify(3) says. Pure.

The rules are systemd's (src/core/service.c, service_notify_message; src/core/manager.c for BARRIER=1): assignments in lines, the first of a
name counts, unknown ones are ignored, nothing else may come with BARRIER=1, and a datagram with a NUL in its middle says nothing.
"""

from __future__ import annotations

from typing import Final, NamedTuple

MAX_MESSAGE_BYTES: Final = 4096
"""systemd's NOTIFY_BUFFER_MAX (PIPE_BUF)."""

MAX_NAME_CHARACTERS: Final = 255
"""systemd's FDNAME_MAX."""

DEFAULT_NAME: Final = "stored"
"""The name of a descriptor that came without one, or with one that isn't valid."""


class Message(NamedTuple):
    """A datagram, understood.

    Attributes:
        barrier: BARRIER=1 is there; nothing else counts then.
        main_pid: the process that is named as the main one from now on, or 0.
        store: the descriptors that came are to be stored, under `name`, and dropped when one hangs up if `poll`.
        remove: what is stored as `name` is to be dropped.
        status: for people; None: not said.
    """

    barrier: bool = False
    main_pid: int = 0
    ready: bool = False
    stopping: bool = False
    ping: bool = False
    trigger: bool = False
    store: bool = False
    remove: bool = False
    name: str = DEFAULT_NAME
    poll: bool = True
    status: str | None = None


def valid_name(name: str) -> bool:
    """Whether a descriptor may be called so: printable ASCII without `:` (systemd's fdname_is_valid; it allows the empty name)."""
    return len(name) <= MAX_NAME_CHARACTERS and all(" " <= char <= "~" and char != ":" for char in name)


def parse(data: bytes) -> Message:
    """What `data` says. What it says wrongly, it doesn't say."""
    text = data.removesuffix(b"\0").decode("utf-8", "replace")
    if "\0" in text:
        return Message()
    lines = [line for line in text.split("\n") if line]
    if "BARRIER=1" in lines:
        return Message(barrier=True)
    fields: dict[str, str] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if equals:
            fields.setdefault(key, value)
    pid, name = fields.get("MAINPID", ""), fields.get("FDNAME")
    named = name is not None and valid_name(name)
    remove = fields.get("FDSTOREREMOVE") == "1"
    return Message(
        main_pid=int(pid) if pid.isascii() and pid.isdigit() and len(pid) <= 10 else 0,
        ready="READY=1" in lines and "STOPPING=1" not in lines,
        stopping="STOPPING=1" in lines,
        ping=fields.get("WATCHDOG") == "1",
        trigger=fields.get("WATCHDOG") == "trigger",
        store="FDSTORE=1" in lines and not remove,
        remove=remove and named,
        name=name if name is not None and named else DEFAULT_NAME,
        poll="FDPOLL=0" not in lines,
        status=fields.get("STATUS"),
    )
