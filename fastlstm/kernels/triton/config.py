"""Which kernel computes a layer, in which tiles: a pure function of the shape and the GPU.

Three regimes:

- ``sequence``: one program per direction and tile of sequences takes all steps; W_hh stays on
  chip. Wherever it fits.
- ``persistent``: the units are spread over programs that are on the GPU together and exchange
  every step through L2; one launch for all steps.
- ``steps``: the same kernel, one launch for every step.

The choices follow from what compiling ahead of time shows (``python -m benchmarks kernels``:
registers, spills, shared memory, barriers); none of them has been timed on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from fastlstm.reference import Cell

__all__ = [
    "Device",
    "Plan",
    "Shape",
    "backward_plan",
    "forward_plan",
    "obstacle",
    "override",
    "padded",
    "rnn_plan",
]

# The exchange of a persistent launch cannot be tested without a GPU: until it has been, it is
# chosen only by `override(regime="persistent")`, which the GPU tests and benchmarks use.
PERSISTENT_BY_DEFAULT = False

# Bytes of shared memory one program may use, by compute capability.
_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227}
_SHARED_ELSEWHERE = 99
_SMALLEST_DOT = 16
_WIDEST_UNITS = 128  # of the sequence regime
_WIDEST_FLOAT32 = 64  # the same; what fits with a w_hr spills


class Device(NamedTuple):
    """What a plan needs to know of a GPU."""

    arch: int  # compute capability, 10 * major + minor
    processors: int  # streaming multiprocessors

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one program may use."""
        return _SHARED.get(self.arch, _SHARED_ELSEWHERE) * 1024


class Shape(NamedTuple):
    """One layer: sizes, and the bytes of an element of x and the weights (2 or 4)."""

    T: int
    B: int
    I: int
    H: int
    P: int
    D: int
    element: int
    precision: str  # of products of float32: "tf32" or "ieee"; "tf32" stands for 16 bit too
    cell: str = "plain"  # or "extended", with more to hold in registers; or "normalised" as well

    @property
    def projected(self) -> bool:
        """Whether there is a w_hr: nn.LSTM projects to fewer than H."""
        return self.P != self.H


@dataclass(frozen=True)
class Plan:
    """A regime and its tiles."""

    regime: str  # "sequence", "persistent" or "steps"
    units: int  # units of a program: the tile is four times as high; 16 or more
    batch: int  # sequences of a program
    chunk: int  # terms of the product loaded at a time; covers P where the weights stay on chip
    resident: bool  # whether they do
    fused: bool  # x is projected in the loop, not in a product of its own before it
    warps: int
    stages: int  # of the pipeline that loads
    reason: str

    def __str__(self) -> str:
        return self.described(gates=4)

    def described(self, gates: int) -> str:
        """In words, for units of so many gates."""
        tile = f"{self.regime}: {gates * self.units} x {self.batch} tiles, {self.warps} warps"
        where = "weights on chip" if self.resident else f"weights in chunks of {self.chunk}"
        return f"{tile}, {where}"


# For the whole process: autograd runs backward in a thread of its own.
_changes: dict[str, Any] = {}


@contextmanager
def override(**changes: Any) -> Iterator[None]:
    """Change fields of every plan that the process makes in this block, for tests and tuning.

    ``regime`` restricts the choice; the other fields of :class:`Plan` replace what was chosen.

    Raises:
        ValueError: there is no such field or regime.
    """
    unknown = changes.keys() - Plan.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"override(): a plan has no {', '.join(sorted(unknown))}")
    if changes.get("regime", "steps") not in ("sequence", "persistent", "steps"):
        raise ValueError(f"override(): {changes['regime']!r} is not a regime")
    global _changes
    before = _changes
    _changes = {**before, **changes}
    try:
        yield
    finally:
        _changes = before


def padded(size: int) -> int:
    """The tile that holds `size`: a power of two that a matrix instruction can take."""
    return max(_SMALLEST_DOT, 1 << (size - 1).bit_length())


