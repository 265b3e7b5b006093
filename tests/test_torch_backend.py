"""PyTorch's own kernels as a backend: to the bit what the modules of torch.nn compute."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Case, draw, evaluate, fast, plain
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastlstm
from fastlstm import automatic
from fastlstm.automatic import candidates
from fastlstm.backends import choice, select
from fastlstm.kernels import measured
from fastlstm.kernels.base import get
from fastlstm.kernels.pytorch import TORCH, calls
from fastlstm.spec import LayerSpec

T, B, I, H = 5, 3, 4, 6
SPEC = LayerSpec("LSTM", I, H)
CASES = [
    Case(T=1, B=1, I=1, H=1),
    Case(T=5, B=3, I=10, H=16, layers=2, directions=2),
    Case(T=5, B=2, I=28, H=16, layers=3, bias=False, batch_first=True),
    Case(T=5, B=5, I=3, H=17, proj=5, directions=2, hx=False),
    Case(T=3, B=0, I=3, H=5),
    Case(T=5, B=6, I=10, H=17, x_layout="transposed", hx_layout="transposed"),
    Case(T=5, B=3, I=33, H=33, x_layout="sliced", hx_layout="sliced", grad_layout="sliced"),
    Case(T=5, B=3, I=10, H=17, wrt=("weight_ih_l0", "bias_hh_l0"), hx=False),
    Case(T=5, B=3, I=10, H=17, through=("c_n",), directions=2),
    Case(T=7, B=4, I=5, H=8, lengths=(3, 7, 1, 7), packed=True, layers=2, directions=2),
    Case(T=5, B=3, I=10, H=8, kind="RNN_TANH", layers=2, directions=2, batch_first=True),
    Case(T=7, B=4, I=5, H=8, kind="RNN_RELU", lengths=(3, 7, 1, 7), packed=True),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "auto without kernels"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend by its name, and by auto on a device for which this library has no kernels."""
    if request.param == "torch":
        with fastlstm.backend("torch"):
            yield "torch"
        return
    monkeypatch.setattr(automatic, "_ON_CPU", automatic._automatic("mps"))
    with fastlstm.backend("auto"):
        monkeypatch.setattr(choice, "fast", None)
        yield "auto"


def pair(kind: str = "LSTM", *sizes: Any, **options: Any) -> tuple[Any, Any]:
    """A module of torch.nn, and one of this library with the same parameters."""
    theirs = getattr(nn, kind)(*(sizes or (I, H)), **options)
    return theirs, getattr(fastlstm, kind).from_torch(theirs)


def flat(results: Any) -> list[Tensor]:
    """All tensors of what a module returns."""
    if isinstance(results, PackedSequence):
        return [results.data]
    if isinstance(results, Tensor):
        return [results]
    return [t for part in results for t in flat(part)]


def same(ours: Any, theirs: Any) -> None:
    """Assert that both are the same, to the bit."""
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert a.dtype is b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)


# ---- to the bit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_has_the_bits_of_torch_nn(case: Case, dtype: torch.dtype, chosen: str) -> None:
    numbers = draw(case, dtype)
    ours, theirs = (evaluate(case, dtype, numbers, how) for how in (fast, plain))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_the_inputs_of_pytorchs_own_tests(kind: str, chosen: str) -> None:
    """Those of `module_inputs_torch_nn_LSTM` and of `RNN_GRU`: every product of the options."""
    flags = (False, True)
    more = (0, 2) if kind == "LSTM" else ("tanh", "relu")
    for bias, batch_first, two, extra, training in product(flags, flags, flags, more, flags):
        options = {"proj_size" if kind == "LSTM" else "nonlinearity": extra}
        theirs, ours = pair(
            kind, 2, 3, 2, bias=bias, batch_first=batch_first, bidirectional=two,
            dropout=0.1, **options,
        )  # fmt: skip
        rows = 2 * (1 + two)
        for shape, batch in ((3, 2), ()), ((3, 5, 2), (3 if batch_first else 5,)):
            x = torch.randn(shape)
            h = torch.randn(rows, *batch, theirs.proj_size or 3)
            hx: Any = (h, torch.randn(rows, *batch, 3)) if kind == "LSTM" else h
            for given in (x,), (x, hx):
                found = []
                for module in (ours.train(training), theirs.train(training)):
                    torch.manual_seed(7)
                    results = module(*given)
                    weights = list(module.parameters())
                    grads = torch.autograd.grad(flat(results)[0].square().sum(), weights)
                    found.append((*flat(results), *grads))
                same(*found)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_cells(batched: bool, given: bool, chosen: str) -> None:
    theirs, ours = pair("LSTMCell")
    x = torch.randn(B, I)[slice(None) if batched else 0]
    hx = torch.randn(2, B, H)[:, slice(None) if batched else 0].unbind(0) if given else None
    same(ours(x, hx), theirs(x, hx))
    with torch.no_grad():
        same(ours(x, hx), theirs(x, hx))
    found = [torch.autograd.grad(m(x, hx)[1].sum(), list(m.parameters())) for m in (ours, theirs)]
    same(*found)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_autocast_is_pytorchs(kind: str, packed: bool, chosen: str) -> None:
    theirs, ours = pair(kind, num_layers=2, batch_first=True)
    x: Any = torch.randn(B, T, I)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([5, 2, 4]), True, enforce_sorted=False)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x), theirs(x)
    same(a, b)
    found = [
        torch.autograd.grad(flat(y)[0].float().sum(), list(m.parameters()))
        for y, m in ((a, ours), (b, theirs))
    ]
    same(*found)


