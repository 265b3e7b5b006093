"""On a GPU: the cells that nn.LSTM lacks, nn.RNN, and torch.func.

The backend is "auto" of a machine on which the kernels are proven: what they lack (see
`fastlstm.explain`) is PyTorch's or the reference's.
"""

from collections.abc import Iterator
from typing import Any

import gpu
import pytest
import torch
from cases import Case
from gpu import DEVICE, check, every_precision
from test_cells import EACH, RECOMPUTED, RNN, TOGETHER, WIDE, WIDE_NORMALISED
from torch import Tensor
from torch.func import functional_call, grad, hessian, stack_module_state, vmap

import fastlstm
from benchmarks.speed.precision import PRECISIONS, Precision
from fastlstm import automatic
from fastlstm.kernels.base import get

pytestmark = [*gpu.MARKS, pytest.mark.only("triton")]

MORE = [
    Case(T=50, B=64, I=28, H=64, peephole=True, layer_norm=True, directions=2),
    Case(T=8, B=9, I=28, H=128, noise=True, zoneout=(0.2, 0.1), peephole=True),
    Case(T=20, B=16, I=28, H=256, recompute=True, layers=2),
    Case(T=50, B=64, I=28, H=128, kind="RNN_TANH", directions=2),
    Case(T=20, B=16, I=28, H=512, kind="RNN_RELU", layers=2),
]


CASES = EACH + TOGETHER + WIDE + WIDE_NORMALISED + RECOMPUTED + RNN + MORE


@pytest.fixture(autouse=True)
def auto(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(get("triton"), "proven", True)
    automatic._automatic.cache_clear()
    with fastlstm.backend("auto"):
        yield
    monkeypatch.undo()
    automatic._automatic.cache_clear()
    torch.cuda.empty_cache()


@every_precision
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_that_of_the_book(case: Case, precision: Precision) -> None:
    check(case, precision)


@pytest.mark.parametrize("options", [{"peephole": True}, {"layer_norm": True}, {}], ids=str)
def test_the_kernels_have_them(options: dict[str, Any]) -> None:
    x = torch.zeros(5, 16, 28, device=DEVICE, dtype=torch.bfloat16)
    modules: list[Any] = [
        fastlstm.LSTM(28, 64, zoneout=(0.1, 0.1), recurrent_dropout=0.5, **options)
    ]
    modules += [fastlstm.RNN(28, 64)]
    for module in modules:
        assert fastlstm.explain(module.to(x), x).backend == "triton"


def test_a_graph_draws_anew_at_every_replay() -> None:
    lstm = fastlstm.LSTM(28, 64, zoneout=(0.5, 0.5), recurrent_dropout=0.5).to(DEVICE)
    x = torch.randn(5, 16, 28, device=DEVICE)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        lstm(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y, _ = lstm(x)
    found = []
    for _ in range(2):
        graph.replay()
        found.append(y.clone())
    assert not torch.equal(*found)


def near(got: Tensor, want: Tensor) -> None:
    """Equal but for the order in which some hundred numbers are added, in TF32 at worst."""
    torch.testing.assert_close(got, want, rtol=0, atol=100 * 2**-11 * want.abs().max().item())


@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.RNN])
def test_torch_func(kind: Any) -> None:
    with PRECISIONS["exact"].applied():
        module = kind(10, 33, bidirectional=True).to(DEVICE)
        x = torch.randn(4, 6, 3, 10, device=DEVICE)
        weights = {name: p.detach() for name, p in module.named_parameters()}

        def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(module, p, (x,))[0].square().sum()

        near(vmap(lambda x: module(x)[0])(x), torch.stack([module(one)[0] for one in x]))
        each = vmap(grad(loss), (None, 0))(weights, x)
        loop = [grad(loss)(weights, one) for one in x]
        for name, found in each.items():
            near(found, torch.stack([one[name] for one in loop]))
        models = [kind(10, 33, bidirectional=True).to(DEVICE) for _ in range(3)]
        stacked, _ = stack_module_state(models)
        run = vmap(lambda p: functional_call(module, p, (x[0],))[0])
        near(run(stacked), torch.stack([model(x[0])[0] for model in models]))
        energy = lambda x: module(x)[0].pow(3).sum()  # noqa: E731
        near(hessian(energy)(x[0, :2]), torch.autograd.functional.hessian(energy, x[0, :2]))
