"""A batch spread over processes, or taken apart into samples, has the gradients of the whole.

Two processes train on half a batch each, under DistributedDataParallel and fully_shard (FSDP2).
What they learn has to be what one process with torch.nn learns from all of it, by the oracle of
the numerics. They run once for all tests of this file: starting them is what takes time.
"""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from oracle import compare, judge
from torch import Tensor, distributed, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
from fastlstm import extension

Results = dict[str, Tensor]

needs_processes = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)
T, B, I, H = 5, 4, 3, 4
STEPS, WORLD = 2, 2


class Model(nn.Module):
    """A stack of both directions whose outputs go step by step through a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(I, I)
        self.lstm = nn.LSTM(I, H, 2, bidirectional=True)
        self.cell = nn.LSTMCell(2 * H, H)
        self.outward = nn.Linear(H, 2)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        rows: Any = self.inward(x)
        if lengths is not None:
            rows = pack_padded_sequence(rows, lengths, enforce_sorted=False)
        y, (h_n, c_n) = self.lstm(rows)
        if lengths is not None:
            y = nn.utils.rnn.pad_packed_sequence(y, total_length=T)[0]
        state = h_n[-1], c_n[-1]
        for step in y:
            state = self.cell(step, state)
        return self.outward(state[0])


def build() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def batch(k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of step k: input, targets and, in every other one, lengths."""
    torch.manual_seed(1 + k)
    x, targets = torch.randn(T, B, I).to(dtype), torch.randn(B, 2).to(dtype)
    return x, targets, torch.tensor([2, 5, 1, 4]) if k % 2 else None


def train(model: nn.Module, share: slice = slice(None), dtype: Any = torch.float64) -> Results:
    """Gradients of every step and the final weights of one process."""
    learner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    results = {}
    for k in range(STEPS):
        x, targets, lengths = batch(k, dtype)
        y = model(x[:, share], None if lengths is None else lengths[share])
        learner.zero_grad()
        (y - targets[share]).square().mean().backward()
        results |= {f"d{k} {n}": whole(p.grad) for n, p in model.named_parameters()}
        learner.step()
    results |= {n: whole(p) for n, p in model.named_parameters()}
    return {name.replace("module.", ""): value.double() for name, value in results.items()}


def whole(t: Any) -> Tensor:
    """A copy of all of a tensor, gathered from every process if it is sharded."""
    t = t.detach()
    return t.full_tensor() if hasattr(t, "full_tensor") else t.clone()


@cache
def expectation() -> tuple[Results, dict[str, float]]:
    def solve(dtype: torch.dtype, weights: Results) -> Results:
        model = build().to(dtype)
        model.load_state_dict(weights)
        return train(model, dtype=dtype)

    return judge(solve, torch.float64, {k: v.double() for k, v in build().state_dict().items()})


