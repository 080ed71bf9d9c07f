"""The supervisor, as a real process, and stand-in daemons that store, crash, hang, hand over and misbehave."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from luod.supervisor.__main__ import HEADROOM_FDS
from luod.supervisor.command import LIMIT
from luod_protocol.fds import OwnedFd
from processes import ALICE, Talk, readable, spawn_client, until
from supervising import Standin, Supervised, ends


def crash(supervised: Supervised, standin: Standin) -> Standin:
    """Kill the stand-in, and wait for the next one."""
    standin.kill()
    return supervised.standin()


# ---------------------------------------------------------------------------------------------------------------- the store


def test_what_is_stored_survives_a_crash() -> None:
    with Supervised() as supervised:
        first = supervised.standin().ready()
        assert first.do("stored") == []
        first.do("store", "guest", b"memory")
        first.do("store", "other", b"more")
        assert first.do("barrier")
        second = crash(supervised, first)
        assert second.pid != first.pid
        assert second.do("stored") == [("other", b"more"), ("guest", b"memory")]  # the newest first, as systemd has it
        third = crash(supervised, second)
        assert third.do("stored") == [("other", b"more"), ("guest", b"memory")]


def test_what_a_dying_daemon_had_sent_counts() -> None:
    with Supervised() as supervised:
        first = supervised.standin().ready()
        supervised.popen.send_signal(signal.SIGSTOP)
        first.do("store", "last", b"words")
        first.kill()
        supervised.popen.send_signal(signal.SIGCONT)
        assert supervised.standin().do("stored") == [("last", b"words")]


def test_what_is_removed_is_closed_before_the_barrier_is_answered() -> None:
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        before = supervised.open_fds()
        standin.do("store_many", ["a", "b", "a", "c"])
        assert supervised.open_fds() == before + 4
        standin.do("notify", "FDSTOREREMOVE=1\nFDNAME=a")
        assert standin.do("barrier")
        assert supervised.open_fds() == before + 2
        assert crash(supervised, standin).do("stored") == [("c", b"c"), ("b", b"b")]


@pytest.mark.parametrize("fields", ["", "FDNAME=a:b", "FDNAME=\u00e4", f"FDNAME={'x' * 256}", "FDNAME=a\tb"])
def test_without_a_valid_name_it_has_the_default_one(fields: str) -> None:
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        standin.do("store_pipe", f"FDPOLL=0\n{fields}")
        assert standin.do("barrier")
        assert crash(supervised, standin).env["LISTEN_FDNAMES"] == "stored"


def test_names_up_to_the_limit() -> None:
    longest = "".join(chr(code) for code in range(32, 127) if chr(code) != ":") * 3
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        standin.do("store_many", [longest[:255], " "])
        assert crash(supervised, standin).do("stored") == [(" ", b" "), (longest[:255], longest[:255].encode())]


def test_a_full_store_drops_and_says_so_to_people_only() -> None:
    with Supervised("limit=2") as supervised:
        standin = supervised.standin().ready()
        assert standin.env["FDSTORE"] == "2"
        before = supervised.open_fds()
        standin.do("store_many", ["a", "b", "c"])
        assert supervised.open_fds() == before + 2
        supervised.wait_stderr(r"'c' is not stored: the store is full with 2 descriptors")
        standin.do("notify", "FDSTOREREMOVE=1\nFDNAME=a")
        standin.do("store_many", ["d"])
        assert crash(supervised, standin).do("stored") == [("d", b"d"), ("b", b"b")]


def test_one_open_file_is_stored_once() -> None:
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        before = supervised.open_fds()
        standin.do("store", "one", b"x", 3)
        standin.do("store", "two", b"x")
        assert standin.do("barrier")
        assert supervised.open_fds() == before + 2
        assert crash(supervised, standin).do("stored") == [("two", b"x"), ("one", b"x")]


def test_a_stored_descriptor_that_hangs_up_is_dropped_unless_told_otherwise() -> None:
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        before = supervised.open_fds()
        ends_of_pipes = [
            standin.do("store_pipe", fields) for fields in ("FDNAME=polled", "FDNAME=kept\nFDPOLL=0", "FDNAME=alive\nFDPOLL=1")
        ]
        assert standin.do("barrier")
        assert supervised.open_fds() == before + 3
        for fd in ends_of_pipes[:2]:
            standin.do("close", fd)
        supervised.wait_stderr("1 stored descriptors hung up")
        assert standin.do("barrier")
        assert supervised.open_fds() == before + 2
        standin.do("close", ends_of_pipes[2])
        supervised.wait_stderr("(?s)hung up.*hung up")
        assert crash(supervised, standin).env["LISTEN_FDNAMES"] == "kept"


def test_many_are_placed_whatever_their_numbers() -> None:
    names = [f"n{number}" for number in range(300)]
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        standin.do("store_many", names)
        random.Random(1).shuffle(names)
        gone, kept = names[:150], names[150:]
        for name in gone:
            standin.do("notify", f"FDSTOREREMOVE=1\nFDNAME={name}")
        standin.do("store_many", gone)
        found = crash(supervised, standin).do("stored")
        assert sorted(found) == sorted((name, name.encode()) for name in [*gone, *kept])


@pytest.mark.slow
def test_names_that_would_not_fit_the_environment_are_not_stored() -> None:
    names = [f"{number:03}{'x' * 252}" for number in range(520)]
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        standin.do("store_many", names)
        supervised.wait_stderr("is not stored: the store is full with 511 descriptors")
        found = crash(supervised, standin).do("stored")
        assert [name for name, _ in reversed(found)] == names[:511]  # with one more, execve(2) would say E2BIG for ever


def test_messages_that_mean_nothing_leave_nothing_open() -> None:
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        before = supervised.open_fds()
        for text in (
            b"\xff\xfe",
            b"",
            b"FDSTORE",
            b"FDSTORE=2",
            b"FDSTORE=1\0FDNAME=a",
            b"X=1",
            b"=1",
            b"RELOADING=1",
            b"FDSTORE=1" + b"\n" * 5000,
        ):
            if text:
                assert standin.do("barrier", text, 3), text
        for fields, number in (("BARRIER=1\nFDSTORE=1", 1), ("BARRIER=1", 2), ("FDSTOREREMOVE=1\nFDNAME=nothing", 253), ("READY=1", 1)):
            assert standin.do("barrier", fields, number), fields
        assert supervised.open_fds() == before
        assert "did not arrive whole" in supervised.stderr  # the one that was too long
        assert "LISTEN_FDS" not in crash(supervised, standin).env


def test_a_supervisor_at_its_limit_of_files_loses_nothing() -> None:
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        standin.do("store_many", ["a", "b"])
        soft_hard = subprocess.run(["prlimit", f"--pid={supervised.popen.pid}", f"--nofile={supervised.open_fds() + 1}:"], check=False)
        assert soft_hard.returncode == 0
        assert standin.do("barrier", "FDSTORE=1\nFDNAME=many", 5)
        supervised.wait_stderr("did not arrive whole")
        subprocess.run(["prlimit", f"--pid={supervised.popen.pid}", "--nofile=1000:"], check=True)
        standin.do("store_many", ["c"])
        assert crash(supervised, standin).do("stored") == [("c", b"c"), ("b", b"b"), ("a", b"a")]


def test_a_close_that_hangs_stops_nothing() -> None:
    with Supervised() as supervised, socket.create_server(("127.0.0.1", 0)) as server:
        standin = supervised.standin().ready()
        standin.do("store_lingering", "slow", server.getsockname()[1])
        standin.do("store", "guest", b"memory")
        connection = server.accept()[0]
        with connection:
            standin.do("notify", "FDSTOREREMOVE=1\nFDNAME=slow")
            assert standin.do("barrier")
            tasks = f"/proc/{supervised.popen.pid}/task"
            assert len(os.listdir(tasks)) == 2  # one of them waits until somebody reads
            again = crash(supervised, standin)
            assert again.do("stored") == [("guest", b"memory")]
            assert len(os.listdir(tasks)) == 2
            while connection.recv(1 << 20):
                pass
        until(lambda: len(os.listdir(tasks)) == 1, "the close hangs still")


# -------------------------------------------------------------------------------------------------------- what a daemon is given


def test_what_the_daemon_is_given() -> None:
    read, write = os.pipe()
    with Supervised("watchdog_s=20.5", pass_fds=[write]) as supervised, OwnedFd(read), OwnedFd(write):
        standin = supervised.standin().ready()
        env = standin.env
        assert env.pop("NOTIFY_SOCKET").startswith(f"/proc/{supervised.popen.pid}/fd/")
        assert env == {
            "WATCHDOG_USEC": "20500000",
            "WATCHDOG_PID": str(standin.pid),
            "FDSTORE": str(min(LIMIT, (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - HEADROOM_FDS) // 2)),
            "LUOD_SUPERVISOR": str(supervised.popen.pid),
        }
        assert set(standin.do("fds")) == {0, 1, 2}
        # As Python sets them at its start, and nothing more.
        assert standin.do("signals") == ([], [int(signal.SIGINT), int(signal.SIGPIPE), int(signal.SIGXFSZ)])
        standin.do("store_many", ["a", "b"])
        again = crash(supervised, standin)
        assert (again.env["LISTEN_PID"], again.env["LISTEN_FDS"], again.env["LISTEN_FDNAMES"]) == (str(again.pid), "2", "b:a")
        assert set(again.do("fds")) == {0, 1, 2, 3, 4}


def test_no_watchdog() -> None:
    with Supervised("watchdog_s=0") as supervised:
        assert not {"WATCHDOG_USEC", "WATCHDOG_PID"} & set(supervised.standin().env)


def test_what_is_for_the_first_start_is_given_until_it_was_ready_once() -> None:
    with Supervised("first=--takeover") as supervised:
        first = supervised.standin()
        assert first.arguments == ["--takeover"]
        second = crash(supervised, first)
        assert second.arguments == ["--takeover"]
        assert crash(supervised, second.ready()).arguments == []


@pytest.mark.root
def test_nobody_else_can_send() -> None:
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        with spawn_client(_send, standin.env["NOTIFY_SOCKET"], user=ALICE) as client:
            assert client.hear() == "Permission denied"


def _send(talk: Talk, address: str) -> None:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(b"READY=1", address)
        except OSError as error:
            talk.tell(error.strerror)
        else:
            talk.tell("sent")


@pytest.mark.root
def test_an_ordinary_user_can_run_it() -> None:
    with Supervised(user=ALICE) as supervised:
        standin = supervised.standin().ready()
        standin.do("store", "guest", b"memory")
        assert crash(supervised, standin).do("stored") == [("guest", b"memory")]


# ---------------------------------------------------------------------------------------------------------------- who is heard


def test_only_the_main_process_is_heard() -> None:
    with Supervised() as supervised:
        main = supervised.standin().ready()
        before = supervised.open_fds()
        main.do("another")
        child = supervised.standin()
        child.do("store", "child's", b"x")
        child.do("notify", f"MAINPID={child.pid}")
        child.do("notify", "WATCHDOG=trigger")
        child.do("notify", "STOPPING=1")
        assert child.do("barrier")  # anybody may ask whether messages were read
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"WATCHDOG=trigger", main.env["NOTIFY_SOCKET"])
        assert main.do("barrier")
        assert supervised.open_fds() == before
        successor = crash(supervised, main)
        assert successor.do("stored") == []
        child.gone()  # and with the main process its children end


def test_a_child_that_outlives_its_parent_takes_over() -> None:
    with Supervised() as supervised:
        old = supervised.standin().ready()
        old.do("store", "before", b"1")
        old.do("another")
        new = supervised.standin()
        old.do("notify", f"MAINPID={new.pid}")
        assert old.do("barrier")
        new.do("notify", "READY=1")
        new.do("store", "after", b"2")
        old.do("store", "too late", b"3")
        old.order("end", 0)
        old.gone()
        assert new.do("barrier")
        supervised.no_other()
        again = crash(supervised, new)
        assert again.do("stored") == [("after", b"2"), ("before", b"1")]


def test_a_successor_that_dies_while_its_parent_lives_is_missed() -> None:
    with Supervised() as supervised:
        old = supervised.standin().ready()
        old.do("store", "before", b"1")
        old.do("another")
        new = supervised.standin()
        old.do("notify", f"MAINPID={new.pid}")
        assert old.do("barrier")
        new.kill()  # a zombie: its parent doesn't look
        old.gone()
        assert supervised.standin().do("stored") == [("before", b"1")]


@pytest.mark.parametrize("who", ["the test", "nobody", "the supervisor", "no number"])
def test_a_stranger_does_not_become_the_main_process(who: str) -> None:
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        gone = subprocess.Popen(["true"])
        gone.wait()
        pid = {"the test": os.getpid(), "nobody": gone.pid, "the supervisor": supervised.popen.pid, "no number": "1 1"}[who]
        standin.do("notify", f"MAINPID={pid}")
        standin.do("store", "still", b"heard")
        assert standin.do("barrier")
        if who != "no number":
            supervised.wait_stderr(f"process {pid} can't be the main process")
        assert crash(supervised, standin).do("stored") == [("still", b"heard")]


# ------------------------------------------------------------------------------------------------------------------- its end


@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_a_daemon_that_cannot_start_is_given_up(status: int) -> None:
    with Supervised() as supervised:
        supervised.standin().order("end", status)
        assert supervised.wait() == status
        supervised.no_other()
        assert "nothing is stored: giving up" in supervised.stderr


def test_a_program_that_is_not_there_is_given_up() -> None:
    with Supervised(program=["/nowhere/luod"]) as supervised:
        assert supervised.wait() == 127
        assert "/nowhere/luod can't be executed" in supervised.stderr


def test_with_something_stored_it_is_never_given_up() -> None:
    with Supervised() as supervised:
        standin = supervised.standin()
        standin.do("store", "guest", b"memory")
        for status in (2, 3, 0, 1):
            standin.order("end", status)
            standin = supervised.standin()
            assert standin.do("stored") == [("guest", b"memory")]
        supervised.wait_stderr("THE DAEMON FAILS AGAIN AND AGAIN")
        assert "1 stored descriptors are kept for it" in supervised.stderr


@pytest.mark.parametrize("status", [0, 3])
def test_a_daemon_that_was_ready_is_started_again_however_it_ended(status: int) -> None:
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        standin.do("notify", "STOPPING=1\nSTATUS=so long")
        standin.order("end", status)
        supervised.standin().ready()
        assert f"ended with status {status}; it had last said: 'so long'" in supervised.stderr


def test_a_daemon_that_was_ready_once_is_started_again_even_if_it_cannot_start() -> None:
    with Supervised() as supervised:
        crash(supervised, supervised.standin().ready()).order("end", 3)
        supervised.standin().ready()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_ends_it_and_says_what_ends_with_it(sig: signal.Signals) -> None:
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        standin.do("store_many", ["a", "b"])
        standin.do("note", signal.SIGTERM)
        supervised.terminate(sig)
        assert standin.hear() == ("came", signal.SIGTERM)
        standin.order("end", 0)
        assert supervised.wait() == 0
        assert "told to end: 2 stored descriptors (preserved sessions) end with it" in supervised.stderr
        supervised.no_other()


def test_who_does_not_end_is_killed() -> None:
    with Supervised("stop_s=0.05", "rest_s=0.05") as supervised:
        standin = supervised.standin().ready()
        standin.do("another")
        child = supervised.standin()
        for each in (standin, child):
            each.do("stubborn", signal.SIGTERM)
        supervised.terminate()
        assert supervised.wait() == 0
        standin.gone()
        child.gone()
        assert "SIGKILL" in supervised.stderr


def test_it_ends_while_it_waits_for_the_next_start() -> None:
    with Supervised("back_off_s=50", "longest_back_off_s=50") as supervised:
        supervised.standin().ready().kill()
        supervised.wait_stderr("starting the daemon again in 50 s")
        supervised.terminate()
        assert supervised.wait() == 0


def test_sighup_goes_to_a_daemon_that_is_ready() -> None:
    with Supervised() as supervised:
        standin = supervised.standin()
        supervised.popen.send_signal(signal.SIGHUP)
        supervised.wait_stderr("SIGHUP is not passed on")
        standin.do("note", signal.SIGHUP)
        standin.ready()
        supervised.popen.send_signal(signal.SIGHUP)
        assert standin.hear() == ("came", signal.SIGHUP)


def test_a_signal_that_means_nothing_does_no_harm() -> None:
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        for sig in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
            supervised.popen.send_signal(sig)
        assert standin.do("barrier")
        assert supervised.popen.poll() is None


def test_without_the_supervisor_the_daemon_goes_on() -> None:
    with Supervised() as supervised:
        standin = supervised.standin().ready()
        supervised.popen.kill()
        supervised.wait()
        assert standin.do("stored") == []
        standin.kill()


# ------------------------------------------------------------------------------------------------------------- hanging daemons


def test_a_daemon_that_says_nothing_is_aborted() -> None:
    with Supervised("watchdog_s=0.2") as supervised:
        standin = supervised.standin()
        standin.do("store", "guest", b"memory")
        standin.order("notify", "READY=1")
        assert ends(standin.pid)
        assert supervised.standin().do("stored") == [("guest", b"memory")]
        assert "was killed by SIGABRT" in supervised.stderr


@pytest.mark.slow
def test_a_daemon_that_pings_is_left_alone_and_so_is_one_that_starts() -> None:
    with Supervised("watchdog_s=1") as supervised:
        standin = supervised.standin()
        with OwnedFd(os.pidfd_open(standin.pid)) as pidfd:
            assert not readable(pidfd.fileno(), 1.2)  # not ready yet: no watchdog
            standin.ready()
            for _ in range(60):
                assert not readable(pidfd.fileno(), 0.02)
                standin.do("notify", "WATCHDOG=1")
        standin.gone()  # and now it says nothing
        supervised.wait_stderr("was killed by SIGABRT")


def test_a_daemon_that_asks_for_it_is_aborted() -> None:
    with Supervised("watchdog_s=0") as supervised:
        standin = supervised.standin().ready()
        standin.order("notify", "WATCHDOG=trigger")
        assert ends(standin.pid)
        supervised.standin().ready()
        assert "was killed by SIGABRT" in supervised.stderr


def test_a_daemon_that_is_stopped_is_aborted() -> None:
    with Supervised("watchdog_s=0.2") as supervised:
        standin = supervised.standin()
        standin.order("notify", "READY=1")
        standin.order("kill", standin.pid, signal.SIGSTOP)
        assert ends(standin.pid)
        supervised.wait_stderr("was killed by SIGABRT")


def test_a_daemon_that_does_not_abort_is_killed() -> None:
    with Supervised("abort_s=0.1") as supervised:
        standin = supervised.standin()
        standin.do("stubborn", signal.SIGABRT)
        standin.order("notify", "WATCHDOG=trigger")
        assert ends(standin.pid)
        supervised.standin().ready()
        assert "was killed by SIGKILL" in supervised.stderr


@pytest.mark.parametrize(("arguments", "sig"), [([], "SIGTERM"), (["first=stubborn"], "SIGKILL")])
def test_a_daemon_that_does_not_become_ready_is_ended_and_started_again(arguments: list[str], sig: str) -> None:
    with Supervised("start_s=0.5", "rest_s=0.1", *arguments) as supervised:
        supervised.wait_stderr(f"(?s)wasn't ready within 0.5 s: SIGTERM.*was killed by {sig}.*starting the daemon again")


def test_a_daemon_that_says_it_stops_and_does_not_is_ended() -> None:
    with Supervised("stop_s=0.1") as supervised:
        standin = supervised.standin().ready()
        standin.order("notify", "STOPPING=1")
        assert ends(standin.pid)
        supervised.standin().ready()
        assert "was killed by SIGTERM" in supervised.stderr


def test_what_a_dead_daemon_left_is_killed_before_the_next_start() -> None:
    with Supervised("rest_s=0.1") as supervised:
        main = supervised.standin().ready()
        main.do("another")
        child = supervised.standin()
        child.do("note", signal.SIGTERM)
        child.do("another")
        grandchild = supervised.standin()
        main.kill()
        assert child.hear() == ("came", signal.SIGTERM)  # it was asked first
        again = supervised.standin()
        assert ends(child.pid)
        assert ends(grandchild.pid)
        child.gone()
        grandchild.gone()
        again.ready()


def test_an_orphan_that_is_not_the_daemons_is_let_live_and_reaped() -> None:
    with Supervised() as supervised:
        main = supervised.standin().ready()
        pid = main.do("stranger")
        orphan = supervised.standin()
        assert (orphan.pid, orphan.env) == (pid, {})
        crash(supervised, main).ready()
        assert orphan.do("signals")[0] == []  # it lives
        os.kill(pid, signal.SIGKILL)
        orphan.gone()
        until(lambda: not os.path.exists(f"/proc/{pid}"), "the orphan is not reaped")


# ------------------------------------------------------------------------------------------------------------------- and more


@pytest.mark.root
def test_as_pid_1_it_reaps_everybody_and_ends() -> None:
    with Supervised(prefix=["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]) as supervised:
        main = supervised.standin().ready()
        assert main.env["LUOD_SUPERVISOR"] == "1"
        pid = main.do("stranger")
        orphan = supervised.standin()
        assert orphan.pid == pid
        main.do("store", "guest", b"memory")
        assert main.do("barrier")
        orphan.order("end", 0)
        orphan.gone()
        main.do("kill", 1, signal.SIGUSR1)
        main.order("kill", main.pid, signal.SIGKILL)
        main.gone()
        again = supervised.standin().ready()
        assert again.do("stored") == [("guest", b"memory")]
        until(lambda: again.do("is_gone", pid), "the orphan is not reaped")
        again.order("kill", 1, signal.SIGTERM)
        assert supervised.wait() == 0


@pytest.mark.root
def test_without_its_own_proc_it_says_so() -> None:
    with Supervised(prefix=["unshare", "--pid", "--fork", "--kill-child", "--"]) as supervised:
        assert supervised.wait() == 1
        assert "mount one" in supervised.stderr


def test_it_is_small() -> None:
    with Supervised() as supervised:
        supervised.standin().ready()
        maps = Path(f"/proc/{supervised.popen.pid}/maps").read_text(encoding="utf-8")
        assert "msgpack" not in maps
        resident = int(Path(f"/proc/{supervised.popen.pid}/status").read_text(encoding="utf-8").split("VmRSS:")[1].split()[0])
        assert resident < 24_000  # KiB, with Python's development mode; a daemon has 31,000 without


def test_a_stderr_that_nobody_reads_does_not_stop_it() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)
    with OwnedFd(read), OwnedFd(write), Supervised(stderr=write) as supervised:
        standin = supervised.standin().ready()
        standin.do("store", "guest", b"memory")
        assert crash(supervised, standin).do("stored") == [("guest", b"memory")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_crashes_lose_nothing_and_bring_nothing_back(seed: int) -> None:
    chance = random.Random(seed)
    certain: set[str] = set()
    with Supervised() as supervised:
        for life in range(8):
            standin = supervised.standin().ready()
            standin.order("churn", seed * 1000 + life)
            doing = ""
            uncertain: set[str] = set()
            for _ in range(chance.randrange(1, 60)):
                what, name = standin.hear()
                if what == "done":
                    certain ^= {name}
                    uncertain.clear()
                    doing = ""
                else:
                    uncertain, doing = {name}, what
            os.kill(standin.pid, signal.SIGKILL)
            certain, uncertain = _rest(standin, certain, uncertain if doing else set())
            successor = supervised.standin()
            found = successor.do("stored")
            names = {name for name, _ in found}
            assert certain - uncertain <= names <= certain | uncertain
            assert all(content == name.encode() for name, content in found)
            assert len(found) == len(names)
            certain = names
            successor.kill()


def _rest(standin: Standin, certain: set[str], uncertain: set[str]) -> tuple[set[str], set[str]]:
    """What the dead one had still said: what is certain now, and what isn't."""
    while True:
        try:
            what, name = standin.hear()
        except (EOFError, ConnectionResetError):
            return certain, uncertain
        if what == "done":
            certain, uncertain = certain ^ {name}, set()
        else:
            uncertain = {name}
