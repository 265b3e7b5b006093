"""What regularised cells add to a step: peepholes, normalisation, and the choices of zoneout.

:mod:`fastlstm.reference` defines them. All of it is optional: what a kernel is not given (None)
leaves no trace in what it compiles to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlstm.reference import Cell, Weights

from .primitives import activate, logistic, split_gates, tanh

_EPSILON = tl.constexpr(1e-5)  # of a variance


@triton.jit
def load_peepholes(w_ch, direction, unit, H: tl.constexpr):
    """``[U, 1]`` each, of i, f and o; None without peepholes."""
    i, f, o = None, None, None
    if w_ch is not None:
        at = w_ch + direction * (3 * H) + unit[:, None]
        i = tl.load(at, (unit < H)[:, None], 0).to(tl.float32)
        f = tl.load(at + H, (unit < H)[:, None], 0).to(tl.float32)
        o = tl.load(at + 2 * H, (unit < H)[:, None], 0).to(tl.float32)
    return i, f, o


@triton.jit
def load_norms(ln_hh, ln_c, b_ln_c, direction, row, inside, unit, H: tl.constexpr):
    """Columns of what normalised products and cells are scaled with; None where they are not."""
    gain, gain_c, bias_c = None, None, None
    if ln_hh is not None:
        gain = tl.load(ln_hh + direction * (4 * H) + row, inside, 0).to(tl.float32)[:, None]
        at = direction * H + unit
        gain_c = tl.load(ln_c + at, unit < H, 0).to(tl.float32)[:, None]
        bias_c = tl.load(b_ln_c + at, unit < H, 0).to(tl.float32)[:, None]
    return gain, gain_c, bias_c


@triton.jit
def gates_and_cell(
    stacked, is_cell, peep_i, peep_f, peep_o, c,
    UNITS: tl.constexpr, N: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """i, f, g, o after activation, and the cell that they make of c."""
    if peep_i is None:
        stacked = activate(stacked, is_cell, FAST)
        i, f, g, o = split_gates(stacked, UNITS, N)
        c_new = f * c + i * g
    else:
        i, f, g, o = split_gates(stacked, UNITS, N)
        i = logistic(i + peep_i * c, FAST)
        f = logistic(f + peep_f * c, FAST)
        g = tanh(g, FAST)
        c_new = f * c + i * g
        o = logistic(o + peep_o * c_new, FAST)
    return i, f, g, o, c_new


@triton.jit
def cell_gradients(
    i, f, g, o, c, c_before, dh, dc, peep_i, peep_f, peep_o, gain_c, bias_c, unit,
    H: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Back through one step, from the gradients of c and of h as it is before a projection.

    Returns the gradients of i, f, g, o before activation and of c_before; what h is o times of;
    and, where c is normalised, the gradient of the result and c without gain and bias, else None.
    """
    normalised, d_out = None, None
    if gain_c is None:
        tanh_c = tanh(c, FAST)
        dc += dh * o * (1.0 - tanh_c * tanh_c)
    else:
        inside = (unit < H)[:, None]
        normalised, factor = normalise(c, inside, H)
        tanh_c = tanh(normalised * gain_c + bias_c, FAST)
        d_out = dh * o * (1.0 - tanh_c * tanh_c)
        dc += normalise_gradient(d_out * gain_c, normalised, factor, inside, H)
    if peep_o is not None:
        dc += dh * tanh_c * o * (1.0 - o) * peep_o
    d_i = dc * g * i * (1.0 - i)
    d_f = dc * c_before * f * (1.0 - f)
    d_g = dc * i * (1.0 - g * g)
    d_o = dh * tanh_c * o * (1.0 - o)
    dc_before = dc * f
    if peep_i is not None:
        dc_before += d_i * peep_i + d_f * peep_f
    return d_i, d_f, d_g, d_o, dc_before, tanh_c, d_out, normalised


@triton.jit
def normalise(values, inside, SIZE: tl.constexpr):
    """Columns of SIZE values (``inside [M, 1]`` of a tile) to mean 0 and variance 1.

    Returns them, 0 outside, and the factor ``[1, N]`` that made the variance 1.
    """
    mean = tl.sum(values, 0)[None, :] / SIZE
    centred = tl.where(inside, values - mean, 0.0)
    factor = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0)[None, :] / SIZE + _EPSILON)
    return centred * factor, factor


