"""What extended cells add to a step: peepholes, normalisation, and the choices of zoneout.

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

from fastlstm.reference import LAYER_NORM_EPSILON
from fastlstm.spec import LayerSpec, Noise, Weights

from .primitives import activate, logistic, split_gates, tanh

_EPSILON = tl.constexpr(LAYER_NORM_EPSILON)  # of a variance


# A jitted function must not return None: Triton 3.6 cannot compile that. So the callers ask first
# whether the cell has what these load.


@triton.jit
def load_peepholes(w_ch, direction, unit, H: tl.constexpr):
    """Load those of i, f and o, ``[U, 1]`` each."""
    at = w_ch + direction * (3 * H) + unit[:, None]
    i = tl.load(at, (unit < H)[:, None], 0).to(tl.float32)
    f = tl.load(at + H, (unit < H)[:, None], 0).to(tl.float32)
    o = tl.load(at + 2 * H, (unit < H)[:, None], 0).to(tl.float32)
    return i, f, o


@triton.jit
def load_norms(ln_hh, ln_c, b_ln_c, direction, row, inside, unit, H: tl.constexpr):
    """Load what normalised products and cells are scaled with, as columns."""
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
    """Return i, f, g, o after activation, and the cell that they make of c: all ``[U, N]``.

    stacked is ``[4U, N]`` before activation, is_cell ``[4U, 1]``, peepholes ``[U, 1]`` or None, c
    ``[U, N]``.
    """
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
    """Go back through one step, from the gradients of c and of h before a projection.

    Gates, cells, dh and dc are ``[U, N]``; peepholes, gain_c and bias_c ``[U, 1]`` or None; unit
    ``[U]``. Returns ``[U, N]`` each: the gradients of i, f, g, o before activation and of
    c_before; what h is o times of; and, where c is normalised, the gradient of the result and c
    without gain and bias, else something of no use.
    """
    normalised, d_out = c, dh
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
def _sum_of_products(a, b):
    """Sum a b over rows: ``[1, N]`` of ``[M, N]``.

    Each product is rounded, for which it is an FMA of its own. Else a thread would add the rounded
    product of another to its own in one FMA, which does not round its own; the other thread does
    the opposite, and the two, which hold the same column, have different sums.
    """
    return tl.sum(tl.fma(a, b, 0.0), 0)[None, :]


@triton.jit
def normalise(values, inside, SIZE: tl.constexpr):
    """Bring columns of SIZE values (``inside [M, 1]`` of a tile) to mean 0 and variance 1.

    Returns them, ``[M, N]`` and 0 outside, and the factor ``[1, N]`` that made the variance 1.
    """
    mean = tl.sum(values, 0)[None, :] / SIZE
    centred = tl.where(inside, values - mean, 0.0)
    factor = 1.0 / tl.sqrt_rn(_sum_of_products(centred, centred) / SIZE + _EPSILON)
    return centred * factor, factor


@triton.jit
def normalise_gradient(d, normalised, factor, inside, SIZE: tl.constexpr):
    """Go back through :func:`normalise`; d ``[M, N]`` is 0 outside."""
    mean = tl.sum(d, 0)[None, :] / SIZE
    along = _sum_of_products(d, normalised) / SIZE
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
    """Hash the seed ``int64 [1]`` and a direction: uint32 ``[1]``."""
    value = tl.load(seed + tl.arange(0, 1))
    low = value.to(tl.uint32)
    return _mix(_mix(low + direction.to(tl.uint32)) + (value >> 32).to(tl.uint32))


@triton.jit
def zoneout_units(base, unit, WHICH: tl.constexpr):
    """Hash units ``[U]`` to uint32 ``[U, 1]``; WHICH is 0 for h, 1 for c."""
    return _mix(base + (2 * unit + WHICH).to(tl.uint32))[:, None]


@triton.jit
def zoneout_rows(base, t, n):
    """Hash step t and sequences n ``[N]`` to uint32 ``[1, N]``."""
    return _mix(_mix((base ^ 0x9E3779B9) + t.to(tl.uint32)) + n.to(tl.uint32))[None, :]


@triton.jit
def zone(before, after, zoneout, rows, units):
    """Return a state after zoneout, ``[U, N]``.

    With the keys of rows ``[1, N]`` and units ``[U, 1]`` it is a choice, and zoneout the number
    below whose hashes a unit stays; without, the expectation, and zoneout the probability.
    """
    if rows is None:
        result = zoneout * before + (1.0 - zoneout) * after
    else:
        stays = _mix(rows ^ units) < zoneout.to(tl.uint32)
        result = tl.where(stays, before, after)
    return result


@triton.jit
def zone_gradient(d, zoneout, rows, units):
    """Go back through :func:`zone`: return the gradients of before and after."""
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


def cell_arguments(spec: LayerSpec, weights: Sequence[Weights], noise: Noise) -> dict[str, Any]:
    """Return the arguments that tell a kernel which cell it computes, but for normalisation."""
    if not spec.is_extended:
        return _PLAIN
    return {
        "h_mask": noise.h_mask,
        "w_ch": _of_directions([each.w_ch for each in weights]),
        "seed": noise.seed if any(spec.zoneout) else None,
        "zoneout_c": _zoneout(spec.zoneout[0], noise.seed),
        "zoneout_h": _zoneout(spec.zoneout[1], noise.seed),
    }


def norm_arguments(weights: Sequence[Weights]) -> dict[str, Any]:
    """Return the arguments that tell a kernel how products and cells are normalised."""
    if weights[0].ln_hh is None:
        return _NO_NORMS
    return {
        "ln_hh": _of_directions([each.ln_hh for each in weights]),
        "ln_c": _of_directions([each.ln_c for each in weights]),
        "b_ln_c": _of_directions([each.b_ln_c for each in weights]),
    }


def _of_directions(weights: Sequence[Tensor | None]) -> Tensor | None:
    there = [w for w in weights if w is not None]
    return torch.stack(there) if there else None


def _zoneout(probability: float, seed: Tensor | None) -> float | int | None:
    """Return the probability, or with a seed the number below whose hashes a unit stays.

    Hashes are 32 bits in a signed integer: a larger one would be an argument of another type.
    """
    if not probability:
        return None
    if seed is None:
        return probability
    threshold = int(probability * 2**32)
    return threshold - (threshold >> 31 << 32)
