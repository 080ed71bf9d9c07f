"""The supervisor's parts without processes: what a datagram says, what the store keeps, what is given on, how long is waited."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Generator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luod.supervisor import command, kernel, processes
from luod.supervisor.message import Message, parse, valid_name
from luod.supervisor.parent import BackOff
from luod.supervisor.store import MAX_NAMES_BYTES, Added, Store
from luod_protocol.fds import OwnedFd, close_all
from processes import PYTHON

# ------------------------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"READY=1", Message(ready=True)),
        (b"READY=1\n", Message(ready=True)),
        (b"READY=1\0", Message(ready=True)),
        (b"READY=0", Message()),
        (b"READY=1\nSTOPPING=1", Message(stopping=True)),
        (b"READY=1\nRELOADING=1\nX_ODD=1", Message(ready=True)),
        (b"WATCHDOG=1", Message(ping=True)),
        (b"WATCHDOG=trigger", Message(trigger=True)),
        (b"WATCHDOG=2", Message()),
        (b"STATUS=a=b c", Message(status="a=b c")),
        (b"STATUS=", Message(status="")),
        (b"STATUS=\xff", Message(status="\N{REPLACEMENT CHARACTER}")),
        (b"MAINPID=17\nMAINPID=18", Message(main_pid=17)),
        (b"MAINPID=-1", Message()),
        (b"MAINPID=\xd9\xa1", Message()),
        (b"MAINPID=" + b"9" * 5000, Message()),
        (b"FDSTORE=1", Message(store=True)),
        (b"FDSTORE=1\nFDNAME=a", Message(store=True, name="a")),
        (b"FDSTORE=1\nFDNAME=a:", Message(store=True)),
        (b"FDSTORE=1\nFDNAME=", Message(store=True, name="")),
        (b"FDSTORE=1\nFDNAME=a\nFDPOLL=0", Message(store=True, name="a", poll=False)),
        (b"FDSTORE=1\nFDPOLL=1", Message(store=True)),
        (b"FDSTOREREMOVE=1\nFDNAME=a", Message(remove=True, name="a")),
        (b"FDSTOREREMOVE=1", Message()),
        (b"FDSTOREREMOVE=1\nFDNAME=a:", Message()),
        (b"FDSTOREREMOVE=1\nFDSTORE=1\nFDNAME=a", Message(remove=True, name="a")),
        (b"BARRIER=1", Message(barrier=True)),
        (b"BARRIER=1\nREADY=1", Message(barrier=True)),
        (b"READY=1\0\nSTATUS=x", Message()),
        (b"", Message()),
        (b"\n\n", Message()),
        (b"READY", Message()),
        (b"=1", Message()),
    ],
)
def test_what_a_datagram_says(data: bytes, said: Message) -> None:
    assert parse(data) == said


@given(st.binary(max_size=200) | st.lists(st.sampled_from([b"READY=", b"FDSTORE=1", b"FDNAME=", b"\n", b"1", b"\0", b":"])).map(b"".join))
def test_any_bytes_are_understood_somehow(data: bytes) -> None:
    said = parse(data)
    assert valid_name(said.name)
    assert not (said.store and said.remove)
    assert not (said.ready and said.stopping)
    assert said == Message(barrier=True) or not said.barrier


# --------------------------------------------------------------------------------------------------------------------- store


@contextmanager
def filled(limit: int = 3) -> Generator[Store]:
    """A store that is emptied at the end."""
    store = Store(limit, kernel.same_file)
    try:
        yield store
    finally:
        close_all(store.remove_numbers(fd for fd, _ in store.listed()))


def add(store: Store, name: str, fd: OwnedFd | None = None) -> Added:
    """Store a memfd, or `fd`; what isn't taken is closed."""
    with fd or OwnedFd(os.memfd_create("x")) as fd:
        added = store.add(fd, name, kernel.label(fd.fileno()), poll=False)
        assert fd.closed == (added is Added.STORED)
        return added


def names(store: Store) -> list[str]:
    """What is listed."""
    return [name for _, name in store.listed()]


def test_a_store_lists_the_newest_first_up_to_its_limit() -> None:
    with filled() as store:
        assert [add(store, name) for name in "abcd"] == [Added.STORED] * 3 + [Added.FULL]
        assert names(store) == ["c", "b", "a"]
        close_all(store.remove("b"))
        assert add(store, "a") is Added.STORED
        assert names(store) == ["a", "c", "a"]
        close_all(store.remove("a"))
        assert store.remove("a") == []
        assert (names(store), len(store)) == (["c"], 1)


def test_one_open_file_is_kept_once_whatever_its_name() -> None:
    with filled() as store, OwnedFd(os.memfd_create("x")) as memfd:
        assert add(store, "a", OwnedFd(os.dup(memfd.fileno()))) is Added.STORED
        assert add(store, "b", OwnedFd(os.dup(memfd.fileno()))) is Added.KNOWN
        reopened = OwnedFd(os.open(f"/proc/self/fd/{memfd.fileno()}", os.O_RDWR | os.O_CLOEXEC))
        assert add(store, "c", reopened) is Added.STORED  # another open file of the same inode
        assert names(store) == ["c", "a"]


