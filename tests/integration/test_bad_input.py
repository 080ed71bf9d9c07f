"""Clients that don't speak the protocol: each gets the fault that says why, and costs the others nothing.

In each case a session with the end to write of a pipe is open on the connection; the pipe's other end sees that luod lets go of it. That
nothing else of luod's is lost is checked at the end of every test, by the fixture.
"""

from __future__ import annotations

import array
import itertools
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import luod_client
from harness import Daemon, until
from luod_protocol import messages as m
from luod_protocol.codec import pack
from luod_protocol.errors import FaultCode
from luod_protocol.fds import close_all
from luod_protocol.limits import MAX_PACKET_BYTES
from luod_protocol.messages import Endpoint
from raw import FINALIZE, HELLO, PRESERVE, SESSION_ID, SPEC, STATUS, Raw, faults, open_session, preserve_many, rolled_back
from things import eventfd, find, let_go, pipe, state

# ---------------------------------------------------------------------------------------------------------- not messages


NO_MSGPACK: Final[Mapping[str, tuple[bytes, str]]] = {
    "a byte that msgpack never uses": (b"\xc1", "not one msgpack value"),
    "zeros": (bytes(1000), "not one msgpack value"),
    "a map cut short": (pack(STATUS)[:-3], "not one msgpack value"),
    "something behind it": (pack(STATUS) + b"\0", "not one msgpack value"),
    "two messages": (pack(STATUS) * 2, "not one msgpack value"),
    "an array of 2**32 - 1": (b"\xdd\xff\xff\xff\xff", "not one msgpack value"),
    "a map of 2**32 - 1": (b"\xdf\xff\xff\xff\xff\xa1a", "not one msgpack value"),
    "text of 2**32 - 1": (b"\xdb\xff\xff\xff\xff", "not one msgpack value"),
    "very deep": (b"\x91" * 5000 + b"\xc0", "not one msgpack value"),
    "text that isn't UTF-8": (b"\x81\xa4type\xa2\xff\xfe", "not one msgpack value"),
    "a surrogate": (b"\x81\xa4type\xa3\xed\xa0\x80", "not one msgpack value"),
    "a number": (pack(7), "a map with text keys"),
    "nil": (pack(None), "a map with text keys"),
    "an array": (pack([STATUS]), "a map with text keys"),
    "a key that is a number": (pack({1: 2}), "not one msgpack value"),
    "a key that is bin": (pack({b"type": "status"}), "expected text keys"),
    "a key twice": (b"\x83\xa4type\xa6status\xa3seq\x01\xa3seq\x02", "the same key twice"),
    "a timestamp": (b"\x82\xa4type\xa6status\xa3seq\xd6\xff\0\0\0\x07", "expected int"),
    "an extension type": (b"\x82\xa4type\xa6status\xa3seq\xd4\x05\x01", "expected int"),
    "a key twice, deep inside": (b"\x82\xa4type\xa6status\xa3seq\x82\xa1a\x01\xa1a\x01", "the same key twice"),
}

MALFORMED: Final[Mapping[str, tuple[Mapping[str, Any], str]]] = {
    "a field is missing": ({"type": "status"}, "seq"),
    "an extra field": ({**STATUS, "colour": "red"}, "colour"),
    "seq is text": ({**STATUS, "seq": "1"}, "seq"),
    "seq is a bool": ({**STATUS, "seq": True}, "seq"),
    "seq is a float": ({**STATUS, "seq": 1.0}, "seq"),
    "seq is nil": ({**STATUS, "seq": None}, "seq"),
    "entries is a map": ({**PRESERVE, "entries": SPEC}, "entries"),
    "entries is text": ({**PRESERVE, "entries": "ram"}, "entries"),
    "an entry is text": ({**PRESERVE, "entries": ["ram"]}, "entries"),
    "an entry has no name": ({**PRESERVE, "entries": [{}]}, "name"),
    "an entry's name is bin": ({**PRESERVE, "entries": [{"name": b"ram"}]}, "name"),
    "an entry's metadata is text": ({**PRESERVE, "entries": [{**SPEC, "metadata": "text"}]}, "metadata"),
    "an entry's needs is text": ({**PRESERVE, "entries": [{**SPEC, "needs": "vm"}]}, "needs"),
    "an entry's needs has a number": ({**PRESERVE, "entries": [{**SPEC, "needs": [1]}]}, "needs"),
    "an entry has an extra field": ({**PRESERVE, "entries": [{**SPEC, "kind": "memfd"}]}, "kind"),
    "an id is text": ({**FINALIZE, "session_id": "0" * 16}, "session_id"),
    "require is text": ({**FINALIZE, "require": "kexec"}, "require"),
    "seal is an array": ({**FINALIZE, "seal": ["ram"]}, "seal"),
    "seal has text": ({**FINALIZE, "seal": {"ram": "write"}}, "seal"),
    "a field of another request": ({"type": "cancel", "seq": 1, "names": []}, "names"),
}

