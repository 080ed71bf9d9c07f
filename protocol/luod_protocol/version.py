"""Versions of what crosses a boundary, and how two sides agree on one.

Each boundary has a range of versions that this code can read. Two sides use the highest version that both know; without one they
part, before anything was exchanged that would have to be undone.
"""

from __future__ import annotations

import attrs

RELEASE = "0.1.0"


@attrs.frozen(kw_only=True)
class VersionRange:
    """The versions from `low` to `high`, both included."""

    low: int
    high: int

    def __contains__(self, version: int) -> bool:
        return self.low <= version <= self.high

    def common(self, other: VersionRange) -> int | None:
        """The highest version in both ranges, or None."""
        highest = min(self.high, other.high)
        return highest if highest >= max(self.low, other.low) else None

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low} to {self.high}"


WIRE = VersionRange(low=1, high=1)
"""Messages between a client and luod."""
