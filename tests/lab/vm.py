#!/usr/bin/env python3
"""The lab: a kernel with live update, vfio, iommufd and KVM, booted under QEMU, with this checkout and all of this machine's files inside.

How a test is written (they lie in tests/lab, and have `pytestmark = pytest.mark.lab`):

    def preserve() -> int:                  # runs inside, as root
        import os

        print("is seen in the test's output")
        return os.getpid()                  # a Python literal, for the test

    def retrieve(pid: int) -> None: ...

    def test_something() -> None:
        lab = in_vm(preserve, partial(retrieve, 7), qemu=["-device", "edu"], append="vfio.enable_unsafe_noiommu_mode=1")
        assert lab.values[0] == 52

A *stage* is what runs in one kernel: a function or a command (a list of words). Several stages have a kexec between them: when one has
ended well `lab-kexec` jumps to the next, unless it has jumped itself: `lab-kexec`, or `lab-kexec load` and then whatever shall do it. Each
stage finds LAB_STAGE (1, 2, ...) in its environment, and in LAB a writable folder that goes through all stages and is `shared` outside.
A function stands on its own, as in `processes.spawn_client`: its source is all that goes in, so it imports what it uses; it can import
all that tests import. tests/lab/test_kexec.py is an example.

With `systemd=True` a current systemd is PID 1 (Debian sid's, over a root of its own: tests/lab/systemd-root), with luod as it is shipped in
systemd/, from this checkout, started at boot. A stage is then the unit lab.service, which begins when luod is ready. It is a new stage
whenever systemd starts that unit: after `systemctl kexec`, which the stage asks for itself once `lab-kexec load` has loaded the kernel, and
also after `systemctl soft-reboot`. The Python inside is the root's own, with this checkout's packages and those of the virtual environment.
What luod writes is in LAB, in luod.log; systemd writes where the kernel does.

Inside, /tmp and /run are empty and writable, all else is this machine's, read-only. PATH begins with this checkout's luod and luoctl. There
is no network, not even inet sockets. A boot takes about four seconds, and everything some ten times as long as outside: QEMU translates
every instruction (TCG), so that it needs nothing of this machine's, and KVM can be had inside (-cpu max). So let several checks share a
boot: a fixture of a module's scope runs a function that looks at everything, and tests look at what it returned.

What is needed is checked by `missing()`, which says how to get it. As a command this runs another one inside: `vm.py --help`.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import hashlib
import inspect
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

CHECKOUT: Final = Path(__file__).resolve().parents[2]
LIMIT_S: Final = 600
"""For a whole run, all stages together; on an idle machine none takes a tenth."""
PATIENCE_S: Final = 240
"""What `processes.LIMIT_S` is inside."""

_HERE: Final = CHECKOUT / "tests" / "lab"
_SOURCES: Final = ("protocol", "luod", "client", "tests")
_QEMU: Final = "qemu-system-x86_64"
_PACKAGES: Final = {_QEMU: "qemu-system-x86", "busybox": "busybox-static", "cpio": "cpio", "setpriv": "util-linux"}
"""Commands, and the Debian packages that have them."""
_APPEND: Final = "console=ttyS1 quiet panic=-1 no_timer_check kho=on liveupdate=on"
"""no_timer_check: on a busy machine the kernel finds that the timer doesn't work, and panics."""

_PYTHON: Final = "/usr/bin/python3"
"""With systemd: the root's own."""
_LUOD_DROP_IN: Final = """[Service]
ExecStart=
ExecStart={python} -P -m luod --runtime-dir /run/luod --config /etc/luod/luod.toml
Environment={environment}
BindReadOnlyPaths={folders}
StandardOutput=append:/run/lab/luod.log
StandardError=append:/run/lab/luod.log
WatchdogSec=300
TimeoutStartSec=300
TimeoutStopSec=200
"""
_LAB_SERVICE: Final = """[Unit]
After=basic.target luod.service
Wants=luod.service
[Service]
Type=exec
ExecStart=/bin/sh /run/lab/guest.sh
TimeoutStopSec=5
"""
_LAB_TARGET: Final = "[Unit]\nRequires=basic.target\nAfter=basic.target\nWants=lab.service\nAllowIsolate=yes\n"
_FSTAB: Final = (
    "host /host 9p trans=virtio,version=9p2000.L,msize=262144,ro,cache=loose 0 0",
    "shared /run/lab 9p trans=virtio,version=9p2000.L,msize=262144 0 0",
)
"""What `init` has mounted, for systemd: it unmounts all at a soft-reboot."""
_DEVICE_FOR_LUOD: Final = "z /dev/liveupdate 0600 luod luod -\n"
"""tmpfiles.d(5), in place of 60-luod.rules: there is no udev inside."""

Stage: TypeAlias = Callable[[], object] | Sequence[str]


