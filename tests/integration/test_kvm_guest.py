"""A real guest under /dev/kvm: it runs, is saved, goes on in another process; what can't be resumed is refused; and the example."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import FrameType

import attrs
import pytest

import luod_client
from harness import Daemon
from luod_client.demo import counting, guest, kvm
from luod_client.demo.checks import compare_guest
from luod_protocol.fds import OwnedFd
from machine import KVM, kvm_is_for_everybody, kvm_is_there
from processes import ALICE, LIMIT_S, PYTHON, Talk, folder_for, spawn_client, start

needs_kvm = pytest.mark.skipif(not kvm_is_there(), reason=f"no {KVM} that can be opened, on x86_64")
RUN = str(Path(__file__).parents[2] / "examples" / "kvm_guest" / "run.py")

HEADER = struct.Struct("<8sIIQ")
REGISTERS = 144 + 312
CHECKED = 5
"""Rows of the example's table."""


@pytest.fixture
def ram() -> Generator[int]:
    with OwnedFd(os.memfd_create("ram", os.MFD_CLOEXEC)) as memfd:
        yield memfd.fileno()


def counted(ram: int, counts: int) -> bytes:
    """The state of a guest that has counted on `ram` so far."""
    with counting.boot(ram) as machine:
        assert [counting.next_count(machine) for _ in range(counts)] == list(range(1, counts + 1))
        return machine.save()


# ---- the machine


@needs_kvm
def test_where_it_is_there_it_works() -> None:
    assert kvm.works() == ""


@needs_kvm
def test_a_saved_guest_has_its_count_in_its_register_in_its_ram_and_in_its_journal(ram: int) -> None:
    state = counted(ram, 20)
    assert len(state) == kvm.STATE_BYTES
    assert kvm.ebx(state) == 20
    assert counting.count_in(ram) == 20
    assert counting.wrong_in_journal(ram, 20) == []
    assert counting.wrong_in_journal(ram, 21) == [21]


@needs_kvm
def test_the_journal_keeps_the_last_counts_and_shows_a_damaged_one(ram: int) -> None:
    counts = counting.JOURNAL_COUNTS + 10
    counted(ram, counts)
    assert counting.wrong_in_journal(ram, counts) == []
    os.pwrite(ram, b"\0\0\0\0", 0x20000 + 4 * 100)
    assert counting.wrong_in_journal(ram, counts) == [100]


@needs_kvm
def test_saving_changes_nothing(ram: int) -> None:
    with counting.boot(ram) as machine:
        counting.next_count(machine)
        assert machine.save() == machine.save()
        assert [counting.next_count(machine) for _ in range(3)] == [2, 3, 4]


def resume(talk: Talk, ram: int) -> None:
    from luod_client.demo import counting, kvm

    with kvm.Machine.resume(ram, talk.hear()) as machine:
        talk.tell([counting.next_count(machine) for _ in range(50)])
        talk.tell(machine.save())


@needs_kvm
def test_a_guest_goes_on_in_another_process_and_back(ram: int) -> None:
    state = counted(ram, 100)
    with spawn_client(resume, ram, pass_fds=[ram]) as client:
        client.tell(state)
        assert client.hear() == list(range(101, 151))
        state = client.hear()
    assert (kvm.ebx(state), counting.count_in(ram)) == (150, 150)
    with kvm.Machine.resume(ram, state) as machine:
        assert counting.next_count(machine) == 151
    assert counting.wrong_in_journal(ram, 151) == []


@needs_kvm
def test_registers_that_are_not_the_rams_stop_the_guest(ram: int) -> None:
    earlier = counted(ram, 10)
    counted(ram, 0)  # the RAM keeps its 10, and the registers begin anew
    with counting.boot(ram) as machine, pytest.raises(kvm.KvmFault, match="halted: the count in its register"):
        counting.next_count(machine)
    with kvm.Machine.resume(ram, earlier) as machine:
        assert counting.next_count(machine) == 11
    with kvm.Machine.resume(ram, earlier) as machine, pytest.raises(kvm.KvmFault, match="halted: the count in its register"):
        counting.next_count(machine)


