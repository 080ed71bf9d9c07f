"""docs/protocol.md says what the code does: messages, codes, states, limits, and the examples byte by byte.

Each `check_*` takes the document's text and compares it with the code. The tests run them on the document, and once more on copies
with one thing changed, which they have to notice.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import attrs
import pytest

from conformance.recorded import RECORDED, RecordedProbe
from conformance.specimens import SPECIMENS
from luod.checks import SEALS as SEAL_NAMES
from luod.connection import HELLO_S, MAX_IN_FLIGHT, UNREAD_S
from luod.handlers import kinds
from luod.handlers.base import Probe
from luod.handlers.recognizer import Recognizer
from luod.store import MAX_REMEMBERED
from luod.survival import Survives
from luod_protocol import errors, limits, records
from luod_protocol import messages as m
from luod_protocol.codec import REPLIES, REQUESTS, bulk_size, unpack
from luod_protocol.connection import REPLY_TO, TABLE, TAKEOVER_FDS, State
from luod_protocol.sealed import SEALS
from luod_protocol.version import WIRE

DOC = Path(__file__).parents[2] / "docs" / "protocol.md"
REQUEST_CLASSES: tuple[type[m.Request], ...] = get_args(m.Request)
REPLY_CLASSES: tuple[type[m.Reply], ...] = get_args(m.Reply)
RECORDS = (records.EntrySpec, records.EntryInfo, records.ProcessInfo, records.SessionInfo, records.SortSurvival, records.Limits)

Row = dict[str, str]


# Reading the document.


def sections(text: str) -> dict[str, str]:
    """What stands under each heading, up to the next heading of any level."""
    parts = re.split(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M)[1:]
    titles = parts[::2]
    assert len(titles) == len(set(titles)), "two headings are the same"
    return dict(zip(titles, parts[1::2], strict=True))


def section(text: str, title: str) -> str:
    found = sections(text).get(title)
    assert found is not None, f"docs/protocol.md has no section {title}"
    return found


def rows(body: str) -> list[Row]:
    """The rows of the first table in `body`, each by its columns' heads."""
    lines = re.findall(r"^\|(.*)\|$", re.split(r"\n\n(?!\|)", body[body.find("\n|") + 1 :])[0], flags=re.M)
    cells = [[cell.strip() for cell in line.replace(r"\|", "/").split("|")] for line in lines]
    assert len(cells) > 2, f"no table in: {body[:200]}"
    return [dict(zip(cells[0], each, strict=True)) for each in cells[2:]]


