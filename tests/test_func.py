"""torch.func: vmap of data and of models, gradients of each sample, Jacobians, forward mode."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vmap,
)
from torch.utils import _pytree as pytree

import fastlstm
from fastlstm import reference
from fastlstm.kernels.base import get
from fastlstm.layer import autograd
from fastlstm.layer import vmap as rules
from fastlstm.layer.call import Call
from fastlstm.spec import LayerSpec, Noise, Sequences

V, T, B, I, H = 3, 4, 3, 5, 7
LENGTHS = torch.tensor([[4, 0, 3], [1, 2, 4], [0, 0, 0]])
EVERY_BACKEND = pytest.mark.parametrize("backend", ["reference", "cpu", "triton"], indirect=True)
MODULES: dict[str, Callable[..., nn.Module]] = {
    "lstm": lambda **o: fastlstm.LSTM(I, H, **o),
    "both directions": lambda **o: fastlstm.LSTM(I, H, bidirectional=True, **o),
    "two layers": lambda **o: fastlstm.LSTM(I, H, 2, bias=False, **o),
    "projected": lambda **o: fastlstm.LSTM(I, H, proj_size=3, **o),
    "normalised": lambda **o: fastlstm.LSTM(I, H, layer_norm=True, peephole=True, **o),
    "rnn": lambda **o: fastlstm.RNN(I, H, **o),
}


def module_of(name: str, backend: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name](dtype=torch.float32 if backend == "triton" else torch.float64)


def samples(module: nn.Module, *shape: int) -> Tensor:
    return torch.randn(*(shape or (V, T, B, I)), dtype=next(module.parameters()).dtype)


def same(got: Any, want: Any) -> None:
    """Equal but for the order in which some hundred numbers are added."""
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        largest = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=100 * torch.finfo(b.dtype).eps * largest)


def stacked(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([r[name] for r in results]) for name in results[0]}


def loss(module: nn.Module, parameters: dict[str, Tensor], x: Tensor, **options: Any) -> Tensor:
    return functional_call(module, parameters, (x,), options)[0].square().sum()


@EVERY_BACKEND
@pytest.mark.parametrize("name", MODULES)
def test_vmap_of_data_is_the_loop(backend: str, name: str) -> None:
    module = module_of(name, backend)
    x = samples(module)
    same(vmap(lambda x: module(x)[0])(x), torch.stack([module(one)[0] for one in x]))
    # any dimension in, any out, and a batch that only the initial state has
    got = vmap(lambda x: module(x)[0], in_dims=2, out_dims=1)(x.movedim(0, 2))
    same(got, torch.stack([module(one)[0] for one in x], 1))
    nested = vmap(vmap(lambda x: module(x)[0]))(x.unflatten(0, (1, 3)))
    same(nested.flatten(0, 1), got.movedim(1, 0))


@EVERY_BACKEND
def test_vmap_of_states_lengths_and_resets_is_the_loop(backend: str) -> None:
    lstm = module_of("both directions", backend)
    x, h = samples(lstm), samples(lstm, 2, B, V, H)
    got = vmap(lambda h: lstm(x[0], (h, h))[1][1], in_dims=2)(h)
    same(got, torch.stack([lstm(x[0], (h[:, :, v], h[:, :, v]))[1][1] for v in range(V)]))
    got = vmap(lambda x, n: lstm(x, lengths=n)[0])(x, LENGTHS)
    same(got, torch.stack([lstm(x[v], lengths=LENGTHS[v])[0] for v in range(V)]))
    got = vmap(lambda n: lstm(x[0], lengths=n)[0])(LENGTHS)
    same(got, torch.stack([lstm(x[0], lengths=n)[0] for n in LENGTHS]))
    one = module_of("lstm", backend)
    done = torch.rand(V, T, B) < 0.3
    got = vmap(lambda x, r: one(x, reset=r, return_cell_states=True)[2])(x, done)
    want = [one(x[v], reset=done[v], return_cell_states=True)[2] for v in range(V)]
    same(got, torch.stack(want))


def test_vmap_of_single_sequences_with_the_same_lengths() -> None:
    lstm, x, length = fastlstm.LSTM(I, H), torch.randn(V, T, I), torch.tensor(2)
    got = vmap(lambda x: lstm(x, lengths=length)[0])(x)
    same(got, torch.stack([lstm(one, lengths=length)[0] for one in x]))


def test_no_samples() -> None:
    lstm = fastlstm.LSTM(I, H)
    assert vmap(lambda x: lstm(x)[0])(torch.zeros(0, T, B, I)).shape == (0, T, B, H)
    assert jacrev(lambda x: lstm(x)[0])(torch.zeros(T, 0, I)).shape == (T, 0, H, T, 0, I)


@contextmanager
def operator_calls() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of x in all calls of the LSTM operators for the CPU."""
    calls: list[tuple[int, ...]] = []

    def counting(operator: Any) -> Any:
        def count(*arguments: Any, **options: Any) -> Any:
            calls.append(tuple(arguments[0].shape))
            return operator(*arguments, **options)

        return count

    cpu = get("cpu")
    with ExitStack() as stack:
        stack.enter_context(fastlstm.backend("cpu"))
        for name in ("lstm_fwd", "lstm_bwd", "lstm_plain_fwd", "lstm_plain_bwd"):
            operator = counting(getattr(cpu, name))
            stack.enter_context(mock.patch.object(cpu, name, operator))
        yield calls


