"""A service that does what luod does with a service manager, and nothing else, to try the units and the rig without luod.

    python -m standins.under_systemd                  the service, Type=notify with the three sockets
    python -m standins.under_systemd --ask QUESTION   ask the one that runs; as ExecReload=: --ask "('handover',)"
    python -m standins.under_systemd --succeed FD     started by the one that runs

A question is a packet to `control`: the repr() of a tuple of a name, which is a method of `Service`, and its arguments; fds may come with
it. So is the answer. The service sends no WATCHDOG=1.
"""

from __future__ import annotations

import ast
import os
import select
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final, NoReturn

import attrs

from luod.system import process
from luod_protocol import wire
from luod_protocol.fds import OwnedFd, close_all
from standins.probe import probe

FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START, sd_listen_fds(3)."""
SOCKETS: Final = ("serialize", "deserialize", "control")


def notify(text: str, *fds: int) -> None:
    """One message to the service manager, sd_notify(3)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(os.environ["NOTIFY_SOCKET"])
        socket.send_fds(sock, [text.encode()], fds)


def barrier() -> None:
    """Wait until the manager has read all that was sent before, sd_notify_barrier(3)."""
    ours, theirs = map(OwnedFd, os.pipe2(os.O_CLOEXEC))
    with ours:
        with theirs:
            notify("BARRIER=1", theirs.fileno())
        poll = select.poll()
        poll.register(ours.fileno(), 0)
        poll.poll()


