"""Second derivatives of a plain LSTM, with a sequence's products in one.

A gradient g of a layer is that of <incoming, outputs>. What goes back through g, times v, is the
derivative of g along v, and of the outputs along v, as second derivatives are symmetric: one pass
forwards in time and one backwards, both linear. Only h through w_hh is left inside of their loops.
Everything else is computed for all steps at once; autograd would do it a step at a time.

Letters: see :mod:`fastlstm.spec`. A dot in a comment is the derivative along v.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm.layer.call import Call, MaybeTensors
from fastlstm.layer.compute import forward
from fastlstm.spec import DENSE, NO_NOISE, Weights

__all__ = ["covers", "second_derivatives"]


def covers(call: Call, tensors: MaybeTensors) -> bool:
    """Whether :func:`second_derivatives` has formulas for a call with these tensors."""
    spec = call.spec
    plain = spec.is_lstm and not spec.is_extended and not spec.proj_size
    dense = call.sequences is DENSE and call.noise is NO_NOISE and not call.members
    wide = all(t is None or t.dtype in (torch.float32, torch.float64) for t in tensors)
    return plain and dense and wide and not call.cell_states and not torch.compiler.is_compiling()


def second_derivatives(
    call: Call, inputs: MaybeTensors, incoming: MaybeTensors, along: MaybeTensors
) -> list[Any]:
    """Return what goes back through the gradients of a layer.

    Args:
        call: what was computed.
        inputs: ``(x, h0, c0, *weights)``.
        incoming: the gradients ``(dy, dh_n, dc_n)`` that the layer had, None for zeros.
        along: what comes back into the gradient of each input; None for zeros.

    Returns:
        The gradients of the inputs, None for those that are None, then likewise of what was
        incoming.
    """
    # Again, as y may have been edited since; backward kept no more of it.
    y, _, _, c_all, *_ = forward(call._replace(recompute=True, cache=None), inputs, save=True)
    spec, T = call.spec, inputs[0].shape[0]
    groups = Weights.split(inputs[3:], spec), Weights.split(along[3:], spec)
    dx: Any = 0
    states: list[tuple[Tensor, ...]] = []
    of_weights: list[Tensor | None] = []
    ys = []
    for d, (w, v) in enumerate(zip(*groups, strict=True)):
        own = slice(d * spec.hidden_size, (d + 1) * spec.hidden_size)

        def turned(t: Any, d: int = d) -> Any:
            return t.flip(0) if d and t is not None else t

        def column(t: Any, own: slice = own, turned: Any = turned) -> Any:
            return None if t is None else turned(t[..., own])

        def at(t: Any, d: int = d) -> Any:
            return None if t is None else t[d]

        steps = _Steps.of(
            turned(inputs[0]), column(y), column(c_all), at(inputs[1]), at(inputs[2]), w
        )
        dz, dh, dc = _back(steps, w, column(incoming[0]), at(incoming[1]), at(incoming[2]))
        there = _there(steps, w, v, turned(along[0]), at(along[1]), at(along[2]))
        dz_dot, dh0, dc0 = _back_dot(steps, w, v, (dz, dh, dc), there)
        flat, flat_dot = dz.flatten(0, 1), dz_dot.flatten(0, 1)
        dx = dx + turned((flat_dot @ w.w_ih + _times(flat, v.w_ih)).view(T, -1, spec.input_size))
        bias = flat_dot.sum(0) if spec.bias else None
        of_weights += [
            flat_dot.T @ steps.x.flatten(0, 1) + _times(flat.T, _rows(turned(along[0]))),
            flat_dot.T @ steps.h.flatten(0, 1) + flat.T @ there[2].flatten(0, 1),
            *((bias, bias) if spec.bias else ()),
        ]
        ys.append(turned(there[0]))
        states.append((dh0, dc0, there[0][-1], there[1][-1]))
    dh0, dc0, h_n, c_n = map(torch.stack, zip(*states, strict=True))
    found = dx, dh0, dc0, *of_weights, torch.cat(ys, -1), h_n, c_n
    given = *inputs, *incoming
    return [None if t is None else g for t, g in zip(given, found, strict=True)]


class _Steps(NamedTuple):
    """The forward pass of one direction, all ``[T, B, ...]`` in its order."""

    x: Tensor
    h: Tensor  # before each step
    c: Tensor
    gates: tuple[Tensor, ...]  # i, f, g, o
    slopes: tuple[Tensor, ...]  # their derivatives by z, what is activated
    tanh_c: Tensor
    of_z: Tensor  # [T, B, 4H]: of c by z of i, f and g, and of h by z of o
    of_c: Tensor  # of h by c

    @classmethod
    def of(cls, x: Tensor, y: Tensor, c_all: Tensor, h0: Any, c0: Any, w: Weights) -> _Steps:
        zeros = torch.zeros_like(y[:1])
        h = torch.cat([zeros if h0 is None else h0[None], y[:-1]])
        c = torch.cat([zeros if c0 is None else c0[None], c_all[:-1]])
        z = (x @ w.w_ih.T).add_(h @ w.w_hh.T)
        if w.b_ih is not None and w.b_hh is not None:
            z += w.b_ih + w.b_hh
        i, f, g, o = z.chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        si, sf, so = (torch.addcmul(s, s, s, value=-1) for s in (i, f, o))
        slopes = si, sf, 1 - g * g, so
        tanh_c = c_all.tanh()
        factors = g, c, i, tanh_c
        of_z = torch.cat([a * b for a, b in zip(factors, slopes, strict=True)], -1)
        of_c = torch.addcmul(o, o * tanh_c, tanh_c, value=-1)
        return cls(x, h, c, (i, f, g, o), slopes, tanh_c, of_z, of_c)


def _back(
    steps: _Steps, w: Weights, dy: Any, dh_n: Any, dc_n: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of z ``[T, B, 4H]``, of h and of c, at every step."""
    f, zeros = steps.gates[1], torch.zeros_like(steps.c[0])
    dh = zeros if dh_n is None else dh_n
    dc = zeros if dc_n is None else dc_n
    dzs, dhs, dcs = [], [], []
    for t in reversed(range(f.shape[0])):
        if dy is not None:
            dh = dh + dy[t]
        dc = torch.addcmul(dc, dh, steps.of_c[t])
        dz = steps.of_z[t] * torch.cat([dc, dc, dc, dh], -1)
        dzs.append(dz)
        dhs.append(dh)
        dcs.append(dc)
        dh, dc = dz @ w.w_hh, dc * f[t]
    dz, dh, dc = (torch.stack(each[::-1]) for each in (dzs, dhs, dcs))
    return dz, dh, dc


