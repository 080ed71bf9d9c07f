"""The examples whose devices are in the lab only; a guest under KVM there; and QEMU as a witness of what reached the device."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lab.vm import CHECKOUT, LIMIT_S, in_vm

pytestmark = pytest.mark.lab

EXAMPLES = CHECKOUT / "examples"
EDU = "edu,addr=10,dma_mask=0xffffffffffff"
BUS_MASTER = 0x4


def rows(said: str) -> Sequence[str]:
    """The rows of the table of checks."""
    return [line for line in said.splitlines() if re.search(r"  (ok|DIFFERS)$", line)]


def test_dma_goes_on_without_an_iommu_and_qemu_sees_no_reset(tmp_path: Path) -> None:
    run = in_vm(
        [sys.executable, str(EXAMPLES / "vfio_noiommu" / "run.py"), "--device", "0000:00:10.0"],
        qemu=["-device", EDU, "-trace", "pci_cfg_write", "-D", str(tmp_path / "trace")],
        append="vfio.enable_unsafe_noiommu_mode=1",
    )
    found = rows(run.said)
    assert len(found) == 13
    assert [row for row in found if not row.endswith("ok")] == []
    assert "memory: pages that have moved" in run.said
    assert run.said.endswith("Everything as it must be.\n")
    writes = re.findall(r"pci_cfg_write edu .*@0x4 <- 0x([0-9a-f]+)", (tmp_path / "trace").read_text())
    bits = "".join("1" if int(value, 16) & BUS_MASTER else "0" for value in writes)
    assert re.fullmatch("0*1+0+", bits), f"bus mastering was switched in this order: {bits}"


def test_dma_goes_on_through_an_iommufd_and_the_command_boots_the_lab_itself() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "iommufd" / "run.py")], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    print(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    found = rows(done.stdout)
    assert len(found) == 13
    assert [row for row in found if not row.endswith("ok")] == []
    assert "the same, after IOMMU_IOAS_CHANGE_PROCESS" in done.stdout
    assert done.stdout.startswith("booting the lab ...\n")
    assert done.stdout.endswith("Everything as it must be.\n")


def test_a_guest_goes_on_in_another_process_and_a_step_that_fails_is_told() -> None:
    kvm, device = (str(EXAMPLES / name / "run.py") for name in ("kvm_guest", "iommufd"))
    words = shlex.join([sys.executable, kvm, "--counts", "200"])
    run = in_vm(
        ["sh", "-c", f"{words} && if {words} --kexec before; then exit 1; fi"],
        [sys.executable, device, "--device", "0000:00:1f.7"],
        check=False,
    )
    assert run.status == 1
    assert "FAILED: 0000:00:1f.7 can't be given to vfio-pci" in run.said
    found = rows(run.said)
    assert len(found) == 5
    assert [row for row in found if not row.endswith("ok")] == []
    assert "luod is replaced: process " in run.said
    assert "no kexec: no kernel is loaded" in run.said


def over_a_kexec(example: str, *arguments: str) -> str:
    """What an example says that boots the lab itself and goes to another kernel there."""
    command = [sys.executable, str(EXAMPLES / example / "run.py"), "--kexec", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    print(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("Everything as it must be.\n")
    assert [row for row in rows(done.stdout) if not row.endswith("ok")] == []
    return done.stdout


def test_a_guest_goes_on_under_another_kernel() -> None:
    said = over_a_kexec("kvm_guest", "--counts", "200")
    assert "… 200. Stopped." in said
    assert "of generation 2; 1 session came from the last kernel" in said
    assert len(rows(said)) == 4
    assert re.search(r"^guest: first count in the new process +201 +201 +ok$", said, flags=re.M)
    assert re.search(r"^The guest stood still for \d+ ms \(known to a second", said, flags=re.M)


def test_a_guest_goes_on_in_another_qemu_under_another_kernel() -> None:
    said = over_a_kexec("qemu")
    assert "A guest with 256 MiB of RAM" in said
    assert len(rows(said)) == 6
    (last,) = re.findall(r"… (\d+)\. Stopped; it wrote \d", said)
    assert f"under the next kernel: {int(last) + 1}, …" in said
    assert re.search(r"^The guest stood still for [0-9.]+ s \(known to a second\)", said, flags=re.M)
