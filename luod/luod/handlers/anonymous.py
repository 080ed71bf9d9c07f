"""What kinds of anonymous inodes have in common (fs/anon_inodes.c).

All of them share one inode, without a file type, so a kind is told by the name in its link in /proc, which the kernel gives and nobody can
choose: what has a path has a file type, and a link that begins with "/". The names are the same since Linux 5.15 at least.

What the kernel tells of one is in its fdinfo; a kind says which lines of it become facts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import attrs

from luod.handlers.base import Mismatch, Probe
from luod.handlers.kernel import printable
from luod_protocol.records import Fact


def number(text: str) -> int:
    """A number as fdinfo has it, decimal or with 0x."""
    return int(text, 0)


def text(value: str) -> str:
    """A text, with whatever a client may have put into it."""
    return printable(value.encode())


@attrs.frozen
class Told:
    """A fact that a line of fdinfo tells.

    Attributes:
        key: what the line begins with.
        read: makes the fact of the rest.
        unsaid: the fact when the kernel doesn't say.
        fixed: whether it can't change, so that `verify` checks it.
    """

    key: str
    read: Callable[[str], Fact]
    unsaid: Fact
    fixed: bool = True


class Anonymous:
    """A kind of anonymous inodes. A subclass says its names and what is told of it."""

    kind: ClassVar[str]
    compatible: ClassVar[str]
    inode: ClassVar[str]
    """The kernel's name."""
    told: ClassVar[dict[str, Told]] = {}
    """The facts, by name."""

    def recognize(self, probe: Probe) -> bool:
        """By the inode's name."""
        return probe.type == 0 and probe.link == f"anon_inode:{self.inode}" and probe.opened

    def record(self, probe: Probe) -> dict[str, Fact]:
        """What is told."""
        facts: dict[str, Fact] = {}
        for fact, told in self.told.items():
            value = probe.info.get(told.key)
            facts[fact] = told.unsaid if value is None else told.read(value)
        return facts

    def verify(self, probe: Probe, facts: dict[str, Fact]) -> None:
        """What can't change is as it was."""
        now = self.record(probe)
        for fact, told in self.told.items():
            if told.fixed and now[fact] != facts.get(fact):
                raise Mismatch(f"the {self.kind}'s {fact} is {now[fact]}, it was {facts.get(fact)}")
