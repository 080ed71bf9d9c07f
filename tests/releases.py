"""Luods of other releases, as programs to upgrade to: see `standins/other_release.py`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any, Final

import attrs

from luod import manifest
from luod.manifest import Manifest
from luod_protocol.codec import as_map, pack, unpack

STANDIN: Final = Path(__file__).parent / "standins" / "other_release.py"

NEWER: Final[dict[str, Any]] = {"handover": [1, 2], "manifest": [1, 2], "wire": [1, 2]}
"""The release after this one, where everything has a second version."""


def other_release(folder: Path, release: dict[str, Any]) -> str:
    """The path of a luod of `release`, made in `folder`."""
    program = folder / f"luod-{len(list(folder.glob('luod-*')))}"
    command = shlex.join([sys.executable, "-P", str(STANDIN), json.dumps(release)])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o755)
    return str(program)


def newer_manifest(description: Manifest) -> bytes:
    """`description` as `NEWER` writes it."""
    return pack({**as_map(unpack(manifest.encode(attrs.evolve(description, version=2)))), "colour": "blue"})
