"""`luod --check-config`: the configuration as luod understands it, as TOML that says the same when it is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from luod.capacity import capacity
from luod.config import Config


def as_toml(config: Config) -> str:
    """`config`, every key of it; names of users and groups are numbers, and where a value stands for another one, that is a comment."""
    effective = capacity(config.limits)
    meant = {
        "limits.max_connections": effective.connections,
        "limits.max_preserved_fds": effective.preserved_fds,
        "limits.per_uid.max_sessions": effective.share.sessions,
        "limits.per_uid.max_connections": effective.share.connections,
        "limits.per_uid.max_preserved_fds": effective.share.preserved_fds,
        "limits.per_uid.max_staged_fds": effective.share.staged_fds,
    }
    return "\n".join(_table(config, "", meant)).strip() + "\n"


def _table(table: object, name: str, meant: Mapping[str, int]) -> Iterator[str]:
    inner: list[str] = []
    kind: type[Any] = type(table)
    for field in attrs.fields(kind):
        path = f"{name}.{field.name}" if name else field.name
        value: object = getattr(table, field.name)
        rules = [each for each in _items(value) if _is_table(each)]
        if _is_table(value):
            inner += ["", f"[{path}]", *_table(value, path, meant)]
        elif rules:
            for each in rules:
                inner += ["", f"[[{path}]]", *_table(each, path, meant)]
        elif value is not None:
            note = f"  # here: {meant[path]}" if path in meant and meant[path] != value else ""
            yield f"{field.name} = {_value(value)}{note}"
    yield from inner


def _is_table(value: object) -> bool:
    kind: type[Any] = type(value)
    return attrs.has(kind)


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, tuple) else ()  # pyright: ignore[reportUnknownVariableType]  # any object does


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, _items(value)))}]"  # pyright: ignore[reportUnknownArgumentType]  # as above
    # What is printable needs no other escapes than JSON's, and luod.toml takes nothing else.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
