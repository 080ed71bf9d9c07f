"""What the stages of test_travelling.py import: sessions to send through a kexec, and how they look on either side."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NoReturn

import luod_client
from luod_client import cli
from luod_protocol.errors import LuodError
from luod_protocol.fds import OwnedFd, close_all
from processes import until

RUNTIME_DIR: Final = "/run/luod"
MANY: Final = 300
SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
Description = tuple[int, str, int, int, int, int]


@contextmanager
def luod() -> Generator[None]:
    """A luod that serves the machine."""
    with subprocess.Popen([sys.executable, "-P", "-m", "luod", "--runtime-dir", RUNTIME_DIR]) as process:
        try:
            until(serves, "luod serves")
            yield
        finally:
            process.terminate()


def serves() -> bool:
    """Whether a luod does."""
    try:
        luod_client.control().close()
    except LuodError:
        return False
    return True


def luoctl(*words: str) -> tuple[int, str, str]:
    """A luoctl in this process: an interpreter takes long to start here. Its status, and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(words)
    print("luoctl", *words, "->", status, out.getvalue(), err.getvalue())
    return status, out.getvalue(), err.getvalue()


def away(*command: str) -> NoReturn:
    """Run what ends this stage, and wait for that."""
    subprocess.run(command, check=True)
    signal.pause()
    raise AssertionError("a signal, but no end")


def tell(name: str, value: object) -> None:
    """Leave a literal for the test; a stage that jumps returns nothing."""
    with open(f"{os.environ['LAB']}/{name}", "w", encoding="utf-8") as file:
        file.write(repr(value))


def told(path: object) -> Any:
    """What was left."""
    with open(str(path), encoding="utf-8") as file:
        return ast.literal_eval(file.read())


def memfd(content: bytes, position: int = 0, seals: int = 0) -> OwnedFd:
    """A memfd; the caller owns it."""
    fd = OwnedFd(os.memfd_create("content", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.write(fd.fileno(), content)
    os.lseek(fd.fileno(), position, os.SEEK_SET)
    if seals:
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seals)
    return fd


def sessions() -> dict[str, dict[str, OwnedFd]]:
    """What shall travel; the caller owns the fds."""
    many = {f"entry-{n}": memfd(b"%d," % n * (n + 1), n, SEALS if n % 7 == 0 else 0) for n in range(MANY)}
    memory = memfd(b"guest memory" * 100_000)
    os.ftruncate(memory.fileno(), 16 << 20)
    os.fchmod(memory.fileno(), 0o600)
    reader = OwnedFd(os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDONLY | os.O_CLOEXEC))
    os.lseek(reader.fileno(), 12, os.SEEK_SET)
    return {"many": many, "guest": {"memory": memory, "reader": reader}, "backend": {"same": OwnedFd(os.dup(memory.fileno()))}}


def describe(fds: Mapping[str, OwnedFd]) -> dict[str, Description]:
    """Size, content, seals, access, position and permissions."""
    found: dict[str, Description] = {}
    for name, owned in fds.items():
        fd, status = owned.fileno(), os.fstat(owned.fileno())
        content = hashlib.sha256(os.pread(fd, status.st_size, 0)).hexdigest()
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        found[name] = (status.st_size, content, seals, access, os.lseek(fd, 0, os.SEEK_CUR), status.st_mode)
    return found


def keep(kept: Mapping[str, Mapping[str, OwnedFd]], require: Collection[str] = ("kexec",)) -> None:
    """Finalize sessions, which must survive a kexec, or what else is required."""
    for name, fds in kept.items():
        with luod_client.serialize(name, metadata=name.encode()) as session:
            session.preserve({each: fd.fileno() for each, fd in fds.items()}, metadata={each: each.encode() for each in fds})
            session.finalize(require=require)


def look(names: tuple[str, ...] = ("many", "guest", "backend"), *, finish: bool = False) -> dict[str, Any]:
    """What luod has: each session's metadata, entries and fds."""
    seen: dict[str, Any] = {}
    with luod_client.deserialize() as connection:
        for name in names:
            with connection.claim(name) as claim:
                fds = claim.retrieve()
                entries = [(each.name, each.kind, each.metadata) for each in claim.entries.values()]
                seen[name] = (claim.metadata, claim.info.session_id, entries, describe(fds))
                close_all(fds.values())
                if finish:
                    claim.finish()
    return seen
