"""One recurrent layer in plain PyTorch: the definition that every kernel is tested against.

Letters: T time steps, B batch, I input size, H hidden size, P projected size (H without
projection), D directions, N rows of a packed sequence. Gate order is i, f, g, o.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["PLAIN", "Cell", "Weights", "lstm_layer", "rnn_layer"]

LAYER_NORM_EPSILON = 1e-5  # added to the variance, as in torch.nn.LayerNorm

States = tuple[Tensor, ...]
Step = Callable[[Tensor, States, int], States]


class Cell(NamedTuple):
    """What a step of an LSTM is; the defaults are the plain one."""

    peephole: bool = False  # the gates see c (Gers et al.)
    layer_norm: bool = False  # products and c are normalised (Ba et al.)
    h_mask: Tensor | None = None  # [D, B, P], times h on its way into w_hh (Gal & Ghahramani)
    zoneout: tuple[float, float] = (0.0, 0.0)  # probability that c, h stay (Krueger et al.)
    seed: Tensor | None = None  # int64 [1]: which of them stay; None for the expectation

    @property
    def is_plain(self) -> bool:
        return self.h_mask is None and not (self.peephole or self.layer_norm or any(self.zoneout))


PLAIN = Cell()


class Weights(NamedTuple):
    """The weights of one direction of an LSTM layer, in the order in which they are passed."""

    w_ih: Tensor  # [4H, I]
    w_hh: Tensor  # [4H, P]
    b_ih: Tensor | None  # [4H]
    b_hh: Tensor | None  # [4H]
    w_hr: Tensor | None  # [P, H], the projection
    w_ch: Tensor | None  # [3H], peepholes of i, f, o
    ln_ih: Tensor | None  # [4H], gains of normalised products
    ln_hh: Tensor | None  # [4H]
    ln_c: Tensor | None  # [H], gain of the normalised c
    b_ln_c: Tensor | None  # [H], and its bias

    @classmethod
    def of(cls, flat: Sequence[Any], cell: Cell) -> Weights:
        """A direction's share of the flat list of weights (or of their gradients), taken apart."""
        plain = len(flat) - cell.peephole - 4 * cell.layer_norm
        rest = iter(flat)
        optional = (plain > 3, plain > 3, plain % 2 == 1, cell.peephole, *(cell.layer_norm,) * 4)
        return cls(next(rest), next(rest), *(next(rest) if there else None for there in optional))


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
    cell: Cell = PLAIN,
    recompute: bool = False,
    cache: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run one layer in D directions; differentiable to any order, on any device.

    Args:
        x: ``[T, B, I]`` with any strides, or the ``[N, I]`` rows of a packed sequence.
        weights: D groups of ``w_ih [4H, I]``, ``w_hh [4H, P]``, then ``b_ih [4H]`` and
            ``b_hh [4H]`` if there are biases, then ``w_hr [P, H]`` if there is a projection, then
            what the cell needs: see :class:`Weights`.
        h0: ``[D, B, P]``, or None for zeros.
        c0: ``[D, B, H]``, or None for zeros.
        directions: D; direction 1 runs backwards in time, from each sequence's own end.
        batch_sizes: int64 ``[T]`` on the CPU, as in ``PackedSequence``; x is then packed.
        lengths: int64 ``[B]`` in 0..T; past its length a row has zero output, its state stays,
            and whatever x holds there reaches neither values nor gradients.
        reset: bool ``[T, B]``; True zeroes that row's h and c before the step.
        cell_states: also return c of every step.
        cell: what a step computes.
        recompute: not used here: autograd keeps what it needs.
        cache: not used here.

    16-bit input is computed in float32 throughout and rounded once, in the results.

    Returns:
        ``y [T, B, D*P]`` (or ``[N, D*P]``), ``h_n [D, B, P]``, ``c_n [D, B, H]`` and
        ``c_all [T, B, D*H]`` (or ``[N, D*H]``), which is None without ``cell_states``.
    """
    steps = _Steps.of(x, batch_sizes, lengths, reset)
    wide = _wide(x)
    runs = []
    for d, group in enumerate(_groups(weights, directions, wide)):
        w = Weights.of(group, cell)
        gates = linear(steps.x.to(wide), w.w_ih)
        if cell.layer_norm:
            gates = _normalised(gates, w.ln_ih)
        if w.b_ih is not None and w.b_hh is not None:
            gates = gates + (w.b_ih + w.b_hh)
        h = x.new_zeros(steps.batch, w.w_hh.shape[1]) if h0 is None else h0[d]
        c = x.new_zeros(steps.batch, w.w_hh.shape[0] // 4) if c0 is None else c0[d]
        runs.append(_scan(gates, (h.to(wide), c.to(wide)), _lstm_step(w, cell, d), steps, d == 1))
    (y, c_all), (h_n, c_n) = _join(runs, x.dtype)
    return y, h_n, c_n, c_all if cell_states else None


def rnn_layer(
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    *,
    relu: bool = False,
    directions: int = 1,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    cache: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one layer of ``nn.RNN``: h = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu of it.

    Arguments are those of :func:`lstm_layer`, but for D groups of ``w_ih [H, I]``,
    ``w_hh [H, H]``, then ``b_ih [H]`` and ``b_hh [H]`` if there are biases.

    Returns:
        ``y [T, B, D*H]`` (or ``[N, D*H]``) and ``h_n [D, B, H]``.
    """
    steps = _Steps.of(x, batch_sizes, lengths, reset)
    wide = _wide(x)
    runs = []
    for d, (w_ih, w_hh, *biases) in enumerate(_groups(weights, directions, wide)):
        inputs = linear(steps.x.to(wide), w_ih, biases[0] + biases[1] if biases else None)
        h = x.new_zeros(steps.batch, w_hh.shape[0]) if h0 is None else h0[d]
        runs.append(_scan(inputs, (h.to(wide),), _rnn_step(w_hh, relu), steps, d == 1))
    (y,), (h_n,) = _join(runs, x.dtype)
    return y, h_n


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _groups(weights: Sequence[Tensor], directions: int, dtype: torch.dtype) -> list[list[Tensor]]:
    each = len(weights) // directions
    wide = [w.to(dtype) for w in weights]
    return [wide[start : start + each] for start in range(0, len(wide), each)]


