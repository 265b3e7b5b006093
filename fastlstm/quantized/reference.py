"""What a layer of 8-bit weights computes: plain PyTorch, one operation after the other.

The kernels give these very bits, on every instruction set, for every batch and number of threads.
It is for tests and for readers: slow, dense input only.

A row of activations x becomes 8-bit integers q with ``x = scale * (q - zero)``. Products of
integers are summed exactly. States, gates and everything else are float32; ``fused(a, b, c)`` is
a * b + c with one rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlstm.quantized.packing import from_panels, from_rows
from fastlstm.spec import LayerSpec

__all__ = ["layer"]

_STEP = torch.tensor(1.0) / 255
_TINY = torch.finfo(torch.float32).tiny


def layer(
    spec: LayerSpec,
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None = None,
    c0: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute one layer with int8 weights.

    Args:
        spec: what the layer is.
        x: ``[T, B, I]``, float32.
        weights: for each direction weight_ih, weight_hh, rows, and of a projection weight_hr and
            rows_hr, as in :mod:`fastlstm.quantized.packing`.
        h0: ``[D, B, P]``, None for zeros.
        c0: ``[D, B, H]``, None for zeros.

    Returns:
        ``y [T, B, D*P]``, ``h_n [D, B, P]`` and ``c_n [D, B, H]``, None of an RNN.
    """
    each, B = len(weights) // spec.directions, x.shape[1]
    ends = []
    for d in range(spec.directions):
        h = x.new_zeros(B, spec.state_size) if h0 is None else h0[d]
        c = x.new_zeros(B, spec.hidden_size) if c0 is None else c0[d]
        group = weights[d * each : (d + 1) * each]
        ends.append(_direction(spec, x.flip(0) if d else x, group, h, c))
    y = torch.cat([y.flip(0) if d else y for d, (y, _, _) in enumerate(ends)], 2)
    h_n, c_n = (torch.stack([end[k] for end in ends]) for k in (1, 2))
    return y, h_n, c_n if spec.is_lstm else None


def _direction(
    spec: LayerSpec, x: Tensor, weights: Sequence[Tensor], h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    G, H, P, I = spec.gates, spec.hidden_size, spec.state_size, spec.input_size
    w_ih, w_hh = from_panels(weights[0], G, H, I), from_panels(weights[1], G, H, P)
    scale_ih, _, scale_hh, _, bias = from_rows(weights[2], G, H)
    outputs = []
    for step in x:
        z = _product(step, w_ih, scale_ih, bias.expand(len(step), -1))
        z = _product(h, w_hh, scale_hh, z)
        h, c = _cell(spec, z, c)
        if spec.proj_size:
            w_hr = from_panels(weights[3], 1, P, H)
            h = _product(h, w_hr, from_rows(weights[4], 1, P)[0], h.new_zeros(len(h), P))
        outputs.append(h)
    return torch.stack(outputs), h, c


def _product(x: Tensor, w: Tensor, scale: Tensor, z: Tensor) -> Tensor:
    """Return ``z [B, R]`` plus the product of ``x [B, K]`` and ``scale * w [R, K]``."""
    q, zero, step = _quantize(x)
    sums = (q - zero).double() @ w.double().T  # exact: all integers are below 2^53
    return _fused(scale * step, _flush(sums.float()), z)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the integers of each row, its zero ``[B, 1]`` and its scale ``[B, 1]``."""
    low = x.amin(1, keepdim=True).clamp(max=0)
    high = x.amax(1, keepdim=True).clamp(min=0)
    scale = high * _STEP - low * _STEP
    scale = torch.where(x.isfinite().all(1, keepdim=True), scale, torch.nan)
    empty = scale < _TINY
    inverse = torch.where(empty, 0.0, 1 / scale)
    zero = -(low * inverse).round()
    q = ((x * inverse).round() + zero).clamp(0, 255)
    odd = scale.isnan()
    return q.where(~odd, 0.0), zero.where(~odd, 0.0), torch.where(empty, 0.0, scale)


def _cell(spec: LayerSpec, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next h before its projection, and the next c."""
    if spec.mode == "RNN_RELU":
        return torch.where(z < 0, 0.0, z), c
    if spec.mode == "RNN_TANH":
        t = _exp2_less_one(z)
        return _quotient(t, t + 2), c
    i, f, g, o = z.chunk(4, 1)
    t = _exp2_less_one(g)
    c = _quotient(c, _one_and_exp(f)) + _quotient(t, _one_and_exp(i) * (t + 2))
    t = _exp2_less_one(c)
    return _quotient(t, _one_and_exp(o) * (t + 2)), c


def _one_and_exp(x: Tensor) -> Tensor:
    """Return ``1 + exp(-x)``."""
    scale, fraction = _split_exp(-x.clamp(-40, 40))
    return _fused(scale, fraction, scale) + 1


def _exp2_less_one(x: Tensor) -> Tensor:
    """Return ``exp(2x) - 1``."""
    scale, fraction = _split_exp((x + x).clamp(-20, 20))
    return _fused(scale, fraction, scale - 1)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, for b in 1..2^96, by Newton's steps from a first guess."""
    one = torch.tensor(1.0)
    r = (0x7EF311C7 - b.view(torch.int32)).view(torch.float32)
    for _ in range(3):
        r = _fused(r, _fused(-b, r, one), r)
    q = _flush(a * r)
    return _fused(_fused(-b, q, a), r, q)


def _split_exp(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return a power of two and a fraction with ``exp(y) = power * (1 + fraction)``."""

    def number(text: str) -> Tensor:
        return torch.tensor(float.fromhex(text))

    n = _fused(y, number("0x1.715476p+0"), number("0x1.8p23") + 127) - (number("0x1.8p23") + 127)
    r = _fused(n, number("-0x1.62e400p-1"), y)
    r = _fused(n, number("-0x1.7f7d1cp-20"), r)
    p = number("0x1.6dbc66p-10")
    for term in ("0x1.124148p-7", "0x1.555454p-5", "0x1.555486p-3", "0x1p-1"):
        p = _fused(p, r, number(term))
    power = (n.nan_to_num().int() + 127 << 23).view(torch.float32)
    return power, _fused(r * r, p, r)


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a * b + c, rounded once.

    float64 holds the product exactly. Its sum with c is rounded to odd, which keeps the second
    rounding, to float32, from seeing a tie where there is none.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    even = total.view(torch.int64) % 2 == 0
    toward = torch.where(error > 0, torch.inf, -torch.inf).double()
    odd = torch.nextafter(total, toward)
    return _flush(torch.where((error != 0) & even & total.isfinite(), odd, total).float())


def _flush(x: Tensor) -> Tensor:
    """Denormal numbers count as zero."""
    return torch.where(x.abs() < _TINY, 0.0, x)
