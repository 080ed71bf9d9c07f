"""retrieve: memfds into files, or fds to a command."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

from luod_client.commands import output
from luod_client.commands.copying import copy
from luod_client.session import Claim, deserialize
from luod_protocol.errors import Code, Disconnected, Refusal
from luod_protocol.fds import OwnedFd, close_all

_FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""


def run(args: argparse.Namespace) -> None:
    """Claim, retrieve, use, finish if asked to."""
    if args.program_line and shutil.which(args.program_line[0]) is None:
        raise Refusal(Code.BAD_REQUEST, f"{args.program_line[0]}: no such command; nothing was retrieved")
    with (
        deserialize(runtime_dir=args.runtime_dir) as connection,
        connection.claim(args.session, owner=args.owner, force=args.force) as claim,
    ):
        names = list(dict.fromkeys(args.names)) or list(claim.entries)
        for name in names:
            if name not in claim.entries:
                raise Refusal(Code.NO_SUCH_ENTRY, f"session {args.session!r} has no entry {name!r}: `luoctl show` lists them", entry=name)
        if args.output_dir is not None:
            _to_files(args, claim, names)
            return
        above = _above(claim.retrieve(*names))
        if args.finish:
            try:
                claim.finish()
            except Disconnected as error:
                print(f"luoctl: {error}. The command gets the fds all the same", file=sys.stderr)
            except BaseException:
                close_all(above)
                raise
    _execute(args.program_line, names, above)


def _to_files(args: argparse.Namespace, claim: Claim, names: Sequence[str]) -> None:
    directory = args.output_dir
    paths = {name: os.path.join(directory, name) for name in names}
    for name, path in paths.items():
        if "/" in name or name in (".", ".."):
            raise Refusal(Code.BAD_NAME, f"entry {name!r} can't be the name of a file: retrieve it with -- COMMAND", entry=name)
        if claim.entries[name].kind != "memfd":
            raise Refusal(
                Code.KIND_NOT_SUPPORTED,
                f"entry {name!r} is a {claim.entries[name].kind}, only memfds have content to write: name those, or use -- COMMAND",
                entry=name,
            )
        if not args.overwrite and os.path.lexists(path):
            raise Refusal(Code.ENTRY_EXISTS, f"{path} exists, nothing was written: move it away, or say --overwrite", entry=name)
    os.makedirs(directory, exist_ok=True)
    fds = claim.retrieve(*names)
    try:
        written = {name: _write_file(fds[name], directory, path, overwrite=args.overwrite) for name, path in paths.items()}
    finally:
        close_all(fds.values())
    _sync(directory)
    if args.finish:
        claim.finish()
    if args.json:
        output.write_json(
            {
                "session": claim.info.session,
                "session_id": claim.info.session_id.hex(),
                "files": [{"name": name, "path": path, "size": written[name]} for name, path in paths.items()],
                "finished": args.finish,
            }
        )
    else:
        output.write(output.table(("NAME", "FILE", "SIZE"), [(name, path, output.size(written[name])) for name, path in paths.items()]))


def _write_file(source: OwnedFd, directory: str, path: str, *, overwrite: bool) -> int:
    """All of it on the disk under its name, or nothing."""
    number, unfinished = tempfile.mkstemp(prefix=".luoctl-", dir=directory)
    try:
        with OwnedFd(number) as target:
            count = copy(source.fileno(), target.fileno(), os.path.basename(path))
            os.fsync(target.fileno())
        if overwrite:
            os.replace(unfinished, path)
        else:
            os.link(unfinished, path)
            os.unlink(unfinished)
    except OSError as error:
        os.unlink(unfinished)
        raise OSError(error.errno, error.strerror, path) from error
    except BaseException:
        os.unlink(unfinished)
        raise
    return count


def _sync(directory: str) -> None:
    with OwnedFd(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        os.fsync(fd.fileno())


def _above(fds: Mapping[str, OwnedFd]) -> list[OwnedFd]:
    """The same at numbers that none of them is to get in the end. All that can fail for want of descriptors fails here."""
    above: list[OwnedFd] = []
    try:
        for fd in fds.values():
            above.append(OwnedFd(fcntl.fcntl(fd.fileno(), fcntl.F_DUPFD_CLOEXEC, _FIRST_FD + len(fds))))
    except BaseException:
        close_all(above)
        raise
    finally:
        close_all(fds.values())
    return above


def _execute(program_line: list[str], names: Sequence[str], fds: Sequence[OwnedFd]) -> NoReturn:
    """Become the command, with the fds from 3 on, as sd_listen_fds(3) expects them."""
    for place, fd in enumerate(fds):
        os.dup2(fd.take(), _FIRST_FD + place, inheritable=True)
    environment = {name: value for name, value in os.environ.items() if name != "LISTEN_PIDFDID"}
    environment |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)}
    # Python ignores these two, and that would be inherited.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.execvpe(program_line[0], program_line, environment)