def forward_plan(shape: Shape, device: Device) -> Plan:
    """The plan of the forward pass; there is one for every shape.

    Raises:
        ValueError: the overridden regime cannot compute this shape.
    """
    return _plan((_forward_sequence, _forward_spread), shape, device)


def backward_plan(shape: Shape, device: Device) -> Plan:
    """The plan of the backward pass; it need not have the regime of the forward pass.

    Raises:
        ValueError: the overridden regime cannot compute this shape.
    """
    return _plan((_backward_sequence, _backward_spread), shape, device)


def rnn_plan(shape: Shape, device: Device) -> Plan:
    """The plan of both passes of nn.RNN; its tile is as high as a program has units.

    Raises:
        ValueError: the overridden regime cannot compute this shape.
    """
    return _plan((_rnn_sequence, _rnn_spread), shape, device)


def _plan(makers: Any, shape: Shape, device: Device) -> Plan:
    if not _changes:
        return _choose(makers, shape, device, None)
    changes = dict(_changes)
    plan = replace(_choose(makers, shape, device, changes.pop("regime", None)), **changes)
    if plan.resident and plan.chunk < shape.P:
        raise ValueError(
            f"override(): weights on chip need a chunk of {shape.P}, got {plan.chunk}"
        )
    return plan


@lru_cache(maxsize=1024)  # looked up at every launch, by the few shapes of a program
def _choose(makers: Any, shape: Shape, device: Device, regime: str | None) -> Plan:
    sequence, spread = makers
    plan = sequence(shape, device) if regime in (None, "sequence") else None
    if plan is None and regime == "sequence":
        raise ValueError(
            f"the sequence regime has no room for {shape} in {device.shared_bytes:,} bytes"
        )
    return plan or spread(shape, device, regime)


def obstacle(shape: Shape, device: Device, cell: Cell) -> str | None:
    """Why the kernels cannot compute layers of this cell; None if they can.

    Raises:
        ValueError: the overridden regime cannot compute this shape.
    """
    plans = forward_plan(shape, device), backward_plan(shape, device)
    if all(plan.regime == "sequence" for plan in plans):
        return None
    if cell.layer_norm:
        return f"layer_norm needs all units in one program, {_one_program(shape)}"
    if cell.zoneout[1] and shape.projected:
        return f"zoneout of a projected h needs all units in one program, {_one_program(shape)}"
    return None


def _one_program(shape: Shape) -> str:
    """What it takes that one program holds all units."""
    if shape.precision == "ieee":
        return 'float32 in TF32 (torch.backends.cudnn.rnn.fp32_precision = "tf32")'
    limit = f"H <= {_widest(shape)}" + " in float32" * (shape.element == 4)
    if max(shape.H, shape.P) > _widest(shape):
        return f"{limit}, and there are {shape.H}"
    return f"{limit} and a GPU of more shared memory"


def _widest(shape: Shape) -> int:
    return _WIDEST_UNITS if shape.element == 2 else _WIDEST_FLOAT32


def _sequence_units(shape: Shape) -> int | None:
    """The units of a program if they can be all of them."""
    units = max(padded(shape.H), padded(shape.P))
    return None if units > _widest(shape) or shape.precision == "ieee" else padded(shape.H)


def _sequence_batches(shape: Shape, device: Device) -> tuple[int, ...]:
    """Sequences of a program, the best first.

    16 is the narrowest tile that Hopper's own matrix instructions take in every version of the
    compiler; in a wider one the same activations would only wait for each other.
    """
    return (8,) if shape.B <= 8 and device.arch >= 90 else (16, 8)