def test_vmap_is_one_call_of_the_kernel() -> None:
    lstm = fastlstm.LSTM(I, H, 2)
    x = samples(lstm)
    with operator_calls() as calls:
        vmap(lambda x: lstm(x)[0])(x)
        vmap(grad(lambda x: lstm(x)[0].sum()))(x)
    layers = [(T, V * B, I), (T, V * B, H)]
    assert calls == layers * 2 + layers[::-1]


@EVERY_BACKEND
@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_each_sample_are_the_loop(backend: str, name: str) -> None:
    module = module_of(name, backend)
    x = samples(module)
    weights = {k: p.detach() for k, p in module.named_parameters()}
    each = grad(lambda p, x: loss(module, p, x))
    got = vmap(each, (None, 0))(weights, x)
    same(got, stacked([each(weights, one) for one in x]))
    whole = grad(lambda p: vmap(lambda x: loss(module, p, x))(x).sum())(weights)
    same(whole, {k: g.sum(0) for k, g in got.items()})


@EVERY_BACKEND
@pytest.mark.parametrize("name", ["both directions", "rnn"])
def test_gradients_of_each_sample_with_padding(backend: str, name: str) -> None:
    """Whatever stands in the padding reaches no gradient."""
    module = module_of(name, backend)
    x = samples(module)
    weights = {k: p.detach() for k, p in module.named_parameters()}
    each = grad(lambda p, x, n: loss(module, p, x, lengths=n), (0, 1))
    want = [each(weights, *sample) for sample in zip(x, LENGTHS, strict=True)]
    padding = torch.arange(T)[:, None] >= LENGTHS[:, None]  # [V, T, B]
    for_weights, for_x = vmap(each, (None, 0, 0))(
        weights, x.masked_fill(padding[..., None], torch.nan), LENGTHS
    )
    same(for_weights, stacked([w for w, _ in want]))
    same(for_x, torch.stack([x for _, x in want]))


@EVERY_BACKEND
@pytest.mark.parametrize("name", MODULES)
def test_ensembles_are_the_loop(backend: str, name: str) -> None:
    module = module_of(name, backend)
    models = [MODULES[name](dtype=next(module.parameters()).dtype) for _ in range(V)]
    weights, _ = stack_module_state(models)
    x = samples(module)

    def run(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, p, (x,))[0]

    want = [m(one)[0] for m, one in zip(models, x, strict=True)]
    same(vmap(run)(weights, x), torch.stack(want))
    same(vmap(run, (0, None))(weights, x[0]), torch.stack([m(x[0])[0] for m in models]))
    each = grad(lambda p, x: loss(module, p, x))
    separate = [each(dict(m.named_parameters()), x[0]) for m in models]
    same(vmap(each, (0, None))(weights, x[0]), stacked(separate))
    whole = grad(lambda p: vmap(lambda p: loss(module, p, x[0]))(p).sum())(weights)
    same(whole, stacked(separate))


