"""The client that is replaced: its old process, which preserves what it holds, and its new one, which takes it back and goes on.

Both are the same program in two lives, `before` and `after`. What the old one knows reaches the new one only by way of luod: the fds, and
the metadata beside them.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from typing import Final

import luod_client
from luod_client.demo import data, device
from luod_client.demo.peer import read_line
from luod_client.demo.processes import await_word, played, report
from luod_protocol.fds import OwnedFd

SESSION: Final = "demo"
SEALS: Final = {"grow": fcntl.F_SEAL_GROW, "shrink": fcntl.F_SEAL_SHRINK, "write": fcntl.F_SEAL_WRITE}
_WARM_UP_TICKS: Final = 200


def _identity(fd: int) -> str:
    stat = os.fstat(fd)
    return f"{stat.st_dev}:{stat.st_ino}"


def before(runtime_dir: str, size: int, device_fd: int) -> None:
    """The old process. It owns `device_fd`; `size` in bytes. It ends after finalize: no fd is closed by hand."""
    ram = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    began = time.perf_counter()
    data.fill(ram, size)
    sha256 = data.checksum(ram)
    report("filled", sha256=sha256, identity=_identity(ram), seconds=time.perf_counter() - began)

    listener = socket.create_server(("127.0.0.1", 0))
    report("listening", port=listener.getsockname()[1])
    caller, _ = listener.accept()
    report("accepted")

    dma = os.memfd_create("dma", os.MFD_CLOEXEC)
    os.ftruncate(dma, device.PAGE_BYTES)
    device.start_dma(device_fd, dma)
    report("dma", counter=device.query(device_fd, counter=_WARM_UP_TICKS).counter)

    await_word("finalize")
    with luod_client.serialize(SESSION, runtime_dir=runtime_dir) as session:
        entries = session.preserve(
            {"ram": ram, "listener": listener.fileno(), "caller": caller.fileno(), "device": device_fd, "dma": dma},
            metadata={"ram": json.dumps({"sha256": sha256}).encode()},
            needs={"device": ["dma"]},
        )
        finalized = session.finalize(require={"daemon-upgrade"}, seal={"ram": SEALS})
    report("finalized", entries=len(entries), survives=finalized.survives, counter=device.query(device_fd).counter)


def _answer(sock: socket.socket) -> None:
    sock.sendall(f"{read_line(sock)} answered by pid {os.getpid()}\n".encode())


def _own(fd: OwnedFd) -> socket.socket:
    return socket.socket(fileno=fd.take())


def after(runtime_dir: str) -> None:
    """The new process."""
    with luod_client.deserialize(runtime_dir=runtime_dir) as connection, connection.claim(SESSION) as claim:
        began = time.perf_counter()
        fds = claim.retrieve()
        report("retrieved", seconds=time.perf_counter() - began, names=sorted(fds))

        with _own(fds["caller"]) as caller, _own(fds["listener"]) as listener:
            _answer(caller)
            waiting, _ = listener.accept()
            with waiting:
                _answer(waiting)
        report("answered")

        now = device.query(fds["device"].fileno())
        device.query(fds["device"].fileno(), counter=now.counter + _WARM_UP_TICKS)
        report("device", counter=now.counter, resets=now.resets, written=device.sample(fds["dma"].fileno()).counter)

        with fds["ram"] as memfd:
            ram = memfd.fileno()
            seals = fcntl.fcntl(ram, fcntl.F_GET_SEALS)
            report(
                "compared",
                sha256=data.checksum(ram),
                sha256_said=json.loads(claim.entries["ram"].metadata)["sha256"],
                identity=_identity(ram),
                seals=[name for name, seal in SEALS.items() if seals & seal],
                copy_s=data.copy_seconds(ram),
            )

        await_word("finish")
        claim.finish()
        report("finished", counter=device.query(fds["device"].fileno()).counter)

        await_word("close")
        fds["dma"].close()
        fds["device"].close()
        report("closed")
        await_word("exit")


def main() -> None:
    """Play one of the two lives."""
    life, runtime_dir, *rest = played(sys.argv[1:])
    if life == "before":
        size, device_fd = map(int, rest)
        before(runtime_dir, size, device_fd)
    else:
        after(runtime_dir)


if __name__ == "__main__":
    main()
