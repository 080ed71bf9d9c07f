"""The messages between a client and luod, version 1 of the wire.

One class a message; the class attribute `type` is its tag on the wire. Requests carry a `seq` of the client's choice, and the answer
bears the same. Classes say what a field is, `docs/protocol.md` says it for a client in another language.

Fields that hold a sequence are arrays on the wire. `bytes` are msgpack bin, `str` msgpack str.
"""

from __future__ import annotations

from typing import TypeAlias

from luod_protocol.records import (
    Endpoint as Endpoint,
)
from luod_protocol.records import (
    EntryInfo as EntryInfo,
)
from luod_protocol.records import (
    EntrySpec as EntrySpec,
)
from luod_protocol.records import (
    Fact as Fact,
)
from luod_protocol.records import (
    Limits as Limits,
)
from luod_protocol.records import (
    ProcessInfo as ProcessInfo,
)
from luod_protocol.records import (
    SessionInfo as SessionInfo,
)
from luod_protocol.records import (
    SortSurvival as SortSurvival,
)
from luod_protocol.replies import (
    Cancelled as Cancelled,
)
from luod_protocol.replies import (
    Claimed as Claimed,
)
from luod_protocol.replies import (
    DaemonCapabilities as DaemonCapabilities,
)
from luod_protocol.replies import (
    DaemonStatus as DaemonStatus,
)
from luod_protocol.replies import (
    Discarded as Discarded,
)
from luod_protocol.replies import (
    Event as Event,
)
from luod_protocol.replies import (
    Fault as Fault,
)
from luod_protocol.replies import (
    Finalized as Finalized,
)
from luod_protocol.replies import (
    Finished as Finished,
)
from luod_protocol.replies import (
    Listed as Listed,
)
from luod_protocol.replies import (
    Monitoring as Monitoring,
)
from luod_protocol.replies import (
    Notice as Notice,
)
from luod_protocol.replies import (
    Opened as Opened,
)
from luod_protocol.replies import (
    PreflightReport as PreflightReport,
)
from luod_protocol.replies import (
    Preserved as Preserved,
)
from luod_protocol.replies import (
    Refused as Refused,
)
from luod_protocol.replies import (
    Released as Released,
)
from luod_protocol.replies import (
    Retrieved as Retrieved,
)
from luod_protocol.replies import (
    Shown as Shown,
)
from luod_protocol.replies import (
    TakeoverOffered as TakeoverOffered,
)
from luod_protocol.replies import (
    Unpreserved as Unpreserved,
)
from luod_protocol.replies import (
    UpdateStatus as UpdateStatus,
)
from luod_protocol.replies import (
    Upgraded as Upgraded,
)
from luod_protocol.replies import (
    Welcome as Welcome,
)
from luod_protocol.requests import (
    Cancel as Cancel,
)
from luod_protocol.requests import (
    CancelUpdate as CancelUpdate,
)
from luod_protocol.requests import (
    Capabilities as Capabilities,
)
from luod_protocol.requests import (
    Claim as Claim,
)
from luod_protocol.requests import (
    Discard as Discard,
)
from luod_protocol.requests import (
    Finalize as Finalize,
)
from luod_protocol.requests import (
    Finish as Finish,
)
from luod_protocol.requests import (
    Freeze as Freeze,
)
from luod_protocol.requests import (
    Hello as Hello,
)
from luod_protocol.requests import (
    List as List,
)
from luod_protocol.requests import (
    Monitor as Monitor,
)
from luod_protocol.requests import (
    Open as Open,
)
from luod_protocol.requests import (
    Preflight as Preflight,
)
from luod_protocol.requests import (
    Prepare as Prepare,
)
from luod_protocol.requests import (
    Preserve as Preserve,
)
from luod_protocol.requests import (
    Release as Release,
)
from luod_protocol.requests import (
    Retrieve as Retrieve,
)
from luod_protocol.requests import (
    Show as Show,
)
from luod_protocol.requests import (
    Status as Status,
)
from luod_protocol.requests import (
    Takeover as Takeover,
)
from luod_protocol.requests import (
    Unpreserve as Unpreserve,
)
from luod_protocol.requests import (
    Update as Update,
)
from luod_protocol.requests import (
    Upgrade as Upgrade,
)

Request: TypeAlias = (
    Hello
    | Status
    | Capabilities
    | Open
    | Preserve
    | Unpreserve
    | Finalize
    | Cancel
    | List
    | Show
    | Claim
    | Retrieve
    | Release
    | Finish
    | Discard
    | Monitor
    | Upgrade
    | Takeover
    | Update
    | Preflight
    | Prepare
    | Freeze
    | CancelUpdate
)
Reply: TypeAlias = (
    Welcome
    | DaemonStatus
    | DaemonCapabilities
    | Opened
    | Preserved
    | Unpreserved
    | Finalized
    | Cancelled
    | Listed
    | Shown
    | Claimed
    | Retrieved
    | Released
    | Finished
    | Discarded
    | Monitoring
    | Event
    | Upgraded
    | TakeoverOffered
    | UpdateStatus
    | PreflightReport
    | Notice
    | Refused
    | Fault
)