class _Steps(NamedTuple):
    """Which rows each step has."""

    x: Tensor  # [T, B, I], zero in padding, or [N, I]
    batch: int
    sizes: list[int] | None  # sequences of each step, of packed rows
    active: Tensor | None  # bool [T, B, 1], with lengths
    reset: Tensor | None  # bool [T, B, 1]

    @classmethod
    def of(
        cls, x: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None
    ) -> _Steps:
        if batch_sizes is not None:
            sizes = batch_sizes.tolist()
            return cls(x, sizes[0], sizes, None, None)
        active = None
        if lengths is not None:
            t = torch.arange(x.shape[0], device=x.device)
            active = (t[:, None] < lengths).unsqueeze(-1)
            x = torch.where(active, x, 0)
        reset = None if reset is None else reset.unsqueeze(-1)
        return cls(x, x.shape[1], None, active, reset)


def _scan(
    inputs: Tensor, states: States, step: Step, steps: _Steps, backwards: bool
) -> tuple[States, States]:
    """Walk one direction over its projected inputs ``[T, B, n]`` or ``[N, n]``.

    Returns the states of every step, ``[T, B, n]`` or ``[N, n]``, and the final ones.
    """
    each = inputs.unbind(0) if steps.sizes is None else inputs.split(steps.sizes)
    order = range(len(each))
    seen = []
    for t in reversed(order) if backwards else order:
        # States always hold all B rows. A packed step touches the first sizes[t] of them, so a
        # sequence that has ended (or, going backwards, not begun) keeps its state.
        rows = each[t].shape[0]
        before = tuple(s[:rows] for s in states)
        if steps.reset is not None:
            before = tuple(s.masked_fill(steps.reset[t], 0) for s in before)
        after = step(each[t], before, t)
        if steps.active is None:
            seen.append(after)
            states = tuple(
                torch.cat([new, old[rows:]]) if rows < old.shape[0] else new
                for new, old in zip(after, states, strict=True)
            )
        else:
            active = steps.active[t]
            seen.append(tuple(torch.where(active, new, 0) for new in after))
            states = tuple(
                torch.where(active, new, old) for new, old in zip(after, states, strict=True)
            )
    if backwards:
        seen.reverse()
    join = torch.stack if steps.sizes is None else torch.cat
    return tuple(join(values) for values in zip(*seen, strict=True)), states


