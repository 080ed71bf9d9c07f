"""The codes of refusals and faults."""

from __future__ import annotations

import errno
import os
import re

import pytest

from luod_protocol.connection import fault, refusal, refused
from luod_protocol.errors import Code, Disconnected, FaultCode, LuodError, ProtocolFault, Refusal
from luod_protocol.messages import Refused

ALL = (*Code, *FaultCode)


@pytest.mark.parametrize("code", ALL)
def test_each_code_has_one_errno_and_a_stable_form(code: Code | FaultCode) -> None:
    assert code.errno in errno.errorcode
    assert os.strerror(code.errno)
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", code.value)
    assert code.value == code.name.lower().replace("_", "-")


def test_no_code_is_both() -> None:
    assert len({code.value for code in ALL}) == len(ALL)


@pytest.mark.parametrize("code", Code)
def test_a_refusal_crosses_the_wire(code: Code) -> None:
    said = Refusal(code, "the message", entry="ram")
    heard = refusal(refused(3, said))
    assert (heard.code, heard.errno, heard.message, heard.entry) == (code, code.errno, "the message", "ram")
    assert str(heard) == "the message"


@pytest.mark.parametrize("code", FaultCode)
def test_a_fault_says_code_errno_and_text(code: FaultCode) -> None:
    error = ProtocolFault(code, "the message")
    told = fault(error)
    assert (told.code, told.errno, told.message, error.errno) == (code.value, code.errno, "the message", code.errno)


def test_a_refusal_of_a_later_luod_can_be_read() -> None:
    heard = refusal(Refused(seq=1, code="from-the-future", errno=5, message="why"))
    assert (heard.code, heard.message, heard.entry) == (Code.BAD_REQUEST, "why", "")


def test_all_are_luod_errors_and_none_is_another() -> None:
    kinds = (Refusal, ProtocolFault, Disconnected)
    for kind in kinds:
        assert issubclass(kind, LuodError)
        assert not any(issubclass(kind, other) for other in kinds if other is not kind)