PROGRAMS = [
    ("e4 10", "stopped at .* exit reason 2"),  # in al, 0x10
    ("c6 06 00 80 01", "stopped at .* exit reason 6"),  # mov byte [0x8000], 1: there is no RAM
    ("e6 11", "wrote to port 0x11"),  # out 0x11, al
    ("f4", "halted"),  # hlt
]


@needs_kvm
@pytest.mark.parametrize(("program", "fault"), PROGRAMS)
def test_what_the_machine_has_no_device_for_is_a_fault(ram: int, program: str, fault: str) -> None:
    os.truncate(ram, 4096)
    os.pwrite(ram, bytes.fromhex(program), 0)
    with kvm.Machine(ram) as machine:
        machine.start(0)
        with pytest.raises(kvm.KvmFault, match=fault):
            counting.next_count(machine)


WAITS = bytes.fromhex("80 3e 00 01 00 74 f9 e6 e9")
"""Until the byte at 0x100 isn't 0; then out 0xe9, al."""


@contextlib.contextmanager
def in_a_moment(act: Callable[[], None]) -> Generator[None]:
    """`act` once, in a signal's handler, while the guest runs."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        act()

    before = signal.signal(signal.SIGPROF, handle)
    # Again and again, for the first may come just before the guest is entered, which then runs on.
    signal.setitimer(signal.ITIMER_PROF, 0.002, 0.002)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@needs_kvm
def test_signals_are_served_while_the_guest_runs(ram: int) -> None:
    os.truncate(ram, 4096)
    os.pwrite(ram, WAITS, 0)
    with kvm.Machine(ram) as machine:
        machine.start(0)

        def interrupt() -> None:
            raise KeyboardInterrupt

        with in_a_moment(interrupt), pytest.raises(KeyboardInterrupt):
            machine.run()

        def release() -> None:
            os.pwrite(ram, b"\1", 0x100)

        with in_a_moment(release):
            assert machine.run() == kvm.Out(port=counting.PORT, value=0)


def state_of(version: int = kvm.VERSION, size: int = counting.RAM_BYTES, registers: int = REGISTERS) -> bytes:
    return HEADER.pack(b"luod-kvm", version, 0, size) + bytes(registers)


REFUSED = [
    (b"", "no saved vCPU: 0 bytes"),
    (b"luod-kvm", "no saved vCPU: 8 bytes"),
    (bytes(kvm.STATE_BYTES), "no saved vCPU: 480 bytes"),
    (state_of(version=2), "saved in version 2, only 1 is known"),
    (state_of(version=2, registers=0), "saved in version 2, only 1 is known"),
    (state_of(registers=REGISTERS - 1), "has 479 bytes, where version 1 has 480"),
    (state_of(registers=REGISTERS + 1), "has 481 bytes, where version 1 has 480"),
    (state_of(size=4096), "saved with 4096 bytes of RAM, this RAM has 1048576"),
]


@pytest.mark.parametrize(("state", "why"), REFUSED)
def test_a_state_that_is_none_is_refused_before_kvm_is_asked(ram: int, state: bytes, why: str) -> None:
    os.truncate(ram, counting.RAM_BYTES)
    with pytest.raises(kvm.KvmFault, match=why):
        kvm.Machine.resume(ram, state, "/nonexistent")


@needs_kvm
def test_registers_that_kvm_does_not_take_are_refused(ram: int) -> None:
    state = bytearray(counted(ram, 1))
    state[-kvm.STATE_BYTES + HEADER.size + 144 :] = b"\xff" * 312
    with pytest.raises(kvm.KvmFault, match="KVM doesn't take the vCPU's registers"):
        kvm.Machine.resume(ram, bytes(state))


# ---- where there is no KVM


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the guest is for x86_64")
@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/nonexistent", "/nonexistent can't be opened: No such file or directory: load the kernel's module"),
        ("/dev/null", "/dev/null doesn't make a virtual machine: Inappropriate ioctl for device"),
    ],
)
def test_why_no_guest_can_run_is_said(path: str, why: str) -> None:
    assert kvm.works(path).startswith(why)


def probe(talk: Talk, path: str) -> None:
    from luod_client.demo import kvm

    talk.tell(kvm.works(path))


@pytest.mark.root
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the guest is for x86_64")
def test_who_may_not_open_it_is_told_what_to_do() -> None:
    with folder_for() as folder:
        path = f"{folder}/kvm"
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        with spawn_client(probe, path, user=ALICE) as client:
            assert client.hear() == f"{path} can't be opened: Permission denied: be root, or in the group that it belongs to"


# ---- in luod's custody


@needs_kvm
def test_a_guest_is_preserved_over_an_upgrade_and_goes_on(daemon: Daemon) -> None:
    with guest.boot() as vm:
        for _ in range(30):
            vm.step()
        stopped = guest.stop(vm, runtime_dir=daemon.runtime_dir)
    assert (stopped.count, stopped.register, stopped.in_ram, stopped.wrong) == (30, 30, 30, "")
    daemon.upgrade()
    moved = guest.go_on(runtime_dir=daemon.runtime_dir, counts=5)
    assert moved.stopped == stopped
    resumed = moved.resumed
    assert (resumed.first, resumed.last, resumed.wrong) == (31, 35, "")
    assert (resumed.sha256, resumed.identity) == (stopped.sha256, stopped.identity)
    assert resumed.rebuild_s < resumed.pause_s
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as luod:
        assert luod.list() == ()


def test_luod_keeps_a_guest_that_can_not_be_resumed(daemon: Daemon, ram: int) -> None:
    os.truncate(ram, counting.RAM_BYTES)
    said = guest.Stopped(count=1, wrong="", register=1, in_ram=1, sha256="", identity="", stopped_s=0.0)
    with OwnedFd(os.memfd_create("state", os.MFD_CLOEXEC)) as state:
        os.pwrite(state.fileno(), state_of() + b"\0", 0)
        with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
            metadata = {"state": repr(attrs.asdict(said)).replace("'", '"').encode()}
            session.preserve({"ram": ram, "state": state.fileno()}, metadata=metadata)
            session.finalize()
    with pytest.raises(kvm.KvmFault, match="has 481 bytes, where version 1 has 480"):
        guest.go_on(runtime_dir=daemon.runtime_dir)
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as luod:
        assert [info.session for info in luod.list()] == ["guest"]
        luod.discard("guest", force=True)


@needs_kvm
def test_a_count_that_is_repeated_shows(ram: int) -> None:
    state = counted(ram, 10)
    with guest.Guest(OwnedFd(os.dup(ram)), kvm.Machine.resume(ram, state), count=11) as vm:
        vm.step()
        assert vm.wrong == "11 came after 11"
        vm.step()
        assert (vm.wrong, vm.count) == ("11 came after 11", 12)


# ---- the example


def example(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([*PYTHON, RUN, *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    return done.returncode, done.stdout, done.stderr


def rows(out: str) -> Sequence[str]:
    return [line for line in out.splitlines() if line.startswith("guest: ")]


@needs_kvm
@pytest.mark.slow
def test_the_example_tells_its_story(daemon: Daemon) -> None:
    status, out, err = example("--runtime-dir", daemon.runtime_dir, "--counts", "100")
    assert (status, err) == (0, "")
    assert "… 100. Stopped." in out
    assert len(rows(out)) == CHECKED
    assert all(row.endswith("ok") for row in rows(out))
    assert out.endswith("Everything as it must be.\n")


@needs_kvm
@pytest.mark.slow
def test_the_example_starts_a_luod_where_there_is_none(tmp_path: Path) -> None:
    if os.geteuid() == 0 and os.path.exists("/run/luod"):
        pytest.skip("there is a luod of this machine's, in /run/luod")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, RUN, "--counts", "100"], capture_output=True, text=True, env=environment, timeout=LIMIT_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("no luod is running: one is started, in ")
    assert "luod is replaced: process " in done.stdout
    assert len(rows(done.stdout)) == CHECKED
    assert os.listdir(tmp_path) == []


def moved(stopped_in: str, resumed_in: str, identity: str) -> guest.Moved:
    stopped = guest.Stopped(count=5, wrong="", register=5, in_ram=5, sha256="ab", identity="1:9", stopped_s=0.0, kernel=stopped_in)
    resumed = guest.Resumed(sha256="ab", identity=identity, first=6, last=9, wrong="", pause_s=1.0, rebuild_s=0.1, kernel=resumed_in)
    return guest.Moved(stopped=stopped, resumed=resumed)


def test_the_ram_is_the_same_file_under_the_same_kernel_only() -> None:
    assert [check.what for check in compare_guest(moved("one", "one", "1:8")) if not check.ok] == ["guest: RAM: device and inode"]
    assert all(check.ok for check in compare_guest(moved("one", "two", "1:8")))


@needs_kvm
@pytest.mark.slow
def test_the_examples_halves_are_commands_of_their_own(daemon: Daemon) -> None:
    where = ("--runtime-dir", daemon.runtime_dir, "--counts", "100")
    assert example(*where, "preserve")[0] == 0
    status, _, err = example(*where, "preserve")
    assert status == 1
    assert "kvm-guest" in err
    daemon.upgrade()
    status, out, err = example(*where, "resume")
    assert (status, err) == (0, "")
    assert [row.endswith("ok") for row in rows(out)] == [True] * CHECKED
    status, _, err = example(*where, "resume")
    assert status == 1
    assert "kvm-guest" in err


@needs_kvm
@pytest.mark.slow
def test_the_example_fails_when_a_step_does(daemon: Daemon) -> None:
    status, out, err = example("--runtime-dir", daemon.runtime_dir, "--counts", "100", "--require", "daemon-crash")
    assert status == 1
    assert "would not survive what is required" in err
    assert out.endswith("NOT as it must be.\n")


def damage(talk: Talk, runtime_dir: str) -> None:
    import os

    import luod_client

    with luod_client.deserialize(runtime_dir=runtime_dir) as luod, luod.claim("kvm-guest") as claim, claim.retrieve("ram")["ram"] as ram:
        os.pwrite(ram.fileno(), b"\xff", os.fstat(ram.fileno()).st_size - 1)


@needs_kvm
@pytest.mark.slow
def test_the_example_says_when_its_guest_is_not_as_it_was(daemon: Daemon) -> None:
    where = ("--runtime-dir", daemon.runtime_dir, "--counts", "100")
    assert example(*where, "preserve")[0] == 0
    with spawn_client(damage, daemon.runtime_dir):
        pass
    status, out, err = example(*where, "resume")
    assert (status, err) == (1, "")
    assert [row.split("  ")[0] for row in rows(out) if row.endswith("DIFFERS")] == ["guest: RAM: SHA-256 before it went on"]


@pytest.mark.root
@pytest.mark.slow
def test_the_example_needs_kvm_and_says_so() -> None:
    if kvm_is_for_everybody():
        pytest.skip(f"everybody may use {KVM} here")
    with start([sys.executable, RUN], ALICE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (1, b"")
    assert f"{KVM} can't be opened: ".encode() in err


@pytest.mark.parametrize(
    "arguments", [("--counts", "0"), ("--counts", "x"), ("stop",), ("--kexec", "before", "preserve"), ("--kexec", "now")]
)
def test_the_example_has_a_usage(arguments: Sequence[str]) -> None:
    status, _, err = example(*arguments)
    assert status == 2
    assert err.startswith("usage: run.py")
