"""A device in mid-DMA, through luod: the vfio stand-in counts on, and is reset exactly when the last copy of its fd is closed."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager

import pytest

import luod_client
from harness import Client, Daemon, Talk, spawn_client
from luod_client.demo.device import PAGE_BYTES, Device, DeviceFault, query, sample, start_dma
from luod_protocol.fds import OwnedFd, duplicate


@pytest.fixture
def device() -> Iterator[Device]:
    with Device() as device:
        yield device


@pytest.fixture
def memory() -> Iterator[OwnedFd]:
    with OwnedFd(os.memfd_create("dma", os.MFD_CLOEXEC)) as memfd:
        os.ftruncate(memfd.fileno(), PAGE_BYTES)
        yield memfd


def own_and_preserve(talk: Talk, runtime_dir: str, device_fd: int) -> None:
    import os

    import luod_client
    from luod_client.demo import device

    memory = os.memfd_create("dma", os.MFD_CLOEXEC)
    os.ftruncate(memory, device.PAGE_BYTES)
    device.start_dma(device_fd, memory)
    with luod_client.serialize("vm", runtime_dir=runtime_dir) as session:
        session.preserve({"device": device_fd, "dma": memory}, needs={"device": ["dma"]})
        talk.tell(device.query(device_fd, counter=50).counter)
        talk.hear()
        session.finalize(require={"daemon-upgrade"})
    talk.tell(device.query(device_fd).counter)


def take_back(talk: Talk, runtime_dir: str) -> None:
    import luod_client
    from luod_client.demo import device

    with luod_client.deserialize(runtime_dir=runtime_dir) as connection, connection.claim("vm", force=True) as claim:
        fds = claim.retrieve()
        with fds["device"] as device_fd, fds["dma"] as memory:
            found = device.sample(memory.fileno()).counter
            state = device.query(device_fd.fileno(), counter=found + 50)
            talk.tell((found, state.resets, device.sample(memory.fileno()).counter))
            assert talk.hear() == "finish"
            claim.finish()
            talk.tell(device.query(device_fd.fileno()).counter)
            assert talk.hear() == "close"
        talk.tell()
        talk.hear()


@contextmanager
def owner_of(device: Device, daemon: Daemon) -> Generator[Client]:
    """A client that owns the device, alone, and has staged it with luod."""
    with ExitStack() as stack:
        with device.open() as fd:
            client = stack.enter_context(spawn_client(own_and_preserve, daemon.runtime_dir, fd.fileno(), pass_fds=[fd.fileno()]))
        assert client.hear() >= 50
        yield client


def preserve(device: Device, daemon: Daemon) -> int:
    """Have a client preserve the device and exit. The counter as it was then."""
    with owner_of(device, daemon) as client:
        client.tell("finalize")
        counter: int = client.hear()
    return counter


@pytest.mark.slow
def test_counts_on_through_exit_two_upgrades_and_a_new_client(daemon: Daemon, device: Device) -> None:
    counters = [preserve(device, daemon)]
    for _ in range(2):
        state = device.state(counter=counters[-1] + 50)
        assert (state.resets, state.dma, state.held) == (0, True, True)
        daemon.upgrade()
        counters.append(state.counter)
    assert daemon.status().generation == 3
    with spawn_client(take_back, daemon.runtime_dir) as client:
        found, resets, written = client.hear()
        assert counters[-1] < found
        assert found + 50 <= written
        assert resets == 0
        client.tell("finish")
        at_finish = client.hear()
        assert at_finish > written
        state = device.state(counter=at_finish + 50)
        assert (state.resets, state.dma, state.held) == (0, True, True)
        status = daemon.status()
        assert (status.sessions_preserved, status.sessions_claimed, status.preserved_fds) == (0, 0, 0)
        client.tell("close")
        client.hear()
        state = device.state()
        assert (state.resets, state.counter, state.dma, state.held) == (1, 0, False, False)
    daemon.check_idle()
    assert device.state().resets == 1


@pytest.mark.parametrize("upgrades", [0, 1])
def test_discard_resets_it_once(daemon: Daemon, device: Device, upgrades: int) -> None:
    counter = preserve(device, daemon)
    for _ in range(upgrades):
        daemon.upgrade()
    assert device.state(counter=counter + 50).resets == 0
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as connection:
        connection.discard("vm")
    state = device.state()
    assert (state.resets, state.counter, state.dma, state.held) == (1, 0, False, False)


@pytest.mark.parametrize("upgrades", [0, 1])
def test_client_killed_before_finalize_resets_it_once(daemon: Daemon, device: Device, upgrades: int) -> None:
    with owner_of(device, daemon) as client:
        for _ in range(upgrades):
            daemon.upgrade()
        assert device.state().resets == 0
        client.kill()
        device.state(resets=1)
    daemon.check_idle()
    state = device.state()
    assert (state.resets, state.counter, state.dma, state.held) == (1, 0, False, False)


@pytest.mark.slow
def test_claimer_killed_with_the_device_in_hand_resets_nothing(daemon: Daemon, device: Device) -> None:
    counter = preserve(device, daemon)
    with spawn_client(take_back, daemon.runtime_dir) as client:
        client.hear()
        client.kill()
    daemon.check_idle()
    state = device.state(counter=counter + 50)
    assert (state.resets, state.dma, state.held) == (0, True, True)
    with spawn_client(take_back, daemon.runtime_dir) as client:
        found, resets, _ = client.hear()
        assert found > counter
        assert resets == 0


def test_luod_killed_resets_it_once(daemon: Daemon, device: Device) -> None:
    preserve(device, daemon)
    assert device.state().resets == 0
    daemon.kill()
    daemon.wait_gone()
    assert device.state(resets=1).held is False


# ---- the stand-in alone


def test_resets_at_the_last_close_only(device: Device, memory: OwnedFd) -> None:
    with device.open() as fd:
        start_dma(fd.fileno(), memory.fileno())
        copy = duplicate(fd.fileno())
    with copy:
        assert query(copy.fileno(), counter=50).resets == 0
        assert device.state().held is True
    state = device.state()
    assert (state.resets, state.counter, state.dma, state.held) == (1, 0, False, False)


def test_writes_no_more_after_a_reset(device: Device, memory: OwnedFd) -> None:
    with device.open() as fd:
        start_dma(fd.fileno(), memory.fileno())
        query(fd.fileno(), counter=50)
    last = sample(memory.fileno())
    assert last.counter >= 50
    with device.open() as fd, OwnedFd(os.memfd_create("other", os.MFD_CLOEXEC)) as other:
        os.ftruncate(other.fileno(), PAGE_BYTES)
        start_dma(fd.fileno(), other.fileno())
        assert query(fd.fileno(), counter=20).resets == 1
        assert sample(other.fileno()).counter >= 20
        assert sample(memory.fileno()) == last
    assert device.state().resets == 2


def test_refuses_a_second_opener_and_memory_without_a_page(device: Device, memory: OwnedFd) -> None:
    with device.open() as fd:
        with pytest.raises(DeviceFault, match="the last copy of its fd must be closed first"):
            device.open()
        os.ftruncate(memory.fileno(), 0)
        with pytest.raises(DeviceFault, match="refused dma"):
            start_dma(fd.fileno(), memory.fileno())
        state = query(fd.fileno())
        assert (state.counter, state.resets, state.dma) == (0, 0, False)


def test_says_when_nothing_happens_in_time(device: Device) -> None:
    with pytest.raises(DeviceFault, match=r"within 0\.05 s"):
        device.state(resets=1, timeout=0.05)
    assert device.state().resets == 0
