"""A finalize that was sent before the answers to what precedes it were read, and the limits of a request's number and a client's name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pytest

import luod_client
from harness import Daemon
from luod_protocol import messages as m
from luod_protocol.errors import Code, FaultCode
from raw import FINALIZE, HELLO, SESSION_ID, Raw

OPEN: Mapping[str, Any] = {"type": "open", "seq": 2, "session": "pipelined", "session_id": SESSION_ID}


def test_a_finalize_behind_a_refused_preserve_seals_nothing(daemon: Daemon) -> None:
    directory = daemon.runtime_dir
    with Raw(directory) as client, open(os.devnull, "rb") as refused, luod_client.deserialize(runtime_dir=directory) as look:
        client.say(OPEN)
        client.say({"type": "preserve", "seq": 3, "entries": [{"name": "device"}]}, [refused.fileno()])
        client.say({**FINALIZE, "seq": 4, "entries": 1})
        answers = [client.hear() for _ in range(3)]
        assert isinstance(answers[0], m.Opened)
        assert isinstance(answers[1], m.Refused)
        assert answers[1].code == Code.KIND_NOT_SUPPORTED
        assert isinstance(answers[2], m.Refused)
        assert answers[2].code == Code.BAD_REQUEST
        assert look.show("pipelined").info.state == "open"
        assert isinstance(client.ask({**FINALIZE, "seq": 5, "entries": 0}), m.Finalized)
        assert look.show("pipelined").info.state == "preserved"
        look.discard("pipelined")


@pytest.mark.parametrize("wrong", [{"seq": -1}, {"seq": 2**32}, {"client": "x" * 256}])
def test_a_number_or_a_name_out_of_range_ends_the_connection(daemon: Daemon, wrong: Mapping[str, Any]) -> None:
    with Raw(daemon.runtime_dir, greet=False) as client:
        answer = client.ask({**HELLO, **wrong})
        assert isinstance(answer, m.Fault)
        assert answer.code == FaultCode.MALFORMED
        assert client.packet() is None


def test_the_greatest_number_and_name_are_taken(daemon: Daemon) -> None:
    with Raw(daemon.runtime_dir, greet=False) as client:
        answer = client.ask({**HELLO, "seq": 2**32 - 1, "client": "x" * 255})
        assert isinstance(answer, m.Welcome)
        assert answer.seq == 2**32 - 1
