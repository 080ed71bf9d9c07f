"""luod in the lab: it serves, is upgraded, and knows the real fds of devices as what they are."""

from __future__ import annotations

from typing import Any

import pytest

from lab.vm import in_vm

pytestmark = pytest.mark.lab


def with_a_device_without_iommu() -> dict[str, Any]:
    import fcntl
    import json
    import os
    import stat
    import subprocess
    from contextlib import ExitStack

    import luod_client
    from lab.inside import daemon
    from luod.handlers import recognize
    from luod.handlers.base import Probe
    from luod_client.demo import vfio
    from luod_protocol.fds import OwnedFd

    seen: dict[str, Any] = {}
    (device,) = vfio.find(0x1234, 0x11E8)
    vfio.bind(device)
    with vfio.open_cdev(device) as cdev:
        probe = Probe(cdev.fileno())
        seen["cdev"] = (recognize(probe).kind, recognize(probe).record(probe))
    with ExitStack() as stack:
        seen["liveupdate"] = stat.S_ISCHR(os.stat("/dev/liveupdate").st_mode)
        luod = stack.enter_context(daemon())
        text = subprocess.run(
            ["luoctl", "--runtime-dir", luod.runtime_dir, "--json", "capabilities"], stdout=subprocess.PIPE, check=True
        ).stdout
        capabilities = json.loads(text)
        seen["survives"] = {what: not why for what, why in capabilities["survives"].items()}
        seen["kinds"] = sorted(capabilities["kinds"])
        seen["kexec"] = {row["sort"]: (row["survives"]["kexec"], row["untried"]) for row in capabilities["matrix"]}
        print(
            subprocess.run(
                ["luoctl", "--runtime-dir", luod.runtime_dir, "capabilities"], stdout=subprocess.PIPE, check=True
            ).stdout.decode()
        )

        kvm = stack.enter_context(OwnedFd(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)))
        vm = stack.enter_context(OwnedFd(fcntl.ioctl(kvm.fileno(), 0xAE01, 0)))  # KVM_CREATE_VM
        vcpu = stack.enter_context(OwnedFd(fcntl.ioctl(vm.fileno(), 0xAE41, 0)))  # KVM_CREATE_VCPU
        group, container = stack.enter_context(vfio.open_group(device)), stack.enter_context(vfio.open_container())
        vfio.put_without_iommu(group.fileno(), container.fileno())
        fds = {"group": group, "container": container, "device": stack.enter_context(vfio.device_of(group.fileno(), device))}
        fds["iommufd"] = stack.enter_context(vfio.open_iommufd())
        fds["memory"] = stack.enter_context(OwnedFd(os.memfd_create("memory", os.MFD_CLOEXEC)))
        os.pwrite(fds["memory"].fileno(), b"what must not be lost", 0)
        refused: dict[str, tuple[str, str]] = {}
        with luod_client.serialize("vm", runtime_dir=luod.runtime_dir) as session:
            for name, fd in {"kvm": kvm, "vm": vm, "vcpu": vcpu}.items():
                try:
                    session.preserve({name: fd.fileno()})
                except luod_client.Refusal as refusal:
                    refused[name] = (refusal.code.value, str(refusal))
            kept = session.preserve(
                {name: fd.fileno() for name, fd in fds.items()}, needs={"device": ["group", "container", "memory"], "group": ["container"]}
            )
            session.finalize(require={"daemon-upgrade"})
        with luod_client.control(runtime_dir=luod.runtime_dir) as control:
            seen["after"] = {row.sort: (row.survives["kexec"], list(row.untried)) for row in control.capabilities().matrix}
        seen["refused"] = refused
        seen["kept"] = {name: (entry.kind, entry.facts.get("device")) for name, entry in kept.items()}
        inodes = {name: os.fstat(fd.fileno())[:3] for name, fd in fds.items()}
        for fd in fds.values():
            fd.close()
        seen["generation"] = luod.upgrade().generation
        with luod_client.deserialize(runtime_dir=luod.runtime_dir) as connection, connection.claim("vm") as claim:
            back = claim.retrieve()
            seen["same"] = {name: os.fstat(fd.fileno())[:3] == inodes[name] for name, fd in back.items()}
            seen["content"] = os.pread(back["memory"].fileno(), 100, 0)
            seen["edu"] = vfio.Region(back["device"].fileno(), vfio.BAR0).read(0)
            claim.finish()
        for fd in back.values():
            fd.close()
    return seen


