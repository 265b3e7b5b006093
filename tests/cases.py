"""A test case of the numerics: one call of a layer, its numbers, and three ways to compute it.

`evaluate` computes outputs and gradients, in any dtype, by `fast` (fastlstm), `plain` (torch.nn)
or `stepwise` (one step at a time under masks, for all that nn.LSTM lacks: lengths, resets, cell
states, and the cells of textbook.py).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

import pytest
import textbook
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
from fastlstm.layer import stack
from fastlstm.proof.oracle import Results, peer_dtype
from fastlstm.spec import Noise

EVERY_BACKEND = pytest.mark.parametrize(
    "backend", ["reference", "cpu", "triton", "cuda"], indirect=True
)

# The same values at other strides; the "alike" ones repeat the first row, step or element.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "sliced": lambda t: t.repeat_interleave(2, 0).repeat_interleave(3, -1)[1::2, :, ::3],
    "rows_alike": lambda t: t[:, :1].expand_as(t),
    "steps_alike": lambda t: t[:1].expand_as(t),
    "all_alike": lambda t: t.flatten()[:1].view(1, 1, 1).expand_as(t),
}


@dataclass(frozen=True)
class Case:
    """One call. `lengths` alone means a padded batch, with `packed` a PackedSequence.

    `wrt` names the leaves that need a gradient (empty: all), `through` the outputs that have an
    incoming one (empty: all).
    """

    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    directions: int = 1
    proj: int = 0
    bias: bool = True
    batch_first: bool = False
    hx: bool = True
    lengths: tuple[int, ...] = ()
    packed: bool = False
    reset: bool = False
    cell_states: bool = False
    x_layout: str = "contiguous"
    hx_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    x_scale: float = 1.0
    weight_scale: float = 1.0
    bias_scale: float = 1.0
    values: str = "normal"  # "positive": no sum has terms of both signs; "constant": see `draw`
    wrt: tuple[str, ...] = ()
    through: tuple[str, ...] = ()
    kind: str = "LSTM"  # or "RNN_TANH", "RNN_RELU"
    peephole: bool = False
    layer_norm: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)
    noise: bool = False  # zoneout at random, and a recurrent dropout
    recompute: bool = False

    def __str__(self) -> str:
        sizes = f"T{self.T}-B{self.B}-I{self.I}-H{self.H}"
        extras = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)[4:]
            if getattr(self, f.name) != f.default
        ]
        return "-".join([sizes, *extras]).replace(" ", "")

    @property
    def ragged(self) -> bool:
        """Whether torch.nn cannot take the call as it is."""
        padded = bool(self.lengths) and not self.packed
        return self.reset or self.cell_states or padded or self.extended

    @property
    def extended(self) -> bool:
        """Whether its cell is one that torch.nn does not have."""
        return self.peephole or self.layer_norm or any(self.zoneout) or self.noise

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the initial states."""
        return ("h0", "c0") if self.kind == "LSTM" else ("h0",)

    def module(self, library: Any, dtype: torch.dtype) -> nn.RNNBase:
        """A module of this case's shape, from torch.nn or fastlstm."""
        options: dict[str, Any] = {
            "bias": self.bias,
            "batch_first": self.batch_first,
            "bidirectional": self.directions == 2,
            "dtype": dtype,
        }
        if self.kind != "LSTM":
            options["nonlinearity"] = self.kind.removeprefix("RNN_").lower()
            return library.RNN(self.I, self.H, self.layers, **options)
        if library is fastlstm:
            for name in ("peephole", "layer_norm", "zoneout", "recompute"):
                options[name] = getattr(self, name)
            options["recurrent_dropout"] = 0.5 if self.noise else 0.0
        return library.LSTM(self.I, self.H, self.layers, proj_size=self.proj, **options)

    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs, time-major; y and c_all of a packed case are rows [N, ...]."""
        P, stack = self.proj or self.H, self.layers * self.directions
        steps = (sum(self.lengths), 1) if self.packed else (self.T, self.B)
        shapes = {
            "y": (*steps, self.directions * P),
            "h_n": (stack, self.B, P),
        }
        if self.kind == "LSTM":
            shapes["c_n"] = (stack, self.B, self.H)
        if self.cell_states:
            shapes["c_all"] = (*steps, self.directions * self.H)
        return shapes


def draw(case: Case, dtype: torch.dtype) -> Results:
    """Every number of a case, in float64 but exact in `dtype`: parameters, x, hx, gradients.

    Constant ones are those of NVIDIA's RNN sample: weights 1 / H^2, everything else 1.
    """
    torch.manual_seed(0)
    library = fastlstm if case.extended else nn
    parameters = case.module(library, torch.float64).named_parameters()
    numbers = {f"w.{name}": p.detach() for name, p in parameters}
    for name, value in numbers.items():
        value *= case.bias_scale if ".bias" in name else case.weight_scale
        if "_ln_" in name:  # they begin as ones and zeros
            value += torch.randn_like(value) / 4
    stack, P = case.layers * case.directions, case.proj or case.H
    numbers["x"] = torch.randn(case.T, case.B, case.I, dtype=torch.float64) * case.x_scale
    numbers["h0"] = torch.randn(stack, case.B, P, dtype=torch.float64) * case.x_scale
    numbers["c0"] = torch.randn(stack, case.B, case.H, dtype=torch.float64) * case.x_scale
    for name, shape in case.output_shapes().items():
        numbers[f"g.{name}"] = torch.randn(shape, dtype=torch.float64)
    for name, value in numbers.items():
        if case.values == "positive":
            value.abs_()
        elif case.values == "constant":
            value.fill_(1 / case.H**2 if ".weight" in name else 1)
    return {name: value.to(peer_dtype(dtype)).double() for name, value in numbers.items()}


def draw_reset(case: Case) -> Tensor:
    """A bool [T, B] mask that restarts about every fourth step, rows out of phase, some at t=0."""
    t, b = torch.arange(case.T)[:, None], torch.arange(case.B)[None]
    return (3 * t + 5 * b) % 11 < 3


def noise_of(case: Case, layer: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors of h on its way into w_hh, [D, B, P], and the seed of zoneout."""
    shape = (case.directions, case.B, case.proj or case.H)
    u = torch.arange(torch.Size(shape).numel()).view(shape)
    return ((u * 7 + layer) % 5 > 1).to(wide) * 2, torch.tensor([2**40 * 77 + 12345 + layer])


