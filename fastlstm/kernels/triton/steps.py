"""Launching a kernel for every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .call import Call
from .launch import launch
from .plan import Plan

__all__ = ["launch_steps", "spread_grid"]


def spread_grid(call: Call, plan: Plan) -> tuple[int, int, int]:
    """Return the programs of a launch: tiles of units, tiles of sequences, directions."""
    tiles = -(-call.rows.B // plan.batch)
    return -(-call.spec.hidden_size // plan.units), tiles, call.spec.directions


def launch_steps(
    kernel: Any,
    call: Call,
    plan: Plan,
    arguments: dict[str, Any],
    *,
    before: Callable[[int], None] | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """Launch a kernel of an LSTM for every step.

    Args:
        kernel: a step kernel.
        call: the layer.
        plan: of the regime steps.
        arguments: those of the kernel that are alike in all launches.
        before: called with the number of a step before its launch.
        after: called after its launch.
    """
    grid = spread_grid(call, plan)
    for step in range(call.rows.T):
        if before is not None:
            before(step)
        launch(kernel, grid, plan, **arguments, step=step)
        if after is not None:
            after(step)
