"""Loops over a cell in training: steps share a node of the weights, whatever is done with it."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import Results
from oracle import compare, judge
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

import fastlstm
from fastlstm.layer.steps import SharedWeights

I, H, B = 3, 5, 2
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def pair(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[nn.LSTMCell, Any]:
    theirs = nn.LSTMCell(I, H, bias, dtype=dtype)
    ours = fastlstm.LSTMCell(I, H, bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def outputs(cell: Any, xs: Any, hx: Any = None) -> list[Tensor]:
    """h of every step of a loop, then c."""
    found = []
    for x in xs:
        hx = cell(x, hx)
        found.append(hx[0])
    return [*found, hx[1]]


def loss(cell: Any, xs: Any, hx: Any = None) -> Tensor:
    return sum((t * t.detach().cos()).sum() for t in outputs(cell, xs, hx))


def assert_alike(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def both(act: Any, dtype: torch.dtype = torch.float64) -> None:
    """Assert that what `act` makes of a cell is the same for ours and theirs."""
    theirs, ours = pair(dtype)
    state = torch.get_rng_state()
    want = act(theirs)
    torch.set_rng_state(state)
    found = act(ours)
    assert_alike(found, want)
    gc.collect()
    assert ours._steps._last.shared() is None  # the graph is gone, and with it the token


def grads(cell: Any) -> list[Tensor]:
    return [p.grad for p in cell.parameters()]


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(3, 5, 2, 4), (70, 130, 1, 3), (20, 33, 70, 9)], ids=str)
def test_numbers(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Against float64; the last sizes make more than one product of the rows of all steps."""
    n_in, n_hidden, batch, n_steps = sizes
    numbers = {
        "x": torch.randn(n_steps, batch, n_in, dtype=torch.float64),
        "h": torch.randn(batch, n_hidden, dtype=torch.float64),
        "c": torch.randn(batch, n_hidden, dtype=torch.float64),
    }
    made = nn.LSTMCell(n_in, n_hidden, dtype=torch.float64).state_dict()
    numbers = {k: v.to(dtype).double() for k, v in (numbers | made).items()}

    def solve(kind: Any, dtype: torch.dtype, numbers: Results) -> Results:
        cell = kind(n_in, n_hidden, dtype=dtype)
        cell.load_state_dict({name: numbers[name] for name in WEIGHTS})
        x, h, c = (numbers[name].to(dtype, copy=True).requires_grad_() for name in "xhc")
        *hs, c_n = outputs(cell, x.unbind(), (h, c))
        (torch.stack(hs).sum() + c_n.sum()).backward()
        named = {name: getattr(cell, name).grad for name in WEIGHTS}
        found = named | {"dx": x.grad, "dh": h.grad, "dc": c.grad, "h_n": hs[-1], "c_n": c_n}
        return {name: t.detach().double() for name, t in found.items()}

    truth, allowed = judge(lambda d, n: solve(nn.LSTMCell, d, n), dtype, numbers)
    compare("a loop", solve(fastlstm.LSTMCell, dtype, numbers), truth, allowed)


def test_same_results_as_without_gradients() -> None:
    for n in (5, 64, 200):
        cell, x = fastlstm.LSTMCell(n, n), torch.randn(3, n)
        with torch.no_grad():
            want = cell(x)
        assert all(map(torch.equal, cell(x), want))


@pytest.mark.parametrize("n", [24, 200])
def test_a_row_does_not_depend_on_its_batch(n: int) -> None:
    cell, x = fastlstm.LSTMCell(n, n), torch.randn(70, n, requires_grad=True)

    def of(rows: Tensor) -> tuple[Tensor, ...]:
        h, c = cell(rows, (rows, rows))
        return h, c, *torch.autograd.grad(h.sum() + (c * c).sum(), rows)

    together = of(x)
    for rows in (1, 5, 33):
        assert all(torch.equal(a, b[:rows]) for a, b in zip(of(x[:rows]), together, strict=True))


# ---- what is done with the graph ----------------------------------------------------------------


def test_parts_of_a_graph() -> None:
    def act(cell: Any) -> list[Tensor]:
        found = outputs(cell, draw(5, B, I).unbind())
        found[1].sum().backward(retain_graph=True)  # the last steps have no part in it
        found[3].sum().backward(retain_graph=True)
        found[3].sum().backward()
        return grads(cell)

    both(act)


