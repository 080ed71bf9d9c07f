"""What this machine has, found out without the code under test, for tests that need it."""

from __future__ import annotations

import os
from typing import Final

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
