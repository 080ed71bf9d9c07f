"""A finalize that is refused says which entry and why, and leaves the session open with all that was in it."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs
import pytest

import luod_client
from harness import Daemon
from luod_client import Code, Refusal
from luod_protocol.fds import close_all
from things import eventfd, let_go, memfd, watched_pipe


@attrs.frozen(kw_only=True)
class Case:
    """A finalize that is refused: of a session of `ram` and `fixed` (memfds), `irq` (an eventfd) and `pipe`, with these needs."""

    code: Code
    entry: str = ""
    says: str
    needs: Mapping[str, Sequence[str]] = attrs.Factory(dict[str, Sequence[str]])
    require: frozenset[str] = frozenset()
    seal: Mapping[str, Sequence[str]] = attrs.Factory(dict[str, Sequence[str]])


CASES: Final = (
    Case(code=Code.BAD_NEEDS, entry="irq", says="'irq' needs 'vm'", needs={"irq": ["ram", "vm"]}),
    Case(code=Code.BAD_NEEDS, entry="ram", says="ram -> irq -> fixed -> ram", needs={"ram": ["irq"], "irq": ["fixed"], "fixed": ["ram"]}),
    Case(code=Code.BAD_NEEDS, entry="irq", says="irq -> irq", needs={"irq": ["irq"]}),
    Case(code=Code.BAD_REQUEST, says="'nonsense'", require=frozenset({"nonsense"})),
    Case(code=Code.CANNOT_SURVIVE, says="kexec: .*liveupdate", require=frozenset({"kexec", "daemon-upgrade"})),
    Case(code=Code.CANNOT_SURVIVE, says="daemon-crash: .*no", require=frozenset({"daemon-crash"})),
    Case(code=Code.BAD_SEAL, entry="ram", says="unknown seal 'wax'", seal={"ram": ["wax"]}),
    Case(code=Code.BAD_SEAL, entry="irq", says="is a eventfd", seal={"irq": ["write"], "ram": ["grow"]}),
    Case(code=Code.BAD_SEAL, entry="fixed", says="takes no more seals", seal={"fixed": ["write"], "ram": ["grow"]}),
    Case(code=Code.NO_SUCH_ENTRY, entry="nonesuch", says="no entry 'nonesuch'", seal={"nonesuch": ["write"], "ram": ["grow"]}),
)


def test_each_reason(daemon: Daemon) -> None:
    for case in CASES:
        with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session, watched_pipe(session) as read:
            with memfd(b"content") as ram, memfd(flags=0) as fixed, eventfd() as irq:
                session.preserve({"ram": ram.fileno(), "fixed": fixed.fileno(), "irq": irq.fileno()}, needs=case.needs)
            with pytest.raises(Refusal) as refused:
                session.finalize(require=case.require, seal=case.seal)
            assert (refused.value.code, refused.value.entry) == (case.code, case.entry), refused.value
            assert re.search(case.says, refused.value.message), refused.value

            with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
                shown = looker.show("guest")
                assert (shown.info.state, shown.info.entries) == ("open", 4)
                assert [entry.facts.get("seals") for entry in shown.entries] == [None, "", "seal", None]
                if case.needs:
                    session.unpreserve(*case.needs)
                session.finalize(require={"daemon-upgrade"}, seal={} if "ram" in case.needs else {"ram": ["grow"]})
                with looker.claim("guest") as claim:
                    if "ram" in claim.entries:
                        with claim.retrieve("ram")["ram"] as ram, pytest.raises(PermissionError):
                            os.ftruncate(ram.fileno(), 4096)
                    claim.finish()
            assert let_go(read, 0)


def test_a_memfd_that_is_mapped_writable_takes_no_write_seal(daemon: Daemon) -> None:
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session, memfd(b"content") as ram:
        session.preserve({"ram": ram.fileno()})
        with mmap.mmap(ram.fileno(), 7), pytest.raises(Refusal, match="mapped writable") as refused:
            session.finalize(seal={"ram": ["write"]})
        assert (refused.value.code, refused.value.entry) == (Code.BAD_SEAL, "ram")
        session.finalize(seal={"ram": ["write"]})
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
        assert looker.show("guest").entries[0].facts["seals"] == "write"
        looker.discard("guest")


def test_seals_that_were_added_already_are_named(daemon: Daemon) -> None:
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session, memfd() as first, memfd(b"content") as second:
        session.preserve({"first": first.fileno(), "second": second.fileno()})
        with mmap.mmap(second.fileno(), 7), pytest.raises(Refusal, match=r"sealed already.*: first") as refused:
            session.finalize(seal={"first": ["write"], "second": ["write"]})
        assert refused.value.entry == "second"
        session.cancel()


def test_the_limit_of_preserved_fds(tmp_path: Path) -> None:
    config = tmp_path / "luod.toml"
    config.write_text("[limits]\nmax_preserved_fds = 5\n")
    with Daemon(options=("--config", str(config))) as daemon, eventfd() as irq:
        where = daemon.runtime_dir
        with luod_client.serialize("first", runtime_dir=where) as session:
            session.preserve({"a": irq.fileno(), "b": irq.fileno(), "c": irq.fileno()})
            session.finalize()
        with luod_client.serialize("second", runtime_dir=where) as session:
            session.preserve({"a": irq.fileno(), "b": irq.fileno(), "c": irq.fileno()})
            with pytest.raises(Refusal, match=r"holds 3 .* 5 is the limit") as refused:
                session.finalize()
            assert refused.value.code is Code.LIMIT_REACHED
            session.unpreserve("b")
            session.finalize()
        assert daemon.status().preserved_fds == 5
        with luod_client.deserialize(runtime_dir=where) as looker:
            looker.discard("first")
            assert daemon.status().preserved_fds == 2
            with looker.claim("second") as claim:
                close_all(claim.retrieve().values())
                claim.finish()
        assert daemon.status().preserved_fds == 0


def test_the_limit_of_sessions(tmp_path: Path) -> None:
    config = tmp_path / "luod.toml"
    config.write_text("[limits]\nmax_sessions = 2\n")
    with Daemon(options=("--config", str(config))) as daemon:
        where = daemon.runtime_dir
        with luod_client.serialize("first", runtime_dir=where) as first, luod_client.serialize("second", runtime_dir=where) as second:
            with pytest.raises(Refusal, match="2 sessions") as refused:
                luod_client.serialize("third", runtime_dir=where)
            assert refused.value.code is Code.LIMIT_REACHED
            first.cancel()
            with luod_client.serialize("third", runtime_dir=where) as third:
                third.cancel()
            second.cancel()