def test_an_ensemble_is_one_call_of_the_kernel() -> None:
    models = [fastlstm.LSTM(I, H, 2) for _ in range(V)]
    weights, _ = stack_module_state(models)
    x = torch.randn(T, B, I)
    layers = [(V, T, B, I), (V, T, B, H)]
    with operator_calls() as calls, mock.patch.object(rules, "by_reference") as slow:
        vmap(lambda p: functional_call(models[0], p, (x,))[0])(weights)
        assert calls == layers
        vmap(grad(lambda p: loss(models[0], p, x)))(weights)
        assert calls[2:] == layers + layers[::-1]
        assert not slow.called


def test_an_ensemble_on_the_reference_is_one_batched_call() -> None:
    """Its steps are products of stacked matrices, not a loop over models."""
    models = [fastlstm.LSTM(I, H) for _ in range(V)]
    weights, _ = stack_module_state(models)
    x = torch.randn(T, B, I)
    with (
        fastlstm.backend("reference"),
        mock.patch.object(reference, "lstm_layer", wraps=reference.lstm_layer) as layer,
    ):
        vmap(lambda p: functional_call(models[0], p, (x,))[0])(weights)
    assert layer.call_count == 1


@pytest.mark.parametrize("members", [1, 3, 5])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_members_on_any_number_of_threads(members: int, threads: int) -> None:
    """Bit for bit, whether a member has one thread or all of them."""
    models = [fastlstm.LSTM(I, H, bidirectional=True) for _ in range(members)]
    weights, _ = stack_module_state(models)
    x = torch.randn(members, T, B, I)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with fastlstm.backend("cpu"):
            each = grad(lambda p, x: loss(models[0], p, x))
            got = vmap(each)(weights, x)
            want = stacked(
                [each(dict(m.named_parameters()), one) for m, one in zip(models, x, strict=True)]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("D", [1, 2])
def test_an_ensemble_of_everything(D: int, dtype: torch.dtype) -> None:
    """Two layers, every option; data, lengths, states and resets of each member."""
    make = lambda: fastlstm.LSTM(  # noqa: E731
        I, H, 2, bidirectional=D == 2, proj_size=3, peephole=True, layer_norm=True, dtype=dtype
    )
    models = [make().eval() for _ in range(V)]
    weights, _ = stack_module_state(models)
    x, done = samples(models[0]), torch.rand(V, T, B) < 0.3
    h, c = samples(models[0], V, 2 * D, B, 3), samples(models[0], 2 * D, B, V, H)

    def run(p: Any, x: Tensor, h: Tensor, c: Tensor, n: Tensor, done: Tensor) -> Any:
        options = {"lengths": n, "reset": None if D == 2 else done}
        y, (h_n, c_n) = functional_call(models[0], p, (x, (h, c)), options)
        return y.sum() + h_n.square().sum() + c_n.square().sum(), (y, h_n, c_n)

    each = grad(run, (0, 1, 2, 3), has_aux=True)
    with fastlstm.backend("cpu"):
        got = vmap(each, (0, 0, 0, 2, 0, 0))(weights, x, h, c, LENGTHS, done)
        want = [
            each(dict(m.named_parameters()), x[v], h[v], c[:, :, v], LENGTHS[v], done[v])
            for v, m in enumerate(models)
        ]
        got_leaves = pytree.tree_leaves(got)
        same(
            got_leaves, [torch.stack(t) for t in zip(*map(pytree.tree_leaves, want), strict=True)]
        )
        got = vmap(each, (0, None, None, None, None, None))(
            weights, x[0], h[0], c[:, :, 0], LENGTHS[0], done[0]
        )
        want = [
            each(dict(m.named_parameters()), x[0], h[0], c[:, :, 0], LENGTHS[0], done[0])
            for m in models
        ]
        got_leaves = pytree.tree_leaves(got)
        same(
            got_leaves, [torch.stack(t) for t in zip(*map(pytree.tree_leaves, want), strict=True)]
        )


@pytest.mark.parametrize("name", MODULES)
def test_ensembles_within_vmap(name: str) -> None:
    """Models and data, in either order, and models of models."""
    module = module_of(name, "cpu")
    models = [MODULES[name](dtype=torch.float64) for _ in range(4)]
    weights, _ = stack_module_state(models)
    x = samples(module)
    each = grad(lambda p, x: loss(module, p, x), (0, 1))
    found = [each(dict(m.named_parameters()), one) for m in models for one in x]
    want = {k: torch.stack([p[k] for p, _ in found]).unflatten(0, (4, V)) for k in weights}
    want_x = torch.stack([dx for _, dx in found]).unflatten(0, (4, V))
    with fastlstm.backend("cpu"):
        got = vmap(vmap(each, (None, 0)), (0, None))(weights, x)
        same(got, (want, want_x))
        got = vmap(vmap(each, (0, None)), (None, 0), out_dims=1)(weights, x)
        same(got, (want, want_x))
        squares = {k: p.unflatten(0, (2, 2)) for k, p in weights.items()}
        got = vmap(vmap(each, (0, None)), (0, None))(squares, x[0])
        first = {k: p[:, 0].unflatten(0, (2, 2)) for k, p in want.items()}
        same(got, (first, want_x[:, 0].unflatten(0, (2, 2))))


@pytest.mark.parametrize("name", ["both directions", "projected", "rnn"])
def test_second_derivatives_of_ensembles(name: str) -> None:
    module = module_of(name, "cpu")
    models = [MODULES[name](dtype=torch.float64) for _ in range(V)]
    x = samples(module, T, B, I)

    def penalty(grads: list[Tensor]) -> Tensor:
        return torch.stack([g.square().sum() for g in grads]).sum()

    weights, _ = stack_module_state(models)
    each = vmap(grad(lambda p: loss(module, p, x)))(weights)
    got = torch.autograd.grad(penalty(list(each.values())), list(weights.values()))
    want = []
    for model in models:
        own = dict(model.named_parameters())
        first = torch.autograd.grad(loss(model, own, x), list(own.values()), create_graph=True)
        want.append(torch.autograd.grad(penalty(list(first)), list(own.values())))
    same(got, [torch.stack(t) for t in zip(*want, strict=True)])
    # and through backward() twice
    total = vmap(lambda p: loss(module, p, x))(weights).sum()
    twice = torch.autograd.grad(total, list(weights.values()), create_graph=True)
    same(torch.autograd.grad(penalty(list(twice)), list(weights.values())), got)


def test_many_gradients_at_once_of_an_ensemble() -> None:
    """`is_grads_batched`, which is not torch.func."""
    models = [fastlstm.LSTM(I, H, dtype=torch.float64) for _ in range(V)]
    weights, _ = stack_module_state(models)
    x = samples(models[0], T, B, I)
    y = vmap(lambda p: functional_call(models[0], p, (x,))[0])(weights)
    arriving = torch.randn(2, *y.shape, dtype=y.dtype)
    own = list(weights.values())
    got = torch.autograd.grad(y, own, arriving, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(y, own, one, retain_graph=True) for one in arriving]
    same(got, [torch.stack(t) for t in zip(*want, strict=True)])


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_zoneout_of_members(batched: bool, packed: bool) -> None:
    """One seed is one draw for all of them, or each has its own; packed rows or padded ones."""
    models = [fastlstm.LSTM(I, H, dtype=torch.float64) for _ in range(V)]
    weights = [
        [m.get_parameter(n).detach() for m in models] for n, _ in models[0].named_parameters()
    ]
    stack = [torch.stack(each) for each in weights]
    sizes = torch.tensor([3, 2, 2, 1]) if packed else None
    x = samples(models[0], V, 8, I) if packed else samples(models[0])
    seeds = torch.tensor([[5], [6], [7]]) if batched else torch.tensor([5])

    def run(x: Tensor, seed: Tensor, *weights: Tensor) -> Tensor:
        spec = LayerSpec("LSTM", I, H, zoneout=(0.5, 0.3))
        call = Call("cpu", spec, Sequences(sizes), Noise(seed=seed))
        return autograd.run(call, (x, None, None, *weights))[0]

    each = grad(lambda *inputs: run(*inputs).square().sum(), (0, 2, 3))
    dims = (0, 0 if batched else None, *(0,) * len(stack))
    seed_of = (lambda v: seeds[v]) if batched else (lambda v: seeds)
    one = [(x[v], seed_of(v), *(w[v] for w in stack)) for v in range(V)]
    same(vmap(run, dims)(x, seeds, *stack), torch.stack([run(*inputs) for inputs in one]))
    want = [torch.stack(t) for t in zip(*(each(*inputs) for inputs in one), strict=True)]
    same(vmap(each, dims)(x, seeds, *stack), want)
    # the same model on the data of each
    data = [(inputs[0], inputs[1], *one[0][2:]) for inputs in one]
    dims = (*dims[:2], *(None,) * len(stack))
    want = [torch.stack(t) for t in zip(*(each(*inputs) for inputs in data), strict=True)]
    same(vmap(each, dims)(x, seeds, *one[0][2:]), want)


@EVERY_BACKEND
@pytest.mark.parametrize("name", ["lstm", "both directions", "rnn"])
def test_jacobians(backend: str, name: str) -> None:
    module = module_of(name, backend)
    x = samples(module, T, B, I)

    def last(x: Tensor) -> Tensor:
        return module(x)[0][-1].sum(0)

    want = torch.autograd.functional.jacobian(last, x)
    same(jacrev(last)(x), want)
    same(jacfwd(last)(x), want)
    tangent = torch.randn_like(x)
    same(jvp(last, (x,), (tangent,))[1], (want * tangent).sum((-1, -2, -3)))


@EVERY_BACKEND
@pytest.mark.parametrize("name", ["lstm", "rnn"])
def test_hessians(backend: str, name: str) -> None:
    module = module_of(name, backend)
    x = samples(module, 3, 2, I)

    def energy(x: Tensor) -> Tensor:
        return module(x)[0].pow(3).sum()

    want = torch.autograd.functional.hessian(energy, x)
    same(hessian(energy)(x), want)
    same(jacrev(jacrev(energy))(x), want)


@EVERY_BACKEND
def test_derivative_of_gradients_of_each_sample(backend: str) -> None:
    """A penalty on the norm of each sample's gradient, through backward()."""
    lstm = module_of("both directions", backend)
    weights = {k: p.detach().clone().requires_grad_() for k, p in lstm.named_parameters()}
    x = samples(lstm)
    each = vmap(grad(lambda p, x: loss(lstm, p, x)), (None, 0))(weights, x)
    penalty = sum(g.square().sum() for g in each.values())
    got = torch.autograd.grad(penalty, list(weights.values()))
    penalty = torch.zeros((), dtype=x.dtype)
    for one in x:
        found = torch.autograd.grad(
            loss(lstm, weights, one), list(weights.values()), create_graph=True
        )
        penalty = penalty + sum(g.square().sum() for g in found)
    want = torch.autograd.grad(penalty, list(weights.values()))
    same(got, want)


@pytest.mark.parametrize("name", ["lstm", "normalised", "rnn"])
def test_forward_mode_gradcheck(name: str) -> None:
    module = module_of(name, "cpu")
    x = samples(module, 3, 2, I).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: module(x)[0], (x,), check_forward_ad=True, check_batched_grad=True
    )


def test_randomness_is_asked_for() -> None:
    """As nn.Dropout under vmap: an error, or one draw, or one for each sample."""
    lstm = fastlstm.LSTM(I, H, zoneout=(0.5, 0.5), recurrent_dropout=0.5)
    x = torch.randn(T, B, I).expand(V, T, B, I)
    run = lambda x: lstm(x)[0]  # noqa: E731
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(run)(x)
    alike = vmap(run, randomness="same")(x)
    assert all(torch.equal(alike[0], one) for one in alike)
    unlike = vmap(run, randomness="different")(x)
    assert not any(torch.equal(unlike[0], one) for one in unlike[1:])
