"""One call, small and complete, by any backend: results and gradients, as float64 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastlstm.backends import backend
from fastlstm.functional import lstm, rnn
from fastlstm.modules import LSTM, RNN
from fastlstm.proof.oracle import Results, peer_dtype

__all__ = ["Problem", "draw", "run", "run_stepwise"]


@dataclass(frozen=True)
class Problem:
    """A call of one layer, and which of its features it is about."""

    feature: str
    T: int
    B: int
    I: int
    H: int
    directions: int = 1
    mode: str = "LSTM"
    lengths: tuple[int, ...] = ()
    packed: bool = False  # by lengths, the longest first
    reset: bool = False
    cell_states: bool = False
    hx: bool = True
    options: dict[str, Any] = field(default_factory=dict)  # of the module

    @property
    def extended(self) -> bool:
        """Whether torch.nn has no such cell."""
        return bool(self.options.keys() - {"proj_size"})

    @property
    def ragged(self) -> bool:
        """Whether torch.nn has no such call."""
        padded = bool(self.lengths) and not self.packed
        return self.extended or self.reset or self.cell_states or padded

    def module(self) -> Any:
        """Make the module, in training if it has a dropout."""
        two = self.directions == 2
        if self.mode == "LSTM":
            made = LSTM(self.I, self.H, bidirectional=two, **self.options)
            return made.train(self.training)
        name = self.mode.removeprefix("RNN_").lower()
        return RNN(self.I, self.H, bidirectional=two, nonlinearity=name)

    @property
    def training(self) -> bool:
        """Whether a dropout shall act; a zoneout that draws would be another at every call."""
        return "recurrent_dropout" in self.options

    @property
    def states(self) -> tuple[str, ...]:
        """Return the names of the initial states; none where the call leaves them out."""
        return ("h0", "c0")[: 1 + (self.mode == "LSTM")] if self.hx else ()

    @property
    def resets(self) -> Tensor:
        """Return bool ``[T, B]``: about every fourth step, rows out of phase, some at t = 0."""
        t, b = torch.arange(self.T)[:, None], torch.arange(self.B)[None]
        return (3 * t + 5 * b) % 11 < 3

    @property
    def batch_sizes(self) -> Tensor:
        """Return how many sequences have each step."""
        return (torch.arange(self.T)[:, None] < torch.tensor(self.lengths)).sum(1)


def draw(problem: Problem, dtype: torch.dtype, seed: int = 0) -> Results:
    """Draw every number of a call, float64 and exact in dtype."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"w.{name}": w.shape for name, w in problem.module().named_parameters()}
    D, P = problem.directions, problem.options.get("proj_size", problem.H)
    rows = (sum(problem.lengths),) if problem.packed else (problem.T, problem.B)
    shapes["x"] = torch.Size((*rows, problem.I))
    shapes["g.y"], shapes["g.h_n"] = torch.Size((*rows, D * P)), torch.Size((D, problem.B, P))
    if problem.mode == "LSTM":
        shapes["g.c_n"] = torch.Size((D, problem.B, problem.H))
    for state in problem.states:
        shapes[state] = shapes[f"g.{state[0]}_n"]
    if problem.cell_states:
        shapes["g.c_all"] = torch.Size((*rows, D * problem.H))
    numbers = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        scale = problem.H**-0.5 if name.startswith("w.") else 1.0
        numbers[name] = (value * scale).to(peer_dtype(dtype)).double()
    return numbers


def run(
    problem: Problem,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    numbers: Results,
    before: Results | None = None,
) -> Results:
    """Compute a call on a backend; results of a call without gradients count too.

    Args:
        problem: the call.
        name: of the backend.
        dtype: in which.
        device: on which.
        numbers: what :func:`draw` returned.
        before: the numbers of another call of the same module, made first: what a kernel keeps of
            it must not show.
    """
    module = problem.module().to(device, dtype)
    with backend(name):
        if before is not None:
            _load(module, before)
            with torch.no_grad():
                _call(problem, module, *_inputs(problem, before, dtype, device))
        _load(module, numbers)
        x, hx = _inputs(problem, numbers, dtype, device)
        with torch.enable_grad():
            found = _call(problem, module, x, hx)
            results = _with_gradients(found, (x, *hx), module, numbers)
        with torch.no_grad():
            quick = _call(problem, module, x, hx)
    return results | {f"{key} without gradients": t.double().cpu() for key, t in quick.items()}


def _load(module: Any, numbers: Results) -> None:
    module.load_state_dict({k[2:]: v for k, v in numbers.items() if k.startswith("w.")})


