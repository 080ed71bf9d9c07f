"""The daemon's command line: `luod`, or `python -m luod`.

Happy path: check the machine, read the configuration, take the runtime directory, adopt what the service manager kept, serve; or succeed a
running luod and serve. A successor that can't even begin says why over the handover socket, for whoever asked for the upgrade. SIGHUP is an
upgrade to a fresh luod, which reads the configuration again.

Exit status: 0 ended by SIGTERM or SIGINT, or replaced; 1 could not serve, or a successor that left; 2 usage, or a configuration that
can't be used; 3 another luod serves. With --supervised this process becomes the parent of one that does all this (luod.supervisor).
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NoReturn

import trio

from luod import listening, lowest
from luod.checking import as_toml
from luod.config import Config, ConfigFault, load
from luod.relaying import relay
from luod.server import Server
from luod.starting import Start
from luod.succession.channel import decline
from luod.succession.new import Left
from luod.supervisor import command as supervisor
from luod.system import System
from luod_protocol import messages as m
from luod_protocol import wire
from luod_protocol.connection import ClientConnection, refusal
from luod_protocol.errors import LuodError, Refusal
from luod_protocol.messages import Endpoint
from luod_protocol.paths import runtime_dir
from luod_protocol.version import RELEASE, WIRE

OLDEST_KERNEL: Final = (5, 15)
"""pidfds are from 5.3, waitid(P_PIDFD) from 5.4; before 5.14 peeking at fds in flight raced with their collector (CVE-2021-0920)."""

FD_TABLE: Final = 65_536
"""The descriptor table is grown to this once, at the start: growing it later, with a thread alive, waits for an RCU grace period."""

MAX_WATCHDOG_S: Final = 86_400

log = logging.getLogger("luod")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="luod",
        description="Keep clients' file descriptors while a process, luod itself, or the kernel is replaced.",
        epilog="exit status: 0 ended by a signal, or replaced; 1 could not serve; 2 usage, or a bad configuration; 3 another luod serves.",
    )
    parser.add_argument(
        "--runtime-dir", metavar="DIR", help="where the sockets are (default: /run/luod for root, else $XDG_RUNTIME_DIR/luod)"
    )
    parser.add_argument("--config", metavar="FILE", help="a luod.toml; without one the defaults hold")
    parser.add_argument("--check-config", action="store_true", help="say what is wrong with the configuration, or what it means, and end")
    parser.add_argument("--takeover", action="store_true", help="succeed the luod that serves DIR, with all that it holds")
    parser.add_argument(
        "--supervised", action="store_true", help="run under a parent of its own that keeps preserved sessions when luod crashes"
    )
    parser.add_argument(
        "--watchdog",
        metavar="SECONDS",
        type=float,
        help="with --supervised: restart a luod that is silent for so long (default: 30; 0: never)",
    )
    parser.add_argument("--succeed-fd", metavar="FD", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"luod {RELEASE}")
    options = parser.parse_args(argv)
    if options.watchdog is not None and not (options.supervised and 0 <= options.watchdog < MAX_WATCHDOG_S):
        parser.error(f"--watchdog is for --supervised, from 0 to {MAX_WATCHDOG_S} seconds")
    logging.basicConfig(level=logging.INFO, format="luod: %(message)s", stream=sys.stderr)
    if options.check_config:
        return _check_config(options.config)
    try:
        _check_kernel()
        directory = os.path.abspath(runtime_dir(options.runtime_dir, os.environ, os.geteuid()))
        config = load(options.config)
    except (Refusal, ConfigFault, _TooOld) as error:
        log.error("%s", error)
        if options.succeed_fd is not None:
            with socket.socket(fileno=options.succeed_fd) as predecessor:
                decline(predecessor, str(error))
        return 2 if not isinstance(error, _TooOld) else 1
    passed_on = ["--runtime-dir", directory]
    if options.config:
        passed_on += ["--config", os.path.abspath(options.config)]
    try:
        if options.supervised:
            watchdog_s = supervisor.Settings().watchdog_s if options.watchdog is None else options.watchdog
            supervisor.become(passed_on, ["--takeover"] if options.takeover else [], watchdog_s)
        _prepare_descriptors()
        handover = _ask_takeover(directory) if options.takeover else None
        if options.succeed_fd is not None:
            handover = socket.socket(fileno=options.succeed_fd)
        if handover is not None:
            handover = socket.socket(fileno=lowest.lift(handover.detach()))
        _run(config, directory, passed_on, handover)
    except listening.AlreadyServed as error:
        log.error("%s", error)
        return 3
    except (LuodError, OSError) as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def _check_config(path: str | None) -> int:
    try:
        print(as_toml(load(path)), end="")
    except ConfigFault as fault:
        for text in fault.texts:
            log.error("%s", text)
        return 2
    return 0


class _TooOld(LuodError):
    """This machine can't run luod."""


