"""Which kernel computes a layer, in which tiles: a pure function of the layer and the GPU.

Four regimes:

- ``registers``: one program per direction and tile of sequences takes all steps, the weights of a
  plain cell in its registers. Wherever it fits, and Triton has Gluon.
- ``sequence``: the same with W_hh in shared memory. Wherever it fits.
- ``cluster``: the units are spread over a cluster of a Hopper GPU, whose blocks send each other
  h and its gradients. Wherever the clusters have room on the GPU in a few turns.
- ``steps``: the units are spread over programs, one launch for every step. Everywhere else.

The choices follow from what compiling ahead of time shows (``python -m benchmarks kernels``:
registers, spills, shared memory, barriers), and from what an H200 showed of ``registers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

from .plan import Device, Plan, Problem, padded
from .register_plans import (
    backward_cluster,
    backward_registers,
    forward_cluster,
    forward_registers,
)
from .sequence_plans import backward_sequence, forward_sequence, rnn_sequence, widest
from .spread_plans import backward_spread, forward_spread, rnn_spread

__all__ = [
    "Device",
    "Plan",
    "Problem",
    "backward_plan",
    "forward_plan",
    "missing",
    "no_room",
    "obstacle",
    "override",
    "padded",
    "rnn_plan",
    "watch",
]

_REGIMES = "registers", "sequence", "cluster", "steps"
# Told whether plans are overridden: kernels that were compiled ahead know none but their own.
_watchers: list[Callable[[bool], Any]] = []
# For the whole process: autograd runs backward in a thread of its own.
_FORWARD = forward_registers, forward_sequence, forward_cluster, forward_spread
_BACKWARD = backward_registers, backward_sequence, backward_cluster, backward_spread
_changes: dict[str, Any] = {}


@contextmanager
def override(**changes: Any) -> Iterator[None]:
    """Change fields of every plan that the process makes in this block, for tests and tuning.

    ``regime`` restricts the choice; the other fields of :class:`Plan` replace what was chosen.
    Both passes of a layer belong here: regimes differ in how they keep gates for backward.

    Raises:
        ValueError: there is no such field or regime.
    """
    unknown = changes.keys() - Plan.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"override(): a plan has no {', '.join(sorted(unknown))}")
    if changes.get("regime", "steps") not in _REGIMES:
        raise ValueError(f"override(): {changes['regime']!r} is not a regime")
    before = _changes
    _change({**before, **changes})
    try:
        yield
    finally:
        _change(before)


def watch(watcher: Callable[[bool], Any]) -> None:
    """Tell a function whether plans are overridden, now and whenever that changes."""
    _watchers.append(watcher)
    watcher(bool(_changes))


def _change(changes: dict[str, Any]) -> None:
    global _changes
    _changes = changes
    for watcher in _watchers:
        watcher(bool(changes))


def forward_plan(problem: Problem, device: Device) -> Plan:
    """Return the plan of the forward pass of an LSTM; there is one for every problem.

    Raises:
        ValueError: the overridden regime cannot compute it.
    """
    return _plan(_FORWARD, problem, device)


def backward_plan(problem: Problem, device: Device) -> Plan:
    """Return the plan of the backward pass; it need not have the regime of the forward pass.

    Raises:
        ValueError: the overridden regime cannot compute it.
    """
    return _plan(_BACKWARD, problem, device)


def plan_without_override(back: bool, problem: Problem, device: Device) -> Plan:
    """Return the plan of a pass as it is where nobody overrides it."""
    return _choose(_BACKWARD if back else _FORWARD, problem, device, None)


def rnn_plan(problem: Problem, device: Device) -> Plan:
    """Return the plan of both passes of nn.RNN; its tile is as high as a program has units.

    Raises:
        ValueError: the overridden regime cannot compute it.
    """
    return _plan((_none, rnn_sequence, _none, rnn_spread), problem, device)


def _plan(makers: Any, problem: Problem, device: Device) -> Plan:
    if not _changes:
        return _choose(makers, problem, device, None)
    changes = dict(_changes)
    return replace(_choose(makers, problem, device, changes.pop("regime", None)), **changes)


@lru_cache(maxsize=1024)  # looked up at every launch, by the few layers of a program
def _choose(makers: Any, problem: Problem, device: Device, regime: str | None) -> Plan:
    *one_program, spread = makers
    for name, make in zip(_REGIMES, one_program, strict=False):
        plan = make(problem, device) if regime in (None, name) else None
        if plan is not None:
            return plan
        if regime == name:
            raise ValueError(
                f"the {name} regime has no room for {problem} in {device.shared_bytes:,} bytes"
            )
    return spread(problem, device)


def _none(problem: Problem, device: Device) -> None:
    """Stand for a regime that has no such layer."""


def obstacle(problem: Problem, device: Device) -> str | None:
    """Say why the kernels cannot compute such a layer of an LSTM; None if they can.

    Raises:
        ValueError: the overridden regime cannot compute it.
    """
    spec = problem.spec
    plans = forward_plan(problem, device), backward_plan(problem, device)
    if all(plan.regime in ("registers", "sequence") for plan in plans):
        return None
    if spec.layer_norm:
        return f"layer_norm needs all units in one program, {_one_program(problem)}"
    if spec.zoneout[1] and spec.proj_size:
        return f"zoneout of a projected h needs all units in one program, {_one_program(problem)}"
    return None


def missing(problem: Problem, device: Device) -> str | None:
    """Say what regime of the forward pass a layer would get if only Triton's Gluon had all of it.

    None where that would be no other. How the backend explains it: "not with the ...".
    """
    whole = device._replace(gluon=True, clusters=True)
    plan = forward_plan(problem, whole)
    if plan == forward_plan(problem, device):
        return None
    return "weights in registers" if plan.regime == "registers" else "units spread over a cluster"


def no_room(problem: Problem, device: Device) -> str | None:
    """Say how many clusters a GPU has room for, where a layer would be spread over more of them.

    None where it would not, or they have room.
    """
    roomy = device._replace(processors=1 << 20, together=())
    wanted = forward_plan(problem, roomy)
    if wanted.regime != "cluster" or forward_plan(problem, device).regime == "cluster":
        return None
    count = device.at_once(wanted.blocks)
    return f"the GPU has room for {count} clusters of {wanted.blocks} blocks at a time"


def _one_program(problem: Problem) -> str:
    """Say what it takes that one program holds all units."""
    if problem.precision == "ieee":
        return 'float32 in TF32 (torch.backends.cudnn.rnn.fp32_precision = "tf32")'
    limit = f"H <= {widest(problem)}" + " in float32" * (problem.element == 4)
    units = problem.spec.hidden_size
    if max(units, problem.spec.state_size) > widest(problem):
        return f"{limit}, and there are {units}"
    return f"{limit} and a GPU of more shared memory"