def _call(problem: Problem, module: Any, x: Tensor, hx: tuple[Tensor, ...]) -> Results:
    """What the module returns, by name."""
    rows: Any = PackedSequence(x, problem.batch_sizes) if problem.packed else x
    options: dict[str, Any] = {}
    if problem.lengths and not problem.packed:
        options["lengths"] = torch.tensor(problem.lengths, device=x.device)
    if problem.reset:
        options["reset"] = problem.resets.to(x.device)
    if problem.cell_states:
        options["return_cell_states"] = True
    given: Any = None
    if hx:
        given = hx if problem.mode == "LSTM" else hx[0]
    y, final, *c_all = module(rows, given, **options)
    states = final if problem.mode == "LSTM" else (final,)
    found = {"y": y.data if problem.packed else y}
    found |= dict(zip(("h_n", "c_n"), states, strict=False))
    return found | ({"c_all": c_all[0]} if c_all else {})


def run_stepwise(
    problem: Problem, name: str, dtype: torch.dtype, device: torch.device, numbers: Results
) -> Results:
    """Compute a call one step at a time under masks, by a backend that need not know of them."""
    module = problem.module().to(device, dtype)
    _load(module, numbers)
    x, hx = _inputs(problem, numbers, dtype, device)
    with backend(name), torch.enable_grad():
        found = _walk(problem, module, x, hx)
        results = _with_gradients(found, (x, *hx), module, numbers)
    return results | {f"{key} without gradients": results[key] for key in found}


def _walk(problem: Problem, module: Any, x: Tensor, hx: Sequence[Tensor]) -> Results:
    lengths = torch.tensor(problem.lengths or [problem.T] * problem.B, device=x.device)
    each = len(list(module.parameters())) // problem.directions
    weights = list(module.parameters())
    sides = []
    P = problem.options.get("proj_size", problem.H)
    zeros = [x.new_zeros(problem.directions, problem.B, n) for n in (P, problem.H)]
    hx = hx or zeros[: 1 + (problem.mode == "LSTM")]
    for d in range(problem.directions):
        states = [state[d : d + 1] for state in hx]
        seen: list[Any] = [None] * problem.T
        order = range(problem.T)
        for t in reversed(order) if d else order:
            active = (t < lengths)[None, :, None]
            if problem.reset:
                stays = ~problem.resets[t].to(x.device)[None, :, None]
                states = [torch.where(stays, state, 0) for state in states]
            row = torch.where(active, x[t : t + 1], 0)
            new = _step(problem, row, states, weights[d * each : (d + 1) * each])
            states = [torch.where(active, n, s) for n, s in zip(new, states, strict=True)]
            seen[t] = [torch.where(active, s, 0) for s in states]
        sides.append(([torch.cat(steps) for steps in zip(*seen, strict=True)], states))
    found = {"y": torch.cat([seen[0] for seen, _ in sides], -1)}
    for k, key in enumerate(("h_n", "c_n")[: len(hx)]):
        found[key] = torch.cat([states[k] for _, states in sides])
    if problem.cell_states:
        found["c_all"] = torch.cat([seen[1] for seen, _ in sides], -1)
    return found


def _step(
    problem: Problem, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The states after one step of one direction."""
    if problem.mode != "LSTM":
        name = problem.mode.removeprefix("RNN_").lower()
        return (rnn(x, states[0], weights, nonlinearity=name)[1],)
    options = {k: v for k, v in problem.options.items() if k != "proj_size"}
    h, c = states
    final: Any = lstm(x, (h, c), weights, training=problem.training, **options)[1]
    return final


def _inputs(
    problem: Problem, numbers: Results, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, tuple[Tensor, ...]]:
    names = ("x", *problem.states)
    x, *hx = (numbers[name].to(device, dtype).requires_grad_() for name in names)
    return x, tuple(hx)


def _with_gradients(
    found: Results, data: Sequence[Tensor], module: Any, numbers: Results
) -> Results:
    """The results of a call, and the gradients of everything that went in."""
    leaves = dict(zip(("x", "h0", "c0"), data, strict=False)) | dict(module.named_parameters())
    gradients = torch.autograd.grad(
        list(found.values()),
        list(leaves.values()),
        [numbers[f"g.{name}"].to(t) for name, t in found.items()],
        allow_unused=True,
        materialize_grads=True,
    )
    results = {name: t.detach().double().cpu() for name, t in found.items()}
    pairs = zip(leaves, gradients, strict=True)
    return results | {f"gradient of {name}": g.double().cpu() for name, g in pairs}
