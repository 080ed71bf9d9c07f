"""Messages to bytes and back, and everything that isn't one."""

from __future__ import annotations

import struct
from typing import Any, get_args, get_origin

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luod_protocol import messages as m
from luod_protocol.codec import REPLIES, REQUESTS, Codec, as_map, bulk_size, encode_bulk, pack, unpack
from luod_protocol.errors import FaultCode, ProtocolFault
from luod_protocol.limits import MAX_BULK_BYTES, MAX_REQUEST_VALUES
from unit.generated import KINDS, REPLY_KINDS, REQUEST_KINDS, any_of, codec_of, fields, plain

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
quick = settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])

WRONG: dict[Any, tuple[Any, ...]] = {
    int: ("7", True, 1.0, None, b"7", [7], {}),
    float: ("1.5", True, None, b"", []),
    str: (b"text", 7, None, ["t"], True),
    bytes: ("bytes", 7, None, [1], True),
    bool: (1, 0, "true", None, b""),
    tuple: ({}, "text", b"bytes", None, 7),
    dict: ([], "text", None, 7, [["key", "value"]]),
}
"""What each type is not, although a lenient reader would make it so."""

MESSAGE_BYTES = 1000
"""More than what any complaint needs, and so little that a fault always fits a packet."""


def fault_of(data: bytes, kind: type[Any] = m.Status) -> ProtocolFault:
    """The fault that decoding must end with."""
    with pytest.raises(ProtocolFault) as caught:
        codec_of(kind).decode(data)
    assert 0 < len(caught.value.message.encode()) < MESSAGE_BYTES
    return caught.value


def as_sent(message: Any) -> dict[str, Any]:
    """The map that goes over the wire."""
    codec = next(codec_of(kind) for kind in KINDS if isinstance(message, kind))
    return as_map(unpack(codec.encode(message)))


def test_the_tags_are_unique_and_all_are_decoded_where_they_belong() -> None:
    for kinds in (REQUEST_KINDS, REPLY_KINDS):
        assert len({kind.type for kind in kinds}) == len(kinds)
    assert len(KINDS) == len(REQUEST_KINDS) + len(REPLY_KINDS) == 47


@each_kind
def test_it_comes_back_as_it_was(kind: type[Any]) -> None:
    message = plain(kind)
    data = codec_of(kind).encode(message)
    assert codec_of(kind).decode(data) == message
    assert as_sent(message)["type"] == kind.type
    assert set(as_sent(message)) == {"type", *fields(kind)}


@each_kind
def test_whatever_it_holds_comes_back(kind: type[Any]) -> None:
    @quick
    @given(any_of(kind))
    def comes_back(message: Any) -> None:
        assert codec_of(kind).decode(codec_of(kind).encode(message)) == message

    comes_back()


@each_kind
def test_a_missing_field_is_named_unless_it_has_a_default(kind: type[Any]) -> None:
    for field in attrs.fields(kind):
        sent = as_sent(plain(kind))
        del sent[field.name]
        if field.default is attrs.NOTHING:
            error = fault_of(pack(sent), kind)
            assert error.code is FaultCode.MALFORMED
            assert field.name in error.message
        else:
            default = field.default.factory() if isinstance(field.default, attrs.Factory) else field.default  # type: ignore[arg-type]  # mypy: Factory is a function for the stubs
            assert getattr(codec_of(kind).decode(pack(sent)), field.name) == default


@each_kind
def test_an_extra_field_is_refused(kind: type[Any]) -> None:
    error = fault_of(pack({**as_sent(plain(kind)), "surplus": 1}), kind)
    assert error.code is FaultCode.MALFORMED
    assert "surplus" in error.message


def wrong_for(kind: Any) -> tuple[Any, ...]:
    """Values that a field of this type must not take."""
    if kind == m.Fact:
        return (True, 1.5, None, b"", [])
    if not isinstance(kind, type) and get_origin(kind) not in (tuple, dict):
        return tuple(each for each in wrong_for(get_args(kind)[0]) if each is not None)
    if attrs.has(kind):
        return (None, 7, "text", [], {"surplus": 1})
    return WRONG[get_origin(kind) or kind]


