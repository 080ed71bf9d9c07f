"""Examples that need another kernel boot one: the lab, a virtual machine, which is in luod's folder (tests/lab/vm.py) and not installed."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

_VM: Final = ("..", "..", "tests", "lab", "vm.py")
"""From an example's folder."""


def add_kexec_option(parser: argparse.ArgumentParser) -> None:
    """Add `--kexec [before|after|lab]`, of an example with a guest."""
    parser.add_argument(
        "--kexec",
        nargs="?",
        const="lab",
        choices=("before", "after", "lab"),
        help="go on under another kernel. before: preserve a guest and go to the kernel that is loaded, as root, at once; after: take it "
        "back there; lab, or nothing: both, in a virtual machine that has such a kernel",
    )


def play_a_kexec(run: str, arguments: Sequence[str]) -> NoReturn:
    """Have the lab run `run --kexec before` in one kernel and `run --kexec after` in the next, instead of this program.

    Args:
        run: the example's file, two folders below the checkout.
        arguments: more for both.
    """
    print("booting the lab ...", flush=True)
    run = os.path.abspath(run)
    command = shlex.join([sys.executable, run, *arguments])
    stages = f"if [ $LAB_STAGE = 1 ]; then lab-kexec load && {command} --kexec before; else {command} --kexec after; fi"
    vm = os.path.join(os.path.dirname(run), *_VM)
    os.execv(sys.executable, [sys.executable, vm, "--stages", "2", "--", "sh", "-c", stages])
