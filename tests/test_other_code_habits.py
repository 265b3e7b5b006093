"""What other people's code does around a module: with its weights, in processes, at many shapes.

Each test is named after what a user does. The yardstick is ``torch.nn`` on the same lines.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from oracle import compare, judge
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.optim import swa_utils
from torch.utils.data import DataLoader, Dataset

import fastlstm

T, B, I, H = 5, 3, 6, 8
CPU = pytest.mark.parametrize("backend", ["cpu"], indirect=True)
EVERY_KIND = pytest.mark.parametrize("kind", ["LSTM", "LSTMCell", "RNN"])
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="it forks after threads ran")


def pair(kind: str = "LSTM", n_in: int = I, n_hidden: int = H, **options: Any) -> tuple[Any, Any]:
    """A module of torch.nn and the same of this library."""
    theirs = getattr(nn, kind)(n_in, n_hidden, **options)
    return theirs, getattr(fastlstm, kind).from_torch(copy.deepcopy(theirs))


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def train(module: nn.Module, x: Tensor, steps: int = 3) -> Iterator[int]:
    """Make steps of SGD; after each it is the caller's turn."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for k in range(steps):
        optimizer.zero_grad()
        sum(t.square().sum() for t in flat(module(x))).backward()
        optimizer.step()
        yield k


# ---- weights ------------------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_going_step_by_step_through_a_wide_layer(
    backend: str, batch: int, edit: bool, kind: str
) -> None:
    """Also where all weights change before every step."""
    found = []
    x = torch.randn(4, batch, 256)
    for module in pair(kind, 256, 512):
        hx, states = None, []
        with torch.no_grad():
            for row in x:
                if edit:
                    for p in module.parameters():
                        p.mul_(0.75)
                result = module(row if kind == "LSTMCell" else row[None], hx)
                hx = result if kind == "LSTMCell" else result[1]
                states += flat(hx)
        found.append(states)
    torch.testing.assert_close(found[1], found[0])


MADE: dict[str, Callable[[Any], object]] = {
    "pruned": lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.5),
    "rows pruned": lambda m: prune.ln_structured(m, "weight_ih_l0", 3, n=2, dim=0),
    "spectral_norm": lambda m: spectral_norm(m, "weight_hh_l0"),
    # Every reading of it is an iteration, and nn.LSTM reads twice a call: both have to converge.
    "parametrized": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0", 50),
}


@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
@pytest.mark.parametrize("before", [False, True])
def test_training_weights_that_are_pruned_or_normalised(
    backend: str, before: bool, make: Any, kind: str
) -> None:
    """Before or after `accelerate`; and what is pruned stays 0 when pruning becomes permanent."""
    theirs, _ = pair(kind, dtype=torch.float64)
    models = [nn.Sequential(theirs), copy.deepcopy(nn.Sequential(theirs))]
    for model, change in zip(models, (lambda m: m, fastlstm.accelerate), strict=True):
        for act in (make, change) if before else (change, make):
            torch.manual_seed(1)
            act(model if act is change else model[0])
    x, found = torch.randn(T, B, I, dtype=torch.float64), []
    for model in models:
        for _ in train(model, x):
            pass
        model.eval()
        found.append([*flat(model(x)), *model.parameters()])
        if prune.is_pruned(model):
            name = next(n for n, _ in model[0].named_parameters() if n.endswith("_orig"))[:-5]
            prune.remove(model[0], name)
            assert (getattr(model[0], name) == 0).sum() >= 18
            found[-1] += flat(model(x))
    torch.testing.assert_close(found[1], found[0])


@EVERY_KIND
@pytest.mark.parametrize("exponential", [False, True])
def test_averaging_weights_while_they_learn(backend: str, exponential: bool, kind: str) -> None:
    x, found = torch.randn(*(B, I) if kind == "LSTMCell" else (T, B, I), dtype=torch.float64), []
    how = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.5)} if exponential else {}
    for module in pair(kind, dtype=torch.float64):
        average = swa_utils.AveragedModel(module, **how)
        results = []
        for _ in train(module, x, 4):
            average.update_parameters(module)
            with torch.no_grad():
                results += flat(average(x))
        found.append(results)
    torch.testing.assert_close(found[1], found[0])


