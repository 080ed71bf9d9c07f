"""What the lab says before it boots: which kernel it takes, and what it lacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lab import vm


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, a checkout with nothing beside it, and no kernel named."""
    monkeypatch.delenv("LUOD_LAB_KERNEL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(vm, "CHECKOUT", tmp_path / "luod")
    return tmp_path


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_the_named_kernel_goes_before_the_built_one_and_that_before_the_one_beside_the_checkout(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    assert vm.kernel() is None
    beside = put(cache / "shared" / "lab" / "bzImage")
    assert vm.kernel() == beside
    built = put(vm.built_kernel())
    assert cache / "cache" / "luod-lab-kernel" in built.parents
    assert vm.kernel() == built
    monkeypatch.setenv("LUOD_LAB_KERNEL", "/elsewhere/bzImage")
    assert vm.kernel() == Path("/elsewhere/bzImage")


def test_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("PATH", str(cache))
    programs, kernel = vm.missing()
    assert "apt-get install --no-install-recommends qemu-system-x86 busybox-static cpio util-linux" in programs
    assert "`make lab-kernel`" in kernel
    assert str(vm.built_kernel()) in kernel
    with pytest.raises(vm.LabFault, match="make lab-kernel"):
        vm.in_vm(["true"])
    monkeypatch.setenv("LUOD_LAB_KERNEL", str(cache / "bzImage"))
    assert vm.missing()[1:] == [f"LUOD_LAB_KERNEL names {cache / 'bzImage'}, where no kernel is"]
    put(cache / "bzImage")
    assert vm.missing() == [programs]


def test_says_how_to_get_a_systemd_where_one_is_wanted(cache: Path) -> None:
    assert set(vm.missing(systemd=True)) - set(vm.missing()) == {
        f"the lab needs a current systemd: `make lab-systemd` gets Debian sid's, as {vm.systemd_root()}"
    }
    assert cache / "cache" / "luod-lab-systemd" in vm.systemd_root().parents
    vm.systemd_root().mkdir(parents=True)
    assert vm.missing(systemd=True) == vm.missing()


@pytest.mark.parametrize("example", ["vfio_noiommu", "iommufd"])
def test_an_example_says_why_the_lab_can_not_be_booted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, example: str) -> None:
    monkeypatch.setenv("LUOD_LAB_KERNEL", str(tmp_path / "bzImage"))
    run = Path(__file__).parents[2] / "examples" / example / "run.py"
    done = subprocess.run([sys.executable, run], capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert f"LUOD_LAB_KERNEL names {tmp_path / 'bzImage'}, where no kernel is" in done.stderr
