"""list, show, status, capabilities, monitor."""

from __future__ import annotations

import argparse
import sys

from luod_client.commands import output
from luod_client.commands.update import rows
from luod_client.session import control, deserialize
from luod_protocol import messages as m


def _held(info: m.SessionInfo) -> str:
    return ", ".join(f"{each.pid} ({'alive' if each.alive else 'gone'})" for each in info.retrieved_by)


def _state(info: m.SessionInfo) -> str:
    return f"{info.state} by {info.claimed_by}" if info.claimed_by else info.state


def sessions(args: argparse.Namespace) -> None:
    """The sessions that this user may see."""
    with deserialize(runtime_dir=args.runtime_dir) as connection:
        found = connection.list(owner=args.owner)
    if args.json:
        output.write_json({"sessions": found})
        return
    if not found:
        output.write("no sessions")
        return
    output.write(
        output.table(
            ("SESSION", "OWNER", "STATE", "ENTRIES", "SINCE", "RETRIEVED BY", "ID"),
            [
                (
                    each.session,
                    str(each.owner),
                    _state(each),
                    str(each.entries),
                    output.when(each.finalized_at or each.opened_at),
                    _held(each),
                    each.session_id.hex(),
                )
                for each in found
            ],
        )
    )


def show(args: argparse.Namespace) -> None:
    """One session."""
    with deserialize(runtime_dir=args.runtime_dir) as connection:
        shown = connection.show(args.session, session_id=args.id, owner=args.owner)
    if args.json:
        output.write_json(shown)
        return
    info = shown.info
    output.write(
        output.fields(
            (
                ("session", info.session),
                ("id", info.session_id.hex()),
                ("owner", str(info.owner)),
                ("state", _state(info)),
                ("opened", output.when(info.opened_at)),
                ("finalized", output.when(info.finalized_at)),
                ("generation", str(info.generation or "")),
                ("survives", ", ".join(info.survives)),
                ("retrieved by", _held(info)),
                ("metadata", output.text(shown.metadata)),
            )
        )
    )
    output.write("")
    output.write(entries(shown.entries))


def entries(found: tuple[m.EntryInfo, ...]) -> str:
    """A table of entries."""
    return output.table(
        ("NAME", "KIND", "FACTS", "NEEDS", "METADATA"),
        [(each.name, each.kind, output.facts(each.facts), ", ".join(each.needs), output.text(each.metadata)) for each in found],
    )


def status(args: argparse.Namespace) -> None:
    """How the daemon is."""
    with deserialize(runtime_dir=args.runtime_dir) as connection:
        found = connection.status()
        update = connection.update()
    if args.json:
        output.write_json(found)
        return
    output.write(
        output.fields(
            (
                ("luod", f"{found.luod}, pid {found.pid}, in {args.runtime_dir}"),
                ("generation", str(found.generation)),
                ("started", output.when(found.started_at)),
                ("sessions", f"{found.sessions_open} open, {found.sessions_preserved} preserved, {found.sessions_claimed} claimed"),
                ("not shown", _opaque(found)),
                ("fds", f"{found.preserved_fds} preserved, {found.staged_fds} in open sessions"),
                ("connections", str(found.connections)),
                ("descriptors", f"{found.open_fds} open in the daemon"),
                ("last pause", f"{found.last_pause_us / 1000:.1f} ms" if found.last_pause_us else ""),
                ("kept by", _kept(found)),
                *(rows(update) if update.state != "normal" or update.reason or update.steps_us else ()),
            )
        )
    )


def _opaque(found: m.DaemonStatus) -> str:
    if not found.sessions_opaque:
        return ""
    return f"{found.sessions_opaque} sessions that this luod can't read, kept for a newer one: see luod's log"


def _kept(found: m.DaemonStatus) -> str:
    if not found.manager:
        return "nobody else: sessions end with luod"
    limit = f" of {found.store_limit}" if found.store_limit else ""
    return f"{found.manager}, {found.stored_fds}{limit} fds in its store"


def capabilities(args: argparse.Namespace) -> None:
    """What the daemon takes, and what sessions survive."""
    with deserialize(runtime_dir=args.runtime_dir) as connection:
        found = connection.capabilities()
    if args.json:
        output.write_json(found)
        return
    numbers: dict[str, int] = {}
    events = list(found.survives)
    rows = [(row.sort, *(_cell(row, event, numbers) for event in events)) for row in found.matrix]
    heads = (event.replace("-", "-\n").upper() for event in events)
    output.write(output.table(("A FD\nSURVIVES", *heads), rows))
    output.write("")
    output.write("\n".join(output.wrapped(f"{number:3}  ", reason) for reason, number in numbers.items()))
    output.write("")
    output.write(output.wrapped("handlers:  ", ", ".join(sorted(found.kinds.values()))))


def _cell(row: m.SortSurvival, event: str, numbers: dict[str, int]) -> str:
    """`yes`, or `no` or `?` with the reason's number, which is the next one for a new reason."""
    reason = row.survives.get(event, "")
    if not reason:
        return "yes"
    return f"{'?' if event in row.untried else 'no'} {numbers.setdefault(reason, len(numbers) + 1)}"


def monitor(args: argparse.Namespace) -> None:
    """What happens, until luod or the user ends it."""
    with control(runtime_dir=args.runtime_dir) as connection:
        try:
            for event in connection.monitor():
                _write_event(event, as_json=args.json)
                sys.stdout.flush()
        except KeyboardInterrupt:
            return


def _write_event(event: m.Event, *, as_json: bool) -> None:
    if as_json:
        output.write_json(event, indent=None)
        return
    if event.lost:
        output.write(f"({event.lost} events were lost: the reader was too slow)")
    whose = f"{event.session} of {event.owner}" if event.session else ""
    output.write("  ".join(part for part in (output.when(event.at), event.event, whose, event.detail) if part))
