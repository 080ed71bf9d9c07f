"""docs/configuration.md says what the code does: every key and default, and examples that load.

`check_keys` compares a text with the code; it runs on the document, and on copies with one thing changed, which it has to notice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, get_type_hints

import attrs
import pytest

from luod.config import Config, LimitsTable, PerUidTable, load
from luod.handlers import kinds
from luod.policy import ClaimRule, SerializeRule
from luod.server import CONTROL_RESERVE

ROOT: Final = Path(__file__).parents[2]
DOC: Final = ROOT / "docs" / "configuration.md"

TABLES: Final[dict[str, type[Any]]] = {
    "[limits]": LimitsTable,
    "[limits.per_uid]": PerUidTable,
    "[kinds]": type(Config().kinds),
    "[files]": type(Config().files),
    "[[serialize]]": SerializeRule,
    "[[claim]]": ClaimRule,
    "[handover]": type(Config().handover),
}


def text_of(value: object) -> str:
    """How the document writes a default."""
    if value is None:
        return "none"
    if value == tuple(kinds()):
        return "all"
    if isinstance(value, tuple):
        return f"`{list(value)}`".replace("'", '"')  # pyright: ignore[reportUnknownArgumentType]  # of text
    return f"`{value}`"


def default_of(field: attrs.Attribute[Any]) -> object:
    default: Any = field.default
    return default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]  # stubs: a function, it is a class


def keys_of(text: str) -> dict[str, list[tuple[str, str]]]:
    """Heading of each section with a table of keys: the keys with their defaults."""
    found: dict[str, list[tuple[str, str]]] = {}
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        title, _, body = part.partition("\n")
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \| .+ \|$", body, flags=re.M)
        if rows:
            found[title.strip("`")] = rows
    return found


def check_keys(text: str) -> None:
    code = {
        title: [(each.name, text_of(default_of(each))) for each in attrs.fields(kind) if not attrs.has(get_type_hints(kind)[each.name])]
        for title, kind in TABLES.items()
    }
    assert keys_of(text) == code


def test_every_table_of_the_file_is_here() -> None:
    names = [title.strip("[]") for title in TABLES]
    assert sorted(name for name in names if "." not in name) == sorted(field.name for field in attrs.fields(Config))
    assert [field.name for field in attrs.fields(LimitsTable) if attrs.has(get_type_hints(LimitsTable)[field.name])] == ["per_uid"]


def test_every_key_and_default() -> None:
    check_keys(DOC.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("| `max_sessions` | `16384` |", "| `max_sessions` | `16385` |"),
        ("| `deny` | `[]` |", "| `denied` | `[]` |"),
        ("| `freeze_s` |", "| `freeze_s` | `5.0` | twice |\n| `freeze_s` |"),
        ("## `[files]`", "## `[file]`"),
        ("| `owner` | none |", "owner: none |"),
    ],
)
def test_a_wrong_document_is_noticed(before: str, after: str) -> None:
    text = DOC.read_text(encoding="utf-8")
    assert before in text
    with pytest.raises(AssertionError):
        check_keys(text.replace(before, after))


def test_numbers_in_the_text() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert f"{CONTROL_RESERVE} more are kept for `control`" in text


@pytest.mark.parametrize("file", ["docs/configuration.md", "README.md"])
def test_the_examples_load(tmp_path: Path, file: str) -> None:
    examples = re.findall(r"^```toml\n(.*?)^```$", (ROOT / file).read_text(encoding="utf-8"), flags=re.M | re.S)
    assert examples
    for example in examples:
        path = tmp_path / "luod.toml"
        path.write_text(example, encoding="utf-8")
        assert load(str(path)) != Config()
