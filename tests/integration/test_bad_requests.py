"""Requests that are understood and not granted: each is refused with its code, nothing changes, and the session goes on."""

from __future__ import annotations

import os
import secrets
import select
import socket
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import luod_client
from harness import Daemon, until
from luod_protocol import messages as m
from luod_protocol.codec import encode_bulk, pack
from luod_protocol.errors import Code
from luod_protocol.fds import OwnedFd, close_all, own
from luod_protocol.messages import Endpoint
from luod_protocol.sealed import seal_bytes
from raw import SESSION_ID, STATUS, Raw
from things import eventfd, let_go, memfd, pipe, preserve_pipe

FINALIZE: Final = {"type": "finalize", "seq": 9, "session_id": SESSION_ID}


@contextmanager
def goes_on(daemon: Daemon) -> Generator[Raw]:
    """A connection with an open session of one entry, `pipe`. After what happens in the block the session must be as it was, and luod must
    hold nothing more than it."""
    with Raw(daemon.runtime_dir) as raw, pipe() as (read, write):
        session_id = secrets.token_bytes(16)
        raw.open(session_id=session_id)
        raw.preserve(pipe=write.fileno())
        write.close()
        yield raw
        until(lambda: _holds_what_it_says(daemon, raw), "what was refused to be closed")
        assert not let_go(read, 0)
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
            shown = looker.show("guest")
            assert [entry.name for entry in shown.entries] == ["pipe"]
            assert isinstance(raw.ask({**FINALIZE, "session_id": session_id}), m.Finalized)
            with looker.claim("guest") as claim:
                close_all(claim.retrieve().values())
                claim.finish()
        assert let_go(read, 0)


def _holds_what_it_says(daemon: Daemon, raw: Raw) -> bool:
    now = raw.ask(STATUS)
    assert isinstance(now, m.DaemonStatus)
    # At the start there was one connection.
    kept = now.connections - 1 + now.staged_fds + now.sessions_preserved + now.sessions_claimed
    return now.open_fds == daemon.baseline + kept


def _preserve(*specs: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "preserve", "seq": 3, "entries": specs}


BAD_NAMES: Final = {
    "": "it is empty",
    "n" * 256: "256 characters",
    "n" * 10_000: "10000 characters",
    "a:b": "':'",
    "a\nb": r"'\n'",
    "a\0b": r"'\x00'",
    "\x1b[31m": r"'\x1b'",
    "a\x7f": r"'\x7f'",
    "gäst": "'ä'",
    "😀": "printable ASCII",
    "a\u202eb": r"'\u202e'",
}


def test_entry_names_that_cannot_be(daemon: Daemon) -> None:
    with goes_on(daemon) as raw, pipe() as (read, write):
        for name, says in BAD_NAMES.items():
            text = raw.refused(_preserve({"name": "good"}, {"name": name}), Code.BAD_NAME, [write.fileno()] * 2, entry=name[:64])
            assert says in text
            assert len(text) < 300
            text = raw.refused(_preserve({"name": "good", "needs": [name]}), Code.BAD_NAME, [write.fileno()], entry=name[:64])
            assert "'good'" in text
        write.close()
        assert let_go(read)


def test_names_that_are_there_already(daemon: Daemon) -> None:
    with goes_on(daemon) as raw, pipe() as (read, write):
        raw.refused(_preserve({"name": "new"}, {"name": "new"}), Code.ENTRY_EXISTS, [write.fileno()] * 2, entry="new")
        raw.refused(_preserve({"name": "new"}, {"name": "pipe"}), Code.ENTRY_EXISTS, [write.fileno()] * 2, entry="pipe")
        raw.refused({"type": "unpreserve", "seq": 3, "names": ["pipe", "pipe"]}, Code.ENTRY_EXISTS, entry="pipe")
        raw.refused({"type": "unpreserve", "seq": 3, "names": ["pipe", "new"]}, Code.NO_SUCH_ENTRY, entry="new")
        text = raw.refused({"type": "unpreserve", "seq": 3, "names": ["x" * 10_000] * 2}, Code.ENTRY_EXISTS, entry="x" * 255)
        assert len(text) < 300
        text = raw.refused({"type": "unpreserve", "seq": 3, "names": ["x" * 10_000]}, Code.NO_SUCH_ENTRY, entry="x" * 255)
        assert len(text) < 300
        write.close()
        assert let_go(read)