def _check_kernel() -> None:
    release = os.uname().release
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if numbers < OLDEST_KERNEL:
        raise _TooOld(f"Linux {release} is too old: luod needs {OLDEST_KERNEL[0]}.{OLDEST_KERNEL[1]} or later")


def _prepare_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    last = min(hard, FD_TABLE) - 1
    os.close(fcntl.fcntl(0 if lowest.is_open(0) else os.open(os.devnull, os.O_RDONLY), fcntl.F_DUPFD_CLOEXEC, last))


def _ask_takeover(directory: str) -> socket.socket:
    """Ask the luod that serves `directory` for a handover socket.

    Raises:
        LuodError: there is none, or it refuses.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
        try:
            control.connect(f"{directory}/{Endpoint.CONTROL}")
        except OSError as error:
            raise Left(f"no luod to take over in {directory}: {error.strerror}; start one without --takeover") from None
        protocol = ClientConnection(Endpoint.CONTROL)
        for request in (
            m.Hello(seq=protocol.next_seq(), low=WIRE.low, high=WIRE.high, client=f"luod {RELEASE} --takeover"),
            m.Takeover(seq=protocol.next_seq()),
        ):
            wire.send(control, protocol.send(request, 0))
            packet = wire.receive(control)
            if packet is None:
                raise Left("the running luod ended the connection")
            with packet:
                reply = protocol.receive(packet.data, len(packet.fds))
                if isinstance(reply, m.Refused):
                    raise refusal(reply)
                if isinstance(reply, m.TakeoverOffered):
                    return socket.socket(fileno=packet.fds.pop().take())
    raise Left("the running luod offered nothing")


def _run(config: Config, directory: str, options: Sequence[str], handover: socket.socket | None) -> None:
    """Serve to the end. What ended it is raised as it is, not in the nursery's group."""
    try:
        trio.run(_serve, config, directory, options, handover)
    except BaseExceptionGroup as group:
        only, *others = group.exceptions
        if others:
            raise
        raise only from None


async def _serve(config: Config, directory: str, options: Sequence[str], handover: socket.socket | None) -> None:
    # The signals first: a successor that has committed must not be ended without its goodbye.
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            start = Start(nursery=nursery, config=config, options=options, system=System())
            server = await (start.fresh(directory) if handover is None else start.succeed(handover))
            # Nobody may listen any more, or the disk be full: no reason to end, least of all after a commit.
            with suppress(OSError):
                print(f"luod {RELEASE} (pid {os.getpid()}, generation {server.generation}) serves {directory}", file=sys.stderr, flush=True)
            nursery.start_soon(_leave_when_replaced, server)
            async for number in signals:
                if number != signal.SIGHUP:
                    break
                try:
                    server.upgrade("")
                except Refusal as refusal:
                    log.error("no upgrade on SIGHUP: %s", refusal)
            await server.upgrades.stop()
            if server.upgrades.replaced.is_set():
                await trio.sleep_forever()
            await relay(server)
            _say_goodbye(server)
            await server.managing.tell("STOPPING=1")
            listening.unbind(directory, server.bound)
            nursery.cancel_scope.cancel()
        server.leave()
        # Within the signals' context: more of them, unread at its end, would end this process before its time.
        _exit(server)


async def _leave_when_replaced(server: Server) -> None:
    await server.upgrades.replaced.wait()
    # Nothing may be shut down, rolled back or unlinked any more: all of it is the successor's. Copies are closed: when the successor has
    # closed its own already, this one is the last, and may hang.
    server.leave()
    _exit(server)


def _exit(server: Server) -> NoReturn:
    # The kernel closes what is held, all at once; tearing the interpreter down would only close it one by one.
    logging.shutdown()
    with suppress(OSError):
        sys.stderr.flush()
    server.closer.close_all_but_what_hangs()
    os._exit(0)


def _say_goodbye(server: Server) -> None:
    held = [session for session in server.store if session.sealed is not None and not session.stored]
    if held:
        names = ", ".join(repr(session.name) for session in held[:5])
        log.warning("ending with %d preserved sessions, which end with this luod: %s", len(held), names)
    lost = sum(not opaque.stored for opaque in server.store.opaque)
    if lost:
        log.warning("ending with %d sessions that could not be shown here, which end with this luod", lost)


if __name__ == "__main__":
    sys.exit(main())