class LabFault(Exception):
    """The lab lacks something, or what ran inside failed."""


class Run(NamedTuple):
    """What was seen.

    Attributes:
        status: of the last stage that ran: a command's exit status, 0 or 1 for a function; None when the machine ended without.
        said: what was printed inside.
        values: what each stage's function returned, None for a command.
        trouble: why it isn't well, with the kernel's own words; empty when it is.
    """

    status: int | None
    said: str
    values: tuple[Any, ...]
    trouble: str


# ---- what is needed


def kernel() -> Path | None:
    """The lab's kernel: LUOD_LAB_KERNEL, or what `make lab-kernel` has built, or the one beside the checkout where that exists."""
    named = os.environ.get("LUOD_LAB_KERNEL")
    if named:
        return Path(named)
    beside = CHECKOUT.parent / "shared" / "lab" / "bzImage"
    return next((path for path in (built_kernel(), beside) if path.exists()), None)


def built_kernel() -> Path:
    """Where `make lab-kernel` puts it; another place for another kernel.config."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    version = hashlib.sha256((_HERE / "kernel.config").read_bytes()).hexdigest()[:12]
    return Path(cache) / "luod-lab-kernel" / version / "bzImage"


def systemd_root() -> Path:
    """Where `make lab-systemd` puts the root with systemd; another place for another systemd-root."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    version = hashlib.sha256((_HERE / "systemd-root").read_bytes()).hexdigest()[:12]
    return Path(cache) / "luod-lab-systemd" / version / "root"


def missing(*, systemd: bool = False) -> list[str]:
    """What the lab lacks on this machine, and how to get it; empty when it can boot. With `systemd`: when that can be PID 1."""
    lacks: list[str] = []
    if systemd and not systemd_root().exists():
        lacks.append(f"the lab needs a current systemd: `make lab-systemd` gets Debian sid's, as {systemd_root()}")
    packages = [package for command, package in _PACKAGES.items() if shutil.which(command) is None]
    if packages:
        lacks.append(f"the lab needs more programs: apt-get install --no-install-recommends {' '.join(packages)}")
    found = kernel()
    if found is None:
        lacks.append(
            "the lab needs a kernel with live update: `make lab-kernel` builds it from Debian's source (README.md has the packages for "
            f"that) as {built_kernel()}; or LUOD_LAB_KERNEL names a bzImage with what tests/lab/kernel.config asks for"
        )
    elif not found.is_file():
        lacks.append(f"LUOD_LAB_KERNEL names {found}, where no kernel is")
    return lacks


# ---- a run


def in_vm(
    *stages: Stage,
    qemu: Sequence[str] = (),
    append: str = "",
    systemd: bool = False,
    shared: Path | None = None,
    memory: str = "1G",
    limit_s: int = LIMIT_S,
    check: bool = True,
    say: Callable[[str], object] = print,
) -> Run:
    """Boot, run the stages with a kexec between them, and power off.

    Args:
        stages: functions, also `functools.partial` ones with literals as arguments, or commands.
        qemu: more arguments for QEMU.
        append: more of the kernel's command line.
        systemd: whether it is PID 1.
        shared: the folder that is LAB inside; None: a temporary one, which is gone afterwards.
        memory: of the machine, as QEMU's -m has it.
        limit_s: seconds for all of it.
        check: whether a stage that fails is an error.
        say: gets each line that is printed inside, as it comes.

    Raises:
        LabFault: something is missing; or, with `check`, a stage failed or the machine ended without a word.
    """
    if lacks := missing(systemd=systemd):
        raise LabFault("\n".join(lacks))
    if systemd:
        qemu = [*qemu, "-virtfs", _shared_out(systemd_root(), "systemd")]
        append = f"{append} lab_systemd"
    with tempfile.TemporaryDirectory(prefix="luod-lab-") as temporary:
        folder = (shared or Path(temporary)).resolve()
        _lay_out(folder, stages, systemd=systemd)
        said, ended = _boot(folder, qemu, append, memory, limit_s, say)
        status = int(text) if (text := _read(folder / "status")) else None
        trouble = ""
        if status != 0:
            trouble = f"{ended} without a word" if status is None else f"stage {_read(folder / 'stage').strip()} ended with {status}"
            trouble = f"in the lab, {trouble}; the kernel said:\n{_read(folder / 'kernel.log')}"
        run = Run(status=status, said=said, values=tuple(_value(folder, number + 1) for number in range(len(stages))), trouble=trouble)
        if check and trouble:
            raise LabFault(f"{trouble}\nWhat was printed inside:\n{said}")
    return run


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _value(folder: Path, number: int) -> Any:
    text = _read(folder / f"value-{number}")
    return ast.literal_eval(text) if text else None


