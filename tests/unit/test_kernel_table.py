"""Every cell of an update of the kernel."""

from __future__ import annotations

from itertools import product

import pytest

from luod.succession.kernel_table import TABLE, IllegalUpdateEvent, UpdateEvent, UpdateState, step

EXPECTED = {
    ("normal", "prepare"): "preparing",
    ("preparing", "all-preserved"): "prepared",
    ("preparing", "failed"): "undoing",
    ("preparing", "cancel"): "undoing",
    ("prepared", "set-changed"): "preparing",
    ("prepared", "freeze"): "frozen",
    ("prepared", "cancel"): "undoing",
    ("frozen", "thaw"): "undoing",
    ("frozen", "cancel"): "undoing",
    ("frozen", "kexec"): "updated",
    ("undoing", "undone"): "normal",
    ("updated", "let-go"): "normal",
    ("updated", "prepare"): "preparing",
}


@pytest.mark.parametrize(("state", "event"), [*product(UpdateState, UpdateEvent)])
def test_cell(state: UpdateState, event: UpdateEvent) -> None:
    following = EXPECTED.get((state.value, event.value))
    if following is None:
        with pytest.raises(IllegalUpdateEvent, match=f"{event.value} can't happen to an update that is {state.value}"):
            step(state, event)
    else:
        assert step(state, event).value == following


def test_no_cell_is_missing() -> None:
    assert len(TABLE) == len(EXPECTED)
