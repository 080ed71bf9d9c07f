"""The memory that is preserved: real data, its checksum, and what it would cost to copy it instead."""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import sysconfig
import time
from collections.abc import Iterator
from typing import Final, Never

from tqdm import tqdm

from luod_protocol.fds import OwnedFd

MIB: Final = 1024 * 1024
_CHUNK_BYTES: Final = 8 * MIB
_CORPUS_BYTES: Final = 32 * MIB
_PAGE_NUMBER: Final = struct.Struct("<Q")


def _progress(size: int, what: str) -> tqdm[Never]:
    # disable=None: nothing at all when stderr is no terminal.
    return tqdm(total=size, desc=what, unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=None)


def _corpus(limit: int) -> bytearray:
    """The files of this machine's Python, one after the other: whole pages, at least one and at most `limit` bytes (of pages)."""
    corpus = bytearray()
    for directory, below, files in os.walk(sysconfig.get_paths()["stdlib"]):
        below.sort()
        for name in sorted(files):
            if len(corpus) >= limit:
                break
            path = os.path.join(directory, name)
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    corpus += file.read(limit - len(corpus))
    corpus += bytes(-len(corpus) % mmap.PAGESIZE or (0 if corpus else mmap.PAGESIZE))
    return corpus


def fill(memfd: int, size: int) -> None:
    """Write `size` bytes, whole pages, into the borrowed `memfd`: real files again and again, each page with its number in front.

    No two pages are the same, so a page that is lost, zeroed or misplaced shows.
    """
    corpus = _corpus(min(size, _CORPUS_BYTES))
    with _progress(size, "real data") as bar, memoryview(corpus) as view:
        written = 0
        while written < size:
            part = min(len(corpus), size - written)
            for offset in range(0, part, mmap.PAGESIZE):
                _PAGE_NUMBER.pack_into(corpus, offset, (written + offset) // mmap.PAGESIZE)
            done = 0
            while done < part:
                done += os.write(memfd, view[done:part])
            written += part
            bar.update(part)


def _chunks(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, _CHUNK_BYTES):
        yield start, min(size, start + _CHUNK_BYTES)


def checksum(memfd: int) -> str:
    """The SHA-256 of all that is in the borrowed `memfd`, which isn't empty."""
    digest = hashlib.sha256()
    with mmap.mmap(memfd, 0, prot=mmap.PROT_READ) as memory, memoryview(memory) as view, _progress(len(view), "checksum") as bar:
        for start, end in _chunks(len(view)):
            with view[start:end] as part:
                digest.update(part)
            bar.update(end - start)
    return digest.hexdigest()


def copy_seconds(memfd: int) -> float:
    """How long it takes to copy the borrowed `memfd` into another one."""
    size = os.fstat(memfd).st_size
    with OwnedFd(os.memfd_create("copy", os.MFD_CLOEXEC)) as copy, _progress(size, "a copy, to compare") as bar:
        began = time.perf_counter()
        done = 0
        while done < size:
            count = os.sendfile(copy.fileno(), memfd, done, _CHUNK_BYTES)
            done += count
            bar.update(count)
        return time.perf_counter() - began
