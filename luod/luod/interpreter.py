"""How a luod starts another process of luod. Imports nothing, for the supervisor's sake."""

from __future__ import annotations

import sys


def interpreter() -> list[str]:
    """This interpreter, with the -X dev and -W options that it has itself, passed on as subprocess does."""
    # -P: never import from the folder that happens to be the current one.
    command = [sys.executable, "-P", *(["-X", "dev"] if sys.flags.dev_mode else [])]
    for warning in sys.warnoptions:
        command += ["-W", warning]
    return command
