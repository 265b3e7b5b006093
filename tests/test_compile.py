"""torch.compile takes a layer as one node of one graph, forward and backward."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
from fastlstm import ops

T, B, I, H = 4, 3, 5, 6
LENGTHS = torch.tensor([2, 4, 1])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Nothing that was compiled by another test, and one thread: these layers are small."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Linear -> a recurrent layer -> Linear."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inward, self.layer = nn.Linear(I, I), layer
        directions = 2 if getattr(layer, "bidirectional", False) else 1
        self.outward = nn.Linear(directions * (getattr(layer, "proj_size", 0) or H), 2)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        y, *rest = self.layer(self.inward(x), *args, **options)
        return self.outward(y), *flat(rest)


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if part is not None for t in flat(part)]


def run(function: Callable[..., Any], parameters: Any, *args: Any, **options: Any) -> list[Tensor]:
    """Outputs and gradients of the parameters, from the same noise."""
    torch.manual_seed(1)
    outputs = flat(function(*args, **options))
    loss = sum(t.double().sin().square().sum() for t in outputs if t.requires_grad)
    found = torch.autograd.grad(loss, list(parameters))
    return [t.detach() for t in (*outputs, *found)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def x_of(T: int = T, B: int = B) -> Tensor:
    return torch.randn(T, B, I)


def test_one_graph(backend: str) -> None:
    """Forward and backward, and weights that an optimizer changes between calls."""
    model = Model(fastlstm.LSTM(I, H, 2, bidirectional=True))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        x = x_of()
        got = run(compiled, model.parameters(), x)
        assert_same(got, run(model, model.parameters(), x))
        with torch.no_grad():
            assert_same(flat(compiled(x)), flat(model(x)))
        optimizer.zero_grad()
        compiled(x)[0].square().sum().backward()
        optimizer.step()
    assert counter.frame_count == 2  # with gradients and without


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("how", ["marked", "dynamic=True", "automatic"])
@pytest.mark.parametrize("form", ["dense", "lengths", "batch_first"])
def test_other_sizes_compile_nothing(backend: str, form: str, how: str) -> None:
    model = Model(fastlstm.LSTM(I, H, 2, batch_first=form == "batch_first"))
    counter = CompileCounterWithBackend("aot_eager")
    dynamic = True if how == "dynamic=True" else None
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    counts = []
    for steps, batch in ((4, 3), (7, 5), (50, 2), (3, 17), (9, 9)):
        x = torch.randn(steps, batch, I)
        options = {}
        if form == "lengths":
            options["lengths"] = torch.arange(batch) % (steps + 1)
        if how == "marked":
            for dim in (0, 1):
                torch._dynamo.mark_dynamic(x, dim)
            for t in options.values():
                torch._dynamo.mark_dynamic(t, 0)
        got = run(compiled, model.parameters(), x, **options)
        assert_same(got, run(model, model.parameters(), x, **options))
        counts.append(counter.frame_count)
    assert counts == ([1, 2, 2, 2, 2] if how == "automatic" else [1] * 5)