def test_edits_of_weights_are_seen(chosen: str) -> None:
    theirs, ours = pair()
    x = torch.randn(T, B, I)
    same(ours(x), theirs(x))
    with torch.no_grad():
        theirs.weight_hh_l0.mul_(2)
    theirs.bias_ih_l0.data = torch.randn(4 * H)
    same(ours(x), theirs(x))


# ---- what torch.nn lacks, and what it gets all the same -----------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_lengths_on_the_cpu_are_packed(grad: bool, chosen: str) -> None:
    """Zero and unsorted lengths too; NaN in the padding stays where it is."""
    theirs, ours = pair(num_layers=2, bidirectional=True)
    lengths = torch.tensor([2, 0, 5])
    x, hx = torch.randn(T, B, I), (torch.randn(4, B, H), torch.randn(4, B, H))
    x[3, 0] = torch.nan
    with torch.set_grad_enabled(grad):
        y, (h, c) = ours(x, hx, lengths=lengths)
    some = [2, 0]
    given = pack_padded_sequence(x[:, some], lengths[some])
    rows, (h_n, c_n) = theirs(given, tuple(s[:, some] for s in hx))
    assert torch.equal(y[:, some], pad_packed_sequence(rows, total_length=T)[0])
    assert torch.equal(h[:, some], h_n)
    assert torch.equal(c[:, some], c_n)
    assert torch.equal(h[:, 1], hx[0][:, 1])
    assert not y[:, 1].any()
    if grad:
        assert torch.autograd.grad(y.sum(), ours.weight_ih_l0)[0].isfinite().all()


def test_no_sequence_has_a_step(chosen: str) -> None:
    _, ours = pair()
    y, (h, _) = ours(torch.randn(T, B, I), lengths=torch.zeros(B, dtype=torch.int64))
    assert not y.any()
    assert not h.any()


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {"reset": torch.zeros(T, B, dtype=torch.bool)}, "torch.nn has no reset"),
        ({}, {"return_cell_states": True}, "torch.nn does not return the cell states"),
        ({"peephole": True}, {}, "torch.nn has the plain cell only"),
        ({"layer_norm": True}, {}, "torch.nn has the plain cell only"),
        ({"zoneout": (0.1, 0.1)}, {}, "torch.nn has the plain cell only"),
        ({}, {"lengths": torch.ones(B, dtype=torch.int64, device="meta")}, "these are on meta"),
    ],
)
def test_what_it_lacks_is_named(options: Any, call: Any, message: str) -> None:
    lstm, x = fastlstm.LSTM(I, H, **options), torch.randn(T, B, I)
    with fastlstm.backend("torch"), pytest.raises(RuntimeError, match=message):
        lstm(x, **call)


def test_recompute_and_weight_dropout(chosen: str) -> None:
    _, ours = pair()
    x = torch.randn(T, B, I)
    wanted = [torch.autograd.grad(ours(x)[0].square().sum(), list(ours.parameters()))]
    ours.recompute = True
    same(torch.autograd.grad(ours(x)[0].square().sum(), list(ours.parameters())), wanted)
    ours.weight_dropout = 1.0  # of nothing remains a recurrence
    theirs = nn.LSTM(I, H)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        theirs.weight_hh_l0.zero_()
        same(ours(x), theirs(x))


