"""Every kind that can be had here, through a daemon and its successors, while their owners go on using them."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
from contextlib import ExitStack

import luod_client
from conformance.specimens import SPECIMENS
from conformance.vmm import called
from harness import Daemon
from luod.handlers import recognize
from luod.handlers.base import Probe
from luod_protocol.fds import OwnedFd, own
from processes import readable


def test_every_specimen_survives_upgrades_and_its_owners(daemon: Daemon) -> None:
    where = daemon.runtime_dir
    with ExitStack() as stack:
        fds = {specimen.name: stack.enter_context(specimen.make()) for specimen in SPECIMENS}
        identities = {name: Probe(fd).identity for name, fd in fds.items()}
        with luod_client.serialize("all", runtime_dir=where) as session:
            kept = session.preserve(fds)
            session.finalize()
        assert {name: entry.kind for name, entry in kept.items()} == {specimen.name: specimen.kind for specimen in SPECIMENS}
        assert daemon.upgrade().generation == 2
        for specimen in SPECIMENS:
            specimen.use(fds[specimen.name])
        assert daemon.upgrade().generation == 3
        with luod_client.deserialize(runtime_dir=where) as looker, looker.claim("all") as claim:
            got = {name: stack.enter_context(fd) for name, fd in claim.retrieve().items()}
            claim.finish()
        for name, fd in got.items():
            probe = Probe(fd.fileno())
            assert (probe.identity, recognize(probe).kind) == (identities[name], kept[name].kind)


def test_what_they_do_goes_on(daemon: Daemon) -> None:
    where = daemon.runtime_dir
    libc = ctypes.CDLL(None, use_errno=True)
    with ExitStack() as stack:
        with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as child:
            ends = own(os.openpty())
            timer, watch, process = (
                OwnedFd(called(libc.timerfd_create(1, os.O_CLOEXEC))),
                OwnedFd(called(libc.inotify_init1(os.O_CLOEXEC))),
                OwnedFd(os.pidfd_open(child.pid)),
            )
            called(libc.timerfd_settime(timer.fileno(), 0, struct.pack("4q", 0, 1_000_000, 0, 1), None))
            called(libc.inotify_add_watch(watch.fileno(), os.fsencode(where), 0x100))  # IN_CREATE
            with ends[0], ends[1], timer, watch, process, luod_client.serialize("live", runtime_dir=where) as session:
                given = {"master": ends[0], "slave": ends[1], "timer": timer, "watch": watch, "process": process}
                session.preserve({name: fd.fileno() for name, fd in given.items()})
                session.finalize()
            assert daemon.upgrade().generation == 2
            os.close(os.open(f"{where}/new", os.O_CREAT | os.O_CLOEXEC))
            with luod_client.deserialize(runtime_dir=where) as looker, looker.claim("live") as claim:
                got = {name: stack.enter_context(fd).fileno() for name, fd in claim.retrieve().items()}
                claim.finish()
            os.unlink(f"{where}/new")
            signal.pidfd_send_signal(got["process"], signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
        assert readable(got["process"])
        assert readable(got["timer"])
        assert struct.unpack("Q", os.read(got["timer"], 8))[0] > 1
        assert readable(got["watch"])
        assert b"new\0" in os.read(got["watch"], 4096)
        os.write(got["slave"], b"from the guest")
        assert readable(got["master"])
        assert os.read(got["master"], 100) == b"from the guest"
