"""The C client in examples/c, which shares no code with luod, against a real one."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

import luod_client
from harness import Daemon
from luod_protocol import messages as m
from luod_protocol import wire
from luod_protocol.codec import REQUESTS
from processes import LIMIT_S, folder_for

SOURCE = Path(__file__).parents[2] / "examples" / "c" / "preserve.c"
FLAGS = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.fail("no C compiler `cc`: on Debian, apt install gcc libc6-dev", pytrace=False)
    path = str(tmp_path_factory.mktemp("c") / "preserve")
    done = subprocess.run([compiler, *FLAGS, "-o", path, str(SOURCE)], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, f"{done.stderr}\n(on Debian its headers are in libc6-dev)"
    return path


@pytest.fixture
def content(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    path.write_bytes(secrets.token_bytes(3_000_001))
    return path


def run(program: str, *arguments: object) -> tuple[int, str, str]:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=LIMIT_S)
    return done.returncode, done.stdout, done.stderr


def test_preserves_what_the_python_client_retrieves(daemon: Daemon, program: str, content: Path) -> None:
    code, out, err = run(program, daemon.runtime_dir, "from-c", content)
    assert (code, err) == (0, "")
    daemon.upgrade()
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker, looker.claim(session_id=bytes.fromhex(out)) as claim:
        assert (claim.info.session, claim.info.owner, list(claim.entries)) == ("from-c", os.geteuid(), ["file"])
        assert (claim.entries["file"].kind, claim.entries["file"].metadata) == ("memfd", os.fsencode(content))
        with claim.retrieve("file")["file"] as memfd, open(memfd.fileno(), "rb", closefd=False) as file:
            assert file.read() == content.read_bytes()
        claim.finish()


def test_tells_a_refusal(daemon: Daemon, program: str, content: Path) -> None:
    code, out, err = run(program, daemon.runtime_dir, "luod-is-reserved", content)
    assert (code, out) == (1, "")
    assert "(bad-name, errno 22)" in err
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
        assert looker.list() == ()
        assert run(program, daemon.runtime_dir, "x" * 255, content)[0] == 0
        code, out, err = run(program, daemon.runtime_dir, "x" * 255, content)
        assert (code, out) == (1, "")
        assert "(session-exists, errno 17)" in err
        looker.discard("x" * 255)


def test_no_luod(program: str, content: Path) -> None:
    with folder_for() as directory:
        code, out, err = run(program, directory, "s", content)
    assert (code, out) == (3, "")
    assert "No such file" in err


@contextmanager
def relay(daemon: Daemon, *, reaches_luod: bool) -> Generator[str]:
    """A runtime directory whose `serialize` leads to `daemon`, for two connections. The first one ends at its finalize."""

    def serve(listener: socket.socket) -> None:
        for lossy in (True, False):
            try:
                client = listener.accept()[0]
            except OSError:
                return  # the client is done already, and the test will say that this is wrong
            with client, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as luod:
                luod.connect(f"{daemon.runtime_dir}/serialize")
                while (packet := wire.receive(client)) is not None:
                    with packet:
                        lose = lossy and isinstance(REQUESTS.decode(packet.data), m.Finalize)
                        if reaches_luod or not lose:
                            wire.send(luod, packet.data, [fd.fileno() for fd in packet.fds])
                    if lose:
                        luod.shutdown(socket.SHUT_WR)
                        while wire.receive(luod) is not None:
                            pass
                        break
                    answer = wire.receive(luod)
                    assert answer is not None
                    wire.send(client, answer.data)

    with folder_for() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{directory}/serialize")
        listener.listen()
        thread = threading.Thread(target=serve, args=[listener])
        thread.start()
        try:
            yield directory
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_finds_out_after_a_lost_answer(daemon: Daemon, program: str, content: Path) -> None:
    with relay(daemon, reaches_luod=True) as where:
        code, out, err = run(program, where, "from-c", content)
    assert code == 0
    assert f"finalize: no answer; asking again about the session with id {out}" == err
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
        assert looker.show("from-c").info.session_id == bytes.fromhex(out)
        looker.discard("from-c")


def test_finds_out_after_a_lost_request(daemon: Daemon, program: str, content: Path) -> None:
    with relay(daemon, reaches_luod=False) as where:
        code, out, err = run(program, where, "from-c", content)
    assert (code, out) == (1, "")
    assert "(no-such-session, errno 2)" in err
