"""torch.func: vmap of data and of models, gradients of each sample, Jacobians, forward mode."""

from collections.abc import Callable
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
from fastlstm import autograd, reference

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


def test_vmap_is_one_call_of_the_kernel() -> None:
    lstm = fastlstm.LSTM(I, H, 2)
    x = samples(lstm)
    calls = []

    def count(*arguments: Any, **options: Any) -> None:
        calls.append(arguments[0].shape)
        original(*arguments, **options)

    kernels = autograd._KERNELS["cpu"]
    original = kernels.lstm_fwd
    with (
        fastlstm.backend("cpu"),
        mock.patch.dict(autograd._KERNELS, cpu=kernels._replace(lstm_fwd=count)),
    ):
        vmap(lambda x: lstm(x)[0])(x)
        vmap(grad(lambda x: lstm(x)[0].sum()))(x)
    assert calls == [(T, V * B, I), (T, V * B, H)] * 2


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


def test_an_ensemble_is_one_batched_call() -> None:
    """Its steps are products of stacked matrices, not a loop over models."""
    models = [fastlstm.LSTM(I, H) for _ in range(V)]
    weights, _ = stack_module_state(models)
    x = torch.randn(T, B, I)
    with mock.patch.object(reference, "lstm_layer", wraps=reference.lstm_layer) as layer:
        vmap(lambda p: functional_call(models[0], p, (x,))[0])(weights)
    assert layer.call_count == 1


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