def inside(kind: Any, value: Any) -> Any:
    """`value` as the one item of a field that holds several."""
    return [value] if get_origin(kind) is tuple else {"key": value}


@each_kind
def test_nothing_is_coerced(kind: type[Any]) -> None:
    for name, of in fields(kind).items():
        tried = [*wrong_for(of)]
        if get_origin(of) in (tuple, dict):
            item = get_args(of)[0 if get_origin(of) is tuple else 1]
            tried += [inside(of, wrong) for wrong in wrong_for(item)]
            if attrs.has(item):
                sound = attrs.asdict(plain(item))
                tried += [inside(of, {**sound, deep: wrong}) for deep, deep_of in fields(item).items() for wrong in wrong_for(deep_of)]
                tried += [inside(of, {key: value for key, value in sound.items() if key != "name"})] if "name" in sound else []
        for wrong in tried:
            error = fault_of(pack({**as_sent(plain(kind)), name: wrong}), kind)
            assert error.code is FaultCode.MALFORMED
            assert name in error.message


def test_a_whole_number_is_a_float_but_no_float_is_an_int() -> None:
    event = plain(m.Event)
    decoded = REPLIES.decode(pack({**as_sent(event), "at": 3}))
    assert isinstance(decoded, m.Event)
    assert type(decoded.at) is float
    assert decoded.at == 3.0


@pytest.mark.parametrize("wrong", [True, 1.5, None, b"", []], ids=repr)
def test_a_fact_is_a_number_or_a_text(wrong: object) -> None:
    info = attrs.asdict(plain(m.EntryInfo))
    sound = {**info, "facts": {"size": 1, "seals": "write"}}
    decoded = REPLIES.decode(pack({"type": "preserved", "seq": 1, "entries": [sound]}))
    assert isinstance(decoded, m.Preserved)
    assert decoded.entries[0].facts == {"size": 1, "seals": "write"}
    error = fault_of(pack({"type": "preserved", "seq": 1, "entries": [{**info, "facts": {"size": wrong}}]}), m.Preserved)
    assert "facts" in error.message


def test_a_complaint_is_short_however_long_its_cause() -> None:
    for surplus in ({"x" * 60_000: 1}, {f"x{number}": 1 for number in range(5_000)}):
        assert fault_of(pack({"type": "status", "seq": 1, **surplus})).code is FaultCode.MALFORMED
    wrong = [{"name": number} for number in range(2_000)]
    assert "entries" in fault_of(pack({"type": "preserve", "seq": 1, "entries": wrong})).message


def test_requests_and_replies_are_kept_apart() -> None:
    for kind, codec in ((m.Status, REPLIES), (m.DaemonStatus, REQUESTS)):
        with pytest.raises(ProtocolFault, match=f"unknown type {kind.type}") as caught:
            codec.decode(pack(as_sent(plain(kind))))
        assert caught.value.code is FaultCode.UNKNOWN_MESSAGE


@pytest.mark.parametrize(
    "tag", [None, 7, True, b"status", ["status"], {"a": 1}, "", "Status", "status\0", "x" * 60_000], ids=lambda tag: repr(tag)[:20]
)
def test_an_unknown_tag_is_told_with_what_is_known(tag: object) -> None:
    error = fault_of(pack({"type": tag, "seq": 1}))
    assert error.code is FaultCode.UNKNOWN_MESSAGE
    assert "status" in error.message


def test_no_tag_is_an_unknown_tag() -> None:
    assert fault_of(pack({"seq": 1})).code is FaultCode.UNKNOWN_MESSAGE


SOUND = pack({"type": "status", "seq": 1})
TYPE = pack("type") + pack("status")
SEQ = pack("seq")