def test_names_fit_one_environment_variable() -> None:
    with filled(1000) as store:
        name = "x" * 255
        fit = (MAX_NAMES_BYTES + 1) // 256
        for _ in range(fit):
            assert add(store, name) is Added.STORED
        assert add(store, name) is Added.FULL
        rest = MAX_NAMES_BYTES - len(":".join(names(store))) - 1
        assert add(store, "y" * (rest + 1)) is Added.FULL
        assert add(store, "y" * rest) is Added.STORED
        line = ":".join(names(store))
        assert len(line) == MAX_NAMES_BYTES
        subprocess.run(["true"], env={"LISTEN_FDNAMES": line}, check=True, executable="/bin/true")
        with pytest.raises(OSError, match="Argument list too long"):
            subprocess.run(["true"], env={"LISTEN_FDNAMES": line + "x"}, check=True, executable="/bin/true")


# -------------------------------------------------------------------------------------------------------------------- kernel


@pytest.mark.parametrize("by", ["F_DUPFD_QUERY", "kcmp"])
def test_same_file(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = socket.socketpair()
    with one, other, one.dup() as copy:
        if by == "kcmp":
            monkeypatch.setattr(kernel, "_F_DUPFD_QUERY", -1)  # as before Linux 6.10: EINVAL
        assert kernel.same_file(one.fileno(), copy.fileno())
        assert not kernel.same_file(one.fileno(), other.fileno())
        assert kernel.label(one.fileno()) == kernel.label(copy.fileno()) != kernel.label(other.fileno())


def test_without_either_nothing_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_F_DUPFD_QUERY", -1)
    monkeypatch.setattr(kernel, "_KCMP", {})
    assert not kernel.same_file(0, 0)


def test_what_may_be_polled(tmp_path: os.PathLike[str]) -> None:
    fifo = os.path.join(tmp_path, "fifo")
    os.mkfifo(fifo)
    with OwnedFd(os.open(fifo, os.O_RDWR | os.O_CLOEXEC)) as named, OwnedFd(os.eventfd(0)) as event, socket.socket() as sock:
        can_poll = [kernel.may_poll(kernel.label(fd)) for fd in (named.fileno(), event.fileno(), sock.fileno())]
        assert can_poll == [False, True, True]
        assert [kernel.is_pipe(fd) for fd in (named.fileno(), event.fileno(), sock.fileno())] == [True, False, False]


def test_without_a_thread_it_closes_later(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    closer = kernel.Closer()
    one, other = socket.socketpair()
    with one:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", _no_thread)
            read, write = os.pipe()
            closer.close([OwnedFd(write), OwnedFd(other.detach())])
            with OwnedFd(read):
                assert os.read(read, 1) == b""  # a barrier needs no thread
            with pytest.raises(BlockingIOError):
                one.recv(1, socket.MSG_DONTWAIT)
        closer.close_rest()
        assert one.recv(1) == b""
    assert "1 descriptors are closed later" in capfd.readouterr().err


def _no_thread(thread: object) -> None:
    raise RuntimeError("can't start new thread")


# --------------------------------------------------------------------------------------------------------- what is given on


def test_the_environment_is_cleared_of_another_managers_words() -> None:
    inherited = {"PATH": "/bin", "NOTIFY_SOCKET": "/run/systemd/notify", "LISTEN_FDS": "1", "LISTEN_PID": "5", "WATCHDOG_USEC": "1"}
    given = processes.Given("/proc/7/fd/3", 0, 10, ())
    assert processes.environment(inherited, given, 7, 8) == {
        "PATH": "/bin",
        "NOTIFY_SOCKET": "/proc/7/fd/3",
        "FDSTORE": "10",
        "LUOD_SUPERVISOR": "7",
    }


def test_the_back_off_doubles_to_a_bound_and_starts_over() -> None:
    back_off = BackOff(0.1, 1.0)
    assert [back_off.take() for _ in range(7)] == [0.0, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    back_off.reset()
    assert [back_off.take() for _ in range(2)] == [0.1, 0.2]


def test_the_command_line() -> None:
    order = command.parse(["watchdog_s=1.5", "first=--takeover", "limit=7", "--", "/bin/luod", "--", "x"])
    assert order == command.Order(command.Settings(watchdog_s=1.5), ["/bin/luod", "--", "x"], ["--takeover"], 7)


@pytest.mark.parametrize("arguments", [[], ["--"], ["watchdog_s=1"], ["odd=1", "--", "x"], ["watchdog_s=x", "--", "x"]])
def test_a_wrong_command_line(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match=r"no |not in|could not"):
        command.parse(arguments)


def test_descends() -> None:
    assert processes.descends(os.getpid(), os.getppid())
    assert not processes.descends(os.getppid(), os.getpid())
    assert not processes.descends(os.getpid(), os.getpid())
    assert not processes.descends(2**22 + 1, os.getpid())


def test_it_imports_nothing_of_the_daemon() -> None:
    program = "import luod.supervisor.__main__, sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([*PYTHON, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "luod.supervisor.parent" in loaded
    assert not loaded & {"trio", "attr", "attrs", "cattrs", "msgpack", "logging", "argparse", "inspect", "asyncio"}
    ours = {name for name in loaded if name.startswith("luod") and not name.startswith("luod.supervisor")}
    assert ours == {"luod", "luod.interpreter", "luod_protocol", "luod_protocol.fds"}
