"""The matrix of what survives what: asked of the kernel, and the same as what finalize and preflight say."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial

import pytest

from conformance.specimens import SPECIMENS
from entries import entry_of
from kernel_standin import KernelStandin
from luod import survival
from luod.capabilities import matrix
from luod.capacity import capacity
from luod.config import Config
from luod.custody import Custody
from luod.handlers import kinds
from luod.handlers.recognizer import Recognizer
from luod.policy import Policy
from luod.succession.carriable import UNTRIED, Carriable
from luod.succession.samples import NoSample, sample, sorts
from luod.survival import Survives
from luod.system import System
from luod_protocol import messages as m
from luod_protocol.fds import OwnedFd

EVENTFD = "anon_inode:[eventfd]"
CANNOT = "this kernel can't carry fds of this kind"


def custody_of(kernel: KernelStandin, sampler: Callable[[str], OwnedFd] = sample) -> Custody:
    return Custody(
        system=System(),
        capacity=capacity(Config().limits),
        policy=Policy(),
        generation=1,
        publish=lambda event, session, detail: None,
        carriable=Carriable(kernel.opening, sampler),
    )


def rows(custody: Custody, *, deny: str = "", files: tuple[str, ...] = ()) -> dict[str, m.SortSurvival]:
    return {row.sort: row for row in matrix(custody, Recognizer(kinds=set(kinds()) - {deny}, files=files))}


def kexec(custody: Custody, sort: str) -> tuple[str, bool]:
    """Why a sort doesn't go through a kexec, and whether that is known."""
    row = rows(custody)[sort]
    return row.survives["kexec"], "kexec" not in row.untried


def test_what_the_kernel_answers_of_fds_that_luod_makes() -> None:
    kernel = KernelStandin()
    custody = custody_of(kernel)
    assert kexec(custody, "memfd") == ("", True)
    for sort in ("eventfd", "pipe", "unix socket", "netlink socket", "timerfd", "signalfd", "inotify", "pidfd"):
        assert kexec(custody, sort) == (CANNOT, True), sort
    for sort in ("tap", "pty", "vfio-device", "vfio-cdev", "bpf-map", "vsock socket"):
        assert kexec(custody, sort) == (UNTRIED, False), sort
    assert not kernel.preserved()
    assert not kernel.outgoing
    assert not kernel.is_open


def test_a_kernel_that_has_learned_more() -> None:
    custody = custody_of(KernelStandin(learned=(EVENTFD, "pipe:")))
    assert [kexec(custody, sort) for sort in ("eventfd", "pipe", "timerfd")] == [("", True), ("", True), (CANNOT, True)]
    assert custody.carriable.why_not(["memfd", "eventfd"]) == ""


def test_a_module_that_is_loaded_later_is_noticed() -> None:
    kernel = KernelStandin()
    custody = custody_of(kernel)
    with OwnedFd(os.eventfd(0)) as event:
        custody.carriable.see("eventfd", event.fileno())
    assert kexec(custody, "eventfd") == (CANNOT, True)
    kernel.learned = (EVENTFD,)
    assert custody.carriable.refused(["eventfd"]) == {"eventfd"}
    assert kexec(custody, "eventfd") == ("", True)
    assert custody.carriable.refused(["eventfd"]) == set()


def test_a_device_that_may_be_opened_later_is_noticed() -> None:
    kernel = KernelStandin(is_there=False)
    custody = custody_of(kernel)
    assert {row.survives["kexec"] for row in rows(custody).values() if row.kind and row.kind != "file"} == {"there is no /dev/liveupdate"}
    kernel.is_there = True
    assert kexec(custody, "memfd") == ("", True)
    assert kexec(custody, "pipe") == (CANNOT, True)


def test_a_sample_that_is_refused_decides_nothing_where_the_kernel_knows_the_kind() -> None:
    kernel = KernelStandin(learned=(EVENTFD,), refuses={EVENTFD: errno.EOPNOTSUPP})
    custody = custody_of(kernel)
    reason, known = kexec(custody, "eventfd")
    assert reason.startswith(UNTRIED)
    assert "not this one" in reason
    assert not known
    kernel.refuses = {}
    with OwnedFd(os.eventfd(0)) as event:
        custody.carriable.see("eventfd", event.fileno())
    assert custody.carriable.reason("eventfd") == ""


def test_what_a_client_gave_is_not_forgotten_for_a_sample() -> None:
    kernel = KernelStandin(learned=(EVENTFD,), refuses={EVENTFD: errno.EINVAL})
    custody = custody_of(kernel)
    with OwnedFd(os.eventfd(0)) as event:
        custody.carriable.see("eventfd", event.fileno())
    kernel.refuses = {}
    assert kexec(custody, "eventfd") == ("not this one", True)


