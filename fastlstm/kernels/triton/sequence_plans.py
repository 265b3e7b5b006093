"""Plans of the sequence regime: one program holds all units of a tile of sequences.

Every function here returns None where a layer has no room in one program.
"""

from __future__ import annotations

from itertools import product

from .plan import Device, Plan, Problem, padded

__all__ = ["backward_sequence", "forward_sequence", "rnn_sequence", "widest"]

_WIDEST_UNITS = 128  # with 16-bit numbers
_WIDEST_FLOAT32 = 64  # what fits with a w_hr spills
_ON_CHIP = "W_hh fits one multiprocessor"


def widest(problem: Problem) -> int:
    """Return the largest H and P of an LSTM that one program can hold on the largest GPU."""
    return _WIDEST_UNITS if problem.element == 2 else _WIDEST_FLOAT32


def _units(problem: Problem) -> int | None:
    """Return the units of a program if they can be all of them."""
    units = padded(problem.spec.hidden_size)
    states = padded(problem.spec.state_size)
    no_room = max(units, states) > widest(problem) or problem.precision == "ieee"
    return None if no_room else units


def _batches(problem: Problem, device: Device) -> tuple[int, ...]:
    """Return how many sequences a program may have, the best number first.

    16 is the narrowest tile that Hopper's own matrix instructions take in every version of the
    compiler; in a wider one the same activations would only wait for each other.
    """
    return (8,) if problem.B <= 8 and device.arch >= 90 else (16, 8)


def _weight_bytes(problem: Problem, units: int) -> int:
    """Return the bytes of w_hh, and of w_hr if there is one."""
    blocks = 5 if problem.spec.proj_size else 4
    return problem.element * units * padded(problem.spec.state_size) * blocks


def _fusible(problem: Problem, device: Device, units: int) -> bool:
    """Return whether the loop may read x itself.

    That costs barriers where x needs rounding on its way to the matrix instruction (TF32 on
    Hopper), and with eight warps. Less than a pair of 16-bit features cannot be copied ahead. Wide
    ones spill. Products that are normalised are not sums.
    """
    if problem.cell == "normalised" or units >= _WIDEST_UNITS:
        return False
    if problem.element == 4 and device.arch >= 90:
        return False
    I = problem.spec.input_size
    return problem.element * I % 4 == 0 and padded(I) <= 64


def forward_sequence(problem: Problem, device: Device) -> Plan | None:
    """Return the plan of the forward pass of an LSTM."""
    units = _units(problem)
    if units is None:
        return None
    element = problem.element
    states, features = padded(problem.spec.state_size), padded(problem.spec.input_size)
    # As many warps as leave rows of all four gates of a unit to each of them (primitives.py).
    warps = 8 if element == 4 and units == 64 else {16: 2, 32: 4, 64: 4, 128: 8}[units]
    forms = (True, False) if _fusible(problem, device, units) else (False,)
    # no wgmma for 16 units, and 16 sequences can spill
    batches = (8,) if units == 16 else _batches(problem, device)
    for fused, batch, stages in product(forms, batches, (3, 2)):
        # h as an operand, y and c on their way out
        room = batch * (element * states + 4 * units)
        if fused:
            room += element * features * (4 * units + stages * batch)
        else:
            room += 4 * 4 * units * batch * (stages - 1)
        if _weight_bytes(problem, units) + room <= device.shared_bytes:
            where = "so do its input weights" if fused else "its input products are made before"
            reason = f"{_ON_CHIP}, {where}"
            return Plan("sequence", units, batch, states, fused, warps, stages, reason)
    return None


def backward_sequence(problem: Problem, device: Device) -> Plan | None:
    """Return the plan of the backward pass of an LSTM."""
    units = _units(problem)
    if units is None:
        return None
    element, states = problem.element, padded(problem.spec.state_size)
    warps = {16: 2, 32: 4 if element == 2 else 8, 64: 8, 128: 8}[units]
    # What spills: 16 sequences of wide layers, and a pipeline that runs far ahead.
    wide = units == (64 if element == 4 else 128)
    extended = problem.cell != "plain"
    narrow = wide and (element == 4 or problem.spec.proj_size > 0 or extended)
    pipelines: tuple[int, ...] = (2, 1) if units == 16 and element == 2 else (3, 2, 1)
    if wide and element == 4 and device.arch >= 90:
        pipelines = (1,) if problem.spec.directions == 2 else (2, 1)
    if extended:
        pipelines = (1,)
    for stages, batch in product(pipelines, (8,) if narrow else _batches(problem, device)):
        # the gradients of the gates as an operand; of each stage gates, two cells and dy
        each = batch * (4 * 6 * units + element * states)
        room = batch * 4 * units * element + each * (stages - 1)
        if _weight_bytes(problem, units) + room <= device.shared_bytes:
            return Plan("sequence", units, batch, states, False, warps, stages, _ON_CHIP)
    return None


def rnn_sequence(problem: Problem, device: Device) -> Plan | None:
    """Return the plan of both passes of an ``nn.RNN``."""
    units, element = padded(problem.spec.hidden_size), problem.element
    # a quarter of the weights of an LSTM leaves room for twice the units
    if units > 2 * widest(problem) or problem.precision == "ieee":
        return None
    warps = {16: 1, 32: 2, 64: 4}.get(units, 8)
    for batch, stages in product(_batches(problem, device), (3, 2)):
        # h as an operand, y on its way out; of each stage x, or y and its gradient
        room = batch * units * (2 * element + 8 * (stages - 1))
        if element * units * units + room <= device.shared_bytes:
            return Plan("sequence", units, batch, units, False, warps, stages, _ON_CHIP)
    return None