@triton.jit
def normalise_gradient(d, normalised, factor, inside, SIZE: tl.constexpr):
    """Back through :func:`normalise`; d is 0 outside."""
    mean = tl.sum(d, 0)[None, :] / SIZE
    along = tl.sum(d * normalised, 0)[None, :] / SIZE
    return tl.where(inside, (d - mean - normalised * along) * factor, 0.0)


# Zoneout's choices are a hash of (seed, direction, step, sequence, unit), in uint32: forward and
# backward, here and in every other backend, find the same ones without keeping any.


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0x735A2D97
    x ^= x >> 15
    return x


@triton.jit
def zoneout_base(seed, direction):
    """uint32 [1], of a direction; None without a seed."""
    base = None
    if seed is not None:
        value = tl.load(seed + tl.arange(0, 1))
        low = value.to(tl.uint32)
        base = _mix(_mix(low + direction.to(tl.uint32)) + (value >> 32).to(tl.uint32))
    return base


@triton.jit
def zoneout_units(base, unit, WHICH: tl.constexpr):
    """uint32 [U, 1]; WHICH is 0 for h, 1 for c. None without a seed."""
    key = None
    if base is not None:
        key = _mix(base + (2 * unit + WHICH).to(tl.uint32))[:, None]
    return key


@triton.jit
def zoneout_rows(base, t, n):
    """uint32 [1, N], of sequences at a step; None without a seed."""
    key = None
    if base is not None:
        key = _mix(_mix((base ^ 0x9E3779B9) + t.to(tl.uint32)) + n.to(tl.uint32))[None, :]
    return key


@triton.jit
def zone(before, after, zoneout, rows, units):
    """A state after zoneout: with keys of rows and units a choice, else the expectation."""
    if rows is None:
        result = zoneout * before + (1.0 - zoneout) * after
    else:
        stays = _mix(rows ^ units) < zoneout.to(tl.uint32)
        result = tl.where(stays, before, after)
    return result


@triton.jit
def zone_gradient(d, zoneout, rows, units):
    """Back through :func:`zone`: the gradients of before and after."""
    if rows is None:
        before = zoneout * d
        after = (1.0 - zoneout) * d
    else:
        stays = _mix(rows ^ units) < zoneout.to(tl.uint32)
        before = tl.where(stays, d, 0.0)
        after = tl.where(stays, 0.0, d)
    return before, after


# Made once: the plain cell is launched most.
_PLAIN: dict[str, Any] = dict.fromkeys(("h_mask", "w_ch", "seed", "zoneout_c", "zoneout_h"))
_NO_NORMS: dict[str, Any] = dict.fromkeys(("ln_hh", "ln_c", "b_ln_c"))


def cell_arguments(cell: Cell, groups: Sequence[Weights]) -> dict[str, Any]:
    """What kernels are told of the cell, but for how it is normalised."""
    if cell.is_plain:
        return _PLAIN
    return {
        "h_mask": cell.h_mask,
        "w_ch": _of_directions([group.w_ch for group in groups]),
        "seed": cell.seed if any(cell.zoneout) else None,
        "zoneout_c": _zoneout(cell, 0),
        "zoneout_h": _zoneout(cell, 1),
    }


def norm_arguments(groups: Sequence[Weights]) -> dict[str, Any]:
    """And how."""
    if groups[0].ln_hh is None:
        return _NO_NORMS
    return {
        "ln_hh": _of_directions([group.ln_hh for group in groups]),
        "ln_c": _of_directions([group.ln_c for group in groups]),
        "b_ln_c": _of_directions([group.b_ln_c for group in groups]),
    }


def _of_directions(weights: Sequence[Tensor | None]) -> Tensor | None:
    there = [w for w in weights if w is not None]
    return torch.stack(there) if there else None


def _zoneout(cell: Cell, which: int) -> float | int | None:
    """The probability, or with a seed the hashes below which a unit stays.

    These are 32 bits in a signed integer: a larger one would be an argument of another type.
    """
    probability = cell.zoneout[which]
    if not probability:
        return None
    if cell.seed is None:
        return probability
    threshold = int(probability * 2**32)
    return threshold - (threshold >> 31 << 32)