UNKNOWN: Final[Mapping[str, Mapping[str, Any]]] = {
    "another type": {**STATUS, "type": "frobnicate"},
    "a reply": {"type": "opened", "seq": 1, "session_id": SESSION_ID},
    "no type": {"seq": 1},
    "an empty map": {},
    "type is a number": {**STATUS, "type": 7},
    "type is bin": {**STATUS, "type": b"status"},
    "type is an array": {**STATUS, "type": ["status"]},
    "type is a map": {**STATUS, "type": {"type": "status"}},
    "a very long type": {**STATUS, "type": "x" * 60_000},
    "a type with control characters": {**STATUS, "type": "status\n\x1b[31m\0"},
}


def test_what_is_not_msgpack(daemon: Daemon) -> None:
    for data, says in NO_MSGPACK.values():
        faults(daemon, FaultCode.MALFORMED, says, lambda raw: raw.put(data))  # noqa: B023  # called at once


def test_fields_that_are_wrong(daemon: Daemon) -> None:
    with eventfd() as irq:
        for message, says in MALFORMED.values():
            fds = [irq.fileno()] if message["type"] == "preserve" else []
            faults(daemon, FaultCode.MALFORMED, says, lambda raw: raw.say(message, fds))  # noqa: B023  # called at once


def test_unknown_messages(daemon: Daemon) -> None:
    for message in UNKNOWN.values():
        faults(daemon, FaultCode.UNKNOWN_MESSAGE, "unknown type", lambda raw: raw.say(message))  # noqa: B023  # called at once
    with rolled_back(daemon) as raw:
        raw.say(UNKNOWN["a very long type"])
        assert len(raw.faulted(FaultCode.UNKNOWN_MESSAGE)) < 1000


def test_fds_that_come_with_nonsense_are_closed(daemon: Daemon) -> None:
    for data in (b"\xc1", pack(UNKNOWN["another type"]), pack(MALFORMED["an extra field"][0]), pack(HELLO), b"\0" * 70_000):
        with rolled_back(daemon) as raw, pipe() as (read, write):
            raw.put(data, [write.fileno()] * 253)
            write.close()
            raw.hear()
            raw.ended()
            assert let_go(read)


# --------------------------------------------------------------------------------------------------------------- hello


def test_hello_comes_once(daemon: Daemon) -> None:
    faults(daemon, FaultCode.UNEXPECTED_MESSAGE, "hello was said already", lambda raw: raw.say(HELLO))
    for endpoint in Endpoint:
        with Raw(daemon.runtime_dir, endpoint) as raw:
            raw.say(HELLO)
            raw.faulted(FaultCode.UNEXPECTED_MESSAGE)


def test_a_hello_with_a_long_name(daemon: Daemon) -> None:
    with Raw(daemon.runtime_dir, greet=False) as raw:
        raw.say({**HELLO, "client": "x" * 256})
        assert "256 characters" in raw.faulted(FaultCode.MALFORMED)


def test_a_seq_out_of_range(daemon: Daemon) -> None:
    for seq in (-1, 2**32, -(2**63), 2**64 - 1):
        faults(daemon, FaultCode.MALFORMED, f"seq is {seq}", lambda raw: raw.say({**STATUS, "seq": seq}))  # noqa: B023  # called at once


