"""How luoctl writes: JSON for programs, tables for people."""

from __future__ import annotations

import base64
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import attrs

from luod_protocol.records import Fact

_NARROWEST: Final = 60
_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def _bytes(_: object, field: attrs.Attribute[Any] | None, value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    return value.hex() if field is not None and field.name == "session_id" else base64.b64encode(value).decode()


def _record(value: attrs.AttrsInstance) -> dict[str, Any]:
    return attrs.asdict(value, filter=lambda field, _: field.name != "seq", value_serializer=_bytes)


def write_json(value: Any, *, indent: int | None = 2) -> None:
    """One document to stdout; messages as `luoctl --help` says."""
    sys.stdout.write(json.dumps(value, indent=indent, default=_record) + "\n")


def write(text: str) -> None:
    """A line, or several, to stdout."""
    sys.stdout.write(text + "\n")


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns for people."""
    from tabulate import tabulate

    return tabulate(list(rows), headers=headers, tablefmt="plain", disable_numparse=True)


def fields(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values for people; what has no value is left out."""
    return table((), [row for row in rows if row[1]])


def wrapped(head: str, text: str) -> str:
    """`head` and `text` in lines that fit the terminal, those after the first below the text."""
    width = max(_NARROWEST, shutil.get_terminal_size().columns - 1)
    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def size(count: int) -> str:
    """`count` bytes for people: `17 bytes`, `256 MiB`, `1.5 GiB`."""
    if count < 1024:
        return f"{count} bytes"
    power = min((count.bit_length() - 1) // 10, len(_UNITS))
    return f"{count / 1024**power:.1f}".removesuffix(".0") + f" {_UNITS[power - 1]}"


def when(seconds: float) -> str:
    """A time for people, empty for never."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def text(value: bytes) -> str:
    """Metadata for people: never anything that a terminal would act upon."""
    if not value:
        return ""
    try:
        decoded = value.decode()
    except UnicodeDecodeError:
        return size(len(value))
    return decoded if len(decoded) <= 60 and decoded.isprintable() else size(len(value))


def facts(recorded: Mapping[str, Fact]) -> str:
    """What a handler recorded, for people; what is empty is left out."""
    shown = {key.replace("_", " "): value for key, value in recorded.items() if value != ""}
    return ", ".join(f"{key} {size(value) if key == 'size' and isinstance(value, int) else value}" for key, value in shown.items())
