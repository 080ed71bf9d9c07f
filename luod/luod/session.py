"""A session as the daemon holds it."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from luod.lifecycle import SessionEvent, SessionState, step
from luod.manifest import Entry, Manifest
from luod.system import Process, System
from luod_protocol.fds import OwnedFd
from luod_protocol.records import EntryInfo, ProcessInfo, SessionInfo


@attrs.frozen(kw_only=True)
class Staged:
    """An entry of an open session and its fd, which is owned here until the box is sealed."""

    entry: Entry
    fd: OwnedFd


@attrs.frozen(kw_only=True)
class Sealed:
    """A finalized session's manifest and box; `places` says where in the box each name is, `kinds` has each kind with its `compatible`,
    `sorts` what the kernel carries or doesn't."""

    manifest: Manifest
    box: OwnedFd
    places: dict[str, int]
    kinds: frozenset[tuple[str, str]]
    sorts: frozenset[str]

    @classmethod
    def of(cls, manifest: Manifest, box: OwnedFd) -> Sealed:
        """The pair, indexed by name."""
        return cls(
            manifest=manifest,
            box=box,
            places={entry.name: place for place, entry in enumerate(manifest.entries)},
            kinds=frozenset((entry.kind, entry.compatible) for entry in manifest.entries),
            sorts=frozenset(entry.sort for entry in manifest.entries),
        )


@attrs.define(kw_only=True, eq=False)
class Session:
    """One session. `staged` has the entries while it is open, `sealed` from finalize on."""

    session_id: bytes
    name: str
    owner: int
    metadata: bytes
    opened_at: float
    state: SessionState = SessionState.OPEN
    staged: dict[str, Staged] = attrs.Factory(dict[str, Staged])
    weight: int = 0
    """Bytes of the names, needs and metadata of the entries: what the manifest grows with."""
    sealed: Sealed | None = None
    claimer: Process | None = None
    retrieved_by: set[Process] = attrs.Factory(set[Process])
    stored: str = ""
    """What the service manager calls the box; empty when it doesn't hold it."""
    sealing: bool = False
    """Whether it is boxed and waits for the service manager: it costs both what an open session does and what a finalized one does."""
    ending: bool = False
    """Whether it is being discarded: the service manager is letting go of it."""

    def step(self, event: SessionEvent) -> None:
        """Move on; IllegalEvent changes nothing."""
        self.state = step(self.state, event)

    @classmethod
    def adopted(cls, manifest: Manifest, box: OwnedFd, retrieved_by: Iterable[Process], *, stored: str) -> Session:
        """A preserved session, from what a succession brought."""
        return cls(
            session_id=manifest.session_id,
            name=manifest.session,
            owner=manifest.owner,
            metadata=manifest.metadata,
            opened_at=manifest.opened_at,
            state=SessionState.PRESERVED,
            weight=weigh(manifest.entries),
            sealed=Sealed.of(manifest, box),
            retrieved_by=set(retrieved_by),
            stored=stored,
        )

    @property
    def contents(self) -> Iterable[Entry]:
        """The entries, in the order in which they were preserved."""
        if self.sealed is not None:
            return self.sealed.manifest.entries
        return [staged.entry for staged in self.staged.values()]

    @property
    def kinds(self) -> frozenset[tuple[str, str]]:
        """Each kind among the entries, with its `compatible`."""
        if self.sealed is not None:
            return self.sealed.kinds
        return frozenset((staged.entry.kind, staged.entry.compatible) for staged in self.staged.values())

    @property
    def sorts(self) -> frozenset[str]:
        """The sorts of its entries."""
        return self.sealed.sorts if self.sealed is not None else frozenset(staged.entry.sort for staged in self.staged.values())

    @property
    def size(self) -> int:
        """How many entries it has."""
        return len(self.staged) if self.sealed is None else len(self.sealed.manifest.entries)

    def take_fds(self) -> list[OwnedFd]:
        """Move out every fd that this session keeps: at its end."""
        fds = [staged.fd for staged in self.staged.values()]
        if self.sealed is not None:
            fds.append(self.sealed.box)
        self.staged = {}
        self.sealed = None
        return fds

    def info(self, system: System, survives: tuple[str, ...]) -> SessionInfo:
        """What `list` says of it."""
        manifest = self.sealed.manifest if self.sealed is not None else None
        return SessionInfo(
            session_id=self.session_id,
            session=self.name,
            owner=self.owner,
            state=self.state.value,
            entries=self.size,
            opened_at=self.opened_at,
            finalized_at=manifest.finalized_at if manifest else 0.0,
            generation=manifest.generation if manifest else 0,
            claimed_by=self.claimer.pid if self.claimer else 0,
            retrieved_by=tuple(
                ProcessInfo(pid=each.pid, alive=system.is_alive(each)) for each in sorted(self.retrieved_by, key=lambda p: (p.pid, p.start))
            ),
            survives=survives if manifest else (),
        )


def weigh(entries: Iterable[Entry]) -> int:
    """The bytes of these entries that a client chose."""
    return sum(len(entry.name) + len(entry.metadata) + sum(map(len, entry.needs)) for entry in entries)


def entry_info(entry: Entry) -> EntryInfo:
    """What a client is told of an entry."""
    return EntryInfo(
        name=entry.name,
        kind=entry.kind,
        compatible=entry.compatible,
        metadata=entry.metadata,
        needs=entry.needs,
        facts=entry.facts,
    )