def test_metadata_that_is_too_large(daemon: Daemon) -> None:
    with goes_on(daemon) as raw, pipe() as (read, write):
        text = raw.refused(_preserve({"name": "new", "metadata": bytes(32_769)}), Code.TOO_LARGE, [write.fileno()], entry="new")
        assert "32769 bytes" in text
        huge = pack(_preserve({"name": "new", "metadata": bytes(1_000_000)}))
        with seal_bytes(huge, "bulk") as bulk:
            raw.put(encode_bulk(len(huge)), [bulk.fileno(), write.fileno()])
        assert isinstance(refused := raw.hear(), m.Refused)
        assert (refused.code, refused.entry) == (Code.TOO_LARGE, "new")
        write.close()
        assert let_go(read)
    with Raw(daemon.runtime_dir) as raw:
        request = {"type": "open", "seq": 1, "session": "guest", "session_id": SESSION_ID}
        raw.refused({**request, "metadata": bytes(32_769)}, Code.TOO_LARGE)
        assert isinstance(raw.ask({**request, "metadata": bytes(32_768)}), m.Opened)
        assert isinstance(raw.ask({"type": "cancel", "seq": 1}), m.Cancelled)


def test_requests_that_say_nothing(daemon: Daemon) -> None:
    with goes_on(daemon) as raw:
        raw.refused(_preserve(), Code.BAD_REQUEST)
        assert isinstance(raw.ask({"type": "unpreserve", "seq": 3, "names": []}), m.Unpreserved)
        raw.refused({**FINALIZE, "session_id": b""}, Code.BAD_REQUEST)
        raw.refused({**FINALIZE, "session_id": bytes(16)}, Code.BAD_REQUEST)


def test_a_finalize_behind_a_refused_preserve_seals_no_part(daemon: Daemon) -> None:
    with Raw(daemon.runtime_dir) as raw, eventfd() as irq:
        raw.open()
        raw.preserve(one=irq.fileno())
        raw.say(_preserve({"name": "two"}, {"name": "one"}), [irq.fileno()] * 2)
        raw.say({**FINALIZE, "entries": 3})
        assert isinstance(raw.hear(), m.Refused)
        refused = raw.hear()
        assert isinstance(refused, m.Refused)
        assert (refused.code, "has 1 entries" in refused.message) == (Code.BAD_REQUEST, True)
        for entries in (0, 2, -1, 2**63):
            raw.refused({**FINALIZE, "entries": entries}, Code.BAD_REQUEST)
        assert isinstance(raw.ask({"type": "cancel", "seq": 1}), m.Cancelled)


def test_a_refused_preserve_in_a_pipeline_stops_nothing(daemon: Daemon) -> None:
    with Raw(daemon.runtime_dir) as raw, eventfd() as irq:
        raw.open()
        raw.say(_preserve({"name": "one"}), [irq.fileno()])
        raw.say(_preserve({"name": "one"}), [irq.fileno()])
        raw.say(_preserve({"name": "two"}), [irq.fileno()])
        raw.say({"type": "cancel", "seq": 5})
        raw.say(STATUS)
        replies = [raw.hear() for _ in range(4)]
        assert [each.type for each in replies] == ["preserved", "refused", "preserved", "cancelled"]
        raw.ended()


# --------------------------------------------------------------------------------------------------------------- kinds


def _opened(path: str, flags: int) -> OwnedFd:
    return OwnedFd(os.open(path, flags | os.O_CLOEXEC))


def _place_of(make: Callable[[], OwnedFd]) -> OwnedFd:
    with make() as fd:
        return _opened(f"/proc/self/fd/{fd.fileno()}", os.O_PATH)


