"""Owned and borrowed descriptors."""

from __future__ import annotations

import fcntl
import os

import pytest

from luod_protocol.fds import OwnedFd, close_all, duplicate, own
from things import let_go, pipe


def is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def test_it_closes_once() -> None:
    with pipe() as (read, write):
        number = write.fileno()
        write.close()
        assert let_go(read)
        # Somebody else's now: a second close must not reach it.
        with duplicate(read.fileno()) as other:
            assert other.fileno() == number
            write.close()
            assert is_open(number)


def test_the_block_closes_it_also_on_an_error() -> None:
    with pipe() as (read, write):
        with pytest.raises(RuntimeError, match="the error"), write:
            raise RuntimeError("the error")
        assert write.closed
        assert let_go(read)


def test_taken_is_not_closed() -> None:
    with pipe() as (_, write):
        number = write.take()
        write.close()
        assert is_open(number)
        os.close(number)


def test_closed_or_taken_has_no_number() -> None:
    with pipe() as (read, write):
        read.close()
        os.close(write.take())
        for owned in (read, write):
            assert owned.closed
            assert repr(owned) == "<OwnedFd closed>"
            with pytest.raises(ValueError, match="closed or taken"):
                owned.fileno()
            with pytest.raises(ValueError, match="closed or taken"):
                owned.take()


def test_dropping_it_warns_and_closes() -> None:
    with pipe() as (read, write):
        dropped = OwnedFd(write.take())
        assert repr(dropped) == f"<OwnedFd {dropped.fileno()}>"
        with pytest.warns(ResourceWarning, match=r"dropped without close\(\)"):
            del dropped  # the last reference: CPython drops it here and now
        assert let_go(read)


def test_a_duplicate_is_of_its_own_and_close_on_exec() -> None:
    with pipe() as (read, write):
        with duplicate(write.fileno()) as copy:
            assert copy.fileno() != write.fileno()
            assert fcntl.fcntl(copy.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            write.close()
            os.write(copy.fileno(), b"x")
            assert os.read(read.fileno(), 10) == b"x"
        assert let_go(read)


def test_close_all_goes_on_after_an_error_and_tells_it() -> None:
    with pipe() as (read, write):
        gone = own([os.dup(0), os.dup(0)])
        for each in gone:
            os.close(each.fileno())
        with pytest.raises(OSError, match="Bad file descriptor"):
            close_all([*gone, write])
        assert write.closed
        assert let_go(read)
    close_all([])