def ask(control: str, question: Sequence[object], fds: Sequence[int] = ()) -> Any:
    """The answer of the service whose socket is `control`. `fds` are borrowed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(control)
        wire.send(sock, repr(question).encode(), fds)
        with answered(wire.receive(sock)) as packet:
            return ast.literal_eval(packet.data.decode())


def answered(packet: wire.Packet | None) -> wire.Packet:
    """The packet, which must be there."""
    assert packet is not None, "the other side has ended"
    return packet


def _content(fd: OwnedFd) -> bytes:
    return os.pread(fd.fileno(), 4096, 0)


@attrs.define(kw_only=True)
class Service:
    """All it has: `handed` is what the manager passed, or the predecessor, by its name."""

    handed: dict[str, OwnedFd]
    peers: list[socket.socket] = attrs.field(factory=list[socket.socket])

    def run(self) -> NoReturn:
        """Serve until killed or succeeded."""
        with socket.socket(fileno=os.dup(self.handed["control"].fileno())) as control:
            while True:
                self.answer(control.accept()[0])

    def answer(self, asker: socket.socket) -> None:
        """One question and its answer."""
        with asker, answered(wire.receive(asker)) as packet:
            name, *arguments = ast.literal_eval(packet.data.decode())
            if name == "handover":
                self.handover(asker)
            fds = packet.take_fds()
            try:
                answer = getattr(self, name)(*arguments, *([[fd.fileno() for fd in fds]] if fds else []))
            finally:
                close_all(fds)
            wire.send(asker, repr(answer).encode())

    def passed(self) -> dict[str, object]:
        """What the manager or the predecessor passed: for sockets their address and whether they listen, for the rest the content."""
        said: dict[str, object] = {}
        for name, fd in self.handed.items():
            if name not in SOCKETS:
                said[name] = _content(fd)
                continue
            with socket.socket(fileno=os.dup(fd.fileno())) as sock:
                kind, listens = (sock.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_TYPE, socket.SO_ACCEPTCONN))
                said[name] = (sock.getsockname(), kind == socket.SOCK_SEQPACKET, bool(listens))
        return said

    def count(self) -> int:
        """How many descriptors the manager or the predecessor passed."""
        return len(self.handed)

    def store(self, name: str, content: bytes, times: int = 1) -> None:
        """Have the manager store memfds with this content, under names that begin with `name`."""
        for number in range(times):
            full = f"{name}-{number:032x}" if times > 1 else name
            with OwnedFd(os.memfd_create(full, os.MFD_CLOEXEC)) as fd:
                os.write(fd.fileno(), content)
                notify(f"FDSTORE=1\nFDNAME={full}\nFDPOLL=0", fd.fileno())
                if times == 1:
                    self.handed[full] = OwnedFd(fd.take())
        barrier()

    def unstore(self, name: str) -> None:
        """Have the manager forget a descriptor."""
        notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
        barrier()
        self.handed.pop(name).close()

    def be_well_within(self, us: int) -> None:
        """Have the manager expect WATCHDOG=1, which never comes, within this time."""
        notify(f"WATCHDOG_USEC={us}")

    def who(self, endpoint: str) -> list[int]:
        """Wait for a connection to an endpoint: uid and gid (SO_PEERCRED), and when its process started in clock ticks, 0 if not known."""
        with socket.socket(fileno=os.dup(self.handed[endpoint].fileno())) as listening:
            peer = listening.accept()[0]
            self.peers.append(peer)
            raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, uid, gid = (int.from_bytes(raw[at : at + 4], sys.byteorder) for at in (0, 4, 8))
            return [uid, gid, process(pid).start]

    def probe(self, peer: int, folder: str, device: str, most: int, names: Sequence[str], fds: Sequence[int]) -> dict[str, str]:
        """See probe.py. The peer is one of those that `who` accepted, as a number from 0."""
        raw = self.peers[peer].getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4)
        return probe(int.from_bytes(raw, sys.byteorder), folder, device, most, dict(zip(names, fds, strict=True)))

    def pid(self) -> tuple[int, int]:
        """Its pid, and its parent's."""
        return os.getpid(), os.getppid()

    def handover(self, asker: socket.socket) -> NoReturn:
        """Have a successor take everything and answer `asker`, as a child that becomes the main process."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            theirs.set_inheritable(True)
            command = [sys.executable, "-P", "-m", "standins.under_systemd", "--succeed", str(theirs.fileno())]
            child = os.posix_spawn(command[0], command, os.environ)
            theirs.close()
            wire.send(ours, repr(list(self.handed)).encode(), [fd.fileno() for fd in self.handed.values()] + [asker.fileno()])
            answered(wire.receive(ours)).close()
            notify(f"MAINPID={child}")
            barrier()
            wire.send(ours, b"serve")
        os._exit(0)


def _succeed(handover: socket.socket) -> tuple[Service, socket.socket]:
    os.set_inheritable(handover.fileno(), False)
    with handover:
        with answered(wire.receive(handover)) as packet:
            *fds, asker = packet.take_fds()
            service = Service(handed=dict(zip(ast.literal_eval(packet.data.decode()), fds, strict=True)))
        wire.send(handover, b"ready")
        answered(wire.receive(handover)).close()
    return service, socket.socket(fileno=asker.take())


def _start() -> Service:
    count = int(os.environ["LISTEN_FDS"])
    assert int(os.environ["LISTEN_PID"]) == os.getpid()
    fds = [OwnedFd(number) for number in range(FIRST_FD, FIRST_FD + count)]
    for fd in fds:
        os.set_inheritable(fd.fileno(), False)
    return Service(handed=dict(zip(os.environ["LISTEN_FDNAMES"].split(":"), fds, strict=True)))


def main(arguments: Sequence[str]) -> None:
    """See the head of this file."""
    if arguments[:1] == ["--ask"]:
        ask("/run/luod/control", ast.literal_eval(arguments[1]))
        return
    with ExitStack() as ending:
        if arguments[:1] == ["--succeed"]:
            service, asker = _succeed(socket.socket(fileno=int(arguments[1])))
            with asker:
                wire.send(asker, repr(service.pid()).encode())
        else:
            service = _start()
            notify("READY=1")
        ending.callback(close_all, list(service.handed.values()))
        service.run()


if __name__ == "__main__":
    main(sys.argv[1:])