def _lay_out(folder: Path, stages: Sequence[Stage], *, systemd: bool) -> None:
    """Fill the shared folder."""
    for each in _SOURCES:  # inside, nothing can be kept that was compiled there
        compileall.compile_dir(str(CHECKOUT / each), quiet=2)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("stage*"), *folder.glob("value-*"), folder / "status", folder / "luod.log"):
        old.unlink(missing_ok=True)
    shutil.copyfile(str(kernel()), folder / "kernel")
    _make_initrd(folder / "initrd")
    places = {str(CHECKOUT), sys.prefix, sys.base_prefix, os.getcwd()}
    needed = _packages() if systemd else [each for each in places if each.startswith(("/tmp/", "/run/"))]
    (folder / "mounts").write_text("".join(f"{each}\n" for each in sorted(needed)))
    for number, stage in enumerate(stages, start=1):
        (folder / f"stage-{number}.sh").write_text(_command(folder, number, stage, _PYTHON if systemd else sys.executable))
    (folder / "guest.sh").write_text(_guest_script(systemd=systemd))
    if systemd:
        _add_files(folder / "files")


def _packages() -> Sequence[str]:
    """Folders that a Python which isn't this one needs."""
    return [str(CHECKOUT), sysconfig.get_path("purelib")]


def _python_path() -> str:
    return os.pathsep.join([*(str(CHECKOUT / each) for each in _SOURCES), sysconfig.get_path("purelib")])


def _add_files(files: Path) -> None:
    """What systemd and luod find inside: the units as they are shipped, with a drop-in, and those of the lab."""
    shutil.rmtree(files, ignore_errors=True)
    make = ["make", "--no-print-directory", "-C", str(CHECKOUT), "install-systemd", f"DESTDIR={files}"]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    environment = shlex.join([f"PYTHONPATH={_python_path()}", "PYTHONDONTWRITEBYTECODE=1"])
    drop_in = _LUOD_DROP_IN.format(python=_PYTHON, environment=environment, folders=" ".join(_packages()))
    fstab = [*_FSTAB, *(f"/host{each} {each} none bind 0 0" for each in _packages())]
    (files / "etc" / "fstab").write_text("".join(f"{line}\n" for line in fstab))
    units = {"luod.service.d/lab.conf": drop_in, "lab.service": _LAB_SERVICE, "lab.target": _LAB_TARGET, "default.target": _LAB_TARGET}
    for name, text in units.items():
        place = files / "etc" / "systemd" / "system" / name
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
    (files / "etc" / "tmpfiles.d" / "lab.conf").write_text(_DEVICE_FOR_LUOD)


def _make_initrd(path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="luod-lab-") as tree:
        for each in ("bin", "dev", "proc", "sys", "host", "shared", "root"):
            os.mkdir(f"{tree}/{each}")
        shutil.copy(str(shutil.which("busybox")), f"{tree}/bin/busybox")
        shutil.copy(_HERE / "init", f"{tree}/init")
        names = "\n".join(sorted(str(each.relative_to(tree)) for each in Path(tree).rglob("*")))
        done = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=tree, input=names.encode(), stdout=subprocess.PIPE, check=True)
    path.write_bytes(done.stdout)


def _command(folder: Path, number: int, stage: Stage, python: str) -> str:
    """A stage as a line of shell."""
    if not callable(stage):
        return f"{shlex.join(stage)}\n"
    function, args = (stage.func, stage.args) if isinstance(stage, partial) else (stage, ())
    source = textwrap.dedent(inspect.getsource(function))
    call = f"from __future__ import annotations\n{source}\n_value = {function.__name__}(*{args!r})\n"
    call += f"with open('/run/lab/value-{number}', 'w') as _file:\n    _file.write(repr(_value))\n"
    (folder / f"stage-{number}.py").write_text(call)
    return f"{shlex.quote(python)} -P /run/lab/stage-{number}.py\n"


def _guest_script(*, systemd: bool) -> str:
    path = [str(Path(sys.executable).parent), str(_HERE), *os.environ.get("PATH", os.defpath).split(os.pathsep), "/usr/sbin", "/sbin"]
    environment = {
        "PATH": os.pathsep.join([str(_HERE), "/usr/sbin", "/usr/bin"] if systemd else path),
        "PYTHONPATH": _python_path() if systemd else str(CHECKOUT / "tests"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "LUOD_TESTS_LIMIT_S": str(PATIENCE_S),
        "LAB": "/run/lab",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
    }
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()) + (
        _GUEST.replace("FOLDER", "/" if systemd else shlex.quote(os.getcwd()))
        .replace("NEXT", _NEXT_OF_UNIT if systemd else _NEXT_OF_KERNEL)
        .replace("POWEROFF", "systemctl poweroff -ff" if systemd else f"{shlex.quote(str(shutil.which('busybox')))} poweroff -f")
    )


