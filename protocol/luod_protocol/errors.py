"""Every way in which luod says no. Codes are stable: scripts and other languages depend on them.

Two classes, because they end differently:

* `Refusal`: the request was understood and is not granted. It is answered by `refused`, nothing changed, the connection goes on.
* `ProtocolFault`: the peer doesn't speak the protocol. It is answered by a last `fault`, and the connection ends.

Anything else that escapes from luod or its client library is a bug.
"""

from __future__ import annotations

import enum
import errno


class Code(enum.StrEnum):
    """What was refused. Each code has one meaning and one errno."""

    BAD_NAME = "bad-name"
    BAD_REQUEST = "bad-request"
    OUT_OF_ORDER = "out-of-order"
    WRONG_ENDPOINT = "wrong-endpoint"
    NOT_PERMITTED = "not-permitted"
    NO_SUCH_SESSION = "no-such-session"
    NO_SUCH_ENTRY = "no-such-entry"
    SESSION_EXISTS = "session-exists"
    ENTRY_EXISTS = "entry-exists"
    SESSION_CLAIMED = "session-claimed"
    SESSION_FINISHED = "session-finished"
    STILL_HELD = "still-held"
    KIND_NOT_SUPPORTED = "kind-not-supported"
    BAD_NEEDS = "bad-needs"
    BAD_SEAL = "bad-seal"
    CANNOT_SURVIVE = "cannot-survive"
    LIMIT_REACHED = "limit-reached"
    TOO_LARGE = "too-large"
    UPGRADE_FAILED = "upgrade-failed"
    UPGRADE_RUNNING = "upgrade-running"
    UPDATE_RUNNING = "update-running"
    SYSTEM_ERROR = "system-error"

    @property
    def errno(self) -> int:
        """The errno(3) that stands for this code, for clients that report one."""
        return _ERRNO[self]


class FaultCode(enum.StrEnum):
    """Why a connection was ended."""

    MALFORMED = "malformed"
    UNKNOWN_MESSAGE = "unknown-message"
    UNEXPECTED_MESSAGE = "unexpected-message"
    FD_COUNT = "fd-count"
    TRUNCATED = "truncated"
    PACKET_TOO_LARGE = "packet-too-large"
    NO_COMMON_VERSION = "no-common-version"
    TOO_SLOW = "too-slow"
    TOO_MANY_CONNECTIONS = "too-many-connections"
    INTERNAL = "internal"

    @property
    def errno(self) -> int:
        """The errno(3) that stands for this code."""
        return _FAULT_ERRNO[self]


_ERRNO = {
    Code.BAD_NAME: errno.EINVAL,
    Code.BAD_REQUEST: errno.EINVAL,
    Code.OUT_OF_ORDER: errno.EBADFD,
    Code.WRONG_ENDPOINT: errno.EOPNOTSUPP,
    Code.NOT_PERMITTED: errno.EPERM,
    Code.NO_SUCH_SESSION: errno.ENOENT,
    Code.NO_SUCH_ENTRY: errno.ENOENT,
    Code.SESSION_EXISTS: errno.EEXIST,
    Code.ENTRY_EXISTS: errno.EEXIST,
    Code.SESSION_CLAIMED: errno.EBUSY,
    Code.SESSION_FINISHED: errno.ESTALE,
    Code.STILL_HELD: errno.EBUSY,
    Code.KIND_NOT_SUPPORTED: errno.EOPNOTSUPP,
    Code.BAD_NEEDS: errno.EINVAL,
    Code.BAD_SEAL: errno.EINVAL,
    Code.CANNOT_SURVIVE: errno.EOPNOTSUPP,
    Code.LIMIT_REACHED: errno.EDQUOT,
    Code.TOO_LARGE: errno.EMSGSIZE,
    Code.UPGRADE_FAILED: errno.ECANCELED,
    Code.UPGRADE_RUNNING: errno.EBUSY,
    Code.UPDATE_RUNNING: errno.EBUSY,
    Code.SYSTEM_ERROR: errno.EIO,
}

_FAULT_ERRNO = {
    FaultCode.MALFORMED: errno.EBADMSG,
    FaultCode.UNKNOWN_MESSAGE: errno.ENOMSG,
    FaultCode.UNEXPECTED_MESSAGE: errno.EPROTO,
    FaultCode.FD_COUNT: errno.EPROTO,
    FaultCode.TRUNCATED: errno.EPROTO,
    FaultCode.PACKET_TOO_LARGE: errno.EMSGSIZE,
    FaultCode.NO_COMMON_VERSION: errno.EPROTONOSUPPORT,
    FaultCode.TOO_SLOW: errno.ETIMEDOUT,
    FaultCode.TOO_MANY_CONNECTIONS: errno.EUSERS,
    FaultCode.INTERNAL: errno.EIO,
}


class LuodError(Exception):
    """The base of everything that luod's packages raise on purpose."""


class Refusal(LuodError):
    """A request was understood and is not granted; nothing changed.

    Args:
        code: what was refused.
        message: what, why, and what to do about it, for a person.
        entry: the entry that it is about, where there is one.
    """

    def __init__(self, code: Code, message: str, *, entry: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.entry = entry

    @property
    def errno(self) -> int:
        """The errno(3) of the code."""
        return self.code.errno


class ProtocolFault(LuodError):
    """The peer doesn't speak the protocol: the connection ends."""

    def __init__(self, code: FaultCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def errno(self) -> int:
        """The errno(3) of the code."""
        return self.code.errno


class Disconnected(LuodError):
    """The connection ended where an answer was due. Whether the last request took effect is unknown: `show` by session id tells."""