def without_chance(case: Case, seen: list[Any]) -> Any:
    """Makes the module take the noise of the case instead of drawing its own."""

    def draw_noise(spec: Any, x: Tensor, batch: int, weights: Any, options: Any) -> Any:
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        h_mask, seed = noise_of(case, len(seen), wide)
        seen.append(spec)
        return Noise(h_mask.to(x.device), seed.to(x.device)), weights

    return mock.patch.object(stack, "_draw", draw_noise)


def fast(case: Case, rnn: nn.RNNBase, x: Tensor, hx: Any) -> Results:
    """The case through the module under test."""
    reset = draw_reset(case).to(x.device) if case.reset else None
    padded = case.lengths and not case.packed
    options: dict[str, Any] = {
        "lengths": torch.tensor(case.lengths, device=x.device) if padded else None,
        "reset": reset.transpose(0, 1) if reset is not None and case.batch_first else reset,
    }
    if case.cell_states:
        options["return_cell_states"] = True
    rnn.train(case.noise)
    with without_chance(case, []) if case.noise else nullcontext():
        y, final, *c_all = rnn(to_module(case, x), hx, **options)
    steps = zip(("y", "c_all"), (y, *c_all), strict=False)
    return {name: from_module(case, t) for name, t in steps} | final_states(final)


def plain(case: Case, rnn: nn.RNNBase, x: Tensor, hx: Any) -> Results:
    """The case through torch.nn in one call."""
    if hx is not None:  # cuDNN refuses states that are not contiguous
        hx = hx.contiguous() if isinstance(hx, Tensor) else tuple(h.contiguous() for h in hx)
    y, final = rnn(to_module(case, x), hx)
    return {"y": from_module(case, y)} | final_states(final)


def final_states(final: Any) -> Results:
    """What a module returned as its final state, by name."""
    return (
        {"h_n": final}
        if isinstance(final, Tensor)
        else dict(zip(("h_n", "c_n"), final, strict=True))
    )


def stepwise(case: Case, rnn: nn.RNNBase, x: Tensor, hx: Any) -> Results:
    """The case one layer, direction and step at a time, under masks."""
    lengths = torch.tensor(case.lengths or [case.T] * case.B, device=x.device)
    active = torch.arange(case.T, device=x.device)[:, None] < lengths  # [T, B]
    reset = draw_reset(case).to(x.device) if case.reset else torch.zeros_like(active)
    P, stack = case.proj or case.H, case.layers * case.directions
    starts = [x.new_zeros(stack, case.B, n) for n in (P, case.H)[: len(case.states)]]
    if hx is not None:
        starts = [h.contiguous() for h in ([hx] if isinstance(hx, Tensor) else hx)]
    finals: list[list[Tensor]] = [[] for _ in starts]
    zero = x.new_zeros(())
    rows = torch.where(active[..., None], x, zero)
    seen: list[list[Tensor]] = []
    for layer in range(case.layers):
        walks = []
        for direction in range(case.directions):
            suffix = f"_l{layer}" + "_reverse" * direction
            weights = {
                name.removesuffix(suffix): p
                for name, p in rnn.named_parameters()
                if name.endswith(suffix)
            }
            step = step_of(case, weights, rows.shape[-1], layer, direction, x)
            states = [start[len(finals[0])] for start in starts]
            outs = [[state] * case.T for state in states]
            for t in reversed(range(case.T)) if direction else range(case.T):
                keep, now = ~reset[t, :, None], active[t, :, None]
                # A reset at a padded step has no state to restart: past its end a row is frozen.
                new = step(rows[t], [torch.where(keep, s, zero) for s in states], t)
                states = [torch.where(now, n, s) for n, s in zip(new, states, strict=True)]
                for out, s in zip(outs, states, strict=True):
                    out[t] = torch.where(now, s, zero)
            for final, state in zip(finals, states, strict=True):
                final.append(state)
            walks.append([torch.stack(out) for out in outs])
        seen = [torch.cat(side, -1) for side in zip(*walks, strict=True)]
        rows = seen[0]
    outputs = {"y": rows}
    outputs |= {n: torch.stack(f) for n, f in zip(("h_n", "c_n"), finals, strict=False)}
    if case.cell_states:
        outputs["c_all"] = seen[1]
    if case.packed:
        for name in outputs.keys() & {"y", "c_all"}:
            outputs[name] = pack(case, outputs[name]).data[:, None]
    return outputs


