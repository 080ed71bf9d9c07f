"""Messages made from their classes: one plain example each, and hypothesis strategies."""

from __future__ import annotations

from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import attrs
from hypothesis import strategies as st

from luod_protocol import messages as m
from luod_protocol.codec import REPLIES, REQUESTS, Codec

REQUEST_KINDS: tuple[type[m.Request], ...] = get_args(m.Request)
REPLY_KINDS: tuple[type[m.Reply], ...] = get_args(m.Reply)
KINDS: tuple[type[Any], ...] = (*REQUEST_KINDS, *REPLY_KINDS)

_PLAIN: dict[Any, Any] = {int: 7, float: 1.5, str: "text", bytes: b"bytes", bool: True}
_TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
_ANY: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    str: _TEXT,
    bytes: st.binary(max_size=20),
    bool: st.booleans(),
}


def codec_of(kind: type[Any]) -> Codec[Any]:
    """The codec that has this class."""
    return REQUESTS if kind in REQUEST_KINDS else REPLIES


def fields(kind: type[Any]) -> dict[str, Any]:
    """The fields of a message class and their types."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in attrs.fields(kind)}


def _is_union(kind: Any) -> bool:
    return not isinstance(kind, type) and get_origin(kind) not in (tuple, dict)


def plain(kind: Any) -> Any:
    """An example of a type, with no field left at its default."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    if get_origin(kind) is tuple:
        return (plain(get_args(kind)[0]),)
    if get_origin(kind) is dict:
        return {"key": plain(get_args(kind)[1])}
    if _is_union(kind):
        return plain(get_args(kind)[0])
    return kind(**{name: plain(of) for name, of in fields(kind).items()})


def any_of(kind: Any) -> st.SearchStrategy[Any]:
    """All that a type can hold."""
    if kind in _ANY:
        return _ANY[kind]
    if kind is NoneType:
        return st.none()
    if get_origin(kind) is tuple:
        return st.lists(any_of(get_args(kind)[0]), max_size=3).map(tuple)
    if get_origin(kind) is dict:
        return st.dictionaries(_TEXT, any_of(get_args(kind)[1]), max_size=3)
    if _is_union(kind):
        return st.one_of([any_of(each) for each in get_args(kind)])
    return st.builds(kind, **{name: any_of(of) for name, of in fields(kind).items()})
