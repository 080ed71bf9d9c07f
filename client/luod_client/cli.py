"""`luoctl`: the command line of luod."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from luod_client.transport import NoDaemon
from luod_protocol.errors import Code, Disconnected, LuodError, ProtocolFault, Refusal
from luod_protocol.fds import OwnedFd
from luod_protocol.limits import SESSION_ID_BYTES
from luod_protocol.paths import runtime_dir
from luod_protocol.version import RELEASE

DONE: Final = 0
REFUSED: Final = 1
USAGE: Final = 2
NO_DAEMON: Final = 3
INTERRUPTED: Final = 130
"""As a shell reports a command that SIGINT ended."""

MAX_DEADLINE_S: Final = 86_400

_EPILOG: Final = """\
exit status: 0 done, 1 refused (the reason is on stderr), 2 usage, 3 no daemon.

With --json, one JSON document goes to stdout and nothing else; monitor writes one document a line. Its fields are those of the message in
docs/protocol.md. `session_id` is in hexadecimal, `metadata` in base64, times are seconds since 1970, sizes are bytes. When the command
fails the document is {"error": {"code", "errno", "message", "entry"}}.
"""

_RETRIEVE_USAGE: Final = "luoctl retrieve [options] SESSION [NAME...] {--output-dir DIR | -- COMMAND...}"


def _session_id(text: str) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != SESSION_ID_BYTES:
        raise argparse.ArgumentTypeError(f"a session id has {2 * SESSION_ID_BYTES} hexadecimal digits")
    return value


def _uid(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32 - 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no uid")
    return int(text)


def _pid(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is no pid")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_DEADLINE_S:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0 to {MAX_DEADLINE_S}")
    return value


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _source(text: str) -> tuple[str, str, str]:
    name, value = _pair(text)
    scheme, colon, rest = value.partition(":")
    if not (colon and rest) or scheme not in ("fd", "memfd", "path"):
        raise argparse.ArgumentTypeError(f"{value!r} is no source: there are fd:N, memfd:PATH and path:PATH")
    if scheme == "fd" and not rest.isdecimal():
        raise argparse.ArgumentTypeError(f"fd:{rest}: {rest!r} is no number of a fd")
    return name, scheme, rest


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--runtime-dir", metavar="DIR", help="where luod is (default: /run/luod for root, else $XDG_RUNTIME_DIR/luod)")
    common.add_argument("--json", action="store_true", help="one JSON document on stdout, see `luoctl --help`")
    common.add_argument("--owner", metavar="UID", type=_uid, help="whose session: for root, and for whom luod's configuration names")
    return common


def _parser() -> argparse.ArgumentParser:
    common = _common()
    parser = argparse.ArgumentParser(
        prog="luoctl",
        parents=[common],
        description="Give file descriptors into luod's custody, look at them, take them back.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"luoctl {RELEASE}")
    root = commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: str, text: str, **more: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=text, description=text.capitalize() + ".", **more)
        sub.set_defaults(run=run)
        return sub

    def session(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("session", nargs="?", default="", metavar="SESSION", help="its name")
        sub.add_argument("--id", type=_session_id, default=b"", metavar="ID", help="its id, 32 hexadecimal digits, instead of the name")

    def force(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--force", action="store_true", help="also when a process that retrieved from it is alive")

    sub = command("preserve", "preserve:run", "make a session and give it into luod's custody")
    sub.add_argument("session", metavar="SESSION", help="its name")
    sub.add_argument(
        "sources",
        nargs="+",
        type=_source,
        metavar="NAME=SOURCE",
        help="SOURCE is fd:N (inherited), memfd:PATH (the content is copied into a memfd), path:PATH (opened)",
    )
    sub.add_argument("--metadata", default="", metavar="TEXT", help="kept with the session")
    sub.add_argument("--entry-metadata", action="append", type=_pair, default=[], metavar="NAME=TEXT", help="kept with an entry")
    sub.add_argument("--needs", action="append", type=_pair, default=[], metavar="NAME=NAMES", help="entries it needs, separated by commas")
    sub.add_argument("--require", action="append", default=[], metavar="WHAT", help="what it must survive, such as daemon-crash")
    sub.add_argument(
        "--seal", action="append", type=_pair, default=[], metavar="NAME=SEALS", help="add seals to a memfd, such as ram=write,shrink"
    )
    sub.add_argument("--hold", action="store_true", help="don't finalize: keep it open until end of input or Ctrl-C, then roll it back")

    command("list", "look:sessions", "list the sessions")
    session(command("show", "look:show", "show a session and its entries"))
    command("status", "look:status", "show how the daemon is")
    command("capabilities", "look:capabilities", "show the kinds of fds that luod takes, and what sessions survive")
    command("monitor", "look:monitor", "show what happens, until Ctrl-C")

    sub = command(
        "retrieve", "retrieve:run", "take fds back", usage="luoctl retrieve [options] SESSION [NAME...] {--output-dir DIR | -- COMMAND...}"
    )
    sub.add_argument("session", metavar="SESSION", help="its name")
    sub.add_argument("names", nargs="*", metavar="NAME", help="which entries (default: all)")
    sub.add_argument("--output-dir", metavar="DIR", help="write the content of each memfd to DIR/NAME")
    sub.add_argument("--overwrite", action="store_true", help="replace files that exist")
    sub.add_argument("--finish", action="store_true", help="finish the session when everything is there (before COMMAND starts)")
    force(sub)

    for name, text in (("finish", "have luod let go of a session"), ("discard", "drop a session that nobody will claim")):
        sub = command(name, f"end:{name}", text)
        session(sub)
        force(sub)

    sub = command("upgrade", "end:upgrade", "replace luod by a fresh one")
    sub.add_argument("--program", default="", metavar="PATH", help="the executable to start (default: the daemon's own)")
    sub.add_argument(
        "--of",
        metavar="PID",
        type=_pid,
        default=0,
        help="luod's process: wait for its end too, and give up when it ends and no successor answers (for service managers)",
    )

    def going(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--deadline", type=_seconds, default=10.0, metavar="S", help="how long open sessions are waited for (default: 10)")
        sub.add_argument("--leave-behind", action="append", default=[], metavar="SESSION", help="may end with this kernel; by name or id")
        sub.add_argument("--force", action="store_true", help="whatever can't travel may end with this kernel")

    going(command("prepare", "update:prepare", "prepare for another kernel: preserve all sessions in this one"))
    sub = command("cancel", "update:cancel", "give a prepared update up, and go on as before")
    sub.add_argument("--reason", default="", metavar="TEXT", help="for whoever asks later")
    kexec = commands.add_parser(
        "kexec", help="go to another kernel with all sessions", description="Go to another kernel with all sessions."
    )
    commands = kexec.add_subparsers(dest="action", metavar="ACTION", required=True)
    sub = command("load", "update:load", "load a kernel")
    sub.add_argument("--kernel", required=True, metavar="PATH", help="its image")
    sub.add_argument("--initrd", metavar="PATH", help="its initial ram disk")
    sub.add_argument("--reuse-cmdline", action="store_true", help="the command line of the running kernel")
    sub.add_argument("--cmdline", default="", metavar="TEXT", help="the command line, or more of it")
    sub.add_argument("--force", action="store_true", help="also with a command line that switches live updates off")
    sub = command("run", "update:run", "check, prepare, and reboot into the loaded kernel, by systemd or at once")
    going(sub)
    sub.add_argument("--dry-run", action="store_true", help="only say what would happen")
    sub.add_argument("--now", action="store_true", help="reboot at once, without stopping services")
    command("status", "update:status", "show how an update is going, or went")
    commands = root
    command("demo", "", "show the whole story on this machine, in seconds", add_help=False)
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _parser()
    program: list[str] = []
    if "--" in argv:
        cut = argv.index("--")
        if _common().parse_known_args(argv[:cut])[1][:1] == ["retrieve"]:
            argv, program = argv[:cut], argv[cut + 1 :]
    defaults = argparse.Namespace(runtime_dir=None, json=False, owner=None, program_line=program)
    args, rest = parser.parse_known_args(argv, defaults)
    args.rest = rest
    if args.command == "demo":
        return args
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command in ("show", "finish", "discard") and bool(args.session) == bool(args.id):
        parser.error(f"{args.command} takes a session's name or its --id")
    if args.command == "retrieve" and (args.output_dir is None) == (not program):
        parser.error("retrieve takes either --output-dir DIR or -- COMMAND...")
    if args.command == "preserve":
        names = [name for name, _, _ in args.sources]
        for name in names:
            if names.count(name) > 1:
                parser.error(f"the entry {name!r} is there twice")
    try:
        args.runtime_dir = runtime_dir(args.runtime_dir, os.environ, os.geteuid())
    except Refusal as refusal:
        parser.error(refusal.message)
    return args


def _run(args: argparse.Namespace) -> int:
    if args.command == "demo":
        story: Callable[[list[str]], int] = importlib.import_module("luod_client.demo.story").main
        return story([*(["--json"] if args.json else []), *args.rest])
    module, _, function = args.run.partition(":")
    run: Callable[[argparse.Namespace], None] = getattr(importlib.import_module(f"luod_client.commands.{module}"), function)
    run(args)
    return DONE


def _error(error: LuodError | OSError) -> dict[str, str | int]:
    """`error` for --json."""
    entry = error.entry if isinstance(error, Refusal) else ""
    if isinstance(error, (Refusal, ProtocolFault)):
        return {"code": error.code.value, "errno": error.errno, "message": error.message, "entry": entry}
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return {"code": Code.SYSTEM_ERROR.value, "errno": error.errno or 0, "message": f"{where}{error.strerror or error}", "entry": ""}
    code, number = ("no-daemon", errno.ECONNREFUSED) if isinstance(error, NoDaemon) else ("disconnected", errno.ECONNRESET)
    return {"code": code, "errno": number, "message": str(error), "entry": ""}


def _guarded(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except BrokenPipeError:
        raise
    except (Refusal, ProtocolFault, Disconnected, NoDaemon, OSError) as error:
        told = _error(error)
        print(f"luoctl: {told['message']}", file=sys.stderr)
        if args.json:
            from luod_client.commands.output import write_json

            write_json({"error": told})
        return NO_DAEMON if isinstance(error, NoDaemon) else REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its arguments; None for the process's.

    Returns:
        The exit status.
    """
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    status = DONE
    try:
        status = _guarded(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()  # who read it has seen enough
    except OSError as error:
        print(f"luoctl: standard output: {error.strerror}", file=sys.stderr)
        _drop_stdout()
        status = REFUSED
    return status


def _drop_stdout() -> None:
    """What is still buffered must not fail again at exit."""
    with OwnedFd(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)) as nothing:
        os.dup2(nothing.fileno(), 1)


if __name__ == "__main__":
    sys.exit(main())
