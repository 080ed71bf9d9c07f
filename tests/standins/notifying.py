"""A daemon that speaks the notify protocol and does nothing but what a test tells it.

    notifying.py PATH [ARGUMENT...]

It connects to the socket PATH, says who it is, and then takes orders: lines of Python literals, (NAME, ARGUMENT...), each answered by one
line. Nothing is imported from luod: it stands for any program that does as sd_notify(3) says.
"""

from __future__ import annotations

import array
import ast
import os
import random
import select
import signal
import socket
import struct
import sys
from contextlib import suppress
from typing import Any, Final

SCRIPT: Final = os.path.abspath(__file__)
VARIABLES: Final = (
    "FDSTORE",
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LUOD_SUPERVISOR",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
)


def notify(text: str | bytes, fds: list[int] | None = None) -> None:
    """Send one datagram."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(os.environ["NOTIFY_SOCKET"])
        sock.sendmsg([text if isinstance(text, bytes) else text.encode()], rights)


def memfd(content: bytes) -> int:
    """A memfd with that in it."""
    fd = os.memfd_create("thing")
    os.write(fd, content)
    return fd


def store(name: str, content: bytes, times: int = 1) -> None:
    """Store one memfd, so many times."""
    fd = memfd(content)
    for _ in range(times):
        notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd])
    os.close(fd)


def store_many(names: list[str]) -> None:
    """Store a memfd under each name, with the name in it, and wait until that was heard."""
    for number, name in enumerate(names):
        store(name, name.encode())
        if number % 8 == 7:
            barrier()
    barrier()


def store_pipe(fields: str) -> int:
    """Store the reading end of a pipe. Returns the writing end."""
    read, write = os.pipe()
    notify(f"FDSTORE=1\n{fields}", [read])
    os.close(read)
    return write


def store_lingering(name: str, port: int) -> None:
    """Store a TCP connection whose last close waits, SO_LINGER of socket(7), for a peer that doesn't read."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
        sock.setblocking(False)
        try:
            while True:
                sock.send(bytes(1 << 20))
        except BlockingIOError:
            notify(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", [sock.fileno()])


def close(fd: int) -> None:
    """Close one."""
    os.close(fd)


def barrier(fields: str = "BARRIER=1", number: int = 1) -> bool:
    """sd_notify_barrier(3): whether all copies of a pipe's end that was sent are closed."""
    read, write = os.pipe()
    notify(fields, [write] * number)
    os.close(write)
    poll = select.poll()
    poll.register(read, 0)
    answered = bool(poll.poll(20_000))
    os.close(read)
    return answered


def stored() -> list[tuple[str, bytes]]:
    """What was passed: names and contents."""
    if int(os.environ.get("LISTEN_PID", "0")) != os.getpid():
        return []
    names = os.environ["LISTEN_FDNAMES"].split(":")
    assert len(names) == int(os.environ["LISTEN_FDS"])
    return [(name, os.pread(3 + place, 65536, 0)) for place, name in enumerate(names)]


def fds() -> dict[int, str]:
    """What is open, but for the connection to the test."""
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return {fd: link for fd, link in found.items() if fd != _talk.fileno()}


def signals() -> tuple[list[int], list[int]]:
    """Which signals are blocked, and which are not at their default."""
    odd = [int(number) for number in sorted(signal.valid_signals()) if signal.getsignal(number) not in (signal.SIG_DFL, None)]
    return sorted(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())), odd


def another() -> int:
    """Start another one of these, which says hello to the test itself."""
    return os.posix_spawn(sys.executable, [sys.executable, "-I", "-S", SCRIPT, *sys.argv[1:]], os.environ)


def stranger() -> int:
    """Start one whose parent is dead: an orphan, with nothing of ours in its environment."""
    read, write = os.pipe()
    if os.fork() == 0:
        command = [sys.executable, "-I", "-S", SCRIPT, *sys.argv[1:]]
        pid = os.posix_spawn(sys.executable, command, {"PATH": os.environ["PATH"]})
        os.write(write, b"%d" % pid)
        os._exit(0)
    os.close(write)
    os.wait()
    pid = int(os.read(read, 20))
    os.close(read)
    return pid


def stubborn(number: int) -> None:
    """Ignore a signal."""
    signal.signal(number, signal.SIG_IGN)


def note(number: int) -> None:
    """Say ("came", number) to the test when that signal comes."""

    def came(number: int, frame: object) -> None:
        say(("came", number))

    signal.signal(number, came)


def kill(pid: int, number: int) -> None:
    """Send a signal."""
    os.kill(pid, number)


def is_gone(pid: int) -> bool:
    """Whether no such process is there, not even as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def end(status: int) -> None:
    """End."""
    os._exit(status)


def churn(seed: int) -> None:
    """Store and remove for ever. Before each the test hears of it, and after its barrier again."""
    chance = random.Random(seed)
    names = [name for name, _ in stored()]
    while True:
        if names and chance.random() < 0.45:
            name = names.pop(chance.randrange(len(names)))
            say(("remove", name))
            notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
        else:
            name = f"n{chance.getrandbits(64):x}"
            names.append(name)
            say(("store", name))
            store(name, name.encode())
        barrier()
        say(("done", name))


def say(value: object) -> None:
    """Tell the test."""
    _talk.sendall(repr(value).encode() + b"\n")


def main() -> None:
    """Do as told, until nobody tells. With the argument `stubborn` SIGTERM is ignored."""
    if "stubborn" in sys.argv[2:]:
        stubborn(signal.SIGTERM)
    _talk.connect(sys.argv[1])
    say((os.getpid(), sys.argv[2:], {name: os.environ[name] for name in VARIABLES if name in os.environ}))
    with _talk.makefile("rb") as orders:
        for line in orders:
            name, *arguments = ast.literal_eval(line.decode())
            result: Any = globals()[name](*arguments)
            say(result)


_talk = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

if __name__ == "__main__":
    main()