def ticked(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def line_of(body: str, head: str) -> str:
    found = re.search(rf"^- {re.escape(head)}: (.*)$", body, flags=re.M)
    assert found is not None, f"no line '- {head}: ...' in: {body[:200]}"
    return found[1]


# What the document has to say.


def wire_type(kind: Any) -> str:
    """How the document names the type of a field."""
    plain: Mapping[Any, str] = {int: "int", str: "str", bytes: "bin", bool: "bool", float: "float", NoneType: "nil"}
    if kind in plain:
        return plain[kind]
    if get_origin(kind) is tuple:
        return f"array of {wire_type(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        assert get_args(kind)[0] is str
        return f"map of str to {wire_type(get_args(kind)[1])}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(wire_type(each) for each in get_args(kind))
    assert kind in RECORDS
    return f"`{kind.__name__}`"


def default_text(field: attrs.Attribute[Any]) -> str:
    """How the document writes what an absent key means; nothing for a field that must be there."""
    if field.default is attrs.NOTHING:
        return ""
    plain = {"": '`""`', b"": "empty bin", None: "nil", False: "false", (): "`[]`"}
    return "`{}`" if isinstance(field.default, attrs.Factory) else plain[field.default]  # type: ignore[arg-type]  # stubs: a function, it is a class


def fields(kind: type[Any], *, with_default: bool) -> list[Row]:
    hints = get_type_hints(kind)
    result: list[Row] = []
    for field in attrs.fields(kind):
        row = {"field": f"`{field.name}`", "type": wire_type(hints[field.name])}
        result.append({**row, "default": default_text(field)} if with_default else row)
    return result


def check_fields(text: str, title: str, kind: type[Any], *, with_default: bool) -> None:
    table = rows(section(text, f"`{title}`"))
    assert all(row.pop("meaning") for row in table), f"a field of {title} has no meaning"
    assert table == fields(kind, with_default=with_default), f"the fields of {title}"


def check_requests(text: str) -> None:
    everything: set[str] = set(ticked(section(text, "Refusals of any request")))
    codes = {code.value for code in errors.Code}
    for kind in REQUEST_CLASSES:
        check_fields(text, kind.type, kind, with_default=True)
        body = section(text, f"`{kind.type}`")
        where = {endpoint for (endpoint, _), row in TABLE.items() if kind in row}
        assert set(ticked(line_of(body, "Endpoints"))) == where, kind.type
        assert ticked(line_of(body, "Answer")) == [REPLY_TO[kind].type], kind.type
        assert line_of(body, "fds") == ("one for each entry, in the order of `entries`" if kind is m.Preserve else "none"), kind.type
        refusals = ticked(re.sub(r"\([^)]*\)", "", line_of(body, "Refused with")))
        assert set(refusals) <= codes, f"{kind.type} is refused with codes that don't exist: {set(refusals) - codes}"
        everything |= set(refusals)
    assert codes <= everything, f"no request is said to be refused with {codes - everything}"


FDS_OF_REPLIES = {m.Retrieved.type: "one for each name, in the order of `names`", m.TakeoverOffered.type: str(TAKEOVER_FDS)}


def check_replies(text: str) -> None:
    for kind in REPLY_CLASSES:
        check_fields(text, kind.type, kind, with_default=False)
        body = section(text, f"`{kind.type}`")
        answers = [request.type for request, reply in REPLY_TO.items() if reply is kind]
        if answers:
            assert ticked(line_of(body, "Answers")) == answers, kind.type
        bring = FDS_OF_REPLIES.get(kind.type, "none")
        assert re.split(r", (?=the handover)", line_of(body, "fds"))[0] == bring, kind.type


def check_records(text: str) -> None:
    for kind in RECORDS:
        check_fields(text, kind.__name__, kind, with_default=kind is records.EntrySpec)


def check_nothing_else(text: str) -> None:
    known = {kind.type for kind in (*REQUEST_CLASSES, *REPLY_CLASSES)} | {kind.__name__ for kind in RECORDS}
    described = {title[1:-1] for title in sections(text) if re.fullmatch(r"`.*`", title)}
    assert described == known


def check_codes(text: str) -> None:
    for title, codes in (("Refusal codes", errors.Code), ("Fault codes", errors.FaultCode)):
        table = rows(section(text, title))
        said = [(ticked(row["code"])[0], row["errno"]) for row in table]
        assert said == [(code.value, f"{code.errno} {_errno_name(text, code.errno)}") for code in codes], title
        assert all(row["meaning"] and row["what a client does"] for row in table), title


def _errno_name(text: str, number: int) -> str:
    names = {name for name in dir(errno) if getattr(errno, name) == number}
    used = names & set(re.findall(r"\bE[A-Z0-9]+\b", section(text, "Refusal codes") + section(text, "Fault codes")))
    assert len(used) == 1, f"errno {number} is one of {names}, the document says {used}"
    return used.pop()


def check_states(text: str) -> None:
    assert [ticked(row["state"])[0] for row in rows(section(text, "States of a connection"))] == [state.value for state in State]
    said: dict[tuple[str, str, str], str] = {}
    for endpoint in m.Endpoint:
        for row in rows(section(text, f"Requests in order on {endpoint}")):
            for request in ticked(row["request"]):
                key = (endpoint.value, ticked(row["state"])[0], request)
                assert key not in said, f"{key} stands there twice"
                said[key] = ticked(row["state after"])[0]
    assert said == {
        (endpoint.value, state.value, request.type): (then or state).value
        for (endpoint, state), row in TABLE.items()
        for request, then in row.items()
    }


LIMITS = {
    "bytes in a packet": limits.MAX_PACKET_BYTES,
    "bytes in a bulk message": limits.MAX_BULK_BYTES,
    "fds with a packet": limits.MAX_FDS_PER_PACKET,
    "bytes in a name": limits.MAX_NAME_BYTES,
    "bytes of metadata, of a session and of each entry": limits.MAX_METADATA_BYTES,
    "entries in a session": limits.MAX_ENTRIES_PER_SESSION,
    "bytes in the description of a whole session": limits.MAX_MANIFEST_BYTES,
    "bytes in a session id": limits.SESSION_ID_BYTES,
}


def check_limits(text: str) -> None:
    table = rows(section(text, "Limits"))
    assert {row["limit"]: int(row["value"].replace(",", "")) for row in table if row["value"] != "see `welcome`"} == LIMITS
    in_welcome = [ticked(row["in `welcome.limits`"]) for row in table]
    assert [name for names in in_welcome for name in names] == [field.name for field in attrs.fields(records.Limits)]
    assert f"The prefix `{limits.RESERVED_PREFIX}` is reserved" in section(text, "Names and ids")


def check_version(text: str) -> None:
    assert WIRE.low == WIRE.high, "the document tells of one version"
    assert text.startswith(f"# The protocol of luod, version {WIRE.high}\n")


def check_links(text: str) -> None:
    slugs = {re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-") for title in sections(text)}
    links = set(re.findall(r"\]\(#([^)]*)\)", text))
    assert links
    assert links <= slugs, f"links to nowhere: {links - slugs}"


# The examples in bytes.


def examples(text: str) -> Iterator[tuple[str, str, str]]:
    """(title, the message as stated, its bytes as annotated), of each example."""
    pattern = r"^### (Example: [^\n]*)\n\n```text\n([^\n]*)\n```\n\n```hexdump\n(.*?)\n```$"
    yield from re.findall(pattern, text, flags=re.M | re.S)


def from_hex(block: str) -> bytes:
    return bytes.fromhex("".join(line.partition("#")[0] for line in block.splitlines()))


def notation(value: Any) -> str:
    """`value` as the examples state it."""
    if isinstance(value, dict):
        pairs: dict[Any, Any] = value  # pyright: ignore[reportUnknownVariableType]  # it is Any, and stays so
        return "{" + ", ".join(f"{notation(key)}: {notation(each)}" for key, each in pairs.items()) + "}"
    if isinstance(value, list):
        items: list[Any] = value  # pyright: ignore[reportUnknownVariableType]  # it is Any, and stays so
        return "[" + ", ".join(map(notation, items)) + "]"
    if isinstance(value, bytes):
        return f"bin({value.hex(' ')})"
    if isinstance(value, str):
        return f'"{value}"'
    return {None: "nil", True: "true", False: "false"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


def annotate(data: bytes) -> str:
    """The msgpack value in `data`, a line for each value in it, with what it is."""
    lines: list[str] = []
    end = _annotate(data, 0, 0, lines)
    assert end == len(data)
    return "\n".join(lines)


def _annotate(data: bytes, at: int, depth: int, lines: list[str]) -> int:
    def say(size: int, what: str) -> int:
        for start in range(at, at + size, 20):
            part = data[start : min(start + 20, at + size)]
            lines.append(f"{'  ' * depth + part.hex(' '):<72}{'# ' + what if start == at else ''}".rstrip())
        return at + size

    head = data[at]
    if 0x80 <= head <= 0x8F or 0x90 <= head <= 0x9F:
        pairs, count = head < 0x90, head & 0x0F
        end = say(1, f"map of {count}" if pairs else f"array of {count}")
        for _ in range(count * (1 + pairs)):
            end = _annotate(data, end, depth + 1, lines)
        return end
    size = {0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCC: 2, 0xCD: 3, 0xCE: 5}.get(head)
    if head < 0x80:
        size = 1
    if 0xA0 <= head <= 0xBF:
        size = 1 + (head & 0x1F)
    if head in (0xC4, 0xD9):
        size = 2 + data[at + 1]
    assert size is not None, f"{head:#x} is not in the examples so far"
    value = unpack(data[at : at + size])
    return say(size, f"bin of {len(value)}" if isinstance(value, bytes) else notation(value))


EXPECTED_EXAMPLES = ["hello", "welcome", "open", "opened", "preserve", "preserved", "finalize", "finalized", "refused", "fault", "bulk"]


def check_examples(text: str) -> None:
    seen: list[str] = []
    for title, stated, block in examples(text):
        data = from_hex(block)
        assert block == annotate(data), f"{title}: the lines should be\n{annotate(data)}"
        tag = stated.partition('"type": "')[2].partition('"')[0]
        seen.append(tag)
        assert stated == notation(unpack(data)), f"{title}: it says\n{notation(unpack(data))}"
        if tag == "bulk":
            assert bulk_size(data) is not None
        elif tag in {kind.type for kind in REQUEST_CLASSES}:
            assert REQUESTS.encode(REQUESTS.decode(data)) == data, title
        else:
            reply = REPLIES.decode(data)
            assert REPLIES.encode(reply) == data, title
            _check_example_reply(reply)
    assert seen == EXPECTED_EXAMPLES
    assert len(re.findall(r"^```hexdump$", text, flags=re.M)) == len(seen) + 1, "a hexdump that is neither an example nor the control data"


def _check_example_reply(reply: m.Reply) -> None:
    if isinstance(reply, m.Refused):
        assert reply.errno == errors.Code(reply.code).errno
    if isinstance(reply, m.Fault):
        assert reply.errno == errors.FaultCode(reply.code).errno
    if isinstance(reply, m.Welcome):
        assert reply.limits == records.Limits(
            packet_bytes=limits.MAX_PACKET_BYTES,
            bulk_bytes=limits.MAX_BULK_BYTES,
            fds_per_packet=limits.MAX_FDS_PER_PACKET,
            name_bytes=limits.MAX_NAME_BYTES,
            metadata_bytes=limits.MAX_METADATA_BYTES,
            entries_per_session=limits.MAX_ENTRIES_PER_SESSION,
            preserved_fds=reply.limits.preserved_fds,
        )


def check_control_data(text: str) -> None:
    block = re.search(r"^### The control data of preserve\n.*?^```hexdump\n(.*?)^```$", text, flags=re.M | re.S)
    assert block is not None
    data = from_hex(block[1])
    # As on x86-64 and arm64, whatever this runs on: struct cmsghdr {size_t; int; int}, one int, padded to 8.
    assert data == struct.pack("<QiiI4x", 20, 1, socket.SCM_RIGHTS, 7)
    full = 16 + 4 * limits.MAX_FDS_PER_PACKET
    assert f"`CMSG_SPACE({limits.MAX_FDS_PER_PACKET} * sizeof(int))`, {(full + 7) // 8 * 8:,} bytes" in text


def check_seals(text: str) -> None:
    said = re.search(r"seals (`F_SEAL_[A-Z_`, and]*)", section(text, "Bulk"))
    assert said is not None
    assert sum(getattr(fcntl, name) for name in ticked(said[1])) == SEALS


def check_words(text: str) -> None:
    assert [ticked(row["word"])[0] for row in rows(section(text, "What survives"))] == [each.value for each in Survives]
    seal = next(row["meaning"] for row in rows(section(text, "`finalize`")) if row["field"] == "`seal`")
    assert ticked(seal) == list(SEAL_NAMES)
    assert re.search(rf"\s{MAX_REMEMBERED:,}\s+sessions", section(text, "Lost answers"))
    assert re.search(rf"\s{UNREAD_S:g}\s+seconds", section(text, "seq and pipelining"))
    assert re.search(rf"\s{MAX_IN_FLIGHT:,}\s+fds", section(text, "seq and pipelining"))
    assert re.search(rf"\s{HELLO_S:g}\s+seconds", section(text, "Hello and versions"))


def check_kinds(text: str) -> None:
    table = rows(section(text, "Kinds"))
    assert {ticked(row["kind"])[0]: ticked(row["compatible"])[0] for row in table} == kinds()
    recorded = {record.kind: handler_facts(RecordedProbe(record)) for record in RECORDED}
    for specimen in reversed(SPECIMENS):  # so that the first of a kind has the last word
        with specimen.make() as fd:
            recorded[specimen.kind] = handler_facts(Probe(fd))
    with open(os.devnull, "rb") as device:
        recorded["file"] = handler_facts(Probe(device.fileno()))
    assert set(recorded) == set(kinds())
    for row in table:
        facts = [ticked(fact)[0] for fact in row["facts"].split("; ") if fact]
        assert facts == recorded[ticked(row["kind"])[0]], row["kind"]


def handler_facts(probe: Probe) -> list[str]:
    return list(Recognizer(kinds=kinds(), files=[os.devnull]).recognize(probe).record(probe))


CHECKS: dict[str, Callable[[str], None]] = {
    "requests": check_requests,
    "replies": check_replies,
    "records": check_records,
    "nothing-else": check_nothing_else,
    "codes": check_codes,
    "states": check_states,
    "limits": check_limits,
    "version": check_version,
    "links": check_links,
    "examples": check_examples,
    "control-data": check_control_data,
    "seals": check_seals,
    "words": check_words,
    "kinds": check_kinds,
}


@pytest.mark.parametrize("name", CHECKS)
def test_document_agrees_with_the_code(name: str) -> None:
    CHECKS[name](DOC.read_text(encoding="utf-8"))


CHANGES = [
    ("requests", "| `high` | int | |", "| `high` | str | |"),
    ("requests", "| `high` | int | | the highest |\n", ""),
    ("requests", '| `client` | str | `""` |', "| `client` | str | |"),
    ("requests", "| `names` | array of str | | the entries", "| `names` | array of bin | | the entries"),
    ("requests", "- Answer: `opened`", "- Answer: `preserved`"),
    ("requests", "- Endpoints: `deserialize`, `control`", "- Endpoints: `deserialize`"),
    ("requests", "fds: one for each entry", "fds: none"),
    ("requests", "- Refused with: `no-such-entry`", "- Refused with: `no-entry`"),
    ("requests", "`kind-not-supported`, `limit-reached`, `entry-exists` (also", "`limit-reached`, `entry-exists` (also"),
    ("replies", "| `pause_us` | int |", "| `pause_ms` | int |"),
    ("replies", "- fds: one for each name, in the order of `names`", "- fds: none"),
    ("replies", "- fds: 1,", "- fds: 2,"),
    ("replies", "| `info` | `SessionInfo` |", "| `info` | `EntryInfo` |"),
    ("records", "| `facts` | map of str to int or str |", "| `facts` | map of str to str |"),
    ("records", "### `ProcessInfo`", "### ProcessInfo"),
    ("nothing-else", "### `monitoring`", "### `watching`"),
    ("codes", "116 ESTALE", "115 ESTALE"),
    ("codes", "71 EPROTO", "71 EPROTONOSUPPORT"),
    ("codes", "| `too-slow` | 110", "| `slow` | 110"),
    ("states", "| `claimed` | `release` | `ready` |", "| `claimed` | `release` | `claimed` |"),
    ("states", "| `ready` | `discard` | `ready` |\n", ""),
    ("states", "| `open` | `preserve`, `unpreserve` |", "| `open` | `preserve`, `unpreserve`, `list` |"),
    ("limits", "| entries in a session | 16,384 |", "| entries in a session | 16,385 |"),
    ("limits", "`entries_per_session` |", "`preserved_fds` |"),
    ("version", "version 1", "version 2"),
    ("links", "(#lost-answers)", "(#lost-answer)"),
    ("examples", "  a5 68 65 6c 6c 6f ", "  a5 68 65 6c 6c 70 "),
    ("examples", '# "hello"', '# "hullo"'),
    ("examples", '"seq": 4, "session_id"', '"seq": 5, "session_id"'),
    ("examples", "### Example: bulk\n", "### bulk\n"),
    ("control-data", "14 00 00 00 00 00 00 00 ", "18 00 00 00 00 00 00 00 "),
    ("seals", ", `F_SEAL_GROW`", ""),
    ("words", "| `soft-reboot` |", "| `reboot` |"),
    ("words", "`future-write`, `exec`", "`future-write`"),
    ("words", "4,096 sessions", "4,097 sessions"),
    ("words", "within 10 seconds", "within 20 seconds"),
    ("words", "  60 seconds", "  61 seconds"),
    ("kinds", "`pipe-v1`", "`pipe-v2`"),
    ("kinds", "; `access`:", "; `mode`:"),
]


@pytest.mark.parametrize(("name", "old", "new"), CHANGES)
def test_a_difference_is_noticed(name: str, old: str, new: str) -> None:
    text = DOC.read_text(encoding="utf-8")
    assert old in text
    with pytest.raises(AssertionError):
        CHECKS[name](text.replace(old, new))
