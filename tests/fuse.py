"""A FUSE file system of which the process that mounts it is the server, word for word: include/uapi/linux/fuse.h has what they say.

For a process of its own (`spawn_client`), as root: the mount is in a mount namespace that ends with it.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

LOOKUP: Final = 1
OPEN: Final = 14
INIT: Final = 26

_IN_HEADER_BYTES: Final = 40
"""struct fuse_in_header."""

_CLONE_NEWNS: Final = 0x00020000
_MS_REC: Final = 1 << 14
_MS_PRIVATE: Final = 1 << 18


class NoFuse(Exception):
    """This machine or user has none."""


class Server:
    """The server of a new file system at `where`. Closing it ends all that waits for its answers.

    Args:
        mode: the file type of its root, as S_IFDIR or S_IFREG; `where` must be of the same type.
        flags: what the server can, FUSE_WRITEBACK_CACHE and so on.

    Attributes:
        body: what the last request said.
    """

    def __init__(self, where: str, mode: int, flags: int = 0) -> None:
        self.body = b""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
            raise NoFuse(f"no mount namespace: {os.strerror(ctypes.get_errno())}")
        try:
            self.fd: Final = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise NoFuse(f"no /dev/fuse: {error.strerror}") from None
        options = f"fd={self.fd},rootmode={mode:o},user_id=0,group_id=0".encode()
        if libc.mount(b"test", where.encode(), b"fuse", 0, options):
            raise NoFuse(f"no FUSE: {os.strerror(ctypes.get_errno())}")
        opcode, unique = self.asked()
        assert opcode == INIT
        # struct fuse_init_out: version 7.31, nothing optional but `flags`, writes of 4,096 bytes.
        self.answer(unique, body=struct.pack("<IIIIHHIIHHI28x", 7, 31, 0, flags, 0, 0, 4096, 1, 0, 0, 0))

    def asked(self) -> tuple[int, int]:
        """Wait for a request: its opcode, and the number to answer it by."""
        request = os.read(self.fd, 1 << 17)
        _, opcode, unique = struct.unpack_from("<IIQ", request)
        self.body = request[_IN_HEADER_BYTES:]
        return opcode, unique

    def answer(self, unique: int, *, error: int = 0, body: bytes = b"") -> None:
        """Answer a request, with an errno or a body."""
        os.write(self.fd, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)