def step_of(
    case: Case, weights: Results, features: int, layer: int, direction: int, x: Tensor
) -> Callable[[Tensor, list[Tensor], int], list[Tensor]]:
    """(x_t [B, I], states, t) -> the next states, by torch.nn or by the book."""
    if case.extended:
        noise = None
        if case.noise:
            wide = torch.float64 if x.dtype is torch.float64 else torch.float32
            h_mask, seed = noise_of(case, layer, wide)
            noise = h_mask[direction].to(x), int(seed), direction
        return lambda x_t, hc, t: textbook.step(weights, case.zoneout, noise, x_t, *hc, t)
    shape = Case(1, case.B, features, case.H, bias=case.bias, proj=case.proj, kind=case.kind)
    module = shape.module(nn, x.dtype).to(x.device)
    own = {name + "_l0": w for name, w in weights.items()}

    def step(x_t: Tensor, states: list[Tensor], t: int) -> list[Tensor]:
        hx = [state[None] for state in states]
        given = (x_t[None], tuple(hx) if case.kind == "LSTM" else hx[0])
        final = torch.func.functional_call(module, own, given)[1]
        return [state[0] for state in final_states(final).values()]

    return step


def pack(case: Case, x: Tensor) -> PackedSequence:
    """x [T, B, ...] as a PackedSequence of the case's lengths, in whatever order they come."""
    return pack_padded_sequence(x, torch.tensor(case.lengths), enforce_sorted=False)


def to_module(case: Case, x: Tensor) -> Tensor | PackedSequence:
    """x [T, B, I] in the form the case hands to a module."""
    if case.packed:
        return pack(case, x)
    return x.transpose(0, 1) if case.batch_first else x


def from_module(case: Case, y: Tensor | PackedSequence) -> Tensor:
    """What a module returned for every step, as [T, B, ...], or [N, 1, ...] of a packed case."""
    if isinstance(y, PackedSequence):
        return y.data[:, None]
    return y.transpose(0, 1) if case.batch_first else y


def evaluate(
    case: Case, dtype: torch.dtype, numbers: Results, solver: Callable[..., Results]
) -> Results:
    """Outputs and "d <leaf>" gradients of a case in `dtype`, as float64, where `numbers` are."""
    lstm = case.module(fastlstm if solver is fast or case.extended else nn, dtype)
    lstm.to(numbers["x"].device)
    lstm.load_state_dict({k[2:]: v for k, v in numbers.items() if k.startswith("w.")})
    leaves: dict[str, Tensor] = dict(lstm.named_parameters())
    leaves["x"] = LAYOUTS[case.x_layout](numbers["x"].to(dtype))
    hx: Any = None
    if case.hx:
        states = {k: LAYOUTS[case.hx_layout](numbers[k].to(dtype)) for k in case.states}
        leaves |= states
        hx = tuple(states.values()) if case.kind == "LSTM" else states["h0"]
    wrt = case.wrt or tuple(leaves)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wrt)
    outputs = solver(case, lstm, leaves["x"], hx)
    results = {name: value.detach().double() for name, value in outputs.items()}
    if torch.is_grad_enabled():
        through = case.through or tuple(outputs)
        incoming = [LAYOUTS[case.grad_layout](numbers[f"g.{n}"].to(dtype)) for n in through]
        gradients = torch.autograd.grad(
            [outputs[n] for n in through],
            [leaves[n] for n in wrt],
            incoming,
            allow_unused=True,  # c_n alone does not reach w_hr of the last step, for one
            materialize_grads=True,
        )
        results |= {f"d {n}": g.double() for n, g in zip(wrt, gradients, strict=True)}
    return results
