"""fastlstm.LSTM and LSTMCell stand in for torch.nn's: same arguments, numbers and behaviour."""

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastlstm

T, B, I, H = 6, 4, 3, 5
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "proj_size": 2, "batch_first": True},
    {"bidirectional": True, "proj_size": 2, "bias": False},
]
INPUTS = ["batched", "unbatched", "sorted", "unsorted"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A warning is a failure: above all one about flat weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def twins(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.LSTM, fastlstm.LSTM]:
    """nn.LSTM and fastlstm.LSTM with equal weights of their own."""
    theirs = nn.LSTM(I, H, dtype=dtype, **options)
    ours = fastlstm.LSTM(I, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def make_input(kind: str, batch_first: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    if kind == "batched":
        return torch.randn((B, T, I) if batch_first else (T, B, I), dtype=dtype)
    if kind == "unbatched":
        return torch.randn(T, I, dtype=dtype)
    lengths = [6, 4, 4, 1] if kind == "sorted" else [4, 1, 6, 4]
    rows = [torch.randn(n, I, dtype=dtype) for n in lengths]
    return pack_sequence(rows, enforce_sorted=kind == "sorted")


def make_state(lstm: nn.RNNBase, kind: str) -> tuple[Tensor, Tensor]:
    rows = lstm.num_layers * (1 + lstm.bidirectional)
    batch = () if kind == "unbatched" else (B,)
    sizes = lstm.proj_size or H, H
    return tuple(torch.randn(rows, *batch, n, dtype=torch.float64) for n in sizes)


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result, a PackedSequence being its four."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if part is not None for t in flat(part)]


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal but for the rounding of two orders of summation.

    A number is reached through at most T * L steps, each of which adds up I + H + 4 terms, and a
    sum of n terms of order one is rounded by at most n * eps.
    """
    ours, theirs = flat(ours), flat(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if a.is_floating_point():
            scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
            bound = 3 * T * (I + H + 4) * torch.finfo(a.dtype).eps * scale
            torch.testing.assert_close(a, b, rtol=0, atol=bound)
        else:
            assert torch.equal(a, b)


def run(lstm: nn.Module, x: Any, hx: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """Outputs and the gradients of parameters, input and state."""
    data = (x.data if isinstance(x, PackedSequence) else x).clone().requires_grad_()
    x = x._replace(data=data) if isinstance(x, PackedSequence) else data
    hx = hx and tuple(t.clone().requires_grad_() for t in hx)
    outputs = flat(lstm(x, hx))
    leaves = [data, *(hx or ()), *lstm.parameters()]
    loss = sum((t * t.detach().cos()).sum() for t in outputs if t.requires_grad)
    return outputs + list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_and_gradients(
    backend: str, options: dict[str, Any], kind: str, with_state: bool
) -> None:
    theirs, ours = twins(**options)
    x = make_input(kind, theirs.batch_first)
    hx = make_state(theirs, kind) if with_state else None
    assert_same(run(ours.eval(), x, hx), run(theirs, x, hx))
    with torch.no_grad():
        y, state = ours(x, hx)
        assert type(y) is type(x)
        assert_same((y, state), theirs(x, hx))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_parameters_under_the_same_seed(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    theirs = nn.LSTM(I, H, **options).state_dict()
    torch.manual_seed(1)
    ours = fastlstm.LSTM(I, H, **options).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_signature_and_repr(kind: str) -> None:
    base, ours = (
        (nn.RNNBase, fastlstm.LSTM) if kind == "LSTM" else (nn.LSTMCell, getattr(fastlstm, kind))
    )
    names = [name for name in inspect.signature(base.__init__).parameters if name != "mode"]
    assert list(inspect.signature(ours.__init__).parameters)[: len(names)] == names
    for options in OPTIONS if kind == "LSTM" else [{}, {"bias": False}]:
        assert repr(ours(I, H, **options)) == repr(getattr(nn, kind)(I, H, **options))


CONSTRUCTIONS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    ((0, H), {}),
    ((I, 0), {}),
    ((I, -1), {}),
    ((3.0, H), {}),
    ((I, "5"), {}),
    ((I, H, 0), {}),
    ((I, H), {"dropout": 1.5}),
    ((I, H), {"dropout": True}),
    ((I, H), {"bias": 1}),
    ((I, H), {"batch_first": None}),
    ((I, H), {"proj_size": H}),
    ((I, H), {"proj_size": -1}),
    ((I, H), {"dtype": torch.int32}),
    ((I, H), {"nonsense": 1}),
    ((I, H), {"dropout": 0.5}),
]


@pytest.mark.parametrize(("args", "options"), CONSTRUCTIONS, ids=str)
def test_constructor_refuses_what_torch_refuses(args: Any, options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError, UserWarning)) as theirs:
        nn.LSTM(*args, **options)
    with pytest.raises(theirs.type):
        fastlstm.LSTM(*args, **options)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


def pair(*shape: int, **options: Any) -> tuple[Tensor, Tensor]:
    return zeros(*shape, **options), zeros(*shape, **options)


X = zeros(T, B, I)
PACKED = pack_sequence([zeros(2, I), zeros(T, I)], enforce_sorted=False)
CALLS: dict[str, tuple[Any, ...]] = {
    "no input": (),
    "too many arguments": (X, None, None),
    "input None": (None,),
    "input list": ([1.0],),
    "input 1-D": (zeros(I),),
    "input 4-D": (zeros(1, T, B, I),),
    "input features": (zeros(T, B, I + 1),),
    "input features unbatched": (zeros(T, I + 1),),
    "input float64": (X.double(),),
    "input int": (X.long(),),
    "input bfloat16": (X.bfloat16(),),
    "input elsewhere": (X.to("meta"),),
    "T = 0": (zeros(0, B, I),),
    "T = 0 unbatched": (zeros(0, I),),
    "T = 0 and B = 0": (zeros(0, 0, I),),
    "hx tensor": (X, zeros(1, B, H)),
    "hx stacked": (X, zeros(2, 1, B, H)),
    "hx unbatched tensor": (X, zeros(2, B, H)),
    "hx of one": (X, (zeros(1, B, H),)),
    "hx of three": (X, (*pair(1, B, H), zeros(1, B, H))),
    "hx of None": (X, (zeros(1, B, H), None)),
    "hx of numbers": (X, (1, 2)),
    "hx number": (X, 3),
    "hx dict": (X, {"h": zeros(1, B, H)}),
    "hx 2-D": (X, pair(B, H)),
    "hx 3-D for unbatched": (X[:, 0], pair(1, 1, H)),
    "hx batch": (X, pair(1, B + 1, H)),
    "hx layers": (X, pair(2, B, H)),
    "h_0 size": (X, (zeros(1, B, H + 1), zeros(1, B, H))),
    "c_0 size": (X, (zeros(1, B, H), zeros(1, B, H + 1))),
    "hx float64": (X, pair(1, B, H, dtype=torch.float64)),
    "h_0 float64": (X, (zeros(1, B, H).double(), zeros(1, B, H))),
    "c_0 float64": (X, (zeros(1, B, H), zeros(1, B, H).double())),
    "hx int": (X, pair(1, B, H, dtype=torch.int64)),
    "hx elsewhere": (X, pair(1, B, H, device="meta")),
    "packed float64": (PACKED.double(),),
    "packed hx 2-D": (PACKED, pair(2, H)),
    "packed hx batch": (PACKED, pair(1, 1, H)),
    "packed hx layers": (PACKED, pair(2, 2, H)),
    "packed hx tensor": (PACKED, zeros(1, 2, H)),
    "packed c_0 size": (PACKED, (zeros(1, 2, H), zeros(1, 2, H + 1))),
    "packed hx float64": (PACKED, pair(1, 2, H, dtype=torch.float64)),
}
ERRORS = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError)


@pytest.mark.parametrize("name", CALLS)
def test_call_refuses_what_torch_refuses(backend: str, name: str) -> None:
    with pytest.raises(ERRORS) as theirs:
        nn.LSTM(I, H)(*CALLS[name])
    with pytest.raises(theirs.type) as ours:
        fastlstm.LSTM(I, H)(*CALLS[name])
    assert ours.type is theirs.type


BROKEN: dict[str, Callable[[nn.Module], None]] = {
    "w_hh float64": lambda m: setattr(m.weight_hh_l0, "data", m.weight_hh_l0.data.double()),
    "w_ih elsewhere": lambda m: setattr(
        m, "weight_ih_l0", nn.Parameter(zeros(4 * H, I, device="meta"))
    ),
    "b_hh size": lambda m: setattr(m, "bias_hh_l0", nn.Parameter(zeros(4 * H - 1))),
    "w_ih a tensor": lambda m: setattr(m, "weight_ih_l0", zeros(4 * H, I)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_weights_are_refused_as_by_torch(backend: str, name: str) -> None:
    def call(kind: type[nn.Module]) -> Any:
        lstm = kind(I, H)
        BROKEN[name](lstm)
        return lstm(X)

    with pytest.raises(ERRORS) as theirs:
        call(nn.LSTM)
    with pytest.raises(theirs.type):
        call(fastlstm.LSTM)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "weight_hr_l0"])
def test_a_weight_of_another_shape_is_refused(backend: str, name: str) -> None:
    lstm = fastlstm.LSTM(I, H, proj_size=2)
    weight = getattr(lstm, name)
    setattr(lstm, name, nn.Parameter(weight.detach().new_zeros(*weight.shape[:-1], 1)))
    with pytest.raises(RuntimeError, match="expected"):
        lstm(X)


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0", "state"])
def test_what_is_on_another_device_is_refused(backend: str, name: str) -> None:
    """And not computed as if it had no numbers."""
    lstm, state = fastlstm.LSTM(I, H), zeros(1, X.shape[1], H)
    if name == "state":
        state = state.to("meta")
    else:
        setattr(lstm, name, nn.Parameter(getattr(lstm, name).detach().to("meta")))
    with pytest.raises(RuntimeError, match="on meta"):
        lstm(X, (state, zeros(1, X.shape[1], H)))


def test_packed_input_of_the_wrong_size_is_refused(backend: str) -> None:
    """nn.LSTM does not notice: it reads other numbers."""
    lstm = fastlstm.LSTM(I, H)
    with pytest.raises(RuntimeError, match=f"last dimension of {I}"):
        lstm(pack_sequence([zeros(T, I + 4)]))
    with pytest.raises(RuntimeError, match=r"h_0 \[1, 2, 5\]"):
        lstm(PACKED, pair(1, 3, H))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_empty_batch(backend: str, options: dict[str, Any]) -> None:
    theirs, ours = twins(**options)
    x = torch.zeros((0, T, I) if theirs.batch_first else (T, 0, I), dtype=torch.float64)
    ours_y, theirs_y = ours(x), theirs(x)
    assert [t.shape for t in flat(ours_y)] == [t.shape for t in flat(theirs_y)]
    ours_y[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


@pytest.mark.parametrize("batch_first", [False, True])
def test_strided_arguments(backend: str, batch_first: bool) -> None:
    theirs, ours = twins(batch_first=batch_first)
    x = make_input("batched", batch_first)
    hx = make_state(theirs, "batched")

    def gappy(t: Tensor) -> Tensor:
        return t.repeat_interleave(2, -1).flip(0).mT.contiguous().mT.flip(0)[..., ::2]

    assert not gappy(x).is_contiguous()
    assert_same(ours(gappy(x), tuple(map(gappy, hx))), theirs(x, hx))


def test_batch_first_is_strides_not_a_copy(backend: str) -> None:
    y, _ = fastlstm.LSTM(I, H, batch_first=True)(zeros(B, T, I))
    assert y.shape == (B, T, H)
    assert y.transpose(0, 1).is_contiguous()


def test_dropout_between_layers_in_training(backend: str) -> None:
    theirs, ours = twins(num_layers=3, dropout=0.5)
    x = make_input("batched")
    for training in (True, False):
        torch.manual_seed(2)
        expected = theirs.train(training)(x)
        torch.manual_seed(2)
        assert_same(ours.train(training)(x), expected)
    certain = fastlstm.LSTM(I, H, 2, dropout=1.0, dtype=torch.float64)
    certain.load_state_dict(fastlstm.LSTM(I, H, 2, dtype=torch.float64).state_dict())
    alone = fastlstm.LSTM(H, H, dtype=torch.float64)
    alone.load_state_dict(
        {k[:-1] + "0": v for k, v in certain.state_dict().items() if k[-1] == "1"}
    )
    assert_same(certain(x)[0], alone(torch.zeros(T, B, H, dtype=torch.float64))[0])


def save_and_load(lstm: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(lstm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda lstm: pickle.loads(pickle.dumps(lstm)),
    "torch.save": save_and_load,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.LSTMCell])
def test_copies_are_independent(backend: str, kind: type[nn.Module], how: str) -> None:
    lstm = kind(I, H)
    x = torch.randn(B, I) if kind is fastlstm.LSTMCell else torch.randn(T, B, I)
    with torch.no_grad():
        before = flat(lstm(x))  # a backend may now keep prepared weights
        other = COPIES[how](lstm)
        assert all(torch.equal(a, b) for a, b in zip(flat(other(x)), before, strict=True))
        for p in lstm.parameters():
            p.zero_()
        assert all(torch.equal(a, b) for a, b in zip(flat(other(x)), before, strict=True))
        assert not any(t.any() for t in flat(lstm(x)))
    held = {"_cache", "_caches"}
    assert held & set(vars(lstm)) and not held & set(lstm.__getstate__())


def test_state_dict_of_torch_and_back() -> None:
    for options in OPTIONS:
        theirs, ours = twins(**options)
        theirs.load_state_dict(ours.state_dict(), strict=True)


def norm_old(lstm: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, and in wide use
        weight_norm(lstm, "weight_hh_l0")


def halve_data(lstm: nn.Module) -> None:
    for p in lstm.parameters():
        p.data = p.data / 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda m: [p.mul_(0.5) for p in m.parameters()],
    "data": halve_data,
    "data in place": lambda m: m.weight_hh_l0.data.mul_(0.5),
    "assignment": lambda m: setattr(m, "weight_ih_l0", nn.Parameter(m.weight_ih_l0 / 2)),
    "weight_norm": norm_old,
    "parametrized weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "parametrized orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l0"),
    "deleted for a tensor": lambda m: (
        delattr(m, "bias_hh_l0"),
        setattr(m, "bias_hh_l0", torch.ones(4 * H).double()),
    ),
    "dtype and back": lambda m: m.float().double(),
    "optimizer": lambda m: torch.optim.SGD(m.parameters(), 0.5).step(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_are_read_at_every_call(backend: str, name: str) -> None:
    theirs, ours = twins()
    x, hx = make_input("batched"), make_state(theirs, "batched")
    for lstm in (theirs, ours):
        torch.manual_seed(3)
        with torch.no_grad():
            lstm(x, hx)
            for p in lstm.parameters():
                p.grad = torch.ones_like(p)
            CHANGES[name](lstm)
    with torch.no_grad():
        assert_same(ours(x, hx), theirs(x, hx))
    assert_same(run(ours, x, hx), run(theirs, x, hx))


def test_functional_call_uses_the_weights_it_is_given(backend: str) -> None:
    theirs, ours = twins(num_layers=2)
    x = make_input("batched")
    weights = {k: torch.randn_like(v).requires_grad_() for k, v in theirs.state_dict().items()}
    results = []
    for lstm in (ours, theirs):
        y, _ = torch.func.functional_call(lstm, weights, (x,))
        results.append([y, *torch.autograd.grad(y.sum(), list(weights.values()))])
    assert_same(*results)
    assert_same(ours(x), theirs(x))


def under_autocast(lstm: nn.LSTM, x: Tensor, hx: Any) -> list[Tensor]:
    """What nn.LSTM returns; without AVX-512 oneDNN raises there, and it is cast by hand."""
    if x.dtype is torch.float64 or torch.backends.cpu.get_cpu_capability() == "AVX512":
        return flat(lstm(x, hx))
    narrow = copy.deepcopy(lstm).bfloat16()
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        return flat(narrow(x.bfloat16(), hx and tuple(t.bfloat16() for t in hx)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "hx"])
def test_autocast_of_the_layer(backend: str, dtype: torch.dtype, with_state: bool) -> None:
    """Everything is cast as for nn.LSTM; float64 is left alone."""
    theirs, ours = twins(dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    hx = tuple(torch.randn(1, B, H, dtype=dtype) for _ in "hc") if with_state else None
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = flat(ours(x, hx)), under_autocast(theirs, x, hx)
        with pytest.raises(RuntimeError):
            twins(torch.float32)[0](x.double())
        with pytest.raises(RuntimeError):
            twins(torch.float32)[1](x.double())
    assert [t.dtype for t in result] == [t.dtype for t in expected]
    if dtype is torch.float64:
        assert_same(result, expected)
    else:
        exact = flat(theirs.double()(x.double(), hx and tuple(t.double() for t in hx)))
        for a, b, c in zip(result, expected, exact, strict=True):
            rounding = torch.finfo(a.dtype).eps * c.abs().max()
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + rounding
    sum(t.sum() for t in result).backward()
    assert all(p.grad.dtype is dtype for p in ours.parameters())


def cells(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[nn.LSTMCell, Any]:
    theirs = nn.LSTMCell(I, H, bias, dtype=dtype)
    ours = fastlstm.LSTMCell(I, H, bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batch", [(), (B,), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_cell(backend: str, bias: bool, batch: tuple[int, ...], with_state: bool) -> None:
    theirs, ours = cells(bias=bias)
    x = torch.randn(*batch, I, dtype=torch.float64)
    hx = tuple(torch.randn(*batch, H, dtype=torch.float64) for _ in "hc") if with_state else None
    assert_same(run(ours, x, hx), run(theirs, x, hx))


def test_cell_under_the_same_seed() -> None:
    torch.manual_seed(1)
    theirs = nn.LSTMCell(I, H).state_dict()
    torch.manual_seed(1)
    ours = fastlstm.LSTMCell(I, H).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_cell_reads_parametrized_weights(backend: str) -> None:
    theirs, ours = cells()
    x = torch.randn(B, I, dtype=torch.float64)
    for cell in (theirs, ours):
        parametrizations.weight_norm(cell, "weight_hh")
    assert_same(run(ours, x, None), run(theirs, x, None))


XC = zeros(B, I)
CELL_CALLS: dict[str, tuple[Any, ...]] = {
    "input None": (None,),
    "input 0-D": (torch.tensor(1.0),),
    "input 3-D": (XC[None],),
    "input features": (zeros(B, I + 1),),
    "input float64": (XC.double(),),
    "input int": (XC.long(),),
    "input elsewhere": (XC.to("meta"),),
    "hx tensor": (XC, zeros(B, H)),
    "hx stacked": (XC, zeros(2, B, H)),
    "hx of one": (XC, (zeros(B, H),)),
    "hx of three": (XC, (*pair(B, H), zeros(B, H))),
    "hx of None": (XC, (zeros(B, H), None)),
    "hx of numbers": (XC, (1, 2)),
    "hx number": (XC, 3),
    "hx 3-D": (XC, pair(1, B, H)),
    "hx 1-D for batched": (XC, pair(H)),
    "hx 2-D for unbatched": (XC[0], pair(B, H)),
    "hx batch": (XC, pair(B + 1, H)),
    "h size": (XC, (zeros(B, H + 1), zeros(B, H))),
    "c size": (XC, (zeros(B, H), zeros(B, 1))),
    "hx float64": (XC, pair(B, H, dtype=torch.float64)),
    "hx elsewhere": (XC, pair(B, H, device="meta")),
}


@pytest.mark.parametrize("name", CELL_CALLS)
def test_cell_refuses_what_torch_refuses(backend: str, name: str) -> None:
    with pytest.raises(ERRORS) as theirs:
        nn.LSTMCell(I, H)(*CELL_CALLS[name])
    with pytest.raises(theirs.type) as ours:
        fastlstm.LSTMCell(I, H)(*CELL_CALLS[name])
    assert ours.type is theirs.type


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_of_the_cell(backend: str, dtype: torch.dtype, state: torch.dtype | None) -> None:
    """The state of a cell keeps its dtype, as it does in torch on a CPU."""
    theirs, ours = cells(torch.float32)
    x = torch.randn(B, I, dtype=dtype)
    hx = None if state is None else tuple(torch.randn(B, H).to(state) for _ in "hc")
    with torch.autocast("cpu", torch.bfloat16):
        assert [t.dtype for t in ours(x, hx)] == [t.dtype for t in theirs(x, hx)]