def _pipe_end() -> OwnedFd:
    read, write = own(os.pipe2(os.O_CLOEXEC))
    write.close()
    return read


KINDS: Final[Mapping[str, Callable[[], OwnedFd]]] = {
    "a file": lambda: _opened(__file__, os.O_RDONLY),
    "a directory": lambda: _opened("/", os.O_RDONLY),
    "a device": lambda: _opened("/dev/null", os.O_RDWR),
    "a file of /proc": lambda: _opened("/proc/self/stat", os.O_RDONLY),
    "an epoll": lambda: OwnedFd(_epoll()),
    "a network namespace": lambda: _opened("/proc/self/ns/net", os.O_RDONLY),
    "the place of a memfd": lambda: _place_of(memfd),
    "the place of a pipe": lambda: _place_of(_pipe_end),
    "the place of a file": lambda: _opened(__file__, os.O_PATH),
}


def _epoll() -> int:
    with select.epoll() as epoll:
        return os.dup(epoll.fileno())


def test_kinds_that_are_not_taken(daemon: Daemon) -> None:
    with goes_on(daemon) as raw, pipe() as (read, write), eventfd() as irq:
        for what, make in KINDS.items():
            with make() as bad:
                fds = [write.fileno(), bad.fileno(), irq.fileno()]
                request = _preserve({"name": "good"}, {"name": "bad"}, {"name": "better"})
                text = raw.refused(request, Code.KIND_NOT_SUPPORTED, fds, entry="bad")
                assert "'bad'" in text, what
        write.close()
        assert let_go(read)


def test_a_socket_with_a_name_that_is_not_text(daemon: Daemon) -> None:
    for name in (b"\0luod-\xff\xfe", os.fsencode(daemon.runtime_dir) + b"/\xff\xfe"):
        with goes_on(daemon) as raw, socket.socket(socket.AF_UNIX) as sock:
            sock.bind(name)
            raw.preserve(socket=sock.fileno())
            assert isinstance(raw.ask({"type": "unpreserve", "seq": 3, "names": ["socket"]}), m.Unpreserved)


# --------------------------------------------------------------------------------------------------------------- order


def test_requests_out_of_order(daemon: Daemon) -> None:
    read, session_id = preserve_pipe(daemon.runtime_dir, "other")
    retrieve = {"type": "retrieve", "seq": 1, "names": ["pipe"]}
    release, claim = {"type": "release", "seq": 1}, {"type": "claim", "seq": 1, "session": "other"}
    with read, Raw(daemon.runtime_dir) as raw:
        requests: Sequence[Mapping[str, Any]] = (_preserve(), {"type": "unpreserve", "seq": 1, "names": []}, {"type": "cancel", "seq": 1})
        for request in requests:
            assert "ready" in raw.refused(request, Code.OUT_OF_ORDER)
    with goes_on(daemon) as raw:
        raw.refused({"type": "open", "seq": 1, "session": "again", "session_id": bytes(16)}, Code.OUT_OF_ORDER)
    with Raw(daemon.runtime_dir, Endpoint.DESERIALIZE) as raw:
        for request in (retrieve, release, {"type": "finish", "seq": 1, "session_id": session_id}):
            raw.refused(request, Code.OUT_OF_ORDER)
        assert isinstance(raw.ask(claim), m.Claimed)
        for request in (claim, {"type": "discard", "seq": 1, "session": "other"}):
            assert "claimed" in raw.refused(request, Code.OUT_OF_ORDER)
        raw.refused({"type": "finish", "seq": 1, "session_id": bytes(16)}, Code.BAD_REQUEST)
        raw.refused({**retrieve, "names": []}, Code.BAD_REQUEST)
        for number in (254, 10_000):
            raw.refused({**retrieve, "names": ["pipe"] * number}, Code.TOO_LARGE)
        raw.refused({**retrieve, "names": ["pipe", "x" * 10_000]}, Code.NO_SUCH_ENTRY, entry="x" * 255)
        assert isinstance(raw.ask(retrieve), m.Retrieved)
        assert isinstance(raw.ask(release), m.Released)
        raw.refused(release, Code.OUT_OF_ORDER)
        assert isinstance(raw.ask({"type": "discard", "seq": 1, "session": "other"}), m.Discarded)
    with Raw(daemon.runtime_dir, Endpoint.CONTROL) as raw:
        assert isinstance(raw.ask({"type": "monitor", "seq": 1}), m.Monitoring)
        for request in (STATUS, {"type": "monitor", "seq": 1}, {"type": "upgrade", "seq": 1}):
            assert "monitoring" in raw.refused(request, Code.OUT_OF_ORDER)