def test_threads_that_begin_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread's loop keeps to one token, so its gradients have the bits of a lone loop."""
    cell = fastlstm.LSTMCell(I, H)
    weights = list(cell.parameters())
    xs = torch.randn(9, 2, B, I)
    meet = threading.Barrier(2)

    def make(*args: Any) -> SharedWeights:
        shared = SharedWeights(*args)
        meet.wait(timeout=60)
        return shared

    def train(which: int) -> tuple[Tensor, ...]:
        state = None
        for x in xs[:, which]:
            meet.wait(timeout=60)
            state = cell(x, state)
        return torch.autograd.grad(state[0].sum(), weights)

    with ThreadPoolExecutor(2) as threads, monkeypatch.context() as patch:
        patch.setattr("fastlstm.layer.steps.SharedWeights", make)
        found = list(threads.map(train, range(2)))
    meet = threading.Barrier(1)
    for which, of_thread in enumerate(found):
        for got, want in zip(of_thread, train(which), strict=True):
            assert torch.equal(got, want)


def test_losses_that_share_the_weights() -> None:
    def act(cell: Any) -> list[Tensor]:
        one, two = (loss(cell, draw(3, B, I).unbind()) for _ in range(2))
        one.backward()
        first = [g.clone() for g in grads(cell)]
        two.backward()
        return first + grads(cell)

    both(act)


def test_truncated_backpropagation() -> None:
    def act(cell: Any) -> list[Tensor]:
        optimizer, hx = torch.optim.SGD(cell.parameters(), 0.1), None
        for x in draw(6, B, I).detach().unbind():
            hx = cell(x, hx)
            (hx[0].sum() + hx[1].cos().sum()).backward()
            optimizer.step()
            hx = tuple(t.detach() for t in hx)
        return [*cell.parameters(), *grads(cell)]

    both(act)


def test_second_derivatives() -> None:
    def act(cell: Any) -> list[Tensor]:
        xs, hx = draw(3, B, I), (draw(B, H), draw(B, H))
        inputs = xs, *hx, *cell.parameters()
        first = torch.autograd.grad(loss(cell, xs.unbind(), hx), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)
        return [*map(Tensor.detach, first), *second]

    both(act)


def test_gradients_in_batches() -> None:
    def act(cell: Any) -> list[Tensor]:
        *_, c = outputs(cell, draw(2, B, I).unbind())
        along = torch.eye(B * H, dtype=torch.float64).view(-1, B, H)
        return list(torch.autograd.grad(c, [*cell.parameters()], along, is_grads_batched=True))

    both(act)


@pytest.mark.parametrize("names", [("x",), ("h",), ("weight_hh",), ("x", "bias_ih"), WEIGHTS])
def test_gradients_of_some(names: tuple[str, ...]) -> None:
    def act(cell: Any) -> list[Tensor]:
        tensors = dict(cell.named_parameters()) | {"x": draw(3, B, I), "h": draw(B, H)}
        value = loss(cell, tensors["x"].unbind(), (tensors["h"], draw(B, H)))
        found = torch.autograd.grad(value, [tensors[name] for name in names], retain_graph=True)
        value.backward(inputs=[tensors[name] for name in names])
        assert all(tensors[name].grad is None for name in {*WEIGHTS} - {*names})
        return [*found, *[tensors[name].grad for name in names]]

    both(act)


def test_hooks() -> None:
    def act(cell: Any) -> list[Tensor]:
        seen: list[Tensor] = []
        cell.weight_ih.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
        cell.bias_hh.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        found = outputs(cell, draw(3, B, I).unbind())
        found[0].register_hook(lambda g: g * 3)
        sum(t.sum() for t in found).backward()
        assert len(seen) == 2  # once for all steps
        return [*sorted(seen, key=lambda t: t.dim()), *grads(cell)]

    both(act)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    def act(cell: Any) -> list[Tensor]:
        x, hx = draw(4, B, I), (draw(B, H), draw(B, H))
        for k in range(4):
            if k % 2:
                hx = checkpoint(
                    lambda x, h, c: cell(x, (h, c)), x[k], *hx, use_reentrant=reentrant
                )
            else:
                hx = cell(x[k], hx)
        (hx[0].sum() + hx[1].cos().sum()).backward()
        return [x.grad, *grads(cell)]

    both(act)


def test_steps_without_gradients_in_between() -> None:
    def act(cell: Any) -> list[Tensor]:
        hx = None
        for k, x in enumerate(draw(5, B, I).unbind()):
            with torch.set_grad_enabled(k % 2 == 0):
                hx = cell(x, hx)
        hx[0].sum().backward()
        return grads(cell)

    both(act)


