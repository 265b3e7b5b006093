"""The plans of a GPU as a table, which C++ looks up: what ``config`` answers, asked beforehand.

A plan depends on H and I by the tiles that hold them, and on the batch by whether clusters, or
programs of few sequences, have room on the GPU. So each answer is a row with the conditions under
which it is given, and the first row whose conditions hold is the plan; what has room C++ knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from fastlstm.kernels.triton.config import plan_without_override
from fastlstm.kernels.triton.plan import Device, Plan, Problem, padded
from fastlstm.spec import LayerSpec

__all__ = ["ANY", "KINDS", "REGIMES", "Row", "element_and_precision", "table"]

ANY = 2**31 - 1
KINDS = ("bf16", "f16", "tf32", "exact")  # of numbers: how they are stored and multiplied
REGIMES = ("registers", "cluster")  # that are compiled ahead
_UNITS = (16, 32, 64, 128, 256, 512)
_INPUTS = (16, 32, 64)
_PROCESSORS = 1 << 20  # of a GPU on which everything has room
_SEQUENCES = 1, 1 << 30  # few, and more than have room


class Row(NamedTuple):
    """A plan, and the calls that it is for. All fields are numbers, as C++ takes them."""

    back: int  # of the backward pass
    kind: int  # of KINDS
    most_units: int  # H of the layer
    most_inputs: int  # I
    regime: int  # of REGIMES
    units: int
    batch: int  # sequences of a program; the fewer of two numbers as long as they have room
    inputs: int  # the tile of I, if x goes through w_ih in the loop, else 0
    warps: int
    blocks: int  # of a cluster, which takes so many sequences as have room


def element_and_precision(kind: str) -> tuple[int, str]:
    """Return the bytes of a number of that kind, and how float32 is multiplied."""
    return (2 if kind in ("bf16", "f16") else 4), ("ieee" if kind == "exact" else "tf32")


def table(arch: int, clusters: bool = True) -> list[Row]:
    """Return the rows of a GPU of that compute capability; the first that holds is the plan."""
    return list(dict.fromkeys(_rows(Device(arch, _PROCESSORS, clusters=clusters))))


def _rows(device: Device) -> Iterator[Row]:
    for back in (False, True):
        for number, kind in enumerate(KINDS):
            for units in _UNITS:
                for inputs, B in product((*_INPUTS, ANY), _SEQUENCES):
                    plan = _plan(back, kind, units, inputs, B, device)
                    if plan.regime in REGIMES:
                        yield _row(back, number, inputs, plan)


def _plan(back: bool, kind: str, units: int, inputs: int, B: int, device: Device) -> Plan:
    spec = LayerSpec("LSTM", inputs, units)
    problem = Problem(spec, B, *element_and_precision(kind))
    return plan_without_override(back, problem, device)


def _row(back: bool, kind: int, inputs: int, plan: Plan) -> Row:
    most = inputs if plan.fused else ANY
    tile: Any = padded(inputs) if plan.fused else 0
    regime = REGIMES.index(plan.regime)
    sizes = plan.units, plan.batch, tile, plan.warps, plan.blocks
    return Row(int(back), kind, plan.units, most, regime, *sizes)
