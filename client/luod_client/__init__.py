"""The client library of luod: give fds into custody and take them back, with plain blocking sockets.

`luod_client.aio` has the same names for trio. Nothing here imports trio.
"""

from luod_client.session import Claim as Claim
from luod_client.session import Control as Control
from luod_client.session import Deserializer as Deserializer
from luod_client.session import Session as Session
from luod_client.session import control as control
from luod_client.session import deserialize as deserialize
from luod_client.session import finalize_again as finalize_again
from luod_client.session import serialize as serialize
from luod_client.transport import NoDaemon as NoDaemon
from luod_protocol.errors import Code as Code
from luod_protocol.errors import Disconnected as Disconnected
from luod_protocol.errors import FaultCode as FaultCode
from luod_protocol.errors import LuodError as LuodError
from luod_protocol.errors import ProtocolFault as ProtocolFault
from luod_protocol.errors import Refusal as Refusal
from luod_protocol.fds import OwnedFd as OwnedFd
from luod_protocol.messages import EntryInfo as EntryInfo
from luod_protocol.messages import Event as Event
from luod_protocol.messages import SessionInfo as SessionInfo
