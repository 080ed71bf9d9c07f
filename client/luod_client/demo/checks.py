"""What the demo saw, and whether that is as it must be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import attrs

from luod_client.demo.guest import Moved


@attrs.frozen(kw_only=True)
class Check:
    """One thing that must be so."""

    what: str
    expected: str
    seen: str
    ok: bool


@attrs.frozen(kw_only=True)
class Answer:
    """What somebody who waited was told, and by which process it should have been."""

    question: str
    answer: str
    pid: int
    waited_s: float


@attrs.frozen(kw_only=True)
class Seen:
    """Everything that the demo saw; times in seconds.

    `sha256_before` and `identity_before` are the old process's, the others the new one's. `counters` are the device's counter as it was
    read along the way, `written` what the device had written into the memory that the new process got, `counter_asked` its counter just
    before. `resets_*` is how often the device was reset until then, seen from outside. `guest` is None where none could run, and
    `guest_left_out` says why.
    """

    size: int
    sha256_before: str
    sha256_said: str
    sha256_after: str
    identity_before: str
    identity_after: str
    seals_asked: Sequence[str]
    seals_after: Sequence[str]
    backlog: Answer
    caller: Answer
    generation_before: int
    generation_after: int
    predecessor_status: int
    looper_fault: str
    looper_trips: int
    counters: Sequence[int]
    counter_asked: int
    written: int
    resets_exit: int
    resets_upgrade: int
    resets_retrieved: int
    resets_finish: int
    resets_close: int
    counter_close: int
    guest: Moved | None
    guest_left_out: str
    sessions_left: int
    pause_s: float
    longest_s: float
    usual_s: float
    retrieve_s: float
    copy_s: float


def same(what: str, expected: object, seen: object) -> Check:
    """A check that two things are the same."""
    return Check(what=what, expected=str(expected), seen=str(seen), ok=expected == seen)


def _answered(what: str, answer: Answer) -> Check:
    return same(what, f"{answer.question} answered by pid {answer.pid}", answer.answer)


def compare_guest(guest: Moved) -> list[Check]:
    """What must be so of a guest that went on in another process, or in one of the next kernel, where files have other numbers."""
    stopped, resumed = guest.stopped, guest.resumed
    same_file = [] if guest.to_another_kernel else [same("guest: RAM: device and inode", stopped.identity, resumed.identity)]
    return [
        same(
            "guest: count when stopped, in its register, in its RAM",
            f"{stopped.count}, {stopped.count}",
            f"{stopped.register}, {stopped.in_ram}",
        ),
        same("guest: RAM: SHA-256 before it went on", stopped.sha256, resumed.sha256),
        *same_file,
        same("guest: first count in the new process", stopped.count + 1, resumed.first),
        same("guest: counts lost or repeated", "none", stopped.wrong or resumed.wrong or "none"),
    ]


def compare(seen: Seen) -> list[Check]:
    """What must be so, each with what was expected and what was seen."""
    counters = list(seen.counters)
    return [
        same("memory: SHA-256, computed by the new process", seen.sha256_before, seen.sha256_after),
        same("memory: SHA-256, in the entry's metadata", seen.sha256_before, seen.sha256_said),
        same("memory: device and inode", seen.identity_before, seen.identity_after),
        same("memory: seals added by finalize", ", ".join(seen.seals_asked), ", ".join(seen.seals_after)),
        _answered("TCP: who waited in the backlog", seen.backlog),
        _answered("TCP: who had been accepted", seen.caller),
        same("luod: generation", seen.generation_before + 1, seen.generation_after),
        same("luod: exit status of the old daemon", 0, seen.predecessor_status),
        same("looping client: faults, on one connection", "none", seen.looper_fault or "none"),
        Check(what="looping client: round trips", expected="some", seen=str(seen.looper_trips), ok=seen.looper_trips > 0),
        same("device: resets when the old process was gone", 0, seen.resets_exit),
        same("device: resets after luod was replaced", 0, seen.resets_upgrade),
        same("device: resets when the new process had it", 0, seen.resets_retrieved),
        same("device: resets after finish", 0, seen.resets_finish),
        Check(
            what="device: counter along the way",
            expected="always higher",
            seen=" < ".join(map(str, counters)),
            ok=len(counters) > 1 and all(a < b for a, b in itertools.pairwise(counters)),
        ),
        Check(
            what="device: DMA reaches the new process's memory",
            expected=f"over {seen.counter_asked}",
            seen=str(seen.written),
            ok=seen.written > seen.counter_asked,
        ),
        same("device: resets after the last close", 1, seen.resets_close),
        same("device: counter after the last close", 0, seen.counter_close),
        *([] if seen.guest is None else compare_guest(seen.guest)),
        same("luod: sessions left after finish", 0, seen.sessions_left),
    ]


def measured(seen: Seen) -> dict[str, float]:
    """How long it took, in seconds, and what the copy costs as a multiple of the pause."""
    times = {
        "pause_s": seen.pause_s,
        "longest_round_trip_s": seen.longest_s,
        "usual_round_trip_s": seen.usual_s,
        "retrieve_s": seen.retrieve_s,
        "backlog_waited_s": seen.backlog.waited_s,
        "caller_waited_s": seen.caller.waited_s,
        "copy_s": seen.copy_s,
        "copy_to_pause": seen.copy_s / seen.pause_s if seen.pause_s else 0.0,
    }
    if seen.guest is not None:
        times |= {"guest_pause_s": seen.guest.resumed.pause_s, "guest_rebuild_s": seen.guest.resumed.rebuild_s}
    return times