def replicated(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def replicated_in_small_buckets(model: nn.Module) -> nn.Module:
    """Gradients are views of buckets that are sent while backward runs."""
    return nn.parallel.DistributedDataParallel(
        model, bucket_cap_mb=1e-4, gradient_as_bucket_view=True, static_graph=True
    )


def sharded(model: nn.Module, again: bool = True) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.init_device_mesh("cpu", (WORLD,))
    for module in (model.lstm, model.cell, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=again)
    return model


def sharded_until_forward(model: nn.Module) -> nn.Module:
    """The whole weights stay from forward to backward."""
    return sharded(model, again=False)


WRAPPERS = {
    wrapper.__name__: wrapper
    for wrapper in (replicated, replicated_in_small_buckets, sharded, sharded_until_forward)
}


def work(rank: int, backends: list[str], folder: str) -> None:
    """What one process does: every wrapper on every backend."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    share = slice(rank * B // WORLD, (rank + 1) * B // WORLD)
    found = {}
    for name in backends:
        for how, wrap in WRAPPERS.items():
            with fastlstm.backend(name):
                model = fastlstm.accelerate(build().double())
                found[name, how] = train(wrap(model), share)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Results]]:
    """What each process has found, for every backend and wrapper."""
    folder = tmp_path_factory.mktemp("workers")
    backends = [name for name in BACKENDS if name != "cpu" or extension.error() is None]
    torch.multiprocessing.spawn(work, (backends, str(folder)), WORLD)
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(WORLD)]


@needs_processes
@pytest.mark.parametrize("how", WRAPPERS)
def test_processes_learn_what_one_does(
    backend: str, how: str, workers: list[dict[Any, Results]]
) -> None:
    for rank, found in enumerate(workers):
        compare(f"{how}, process {rank}", found[backend, how], *expectation())
    first, second = (found[backend, how] for found in workers)
    for name, value in first.items():  # the processes stay together to the last bit
        assert torch.equal(value, second[name]), name


MODULES: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(I, H),
    "no bias": lambda: nn.LSTM(I, H, bias=False),
    "stacked, both directions": lambda: nn.LSTM(I, H, 2, bidirectional=True),
    "projected": lambda: nn.LSTM(I, H, 2, bidirectional=True, proj_size=2),
    "RNN": lambda: nn.RNN(I, H, 2, bidirectional=True),
    "relu": lambda: nn.RNN(I, H, nonlinearity="relu"),
}
LENGTHS = torch.tensor([3, 0, 5, 1])


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """A module of torch.nn and its replacement, with weights of its own."""
    theirs = MODULES[name]().double()
    return theirs, fastlstm.accelerate(copy.deepcopy(theirs))


def loss(outputs: Any) -> Tensor:
    """A number that depends on every output, unevenly."""
    if isinstance(outputs, Tensor):
        return outputs.sin().square().sum()
    return sum((loss(t) for t in outputs), torch.zeros((), dtype=torch.float64))


def weights_of(module: nn.Module) -> Results:
    return {k: p.detach() for k, p in module.named_parameters()}


def assert_close(got: Any, want: Any, name: str = "") -> None:
    """Equal but for the order of sums: at most T * L steps, each of so many terms of order 1."""
    scale = max(1.0, want.abs().max().item())
    bound = 2 * T * (2 * H + I + 4) * torch.finfo(want.dtype).eps * scale
    torch.testing.assert_close(got, want, rtol=0, atol=bound, msg=lambda m: f"{name}: {m}")


def by_loop(module: nn.Module, calls: list[tuple[Any, ...]]) -> Results:
    """The gradient of each call in every parameter."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    each = [torch.autograd.grad(loss(module(*call)), parameters) for call in calls]
    return {n: torch.stack(g) for n, g in zip(names, zip(*each, strict=True), strict=True)}


def per_sample(module: nn.Module, in_dims: Any, *arguments: Any, **options: Any) -> Results:
    """The same by torch.func; an option's dimension is its first one."""

    def of_sample(weights: Results, call: Any, chosen: Any) -> Tensor:
        return loss(functional_call(module, weights, call, chosen))

    run = vmap(grad(of_sample), (None, in_dims, 0))
    return run(weights_of(module), arguments, options)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("form", ["unbatched", "batched", "state"])
def test_per_sample_gradients(backend: str, form: str, name: str) -> None:
    """vmap(grad) is a loop over samples; of a layer that a state begins, too."""
    theirs, ours = twins(name)
    x = torch.randn(T, B, I, dtype=torch.float64)
    hx: Any = torch.randn(3 * B, theirs.num_layers * (1 + theirs.bidirectional), H).double()
    if form == "unbatched":
        want = by_loop(theirs, [(x[:, b],) for b in range(B)])
        got = per_sample(ours, (1,), x)
    elif form == "batched":
        x = torch.stack([x, -2 * x, x / 2])  # three samples of B sequences each
        want = by_loop(theirs, [(sample,) for sample in x])
        got = per_sample(ours, (0,), x)
    else:
        h0 = hx[:B].transpose(0, 1)
        P = getattr(theirs, "proj_size", 0) or H
        h0, c0 = h0[..., :P], hx[B : 2 * B].transpose(0, 1)
        hx = (h0, c0) if theirs.mode == "LSTM" else h0
        pick = (lambda b: (h0[:, b], c0[:, b])) if theirs.mode == "LSTM" else lambda b: h0[:, b]
        want = by_loop(theirs, [(x[:, b], pick(b)) for b in range(B)])
        got = per_sample(ours, (1, 1), x, hx)
    assert got.keys() == want.keys()
    for k in want:
        assert_close(got[k], want[k], k)


@pytest.mark.parametrize("name", MODULES)
def test_per_sample_gradients_of_lengths(backend: str, name: str) -> None:
    """NaN in the padding of a sample reaches no gradient."""
    theirs, ours = twins(name)
    x = torch.randn(T, B, I, dtype=torch.float64)
    for b, n in enumerate(LENGTHS.tolist()):
        x[n:, b] = torch.nan
    got = per_sample(ours, (1,), x, lengths=LENGTHS)
    for b, n in enumerate(LENGTHS.tolist()):
        if n:
            want = by_loop(theirs, [(x[:n, b],)])
        else:
            want = {k: torch.zeros_like(p)[None] for k, p in theirs.named_parameters()}
        for k in want:
            assert_close(got[k][b], want[k][0], k)


@pytest.mark.parametrize("name", ["LSTM", "projected", "RNN"])
def test_per_sample_gradients_of_packed(backend: str, name: str) -> None:
    """Samples are whole packed batches of the same lengths."""
    theirs, ours = twins(name)
    lengths = torch.tensor([5, 3, 1])
    samples = [pack_padded_sequence(torch.randn(T, 3, I).double(), lengths) for _ in range(B)]
    sizes = samples[0].batch_sizes

    def of_sample(weights: Results, data: Tensor) -> Tensor:
        y, final = functional_call(ours, weights, (PackedSequence(data, sizes),))
        return loss((y.data, final))

    got = vmap(grad(of_sample), (None, 0))(
        weights_of(ours), torch.stack([s.data for s in samples])
    )
    names, parameters = zip(*theirs.named_parameters(), strict=True)
    for k, sample in enumerate(samples):
        y, final = theirs(sample)
        want = torch.autograd.grad(loss((y.data, final)), parameters)
        for n, g in zip(names, want, strict=True):
            assert_close(got[n][k], g, n)


@pytest.mark.parametrize("bias", [True, False])
def test_per_sample_gradients_of_a_cell(backend: str, bias: bool) -> None:
    theirs = nn.LSTMCell(I, H, bias).double()
    ours = fastlstm.accelerate(copy.deepcopy(theirs))
    x, h, c = (torch.randn(B, n, dtype=torch.float64) for n in (I, H, H))
    want = by_loop(theirs, [(x[b], (h[b], c[b])) for b in range(B)])
    got = per_sample(ours, (0, 0), x, (h, c))
    for k in want:
        assert_close(got[k], want[k], k)


def test_per_sample_gradients_of_resets(backend: str) -> None:
    """A sample that is reset at step t has the gradients of two shorter ones."""
    theirs, ours = twins("LSTM")
    x = torch.randn(T, B, I, dtype=torch.float64)
    reset = torch.zeros(B, T, dtype=torch.bool)
    cuts = [1, 2, 3, 4]
    reset[torch.arange(B), torch.tensor(cuts)] = True

    def of_sample(weights: Results, x: Tensor, reset: Tensor) -> Tensor:
        return loss(functional_call(ours, weights, (x,), {"reset": reset})[0])

    got = vmap(grad(of_sample), (None, 1, 0))(weights_of(ours), x, reset)
    names, parameters = zip(*theirs.named_parameters(), strict=True)
    for b, cut in enumerate(cuts):
        parts = loss([theirs(x[:cut, b])[0], theirs(x[cut:, b])[0]])
        for n, g in zip(names, torch.autograd.grad(parts, parameters), strict=True):
            assert_close(got[n][b], g, n)


OPTIONS: list[dict[str, Any]] = [
    {"peephole": True, "bidirectional": True},
    {"layer_norm": True, "proj_size": 2},
    {"zoneout": (0.3, 0.2), "num_layers": 2},
    {"recompute": True},
    {"peephole": True, "layer_norm": True, "zoneout": (0.1, 0.2), "bidirectional": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_per_sample_gradients_of_other_cells(backend: str, options: dict[str, Any]) -> None:
    """A loop over the same module, there is no other."""
    lstm = fastlstm.LSTM(I, H, dtype=torch.float64, **options).eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    want = by_loop(lstm, [(x[:, b],) for b in range(B)])
    got = per_sample(lstm, (1,), x)
    for k in want:
        torch.testing.assert_close(got[k], want[k])


NOISES: list[dict[str, Any]] = [
    {"recurrent_dropout": 0.5},
    {"weight_dropout": 0.5},
    {"zoneout": (0.5, 0.5)},
    {"dropout": 0.5, "num_layers": 2},
]


@pytest.mark.parametrize("options", NOISES, ids=str)
def test_noise_of_samples(backend: str, options: dict[str, Any]) -> None:
    """vmap's `randomness` decides whether samples share their noise."""
    lstm = fastlstm.LSTM(I, H, dtype=torch.float64, **options)
    x = torch.randn(T, 1, 1, I, dtype=torch.float64).expand(T, 3, 1, I)

    def gradients(randomness: str) -> Results:
        def of_sample(weights: Results, x: Tensor) -> Tensor:
            return loss(functional_call(lstm, weights, (x,)))

        run = vmap(grad(of_sample), (None, 1), randomness=randomness)
        return run(weights_of(lstm), x)

    torch.manual_seed(1)
    same = gradients("same")
    torch.manual_seed(1)
    want = by_loop(lstm, [(x[:, 0],)])
    for k in want:
        assert_close(same[k], want[k].expand_as(same[k]), k)
    different = gradients("different")
    assert not any(torch.equal(*different["weight_ih_l0"][[a, b]]) for a, b in ((0, 1), (1, 2)))
    with pytest.raises(RuntimeError, match="randomness"):
        gradients("error")
