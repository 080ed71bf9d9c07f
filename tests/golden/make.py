"""Write the golden files that are missing: `make golden`. What is there is not overwritten.

With `--again` the files of versions that no release has are written anew: for a change of a format that is meant. Look at the difference
before it is committed. Versions in `RELEASED` are never written again: a change of those needs a new version.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from golden.formats import FOLDER, FORMATS, KINDS, RELEASED, Format, recorded


def main(arguments: Sequence[str] | None = None, top: Path = FOLDER, released: Collection[str] = RELEASED) -> int:
    """Returns the exit status: 1 when something that is there is not as the code writes it, and was left."""
    parser = argparse.ArgumentParser(prog="make golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="write those of versions that no release has anew")
    again = parser.parse_args(arguments).again
    left = [each.folder(each.versions.high, top) for each in FORMATS if not _write(each, top, again=again, released=released)]
    for folder in left:
        reason = "is in a release: raise the version" if folder.name in released else "is there: --again writes it anew"
        print(f"{folder} differs from what the code writes and {reason}", file=sys.stderr)
    _write_kinds(top / KINDS, again=again, released=released)
    return bool(left)


def _write(kind: Format, top: Path, *, again: bool, released: Collection[str]) -> bool:
    """Whether the folder is as the code writes it, perhaps now."""
    folder = kind.folder(kind.versions.high, top)
    files: dict[str, bytes] = {}
    values: dict[str, Any] = {}
    for name, data, value in kind.write():
        files[f"{name}.bin"], values[name] = data, value
    files["values.json"] = (json.dumps(values, indent=1) + "\n").encode()
    there = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
    if there == files:
        return True
    if there and (folder.name in released or not again):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for name in there.keys() - files.keys():
        (folder / name).unlink()
    for name, data in files.items():
        if there.get(name) != data:
            (folder / name).write_bytes(data)
            print(folder / name)
    return True


def _write_kinds(path: Path, *, again: bool, released: Collection[str]) -> None:
    there: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.exists() else {}
    # Of kinds that this machine has no specimens of what is there stays.
    new = {name: facts for name, facts in recorded().items() if name not in there or (again and name not in released)}
    path.write_text(json.dumps(dict(sorted({**there, **new}.items())), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
