"""Launching a kernel for every step, or once for all steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
    """Launch a kernel of an LSTM for every step; once for all steps in the persistent regime.

    Args:
        kernel: a step kernel.
        call: the layer.
        plan: of the regime steps or persistent.
        arguments: those of the kernel that are alike in all launches.
        before: called with the number of a step before its launch, in the steps regime.
        after: called after its launch.
    """
    grid, T = spread_grid(call, plan), call.rows.T
    if plan.regime == "persistent":
        arrived = torch.zeros(grid[2], grid[1], dtype=torch.int32, device=call.x.device)
        launch(kernel, grid, plan, **arguments, arrived=arrived, begin=0, end=T, PERSISTENT=True)
        return
    for begin in range(T):
        if before is not None:
            before(begin)
        launch(
            kernel,
            grid,
            plan,
            **arguments,
            arrived=None,
            begin=begin,
            end=begin + 1,
            PERSISTENT=False,
        )
        if after is not None:
            after(begin)
