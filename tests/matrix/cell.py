"""One cell of the matrix: one fault at one step, on one host, and what came of it."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from faulty import children_of
from luod_protocol.errors import Refusal
from matrix.hosts import Host
from matrix.rules import Facts, Word, expected, lives, nobody_else_ends_it
from matrix.steps import Step, action, choose
from matrix.story import HELD_AT, Story

SETTLED_S: Final = 60.0
"""How long it may take until it is clear who serves, in seconds: the longest bound, on a busy machine."""
LOOK_S: Final = 0.05
TRIES: Final = 4
"""A healthy upgrade may be late on a busy machine: the bounds are short."""
_TROUBLE: Final = re.compile(r"Traceback|Exception ignored|never awaited|has a bug")


class _Doing(threading.Thread):
    """A call in a thread that need not be waited for."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except Exception as error:
            self.error = error

    @property
    def done(self) -> bool:
        return not self.is_alive()


class TooLate(AssertionError):
    """The upgrade was given up before its fault: short bounds on a busy machine. Nothing was tried."""


class Cell:
    """A try on a host.

    Args:
        host: idle, and as it was.
        step, fault: None: a healthy upgrade.
    """

    def __init__(self, host: Host, step: Step | None, fault: str) -> None:
        self._host = host
        self._step = step
        self._fault = fault
        self._tended = False

    def run(self) -> Word:
        """Try. Returns who serves in the end.

        Raises:
            AssertionError: a rule is broken.
        """
        host, bench = self._host, self._host.bench
        before = self._served()
        said = len(host.said())
        bench.clear()
        bench.plan()
        story = Story(host.runtime_dir)
        try:
            plan = [f"{HELD_AT}=wait"]
            if self._step is not None:
                plan.append(f"{self._step.name}={action(self._fault)}")
                if self._step.side == "first":
                    plan.append("old/after-send:offer=kill")
            bench.plan(*plan)
            upgrading = _Doing(host.upgrade)
            self._until(lambda: upgrading.done or bench.came(HELD_AT), "upgrade that begins")
            acting: _Doing | None = None
            if bench.came(HELD_AT):
                acting = _Doing(story.meanwhile)
                # After a fault they may have to wait until the upgrade is over, which is held.
                self._until(lambda: acting.done or self._has_come(), "clients that get answers")
                self._until(lambda: bench.go_on() or upgrading.done or self._dead(before), "an upgrade that goes on")
            word, facts = self._settle(upgrading, before)
            if acting is not None:
                self._until(lambda: acting.done, "clients that get answers in the end")
                assert acting.error is None, acting.error
            bench.plan()
            self._check(story, word, facts)
        finally:
            bench.go_on()
            story.close()
        trouble = _TROUBLE.search(host.said()[said:])
        assert trouble is None, f"luod wrote {trouble and trouble[0]!r}: {host.said()[said:]}"
        return word

    def _served(self) -> int:
        self._until(lambda: self._host.answer() is not None, "a luod that serves")
        answer = self._host.answer() or self._host.answer()
        assert answer is not None
        return answer.pid

    def _dead(self, pid: int) -> bool:
        return pid not in self._host.luods()

    # ---- waiting

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SETTLED_S
        while not condition():
            self._tend()
            assert time.monotonic() < deadline, (
                f"no {what} within {SETTLED_S:g} s: {self._host.luods()} {self._host.bench.trace()[-6:]}\n{self._host.said()[-2000:]}"
            )
            time.sleep(LOOK_S)

    def _tend(self) -> None:
        """A victim that stopped: have it go on, or end it where nobody else does."""
        step = self._step
        if step is None or self._tended or self._fault not in ("hang", "pause") or not self._host.bench.came(step.name):
            return
        trace = self._host.bench.trace()
        victim = self._host.luods().get(next(pid for pid, name, _ in trace if name == step.name), 0)
        if not victim or not _is_stopped(victim):
            return
        facts = Facts.of(trace)
        self._tended = True
        with suppress(ProcessLookupError):
            if self._fault == "pause":
                os.kill(victim, signal.SIGCONT)
            elif nobody_else_ends_it(step, facts, managed=self._host.managed):
                if not facts.serving:
                    assert self._host.answer() is None, "somebody serves while it isn't decided who does"
                os.kill(victim, signal.SIGKILL)

    def _settle(self, upgrading: _Doing, before: int) -> tuple[Word, Facts]:
        host = self._host
        self._until(lambda: upgrading.done, "answer to the upgrade")
        if self._step is not None and not self._has_come() and isinstance(upgrading.error, Refusal):
            raise TooLate(str(upgrading.error))
        word: list[Word] = []

        def settled() -> bool:
            luods = host.luods()
            if not self._step_is_through():
                return False
            if not luods and not host.managed:
                word[:] = [Word.NOBODY]
                return True
            answer = host.answer()
            if answer is None or list(luods) != [answer.pid] or host.luods() != luods:
                return False
            successors = {pid for pid, name, _ in host.bench.trace() if name.startswith("new/")}
            word[:] = [Word.OLD if answer.pid == before else Word.NEW if answer.pid in successors else Word.RESTARTED]
            # A manager that has to start another one ends who is left first, who may answer until then.
            return word == [self._wanted()] or not host.managed

        self._until(settled, f"luod that serves alone ({word})")
        facts = Facts.of(host.bench.trace())
        wanted = self._wanted()
        assert word == [wanted], f"{word[0]}, expected: {wanted}; {upgrading.error!r}"
        if self._step is None:
            # What the successor still does afterwards is its own yet, not an old daemon's.
            self._until(lambda: not host.managed or _came(host, "new/after-tell:READY"), "successor that is ready")
        return word[0], facts

    def _wanted(self) -> Word:
        if self._step is None:
            return Word.NEW
        return expected(self._step, self._fault, Facts.of(self._host.bench.trace()), managed=self._host.managed)

    def _has_come(self) -> bool:
        return self._step is not None and self._host.bench.came(self._step.name)

    def _step_is_through(self) -> bool:
        return self._step is None or (self._has_come() and (self._tended or self._fault != "pause"))

    # ---- what must hold

    def _check(self, story: Story, word: Word, facts: Facts) -> None:
        host = self._host
        lost: set[str] = set()
        if word is Word.NOBODY:
            assert not host.luods()
            lost = set(story.ids)
            host.start()
            self._served()
        elif word is Word.NEW and not facts.frozen:
            lost = {name for name in ("first", "claimed", "second", "used", "stuck") if story.ids[name] not in facts.boxes}
            if "ending" in story.ids and story.ids["ending"] not in facts.boxes:
                lost.add("ending")
        story.unsure -= lost
        there = story.check(live=lives(word, facts), lost=lost)
        serving = host.luods()
        assert [child for pid in serving.values() for child in children_of(pid)] == []
        half = len(there) // 2
        story.check_finalized(*there[:half])
        self._upgrade_again()
        story.check_finalized(*there[half:])
        assert len(host.luods()) == 1

    def _serves_alone(self, pid: int) -> bool:
        return list(self._host.luods()) == [pid]

    def _upgrade_again(self) -> None:
        late: list[str] = []
        while len(late) < TRIES:
            self._host.bench.plan()
            try:
                upgraded = self._host.upgrade()
            except Refusal as refusal:
                late.append(str(refusal))
                continue
            self._until(partial(self._serves_alone, upgraded.pid), "second upgrade that leaves one luod")
            return
        raise AssertionError(f"a second upgrade fails: {late}")


def _came(host: Host, step: str) -> bool:
    return any(name == step for _, name, _ in host.bench.trace())


def _is_stopped(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    return False


def find_steps(host: Host) -> list[Step]:
    """The steps of a healthy upgrade, and with a manager those of a start after a crash."""
    Cell(host, None, "").run()
    found = choose(name for _, name, _ in _first_upgrade(host.bench.trace()))
    if host.managed:
        crash = Step.parse("old/after-send:offer")
        assert crash is not None
        Cell(host, crash, "kill").run()
        found += [step for step in choose(name for _, name, _ in host.bench.trace()) if step.side == "first"]
    return found


def _first_upgrade(trace: list[tuple[int, str, bytes]]) -> list[tuple[int, str, bytes]]:
    # The second upgrade has another successor.
    successors = [pid for pid, name, _ in trace if name.startswith("new/")]
    old = [pid for pid, name, _ in trace if name.startswith("old/")]
    return [line for line in trace if line[0] in (successors[0], old[0]) and (line[0] == old[0] or line[1].startswith("new/"))]