def nested(depth: int, opening: bytes) -> bytes:
    """A value within a value within..."""
    return opening * depth + pack(None)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "incomplete"),
        (b"\xc1", ""),
        (SOUND[:-1], "incomplete"),
        (SOUND + b"\0", "extra"),
        (SOUND + SOUND, "extra"),
        (pack([1]), "expected a map"),
        (pack(None), "expected a map"),
        (pack("status"), "expected a map"),
        (pack({1: 2}), "int"),
        (b"\x82" + TYPE + pack(b"seq") + pack(1), "expected text keys"),
        (b"\x82" + TYPE + pack([1]) + pack(1), "list"),
        (b"\x83" + TYPE + SEQ + pack(1) + SEQ + pack(1), "the same key twice"),
        (b"\x83" + TYPE + TYPE + SEQ + pack(1), "the same key twice"),
        (b"\x82" + pack("type") + b"\xa2\xff\xfe" + SEQ + pack(1), "utf-8"),
        (b"\x82" + TYPE + b"\xa3\xff\xfe\xfd" + pack(1), "utf-8"),
        (b"\x82" + TYPE + SEQ + b"\xa3\xed\xa0\x80", "utf-8"),  # a surrogate
        (b"\x82" + TYPE + SEQ + b"\xd4\x05x", "expected int"),  # fixext 1
        (b"\x82" + TYPE + SEQ + b"\xd6\xff\0\0\0\1", "expected int"),  # a timestamp
        (b"\x82" + TYPE + SEQ + b"\xc7\x03\xff\0\0\0", "timestamp"),  # and one of a wrong length
        (b"\xdf\xff\xff\xff\xff", ""),  # a map of 4 billion
        (b"\x82" + TYPE + SEQ + b"\xdd\xff\xff\xff\xff", ""),
        (b"\x82" + TYPE + SEQ + b"\xdb\xff\xff\xff\xff", ""),
        (b"\x82" + TYPE + SEQ + b"\xc6\xff\xff\xff\xff", ""),
        (b"\x82" + TYPE + SEQ + b"\xc9\xff\xff\xff\xff\x05", ""),
        *((b"\x82" + TYPE + SEQ + nested(depth, b"\x91"), "") for depth in (100, 900, 1000, 1022, 60_000)),
        *((b"\x82" + SEQ + pack(1) + pack("type") + nested(depth, b"\x91"), "") for depth in (100, 900, 1000, 1022, 60_000)),
        *((b"\x82" + TYPE + SEQ + nested(depth, b"\x81\xa1k"), "") for depth in (100, 900, 1000, 1022, 20_000)),
        (nested(60_000, b"\x91"), ""),
        (nested(20_000, b"\x81\xa1k"), ""),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_message_is_a_fault(data: bytes, words: str) -> None:
    error = fault_of(data)
    assert error.code in (FaultCode.MALFORMED, FaultCode.UNKNOWN_MESSAGE)
    assert words in error.message


def test_a_request_is_built_of_so_many_values() -> None:
    """Each costs luod memory, and one byte can be one: arrays of arrays and maps count as well."""
    most = MAX_REQUEST_VALUES - 8  # the message is a map of three, and `names` itself is one
    decoded = REQUESTS.decode(pack({"type": "unpreserve", "seq": 1, "names": [""] * most}))
    assert isinstance(decoded, m.Unpreserve)
    assert len(decoded.names) == most
    half = MAX_REQUEST_VALUES // 2
    shapes: list[Any] = [[""] * (most + 1), [[]] * half, [[""]] * half, [{}] * half, {str(number): 1 for number in range(half)}]
    for names in shapes:
        error = fault_of(pack({"type": "unpreserve", "seq": 1, "names": names}))
        assert error.code is FaultCode.MALFORMED
        assert "too many values" in error.message


def test_bytes_for_keys_deep_inside_are_a_fault() -> None:
    entry: dict[Any, Any] = {b"name": "ram", "metadata": b"", "needs": []}
    error = fault_of(pack({"type": "preserve", "seq": 1, "entries": [entry]}))
    assert "expected text keys" in error.message


def test_a_key_twice_deep_inside_is_a_fault() -> None:
    entry = b"\x82" + (pack("name") + pack("ram")) * 2
    data = b"\x83" + pack("type") + pack("preserve") + SEQ + pack(1) + pack("entries") + b"\x91" + entry
    assert "the same key twice" in fault_of(data).message


