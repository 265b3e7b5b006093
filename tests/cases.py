"""A test case of the numerics: one LSTM call, its numbers, and three ways to compute it.

`evaluate` computes outputs and gradients, in any dtype, by `fast` (fastlstm.LSTM), `plain`
(torch.nn.LSTM) or `stepwise` (nn.LSTM one step at a time under masks, for lengths, resets and cell
states, which nn.LSTM lacks).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm

Results = dict[str, Tensor]

EVERY_BACKEND = pytest.mark.parametrize("backend", ["reference", "cpu", "triton"], indirect=True)

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
    wrt: tuple[str, ...] = ()
    through: tuple[str, ...] = ()

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
        """Whether nn.LSTM cannot take the call as it is."""
        return self.reset or self.cell_states or (bool(self.lengths) and not self.packed)

    def module(self, kind: type[nn.RNNBase], dtype: torch.dtype) -> nn.RNNBase:
        """A module of this case's shape; `kind` is fastlstm.LSTM or nn.LSTM."""
        return kind(
            self.I,
            self.H,
            self.layers,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.directions == 2,
            proj_size=self.proj,
            dtype=dtype,
        )

    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs, time-major; y and c_all of a packed case are rows [N, ...]."""
        P, stack = self.proj or self.H, self.layers * self.directions
        steps = (sum(self.lengths), 1) if self.packed else (self.T, self.B)
        shapes = {
            "y": (*steps, self.directions * P),
            "h_n": (stack, self.B, P),
            "c_n": (stack, self.B, self.H),
        }
        if self.cell_states:
            shapes["c_all"] = (*steps, self.directions * self.H)
        return shapes


def peer_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype PyTorch is measured in: float32 stands in for float64, see oracle.py."""
    return torch.float32 if dtype == torch.float64 else dtype


def draw(case: Case, dtype: torch.dtype) -> Results:
    """Every number of a case, in float64 but exact in `dtype`: parameters, x, hx, gradients."""
    torch.manual_seed(0)
    parameters = case.module(nn.LSTM, torch.float64).named_parameters()
    numbers = {f"w.{name}": p.detach() for name, p in parameters}
    for name, value in numbers.items():
        value *= case.bias_scale if ".bias" in name else case.weight_scale
    stack, P = case.layers * case.directions, case.proj or case.H
    numbers["x"] = torch.randn(case.T, case.B, case.I, dtype=torch.float64) * case.x_scale
    numbers["h0"] = torch.randn(stack, case.B, P, dtype=torch.float64) * case.x_scale
    numbers["c0"] = torch.randn(stack, case.B, case.H, dtype=torch.float64) * case.x_scale
    for name, shape in case.output_shapes().items():
        numbers[f"g.{name}"] = torch.randn(shape, dtype=torch.float64)
    return {name: value.to(peer_dtype(dtype)).double() for name, value in numbers.items()}


def draw_reset(case: Case) -> Tensor:
    """A bool [T, B] mask that restarts about every fourth step, rows out of phase, some at t=0."""
    t, b = torch.arange(case.T)[:, None], torch.arange(case.B)[None]
    return (3 * t + 5 * b) % 11 < 3


def fast(case: Case, lstm: nn.RNNBase, x: Tensor, hx: tuple[Tensor, Tensor] | None) -> Results:
    """The case through the module under test."""
    reset = draw_reset(case).to(x.device) if case.reset else None
    padded = case.lengths and not case.packed
    lengths = torch.tensor(case.lengths, device=x.device) if padded else None
    y, (h_n, c_n), *c_all = lstm(
        to_module(case, x),
        hx,
        lengths=lengths,
        reset=reset.transpose(0, 1) if reset is not None and case.batch_first else reset,
        return_cell_states=case.cell_states,
    )
    steps = zip(("y", "c_all"), (y, *c_all), strict=False)
    return {name: from_module(case, t) for name, t in steps} | {"h_n": h_n, "c_n": c_n}


def plain(case: Case, lstm: nn.RNNBase, x: Tensor, hx: tuple[Tensor, Tensor] | None) -> Results:
    """The case through torch.nn.LSTM in one call."""
    y, (h_n, c_n) = lstm(to_module(case, x), hx)
    return {"y": from_module(case, y), "h_n": h_n, "c_n": c_n}


def stepwise(case: Case, lstm: nn.RNNBase, x: Tensor, hx: tuple[Tensor, Tensor] | None) -> Results:
    """The case through torch.nn.LSTM, one layer, direction and step at a time, under masks."""
    lengths = torch.tensor(case.lengths or [case.T] * case.B, device=x.device)
    active = torch.arange(case.T, device=x.device)[:, None] < lengths  # [T, B]
    reset = draw_reset(case).to(x.device) if case.reset else torch.zeros_like(active)
    P, stack = case.proj or case.H, case.layers * case.directions
    h0, c0 = hx or (x.new_zeros(stack, case.B, P), x.new_zeros(stack, case.B, case.H))
    h_n, c_n, c_rows = [], [], []
    zero = x.new_zeros(())
    rows = torch.where(active[..., None], x, zero)
    for layer in range(case.layers):
        step = nn.LSTM(rows.shape[-1], case.H, bias=case.bias, proj_size=case.proj, dtype=x.dtype)
        step.to(x.device)
        h_rows, c_rows = [], []
        for direction in range(case.directions):
            suffix = f"_l{layer}" + "_reverse" * direction
            weights = {
                name.removesuffix(suffix) + "_l0": p
                for name, p in lstm.named_parameters()
                if name.endswith(suffix)
            }
            h, c = h0[len(h_n)], c0[len(c_n)]
            hs: list[Tensor] = [h] * case.T
            cs: list[Tensor] = [c] * case.T
            for t in reversed(range(case.T)) if direction else range(case.T):
                keep, now = ~reset[t, :, None], active[t, :, None]
                # A reset at a padded step has no state to restart: past its end a row is frozen.
                h_in, c_in = torch.where(keep, h, zero), torch.where(keep, c, zero)
                _, (h_new, c_new) = torch.func.functional_call(
                    step, weights, (rows[t : t + 1], (h_in[None], c_in[None]))
                )
                h, c = torch.where(now, h_new[0], h), torch.where(now, c_new[0], c)
                hs[t], cs[t] = torch.where(now, h, zero), torch.where(now, c, zero)
            h_n.append(h)
            c_n.append(c)
            h_rows.append(torch.stack(hs))
            c_rows.append(torch.stack(cs))
        rows = torch.cat(h_rows, -1)
    outputs = {"y": rows, "h_n": torch.stack(h_n), "c_n": torch.stack(c_n)}
    if case.cell_states:
        outputs["c_all"] = torch.cat(c_rows, -1)
    if case.packed:
        for name in outputs.keys() & {"y", "c_all"}:
            outputs[name] = pack(case, outputs[name]).data[:, None]
    return outputs


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
    lstm = case.module(fastlstm.LSTM if solver is fast else nn.LSTM, dtype)
    lstm.to(numbers["x"].device)
    lstm.load_state_dict({k[2:]: v for k, v in numbers.items() if k.startswith("w.")})
    leaves: dict[str, Tensor] = dict(lstm.named_parameters())
    leaves["x"] = LAYOUTS[case.x_layout](numbers["x"].to(dtype))
    if case.hx:
        leaves |= {k: LAYOUTS[case.hx_layout](numbers[k].to(dtype)) for k in ("h0", "c0")}
    wrt = case.wrt or tuple(leaves)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wrt)
    outputs = solver(case, lstm, leaves["x"], (leaves["h0"], leaves["c0"]) if case.hx else None)
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
