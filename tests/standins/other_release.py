"""A luod of another release: the real one, with other versions of what crosses a boundary.

    other_release.py RELEASE [luod's own arguments]

RELEASE is a JSON object; what it leaves out is as in this luod.

    "handover", "manifest", "wire"    the range of versions, [low, high]. The highest is written
    "kinds"                           kinds whose handler is of another version: {"memfd": "memfd-v2"}
    "without"                         kinds that there are none of
    "adds"                            true: what is said before a version is agreed on has a field more, in every record

A manifest of version 2 or later has a field more than one of version 1, which a luod that knows only version 1 can't read.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from luod_protocol import version
from luod_protocol.codec import as_map, pack, unpack
from luod_protocol.version import VersionRange

NEW_FIELD: Final = "colour"
"""What manifests have from version 2 on."""

ADDED: Final = {"of-a-later-release": [{"what": "ever"}]}


def become(release: dict[str, Any]) -> None:
    """Be a luod of `release`. Before luod's own modules are imported, for they take the versions over from each other."""
    if "wire" in release:
        _set(version, "WIRE", _range(release["wire"]))
    _set(version, "RELEASE", "0.2.0")
    manifest = importlib.import_module("luod.manifest")
    if "manifest" in release:
        _set(manifest, "VERSIONS", _range(release["manifest"]))
    _set(manifest, "encode", _encode_manifest(manifest.encode))
    _set(manifest, "decode", _decode_manifest(manifest.decode, _range(release.get("manifest", [1, 1]))))
    messages = importlib.import_module("luod.succession.messages")
    if "handover" in release:
        _set(messages, "VERSIONS", _range(release["handover"]))
    if release.get("adds"):
        _set(messages.CODEC, "encode", _encode_more(messages.CODEC.encode))
    handlers = importlib.import_module("luod.handlers")
    by_kind = vars(handlers)["_BY_KIND"]
    for kind, compatible in release.get("kinds", {}).items():
        _set(by_kind[kind].__class__, "compatible", compatible)
    for kind in release.get("without", []):
        _set(handlers, "HANDLERS", tuple(handler for handler in handlers.HANDLERS if handler.kind != kind))
        del by_kind[kind]


def _range(ends: list[int]) -> VersionRange:
    return VersionRange(low=ends[0], high=ends[1])


def _set(owner: ModuleType | object, name: str, value: object) -> None:
    assert hasattr(owner, name)
    setattr(owner, name, value)


def _encode_manifest(encode: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    def encode_any(manifest: Any) -> bytes:
        data = encode(manifest)
        return data if manifest.version == 1 else pack({**as_map(unpack(data)), NEW_FIELD: "blue"})

    return encode_any


def _decode_manifest(decode: Callable[[bytes], Any], known: VersionRange) -> Callable[[bytes], Any]:
    def decode_any(data: bytes) -> Any:
        fields = as_map(unpack(data))
        if fields.get("version", 1) == 1 or fields["version"] not in known:
            return decode(data)
        del fields[NEW_FIELD]
        return decode(pack(fields))

    return decode_any


def _encode_more(encode: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    def encode_any(message: Any) -> bytes:
        data = encode(message)
        if message.type not in ("meet", "offer", "declined"):
            return data
        fields = as_map(unpack(data))
        # `kinds` is a map, but no record.
        return pack({**more(fields), **{key: each for key, each in fields.items() if key == "kinds"}})

    return encode_any


def more(value: Any) -> Any:
    """The same value with a field more in every map."""
    kind: type[object] = value.__class__
    if kind is list:
        return [more(each) for each in value]
    return {**{key: more(each) for key, each in value.items()}, **ADDED} if kind is dict else value


if __name__ == "__main__":
    become(json.loads(sys.argv[1]))
    sys.exit(importlib.import_module("luod.__main__").main(sys.argv[2:]))
