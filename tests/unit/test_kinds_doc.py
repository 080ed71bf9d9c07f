"""docs/kinds.md says of every kind what a client must know."""

from __future__ import annotations

import re
from pathlib import Path

from luod.handlers import HANDLERS
from luod.handlers.anonymous import Anonymous
from luod.handlers.character import Character

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/kinds.md").read_text(encoding="utf-8")


def said() -> dict[str, dict[str, str]]:
    """What each section of a kind says, by the word that it begins with."""
    parts = re.split(r"^##+ (.*)$", TEXT, flags=re.M)[1:]
    kinds = {title.strip("`"): body for title, body in zip(parts[::2], parts[1::2], strict=True) if title.startswith("`")}
    return {kind: dict(re.findall(r"^- (\w+): (\S.*)$", body, flags=re.M)) for kind, body in kinds.items()}


def test_it_names_exactly_the_kinds_that_are_taken() -> None:
    assert sorted(said()) == sorted(handler.kind for handler in HANDLERS)
    assert TEXT.count("\n### `") == len(HANDLERS)


def test_it_says_the_same_of_each() -> None:
    for kind, lines in said().items():
        assert list(lines) == ["Recognized", "Preserved", "Lost", "Again"], kind


def test_it_says_by_what_each_is_recognized() -> None:
    for handler in HANDLERS:
        recognized = said()[handler.kind]["Recognized"]
        if isinstance(handler, Anonymous):
            assert f"an anonymous inode, `{handler.inode}`" in recognized
        if isinstance(handler, Character):
            for driver in handler.drivers:
                assert f"`{driver.removeprefix('misc/')}`" in recognized


def test_the_readme_leads_to_it() -> None:
    assert "(docs/kinds.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