def _there(
    steps: _Steps, w: Weights, v: Weights, vx: Any, vh0: Any, vc0: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The dots of h and c after each step, of h and c before it, and of z."""
    T, B, H = steps.c.shape
    fixed = _times(vx, w.w_ih.T) + _times(steps.x, v.w_ih, True) + _times(steps.h, v.w_hh, True)
    for b in (v.b_ih, v.b_hh):
        fixed = fixed if b is None else fixed + b
    fixed = steps.of_z.new_zeros(T, B, 4 * H) + fixed
    h = torch.zeros_like(steps.c[0]) if vh0 is None else vh0
    c = torch.zeros_like(steps.c[0]) if vc0 is None else vc0
    hs, cs, zs, f, w_hh = [h], [c], [], steps.gates[1], w.w_hh.T
    for t in range(T):
        z = torch.addmm(fixed[t], h, w_hh)
        parts = steps.of_z[t] * z
        c = torch.addcmul(parts[:, : 3 * H].view(B, 3, H).sum(1), f[t], c)
        h = torch.addcmul(parts[:, 3 * H :], steps.of_c[t], c)
        zs.append(z)
        hs.append(h)
        cs.append(c)
    h, c = torch.stack(hs), torch.stack(cs)
    return h[1:], c[1:], h[:-1], c[:-1], torch.stack(zs)


def _back_dot(
    steps: _Steps, w: Weights, v: Weights, back: tuple[Tensor, ...], there: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """The dots of what `_back` found: of z, and of h0 and c0."""
    dz, dh, dc = back
    _, c_after, _, c_before, z = there
    (i, f, g, o), (si, sf, sg, so) = steps.gates, steps.slopes
    zi, zf, zg, zo = z.chunk(4, -1)
    slope_c = 1 - steps.tanh_c * steps.tanh_c
    i_dot, f_dot, g_dot, o_dot, tanh_dot = si * zi, sf * zf, sg * zg, so * zo, slope_c * c_after
    of_z_dot = torch.cat(
        [
            torch.addcmul(g_dot * si, g * i_dot, torch.rsub(i, 1, alpha=2)),
            torch.addcmul(c_before * sf, steps.c * f_dot, torch.rsub(f, 1, alpha=2)),
            torch.addcmul(i_dot * sg, i * g, g_dot, value=-2),
            torch.addcmul(tanh_dot * so, steps.tanh_c * o_dot, torch.rsub(o, 1, alpha=2)),
        ],
        -1,
    )
    of_c_dot = torch.addcmul(o_dot * slope_c, o * steps.tanh_c, tanh_dot, value=-2)
    fixed = of_z_dot.mul_(torch.cat([dc, dc, dc, dh], -1))
    into_h, into_c, into_before = _times(dz, v.w_hh), dh * of_c_dot, dc * f_dot
    h, c = torch.zeros_like(dc[0]), torch.zeros_like(dc[0])
    zs = []
    for t in reversed(range(dz.shape[0])):
        c = torch.addcmul(c + into_c[t], h, steps.of_c[t])
        z = torch.addcmul(fixed[t], steps.of_z[t], torch.cat([c, c, c, h], -1))
        zs.append(z)
        h = z @ w.w_hh
        h = h if v.w_hh is None else h + into_h[t]
        c = torch.addcmul(into_before[t], c, f[t])
    return torch.stack(zs[::-1]), h, c


def _times(a: Any, b: Any, transposed: bool = False) -> Any:
    """a b, or a b^T; 0 where one of them is None."""
    if a is None or b is None:
        return 0
    return a @ (b.T if transposed else b)


def _rows(t: Any) -> Any:
    return None if t is None else t.flatten(0, 1)
