"""Messages to bytes and back: msgpack maps with a `type`, structured strictly by cattrs.

Strict means: no coercion (cattrs would turn "7" into 7 and True into 1), no extra keys, no duplicate keys, no msgpack extension types.
A few messages must be read before a version is agreed on: those tolerate extra keys, and nothing else.
Whatever is wrong with the bytes of a peer comes out as one `ProtocolFault` that names the field.

A message that is larger than a packet travels as `bulk`: see `wire`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import NoneType
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar, get_args, get_origin

import cattrs
import msgpack
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn

from luod_protocol import messages
from luod_protocol.errors import FaultCode, ProtocolFault
from luod_protocol.limits import MAX_BULK_BYTES, MAX_REQUEST_VALUES, MAX_VALUES


class Tagged(Protocol):
    """A message class: it knows its tag on the wire."""

    type: ClassVar[str]


T = TypeVar("T", bound=Tagged)
Hook: TypeAlias = Callable[[Any, Any], Any]


def _exactly(kind: type) -> Hook:
    def check(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
        return value

    return check


def _number(value: Any, _: Any) -> float:
    if type(value) not in (float, int):
        raise TypeError(f"expected a number, got {type(value).__name__}")
    return float(value)


def _is_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _is_dict(kind: Any) -> bool:
    return get_origin(kind) is dict


def _is_optional(kind: Any) -> bool:
    return NoneType in get_args(kind)


def strict_converter(*, extra_keys: bool = False) -> cattrs.Converter:
    """A converter that takes exactly what the classes say, `extra_keys` or not; use one for each set of messages."""
    converter = cattrs.Converter(forbid_extra_keys=not extra_keys)
    for kind in (int, str, bytes, bool):
        converter.register_structure_hook(kind, _exactly(kind))
    converter.register_structure_hook(float, _number)

    def structure_fact(value: Any, _: Any) -> messages.Fact:
        if type(value) is int or type(value) is str:
            return value
        raise TypeError(f"expected int or str, got {type(value).__name__}")

    # Factories, so that a class's hooks are all made when its codec is, and none at the first message: that may be in a pause.
    def tuple_hook(kind: Any) -> Hook:
        item = get_args(kind)[0]
        hook = converter.get_structure_hook(item)

        def structure_tuple(value: Any, _: Any) -> tuple[Any, ...]:
            if not isinstance(value, list):
                raise TypeError(f"expected an array, got {type(value).__name__}")
            items: list[Any] = value  # pyright: ignore[reportUnknownVariableType]  # it is Any, and stays so
            return tuple([hook(each, item) for each in items])

        return structure_tuple

    def dict_hook(kind: Any) -> Hook:
        item = get_args(kind)[1]
        hook = converter.get_structure_hook(item)
        return lambda value, _: {key: hook(each, item) for key, each in as_map(value).items()}

    def optional_hook(kind: Any) -> Hook:
        (item,) = (each for each in get_args(kind) if each is not NoneType)
        hook = converter.get_structure_hook(item)
        return lambda value, _: None if value is None else hook(value, item)

    # The last one registered is asked first.
    converter.register_structure_hook_factory(_is_tuple, tuple_hook)
    converter.register_structure_hook_factory(_is_dict, dict_hook)
    converter.register_structure_hook_factory(_is_optional, optional_hook)
    converter.register_structure_hook_func(lambda kind: kind == messages.Fact, structure_fact)
    return converter


class _Counted:
    """Builds arrays and maps, not more than `limit` values in all: a byte can be a value, and a value costs a hundred bytes and more."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def _count(self, values: int) -> None:
        self._left -= values + 1
        if self._left < 0:
            raise ValueError("it has too many values: say it in several messages")

    def array(self, items: list[Any]) -> list[Any]:
        self._count(len(items))
        return items

    def map(self, pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        pairs = list(pairs)
        self._count(2 * len(pairs))
        for key, _ in pairs:
            if type(key) is not str:
                raise ValueError(f"expected text keys, got {type(key).__name__}")
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a map has the same key twice")
        return result


def as_map(value: object) -> dict[str, Any]:
    """`value`, when it is a map with text keys.

    Raises:
        TypeError: it isn't.
    """
    if not isinstance(value, dict):
        raise TypeError(f"expected a map, got {type(value).__name__}")
    fields: dict[Any, Any] = value  # pyright: ignore[reportUnknownVariableType]  # it is Any, and stays so
    for key in fields:
        if type(key) is not str:
            raise TypeError(f"expected text keys, got {type(key).__name__}")
    return fields


def unpack(data: bytes, max_values: int = MAX_VALUES) -> object:
    """One msgpack value from `data`, all of it, built of at most `max_values`.

    Raises:
        ProtocolFault: it is not exactly one msgpack value with text keys, or too many.
    """
    counted = _Counted(max_values)
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=counted.map,
            list_hook=counted.array,
            max_array_len=max_values,
            max_map_len=max_values,
        )
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ProtocolFault(FaultCode.MALFORMED, f"the packet is not one msgpack value: {reason}") from None


