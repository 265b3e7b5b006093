"""One LSTM layer in plain PyTorch: the definition that every kernel is tested against.

Letters: T time steps, B batch, I input size, H hidden size, P projected size (H without
projection), D directions, N rows of a packed sequence. Gate order is i, f, g, o.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["lstm_layer"]


def lstm_layer(
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    *,
    directions: int = 1,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    cell_states: bool = False,
    cache: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run one layer in D directions; differentiable to any order, on any device.

    Args:
        x: ``[T, B, I]`` with any strides, or the ``[N, I]`` rows of a packed sequence.
        weights: D groups of ``w_ih [4H, I]``, ``w_hh [4H, P]``, then ``b_ih [4H]`` and
            ``b_hh [4H]`` if there are biases, then ``w_hr [P, H]`` if there is a projection.
        h0: ``[D, B, P]``, or None for zeros.
        c0: ``[D, B, H]``, or None for zeros.
        directions: D; direction 1 runs backwards in time, from each sequence's own end.
        batch_sizes: int64 ``[T]`` on the CPU, as in ``PackedSequence``; x is then packed.
        lengths: int64 ``[B]`` in 0..T; past its length a row has zero output, its state stays,
            and whatever x holds there reaches neither values nor gradients.
        reset: bool ``[T, B]``; True zeroes that row's h and c before the step.
        cell_states: also return c of every step.
        cache: not used here.

    16-bit input is computed in float32 throughout and rounded once, in the results.

    Returns:
        ``y [T, B, D*P]`` (or ``[N, D*P]``), ``h_n [D, B, P]``, ``c_n [D, B, H]`` and
        ``c_all [T, B, D*H]`` (or ``[N, D*H]``), which is None without ``cell_states``.
    """
    narrow = x.dtype
    wide = torch.float32 if narrow in (torch.float16, torch.bfloat16) else narrow
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    batch = x.shape[1] if sizes is None else sizes[0]
    active = None
    if lengths is not None:
        steps = torch.arange(x.shape[0], device=x.device)
        active = (steps[:, None] < lengths).unsqueeze(-1)  # [T, B, 1]
        x = torch.where(active, x, 0)

    count = len(weights) // directions
    results = []
    for direction in range(directions):
        group = [w.to(wide) for w in weights[direction * count : (direction + 1) * count]]
        w_ih, w_hh = group[:2]
        bias = group[2] + group[3] if count > 3 else None
        w_hr = group[-1] if count % 2 else None
        h = x.new_zeros(batch, w_hh.shape[1]) if h0 is None else h0[direction]
        c = x.new_zeros(batch, w_hh.shape[0] // 4) if c0 is None else c0[direction]
        gates = linear(x.to(wide), w_ih, bias)
        results.append(
            _scan(gates, h.to(wide), c.to(wide), w_hh, w_hr, sizes, active, reset, direction == 1)
        )

    ys, hs, cs, c_alls = zip(*results, strict=True)
    c_all = torch.cat(c_alls, -1).to(narrow) if cell_states else None
    y = torch.cat(ys, -1).to(narrow)
    return y, torch.stack(hs).to(narrow), torch.stack(cs).to(narrow), c_all


def _scan(
    gates: Tensor,
    h: Tensor,
    c: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    sizes: list[int] | None,
    active: Tensor | None,
    reset: Tensor | None,
    backwards: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Walk one direction over its input projections, ``gates [T, B, 4H]`` or ``[N, 4H]``."""
    steps = gates.unbind(0) if sizes is None else gates.split(sizes)
    order = range(len(steps))
    ys, c_all = [], []
    for t in reversed(order) if backwards else order:
        # h and c always hold all B rows. A packed step touches the first sizes[t] of them, so a
        # sequence that has ended (or, going backwards, not begun) keeps its state.
        rows = steps[t].shape[0]
        h_in, c_in = h[:rows], c[:rows]
        if reset is not None:
            h_in = h_in.masked_fill(reset[t, :, None], 0)
            c_in = c_in.masked_fill(reset[t, :, None], 0)
        h_out, c_out = _step(steps[t], h_in, c_in, w_hh, w_hr)
        if active is None:
            ys.append(h_out)
            c_all.append(c_out)
            h = torch.cat([h_out, h[rows:]]) if rows < h.shape[0] else h_out
            c = torch.cat([c_out, c[rows:]]) if rows < c.shape[0] else c_out
        else:
            ys.append(torch.where(active[t], h_out, 0))
            c_all.append(torch.where(active[t], c_out, 0))
            h = torch.where(active[t], h_out, h)
            c = torch.where(active[t], c_out, c)
    if backwards:
        ys.reverse()
        c_all.reverse()
    join = torch.stack if sizes is None else torch.cat
    return join(ys), h, c, join(c_all)


def _step(
    gates_x: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, w_hr: Tensor | None
) -> tuple[Tensor, Tensor]:
    i, f, g, o = (gates_x + linear(h, w_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else linear(h, w_hr)), c
