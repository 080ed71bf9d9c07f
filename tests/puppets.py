"""Client processes of other users that do what a test tells them, one thing at a time."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from harness import Client, Daemon, Talk, User, spawn_client
from luod_client import Code, FaultCode


def _puppet(talk: Talk, where: str) -> None:
    import os

    import luod_client

    held: dict[str, luod_client.Session] = {}
    connected: list[luod_client.Deserializer] = []
    claims: list[luod_client.Claim] = []

    def put(session: luod_client.Session, entries: list[str], metadata: bytes = b"") -> None:
        read, write = os.pipe()
        try:
            session.preserve(dict.fromkeys(entries, write), metadata=dict.fromkeys(entries, metadata))
        finally:
            os.close(read)
            os.close(write)

    def preserve(name: str, owner: int | None = None, count: int = 1) -> bytes:
        with luod_client.serialize(name, owner=owner, runtime_dir=where) as session:
            put(session, ["pipe", *(f"pipe-{number}" for number in range(1, count))])
            session.finalize()
            return session.id

    def open_session(name: str, metadata: bytes = b"") -> bytes:
        held[name] = luod_client.serialize(name, metadata=metadata, runtime_dir=where)
        return held[name].id

    def look(verb: str, arguments: dict[str, Any]) -> object:
        with luod_client.deserialize(runtime_dir=where) as looker:
            match verb:
                case "list":
                    return [(each.session, each.owner) for each in looker.list(**arguments)]
                case "show":
                    return looker.show(**arguments).info.owner
                case "claim":
                    with looker.claim(**arguments) as claim:
                        claim.retrieve("pipe")["pipe"].close()
                        return claim.finish().session_id
                case _:
                    return getattr(looker, verb)(**arguments).session_id

    def act(verb: str, arguments: dict[str, Any]) -> object:
        match verb:
            case "preserve":
                return preserve(**arguments)
            case "open":
                return open_session(**arguments)
            case "add":
                put(held[arguments.pop("name")], list(arguments.pop("entries")), **arguments)
            case "unpreserve":
                held[arguments["name"]].unpreserve(*arguments["entries"])
            case "finalize_held":
                return held[arguments["name"]].finalize().survives
            case "close":
                held.pop(arguments["name"]).close()
            case "held":
                if arguments.pop("what") == "show":
                    return connected[-1].show(**arguments).info.owner
                claims.append(connected[-1].claim(**arguments))
                return claims[-1].info.owner
            case "finish_held":
                return claims.pop().finish().session_id
            case "connect":
                connected.append(luod_client.deserialize(runtime_dir=where))
                return connected[-1].status().generation
            case "disconnect":
                connected.pop().close()
            case "finalize":
                return luod_client.finalize_again(**arguments, runtime_dir=where).session_id
            case "upgrade" | "status":
                with luod_client.control(runtime_dir=where) as control:
                    return control.upgrade().generation if verb == "upgrade" else control.status().generation
            case _:
                return look(verb, arguments)
        return None

    try:
        while True:
            verb, arguments = talk.hear()
            try:
                talk.tell(("done", act(verb, arguments)))
            except (luod_client.Refusal, luod_client.ProtocolFault) as no:
                talk.tell((no.code.value, no.message))
    finally:
        for each in (*held.values(), *connected):
            each.close()


def ask(puppet: Client, verb: str, **arguments: Any) -> Any:
    """Have a puppet do something, which must succeed. Returns what it got."""
    puppet.tell((verb, arguments))
    code, value = puppet.hear()
    assert code == "done", value
    return value


def refused(puppet: Client, code: Code | FaultCode, verb: str, **arguments: Any) -> str:
    """Have a puppet do something, which must be refused. Returns the text."""
    puppet.tell((verb, arguments))
    got, value = puppet.hear()
    assert got == code.value, (got, value)
    return str(value)


def everybody_may_connect(daemon: Daemon, *endpoints: str) -> None:
    """What a group would do, for users without one."""
    for endpoint in endpoints:
        os.chmod(f"{daemon.runtime_dir}/{endpoint}", 0o666)


@contextmanager
def puppet_of(daemon: Daemon, user: User) -> Generator[Client]:
    """A puppet of this user."""
    with spawn_client(_puppet, daemon.runtime_dir, user=user) as client:
        yield client