text = st.text(st.characters(codec="utf-8"), max_size=8)
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        text,
        st.binary(max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(text, st.binary(max_size=3), st.integers(0, 9)), inner, max_size=4),
    ),
    max_leaves=8,
)


def decodes_or_is_a_fault(codec: Codec[Any], data: bytes) -> None:
    """Nothing else may come of it."""
    message = ""
    try:
        codec.decode(data)
    except ProtocolFault as error:
        message = error.message
    assert len(message.encode()) < MESSAGE_BYTES


@settings(max_examples=300, deadline=None, database=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_message_or_a_fault(data: bytes) -> None:
    for codec in (REQUESTS, REPLIES):
        decodes_or_is_a_fault(codec, data)


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KINDS), st.data())
def test_a_message_with_arbitrary_values_is_a_message_or_a_fault(kind: type[Any], data: st.DataObject) -> None:
    sent: dict[Any, Any] = as_sent(plain(kind))
    for name in data.draw(st.lists(st.sampled_from(sorted(sent)), unique=True, min_size=1, max_size=3)):
        sent[name] = data.draw(values)
    sent.update(data.draw(st.dictionaries(st.one_of(text, st.binary(max_size=3)), values, max_size=1)))
    decodes_or_is_a_fault(codec_of(kind), pack(sent))


@settings(max_examples=150, deadline=None, database=None)
@given(st.sampled_from(KINDS), st.data())
def test_a_damaged_message_is_a_message_or_a_fault(kind: type[Any], data: st.DataObject) -> None:
    sound = bytearray(codec_of(kind).encode(plain(kind)))
    for _ in range(data.draw(st.integers(1, 3))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    decodes_or_is_a_fault(codec_of(kind), bytes(sound))


def test_bulk_says_its_size() -> None:
    for size in (1, 65_537, MAX_BULK_BYTES):
        assert bulk_size(encode_bulk(size)) == size


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({"type": "bulk"}, FaultCode.MALFORMED),
        ({"type": "bulk", "size": "7"}, FaultCode.MALFORMED),
        ({"type": "bulk", "size": True}, FaultCode.MALFORMED),
        ({"type": "bulk", "size": 7, "more": 1}, FaultCode.MALFORMED),
        ({"type": "bulk", "size": 0}, FaultCode.PACKET_TOO_LARGE),
        ({"type": "bulk", "size": -1}, FaultCode.PACKET_TOO_LARGE),
        ({"type": "bulk", "size": MAX_BULK_BYTES + 1}, FaultCode.PACKET_TOO_LARGE),
        ({"type": "bulk", "size": 2**64 - 1}, FaultCode.PACKET_TOO_LARGE),
    ],
)
def test_bulk_that_is_not_as_it_must_be_is_a_fault(value: dict[str, object], code: FaultCode) -> None:
    with pytest.raises(ProtocolFault) as caught:
        bulk_size(pack(value))
    assert caught.value.code is code


@pytest.mark.parametrize("value", [{"type": "status", "seq": 1}, {"type": "open", "session": "bulk"}, ["bulk"], "bulk", {"bulk": "type"}])
def test_what_only_mentions_bulk_is_no_bulk(value: object) -> None:
    assert bulk_size(pack(value)) is None


@settings(max_examples=200, deadline=None, database=None)
@given(st.one_of(st.binary(max_size=45), st.binary(max_size=30).map(lambda data: b"\x82\xa4type\xa4bulk\xa4size" + data)))
def test_arbitrary_bytes_are_bulk_or_not_or_a_fault(data: bytes) -> None:
    try:
        size = bulk_size(data)
    except ProtocolFault:
        return
    assert size is None or 0 < size <= MAX_BULK_BYTES


def test_a_float_is_packed_as_a_double() -> None:
    """msgpack could take 32 bits; times would be minutes off."""
    at = 1_795_462_459.123456
    assert struct.pack(">d", at) in REPLIES.encode(attrs.evolve(plain(m.Event), at=at))