def test_outputs_that_are_edited() -> None:
    """Which nn.LSTMCell allows, as long as no other step has read them."""

    def act(cell: Any) -> list[Tensor]:
        hx, mask = None, (torch.rand(B, 1) < 0.5).double()
        for x in draw(4, B, I).unbind():
            h, c = cell(x, hx)
            hx = h.mul_(mask), c.mul_(mask).add_(1)
        hx[0].sum().backward()
        return grads(cell)

    both(act)


def test_frozen_weights() -> None:
    def act(cell: Any) -> list[Tensor]:
        x = draw(3, B, I)
        found = []
        for frozen in ((0,), (1, 2), (0, 1, 2, 3), ()):  # each call sees how things are now
            for k, p in enumerate(cell.parameters()):
                p.requires_grad_(k not in frozen)
                p.grad = None
            loss(cell, x.unbind()).backward()
            found += [g if g is not None else torch.zeros(()) for g in grads(cell)]
        return [x.grad, *found]

    both(act)


def test_weights_made_by_operations() -> None:
    def act(cell: Any) -> list[Tensor]:
        nn.utils.parametrizations.weight_norm(cell, "weight_hh")
        value = loss(cell, draw(3, B, I).unbind())
        with nn.utils.parametrize.cached():
            (value + loss(cell, draw(3, B, I).unbind())).backward()
        return grads(cell)

    theirs, ours = pair()
    state = torch.get_rng_state()
    want = act(theirs)
    torch.set_rng_state(state)
    assert_alike(act(ours), want)


def test_weights_that_are_edited() -> None:
    _, ours = pair()
    value = loss(ours, draw(3, B, I).unbind())
    with torch.no_grad():
        ours.weight_hh.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    theirs = nn.LSTMCell(I, H, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = draw(3, B, I)
    for cell in (theirs, ours):
        loss(cell, x.unbind()).backward()
    assert_alike(grads(ours), grads(theirs))


def test_weights_edited_as_part_of_the_graph() -> None:
    def act(cell: Any) -> list[Tensor]:
        scale, w = draw(1), cell.weight_hh.detach().clone()
        x = draw(2, B, I)
        del cell.weight_hh
        cell.weight_hh = w
        value = cell(x[0])[0].sum()
        value.backward(retain_graph=True)
        cell.weight_hh.mul_(scale)
        cell(x[1])[0].sum().backward()
        return [scale.grad, cell.weight_ih.grad, cell.bias_hh.grad]

    theirs, ours = pair()
    state = torch.get_rng_state()
    want = act(theirs)
    torch.set_rng_state(state)
    assert_alike(act(ours), want)


def test_transforms() -> None:
    theirs, ours = pair()
    xs = torch.randn(4, 3, B, I, dtype=torch.float64)
    weights = {name: p.detach() for name, p in ours.named_parameters()}

    def of(weights: Any, x: Tensor) -> Tensor:
        return loss(lambda x, hx: torch.func.functional_call(ours, weights, (x, hx)), x.unbind())

    found = torch.vmap(torch.func.grad(of), (None, 0))(weights, xs)
    each = [torch.autograd.grad(loss(theirs, x.unbind()), [*theirs.parameters()]) for x in xs]
    assert_alike(found.values(), [torch.stack(of_one) for of_one in zip(*each, strict=True)])


@pytest.mark.slow
def test_compiled_autograd() -> None:
    theirs, ours = pair()
    x = draw(3, B, I).detach()
    loss(theirs, x.unbind()).backward()
    value = loss(ours, x.unbind())
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        value.backward()
    assert_alike(grads(ours), grads(theirs))


def test_gradients_are_there_with_those_of_the_inputs() -> None:
    """However old the node of the weights is: FSDP reads them then."""
    _, ours = pair()
    x = draw(2, B, I)
    first = loss(ours, x.unbind())
    passed = x * 1
    value = loss(ours, passed.unbind())
    seen: list[bool] = []
    passed.register_hook(lambda grad: seen.append(ours.weight_ih.grad is not None))
    value.backward()
    assert seen == [True]
    first.backward()


@pytest.mark.parametrize("grad", [True, False])
def test_a_cell_that_lacks_a_weight_is_refused(grad: bool) -> None:
    cell = fastlstm.LSTMCell(3, 4)
    cell.bias_hh = None  # type: ignore[assignment]
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match="a list of tensors"):
        cell(torch.zeros(2, 3))
