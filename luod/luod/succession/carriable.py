"""What the running kernel can carry through a kexec: tried, one fd of each sort, and remembered.

Theory. Kernels learn to carry more kinds of fds, so no list is kept here. The first fd of a sort that a client gives is preserved in a
kernel session that is closed again at once. Only for memfds luod makes the fd to try, since preserving a client's takes memory and
time.

Unhappy paths:
1. There is no device, or luod may not open it: nothing can be carried, for that reason.
2. Another process has the device: it is asked again the next time.

Invariants: nothing here waits, and nothing stays preserved.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable
from typing import Final

from luod.session import Session
from luod.succession.liveupdate import LiveUpdateFault, Opening
from luod_protocol import box
from luod_protocol.box import BoxFault
from luod_protocol.fds import OwnedFd

MEMFD: Final = "memfd"
_TRIAL: Final = "luod-trial"


class Carriable:
    """See the module's text.

    Args:
        opening: opens the device.
    """

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._reasons: dict[str, str] = {}

    @property
    def fault(self) -> str:
        """Why nothing can be carried; empty where memfds can."""
        if MEMFD not in self._reasons:
            with OwnedFd(os.memfd_create("luod-trial", os.MFD_CLOEXEC)) as fd:
                return self._try(MEMFD, fd.fileno())
        return self._reasons[MEMFD]

    def see(self, sort: str, fd: int) -> None:
        """Try the borrowed `fd`, if it is the first of its sort."""
        if sort not in self._reasons and sort != MEMFD and not self.fault:
            self._try(sort, fd)

    def see_session(self, session: Session) -> None:
        """The same with what a finalized session has."""
        if session.sealed is None or session.sealed.sorts <= self._reasons.keys() or self.fault:
            return
        for place, entry in enumerate(session.sealed.manifest.entries):
            if entry.sort not in self._reasons:
                try:
                    (fd,) = box.look(session.sealed.box.fileno(), [place])
                except (BoxFault, OSError):
                    return
                with fd:
                    self.see(entry.sort, fd.fileno())

    def why_not(self, sorts: Iterable[str]) -> str:
        """Why fds of these sorts can't be carried together; empty where they can."""
        if self.fault:
            return self.fault
        reasons = {sort: self._reasons.get(sort, "not tried yet") for sort in sorts}
        return "; ".join(f"{sort}: {reason}" for sort, reason in sorted(reasons.items()) if reason)

    def refused(self, sorts: Iterable[str]) -> Collection[str]:
        """Those of these sorts that can't be carried."""
        return {sort for sort in sorts if self.why_not((sort,))}

    def _try(self, sort: str, fd: int) -> str:
        try:
            device = self._opening(patience_s=0)
            try:
                session = device.create(f"{_TRIAL}-{os.getpid()}")
            finally:
                device.close()
            try:
                session.preserve(fd, 0)
            finally:
                session.close()
        except LiveUpdateFault as error:
            if error.errno != errno.EBUSY:
                self._reasons[sort] = error.reason
            return error.reason
        self._reasons[sort] = ""
        return ""