MINIMAL: Final[Mapping[str, Mapping[str, Any]]] = {
    "open": {"session": "x", "session_id": bytes(16)},
    "preserve": {"entries": []},
    "unpreserve": {"names": []},
    "finalize": {"session_id": bytes(16)},
    "cancel": {},
    "list": {},
    "show": {"session": "x"},
    "claim": {"session": "x"},
    "retrieve": {"names": []},
    "release": {},
    "finish": {"session_id": bytes(16)},
    "discard": {"session": "x"},
    "monitor": {},
    "upgrade": {},
    "takeover": {},
}
WHERE: Final[Mapping[Endpoint, Sequence[str]]] = {
    Endpoint.SERIALIZE: ("open", "preserve", "unpreserve", "finalize", "cancel"),
    Endpoint.DESERIALIZE: ("list", "show", "claim", "retrieve", "release", "finish", "discard"),
    Endpoint.CONTROL: ("list", "show", "monitor", "upgrade", "takeover"),
}


def test_requests_at_the_wrong_endpoint(daemon: Daemon) -> None:
    for endpoint, belonging in WHERE.items():
        with Raw(daemon.runtime_dir, endpoint) as raw:
            for kind in MINIMAL.keys() - set(belonging):
                text = raw.refused({"type": kind, "seq": 1, **MINIMAL[kind]}, Code.WRONG_ENDPOINT)
                assert f"not for the endpoint {endpoint}" in text
            assert isinstance(raw.ask(STATUS), m.DaemonStatus)


def test_owners_that_cannot_be(daemon: Daemon) -> None:
    with Raw(daemon.runtime_dir, Endpoint.DESERIALIZE) as raw:
        for owner in (-1, 2**32 - 1, 2**63):
            code = Code.BAD_REQUEST if os.geteuid() == 0 else Code.NOT_PERMITTED
            assert str(owner) in raw.refused({"type": "list", "seq": 1, "owner": owner}, code)


def test_upgrades_that_cannot_be(daemon: Daemon) -> None:
    with Raw(daemon.runtime_dir, Endpoint.CONTROL) as raw:
        for program, code in (
            ("relative", Code.BAD_REQUEST),
            ("/no/such/program", Code.UPGRADE_FAILED),
            ("/a\0b", Code.BAD_REQUEST),
            ("/x" * 5_000, Code.UPGRADE_FAILED),
        ):
            text = raw.refused({"type": "upgrade", "seq": 1, "program": program}, code)
            assert len(text) < 500, text
    assert daemon.status().generation == 1


def test_any_seq_comes_back(daemon: Daemon) -> None:
    with Raw(daemon.runtime_dir) as raw:
        for seq in (0, 1, 2**31, 2**32 - 1):
            reply = raw.ask({**STATUS, "seq": seq})
            assert isinstance(reply, m.DaemonStatus)
            assert reply.seq == seq


def test_long_forms_of_values_are_taken(daemon: Daemon) -> None:
    seq = b"\xd3" + (1).to_bytes(8, "big")
    long = b"\xdf\0\0\0\2" + b"\xdb\0\0\0\3seq" + seq + b"\xdb\0\0\0\4type" + b"\xdb\0\0\0\6status"
    with Raw(daemon.runtime_dir) as raw:
        raw.put(long)
        assert isinstance(raw.hear(), m.DaemonStatus)
