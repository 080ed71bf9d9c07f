"""examples/nginx: as its user runs it; and that it counts what fails."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from machine import need_program
from processes import folder_for

RUN = Path(__file__).parents[2] / "examples" / "nginx" / "run.py"
LIMIT_S = 120.0
REQUESTS = 8000
CLIENTS = 32


def example(*arguments: str, path: str | None = None) -> tuple[int, str, str]:
    # Not pytest's folder: nginx's worker is somebody else, and has to get there.
    with folder_for() as folder:
        environment = {**os.environ, "TMPDIR": folder} | ({} if path is None else {"PATH": path})
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", str(RUN), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=LIMIT_S,
            check=False,
        )
        assert os.listdir(folder) == []
    return done.returncode, done.stdout, done.stderr


# ---- as its user runs it


@pytest.mark.slow
def test_nobody_is_refused_and_what_is_replaced_in_peace_loses_nothing() -> None:
    need_program("nginx", "nginx")
    need_program("ab", "apache2-utils")
    status, out, err = example("--json", "--requests", str(REQUESTS))
    assert (status, err) == (0, ""), out
    told = json.loads(out)
    assert (told["ok"], told["faults"]) == (True, [])
    replaced, killed = told["loads"]

    assert (replaced["what"], replaced["requests"], replaced["waiting"]) == ("replaced", REQUESTS, None)
    assert (replaced["refused"], replaced["cut_off"]) == (0, 0)
    # ab opens a few connections that it doesn't need.
    assert REQUESTS <= sum(server["answered"] for server in replaced["servers"]) < REQUESTS + CLIENTS

    assert (killed["what"], killed["requests"], killed["waiting"]) == ("killed", REQUESTS, CLIENTS)
    assert killed["refused"] == 0
    assert 0 < killed["cut_off"] <= CLIENTS
    assert sum(server["answered"] for server in killed["servers"]) >= REQUESTS - CLIENTS

    first, second = replaced["servers"]
    again, third = killed["servers"]
    assert second["pid"] == again["pid"]
    assert len({server["pid"] for server in (first, second, third)}) == 3
    assert all(server["answered"] for server in (first, second, again, third))
    luods = [*replaced["luod_pids"], *killed["luod_pids"]]
    assert luods[1] == luods[2]
    assert len(set(luods)) == 3


@pytest.mark.slow
def test_a_load_that_ends_too_early_fails_it() -> None:
    need_program("nginx", "nginx")
    need_program("ab", "apache2-utils")
    # As many as are due until nginx is to be replaced: none is left for the new one.
    status, out, err = example("--json", "--requests", "1000")
    assert (status, out) == (1, "")
    assert "say --requests, and more of them" in err


@pytest.mark.slow
def test_an_nginx_that_does_not_start_fails_it(tmp_path: Path) -> None:
    need_program("ab", "apache2-utils")
    fake = tmp_path / "nginx"
    fake.write_text("#!/bin/sh\necho 'no such configuration' >&2\nexit 1\n")
    fake.chmod(0o755)
    status, out, err = example("--json", path=f"{tmp_path}:{os.environ['PATH']}")
    assert (status, out) == (1, "")
    assert "no such configuration" in err
    assert "ended with status 1" in err


@pytest.mark.slow
def test_without_the_load_generator_it_says_what_to_install(tmp_path: Path) -> None:
    fake = tmp_path / "nginx"
    fake.write_text("")
    fake.chmod(0o755)
    status, out, err = example(path=str(tmp_path))
    assert (status, out) == (1, "")
    assert err == ("run.py: ab is not installed: on Debian: apt-get install --no-install-recommends nginx apache2-utils\n")


@pytest.mark.parametrize("arguments", [("--requests", "999"), ("--requests", "x"), ("stop",)])
def test_it_has_a_usage(arguments: tuple[str, ...]) -> None:
    status, out, err = example(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("usage: run.py")


# ---- what fails is counted


@pytest.fixture(scope="module")
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nginx_example", RUN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Answer = Callable[[socket.socket], None]
PAGE = b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"


def answer(client: socket.socket) -> None:
    client.recv(65536)
    client.sendall(PAGE)


def fail(client: socket.socket) -> None:
    client.recv(65536)
    client.sendall(PAGE.replace(b"200 OK", b"503 No"))


def cut_off(client: socket.socket) -> None:
    client.recv(65536)
    client.sendall(PAGE[:-1])


def end(client: socket.socket) -> None:
    client.recv(65536)


def reset(client: socket.socket) -> None:
    client.recv(65536)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextlib.contextmanager
def server(answers: list[Answer]) -> Generator[int]:
    """Gives these answers, one after the other, and the last one again and again. Yields the port."""

    def serve() -> None:
        # It ends when the listener is shut down.
        with contextlib.suppress(OSError):
            for each in itertools.chain(answers, itertools.repeat(answers[-1])):
                client, _ = listener.accept()
                with client, contextlib.suppress(ConnectionError):
                    each(client)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answers", "refused", "cut"),
    [
        ([answer] * 100, 0, 0),
        ([answer] * 60 + [fail] * 10 + [answer] * 30, 0, 10),
        ([answer] * 60 + [cut_off] * 10 + [answer] * 30, 0, 10),
        ([answer] * 60 + [end] * 10 + [answer] * 30, 0, 10),
        ([answer] * 60 + [reset] * 10 + [answer] * 30, 0, 10),
        ([answer] * 50 + [end] * 5 + [reset] * 5 + [fail] * 5 + [answer] * 35, 0, 15),
    ],
    ids=["all", "status", "cut off", "ended", "reset", "mixed"],
)
def test_each_way_to_fail_is_counted_once(run: ModuleType, answers: list[Answer], refused: int, cut: int, tmp_path: Path) -> None:
    need_program("ab", "apache2-utils")
    with server(answers) as port, run.Load(port, len(answers), tmp_path / "ab.out") as load:
        assert load.counted()[:2] == (refused, cut)
        assert load.ended()


@pytest.mark.slow
def test_refused_requests_are_told_from_others(run: ModuleType, tmp_path: Path) -> None:
    need_program("ab", "apache2-utils")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with run.Load(port, 100, tmp_path / "ab.out") as load:
        assert load.counted()[:2] == (100, 0)


def test_who_waits_in_a_backlog_is_counted(run: ModuleType) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        assert run.waiting(address[1]) == 0
        with socket.create_connection(address), socket.create_connection(address):
            assert run.waiting(address[1]) == 2
    assert run.waiting(address[1]) == 0


GOOD: dict[str, Any] = {"what": "load", "requests": 100, "refused": 0, "cut_off": 0, "longest_ms": 1, "waiting": None, "luod_pids": (1, 2)}


@pytest.mark.parametrize(
    ("what", "answered", "fault"),
    [
        ({}, 60, None),
        ({"waiting": 1, "cut_off": CLIENTS}, 28, None),
        ({"refused": 1}, 60, "1 requests were refused"),
        ({"cut_off": 1}, 60, "1 requests were cut off, 0 can have been in the hands of a killed server"),
        ({"waiting": 1, "cut_off": CLIENTS + 1}, 28, "33 requests were cut off, 32 can have been in the hands of a killed server"),
        ({"waiting": 0}, 60, "no connection waited while there was no server"),
        ({}, 59, "the servers answered 99 of 100 requests"),
    ],
)
def test_what_was_lost_is_said(run: ModuleType, what: dict[str, Any], answered: int, fault: str | None) -> None:
    servers = [run.Server(pid=1, answered=40), run.Server(pid=2, answered=answered)]
    assert run.Outcome(**(GOOD | what), servers=servers).faults() == ([] if fault is None else [f"load: {fault}"])
