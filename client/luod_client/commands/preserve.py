"""preserve: from the sources on the command line to a session in luod's custody."""

from __future__ import annotations

import argparse
import fcntl
import os
import select
import stat
import sys
from collections.abc import Iterable
from contextlib import ExitStack

from luod_client.commands import output
from luod_client.commands.copying import copy
from luod_client.commands.look import entries
from luod_client.session import Session, serialize
from luod_protocol import messages as m
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import OwnedFd


def run(args: argparse.Namespace) -> None:
    """Check the sources, open the session, copy, preserve, finalize."""
    with ExitStack() as stack:
        # Before anything is opened, which could take a number that the user has mistaken for an inherited one.
        for name, scheme, rest in args.sources:
            if scheme == "fd":
                _check_inherited(name, int(rest))
        opened = {
            name: stack.enter_context(_open_content(name, rest) if scheme == "memfd" else _open_path(name, rest))
            for name, scheme, rest in args.sources
            if scheme != "fd"
        }
        session = stack.enter_context(
            serialize(args.session, metadata=_encode(args.metadata), owner=args.owner, runtime_dir=args.runtime_dir)
        )
        fds: dict[str, int] = {}
        for name, scheme, rest in args.sources:
            if scheme == "fd":
                fds[name] = int(rest)
            elif scheme == "memfd":
                fds[name] = stack.enter_context(_copied(name, opened[name].fileno(), rest)).fileno()
            else:
                fds[name] = opened[name].fileno()
        kept = session.preserve(
            fds,
            metadata={name: _encode(text) for name, text in args.entry_metadata},
            needs=_lists(args.needs),
        )
        if args.hold:
            _tell(args, session, kept.values(), None)
            _hold(session)
        else:
            _tell(args, session, kept.values(), session.finalize(require=args.require, seal=_lists(args.seal)))


def _encode(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _lists(pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    lists: dict[str, set[str]] = {}
    for name, values in pairs:
        lists.setdefault(name, set()).update(values.split(","))
    return lists


def _check_inherited(name: str, fd: int) -> None:
    try:
        # What luoctl has opened itself is close-on-exec, what it inherited can't be.
        inherited = not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    except (OSError, OverflowError):
        inherited = False
    if not inherited:
        raise Refusal(
            Code.BAD_REQUEST,
            f"{name}=fd:{fd}: luoctl has inherited no fd {fd}: pass it, as a shell does with `luoctl ... {fd}<>FILE`",
            entry=name,
        )


def _open_content(name: str, path: str) -> OwnedFd:
    fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    if stat.S_ISDIR(os.fstat(fd.fileno()).st_mode):
        fd.close()
        raise Refusal(Code.BAD_REQUEST, f"{name}=memfd:{path}: it is a directory: name a file", entry=name)
    return fd


def _open_path(name: str, path: str) -> OwnedFd:
    # O_NONBLOCK: neither a FIFO nor a device may hold luoctl up in open(2). It is taken off again.
    flags = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        fd = OwnedFd(os.open(path, os.O_RDWR | flags))
    except (PermissionError, IsADirectoryError):
        fd = OwnedFd(os.open(path, os.O_RDONLY | flags))
    os.set_blocking(fd.fileno(), True)
    return fd


def _copied(name: str, source: int, path: str) -> OwnedFd:
    memfd = OwnedFd(os.memfd_create(name[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        copy(source, memfd.fileno(), name)
        os.lseek(memfd.fileno(), 0, os.SEEK_SET)
    except OSError as error:
        memfd.close()
        raise OSError(error.errno, f"copying it into a memfd: {error.strerror}", path) from error
    except BaseException:
        memfd.close()
        raise
    return memfd


def _tell(args: argparse.Namespace, session: Session, kept: Iterable[m.EntryInfo], finalized: m.Finalized | None) -> None:
    found = tuple(kept)
    if args.json:
        output.write_json(
            {
                "session": session.name,
                "session_id": session.id.hex(),
                "state": "preserved" if finalized else "open",
                "survives": finalized.survives if finalized else (),
                "entry_survives": finalized.entry_survives if finalized else {},
                "entries": found,
            }
        )
    else:
        output.write(output.fields((("session", session.name), ("id", session.id.hex()))))
        output.write(f"survives  {', '.join(finalized.survives)}" if finalized else "held open until end of input or Ctrl-C")
        output.write("")
        output.write(entries(found))
    sys.stdout.flush()


def _hold(session: Session) -> None:
    """Until end of input, Ctrl-C, or the end of the connection, which raises why."""
    stdin = sys.stdin.fileno() if sys.stdin is not None else -1
    try:
        while stdin != -1:
            ready, _, _ = select.select([stdin, session], [], [])
            if session in ready:
                session.status()
            if stdin in ready and not os.read(stdin, 65536):
                return
    except KeyboardInterrupt:
        return
