"""A luod that misbehaves at chosen steps of a handover, as the successor or as the old daemon: faults without hooks in the product.

    faulty_luod.py PLAN REPORT [luod's own arguments]

PLAN is a list of STEP=ACTION, with commas. A step is WHEN:WHAT:N, the Nth time (1 when left out) that WHEN comes for WHAT:

* `before-send`, `instead-of` sending, `after-send`, `before-receive` (it lies in the queue) and `after-receive` of a handover message;
* `verify` of a `box` or of staged `entries`;
* `before-tell` and `after-tell` of what the service manager is told, by its first variable (`MAINPID`, `BARRIER`, ...);
* `before-call` and `after-call` of luod's own functions in `CALLS`;
* `hold`: the old daemon is about to send a `box`, and nothing bounds how long that takes.

Each step that comes is appended to the file REPORT, just before its action, and is not taken again by a process with the same REPORT. Where
there is a file REPORT.trace, every step is appended to it: the process, `SIDE/STEP`, and the session that it is about.

A PLAN of @FILE is read from FILE each time, so it can be changed while luod runs. Its steps may say whose they are: `new/` a successor's,
`first/` those of a luod that was started otherwise, `old/` those of a luod that had been started when the plan was written.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NoReturn

import attrs
import trio

from luod import __main__ as luod_main
from luod import starting, upgrades, verify
from luod.handlers.base import Mismatch
from luod.notify import Manager, ManagerFault
from luod.server import Server
from luod.session import Session
from luod.succession.channel import Channel
from luod.succession.messages import (
    CODEC,
    Box,
    Connection,
    Copied,
    Declined,
    Gone,
    Handover,
    LetGo,
    Meet,
    Retrieved,
    Serving,
    Verified,
)
from luod.succession.old import OldSide
from luod_protocol import wire
from luod_protocol.errors import ProtocolFault
from luod_protocol.limits import MAX_PACKET_BYTES
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


def _fails(number: int) -> Callable[[], NoReturn]:
    def fail() -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


def _no_fds() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Not 0, at which fcntl(F_DUPFD) says EINVAL.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))


def _fds_again() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


ENDS: Final[Mapping[str, Callable[[], None]]] = {
    "kill": _kill,
    "stop": _stop,
    "exit": _exit,
    "raise": _raise,
    "mismatch": _mismatch,
    "EMFILE": _no_fds,
    **{name: _fails(getattr(errno, name)) for name in ("ENOMEM", "EPIPE", "ETOOMANYREFS")},
}
"""`EMFILE` is real, and lasts until the handover's socket is closed; the other names of errors are what the system call returns, once."""

