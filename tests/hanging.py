"""Files whose close waits for a server that never answers, as a hostile client has them; in processes of their own (`spawn_client`).

Two ways to hang: close(2) of any descriptor of a file waits for FLUSH; the end of an open file, wherever its last reference is, waits until
what others have written into the file is written (FUSE_WRITEBACK_CACHE).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
import threading
import traceback

from fuse import NoFuse, Server
from luod_protocol.codec import encode_bulk, pack
from luod_protocol.messages import Endpoint, Unpreserve
from processes import Talk
from raw import PRESERVE, STATUS, Raw, preserve_many

FUSE_WRITEBACK_CACHE = 1 << 16
_ATTR = struct.pack("<QII6Q10I", 1_000, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFREG | 0o666, 1, 0, 0, 0, 4096, 0)
"""struct fuse_attr_out: an empty file, for so many seconds."""


class HangingFile:
    """A file of a FUSE mount at `where`. Raises NoFuse.

    Args:
        at_end: it hangs where the open file ends, once `dirty` was called, and not where a descriptor is closed.
    """

    def __init__(self, where: str, *, at_end: bool) -> None:
        self.server = Server(where, stat.S_IFREG, FUSE_WRITEBACK_CACHE)
        self._where, self._at_end = where, at_end
        self._asked_r, self._asked_w = os.pipe2(os.O_CLOEXEC)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                opcode, unique = self.server.asked()
            except OSError:
                return
            match opcode:
                case 14:  # OPEN
                    self.server.answer(unique, body=struct.pack("<QII", 1, 0, 0))
                case 3:  # GETATTR
                    self.server.answer(unique, body=_ATTR)
                case 22:  # GETXATTR
                    self.server.answer(unique, error=errno.ENOSYS)
                case 25 if self._at_end:  # FLUSH
                    self.server.answer(unique)
                case 25:
                    os.write(self._asked_w, b"!")
                case _:
                    pass  # WRITE, above all

    def open(self) -> int:
        """One more open file, that hangs."""
        return os.open(self._where, os.O_RDWR | os.O_CLOEXEC)

    def dirty(self) -> None:
        """Write something that the server will not take."""
        os.write(self.open(), bytes(4096))

    def hangs(self, limit_s: float = 20.0) -> bool:
        """Whether one more close of a descriptor hangs, or does within so many seconds."""
        return bool(select.select([self._asked_r], [], [], limit_s)[0]) and bool(os.read(self._asked_r, 1))


class Hostile:
    """A client that does what it is told."""

    def __init__(self, where: str, file: HangingFile, uid: int) -> None:
        self._where, self._file, self._uid = where, file, uid
        self._connections: list[Raw] = []

    def connect(self, endpoint: str = "serialize") -> None:
        # The kernel tells luod who connected.
        os.seteuid(self._uid)
        self._connections.append(Raw(self._where, Endpoint(endpoint)))
        os.seteuid(0)
        if endpoint == "serialize":
            self._raw.open(f"guest-{len(self._connections)}", os.urandom(16))

    @property
    def _raw(self) -> Raw:
        return self._connections[-1]

    def preserve(self, count: int = 1) -> str:
        """Files are not taken."""
        self._raw.say(preserve_many(count), [self._file.open() for _ in range(count)])
        return self._raw.hear().type

    def bulk(self) -> None:
        self._raw.put(encode_bulk(100_000), [self._file.open()])

    def empty(self) -> None:
        self._raw.put(b"", [self._file.open()])

    def hide(self) -> str:
        """Preserve a socket in whose queue a file lies that nobody else has."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            fd = self._file.open()
            socket.send_fds(ours, [b"x"], [fd])
            os.close(fd)
            self._file.dirty()
            self._raw.say(PRESERVE, [theirs.fileno()])
        return self._raw.hear().type

    def unpreserve(self) -> str:
        return self._raw.ask(Unpreserve(seq=4, names=("ram",))).type

    def behind(self) -> None:
        """Something that ends the connection, and behind it files that luod never reads."""
        fd = self._file.open()
        for _ in range(10):
            self._raw.try_put(pack(STATUS), [])
        self._raw.put(b"nonsense")
        self._raw.try_put(b"more", [fd])
        os.close(fd)
        self._file.dirty()

    def status(self) -> str:
        return self._raw.ask(STATUS).type

    def say(self) -> None:
        self._raw.say(STATUS)

    def answered(self, limit_s: float) -> bool:
        return bool(select.select([self._raw.sock], [], [], limit_s)[0])

    def hangs(self) -> bool:
        return self._file.hangs()


def hostile(talk: Talk, where: str, mount: str, uid: int, at_end: bool) -> None:
    """Be a client of this uid with hanging files."""
    try:
        file = HangingFile(mount, at_end=at_end)
    except NoFuse as none:
        talk.tell(str(none))
        return
    status = 1
    try:
        talk.tell("ready")
        client = Hostile(where, file, uid)
        while True:
            verb, *arguments = talk.hear()
            if verb == "abort":
                talk.tell("aborted")
                status = 0
                return
            talk.tell(getattr(client, verb)(*arguments))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        # It has such files itself. Were they closed before the server is, this process would wait for itself, for ever.
        os.close(file.server.fd)
        os._exit(status)