def test_training_in_float16_with_a_grad_scaler(backend: str) -> None:
    """Under autocast, where nn.LSTM raises; as exact as nn.LSTM that is float16 throughout."""
    ours = fastlstm.LSTM(I, H, bidirectional=True)
    numbers = {name: p.detach().half().double() for name, p in ours.named_parameters()}
    numbers["x"] = torch.randn(T, B, I).half().double()

    def solve(dtype: torch.dtype, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs = nn.LSTM(I, H, bidirectional=True, dtype=dtype)
        theirs.load_state_dict({name: numbers[name] for name in theirs.state_dict()})
        theirs(numbers["x"].to(dtype))[0].sum().backward()
        return {name: p.grad.double() for name, p in theirs.named_parameters()}

    ours.load_state_dict({name: numbers[name] for name in ours.state_dict()})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    with torch.autocast("cpu", torch.float16):
        y, _ = ours(numbers["x"].float())
        assert y.dtype is torch.float16
        scaler.scale(y.sum()).backward()
    scaler.unscale_(optimizer)
    found = {name: p.grad.double() for name, p in ours.named_parameters()}
    compare("scaled", found, *judge(solve, torch.float16, numbers))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024
    assert all((p != numbers[name]).any() for name, p in ours.named_parameters())


@CPU
@pytest.mark.parametrize("kept", ["nothing", "recompute", "layer_norm"])
def test_putting_new_tensors_into_data_before_backward(backend: str, kept: str) -> None:
    """Only layer_norm keeps all; else the products of backward take them, as in nn.LSTM."""
    theirs, ours = pair()
    if kept == "layer_norm":
        ours = fastlstm.LSTM(I, H, layer_norm=True)
    ours.recompute = kept == "recompute"
    x, found = torch.randn(T, B, I), []
    new = [torch.randn_like(p) for p in ours.parameters()]
    for module, edit in (
        (ours if kept == "layer_norm" else theirs, kept != "layer_norm"),
        (ours, True),
    ):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        y, _ = module(leaf)
        for p, value in zip(module.parameters(), new, strict=True):
            p.data = value.clone() if edit else p.data
        y.square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(found[1], found[0])


@CPU
def test_changing_the_shape_of_a_weight_before_backward(backend: str) -> None:
    """nn.LSTM reads past its memory."""
    for name, shape in (("weight_hh_l0", (3 * H, H)), ("weight_ih_l0", (4 * H, I - 1))):
        module = fastlstm.LSTM(I, H)
        y, _ = module(torch.randn(T, B, I))
        getattr(module, name).data = torch.randn(shape)
        with pytest.raises(RuntimeError, match=rf"{name[:9]}.* got \[{shape[0]}, {shape[1]}\]"):
            y.sum().backward()


@EVERY_KIND
def test_making_a_model_private(kind: str) -> None:
    """Opacus looks type(module) up, builds its own by these attributes and loads the weights."""
    source = getattr(nn, kind)(I, H)
    given = fastlstm.restore(fastlstm.accelerate(nn.Sequential(source)))[0]
    assert type(given) is type(source)
    settings = {k: v for k, v in vars(source).items() if isinstance(v, (int, float, str))}
    assert settings == {k: v for k, v in vars(given).items() if k in settings}
    assert list(given.state_dict()) == list(source.state_dict())
    assert all(type(p) is nn.Parameter and p.is_leaf for p in given.parameters())


# ---- processes ----------------------------------------------------------------------------------


@contextmanager
def one_thread() -> Iterator[None]:
    """What a child of fork may use of PyTorch: OpenMP's threads do not survive."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def learn(module: nn.Module, x: Tensor) -> None:
    """What a process does with weights that others change, too."""
    torch.set_num_threads(1)
    for _ in train(module, x, 20):
        pass


def learn_in_two_processes() -> None:
    """Hogwild: whoever wrote last, the module answers with what is there."""
    theirs, ours = pair(n_hidden=32, num_layers=2)
    ours.share_memory()
    x = torch.randn(T, B, I)
    before, _ = ours(x)
    fork = torch.multiprocessing.get_context("fork")
    with one_thread():
        children = [fork.Process(target=learn, args=(ours, x)) for _ in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join()
    assert [child.exitcode for child in children] == [0, 0]
    after, _ = ours(x)
    assert after.square().sum() < before.square().sum()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(after, theirs(x)[0])


@CPU
@needs_fork
def test_learning_in_processes_that_share_the_weights(backend: str) -> None:
    """PyTorch forbids it after a backward that saw a GPU, or one that torch.compile pretended."""
    code = f"import fastlstm, {__name__} as t; fastlstm.backend('{backend}')"
    command = [sys.executable, "-W", "ignore", "-c", f"{code}; t.learn_in_two_processes()"]
    subprocess.run(command, cwd=os.path.dirname(__file__), check=True)


class Encoded(Dataset[Tensor]):
    """Rows that go through a frozen layer in whatever process loads them."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.rows = layer.requires_grad_(False), torch.randn(6, T, I)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> Tensor:
        return self.layer(self.rows[k])[0]


@CPU
@pytest.mark.parametrize(
    "start",
    [pytest.param("fork", marks=needs_fork), pytest.param("spawn", marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_loading_data_by_workers_that_compute(backend: str, start: str) -> None:
    theirs, ours = pair(batch_first=True)
    data = Encoded(ours)
    want = torch.stack([theirs(rows)[0] for rows in data.rows]).detach()
    torch.testing.assert_close(torch.stack([*data]), want)
    with one_thread():
        loader = DataLoader(data, 3, num_workers=2, multiprocessing_context=start)
        torch.testing.assert_close(torch.cat([*loader]), want)


@CPU
def test_computing_beside_processes_that_want_the_cores(backend: str) -> None:
    """Calls have fewer threads then, and the same bits."""
    module, x = fastlstm.LSTM(64, 128), torch.randn(20, 16, 64)

    def call() -> list[Tensor]:
        module.zero_grad()
        y, _ = module(x)
        y.sum().backward()
        return [y.detach(), *(p.grad for p in module.parameters())]

    torch.set_num_threads(2)
    want = call()
    forever = [sys.executable, "-S", "-c", "while True: pass"]
    others = [subprocess.Popen(forever) for _ in range(2 * min(os.cpu_count() or 1, 4))]
    try:
        for _ in range(20):
            assert all(map(torch.equal, call(), want))
    finally:
        for other in others:
            other.kill()
            other.wait()


# ---- calls --------------------------------------------------------------------------------------


def test_calls_of_ever_changing_shapes(backend: str) -> None:
    """Each is right, and a module keeps no more after the last one than after the first."""
    theirs, ours = pair(num_layers=2)
    kept = []
    for n in range(1, 31):
        x = torch.randn(1 + 7 * n % 13, 1 + 5 * n % 11, I)
        y, _ = ours(x)
        y.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(y, theirs(x)[0])
        kept.append(sum(t.nbytes for cache in ours._caches for t in cache.values()))
    assert max(kept[15:]) <= max(kept[:15])
