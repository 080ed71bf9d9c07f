"""Draw the state tables into ARCHITECTURE.md, between the markers `<!-- table NAME -->` and `<!-- end -->`.

`python docs/diagrams.py` rewrites the file, `--check` only says (and exits 1) when it differs from the code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from luod import lifecycle
from luod.succession import kernel_table, new_table, old_table
from luod.supervisor import phases

DOCUMENT = Path(__file__).parent.parent / "ARCHITECTURE.md"

Table = Mapping[tuple[Any, Any], StrEnum]

TABLES: Mapping[str, tuple[Table, StrEnum]] = {
    "session": (lifecycle.TABLE, lifecycle.SessionState.OPEN),
    "old": (old_table.TABLE, old_table.OldState.SERVING),
    "new": (new_table.TABLE, new_table.NewState.STARTING),
    "update": (kernel_table.TABLE, kernel_table.UpdateState.NORMAL),
    "supervisor": (phases.TABLE, phases.Phase.WAITING),
}
"""Name, table, and the state in which a life begins."""


def diagram(table: Table, first: StrEnum) -> str:
    """The table as a mermaid state diagram; events with the same way share an arrow."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, event), following in table.items():
        arrows.setdefault((state.value, following.value), []).append(event.value)
    left = {state for state, _ in table}
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {first.value}"]
    lines += [f"    {begin} --> {end}: {', '.join(events)}" for (begin, end), events in arrows.items()]
    lines += [f"    {state.value} --> [*]" for state in type(first) if state not in left]
    return "\n".join([*lines, "```"])


def drawn(text: str) -> str:
    """`text` with every diagram as the code has it."""
    for name, (table, first) in TABLES.items():
        block = f"<!-- table {name} -->\n{diagram(table, first)}\n<!-- end -->"
        text, found = re.subn(rf"<!-- table {name} -->.*?<!-- end -->", block.replace("\\", r"\\"), text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"{DOCUMENT.name} has {found} places for the table {name!r}, it must have one")
    return text


def main() -> int:
    """Rewrite or check the document."""
    before = DOCUMENT.read_text(encoding="utf-8")
    after = drawn(before)
    if before == after:
        return 0
    if "--check" in sys.argv[1:]:
        print(f"{DOCUMENT.name} differs from the tables: run python docs/diagrams.py", file=sys.stderr)
        return 1
    DOCUMENT.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
