"""What the running kernel can carry through a kexec: tried, one fd of each sort, and remembered.

Theory. Kernels learn to carry more kinds of fds, so no list is kept here. What there is a sample of (`samples`) is tried when somebody asks
for all sorts (`look`), and the first fd of a sort that a client gives is tried as well: preserved in a kernel session that is closed again
at once. Only for memfds luod always takes its own, since preserving a client's takes memory and time. finalize, preflight and
`capabilities` ask here and nowhere else.

Unhappy paths:
1. There is no device, or luod may not open it: nothing can be carried, for that reason.
2. Another process has the device: it is asked again the next time.
3. The kernel knows the sort and refuses the sample, which is an empty one: that says nothing of a client's, which is tried when it comes.
4. A module that is loaded later teaches the kernel a sort: `look` tries again what was refused.

Invariants: nothing here waits, and nothing stays preserved; while luod is frozen for a reboot (`rests`) nothing is tried, for a kernel
session that is open then would travel.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterable
from typing import Final

import attrs

from luod.session import Session
from luod.succession.liveupdate import Kept, LiveUpdateFault, Opening
from luod.succession.samples import NoSample, sample
from luod_protocol import box
from luod_protocol.box import BoxFault
from luod_protocol.fds import OwnedFd

MEMFD: Final = "memfd"
UNTRIED: Final = "not tried yet: decided when a client gives one"
_TRIAL: Final = "luod-trial"


@attrs.frozen(kw_only=True)
class Finding:
    """What is known of a sort.

    Attributes:
        reason: why it can't be carried, or why that isn't known; empty where it can.
        answered: whether the kernel has said so.
        settled: whether of a fd that is not a sample.
        errno: the kernel's, errno(3).
    """

    reason: str
    answered: bool = True
    settled: bool = True
    errno: int = 0


class Carriable:
    """See the module's text.

    Args:
        opening: opens the device.
        sample: makes a fd of a sort.

    Attributes:
        rests: whether nothing may be tried now.
    """

    def __init__(self, opening: Opening, sample: Callable[[str], OwnedFd] = sample) -> None:
        self.rests = False
        self._opening: Final = opening
        self._sample: Final = sample
        self._findings: dict[str, Finding] = {}

    @property
    def fault(self) -> str:
        """Why nothing can be carried; empty where memfds can."""
        if MEMFD not in self._findings:
            return self._try_sample(MEMFD).reason
        return self._findings[MEMFD].reason

    def see(self, sort: str, fd: int) -> None:
        """Try the borrowed `fd`, if it is the first of its sort."""
        if not self._is_settled(sort) and not self.fault:
            self._try(sort, fd)

    def see_session(self, session: Session) -> None:
        """The same with what a finalized session has."""
        if session.sealed is None or all(map(self._is_settled, session.sealed.sorts)) or self.fault:
            return
        for place, entry in enumerate(session.sealed.manifest.entries):
            if not self._is_settled(entry.sort):
                try:
                    (fd,) = box.look(session.sealed.box.fileno(), [place])
                except (BoxFault, OSError):
                    return
                with fd:
                    self.see(entry.sort, fd.fileno())

    def look(self, sorts: Iterable[str]) -> None:
        """Try samples of these sorts, where one may change what is known."""
        if self.finding(MEMFD).reason:
            self._try_sample(MEMFD)
        if self.fault:
            return
        for sort in sorts:
            known = self.finding(sort)
            if sort != MEMFD and known.reason and (not known.settled or known.errno == errno.ENOENT):
                self._try_sample(sort)

    def finding(self, sort: str) -> Finding:
        """What is known of a sort, as long as there is no `fault`."""
        return self._findings.get(sort, _UNKNOWN)

    def why_not(self, sorts: Iterable[str]) -> str:
        """Why fds of these sorts can't be carried together; empty where they can."""
        if self.fault:
            return self.fault
        return "; ".join(f"{sort}: {reason}" for sort in sorted(sorts) if (reason := self.reason(sort)))

    def reason(self, sort: str) -> str:
        """Why fds of this sort can't be carried; empty where they can."""
        return self.fault or self.finding(sort).reason

    def refused(self, sorts: Iterable[str]) -> Collection[str]:
        """Those of these sorts that can't be carried."""
        return {sort for sort in sorts if self.reason(sort)}

    def _is_settled(self, sort: str) -> bool:
        return sort == MEMFD or self.finding(sort).settled

    def _try_sample(self, sort: str) -> Finding:
        try:
            with self._sample(sort) as fd:
                return self._try(sort, fd.fileno(), is_sample=sort != MEMFD)
        except NoSample as why:
            reason = f"{UNTRIED} ({why})" if str(why) else UNTRIED
            found = attrs.evolve(_UNKNOWN, reason=reason)
            # Of memfds it is asked every time: it can only be that there is no descriptor left now.
            return found if sort == MEMFD else self._note(sort, found)

    def _try(self, sort: str, fd: int, *, is_sample: bool = False) -> Finding:
        if self.rests:
            return self.finding(sort)
        try:
            session = self._session()
        except LiveUpdateFault as error:
            found = attrs.evolve(_UNKNOWN, reason=error.reason)
            # Of all other sorts it says nothing.
            return self._note(sort, attrs.evolve(found, answered=True)) if sort == MEMFD and error.errno != errno.EBUSY else found
        try:
            session.preserve(fd, 0)
        except LiveUpdateFault as error:
            if error.errno == errno.EBUSY:
                return attrs.evolve(_UNKNOWN, reason=error.reason)
            if is_sample and error.errno != errno.ENOENT:
                why = f"{UNTRIED} (luod's own, an empty one, was refused: {error.reason})"
                return self._note(sort, attrs.evolve(_UNKNOWN, reason=why))
            return self._note(sort, Finding(reason=error.reason, settled=not is_sample, errno=error.errno))
        finally:
            session.close()
        return self._note(sort, Finding(reason="", settled=not is_sample))

    def _session(self) -> Kept:
        device = self._opening(patience_s=0)
        try:
            return device.create(f"{_TRIAL}-{os.getpid()}")
        finally:
            device.close()

    def _note(self, sort: str, found: Finding) -> Finding:
        """Remember it, unless it says less than what is known."""
        if not found.answered and self.finding(sort).answered:
            return self.finding(sort)
        self._findings[sort] = found
        return found


_UNKNOWN: Final = Finding(reason=UNTRIED, answered=False, settled=False)