def with_a_device_behind_an_iommu() -> dict[str, Any]:
    import os
    from contextlib import ExitStack

    from luod.handlers import recognize
    from luod.handlers.base import Probe
    from luod_client.demo import vfio
    from luod_protocol.fds import OwnedFd

    (device,) = vfio.find(0x1234, 0x11E8)
    vfio.bind(device)
    seen: dict[str, Any] = {}
    with vfio.open_cdev(device) as unbound:
        seen["unbound"] = recognize(Probe(unbound.fileno())).kind
    with ExitStack() as stack:
        cdev, iommufd = stack.enter_context(vfio.open_cdev(device)), stack.enter_context(vfio.open_iommufd())
        memory = stack.enter_context(OwnedFd(os.memfd_create("memory", os.MFD_CLOEXEC)))
        os.ftruncate(memory.fileno(), 0x10000)
        vfio.map_file(iommufd.fileno(), vfio.attach(cdev.fileno(), iommufd.fileno()), memory.fileno(), 0x10000, 0x1000_0000)
        for name, fd in {"cdev": cdev, "iommufd": iommufd}.items():
            probe = Probe(fd.fileno())
            handler = recognize(probe)
            facts = handler.record(probe)
            handler.verify(Probe(fd.fileno()), facts)
            seen[name] = (handler.kind, facts.get("device"))
    with vfio.open_group(device) as group, vfio.open_container() as container:
        seen["group"], seen["container"] = (recognize(Probe(fd.fileno())).kind for fd in (group, container))
    return seen


@pytest.fixture(scope="module")
def seen() -> Any:
    run = in_vm(
        with_a_device_without_iommu,
        qemu=["-device", "edu,addr=10,dma_mask=0xffffffffffff"],
        append="vfio.enable_unsafe_noiommu_mode=1",
    )
    return run.values[0]


def test_a_session_survives_an_upgrade_there(seen: Any) -> None:
    assert seen["generation"] == 2
    assert seen["content"] == b"what must not be lost"


def test_the_kernel_has_live_update(seen: Any) -> None:
    assert seen["liveupdate"] is True


def test_luoctl_says_what_sessions_survive_there(seen: Any) -> None:
    assert seen["survives"]["daemon-upgrade"] is True
    assert {"memfd", "vfio-container", "vfio-group", "vfio-device", "vfio-cdev", "iommufd"} <= set(seen["kinds"])


CANNOT = "this kernel can't carry fds of this kind"
UNTRIED = "not tried yet: decided when a client gives one"


def test_the_matrix_has_what_the_kernel_answers(seen: Any) -> None:
    found = seen["kexec"]
    assert found["memfd"] == ("", [])
    for sort in (
        "eventfd",
        "pipe",
        "unix socket",
        "netlink socket",
        "timerfd",
        "signalfd",
        "inotify",
        "pidfd",
        "iommufd",
        "vfio-container",
    ):
        assert found[sort] == (CANNOT, []), sort
    for sort in ("vfio-device", "vfio-group", "tap", "pty"):
        assert found[sort] == (UNTRIED, ["kexec"]), sort
    assert "has no" in found["inet6 socket"][0], "the lab's kernel has no inet sockets"


def test_what_luod_can_not_make_is_decided_when_a_client_gives_one(seen: Any) -> None:
    assert [seen["after"][sort] for sort in ("vfio-device", "vfio-group")] == [(CANNOT, [])] * 2
    assert seen["after"]["tap"] == (UNTRIED, ["kexec"])


def test_a_device_without_an_iommu_is_known_and_comes_back(seen: Any) -> None:
    assert seen["kept"] == {
        "container": ("vfio-container", None),
        "group": ("vfio-group", "virtual/vfio/noiommu-0"),
        "device": ("vfio-device", "pci0000:00/0000:00:10.0"),
        "iommufd": ("iommufd", None),
        "memory": ("memfd", None),
    }
    assert seen["same"] == dict.fromkeys(seen["kept"], True)
    assert seen["cdev"] == ("vfio-cdev", {"device": "pci0000:00/0000:00:10.0/vfio-dev/noiommu-vfio0"})
    assert seen["edu"] & 0xFF == 0xED


def test_kvm_is_refused_with_what_to_do_instead(seen: Any) -> None:
    assert {name: code for name, (code, _) in seen["refused"].items()} == dict.fromkeys(("kvm", "vm", "vcpu"), "kind-not-supported")
    assert "open it again" in seen["refused"]["kvm"][1]
    assert "a KVM virtual machine, which works in the process that made it only" in seen["refused"]["vm"][1]
    assert "a KVM vCPU, which works in the process that made it only" in seen["refused"]["vcpu"][1]


def test_a_device_behind_an_iommu_is_known() -> None:
    run = in_vm(
        with_a_device_behind_an_iommu,
        qemu=["-machine", "q35", "-device", "intel-iommu,intremap=on,caching-mode=on", "-device", "edu,addr=10,dma_mask=0xffffffffffff"],
        append="intel_iommu=on",
    )
    assert run.values[0] == {
        "unbound": "vfio-cdev",
        "cdev": ("vfio-cdev", "pci0000:00/0000:00:10.0/vfio-dev/vfio0"),
        "iommufd": ("iommufd", None),
        "group": "vfio-group",
        "container": "vfio-container",
    }