def _forward_sequence(shape: Shape, device: Device) -> Plan | None:
    units, states, features = _sequence_units(shape), padded(shape.P), padded(shape.I)
    if units is None:
        return None
    weights = shape.element * units * states * (5 if shape.projected else 4)
    # Fused costs barriers where x needs rounding on its way to the matrix instruction (TF32 on
    # Hopper), and with eight warps. Less than a pair of 16-bit features cannot be copied ahead.
    # Wide ones spill. Products that are normalised are not sums.
    fusible = shape.cell != "normalised" and units < _WIDEST_UNITS
    fusible = fusible and not (shape.element == 4 and device.arch >= 90)
    fusible = fusible and shape.element * shape.I % 4 == 0 and features <= 64
    # As many warps as leave rows of all four gates of a unit to each of them (primitives.py).
    warps = 8 if shape.element == 4 and units == 64 else {16: 2, 32: 4, 64: 4, 128: 8}[units]
    batches = (8,) if units == 16 else _sequence_batches(shape, device)  # no wgmma, 16 can spill
    for fused, batch, stages in product((True, False) if fusible else (False,), batches, (3, 2)):
        # h as an operand, y and c on their way out
        room = batch * (shape.element * states + 4 * units)
        if fused:
            room += shape.element * features * (4 * units + stages * batch)
        else:
            room += 4 * 4 * units * batch * (stages - 1)
        if weights + room <= device.shared_bytes:
            where = "so do its input weights" if fused else "its input is projected before"
            return Plan(
                "sequence", units, batch, states, True, fused, warps, stages,
                f"W_hh fits one multiprocessor, {where}",
            )  # fmt: skip
    return None


def _backward_sequence(shape: Shape, device: Device) -> Plan | None:
    units, states = _sequence_units(shape), padded(shape.P)
    if units is None:
        return None
    warps = {16: 2, 32: 4 if shape.element == 2 else 8, 64: 8, 128: 8}[units]
    weights = shape.element * units * states * (5 if shape.projected else 4)
    # What spills: 16 sequences of wide layers, and a pipeline that runs far ahead.
    wide = units == (64 if shape.element == 4 else 128)
    extended = shape.cell != "plain"
    narrow = wide and (shape.element == 4 or shape.projected or extended)
    pipelines: tuple[int, ...] = (2, 1) if units == 16 and shape.element == 2 else (3, 2, 1)
    if wide and shape.element == 4 and device.arch >= 90:
        pipelines = (1,) if shape.D == 2 else (2, 1)
    if extended:
        pipelines = (1,)
    for stages, batch in product(pipelines, (8,) if narrow else _sequence_batches(shape, device)):
        # the gradients of the gates as an operand; of each stage gates, two cells and dy
        each = batch * (4 * 6 * units + shape.element * states)
        room = batch * 4 * units * shape.element + each * (stages - 1)
        if weights + room <= device.shared_bytes:
            return Plan(
                "sequence", units, batch, states, True, False, warps, stages,
                "W_hh fits one multiprocessor",
            )  # fmt: skip
    return None