CALLS: Final[Mapping[str, tuple[ModuleType | type, str]]] = {
    "spawn": (upgrades, "spawn"),
    "thaw": (Server, "thaw"),
    "exit": (luod_main, "_exit"),
    "adopt": (starting, "adopt"),
}
"""Functions that are steps."""

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
    """What to do when.

    Args:
        text: the plan, or @ and its file.
        report: a path.
        side: whose steps these are until the plan changes.
    """

    def __init__(self, text: str, report: str, side: str = "") -> None:
        self._source = Path(text[1:]) if text.startswith("@") else None
        self._report = report
        self._side = side
        self._text = self._read() if self._source is not None else text
        self._actions = self._parsed()
        self._seen: Counter[str] = Counter()
        self._trace = -1
        with suppress(FileNotFoundError):
            self._trace = os.open(f"{report}.trace", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def _read(self) -> str:
        assert self._source is not None
        try:
            return self._source.read_text()
        except OSError as error:  # without a descriptor it can't be read: it is as it was
            if error.errno != errno.EMFILE:
                raise
            return self._text

    def _parsed(self) -> dict[str, str]:
        with open(self._report, encoding="ascii") as file:
            taken = file.read().split()
        actions = dict(part.split("=") for part in self._text.split(",") if "=" in part)
        return {step: action for step, action in actions.items() if step not in taken}

    def _look_again(self) -> None:
        if self._source is not None and (text := self._read()) != self._text:
            self._text, self._side = text, "old"
            self._actions = self._parsed()
            self._seen.clear()

    def due(self, when: str, what: str, about: bytes = b"") -> str:
        """The action of this step, which is reported, or the empty string."""
        self._look_again()
        self._seen[f"{when}:{what}"] += 1
        number = self._seen[f"{when}:{what}"]
        step = f"{when}:{what}" if number == 1 else f"{when}:{what}:{number}"
        if self._trace >= 0:
            os.write(self._trace, f"{os.getpid()} {self._side}/{step} {about.hex()}\n".encode())
        for name in (f"{self._side}/{step}", step):
            action = self._actions.pop(name, "")
            if action:
                file = os.open(self._report, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
                os.write(file, f"{name}\n".encode())
                os.close(file)
                return action
        return ""

    async def at(self, when: str, channel: Channel, message: Handover) -> Handover:
        """This step has come. Returns the message to go on with."""
        action = self.due(when, message.type, _about(message))
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
        try:
            with open(f"{self._report}.go", "rb") as go:
                go.read()
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise


def _about(message: Handover) -> bytes:
    """The session that a message is about."""
    match message:
        case Gone():
            return message.ended.session_id
        case Box() | LetGo() | Retrieved():
            return message.session_id
        case _:
            return b""


def _raw(channel: Channel) -> socket.socket:
    raw: socket.socket = vars(channel)["_raw"]
    return raw


async def _queued(channel: Channel) -> Handover | None:
    """The message that is received next; None: the end, or nothing that is one."""
    raw = _raw(channel)
    if raw.fileno() == -1:
        return None
    await trio.lowlevel.wait_readable(raw)
    try:
        # Without room for fds, none are made by a look.
        data = raw.recv(MAX_PACKET_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return CODEC.decode(data) if data else None
    except (OSError, ProtocolFault):
        return None


def install(plan: Plan) -> None:
    """Wrap luod's handover so that `plan` hears of each step."""
    _install_handover(plan)
    _install_manager(plan)
    for name in CALLS:
        _install_call(plan, name)


def _install_manager(plan: Plan) -> None:
    tell: Callable[..., Awaitable[None]] = Manager.tell

    async def faulty_tell(self: Manager, *fields: str, **options: Any) -> None:
        what = fields[0].partition("=")[0]
        try:
            ENDS.get(plan.due("before-tell", what), int)()
        except OSError as error:
            raise ManagerFault(f"a fault that a test wants: {error.strerror}") from None
        await tell(self, *fields, **options)
        ENDS.get(plan.due("after-tell", what), int)()

    setattr(Manager, "tell", faulty_tell)  # noqa: B010 - a type checker takes no other way


def _install_call(plan: Plan, name: str) -> None:
    owner, attribute = CALLS[name]
    call = getattr(owner, attribute)

    def faulty(*args: Any, **options: Any) -> Any:
        ENDS.get(plan.due("before-call", name), int)()
        result = call(*args, **options)
        ENDS.get(plan.due("after-call", name), int)()
        return result

    setattr(owner, attribute, faulty)


def _install_handover(plan: Plan) -> None:
    send: Callable[..., Awaitable[None]] = Channel.send
    send_now: Callable[..., None] = Channel.send_now
    receive: Callable[[Channel], Awaitable[Any]] = Channel.receive
    close: Callable[..., bool] = Channel.close
    send_box: Callable[..., Awaitable[None]] = vars(OldSide)["_send_box"]
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
        queued = await _queued(self)
        if queued is not None:
            await plan.at("before-receive", self, queued)
        received = await receive(self)
        if received is not None:
            await plan.at("after-receive", self, received[0])
        return received

    async def faulty_send_box(self: OldSide, session: Session, send_it: Any) -> None:
        if plan.due("hold", "box") == "wait":
            await trio.to_thread.run_sync(plan.wait)
        await send_box(self, session, send_it)

    def faulty_close(self: Channel, reason: str = "") -> bool:
        told = close(self, reason)
        _fds_again()
        return told

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
        (Channel, "close", faulty_close),
        (OldSide, "_send_box", faulty_send_box),
        (verify, "boxed", faulty_boxed),
        (verify, "entries", faulty_entries),
    ):
        setattr(owner, name, function)


if __name__ == "__main__":
    install(Plan(sys.argv[1], sys.argv[2], "new" if "--succeed-fd" in sys.argv else "first"))
    sys.exit(luod_main.main(sys.argv[3:]))
