"""nn.LSTM, eager and compiled, and the cell that people write by hand to have it compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..speed import memory
from ..speed.cases import Case
from ..speed.contender import Contender
from ..speed.update import Update
from ..speed.workload import Workload
from . import Provider

Call = Callable[..., tuple[Tensor, tuple[Tensor, Tensor]]]


class Plain(Provider):
    """nn.LSTM: cuDNN, oneDNN, or PyTorch's own loop."""

    name, label = "torch", "nn.LSTM"
    packages = ("torch",)

    def refuses(self, work: Workload) -> str | None:
        return refuses_step(work)

    def contender(self, work: Workload) -> Contender:
        module = copy(work.lstm)
        return from_module(module, work, caller(module, work))


class Compiled(Plain):
    """The same under torch.compile, which runs it outside of its graphs."""

    name, label = "torch-compiled", "nn.LSTM, compiled"

    def contender(self, work: Workload) -> Contender:
        module = copy(work.lstm)
        torch.compiler.reset()
        call = torch.compile(caller(module, work))
        return from_module(module, work, call)


class CellLoop(Plain):
    """A loop over time in Python, compiled as a whole: PyTorch unrolls it."""

    name, label = "cell-compiled", "cell loop, compiled"
    LONGEST = 32  # steps; the code grows with each, and so do the minutes of its compilation

    def refuses(self, work: Workload) -> str | None:
        if work.lengths is not None:
            return "no ragged batches"
        if len(work.x) * work.case.L * work.case.D > self.LONGEST:
            return f"unrolled by the compiler: up to {self.LONGEST} steps in all layers"
        return super().refuses(work)

    def contender(self, work: Workload) -> Contender:
        module = copy(work.lstm)
        torch.compiler.reset()
        loop = partial(cell_loop, dict(module.named_parameters()), work.case, reset=work.reset)
        return from_module(module, work, torch.compile(loop, fullgraph=True))


def copy(lstm: nn.LSTM, kind: Callable[..., nn.RNNBase] = nn.LSTM) -> nn.RNNBase:
    """A module of that kind with parameters of its own, equal to those of `lstm`."""
    weight = lstm.weight_ih_l0
    size = (lstm.input_size, lstm.hidden_size, lstm.num_layers)
    options = {"bidirectional": lstm.bidirectional, "dtype": weight.dtype, "device": weight.device}
    module = kind(*size, **options)
    module.load_state_dict(lstm.state_dict())
    return module


def refuses_step(work: Workload) -> str | None:
    """Why this work, if it is a step, has no meaning."""
    if work.mode == "step" and (work.case.D == 2 or work.lengths is not None):
        return "a stream has one direction and no lengths"
    return None


def refuses_all_but_plain(work: Workload) -> str | None:
    """Why this work is too much for who has one direction, no lengths and no resets."""
    if work.case.D == 2:
        return "one direction only"
    if work.lengths is not None:
        return "no ragged batches"
    if work.reset is not None:
        return "no resets"
    return refuses_step(work)


def from_module(module: nn.RNNBase, work: Workload, forward: Call | None = None) -> Contender:
    """The contender that calls `forward`, by default the module, as one calls nn.LSTM."""
    forward = module if forward is None else forward
    module.train(work.mode == "train")
    if work.mode == "train":
        return _training(module, work, forward)
    rows, carried = work.rows(work.x), work.state

    def results() -> dict[str, Tensor]:
        y, (h, c) = forward(rows, work.state)
        return {"y": work.padded(y), "h": h, "c": c}

    def infer() -> object:
        return forward(rows)

    def step() -> None:
        nonlocal carried
        _, carried = forward(rows, carried)

    call = step if work.mode == "step" else infer
    return Contender(call, results, rest=partial(memory.rest_bytes, module))


def _training(module: nn.RNNBase, work: Workload, forward: Call) -> Contender:
    rows = work.rows(work.x)
    leaves: dict[str, Tensor] = dict(module.named_parameters())
    if work.input_gradient:
        # A leaf of its own: contenders must not add up their gradients in one place.
        leaves["x"] = data(rows).clone().requires_grad_()
        rows = leaves["x"] if isinstance(rows, Tensor) else rows._replace(data=leaves["x"])
    assert work.dy is not None
    incoming = data(work.rows(work.dy))
    targets = list(leaves.values())
    update = Update(module.parameters())

    def there_and_back() -> Tensor:
        for leaf in targets:
            leaf.grad = None
        y, _ = forward(rows)
        data(y).backward(incoming)
        return y

    def call() -> None:
        there_and_back()
        update()

    def results() -> dict[str, Tensor]:
        update.undo()
        found = {"y": work.padded(there_and_back()).detach()}
        for name, leaf in leaves.items():
            gradient = leaf.grad
            assert gradient is not None
            if name == "x" and not isinstance(rows, Tensor):
                gradient = work.padded(rows._replace(data=gradient))
            found[f"gradient of {name}"] = gradient
        return found

    def kept() -> int:
        return memory.kept_bytes(lambda: forward(rows), [*module.parameters(), data(rows)])

    return Contender(call, results, kept=kept, rest=partial(memory.rest_bytes, module))


def data(rows: object) -> Tensor:
    """The tensor that holds the rows, packed or not."""
    return rows if isinstance(rows, Tensor) else rows.data  # type: ignore[attr-defined]


def caller(lstm: nn.RNNBase, work: Workload) -> Call:
    """The module, or what users of nn.LSTM do where rows start again: a call for each step.

    The states are masked before it, as in CleanRL's recurrent PPO.
    """
    reset = work.reset
    if reset is None:
        return lstm
    keep = (~reset)[:, None, :, None].to(lstm.weight_ih_l0)  # [T, 1, B, 1]

    def call(x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Any:
        zeros = x.new_zeros(lstm.num_layers, x.shape[1], lstm.hidden_size)
        h, c = state or (zeros, zeros)
        steps = []
        for x_t, kept in zip(x.split(1), keep, strict=True):
            y, (h, c) = lstm(x_t, (h * kept, c * kept))
            steps.append(y)
        return torch.cat(steps), (h, c)

    return call


def cell_loop(
    weights: dict[str, Tensor],
    case: Case,
    x: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    reset: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """An LSTM over x [T, B, I] written out, with the products of the input before the loop."""
    T, B, _ = x.shape
    rows, hs, cs = x, [], []
    for layer in range(case.L):
        outputs = []
        for direction in range(case.D):
            end = f"l{layer}{'_reverse' * direction}"
            w_ih, w_hh, b_ih, b_hh = (
                weights[f"{kind}_{end}"]
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            projected = nn.functional.linear(rows, w_ih, b_ih + b_hh)
            k = layer * case.D + direction
            zeros = x.new_zeros(B, case.H)
            h, c = (state[0][k], state[1][k]) if state else (zeros, zeros)
            steps = [zeros] * T
            for t in reversed(range(T)) if direction else range(T):
                if reset is not None:
                    keep = (~reset[t])[:, None]
                    h, c = h * keep, c * keep
                i, f, g, o = (projected[t] + h @ w_hh.t()).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                steps[t] = h
            outputs.append(torch.stack(steps))
            hs.append(h)
            cs.append(c)
        rows = torch.cat(outputs, 2)
    return rows, (torch.stack(hs), torch.stack(cs))