def test_auto_has_second_derivatives_where_cudnn_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they are the reference's, also of a call under autocast."""
    _, ours = pair(num_layers=2, bidirectional=True)
    x, hx = torch.randn(T, B, I, requires_grad=True), (torch.randn(4, B, H),) * 2
    wanted = [x, *ours.parameters()]

    def penalty() -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(ours(x, hx)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), wanted)

    with fastlstm.backend("reference"):
        truth = penalty()
    monkeypatch.setattr(type(TORCH), "has_second", lambda self, x: False)  # as cuDNN has none
    monkeypatch.setattr(automatic, "_ON_CPU", automatic._automatic("mps"))
    with fastlstm.backend("auto"):
        assert fastlstm.explain(ours, x).backend == "torch"
        for got, want in zip(penalty(), truth, strict=True):
            torch.testing.assert_close(got, want)
        with torch.autocast("cpu", torch.bfloat16):
            y = ours(x, hx)[0]
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert dx.requires_grad


def test_compiled_code_and_transforms(chosen: str) -> None:
    """They see the operators of a layer, whose results are the same."""
    _, ours = pair(num_layers=2)
    x = torch.randn(T, B, I)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    weights = list(ours.parameters())
    first, second = (
        (y := module(x)[0], torch.autograd.grad(y.square().sum(), weights))
        for module in (compiled, ours)
    )
    for got, want in zip(flat(first), flat(second), strict=True):
        torch.testing.assert_close(got, want)
    alone = torch.stack([ours(x[:, b])[0] for b in range(B)], 1)
    torch.testing.assert_close(torch.vmap(lambda v: ours(v)[0], 1, 1)(x), alone)
    grads = torch.func.grad(lambda v: ours(v)[0].square().sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(grads, torch.autograd.grad(ours(leaf)[0].square().sum(), leaf)[0])


# ---- weights in one chunk, as cuDNN wants them --------------------------------------------------


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands in for cuDNN: moves weights into one chunk, and counts how often."""
    calls_made: list[int] = []

    def flatten(weights: list[Tensor], *sizes: Any) -> None:
        calls_made.append(len(weights))
        chunk = torch.cat([w.detach().flatten() for w in weights])
        for w, part in zip(weights, chunk.split([w.numel() for w in weights]), strict=True):
            w.data = part.view(w.shape)

    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", flatten)
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda w: True)
    return calls_made


def test_parameters_move_into_one_chunk_once(chunks: list[int]) -> None:
    theirs, ours = pair()
    x, weights, cache = torch.randn(T, B, I), list(ours.parameters()), ours._caches[0]
    before = theirs(x)
    for _ in range(3):
        assert calls._flattened(SPEC, 1, x, weights, cache)[0] is weights[0]
    assert chunks == [4]
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
    same(theirs(x), before)
    weights[1].data = torch.zeros(4 * H, H)
    assert not calls._flattened(SPEC, 1, x, weights, cache)[1].any()
    assert chunks == [4, 4]


def test_other_weights_are_copied_with_their_gradients(chunks: list[int]) -> None:
    """Those of torch.func.functional_call, parametrizations and fastlstm.functional."""
    made = [w.detach().clone().requires_grad_() for w in fastlstm.LSTM(I, H).parameters()]
    copies = calls._flattened(SPEC, 1, torch.randn(T, B, I), made, {})
    assert len({w.untyped_storage().data_ptr() for w in made}) == 4
    same(copies, made)
    torch.stack([w.sum() for w in copies]).sum().backward()
    assert all(w.grad is not None and (w.grad == 1).all() for w in made)


# ---- which backend auto takes, on devices that are not here -------------------------------------


def on(device: str, dtype: torch.dtype = torch.float32) -> Any:
    """As much of a tensor on a device as choosing a backend looks at."""
    return SimpleNamespace(
        is_cpu=device == "cpu",
        is_cuda=device == "cuda",
        device=torch.device(device),
        dtype=dtype,
        is_floating_point=lambda: dtype.is_floating_point,
    )


@pytest.mark.parametrize("device", ["mps", "xpu", "cuda", "privateuseone", "meta", "hpu"])
def test_auto_takes_pytorchs_own_on_other_devices(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("triton", "cuda"):  # as if they were there
        monkeypatch.setattr(get(name), "obstacle", lambda spec, x: None)
    monkeypatch.setattr(measured, "capability", lambda device: (8, 0))
    with fastlstm.backend("auto"):
        assert select(on(device), (SPEC,)) is TORCH
        for lacking in SPEC._replace(peephole=True), SPEC._replace(layer_norm=True):
            assert select(on(device), (lacking,)).name == "reference"
        assert select(on(device), (SPEC,), cell_states=True).name == "reference"
    assert candidates("auto", on(device))[0] is TORCH


def test_a_call_on_an_unknown_device() -> None:
    """There are no numbers on meta, and shapes are right."""
    lstm, x = fastlstm.LSTM(I, H, device="meta"), torch.randn(T, B, I, device="meta")
    with fastlstm.backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastlstm.explain(lstm, x).backend == "torch"
        assert lstm(x)[0].shape == (T, B, H)