def _join(runs: Sequence[tuple[States, States]], dtype: torch.dtype) -> tuple[States, States]:
    """The results of all directions: of every step side by side, the final ones stacked."""
    seen, final = zip(*runs, strict=True)
    return (
        tuple(torch.cat(values, -1).to(dtype) for values in zip(*seen, strict=True)),
        tuple(torch.stack(values).to(dtype) for values in zip(*final, strict=True)),
    )


def _rnn_step(w_hh: Tensor, relu: bool) -> Step:
    activation = torch.relu if relu else torch.tanh

    def step(inputs: Tensor, states: States, t: int) -> States:
        return (activation(inputs + linear(states[0], w_hh)),)

    return step


def _lstm_step(w: Weights, cell: Cell, direction: int) -> Step:
    h_mask = None if cell.h_mask is None else cell.h_mask[direction]
    stays = [
        _stays(p, cell.seed, direction, which) if p else None
        for which, p in enumerate(reversed(cell.zoneout))
    ]

    def step(gates: Tensor, states: States, t: int) -> States:
        h, c = states
        h_in = h if h_mask is None else h * h_mask[: h.shape[0]]
        recurrent = linear(h_in, w.w_hh)
        if cell.layer_norm:
            recurrent = _normalised(recurrent, w.ln_hh)
        i, f, g, o = (gates + recurrent).chunk(4, -1)
        if w.w_ch is not None:
            peep_i, peep_f, peep_o = w.w_ch.chunk(3)
            i, f = i + peep_i * c, f + peep_f * c
        c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        if w.w_ch is not None:
            o = o + peep_o * c_new
        hidden = _normalised(c_new, w.ln_c, w.b_ln_c) if cell.layer_norm else c_new
        h_new = o.sigmoid() * hidden.tanh()
        if w.w_hr is not None:
            h_new = linear(h_new, w.w_hr)
        stays_h, stays_c = stays
        if stays_h is not None:
            h_new = stays_h(h, h_new, t)
        if stays_c is not None:
            c_new = stays_c(c, c_new, t)
        return h_new, c_new

    return step


def _normalised(v: Tensor, gain: Any, bias: Tensor | None = None) -> Tensor:
    """Rows of mean 0 and variance 1, times gain, plus bias.

    Not torch's layer_norm, which is wrong from the third derivative on, in nested forward mode
    from the second (pytorch#175754, #196700).
    """
    v = v - v.mean(-1, keepdim=True)
    v = v * (v.square().mean(-1, keepdim=True) + LAYER_NORM_EPSILON).rsqrt() * gain
    return v if bias is None else v + bias


# The random numbers of zoneout: a hash of (seed, direction, step, sequence, unit), so that every
# backend, forward or backward, has the same ones without keeping any. uint32 arithmetic.
_BITS = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """Every bit of the result depends on every bit of x (int64 in 0..2^32-1); a bijection."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _BITS
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _BITS
    return x ^ (x >> 15)


def _stays(
    probability: float, seed: Tensor | None, direction: int, which: int
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """(before, after, t) -> what zoneout makes of them; ``which`` is 0 for h, 1 for c."""
    if seed is None:
        return lambda before, after, t: probability * before + (1 - probability) * after
    base = _mix((_mix(((seed & _BITS) + direction) & _BITS) + ((seed >> 32) & _BITS)) & _BITS)

    def zone(before: Tensor, after: Tensor, t: int) -> Tensor:
        b = torch.arange(before.shape[0], device=before.device)
        u = torch.arange(before.shape[1], device=before.device)
        row = _mix((_mix(((base ^ 0x9E3779B9) + t) & _BITS) + b) & _BITS)
        unit = _mix((base + 2 * u + which) & _BITS)
        stays = _mix(row[:, None] ^ unit) < int(probability * 2**32)
        return torch.where(stays, before, after)

    return zone
