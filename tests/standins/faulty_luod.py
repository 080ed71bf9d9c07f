"""A luod that misbehaves at chosen steps of a handover, as the successor or as the old daemon: faults without hooks in the product.

    faulty_luod.py PLAN REPORT [luod's own arguments]

PLAN is a list of STEP=ACTION, with commas. A step is WHEN:MESSAGE:N, the Nth time (1 when left out) that WHEN (`before-send`, `instead-of`
sending, `after-send`, `after-receive`) comes for a handover message, or that a box or staged entries are verified (`verify:box:N`,
`verify:entries:N`). Each step that comes is appended to the file REPORT, just before its action.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

import attrs
import trio

from luod import verify
from luod.__main__ import main
from luod.handlers.base import Mismatch
from luod.succession.channel import Channel
from luod.succession.messages import CODEC, Box, Connection, Copied, Declined, Handover, Meet, Serving, Verified
from luod_protocol import wire
from luod_protocol.version import VersionRange

FAR: Final = VersionRange(low=8, high=9)
"""Versions of a luod that is far ahead."""

STATUS: Final = 7
"""With which `exit` ends."""


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _exit() -> NoReturn:
    os._exit(STATUS)


def _raise() -> NoReturn:
    # The traceback is meant; the test's daemon must not be blamed for it.
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 2)
    raise RuntimeError("a fault that a test wants")


def _mismatch() -> NoReturn:
    raise Mismatch("a mismatch that a test wants")


ENDS: Final[Mapping[str, Callable[[], None]]] = {"kill": _kill, "stop": _stop, "exit": _exit, "raise": _raise, "mismatch": _mismatch}

SAYS: Final[Mapping[str, bytes]] = {
    "garbage": b"\xc1 this is no msgpack",
    "decline": CODEC.encode(Declined(reason="not today")),
    "say-meet": CODEC.encode(
        Meet(luod="x", pid=1, handover=FAR, wire=FAR, manifest=FAR, kinds={}),
    ),
    "say-verified": CODEC.encode(Verified(sessions=0)),
    "say-copied": CODEC.encode(Copied()),
    "say-serving": CODEC.encode(Serving()),
}
"""Packets that are said out of turn; then it goes on as if nothing had been."""

MEETS: Final[Mapping[str, Callable[[Meet], Meet]]] = {
    "far-handover": lambda meet: attrs.evolve(meet, handover=FAR),
    "far-wire": lambda meet: attrs.evolve(meet, wire=FAR),
    "far-manifest": lambda meet: attrs.evolve(meet, manifest=FAR),
    "no-pipes": lambda meet: attrs.evolve(meet, kinds={kind: known for kind, known in meet.kinds.items() if kind != "pipe"}),
    "far-memfds": lambda meet: attrs.evolve(meet, kinds={**meet.kinds, "memfd": ("memfd-v2",)}),
}


def _another_session(message: Handover, fds: Sequence[int]) -> tuple[Handover, Sequence[int]]:
    assert isinstance(message, (Box, Connection))
    return attrs.evolve(message, session_id=bytes(16)), fds


CHANGES: Final[Mapping[str, Callable[[Handover, Sequence[int]], tuple[Handover, Sequence[int]]]]] = {
    "another-session": _another_session,
    "turn-round": lambda message, fds: (message, fds[::-1]),
    "one-less": lambda message, fds: (message, fds[:-1]),
}
"""What a luod sends instead."""


class Plan:
    """What to do when."""

    def __init__(self, text: str, report: str) -> None:
        self._actions = dict(part.split("=") for part in text.split(",") if part)
        self._report = report
        self._seen: Counter[str] = Counter()

    def due(self, when: str, what: str) -> str:
        """The action of this step, which is reported, or the empty string."""
        self._seen[f"{when}:{what}"] += 1
        step = f"{when}:{what}:{self._seen[f'{when}:{what}']}"
        action = self._actions.pop(step, "") or self._actions.pop(step.removesuffix(":1"), "")
        if action:
            file = os.open(self._report, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.write(file, f"{step.removesuffix(':1')}\n".encode())
            os.close(file)
        return action

    async def at(self, when: str, channel: Channel, message: Handover) -> Handover:
        """This step has come. Returns the message to go on with."""
        action = self.due(when, message.type)
        if action in ENDS:
            ENDS[action]()
        elif action in SAYS:
            wire.send(_raw(channel), SAYS[action], flags=socket.MSG_DONTWAIT)
        elif action == "say-fd":
            wire.send(_raw(channel), CODEC.encode(Verified(sessions=0)), [2], flags=socket.MSG_DONTWAIT)
        elif action == "close":
            _raw(channel).shutdown(socket.SHUT_RDWR)
        elif action == "wait":
            await trio.to_thread.run_sync(self.wait)
        elif action in MEETS and isinstance(message, Meet):
            return MEETS[action](message)
        elif action:
            raise ValueError(f"no action {action} here")
        return message

    def wait(self) -> None:
        """Until the test opens and closes the FIFO beside the report."""
        with open(f"{self._report}.go", "rb") as go:
            go.read()


def _raw(channel: Channel) -> socket.socket:
    raw: socket.socket = vars(channel)["_raw"]
    return raw


def install(plan: Plan) -> None:
    """Wrap luod's handover so that `plan` hears of each step."""
    send: Callable[..., Awaitable[None]] = Channel.send
    send_now: Callable[..., None] = Channel.send_now
    receive: Callable[[Channel], Awaitable[Any]] = Channel.receive
    boxed, entries = verify.boxed, verify.entries

    async def faulty_send(self: Channel, message: Handover, fds: Sequence[int] = ()) -> None:
        action = plan.due("instead-of", message.type)
        if action == "nothing":
            return
        if action:
            message, fds = CHANGES[action](message, fds)
        message = await plan.at("before-send", self, message)
        await send(self, message, fds)
        await plan.at("after-send", self, message)

    def faulty_send_now(self: Channel, message: Handover, fds: Sequence[int] = ()) -> None:
        for when in ("before-send", "after-send"):
            action = plan.due(when, message.type)
            if action in ENDS:
                ENDS[action]()
            elif action == "wait":
                plan.wait()
            elif action:
                wire.send(_raw(self), SAYS[action], flags=socket.MSG_DONTWAIT)
            if when == "before-send":
                send_now(self, message, fds)

    async def faulty_receive(self: Channel) -> Any:
        received = await receive(self)
        if received is not None:
            await plan.at("after-receive", self, received[0])
        return received

    def faulty_boxed(*args: Any) -> Any:
        ENDS.get(plan.due("verify", "box"), int)()
        return boxed(*args)

    def faulty_entries(*args: Any, **options: Any) -> None:
        ENDS.get(plan.due("verify", "entries"), int)()
        entries(*args, **options)

    for owner, name, function in (
        (Channel, "send", faulty_send),
        (Channel, "send_fast", faulty_send),
        (Channel, "send_now", faulty_send_now),
        (Channel, "receive", faulty_receive),
        (verify, "boxed", faulty_boxed),
        (verify, "entries", faulty_entries),
    ):
        setattr(owner, name, function)


if __name__ == "__main__":
    install(Plan(sys.argv[1], sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
