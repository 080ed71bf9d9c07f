"""The state diagrams in ARCHITECTURE.md are those of the tables."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "docs" / "diagrams.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_they_are_up_to_date() -> None:
    done = check(ROOT)
    assert done.returncode == 0, done.stderr


def test_one_that_differs_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "diagrams.py", tmp_path / "docs")
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    arrow = "preserved --> claimed: claim"
    assert arrow in text
    (tmp_path / "ARCHITECTURE.md").write_text(text.replace(arrow, "preserved --> gone: claim"), encoding="utf-8")
    done = check(tmp_path)
    assert done.returncode == 1
    assert "run python docs/diagrams.py" in done.stderr