_NEXT_OF_KERNEL: Final = """LAB_STAGE=1
for word in $(cat /proc/cmdline); do case $word in lab_stage=*) LAB_STAGE=${word#lab_stage=};; esac; done"""
_NEXT_OF_UNIT: Final = """LAB_STAGE=1
[ ! -e $LAB/stage ] || LAB_STAGE=$(($(cat $LAB/stage) + 1))"""
_GUEST: Final = """NEXT
export LAB_STAGE
exec </dev/null >/dev/ttyS0 2>&1
cd FOLDER
echo $LAB_STAGE >$LAB/stage
sh $LAB/stage-$LAB_STAGE.sh
status=$?
if [ $status = 0 ] && [ -e $LAB/stage-$((LAB_STAGE + 1)).sh ]; then
    lab-kexec
    status=$?
fi
echo $status >$LAB/status
sync
exec POWEROFF
"""


def _shared_out(folder: Path, tag: str) -> str:
    return f"local,path={folder},mount_tag={tag},security_model=none,readonly=on,multidevs=remap"


def _boot(folder: Path, qemu: Sequence[str], append: str, memory: str, limit_s: int, say: Callable[[str], object]) -> tuple[str, str]:
    """Start QEMU, pass on what is printed inside, and wait for its end. What was printed, and how QEMU ended."""
    (folder / "kernel.log").touch()
    command = [
        *("setpriv", "--pdeathsig", "KILL", "--", _QEMU),
        *("-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-no-reboot"),
        *("-serial", "stdio", "-serial", f"file:{folder}/kernel.log"),
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", memory),
        *("-kernel", f"{folder}/kernel", "-initrd", f"{folder}/initrd", "-append", f"{_APPEND} {append}"),
        *("-virtfs", _shared_out(Path("/"), "host")),
        *("-virtfs", f"local,path={folder},mount_tag=shared,security_model=none,multidevs=remap"),
        *qemu,
    ]
    lines: list[str] = []
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    limit = threading.Timer(limit_s, end)
    limit.start()
    try:
        assert process.stdout is not None
        for raw in process.stdout:
            lines.append(raw.decode("utf-8", "backslashreplace").rstrip("\r\n"))
            say(lines[-1])
        status = process.wait()
    finally:
        limit.cancel()
        limit.join()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    how = f"had to be ended after {limit_s} s" if late.is_set() else f"ended with status {status}"
    return "".join(f"{line}\n" for line in lines), f"QEMU {how}"


# ---- as a command


def main() -> int:
    """Run a command inside; its exit status, 125 when there is none."""
    parser = argparse.ArgumentParser(
        description="Run a command as root in the lab: a kernel with live update under QEMU, with this machine's files inside.",
        epilog="Exit status: the command's own; 125 when the machine ended without one, or something is missing (it is said what).",
    )
    parser.add_argument("--systemd", action="store_true", help="with systemd as PID 1, and luod as its service")
    parser.add_argument("--systemd-place", action="store_true", help="only say where `make lab-systemd` puts what that needs")
    parser.add_argument("--check", action="store_true", help="only say what the lab lacks on this machine")
    parser.add_argument("--kernel", action="store_true", help="only say which kernel it is; 1 when there is none")
    parser.add_argument("--kernel-place", action="store_true", help="only say where `make lab-kernel` puts one")
    parser.add_argument("--qemu", default="", metavar="ARGUMENTS", help="more arguments for QEMU")
    parser.add_argument("--append", default="", metavar="WORDS", help="more of the kernel's command line")
    parser.add_argument("--stages", type=int, default=1, metavar="N", help="the command runs N times, with a kexec after each but the last")
    parser.add_argument("--shared", type=Path, metavar="FOLDER", help="what $LAB is inside (default: a temporary folder)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a command and its arguments, after --")
    arguments = parser.parse_args()
    command: list[str] = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if arguments.kernel_place:
        print(built_kernel())
        return 0
    if arguments.systemd_place:
        print(systemd_root())
        return 0
    if arguments.kernel:
        print(kernel() or "there is no kernel for the lab")
        return kernel() is None
    if lacks := missing(systemd=arguments.systemd):
        print("\n".join(lacks), file=sys.stderr)
        return 125
    if arguments.check:
        return 0
    if not command:
        parser.error("there is no command")
    run = in_vm(
        *[command] * arguments.stages,
        qemu=shlex.split(arguments.qemu),
        append=arguments.append,
        systemd=arguments.systemd,
        shared=arguments.shared,
        check=False,
        say=partial(print, flush=True),
    )
    if run.status is None:
        print(run.trouble, file=sys.stderr)
    return 125 if run.status is None else run.status


if __name__ == "__main__":
    sys.exit(main())
