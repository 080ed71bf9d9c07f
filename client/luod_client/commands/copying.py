"""Long copies between files, in the kernel, with a progress bar on a terminal."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final

_CHUNK_BYTES: Final = 8 * 1024 * 1024
_NOT_IN_KERNEL: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""sendfile(2): the source is of a kind that can only be read."""


@contextmanager
def _progress(label: str, total: int | None) -> Generator[Callable[[int], object]]:
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(desc=label, total=total, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:
        yield bar.update


def copy(source: int, target: int, label: str) -> int:
    """Copy all of `source` to `target`, where it stands. Both are borrowed; the position of a regular file `source` doesn't move.

    Args:
        source: of any kind; a regular file or memfd is read from its beginning.
        label: for the progress bar.

    Returns:
        How many bytes there were.

    Raises:
        OSError: as read(2) and write(2).
    """
    about = os.fstat(source)
    regular = stat.S_ISREG(about.st_mode)
    done = 0
    with _progress(label, about.st_size if regular else None) as advance:
        while count := _some(source, target, done if regular else None):
            done += count
            advance(count)
    return done


def _some(source: int, target: int, offset: int | None) -> int:
    try:
        return os.sendfile(target, source, offset, _CHUNK_BYTES)
    except OSError as error:
        if error.errno not in _NOT_IN_KERNEL:
            raise
    data = os.read(source, _CHUNK_BYTES) if offset is None else os.pread(source, _CHUNK_BYTES, offset)
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
    return len(data)