def _persistent_fits(shape: Shape, device: Device, units: int, batch: int) -> bool:
    programs = -(-shape.H // units) * -(-shape.B // batch) * shape.D
    return programs <= device.processors


def _spread(
    shape: Shape, device: Device, regime: str | None, tiles: list[tuple[int, int, int, int]]
) -> tuple[str, tuple[int, int, int, int]]:
    """The regime, and the first of the tiles (units, batch, chunk, warps) to fit it."""
    wanted = regime or ("persistent" if PERSISTENT_BY_DEFAULT else "steps")
    # The cells of a projected layer need a second exchange in every step.
    if wanted == "persistent" and not shape.projected and shape.cell == "plain":
        for tile in tiles:
            if _persistent_fits(shape, device, tile[0], tile[1]):
                return "persistent", tile
    if regime == "persistent":
        raise ValueError(
            f"the persistent regime has no room for {shape} on {device.processors} multiprocessors"
        )
    for tile in tiles:
        if _persistent_fits(shape, device, tile[0], tile[1]):
            return "steps", tile
    return "steps", tiles[-1]


def _forward_spread(shape: Shape, device: Device, regime: str | None) -> Plan:
    if shape.precision == "ieee" and shape.P <= 16:
        # Of a single chunk LLVM makes vectors of which it loses count, and aborts, but not here.
        tiles = [(16, 16, 16, 8)]
    elif shape.precision == "ieee" and device.arch >= 90:
        tiles = [(32, 16, 16, 8), (32, 32, 16, 8)]
    elif shape.precision == "ieee":
        tiles = [(16, 16, 32, 8), (16, 32, 16, 8)]
    elif shape.element == 4 and device.arch >= 90:
        tiles = [(16, 16, 32, 4), (32, 16, 32, 4), (32, 32, 32, 8)]
    elif shape.element == 4:
        tiles = [(16, 16, 16, 4), (32, 16, 32, 4), (64, 16, 32, 8)]
    elif device.arch >= 90:
        tiles = [(32, 16, 64, 4), (32, 32, 64, 4), (32, 64, 64, 4), (32, 128, 64, 8)]
    else:  # the tiles of both factors take registers too
        tiles = [(32, 16, 64, 4), (32, 32, 64, 8), (32, 64, 32, 8)]
    chosen, tile = _spread(shape, device, regime, tiles)
    units, batch, chunk, warps = tile
    states = padded(shape.P)
    reason = "W_hh is spread over programs"
    if chosen == "persistent" and shape.element == 2:
        # On chip: the weights of U units, h of N sequences, and the conversion between gates.
        for on_chip in ((32, 16, states, 8), (32, 32, states, 8), (16, 16, states, 4)):
            u, n = on_chip[:2]
            room = 2 * states * (4 * u + n) + 4 * 4 * u * n
            if states <= 1024 // (u // 16) and room <= device.shared_bytes:
                if _persistent_fits(shape, device, u, n):
                    units, batch, chunk, warps = on_chip
                    return Plan(
                        chosen,
                        units,
                        batch,
                        chunk,
                        True,
                        False,
                        warps,
                        3,
                        f"{reason} and stays there",
                    )
    return Plan(chosen, units, batch, chunk, False, False, warps, 3, reason)


def _backward_spread(shape: Shape, device: Device, regime: str | None) -> Plan:
    if shape.precision == "ieee":
        tiles = [(16, 16, 64, 8), (32, 32, 16, 8) if device.arch >= 90 else (16, 32, 32, 8)]
    elif shape.element == 4:
        tiles = [(32, 16, 64, 4), (32, 32, 32, 8)]
    else:
        tiles = [(32, 16, 128, 4), (32, 32, 64, 8), (64, 64, 64, 8)]
    chosen, (units, batch, chunk, warps) = _spread(shape, device, regime, tiles)
    return Plan(
        chosen, units, batch, chunk, False, False, warps, 3, "W_hh is spread over programs"
    )


def _rnn_sequence(shape: Shape, device: Device) -> Plan | None:
    units = padded(shape.H)
    widest = 256 if shape.element == 2 else 128
    if units > widest or shape.precision == "ieee":
        return None
    warps = {16: 1, 32: 2, 64: 4}.get(units, 8)
    for batch, stages in product(_sequence_batches(shape, device), (3, 2)):
        # h as an operand, y on its way out; of each stage x, or y and its gradient
        room = batch * units * (2 * shape.element + 8 * (stages - 1))
        if shape.element * units * units + room <= device.shared_bytes:
            return Plan(
                "sequence", units, batch, units, True, False, warps, stages,
                "W_hh fits one multiprocessor",
            )  # fmt: skip
    return None


def _rnn_spread(shape: Shape, device: Device, regime: str | None) -> Plan:
    if regime == "persistent":
        raise ValueError("the persistent regime has no nn.RNN")
    chunk = 16 if shape.precision == "ieee" else 128 // shape.element
    warps = 8 if shape.precision == "ieee" else 4
    return Plan("steps", 64, 16, chunk, False, False, warps, 3, "W_hh is spread over programs")