def test_hello_comes_first(daemon: Daemon) -> None:
    for endpoint in Endpoint:
        for message in (STATUS, {"type": "list", "seq": 1}, FINALIZE, {"type": "upgrade", "seq": 1}):
            with Raw(daemon.runtime_dir, endpoint, greet=False) as raw:
                raw.say(message)
                assert "must be hello" in raw.faulted(FaultCode.UNEXPECTED_MESSAGE)
    with Raw(daemon.runtime_dir, greet=False) as raw, pipe() as (read, write):
        raw.say(PRESERVE, [write.fileno()])
        write.close()
        raw.faulted(FaultCode.UNEXPECTED_MESSAGE)
        assert let_go(read)


def test_no_common_version(daemon: Daemon) -> None:
    ranges = [(2, 9), (0, 0), (-5, -1), (9, 1), (2**63, 2**64 - 1)]
    for endpoint, (low, high) in itertools.product(Endpoint, ranges):
        with Raw(daemon.runtime_dir, endpoint, greet=False) as raw:
            raw.say({**HELLO, "low": low, "high": high})
            raw.try_put(pack(STATUS))  # before the answer is there
            assert "this luod 1" in raw.faulted(FaultCode.NO_COMMON_VERSION)


def test_a_client_of_a_later_version_that_knows_this_one(daemon: Daemon) -> None:
    with Raw(daemon.runtime_dir, greet=False) as raw:
        welcome = raw.ask({**HELLO, "high": 1000, "client": "x" * 255})
        assert isinstance(welcome, m.Welcome)
        assert welcome.version == 1


# ------------------------------------------------------------------------------------------------------------------ fds


def test_a_count_of_fds_that_does_not_match(daemon: Daemon) -> None:
    for entries, fds in ((1, 0), (1, 2), (0, 1), (2, 1), (1, 253), (253, 252)):
        with pipe() as (read, write), rolled_back(daemon) as raw:
            raw.say(preserve_many(entries), [write.fileno()] * fds)
            write.close()
            assert f"takes {entries} fds, {fds} came" in raw.faulted(FaultCode.FD_COUNT)
            assert let_go(read)


def test_fds_with_a_request_that_takes_none(daemon: Daemon) -> None:
    with eventfd() as irq:
        for message in (STATUS, FINALIZE, {"type": "cancel", "seq": 1}):
            faults(daemon, FaultCode.FD_COUNT, "takes 0 fds, 1 came", lambda raw: raw.say(message, [irq.fileno()]))  # noqa: B023  # called at once
        with Raw(daemon.runtime_dir, greet=False) as raw:
            raw.say(HELLO, [irq.fileno()])
            raw.faulted(FaultCode.FD_COUNT)


# -------------------------------------------------------------------------------------------------------------- sizes


def test_a_packet_over_the_limit(daemon: Daemon) -> None:
    with Raw(daemon.runtime_dir) as raw:
        largest = pack({"type": "claim", "seq": 1, "session": "x" * (MAX_PACKET_BYTES - 28)})
        assert len(largest) == MAX_PACKET_BYTES
        raw.put(largest)
        assert isinstance(raw.hear(), m.Refused)
    for size in (MAX_PACKET_BYTES + 1, 200_000):
        faults(daemon, FaultCode.PACKET_TOO_LARGE, "65536", lambda raw: raw.put(bytes(size)))  # noqa: B023  # called at once
        with pipe() as (read, write), rolled_back(daemon) as raw:
            raw.put(bytes(size), [write.fileno()] * 7)
            write.close()
            raw.faulted(FaultCode.PACKET_TOO_LARGE)
            assert let_go(read)


def test_an_empty_packet_is_the_end(daemon: Daemon) -> None:
    with rolled_back(daemon) as raw:
        raw.put(b"")
        raw.ended()
    with rolled_back(daemon) as raw, pipe() as (read, write):
        raw.put(b"", [write.fileno()])
        write.close()
        raw.ended()
        assert let_go(read)


# -------------------------------------------------------------------------------------------- ends in odd moments


