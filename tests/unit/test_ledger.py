"""The ledger: what was written is read, and a luod that dies at any byte loses nothing that was whole."""

from __future__ import annotations

import os
import resource
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luod.store import Ended
from luod.succession import ledger
from luod.succession.ledger import Ending, Ledger, LedgerFault, Record, Retrieval, Staying, read
from luod.system import Process
from luod_protocol.fds import OwnedFd
from things import memfd

_IDS = st.binary(min_size=16, max_size=16)
RECORDS: st.SearchStrategy[Record] = st.one_of(
    st.builds(Ending, ended=st.builds(Ended, session_id=_IDS, owner=st.integers(0, 2**32 - 2), finished=st.booleans())),
    st.builds(Staying, session_id=_IDS),
    st.builds(Retrieval, session_id=_IDS, process=st.builds(Process, pid=st.integers(1, 2**22), start=st.integers(0, 2**63))),
)


def retrieval(number: int) -> Record:
    return Retrieval(session_id=bytes(16), process=Process(pid=number, start=number))


def written(ledger_: Ledger, records: Sequence[Record]) -> list[Record]:
    for record in records:
        ledger_.write(record)
    return read(ledger_.memfd.fileno())


@settings(max_examples=50, deadline=None)
@given(first=st.lists(RECORDS, max_size=5), more=st.lists(RECORDS, max_size=5), again=st.lists(RECORDS, max_size=5))
def test_what_is_written_is_read(first: list[Record], more: list[Record], again: list[Record]) -> None:
    kept = Ledger(first)
    try:
        assert written(kept, more) == [*first, *more]
        kept.begin_anew(again)
        assert read(kept.memfd.fileno()) == again
        assert written(kept, more) == [*again, *more]
        kept.begin_anew(first)
        assert read(kept.memfd.fileno()) == first, "old records in the same area mean nothing"
    finally:
        kept.close()


def test_a_ledger_cut_at_any_byte_has_all_that_was_whole() -> None:
    records = [retrieval(number) for number in range(4)]
    kept = Ledger(records[:1])
    ends = [os.fstat(kept.memfd.fileno()).st_size]
    for record in records[1:]:
        kept.write(record)
        ends.append(os.fstat(kept.memfd.fileno()).st_size)
    for cut in range(ends[-1], ends[0] - 1, -1):
        os.ftruncate(kept.memfd.fileno(), cut)
        assert read(kept.memfd.fileno()) == records[: sum(end <= cut for end in ends)]
    kept.close()


def test_a_damaged_record_ends_the_reading() -> None:
    kept = Ledger([retrieval(1)])
    middle = os.fstat(kept.memfd.fileno()).st_size
    written(kept, [retrieval(2), retrieval(3)])
    os.pwrite(kept.memfd.fileno(), b"\xff", middle + 20)
    assert read(kept.memfd.fileno()) == [retrieval(1)]
    kept.close()


def test_it_is_begun_anew_when_it_is_long_and_not_before() -> None:
    kept = Ledger([])
    assert not kept.is_long
    record = retrieval(7)
    while not kept.is_long:
        kept.write(record)
    assert os.fstat(kept.memfd.fileno()).st_blocks * 512 >= ledger.LONG_BYTES
    records = read(kept.memfd.fileno())
    assert len(records) > 1000, "more than one chunk"
    kept.begin_anew(records)
    assert not kept.is_long, "it would be begun anew at each record"
    assert read(kept.memfd.fileno()) == records
    kept.close()


def test_it_has_no_holes_that_a_kexec_would_fill() -> None:
    kept = Ledger([retrieval(1)])
    size = os.fstat(kept.memfd.fileno()).st_size
    for _ in range(5):
        kept.begin_anew([retrieval(2)])
        assert read(kept.memfd.fileno()) == [retrieval(2)]
        assert os.fstat(kept.memfd.fileno()).st_size <= 2 * size
    kept.begin_anew([retrieval(number) for number in range(9)])
    kept.begin_anew([retrieval(3)])
    assert written(kept, [retrieval(4)]) == [retrieval(3), retrieval(4)]
    assert os.fstat(kept.memfd.fileno()).st_size <= 2 * size
    kept.close()


@contextmanager
def no_file_larger_than(size: int) -> Generator[None]:
    """Writes end at `size` bytes, as where memory runs out: a part is written, then nothing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_begin_anew_leaves_what_was() -> None:
    kept = Ledger([retrieval(1)])
    size = os.fstat(kept.memfd.fileno()).st_size
    with no_file_larger_than(size + 90), pytest.raises(LedgerFault, match=r"90 of .* bytes, no memory is left"):
        kept.begin_anew([retrieval(2), retrieval(3)])
    assert written(kept, [retrieval(4)]) == [retrieval(1), retrieval(4)]
    kept.close()


def test_a_failed_write_is_overwritten_by_the_next() -> None:
    kept = Ledger([retrieval(1)])
    size = os.fstat(kept.memfd.fileno()).st_size
    with no_file_larger_than(size + 9), pytest.raises(LedgerFault, match=r"9 of .* bytes, no memory is left"):
        kept.write(retrieval(2))
    with no_file_larger_than(size), pytest.raises(LedgerFault, match="File too large"):
        kept.write(retrieval(2))
    assert read(kept.memfd.fileno()) == [retrieval(1)]
    assert written(kept, [retrieval(3)]) == [retrieval(1), retrieval(3)]
    kept.close()


def test_what_is_no_ledger() -> None:
    for content in (b"", b"luodldgr", b"x" * 8192):
        with memfd(content) as fd, pytest.raises(LedgerFault, match="it is no ledger"):
            read(fd.fileno())
    with OwnedFd(os.eventfd(0, os.EFD_CLOEXEC)) as fd, pytest.raises(LedgerFault, match="can't be read"):
        read(fd.fileno())


def test_a_ledger_of_a_later_version() -> None:
    kept = Ledger([])
    os.pwrite(kept.memfd.fileno(), b"\x02", 8)
    with pytest.raises(LedgerFault, match="of version 2, this luod knows 1"):
        read(kept.memfd.fileno())
    kept.close()


def test_names() -> None:
    assert ledger.generation(ledger.name(17)) == 17
    for other in ("luod-ledger-", "luod-ledger-x", "luod-ledger-1.2", f"luod-{bytes(16).hex()}", "ledger-1"):
        assert ledger.generation(other) is None
