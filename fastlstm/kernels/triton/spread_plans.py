"""Plans of the regime steps: the units of a layer are spread over programs."""

from __future__ import annotations

from typing import NamedTuple

from .plan import Device, Plan, Problem

__all__ = ["backward_spread", "forward_spread", "rnn_spread"]

_STAGES = 3
_SPREAD = "W_hh is spread over programs"


class _Tile(NamedTuple):
    """The part of a layer that a program computes; fields as those of Plan."""

    units: int
    batch: int
    chunk: int
    warps: int


def forward_spread(problem: Problem, device: Device) -> Plan:
    """Return the plan of the forward pass of an LSTM."""
    return _plan(_choose(problem, device, _forward_tiles(problem, device)))


def backward_spread(problem: Problem, device: Device) -> Plan:
    """Return the plan of the backward pass of an LSTM."""
    return _plan(_choose(problem, device, _backward_tiles(problem, device)))


def rnn_spread(problem: Problem, device: Device) -> Plan:
    """Return the plan of both passes of an ``nn.RNN``."""
    if problem.precision == "ieee":
        return _plan(_Tile(64, 16, 16, 8))
    return _plan(_Tile(64, 16, 128 // problem.element, 4))


def _plan(tile: _Tile) -> Plan:
    units, batch, chunk, warps = tile
    return Plan("steps", units, batch, chunk, False, warps, _STAGES, _SPREAD)


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


def _choose(problem: Problem, device: Device, tiles: list[_Tile]) -> _Tile:
    """Return the first of the tiles whose programs are on the GPU together, else the last one."""
    spec = problem.spec
    for tile in tiles:
        programs = -(-spec.hidden_size // tile.units) * -(-problem.B // tile.batch)
        if programs * spec.directions <= device.processors:
            return tile
    return tiles[-1]
