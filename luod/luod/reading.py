"""From parsed TOML to the configuration's classes: strictly, and with all that is wrong said at once, each under its key.

Values that are more than a type (a number above 0, a user's name) are marked in the classes with `Annotated`; a hook for each mark says
what it takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import (
    BaseValidationError,
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn

from luod_protocol.codec import strict_converter
from luod_protocol.errors import LuodError

T = TypeVar("T")
Hook: TypeAlias = Callable[[object], Any]
CattrsHook: TypeAlias = Callable[[Any, Any], Any]


class BadValue(LuodError):
    """A value that its key doesn't take. The text continues the key's: ` = 0: it must be more than 0`."""

    def __init__(self, value: object, why: str) -> None:
        super().__init__(f" = {shown(value)}: {why}")


class Problems(LuodError):
    """All that is wrong, one text for each problem, each beginning with its key."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        super().__init__("; ".join(texts))
        self.texts = texts


def structure(content: Mapping[str, Any], kind: type[T], hooks: Mapping[Any, Hook]) -> T:
    """The instance of the attrs class `kind` that `content` describes.

    Args:
        content: as tomllib gives it.
        kind: a class of classes, tuples of them, and marked or plain values.
        hooks: for each mark that is used what it takes; they raise BadValue.

    Raises:
        Problems: it describes none.
    """
    converter = strict_converter()
    for plain, what in ((int, "an integer"), (float, "a number"), (str, "text"), (bool, "true or false")):
        converter.register_structure_hook(plain, _plain(plain, what))

    def marked(mark: Any) -> CattrsHook:
        hook = hooks[mark]
        return lambda value, _: hook(value)

    def array(kind: Any) -> CattrsHook:
        return _array(converter, kind)

    def table(kind: Any) -> CattrsHook:
        return _table(converter, kind)

    # The last one registered is asked first.
    converter.register_structure_hook_factory(hooks.__contains__, marked)
    converter.register_structure_hook_factory(_is_tuple, array)
    converter.register_structure_hook_factory(attrs.has, table)
    try:
        return converter.structure(content, kind)
    except BaseValidationError as error:
        raise Problems(tuple(_problems(error, ""))) from None


def exactly(value: object, kind: type[T], what: str) -> T:
    """`value`, when it is of this type and not merely of a kindred one: true is no number.

    Raises:
        BadValue: it isn't.
    """
    if type(value) is not kind:
        raise BadValue(value, f"it must be {what}")
    return value


def number(value: object) -> float:
    """`value`, when it is a float or an int."""
    return float(value) if type(value) is int else exactly(value, float, "a number")


def shown(value: object) -> str:
    """`value` as TOML writes it, as far as one line shows it."""
    if isinstance(value, (dict, list)):
        return "{...}" if isinstance(value, dict) else "[...]"
    if isinstance(value, (str, bool)):
        text = json.dumps(value)
        return text if len(text) <= 80 else f'{text[:76]}..."'
    return str(value)


def _is_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _plain(kind: type[Any], what: str) -> CattrsHook:
    return lambda value, _: number(value) if kind is float else exactly(value, kind, what)


def _array(converter: cattrs.Converter, kind: Any) -> CattrsHook:
    item = get_args(kind)[0]
    hook = converter.get_structure_hook(item)

    def read(value: Any, _: Any) -> tuple[Any, ...]:
        items: list[Any] = []
        errors: list[Exception] = []
        values: list[Any] = exactly(value, list, "an array")  # pyright: ignore[reportUnknownVariableType]  # they are Any, and stay so
        for index, each in enumerate(values):
            try:
                items.append(hook(each, item))
            except Exception as error:  # cattrs raises groups of whatever hooks raise
                error.add_note(IterableValidationNote(f"index {index}", index, item))
                errors.append(error)
        if errors:
            raise IterableValidationError("an array", errors, tuple)  # pyright: ignore[reportCallIssue]  # it sees only the group's __new__
        return tuple(items)

    return read


def _table(converter: cattrs.Converter, kind: Any) -> CattrsHook:
    hook = make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)

    def read(value: Any, _: Any) -> Any:
        content: dict[str, Any] = exactly(value, dict, "a table")  # pyright: ignore[reportUnknownVariableType]  # as above
        return hook(content, kind)

    return read


def _problems(error: BaseException, key: str) -> Iterator[str]:
    if isinstance(error, ClassValidationError):
        noted, plain = error.group_exceptions()
        for each, note in noted:
            yield from _problems(each, f"{key}.{note.name}" if key else note.name)
        for bare in plain:
            yield from _problems(bare, key)
    elif isinstance(error, IterableValidationError):
        for each, index in error.group_exceptions()[0]:
            yield from _problems(each, f"{key}[{index.index}]")
    elif isinstance(error, ForbiddenExtraKeysError):
        known = ", ".join(field.name for field in attrs.fields(error.cl))
        for name in sorted(error.extra_fields):
            yield f"{key}.{name}: unknown key; there are {known}" if key else f"{name}: unknown key; there are {known}"
    else:
        yield f"{key}{error}"
