"""What this machine has, found out without the code under test, for tests that need it."""

from __future__ import annotations

import os
import shutil
from typing import Final, NoReturn

import pytest

KVM: Final = "/dev/kvm"


def kvm_is_there() -> bool:
    """Whether whoever runs the tests can open KVM, on a processor that the tests' guest is for."""
    try:
        os.close(os.open(KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return os.uname().machine == "x86_64"


def kvm_is_for_everybody() -> bool:
    """Whether any user can open KVM."""
    return os.path.exists(KVM) and os.stat(KVM).st_mode & 0o006 == 0o006


def unable(reason: str) -> NoReturn:
    """Leave the test out, for a reason. In CI (CI=true), where all must be possible, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def need_program(name: str, package: str) -> None:
    """Leave the test out when this program isn't installed, as `unable`."""
    if shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") is None:
        unable(f"{name} is not installed: on Debian, apt-get install {package}")