def test_what_only_a_client_has_is_shown_once_it_gave_one() -> None:
    custody = custody_of(KernelStandin())
    with OwnedFd(os.eventfd(0)) as anything:
        custody.carriable.see("vfio-device", anything.fileno())
    assert kexec(custody, "vfio-device") == (CANNOT, True)


def test_a_device_in_use_says_nothing_and_is_asked_again() -> None:
    kernel = KernelStandin()
    custody = custody_of(kernel)
    kernel.is_open = True
    assert "in use by another process" in kexec(custody, "memfd")[0]
    kernel.is_open = False
    assert kexec(custody, "memfd") == ("", True)
    kernel.is_open = True
    assert kexec(custody, "memfd") == ("", True)


def test_a_kernel_without_memory_says_nothing_of_the_sort() -> None:
    kernel = KernelStandin()
    custody = custody_of(kernel)
    assert custody.carriable.fault == ""
    kernel.learned, kernel.fault = (EVENTFD,), partial(_no_memory, "create")
    with OwnedFd(os.eventfd(0)) as event:
        custody.carriable.see("eventfd", event.fileno())
        assert custody.carriable.reason("eventfd") == UNTRIED
        kernel.fault = lambda _: None
        custody.carriable.see("eventfd", event.fileno())
    assert custody.carriable.reason("eventfd") == ""


def test_where_no_memfd_can_be_made_now_it_is_asked_again() -> None:
    left = False

    def sampler(sort: str) -> OwnedFd:
        if not left:
            raise NoSample("Too many open files")
        return sample(sort)

    custody = custody_of(KernelStandin(), sampler)
    assert "Too many open files" in custody.carriable.fault
    left = True
    assert custody.carriable.fault == ""


def _no_memory(call: str, done: str) -> None:
    from luod.succession.liveupdate import LiveUpdateFault

    if done.startswith(call):
        raise LiveUpdateFault("no memory", errno.ENOMEM)


def test_nothing_is_tried_while_luod_is_frozen() -> None:
    kernel = KernelStandin()
    custody = custody_of(kernel)
    assert kexec(custody, "eventfd") == (CANNOT, True)
    custody.carriable.rests = True
    kernel.calls.clear()
    assert kexec(custody, "eventfd") == (CANNOT, True)
    assert kernel.calls == []


def test_what_a_manager_keeps_holds_for_every_sort_that_is_taken() -> None:
    custody = custody_of(KernelStandin())
    custody.outlook = survival.kept(restarts=True)
    found = rows(custody)
    for sort in ("memfd", "vfio-device", "unix socket"):
        answers = found[sort].survives
        assert [answers[each] for each in (Survives.DAEMON_UPGRADE, Survives.DAEMON_CRASH, Survives.SERVICE_RESTART)] == ["", "", ""]
        assert answers[Survives.SOFT_REBOOT] == custody.outlook.reasons[Survives.SOFT_REBOOT] != ""


def test_what_is_not_taken_survives_nothing_for_its_reason() -> None:
    custody = custody_of(KernelStandin(learned=(EVENTFD,)))
    found = rows(custody, deny="eventfd")
    assert set(found["eventfd"].survives) == {each.value for each in Survives}
    assert len(set(found["eventfd"].survives.values())) == 1
    assert "configuration does not allow" in found["eventfd"].survives["kexec"]
    assert "[files]" in found["file"].survives["daemon-upgrade"]
    assert "works in the process that made it only" in found["KVM vCPU"].survives["daemon-upgrade"]
    assert found["KVM vCPU"].kind == ""
    assert rows(custody, files=("/etc/hostname",))["file"].survives["daemon-upgrade"] == ""


@pytest.mark.parametrize("sort", [sort for kind in kinds() for sort in sorts(kind)])
def test_a_sample_is_of_its_sort(sort: str) -> None:
    try:
        fd = sample(sort)
    except NoSample:
        assert sort not in ("memfd", "eventfd", "pipe", "unix socket", "timerfd", "signalfd", "inotify", "pidfd")
        return
    with fd:
        assert not os.get_inheritable(fd.fileno())
        assert entry_of(fd.fileno()).sort == sort


def test_every_specimen_has_a_sort_that_is_listed() -> None:
    seen: set[str] = set()
    for specimen in SPECIMENS:
        try:
            with specimen.make() as fd:
                seen.add(entry_of(fd).sort)
        except OSError:
            continue
        assert seen <= {sort for kind in kinds() for sort in sorts(kind)}, specimen.name
    assert {"memfd", "unix socket", "eventfd"} <= seen
