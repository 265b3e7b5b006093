"""One recurrent layer in plain PyTorch: the definition that every kernel is tested against.

Letters: T time steps, B batch, I input size, H hidden size, P size of h (projected, or H), D
directions, N rows of a packed sequence. Gates are i, f, g, o, in this order. What the arguments
hold is described in :mod:`fastlstm.spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlstm.spec import DENSE, NO_NOISE, LayerSpec, Noise, Sequences, State, Weights

__all__ = ["LAYER_NORM_EPSILON", "layer", "lstm_layer", "rnn_layer"]

LAYER_NORM_EPSILON = 1e-5  # added to the variance, as in torch.nn.LayerNorm

States = tuple[Tensor, ...]
Step = Callable[[Tensor, States, int], States]


def layer(
    spec: LayerSpec,
    x: Tensor,
    weights: Sequence[Tensor],
    state: State = State(),  # noqa: B008
    sequences: Sequences = DENSE,
    noise: Noise = NO_NOISE,
    cell_states: bool = False,
) -> tuple[Tensor, State, Tensor | None]:
    """Run one layer in D directions; differentiable to any order, on any device.

    16-bit input is computed in float32 throughout and rounded once, in the results.

    Args:
        spec: what the layer is.
        x: ``[T, B, I]`` with any strides, or the ``[N, I]`` rows of a packed sequence.
        weights: D groups in the order of :class:`fastlstm.spec.Weights`.
        state: h ``[D, B, P]`` and c ``[D, B, H]`` before the first step; None for zeros.
        sequences: which steps there are. Past its length a row has zero output, its state stays,
            and whatever x holds there reaches neither values nor gradients.
        noise: what is random in the call.
        cell_states: also return c of every step, of an LSTM.

    Returns:
        y ``[T, B, D*P]`` (or ``[N, D*P]``), the state after the last step, and c of every step
        ``[T, B, D*H]`` (or ``[N, D*H]``) or None.
    """
    if spec.is_lstm:
        y, state, c_all = lstm_layer(spec, x, weights, state, sequences, noise)
        return y, state, c_all if cell_states else None
    y, h_n = rnn_layer(spec, x, weights, state.h, sequences)
    return y, State(h_n), None


def lstm_layer(
    spec: LayerSpec,
    x: Tensor,
    weights: Sequence[Tensor],
    state: State,
    sequences: Sequences,
    noise: Noise,
) -> tuple[Tensor, State, Tensor]:
    """Run one layer of an LSTM; arguments and results are those of :func:`layer`."""
    steps = _Steps.of(x, sequences)
    wide = _wide(x)
    runs = []
    for d, w in enumerate(Weights.split([w.to(wide) for w in weights], spec)):
        gates = linear(steps.x.to(wide), w.w_ih)
        if spec.layer_norm:
            gates = _normalised(gates, w.ln_ih)
        if w.b_ih is not None and w.b_hh is not None:
            gates = gates + (w.b_ih + w.b_hh)
        h = x.new_zeros(steps.batch, spec.state_size) if state.h is None else state.h[d]
        c = x.new_zeros(steps.batch, spec.hidden_size) if state.c is None else state.c[d]
        step = _lstm_step(w, spec, noise, d)
        runs.append(_scan(gates, (h.to(wide), c.to(wide)), step, steps, d == 1))
    (y, c_all), final = _join(runs, x.dtype)
    return y, State(*final), c_all


def rnn_layer(
    spec: LayerSpec,
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    sequences: Sequences,
) -> tuple[Tensor, Tensor]:
    """Run one layer of ``nn.RNN``: h = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu of it.

    Args:
        spec: what the layer is; its mode is "RNN_TANH" or "RNN_RELU".
        x: ``[T, B, I]`` with any strides, or the ``[N, I]`` rows of a packed sequence.
        weights: D groups of ``w_ih [H, I]``, ``w_hh [H, H]``, then ``b_ih [H]`` and ``b_hh [H]``
            if there are biases.
        h0: ``[D, B, H]``, or None for zeros.
        sequences: which steps there are.

    Returns:
        y ``[T, B, D*H]`` (or ``[N, D*H]``) and h_n ``[D, B, H]``.
    """
    steps = _Steps.of(x, sequences)
    wide = _wide(x)
    runs = []
    for d, w in enumerate(Weights.split([w.to(wide) for w in weights], spec)):
        bias = None if w.b_ih is None or w.b_hh is None else w.b_ih + w.b_hh
        inputs = linear(steps.x.to(wide), w.w_ih, bias)
        h = x.new_zeros(steps.batch, spec.hidden_size) if h0 is None else h0[d]
        step = _rnn_step(w.w_hh, torch.relu if spec.mode == "RNN_RELU" else torch.tanh)
        runs.append(_scan(inputs, (h.to(wide),), step, steps, d == 1))
    (y,), (h_n,) = _join(runs, x.dtype)
    return y, h_n


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


class _Steps(NamedTuple):
    """Which rows each step has."""

    x: Tensor  # [T, B, I], zero in padding, or [N, I]
    batch: int
    sizes: list[int] | None  # sequences of each step, of packed rows
    active: Tensor | None  # bool [T, B, 1], with lengths
    reset: Tensor | None  # bool [T, B, 1]

    @classmethod
    def of(cls, x: Tensor, sequences: Sequences) -> _Steps:
        batch_sizes, lengths, reset = sequences
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
    """Walk one direction over its input products ``[T, B, n]`` or ``[N, n]``.

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


def _rnn_step(w_hh: Tensor, activation: Callable[[Tensor], Tensor]) -> Step:
    def step(inputs: Tensor, states: States, t: int) -> States:
        return (activation(inputs + linear(states[0], w_hh)),)

    return step


def _lstm_step(w: Weights, spec: LayerSpec, noise: Noise, direction: int) -> Step:
    h_mask = None if noise.h_mask is None else noise.h_mask[direction]
    zone_h, zone_c = (
        _zone(p, noise.seed, direction, which) if p else None
        for which, p in enumerate(reversed(spec.zoneout))
    )

    def step(gates: Tensor, states: States, t: int) -> States:
        h, c = states
        h_in = h if h_mask is None else h * h_mask[: h.shape[0]]
        recurrent = linear(h_in, w.w_hh)
        if spec.layer_norm:
            recurrent = _normalised(recurrent, w.ln_hh)
        i, f, g, o = (gates + recurrent).chunk(4, -1)
        if w.w_ch is not None:
            peep_i, peep_f, peep_o = w.w_ch.chunk(3)
            i, f = i + peep_i * c, f + peep_f * c
        c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        if w.w_ch is not None:
            o = o + peep_o * c_new
        hidden = _normalised(c_new, w.ln_c, w.b_ln_c) if spec.layer_norm else c_new
        h_new = o.sigmoid() * hidden.tanh()
        if w.w_hr is not None:
            h_new = linear(h_new, w.w_hr)
        if zone_h is not None:
            h_new = zone_h(h, h_new, t)
        if zone_c is not None:
            c_new = zone_c(c, c_new, t)
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


def _zone(
    probability: float, seed: Tensor | None, direction: int, which: int
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Make the function (before, after, t) -> after zoneout; ``which`` is 0 for h, 1 for c."""
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
