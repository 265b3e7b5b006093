"""What the launchers are given, and the arguments that they all pass on to kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastlstm.kernels.rows import Rows
from fastlstm.spec import LayerSpec, Noise, State, Weights

from .launch import device_of, dot_precision, precision_of
from .plan import Device, Plan, Problem

__all__ = [
    *("Call", "call_arguments", "cluster_arguments", "row_arguments", "strides_of"),
    "weight_arguments",
]


class Call(NamedTuple):
    """One layer, and the numbers that it is computed from."""

    spec: LayerSpec
    x: Tensor  # [T, B, I] or [N, I], with a dense last dimension
    weights: Sequence[Weights]  # contiguous, one entry for each direction
    state: State  # contiguous h0 [D, B, P] and c0 [D, B, H], or None
    rows: Rows
    noise: Noise

    @property
    def problem(self) -> Problem:
        """What a plan depends on."""
        x = self.x
        rows = self.rows
        return Problem(self.spec, rows.B, x.element_size(), precision_of(x), rows.dense)

    @property
    def device(self) -> Device:
        """The GPU that it is for."""
        return device_of(self.x)

    def x_rows(self) -> Tensor:
        """Return x as ``[rows, I]``."""
        return self.x.reshape(-1, self.x.shape[-1])


def call_arguments(call: Call, plan: Plan) -> dict[str, Any]:
    """Return what a kernel in ``tl`` is told of the rows, the sizes and its tile."""
    return {
        **_rows_and_sizes(call, plan),
        "UNITS": plan.units,
        "STAGES": plan.stages,
        "PRECISION": dot_precision(call.x),
    }


def row_arguments(call: Call, plan: Plan) -> dict[str, Any]:
    """Return what a kernel of the registers regime is told of the rows, the sizes and its tile."""
    return {**_rows_and_sizes(call, plan), "U": plan.units}


def cluster_arguments(call: Call, plan: Plan) -> dict[str, Any]:
    """Return what a kernel of a cluster is told of the rows, the sizes and its tile."""
    return {**_rows_and_sizes(call, plan), "UNITS": plan.units, "C": plan.blocks}


def _rows_and_sizes(call: Call, plan: Plan) -> dict[str, Any]:
    rows, spec = call.rows, call.spec
    return {
        "offsets": rows.offsets,
        "lengths": rows.lengths,
        "reset": rows.reset,
        "rows": rows.count,
        "T": rows.T,
        "B": rows.B,
        "H": spec.hidden_size,
        "D": spec.directions,
        "N": plan.batch,
    }


def weight_arguments(weights: Sequence[Weights], *names: str) -> dict[str, Tensor | None]:
    """Return weights of direction 0 by name, and of direction 1 by ``NAME_reverse`` or None."""
    forward, reverse = weights[0], weights[1] if len(weights) == 2 else None
    found = {name: getattr(forward, name) for name in names}
    return found | {f"{name}_reverse": getattr(reverse, name, None) for name in names}


def strides_of(t: Tensor | None) -> tuple[int, int]:
    """Return the elements of ``[T, B, n]`` from a step and from a sequence to the next.

    Of packed rows ``[N, n]`` both are the elements from a row to the next; of None they are 0.
    """
    return (0, 0) if t is None else (t.stride(0), t.stride(-2))
