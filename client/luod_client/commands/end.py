"""finish, discard, upgrade."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack

from luod_client.commands import output
from luod_client.commands.replaced import watching
from luod_client.session import control, deserialize
from luod_protocol.errors import Code, Refusal


def finish(args: argparse.Namespace) -> None:
    """Claim the session, and finish it on the same connection. By id, also when that was done already."""
    with deserialize(runtime_dir=args.runtime_dir) as connection:
        try:
            with connection.claim(args.session, session_id=args.id, owner=args.owner, force=args.force) as claim:
                finished = claim.finish()
        except Refusal as refusal:
            if not args.id or refusal.code not in (Code.NO_SUCH_SESSION, Code.SESSION_FINISHED):
                raise
            finished = connection.finish(args.id)
    _tell(args, finished.session_id, "finished")


def discard(args: argparse.Namespace) -> None:
    """Drop a session."""
    with deserialize(runtime_dir=args.runtime_dir) as connection:
        discarded = connection.discard(args.session, session_id=args.id, owner=args.owner, force=args.force)
    _tell(args, discarded.session_id, "discarded")


def _tell(args: argparse.Namespace, session_id: bytes, what: str) -> None:
    if args.json:
        output.write_json({"session_id": session_id.hex(), what: True})
    else:
        output.write(f"{what} {args.session or session_id.hex()}: luod holds nothing of it any more")


def upgrade(args: argparse.Namespace) -> None:
    """Replace luod."""
    program = os.path.abspath(args.program) if args.program else ""
    with ExitStack() as stack:
        gone = stack.enter_context(watching(args.of)) if args.of else None
        with control(runtime_dir=args.runtime_dir) as connection:
            upgraded = connection.upgrade(program)
        if gone is not None:
            gone()
    if args.json:
        output.write_json(upgraded)
    else:
        output.write(
            f"generation {upgraded.generation} (pid {upgraded.pid}) has taken over from pid {upgraded.predecessor_pid}; "
            f"the pause was {upgraded.pause_us / 1000:.1f} ms"
        )
