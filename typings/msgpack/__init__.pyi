"""The two functions of msgpack that luod uses; the package ships no stubs."""

from collections.abc import Callable
from typing import Any

def packb(o: object, *, use_bin_type: bool = ...) -> bytes: ...
def unpackb(
    packed: bytes,
    *,
    raw: bool = ...,
    strict_map_key: bool = ...,
    object_pairs_hook: Callable[[list[tuple[Any, Any]]], object] | None = ...,
    list_hook: Callable[[list[Any]], object] | None = ...,
    max_array_len: int = ...,
    max_map_len: int = ...,
) -> object: ...
