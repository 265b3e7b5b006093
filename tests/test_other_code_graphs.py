"""What other people's code does with the graph of a call: hooks, edits, missing gradients.

Each test is named after what a user does. The yardstick is ``torch.nn`` on the same lines.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm

T, B, I, H = 4, 3, 5, 8
X = torch.linspace(-1, 1, H)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "double": ("LSTM", {"dtype": torch.float64}),
    "batch first": ("LSTM", {"batch_first": True}),
    "projected": ("LSTM", {"proj_size": 3}),
    "bidirectional": ("LSTM", {"bidirectional": True}),
    "two layers": ("LSTM", {"num_layers": 2}),
    "rnn": ("RNN", {}),
}


def pair(kind: str = "LSTM", **options: Any) -> tuple[Any, Any]:
    """A module of torch.nn and the same of this library."""
    theirs = getattr(nn, kind)(I, H, **options)
    return theirs, getattr(fastlstm, kind).from_torch(copy.deepcopy(theirs))


def states(last: Any) -> tuple[Tensor, ...]:
    return last if isinstance(last, tuple) else (last,)


# ---- hooks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "loss"),
    [(kind, loss) for kind in KINDS for loss in ("yh" if kind == "rnn" else "yhc")],
)
def test_hooks_of_final_states_that_the_loss_does_not_use(
    backend: str, kind: str, loss: str
) -> None:
    """They are not called; those of the others see the gradient that nn's see."""
    name, options = KINDS[kind]
    x, found = torch.randn(T, B, I, dtype=options.get("dtype")), []
    for module in pair(name, **options):
        seen: dict[str, Tensor] = {}
        y, last = module(x)
        given = dict(zip("yhc", (y, *states(last)), strict=False))
        for which, state in list(given.items())[1:]:
            state.retain_grad()

            def clip(grad: Tensor, which: str = which, seen: dict[str, Tensor] = seen) -> Tensor:
                seen[which] = grad.clone()
                return grad.clamp(-0.5, 0.5)

            state.register_hook(clip)
        given[loss].sum().backward()
        kept = {which: state.grad for which, state in list(given.items())[1:]}
        found.append((seen, kept, [p.grad for p in module.parameters()]))
    torch.testing.assert_close(found[1], found[0])


def test_clipping_the_states_between_chunks_of_a_sequence(backend: str) -> None:
    x, found = torch.randn(3, T, B, I), []
    for module in pair():
        hx, total = None, torch.zeros(())
        for chunk in x:
            y, hx = module(chunk, hx)
            for state in hx:
                state.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
            total = total + y.sum()
        total.backward()
        found.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("packed", [False, True])
def test_detaching_final_states_in_place(backend: str, packed: bool) -> None:
    """As loops over chunks do; the output keeps its graph."""
    x, found = torch.randn(T, B, I), []
    for module in pair():
        y, hx = module(pack_padded_sequence(x, [4, 2, 1]) if packed else x)
        for state in hx:
            state.detach_()
            assert not state.requires_grad
        (y.data if packed else y).sum().backward()
        found.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(found[1], found[0])


def test_editing_final_states_in_place(backend: str) -> None:
    x, found = torch.randn(T, B, I), []
    for module in pair():
        y, (h, c) = module(x)
        h.mul_(2)
        c[:, 1:].zero_()
        (y.sum() + h.square().sum() + c.square().sum()).backward()
        found.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(found[1], found[0])


# ---- gradients that are not there ---------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_a_projection_that_the_loss_does_not_depend_on(
    backend: str, packed: bool, options: dict[str, bool], steps: int
) -> None:
    """c of one step has not gone through it: None, which optimizers leave out, and no zeros."""
    x, found = torch.randn(steps, B, I), []
    for module in pair(proj_size=3, **options):
        given = pack_padded_sequence(x, [steps] * B) if packed else x
        module(given)[1][1].sum().backward()
        found.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(found[1], found[0])


# ---- cells --------------------------------------------------------------------------------------


def test_editing_the_weights_of_a_cell_between_steps(backend: str) -> None:
    """The first step needs no weight in backward; the others do, and say so."""
    x, found = torch.randn(3, B, I), []
    for cell in pair_of_cells():
        hx = cell(x[0])
        with torch.no_grad():
            cell.weight_hh.mul_(0.5)
        hx = cell(x[1], hx)
        cell(x[2], hx)[0].sum().backward()
        found.append([p.grad for p in cell.parameters()])
        hx = cell(x[1], cell(x[0]))
        with torch.no_grad():
            cell.weight_hh.mul_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            hx[0].sum().backward()
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_deriving_twice_after_an_edit_of_the_weights_of_a_cell(backend: str) -> None:
    """nn.LSTMCell has kept what it needs; a kernel would compute the step from other weights."""
    _, cell = pair_of_cells()
    h, _ = cell(torch.randn(B, I))
    with torch.no_grad():
        cell.weight_hh.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(h.sum(), cell.weight_ih, create_graph=True)


def pair_of_cells() -> tuple[Any, Any]:
    theirs = nn.LSTMCell(I, H)
    return theirs, fastlstm.LSTMCell.from_torch(copy.deepcopy(theirs))


# ---- batch_first --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_filling_one_buffer_again_and_again(backend: str, kind: str) -> None:
    """As decoders do that write every output into the next input; nn has made a copy of it."""
    found = []
    first = torch.randn(B, 2, I)
    for module in pair(kind, batch_first=True):
        rows, total = torch.zeros(B, T, I), torch.zeros(())
        rows[:, :2] = first
        for t in range(2, T):
            y, _ = module(rows[:, :t])
            total = total + y.square().sum()
            rows[:, t] = y[:, -1, :I].detach()
        rows.zero_()
        total.backward()
        found.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"lengths": torch.tensor([4, 2, 1])}], ids=str)
def test_editing_what_a_frozen_layer_returned(backend: str, options: Any, mode: Any) -> None:
    """A tensor that is nobody's view: it may be detached, and have a parameter added, in place."""
    module, x, shift = fastlstm.LSTM(I, H, batch_first=True), torch.randn(B, T, I), nn.Parameter(X)
    with mode():
        y, _ = module(x, **options)
        wanted = y + X
        y.detach_()
    if mode is torch.no_grad:
        y += shift
        y.sum().backward()
        assert torch.equal(y, wanted) and torch.equal(shift.grad, torch.full((H,), float(B * T)))
