"""Losses that contain gradients: a gradient penalty, MAML, Hessians, third derivatives.

What torch.nn has is compared with torch.nn in float64, by the oracle of the numerics; the cells
that it lacks, with finite differences and with the reference.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from cases import Case, Results, draw, fast, final_states, pack
from oracle import compare, judge
from test_autograd import CASES
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev
from torch.nn import functional as F

import fastlstm


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """These models are too small for more."""
    torch.set_num_threads(1)


T, B, I, H = 5, 4, 3, 4


def randn(like: nn.Module, *shape: int) -> Tensor:
    """The same numbers in whatever dtype the model has."""
    return torch.randn(shape).to(next(like.parameters()).dtype)


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """A copy of all in a row: a single number may round well by luck, not one of many."""
    return torch.cat([t.detach().flatten() for t in tensors])


class Critic(nn.Module):
    """How real a sequence is."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(I, H, 2, bidirectional=True, batch_first=True)
        self.score = nn.Linear(2 * H, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        return self.score(y[:, -1]).squeeze(1)


def wgan_gp(critic: Any) -> Results:
    """Some steps of the critic; the penalty pulls |d score / d x| towards 1."""
    torch.manual_seed(1)
    learner = torch.optim.SGD(critic.parameters(), lr=0.2)
    results, penalties = {}, []
    for k in range(6):
        real, fake = randn(critic, B, T, I) + 0.5, randn(critic, B, T, I)
        share = torch.rand(B, 1, 1).to(real.dtype)
        between = torch.lerp(fake, real, share).requires_grad_()
        scores = critic(between)
        (slope,) = torch.autograd.grad(
            scores, between, torch.ones_like(scores), create_graph=True, retain_graph=True
        )
        penalty = (slope.flatten(1).norm(2, dim=1) - 1).square().mean()
        learner.zero_grad()
        (critic(fake).mean() - critic(real).mean() + 10 * penalty).backward()
        penalties.append(penalty)
        results[f"slopes {k}"] = joined(p.grad for p in critic.parameters())
        learner.step()
    return results | {"penalties": torch.stack(penalties)}


class Learner(nn.Module):
    """A regressor of sequences, to be adapted to a task."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(I, H)
        self.head = nn.Linear(H, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def few_shots(learner: nn.Module, tasks: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each task: input and targets to adapt to, and those that count."""
    for _ in range(tasks):
        support, query = randn(learner, T, B, I), randn(learner, T, B, I)
        rule = randn(learner, I, 1)
        yield support, (support @ rule).tanh(), query, (query @ rule).tanh()


def adapted_by_autograd(learner: nn.Module, weights: Results, x: Tensor, y: Tensor) -> Results:
    loss = F.mse_loss(functional_call(learner, weights, (x,)), y)
    slopes = torch.autograd.grad(loss, tuple(weights.values()), create_graph=True)
    return {n: w - 0.4 * g for (n, w), g in zip(weights.items(), slopes, strict=True)}


def adapted_by_func(learner: nn.Module, weights: Results, x: Tensor, y: Tensor) -> Results:
    slopes = grad(lambda w: F.mse_loss(functional_call(learner, w, (x,)), y))(weights)
    return {n: w - 0.4 * slopes[n] for n, w in weights.items()}


def maml(learner: Any, adapt: Callable[..., Results], inner_steps: int = 2) -> Results:
    """Some steps of the outer loop: gradients through the inner steps."""
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    results, losses = {}, []
    for k in range(3):
        torch.manual_seed(1)
        optimizer.zero_grad()
        total: Any = 0
        for x, y, x_new, y_new in few_shots(learner, 2):
            weights = dict(learner.named_parameters())
            for _ in range(inner_steps):
                weights = adapt(learner, weights, x, y)
            total = total + F.mse_loss(functional_call(learner, weights, (x_new,)), y_new)
        total.backward()
        losses.append(total)
        results[f"slopes {k}"] = joined(p.grad for p in learner.parameters())
        optimizer.step()
    return results | {"losses": torch.stack(losses)}


def maml_in_func(learner: Any) -> Results:
    """The same with an outer gradient of torch.func: vmapped over tasks, as is usual."""
    results, losses = {}, []
    weights = {n: p.detach().clone() for n, p in learner.named_parameters()}
    for k in range(3):
        torch.manual_seed(1)
        tasks = [torch.stack(t) for t in zip(*few_shots(learner, 2), strict=True)]

        def of_task(
            weights: Results, x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor
        ) -> Tensor:
            for _ in range(2):
                weights = adapted_by_func(learner, weights, x, y)
            return F.mse_loss(functional_call(learner, weights, (x_new,)), y_new)

        def total(weights: Results, tasks: Any) -> Tensor:
            return torch.vmap(of_task, (None, 0, 0, 0, 0))(weights, *tasks).sum()

        slopes, loss = torch.func.grad_and_value(total)(weights, tasks)
        results[f"slopes {k}"] = joined(slopes.values())
        losses.append(loss)
        weights = {n: w - slopes[n] for n, w in weights.items()}
    return results | {"losses": torch.stack(losses)}


def hessian_of(learner: Any, vectorize: bool = False) -> Results:
    """Of a loss in x, and in W_hh."""
    torch.manual_seed(1)
    x = randn(learner, 3, 2, I)
    name = "lstm.weight_hh_l0"
    weights = {n: p.detach() for n, p in learner.named_parameters()}

    def loss(x: Tensor, w_hh: Tensor) -> Tensor:
        return functional_call(learner, weights | {name: w_hh}, (x,)).sin().sum()

    at = x, weights[name]
    twice = torch.autograd.functional.hessian(loss, at, vectorize=vectorize)
    return {f"{a}{b}": twice[a][b] for a in range(2) for b in range(2)}


def third_order(learner: Any) -> Results:
    """autograd.grad three times, each of the sum of squares of the one before."""
    torch.manual_seed(1)
    x = randn(learner, 3, 2, I).requires_grad_()
    leaves = {"x": x, **dict(learner.named_parameters())}
    value = learner(x).square().sum()
    for order in range(3):
        slopes = torch.autograd.grad(value, tuple(leaves.values()), create_graph=order < 2)
        value = sum(g.square().sum() for g in slopes)
    return {f"ddd {n}": g for n, g in zip(leaves, slopes, strict=True)}


def product_of_hessian(learner: Any) -> Results:
    """torch.autograd.functional.hvp, and the gradient of its size."""
    torch.manual_seed(1)
    name = next(n for n, _ in learner.named_parameters() if "weight_hh" in n)
    weights = dict(learner.named_parameters())
    at = randn(learner, 3, 2, I).requires_grad_(), weights[name]
    along = tuple(randn(learner, *t.shape) for t in at)

    def loss(x: Tensor, w_hh: Tensor) -> Tensor:
        return functional_call(learner, weights | {name: w_hh}, (x,)).sin().sum()

    products = torch.autograd.functional.hvp(loss, at, along)[1]
    again = torch.autograd.functional.hvp(loss, at, along, create_graph=True)[1]
    slopes = torch.autograd.grad(sum(p.square().sum() for p in again), at)
    found = {f"v {k}": p for k, p in enumerate(products)}
    return found | {f"d {k}": g for k, g in enumerate(slopes)}


STUDIES: dict[str, tuple[type[nn.Module], Callable[[Any], Results]]] = {
    "wgan_gp": (Critic, wgan_gp),
    "maml": (Learner, lambda m: maml(m, adapted_by_autograd)),
    "hessian": (Learner, hessian_of),
    "product_of_hessian": (Learner, product_of_hessian),
    "third_order": (Learner, third_order),
}


def begin(name: str) -> nn.Module:
    torch.manual_seed(0)
    return STUDIES[name][0]()


def study(name: str, model: nn.Module) -> Results:
    return {k: v.detach().double() for k, v in STUDIES[name][1](model).items()}


@cache
def expectation(name: str) -> tuple[Results, dict[str, float]]:
    def solve(dtype: torch.dtype, weights: Results) -> Results:
        model = begin(name).to(dtype)
        model.load_state_dict(weights)
        return study(name, model)

    return judge(
        solve, torch.float64, {k: v.double() for k, v in begin(name).state_dict().items()}
    )


def test_gradient_penalty_trains_a_critic(backend: str) -> None:
    critic = fastlstm.accelerate(begin("wgan_gp").double())
    found = study("wgan_gp", critic)
    compare("WGAN-GP", found, *expectation("wgan_gp"))
    assert found["penalties"][-1] < found["penalties"][0]


@pytest.mark.parametrize(
    "way",
    [
        lambda m: maml(m, adapted_by_autograd),
        lambda m: maml(m, adapted_by_func),
        maml_in_func,
    ],
    ids=["autograd", "func inside", "func"],
)
def test_maml(backend: str, way: Callable[[Any], Results]) -> None:
    """Meta-gradients, however they are asked for; and what is learnt helps."""
    learner = fastlstm.accelerate(begin("maml").double())
    found = {k: v.detach() for k, v in way(learner).items()}
    compare("MAML", found, *expectation("maml"))
    assert (found["losses"].diff() < 0).all()


def hessian_by_func(kinds: str) -> Callable[[Any], Results]:
    def run(learner: Any) -> Results:
        torch.manual_seed(1)
        x = randn(learner, 3, 2, I)
        name = "lstm.weight_hh_l0"
        weights = {n: p.detach() for n, p in learner.named_parameters()}

        def loss(x: Tensor, w_hh: Tensor) -> Tensor:
            return functional_call(learner, weights | {name: w_hh}, (x,)).sin().sum()

        outer, inner = ({"r": jacrev, "f": jacfwd}[kind] for kind in kinds)
        twice = outer(inner(loss, argnums=(0, 1)), argnums=(0, 1))(x, weights[name])
        return {f"{a}{b}": twice[a][b] for a in range(2) for b in range(2)}

    return run


@pytest.mark.parametrize("kinds", ["autograd", "batched", "rr", "fr", "rf", "ff"])
def test_hessian(backend: str, kinds: str) -> None:
    """jacrev and jacfwd of either, and torch.autograd's, a row at a time or all at once."""
    learner = fastlstm.accelerate(begin("hessian").double())
    if kinds in ("autograd", "batched"):
        twice = hessian_of(learner, kinds == "batched")
    else:
        twice = hessian_by_func(kinds)(learner)
    found = {k: v.detach() for k, v in twice.items()}
    compare(f"Hessian by {kinds}", found, *expectation("hessian"))


def test_product_of_hessian(backend: str) -> None:
    learner = fastlstm.accelerate(begin("product_of_hessian").double())
    found = study("product_of_hessian", learner)
    compare("product of the Hessian", found, *expectation("product_of_hessian"))


def test_third_order(backend: str) -> None:
    learner = fastlstm.accelerate(begin("third_order").double())
    compare("third order", study("third_order", learner), *expectation("third_order"))


CELLS = [
    Case(T=3, B=2, I=1, H=2, peephole=True),
    Case(T=2, B=2, I=1, H=3, layer_norm=True, hx=False, directions=2),
    Case(T=3, B=2, I=1, H=2, zoneout=(0.3, 0.2)),
    Case(T=3, B=2, I=1, H=2, zoneout=(0.5, 0.5), noise=True, layers=2),
    Case(T=3, B=2, I=1, H=2, recompute=True, directions=2, lengths=(1, 3)),
    Case(T=3, B=2, I=1, H=3, proj=2, peephole=True, layer_norm=True, cell_states=True),
    Case(T=4, B=2, I=1, H=2, reset=True, peephole=True, zoneout=(0.2, 0.1), bias=False),
    Case(
        T=3, B=3, I=1, H=2, lengths=(2, 3, 1), packed=True, directions=2, peephole=True,
        noise=True, zoneout=(0.3, 0.3),
    ),
    Case(T=3, B=2, I=2, H=2, kind="RNN_TANH", directions=2),
    Case(T=3, B=3, I=1, H=2, kind="RNN_TANH", lengths=(2, 3, 1), packed=True, layers=2),
    Case(T=3, B=2, I=2, H=2, kind="RNN_RELU", lengths=(0, 3), directions=2),
]  # fmt: skip


class Call(nn.Module):
    """A case as a module of its inputs."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.rnn = case, case.module(fastlstm, torch.float64)

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        hx: Any = states[0] if len(states) == 1 else states or None
        return tuple(fast(self.case, self.rnn, x, hx).values())


def as_function(case: Case) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The case as a function of x, the states and every parameter, and its arguments."""
    numbers, call = draw(case, torch.float64), Call(case)
    names = [name for name, _ in call.named_parameters()]
    inputs = ["x", *case.states] if case.hx else ["x"]

    def function(*arguments: Tensor) -> tuple[Tensor, ...]:
        weights = dict(zip(names, arguments[len(inputs) :], strict=True))
        return functional_call(call, weights, arguments[: len(inputs)])

    leaves = [numbers[n] for n in inputs] + [numbers[f"w.{n[4:]}"] for n in names]
    return function, [leaf.requires_grad_() for leaf in leaves]


@pytest.mark.slow
@pytest.mark.parametrize("case", CELLS, ids=str)
def test_gradgradcheck_of_cells(backend: str, case: Case) -> None:
    assert gradcheck(*as_function(case))
    assert gradgradcheck(*as_function(case), fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in (*CASES, *CELLS) if not c.packed], ids=str)
