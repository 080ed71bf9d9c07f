"""luod's units with the stand-in standins/under_systemd.py in place of luod."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from standins.under_systemd import ask
from systemd_rig import CHECKOUT, Manager

SERVICE: Final = "luod.service"
_COMMAND: Final = (sys.executable, "-P", "-m", "standins.under_systemd")


@contextmanager
def standin(settings: str = "") -> Generator[Manager]:
    """A manager in which luod.service is the stand-in, not started, with these settings of [Service]."""
    text = f"[Service]\nEnvironment=PYTHONPATH={CHECKOUT}/tests\n{settings}"
    with Manager(program=_COMMAND, reload=[*_COMMAND, "--ask", "('handover',)"], settings={SERVICE: text}) as manager:
        yield manager
        print(f"systemd's log:\n{manager.log}\nthe service said:\n{manager.said(SERVICE)}")


def service(manager: Manager, *question: object, fds: Sequence[int] = ()) -> Any:
    """The stand-in's answer."""
    return ask(f"{manager.runtime_dir}/control", question, fds)


def stored(manager: Manager) -> int:
    """How many descriptors the manager has in store."""
    return int(manager.show(SERVICE, "NFileDescriptorStore")["NFileDescriptorStore"])