def test_ancillary_data_that_is_not_asked_for(daemon: Daemon) -> None:
    with open_session(daemon) as (raw, _):
        who = array.array("i", [os.getpid(), os.geteuid(), os.getegid()])
        raw.sock.sendmsg([pack(STATUS)], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, who)])
        assert isinstance(raw.hear(), m.DaemonStatus)
    until(lambda: state(daemon.runtime_dir) == "gone", "the session to be rolled back")


def test_half_a_connection(daemon: Daemon) -> None:
    with rolled_back(daemon) as raw:
        raw.sock.shutdown(socket.SHUT_WR)
        raw.ended()
    with rolled_back(daemon) as raw:
        raw.sock.shutdown(socket.SHUT_RD)
        until(lambda: not raw.try_put(pack(STATUS)), "the end of the connection")


def test_a_client_that_ends_with_its_finalize_unanswered(daemon: Daemon) -> None:
    with open_session(daemon) as (raw, read):
        raw.say(FINALIZE)
        raw.sock.close()
        until(lambda: state(daemon.runtime_dir) == "preserved", "the session to be preserved")
        again = luod_client.finalize_again(SESSION_ID, runtime_dir=daemon.runtime_dir)
        assert again.session_id == SESSION_ID
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
            looker.discard("guest")
        assert let_go(read, 0)


def test_a_client_that_ends_with_its_retrieve_unread(daemon: Daemon) -> None:
    with open_session(daemon) as (raw, read):
        raw.ask(FINALIZE)
        with Raw(daemon.runtime_dir, Endpoint.DESERIALIZE) as claimer:
            claimer.ask({"type": "claim", "seq": 1, "session": "guest"})
            assert claimer.fill({"type": "retrieve", "seq": 2, "names": ["pipe"] * 253}) > 10
        until(lambda: state(daemon.runtime_dir) == "preserved", "the claim to be released")
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
            looker.discard("guest")
        assert let_go(read, 0)


def test_who_retrieved_is_remembered_once(daemon: Daemon) -> None:
    with open_session(daemon) as (raw, read):
        raw.ask(FINALIZE)
        with Raw(daemon.runtime_dir, Endpoint.DESERIALIZE) as claimer:
            claimer.ask({"type": "claim", "seq": 1, "session": "guest"})
            for names in (["pipe"], ["pipe", "pipe"], ["pipe"] * 253):
                claimer.say({"type": "retrieve", "seq": 2, "names": names})
                packet = claimer.packet()
                assert packet is not None
                fds = packet.take_fds()
                close_all(fds)
                assert len(fds) == len(names)
            found = find(daemon.runtime_dir)
            assert found is not None
            assert [each.pid for each in found.retrieved_by] == [os.getpid()]
            claimer.ask({"type": "finish", "seq": 3, "session_id": SESSION_ID})
        assert let_go(read, 0)


def test_too_many_connections(tmp_path: Path) -> None:
    config = tmp_path / "luod.toml"
    config.write_text("[limits]\nmax_connections = 4\n")
    with Daemon(options=("--config", str(config))) as daemon:
        until(lambda: daemon.status().connections == 1, "the connections of `status` itself to be gone")
        with open_session(daemon) as (raw, read), Raw(daemon.runtime_dir), Raw(daemon.runtime_dir, Endpoint.CONTROL):
            with Raw(daemon.runtime_dir, Endpoint.DESERIALIZE) as last:
                for endpoint in (Endpoint.SERIALIZE, Endpoint.DESERIALIZE):
                    with Raw(daemon.runtime_dir, endpoint, greet=False) as refused:
                        refused.try_put(pack(HELLO))
                        assert "4 connections, its limit" in refused.faulted(FaultCode.TOO_MANY_CONNECTIONS)
                assert daemon.status().connections == 5, "control has room beyond the limit"
                assert isinstance(last.ask(STATUS), m.DaemonStatus)
            assert not let_go(read, 0)
            assert isinstance(raw.ask({"type": "cancel", "seq": 1}), m.Cancelled)
            assert let_go(read, 0)
