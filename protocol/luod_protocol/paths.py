"""Where a daemon and its clients meet: the runtime directory."""

from __future__ import annotations

from collections.abc import Mapping

from luod_protocol.errors import Code, Refusal

SYSTEM_RUNTIME_DIR = "/run/luod"


def runtime_dir(given: str | None, environ: Mapping[str, str], uid: int) -> str:
    """The runtime directory: `given`, else /run/luod for root, else `luod` in $XDG_RUNTIME_DIR.

    Args:
        given: what the user said, None for nothing.
        environ: the environment.
        uid: the effective uid of the asking process.

    Raises:
        Refusal: there is no place to look.
    """
    if given:
        return given
    if uid == 0:
        return SYSTEM_RUNTIME_DIR
    base = environ.get("XDG_RUNTIME_DIR")
    if not base:
        raise Refusal(Code.BAD_REQUEST, "no runtime directory: XDG_RUNTIME_DIR is not set; say --runtime-dir DIR")
    return f"{base}/luod"
