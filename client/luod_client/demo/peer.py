"""Somebody who has asked a question over TCP and waits for the answer, whoever will give it."""

from __future__ import annotations

import secrets
import socket
import sys
import time

from luod_client.demo.processes import await_word, played, report


def read_line(sock: socket.socket) -> str:
    """The next line from `sock`, without its end; what the peer sent before it closed, when it did."""
    line = b""
    while not line.endswith(b"\n") and (byte := sock.recv(1)):
        line += byte
    return line.decode().strip()


def main() -> None:
    """Told `port N`: connect, ask, report `asked`, wait, report `answered`."""
    played(sys.argv[1:])
    port = int(await_word("port"))
    question = secrets.token_hex(4)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(f"{question}\n".encode())
        asked = time.monotonic()
        report("asked", question=question)
        answer = read_line(sock)
        report("answered", answer=answer, waited_s=time.monotonic() - asked)


if __name__ == "__main__":
    main()