def pack(value: Any) -> bytes:
    """`value` as msgpack."""
    return msgpack.packb(value, use_bin_type=True)


class Codec(Generic[T]):
    """Encodes and decodes one closed set of message classes, told apart by their `type`.

    Args:
        kinds: the message classes, each with a class attribute `type`. What a class needs is made at its first message, which takes up to a
            millisecond, or before that by `prepare`.
        max_values: how many values a message may be built of.
        tolerant: those of them that may have keys that aren't known here, also in the records inside; they are ignored.
    """

    def __init__(self, kinds: Iterable[type[T]], max_values: int = MAX_VALUES, *, tolerant: Collection[type[T]] = ()) -> None:
        self._max_values = max_values
        self._kinds: Mapping[str, type[T]] = {kind.type: kind for kind in kinds}
        self._strict = strict_converter()
        self._lax = strict_converter(extra_keys=True) if tolerant else self._strict
        self._tolerant = frozenset(tolerant)
        self._structure: dict[type[T], Callable[[Any, Any], T]] = {}
        self._unstructure: dict[type[T], Callable[[T], dict[str, Any]]] = {}

    def prepare(self, *, encode: bool = False, decode: bool = False) -> Iterator[None]:
        """Make what is else made at the first message of each class, a class at each step: nothing should be compiled in a pause."""
        for kind in self._kinds.values():
            if encode:
                self._encoder(kind)
            if decode:
                self._decoder(kind)
            yield

    def _encoder(self, kind: type[T]) -> Callable[[T], dict[str, Any]]:
        made = self._unstructure.get(kind)
        if made is None:
            made = self._unstructure[kind] = make_dict_unstructure_fn(kind, self._converter(kind))
        return made

    def _decoder(self, kind: type[T]) -> Callable[[Any, Any], T]:
        made = self._structure.get(kind)
        if made is None:
            converter = self._converter(kind)
            made = self._structure[kind] = make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=converter is self._strict)
            converter.register_structure_hook(kind, made)
        return made

    def _converter(self, kind: type[T]) -> cattrs.Converter:
        return self._lax if kind in self._tolerant else self._strict

    def encode(self, message: T) -> bytes:
        """`message` as the bytes of one packet (or of one bulk memfd, when they are too many)."""
        fields = self._encoder(type(message))(message)
        return pack({"type": message.type, **fields})

    def decode(self, data: bytes) -> T:
        """The message in `data`.

        Raises:
            ProtocolFault: malformed, unknown or not as its class says; the text names the field.
        """
        try:
            value = as_map(unpack(data, self._max_values))
        except TypeError as error:
            raise ProtocolFault(FaultCode.MALFORMED, f"a message is a map with text keys: {error}") from None
        tag = value.pop("type", None)
        kind = self._kinds.get(tag) if type(tag) is str else None
        if kind is None:
            known = ", ".join(sorted(self._kinds))
            said = f"{tag:.80}" if type(tag) is str else f"of {type(tag).__name__}"
            raise ProtocolFault(FaultCode.UNKNOWN_MESSAGE, f"unknown type {said}; known here: {known}")
        try:
            return self._decoder(kind)(value, kind)
        except Exception as error:  # cattrs raises groups of whatever its hooks raise
            why = "; ".join(cattrs.transform_error(error, path=tag)[:5])
            raise ProtocolFault(FaultCode.MALFORMED, f"{why:.500}") from None


BULK_TAG = "bulk"


def encode_bulk(size: int) -> bytes:
    """The packet that stands for a message of `size` bytes in a memfd."""
    return pack({"type": BULK_TAG, "size": size})


def bulk_size(data: bytes) -> int | None:
    """The size of the message that `data` stands for, when it is a `bulk` packet, else None.

    Raises:
        ProtocolFault: it is one, and not as it must be.
    """
    if len(data) > 40 or b"bulk" not in data:
        return None
    try:
        value = as_map(unpack(data))
    except TypeError:
        return None
    if value.get("type") != BULK_TAG:
        return None
    size = value.get("size")
    if set(value) != {"type", "size"} or type(size) is not int:
        raise ProtocolFault(FaultCode.MALFORMED, "bulk has exactly one more field, the integer `size`")
    if not 0 < size <= MAX_BULK_BYTES:
        raise ProtocolFault(FaultCode.PACKET_TOO_LARGE, f"bulk of {size} bytes, at most {MAX_BULK_BYTES} are taken")
    return size


REQUESTS: Codec[messages.Request] = Codec(get_args(messages.Request), MAX_REQUEST_VALUES)
REPLIES: Codec[messages.Reply] = Codec(get_args(messages.Reply))
