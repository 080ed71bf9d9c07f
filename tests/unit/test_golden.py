"""Today's formats, byte for byte: every later version reads what an earlier one wrote, and no format changes without a version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest

from golden import make
from golden.formats import FOLDER, FORMATS, KINDS, RELEASED, Format, load, plain, recorded
from luod.handlers import kinds
from luod_protocol.version import WIRE

VERSIONS = [(each, version) for each in FORMATS for version in range(each.versions.low, each.versions.high + 1)]

each_version = pytest.mark.parametrize(("kind", "version"), VERSIONS, ids=[f"{each.name}-{version}" for each, version in VERSIONS])
each_format = pytest.mark.parametrize("kind", FORMATS, ids=lambda each: each.name)


def help_for(kind: Format, version: int, what: str) -> str:
    """What to do when a test here fails."""
    folder = f"tests/golden/{kind.name}-{version}"
    if folder.rpartition("/")[2] in RELEASED:
        return (
            f"{what}. Luods of releases write version {version} of this format, and read it as it was. Raise the version "
            f"({kind.where}), go on reading version {version}, and run `make golden`, which adds the files of the new version."
        )
    return (
        f"{what}. If the change is meant: no release has version {version} of this format yet, so run `make golden ARGS=--again`, look at "
        f"the difference in {folder}, and commit it with the change. If it isn't meant, some luod would not understand another."
    )


def agrees(expected: Any, found: Any) -> bool:
    """Whether `found` has all that was `expected`; a record may have got fields since."""
    kind: type[Any] = expected.__class__
    if kind is not found.__class__:
        return False
    if kind is dict:
        return all(key in found and agrees(value, found[key]) for key, value in expected.items())
    if kind is list:
        return len(expected) == len(found) and all(map(agrees, expected, found))
    return bool(expected == found)


def check_read(kind: Format, version: int, top: Path = FOLDER) -> None:
    """Each file of this version says what it said."""
    folder = kind.folder(version, top)
    assert folder.is_dir(), f"there are no golden files of {kind.name} version {version}: run `make golden`"
    files, values = load(folder)
    assert files.keys() == values.keys()
    for name in sorted(files):
        try:
            found = kind.read(name, files)
        except Exception as error:
            raise AssertionError(help_for(kind, version, f"{folder.name}/{name}.bin can't be read any more: {error}")) from error
        what = f"{folder.name}/{name}.bin is read as\n{found}\nand it says\n{values[name]}\n"
        assert agrees(values[name], found), help_for(kind, version, what)


def check_written(kind: Format, top: Path = FOLDER) -> None:
    """The code writes the files of its highest version as they are."""
    version = kind.versions.high
    folder = kind.folder(version, top)
    files, values = load(folder)
    seen: set[str] = set()
    for name, data, value in kind.write():
        seen.add(name)
        assert name in files, help_for(kind, version, f"{name} is new in {kind.name} version {version}")
        what = f"{name} of {kind.name} version {version} is written as\n{value}\nand it was\n{values[name]}\n"
        assert (data, plain(value)) == (files[name], values[name]), help_for(kind, version, what)
    gone = sorted(files.keys() - seen)
    assert not gone, help_for(kind, version, f"{', '.join(gone)} of {kind.name} version {version} is written no more")


@each_version
def test_what_was_written_is_read(kind: Format, version: int) -> None:
    check_read(kind, version)


@each_format
def test_what_is_written_is_as_it_was(kind: Format) -> None:
    check_written(kind)


def test_what_kinds_record_is_as_it_was() -> None:
    known: dict[str, dict[str, str]] = json.loads((FOLDER / KINDS).read_text())
    found = recorded()
    assert found.keys() <= set(kinds().values())
    for compatible, facts in found.items():
        why = (
            f"what {compatible} records is {facts}, it was {known.get(compatible)}. Another luod verifies a fd by this: raise the "
            "handler's `compatible` and run `make golden`; as long as no release has it, `make golden ARGS=--again` will do"
        )
        assert facts == known.get(compatible), why


# The tests notice what they are for.


def copied(kind: Format, top: Path) -> Path:
    """The files of a format's highest version, to be changed."""
    return shutil.copytree(kind.folder(kind.versions.high), kind.folder(kind.versions.high, top))


@each_format
def test_one_byte_that_is_another_is_noticed(kind: Format, tmp_path: Path) -> None:
    folder = copied(kind, tmp_path)
    check_written(kind, tmp_path)
    path = min(folder.glob("*.bin"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AssertionError, match=r"make golden ARGS=--again"):
        check_written(kind, tmp_path)


@each_format
def test_a_specimen_more_or_less_is_noticed(kind: Format, tmp_path: Path) -> None:
    folder = copied(kind, tmp_path)
    whole = json.loads((folder / "values.json").read_text())
    gone = min(whole)
    (folder / f"{gone}.bin").rename(folder / "another.bin")
    (folder / "values.json").write_text(json.dumps({**whole, "another": whole[gone]}))
    with pytest.raises(AssertionError, match="is new in"):
        check_written(kind, tmp_path)
    (folder / "another.bin").rename(folder / f"{gone}.bin")
    (folder / "another.bin").write_bytes(b"")
    with pytest.raises(AssertionError, match=r"another of .* is written no more"):
        check_written(kind, tmp_path)


@each_format
def test_what_is_read_as_something_else_is_noticed(kind: Format, tmp_path: Path) -> None:
    folder = copied(kind, tmp_path)
    path = folder / "values.json"
    path.write_text(path.read_text().replace(": 0", ": 12", 1) if ": 0" in path.read_text() else "{}")
    with pytest.raises(AssertionError):
        check_read(kind, kind.versions.high, tmp_path)


def test_a_field_more_is_no_reason_to_read_it_otherwise() -> None:
    assert agrees({"a": [1, {"b": None}]}, {"a": [1, {"b": None, "new": 7}], "new": 8})
    others: list[Any] = [{}, {"a": [1]}, {"a": [1, {}]}, {"a": [True, {"b": None}]}, {"a": [1, {"b": None}, 2]}]
    for other in others:
        assert not agrees({"a": [1, {"b": None}]}, other)


def test_golden_files_are_written_anew_only_when_that_is_wanted_and_never_after_a_release(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make.main([], tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"{each.name}-{each.versions.high}" for each in FORMATS} | {KINDS}
    for kind in FORMATS:
        check_written(kind, tmp_path)
        check_read(kind, kind.versions.high, tmp_path)
    assert make.main([], tmp_path) == 0
    changed = tmp_path / f"wire-{WIRE.high}" / "request-hello-full.bin"
    whole = changed.read_bytes()
    changed.write_bytes(b"something else")
    assert make.main([], tmp_path) == 1
    assert make.main(["--again"], tmp_path, released={changed.parent.name}) == 1
    assert changed.read_bytes() == b"something else"
    told = capsys.readouterr().err
    assert "--again writes it anew" in told
    assert "is in a release: raise the version" in told
    assert make.main(["--again"], tmp_path) == 0
    assert changed.read_bytes() == whole


def test_the_code_that_has_a_new_version_is_told_to_add_its_files() -> None:
    kind = attrs.evolve(FORMATS[0], versions=attrs.evolve(WIRE, high=WIRE.high + 1))
    with pytest.raises(AssertionError, match=f"no golden files of wire version {WIRE.high + 1}: run `make golden`"):
        check_read(kind, WIRE.high + 1)
