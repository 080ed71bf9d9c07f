"""prepare, cancel, kexec: the update of the kernel, from the operator's side."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Final

from luod_client import kexec, systemd
from luod_client.commands import output
from luod_client.session import Control, control
from luod_protocol import messages as m
from luod_protocol.errors import Code, Disconnected, ProtocolFault, Refusal

PAUSE_S: Final = 0.05
"""How often it is asked whether all is prepared: preserving takes from milliseconds to minutes."""
FREEZE_S: Final = 10.0
"""How long requests under way may keep luod from being frozen."""

_STEPS: Final = {
    "kernel": "reboot to the new kernel's first moment (known to a second)",
    "boot": "from there to luod's process",
    "start": "luod's start",
    "adopt": "sessions taken over",
    "first-retrieve": "until a client had a fd",
}

NOT_NOW: Final = (
    "say --now: luoctl then reboots into the loaded kernel itself, at once, without stopping services or unmounting file systems. Stop "
    "before what must be stopped. `systemctl kexec` is no other way here, it would end what luod has"
)
NOW: Final = "`luoctl` reboots at once; services are not stopped, file systems not unmounted"
IN_ORDER: Final = "`systemctl kexec`: systemd stops all services, luod last of its clients, and carries over what luod leaves with it"


def prepare(args: argparse.Namespace) -> None:
    """Prepare, and wait until all is."""
    with control(runtime_dir=args.runtime_dir) as connection:
        _prepare(connection, args)
        _tell(args, connection.update())


def cancel(args: argparse.Namespace) -> None:
    """Undo it."""
    with control(runtime_dir=args.runtime_dir) as connection:
        _tell(args, connection.cancel_update(args.reason))


def load(args: argparse.Namespace) -> None:
    """Load a kernel to jump into."""
    running = kexec.running_command_line()
    line = " ".join(part for part in (running if args.reuse_cmdline else "", args.cmdline) if part)
    missing = kexec.missing_switches(line, running)
    if missing and not args.force:
        raise Refusal(
            Code.BAD_REQUEST,
            f"the command line lacks {' and '.join(missing)}, which this kernel has: the next would bring nothing. Add it, say "
            "--reuse-cmdline, or --force",
        )
    kexec.load(args.kernel, args.initrd, line)
    if args.json:
        output.write_json({"kernel": args.kernel, "initrd": args.initrd, "command_line": line})
    else:
        output.write(f"loaded {args.kernel}; `luoctl kexec run` goes there by systemd, `luoctl kexec run --now` at once")


def run(args: argparse.Namespace) -> None:
    """Check, prepare, and have systemd reboot, or freeze and reboot; undo it when that fails."""
    with control(runtime_dir=args.runtime_dir) as connection:
        report = connection.preflight()
        problems = _problems(report, args)
        running = connection.status()
        no_systemd = systemd.why_not(running.manager, systemd.unit_of(running.pid))
        if args.dry_run or problems:
            _plan(args, report, problems, no_systemd)
            if problems:
                raise Refusal(Code.CANNOT_SURVIVE, f"no kexec: {'; '.join(problems)}")
            return
        if not args.now and no_systemd:
            raise Refusal(Code.BAD_REQUEST, f"{no_systemd}: {NOT_NOW}")
        if connection.update().state != "prepared":
            _prepare(connection, args)
        try:
            if args.now:
                os.sync()
                _freeze(connection)
                kexec.jump()
            else:
                found = connection.update()  # luod may end at any moment from here on
                systemd.kexec()
                _tell(args, found)
        except (Disconnected, ProtocolFault):
            raise
        except BaseException as error:
            if connection.update().state in ("prepared", "frozen"):
                connection.cancel_update(str(error) or type(error).__name__)
            raise


def status(args: argparse.Namespace) -> None:
    """Where the update is."""
    with control(runtime_dir=args.runtime_dir) as connection:
        _tell(args, connection.update())


def _problems(report: m.PreflightReport, args: argparse.Namespace) -> list[str]:
    problems = [report.fault] if report.fault else []
    if not kexec.is_loaded():
        problems.append("no kernel is loaded: `luoctl kexec load --kernel PATH --initrd PATH --reuse-cmdline` first")
    if os.geteuid() != 0:
        problems.append("only root can reboot")
    if not args.force:
        problems += [
            f"{text} can't travel: {why} (finish it, --leave-behind, or --force)"
            for text, why in report.cannot.items()
            if not any(f"{name!r}" in text or text.endswith(f" {name}") for name in args.leave_behind)
        ]
    return problems


def _plan(args: argparse.Namespace, report: m.PreflightReport, problems: list[str], no_systemd: str) -> None:
    if args.json:
        if not problems:
            output.write_json({"report": report, "problems": problems, "no_systemd": no_systemd})
        return
    output.write(
        output.fields(
            (
                ("would travel", f"{report.sessions} sessions, {report.fds} fds, {output.size(report.memory_bytes)} in memfds"),
                ("memory grows by", f"{output.size(report.hole_bytes)}: holes are filled" if report.hole_bytes else ""),
                (
                    "are open",
                    f"{', '.join(report.open_sessions)}: to be finalized within {args.deadline:g} s" if report.open_sessions else "",
                ),
                *((text, f"can't travel: {why}") for text, why in report.cannot.items()),
                ("run", f"not possible: {no_systemd}" if no_systemd else IN_ORDER),
                ("run --now", NOW),
            )
        )
    )
    sys.stdout.flush()


def _prepare(connection: Control, args: argparse.Namespace) -> None:
    connection.prepare(deadline_s=args.deadline, leave_behind=args.leave_behind, force=args.force)
    while (found := connection.update()).state == "preparing":
        time.sleep(PAUSE_S)
    if found.state != "prepared":
        raise Refusal(Code.CANNOT_SURVIVE, f"the update was given up: {found.reason}")


def _freeze(connection: Control) -> None:
    deadline = time.monotonic() + FREEZE_S
    while True:
        try:
            connection.freeze()
            return
        except Refusal as refusal:
            if refusal.code is not Code.UPDATE_RUNNING or time.monotonic() > deadline:
                raise
        time.sleep(PAUSE_S)


def _tell(args: argparse.Namespace, found: m.UpdateStatus) -> None:
    if args.json:
        output.write_json(found)
    else:
        output.write(output.fields(rows(found)))


def rows(found: m.UpdateStatus) -> list[tuple[str, str]]:
    """An update for people; nothing when there was none."""
    if found.state == "normal" and not (found.reason or found.steps_us):
        return [("update", "none is prepared")]
    arrived = f"{found.arrived} sessions came from the last kernel" if found.arrived or found.steps_us else ""
    carried = f"{found.carried} sessions, {found.carried_fds} fds" if found.carried else ""
    return [
        ("update", found.state),
        ("given up", found.reason),
        ("waits until", output.when(found.deadline) if found.state == "preparing" else ""),
        ("preserved", carried),
        ("left behind", ", ".join(found.left_behind)),
        ("arrived", arrived),
        ("lost", "; ".join(found.lost)),
        *((f"  {step}", f"{us / 1000:.1f} ms, {_STEPS.get(step, '')}") for step, us in found.steps_us.items()),
    ]
