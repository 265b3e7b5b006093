"""Plans of the regimes persistent and steps: the units of a layer are spread over programs."""

from __future__ import annotations

from typing import NamedTuple

from .plan import Device, Plan, Problem, padded

__all__ = ["PERSISTENT_BY_DEFAULT", "backward_spread", "forward_spread", "rnn_spread"]

# The exchange of a persistent launch cannot be tested without a GPU: until it has been, it is
# chosen only by `override(regime="persistent")`, which the GPU tests and benchmarks use.
PERSISTENT_BY_DEFAULT = False

_STAGES = 3
_SPREAD = "W_hh is spread over programs"


class _Tile(NamedTuple):
    """The part of a layer that a program computes; fields as those of Plan."""

    units: int
    batch: int
    chunk: int
    warps: int


def forward_spread(problem: Problem, device: Device, regime: str | None) -> Plan:
    """Return the plan of the forward pass of an LSTM, in the regime if one is asked for.

    Raises:
        ValueError: the persistent regime, which was asked for, has no room.
    """
    chosen, tile = _choose(problem, device, regime, _forward_tiles(problem, device))
    if chosen == "persistent" and problem.element == 2:
        on_chip = _on_chip(problem, device)
        if on_chip is not None:
            return _plan(chosen, on_chip, f"{_SPREAD} and stays there", resident=True)
    return _plan(chosen, tile)


def backward_spread(problem: Problem, device: Device, regime: str | None) -> Plan:
    """Return the plan of the backward pass of an LSTM, in the regime if one is asked for.

    Raises:
        ValueError: the persistent regime, which was asked for, has no room.
    """
    return _plan(*_choose(problem, device, regime, _backward_tiles(problem, device)))


def rnn_spread(problem: Problem, device: Device, regime: str | None) -> Plan:
    """Return the plan of both passes of an ``nn.RNN``, in the regime if one is asked for.

    Raises:
        ValueError: the persistent regime was asked for.
    """
    if regime == "persistent":
        raise ValueError("the persistent regime has no nn.RNN")
    if problem.precision == "ieee":
        return _plan("steps", _Tile(64, 16, 16, 8))
    return _plan("steps", _Tile(64, 16, 128 // problem.element, 4))


def _plan(regime: str, tile: _Tile, reason: str = _SPREAD, resident: bool = False) -> Plan:
    units, batch, chunk, warps = tile
    return Plan(regime, units, batch, chunk, resident, False, warps, _STAGES, reason)


def _forward_tiles(problem: Problem, device: Device) -> list[_Tile]:
    """Return the tiles to try, the best first."""
    hopper = device.arch >= 90
    if problem.precision == "ieee" and problem.spec.state_size <= 16:
        # Of a single chunk LLVM makes vectors of which it loses count, and aborts, but not here.
        return [_Tile(16, 16, 16, 8)]
    if problem.precision == "ieee" and hopper:
        return [_Tile(32, 16, 16, 8), _Tile(32, 32, 16, 8)]
    if problem.precision == "ieee":
        return [_Tile(16, 16, 32, 8), _Tile(16, 32, 16, 8)]
    if problem.element == 4 and hopper:
        return [_Tile(16, 16, 32, 4), _Tile(32, 16, 32, 4), _Tile(32, 32, 32, 8)]
    if problem.element == 4:
        return [_Tile(16, 16, 16, 4), _Tile(32, 16, 32, 4), _Tile(64, 16, 32, 8)]
    if hopper:
        narrow = [_Tile(32, batch, 64, 4) for batch in (16, 32, 64)]
        return [*narrow, _Tile(32, 128, 64, 8)]
    # the tiles of both factors take registers too
    return [_Tile(32, 16, 32, 4), _Tile(32, 32, 64, 8), _Tile(32, 64, 32, 8)]


def _backward_tiles(problem: Problem, device: Device) -> list[_Tile]:
    """Return the tiles to try, the best first."""
    if problem.precision == "ieee":
        wide = _Tile(32, 32, 16, 8) if device.arch >= 90 else _Tile(16, 32, 32, 8)
        return [_Tile(16, 16, 64, 8), wide]
    if problem.element == 4:
        return [_Tile(32, 16, 64, 4), _Tile(32, 32, 32, 8)]
    return [_Tile(32, 16, 128, 4), _Tile(32, 32, 64, 8), _Tile(64, 64, 64, 8)]


def _choose(
    problem: Problem, device: Device, regime: str | None, tiles: list[_Tile]
) -> tuple[str, _Tile]:
    """Return the regime, and the first of the tiles whose programs are on the GPU together.

    Without one it is the last tile, of the steps regime.
    """
    wanted = regime or ("persistent" if PERSISTENT_BY_DEFAULT else "steps")
    first = next((tile for tile in tiles if _together(problem, device, tile)), None)
    # The cells of a projected layer need a second exchange in every step.
    simple = not problem.spec.proj_size and problem.cell == "plain"
    if wanted == "persistent" and simple and first is not None:
        return "persistent", first
    if regime == "persistent":
        raise ValueError(
            f"the persistent regime has no room for {problem} on {device.processors} "
            "multiprocessors"
        )
    return "steps", first or tiles[-1]


def _together(problem: Problem, device: Device, tile: _Tile) -> bool:
    """Return whether all programs of a launch are on the GPU at the same time."""
    spec = problem.spec
    tiles = -(-spec.hidden_size // tile.units) * -(-problem.B // tile.batch)
    return tiles * spec.directions <= device.processors


def _on_chip(problem: Problem, device: Device) -> _Tile | None:
    """Return the tile with which the 16-bit weights stay on chip; None if there is no room."""
    states = padded(problem.spec.state_size)
    for units, batch, warps in ((32, 16, 8), (32, 32, 8), (16, 16, 4)):
        tile = _Tile(units, batch, states, warps)
        # The weights of U units, h of N sequences, and the conversion between gates.
        room = 2 * states * (4 * units + batch) + 4 * 4 * units * batch
        fits = states <= 1024 // (units // 16) and room <= device.shared_bytes
        if fits and _together(problem, device, tile):
            return tile
    return None