def test_forward_mode(backend: str, case: Case) -> None:
    """Dual numbers, and dual numbers through backward."""
    function, leaves = as_function(case)
    assert gradcheck(function, leaves, check_forward_ad=True, check_backward_ad=False)
    assert gradgradcheck(
        function,
        leaves,
        check_fwd_over_rev=True,
        check_rev_over_rev=False,
        check_undefined_grad=False,
        fast_mode=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES[3:8], *CELLS[:-1]], ids=str)
def test_third_order_by_differences(backend: str, case: Case) -> None:
    """The second derivative of a gradient that keeps its graph."""
    function, leaves = as_function(case)

    def slope(*arguments: Tensor) -> tuple[Tensor, ...]:
        value = sum(t.pow(3).sum() for t in function(*arguments))
        return torch.autograd.grad(value, arguments, create_graph=True)

    assert gradgradcheck(slope, leaves, fast_mode=True)


@pytest.mark.parametrize("case", [c for c in (*CASES, *CELLS) if c.packed], ids=str)
def test_forward_mode_of_packed(backend: str, case: Case) -> None:
    """In the rows: torch has no forward mode for packing itself."""
    rnn = case.module(fastlstm, torch.float64).eval()
    packed = pack(case, draw(case, torch.float64)["x"])

    def function(rows: Tensor) -> tuple[Tensor, ...]:
        y, final = rnn(packed._replace(data=rows))
        return y.data, *final_states(final).values()

    rows = packed.data.requires_grad_()
    assert gradcheck(function, rows, check_forward_ad=True)


@pytest.mark.parametrize("kinds", ["rr", "fr", "rf", "ff"])
@pytest.mark.parametrize("case", [CELLS[0], CELLS[1], CELLS[4]], ids=str)
def test_hessian_of_cells(backend: str, case: Case, kinds: str) -> None:
    """By differences of the gradient."""
    lstm = case.module(fastlstm, torch.float64)
    x = draw(case, torch.float64)["x"]

    def energy(x: Tensor) -> Tensor:
        return lstm(x)[0].pow(3).sum()

    def slope(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(energy(x), x)[0].flatten()

    outer, inner = ({"r": jacrev, "f": jacfwd}[kind] for kind in kinds)
    got = outer(inner(energy))(x).view(x.numel(), -1)
    step = 1e-6
    moves = step * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    want = torch.stack([(slope(x + m) - slope(x - m)) / (2 * step) for m in moves])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)  # those of gradcheck
