"""Plain calls without an operator: the same bits, and what is left to the operator."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastlstm
from fastlstm.kernels.cpu import CPU
from fastlstm.layer import fast_path

pytestmark = pytest.mark.parametrize("backend", ["cpu"], indirect=True)
LAYERS: dict[str, dict[str, Any]] = {
    "stored": {"input_size": 64, "hidden_size": 130},
    "packed": {"input_size": 3, "hidden_size": 17},
    "stack": {"input_size": 5, "hidden_size": 33, "num_layers": 2, "bidirectional": True},
    "projected": {"input_size": 64, "hidden_size": 130, "proj_size": 40, "bias": False},
    "batch first": {"input_size": 4, "hidden_size": 64, "batch_first": True},
}


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def arguments(lstm: fastlstm.LSTM, T: int, B: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    dtype, rows = lstm.weight_ih_l0.dtype, lstm.num_layers * (1 + lstm.bidirectional)
    x = torch.randn(*((B, T) if lstm.batch_first else (T, B)), lstm.input_size, dtype=dtype)
    h0 = torch.randn(rows, B, lstm.proj_size or lstm.hidden_size, dtype=dtype)
    return x, (h0, torch.randn(rows, B, lstm.hidden_size, dtype=dtype))


LOW = fast_path.MEMORY_IS_LOW


def direct(lstm: fastlstm.LSTM, x: Any, hx: Any) -> Any:
    """Call the function itself; short calls of wide layers need no packed weights."""
    assert CPU.infer_directly is not None
    weights = tuple(lstm.parameters())
    return CPU.infer_directly(weights, x, hx, lstm.num_layers, 1 + lstm.bidirectional, (), LOW)


def refuse(*arguments: Any) -> Any:
    raise AssertionError("this way is closed")


def same_bits(
    module: nn.Module, x: Tensor, hx: Any, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assert that a module gives them without its operator and with nothing else."""
    found = []
    for closed, way in ((operator, refuse), ("infer_directly", None)):
        with monkeypatch.context() as patch:
            patch.setattr(CPU, closed, way)
            found.append(module(x, hx))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("T", [1, 7])
def test_same_bits_as_the_operator(
    backend: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    T: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lstm = fastlstm.LSTM(**options, dtype=dtype)
    for B in (1, 3):
        x, states = arguments(lstm, T, B)
        for hx in (states, None):
            same_bits(lstm, x, hx, "lstm_infer", monkeypatch)


def test_a_cell(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for cell in (fastlstm.LSTMCell(64, 64), fastlstm.LSTMCell(3, 5, bias=False)):
        x, hx = torch.randn(2, cell.input_size), tuple(torch.randn(2, 2, cell.hidden_size))
        for state in (hx, None):
            same_bits(cell, x, state, "lstm_cell_infer", monkeypatch)


class Subclass(Tensor):
    pass


REFUSED: dict[str, Callable[[fastlstm.LSTM, Tensor, Any], Any]] = {
    "a subclass": lambda lstm, x, hx: direct(lstm, x.as_subclass(Subclass), hx),
    "of the states": lambda lstm, x, hx: direct(lstm, x, (hx[0].as_subclass(Subclass), hx[1])),
    "a list of states": lambda lstm, x, hx: direct(lstm, x, list(hx)),
    "one state": lambda lstm, x, hx: direct(lstm, x, (hx[0], None)),
    "no tensor": lambda lstm, x, hx: direct(lstm, None, hx),
    "no memory": lambda lstm, x, hx: direct(lstm, x.to("meta"), hx),
    "sparse": lambda lstm, x, hx: direct(lstm, x.to_sparse(), hx),
    "zeros without memory": lambda lstm, x, hx: direct(
        lstm, torch._efficientzerotensor(x.shape), hx
    ),
    "another dtype": lambda lstm, x, hx: direct(lstm, x.double(), hx),
    "integers": lambda lstm, x, hx: direct(lstm, x.int(), hx),
    "features apart": lambda lstm, x, hx: direct(lstm, x.repeat(1, 1, 2)[..., ::2], hx),
    "one feature for all": lambda lstm, x, hx: direct(lstm, x[..., :1].expand(-1, -1, 64), hx),
    "a conjugate's part": lambda lstm, x, hx: direct(
        lstm, torch.complex(x, x).conj().imag, hx
    ),
    "no steps": lambda lstm, x, hx: direct(lstm, x[:0], hx),
    "another size": lambda lstm, x, hx: direct(lstm, x[..., 1:], hx),
    "states of another batch": lambda lstm, x, hx: direct(lstm, x[:, :1], hx),
}  # fmt: skip


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_unusual_is_left_to_the_operator(
    backend: str, call: Callable[[fastlstm.LSTM, Tensor, Any], Any]
) -> None:
    lstm = fastlstm.LSTM(64, 130)
    x, hx = arguments(lstm, 1, 2)
    assert direct(lstm, x, hx) is not None
    assert call(lstm, x, hx) is None


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("which", ["x", "a slice of x", "h0", "c0", "weight"])
def test_storage_that_was_freed(
    backend: str, which: str, layers: int, low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Low: memory may have low addresses here too, not only what was freed."""
    if low:
        monkeypatch.setattr(fast_path, "MEMORY_IS_LOW", True)
    lstm = fastlstm.LSTM(64, 130, layers)
    x, (h0, c0) = arguments(lstm, 1, 2)
    if which == "a slice of x":
        x, which = torch.randn(1, 2, 128)[..., 64:], "x"
    lstm(x, (h0, c0))
    given = {"x": x, "h0": h0, "c0": c0, "weight": lstm.weight_hh_l0}
    given[which].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage"):
        lstm(x, (h0, c0))


def test_a_conjugate_of_one_feature(backend: str) -> None:
    """Its imaginary part has another sign than its memory, and a stride of 1."""
    lstm = fastlstm.LSTM(1, 640)
    assert direct(lstm, torch.ones(1, 1, 1), None) is not None
    x = torch.randn(3, 2, dtype=torch.complex64).conj().imag[..., None]
    assert x.is_neg() and x.stride(-1) == 1
    for part in (x, x[:1, :1]):
        torch.testing.assert_close(lstm(part)[0], lstm(part.clone())[0], rtol=0, atol=0)


EDITS: dict[str, Callable[[fastlstm.LSTM], object]] = {
    "data": lambda lstm: lstm.weight_hh_l0.data.mul_(2),
    "other data": lambda lstm: setattr(lstm.weight_hh_l0, "data", torch.rand(520, 130)),
    "set": lambda lstm: lstm.weight_hh_l0.set_(torch.rand(520, 130)),
    "numpy": lambda lstm: lstm.bias_hh_l0.detach().numpy().__imul__(-1),
    "another parameter": lambda lstm: setattr(
        lstm, "weight_hh_l0", nn.Parameter(torch.rand(520, 130))
    ),
    "transposed in place": lambda lstm: lstm.weight_ih_l0.set_(
        torch.rand(64, 520).t().contiguous().untyped_storage(), 0, (520, 64)
    ),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_the_next_call_sees_an_edit(backend: str, edit: Callable[[fastlstm.LSTM], object]) -> None:
    lstm = fastlstm.LSTM(64, 130)
    x, hx = arguments(lstm, 1, 2)
    before = lstm(x, hx)[0]
    edit(lstm)
    after = lstm(x, hx)[0]
    fresh = fastlstm.LSTM(64, 130)
    fresh.load_state_dict(lstm.state_dict())
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh(x, hx)[0])


def test_freed_or_misshapen_weights(backend: str) -> None:
    lstm = fastlstm.LSTM(64, 130)
    x, hx = arguments(lstm, 1, 2)
    lstm(x, hx)
    weight = lstm.weight_hh_l0
    data = weight.data
    weight.data = data.t()  # the same memory
    assert direct(lstm, x, hx) is None
    with pytest.raises(RuntimeError, match="expected weight"):
        lstm(x, hx)
    weight.data = data
    weight.untyped_storage().resize_(0)
    assert direct(lstm, x, hx) is None
    with pytest.raises(RuntimeError, match="storage"):
        lstm(x, hx)


def test_results_are_tensors_like_any_other(backend: str) -> None:
    lstm = fastlstm.LSTM(64, 130)
    x, hx = arguments(lstm, 1, 2)
    y, (h, c) = lstm(x, hx)
    kept = [t.clone() for t in (y, h, c)]
    y.zero_()  # shares nothing
    assert torch.equal(h, kept[1])
    assert torch.equal(c, kept[2])
    for t in (h, c):
        assert t.is_contiguous() and not t.requires_grad and not t._is_view()
        assert t.data_ptr() % 64 == 0
        for other in (pickle.loads(pickle.dumps(t)), copy.deepcopy(t), t.share_memory_()):
            assert torch.equal(other, t)
    assert not h.is_inference()
    with torch.inference_mode():
        assert lstm(x, hx)[0].is_inference()
    empty = lstm(x[:, :0])[0]
    assert empty.shape == (1, 0, 130)
    with torch.enable_grad():  # an input of what follows in training
        weight = torch.ones(130, requires_grad=True)
        (h * weight).sum().backward()
        torch.testing.assert_close(weight.grad, h.sum((0, 1)))


class Seen(TorchFunctionMode):
    functions: list[Any]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


def test_who_looks_for_operators_sees_one(backend: str) -> None:
    lstm = fastlstm.LSTM(64, 130)
    x, hx = arguments(lstm, 1, 2)
    mode = Seen()
    mode.functions = []
    with mode:
        lstm(x, hx)
    assert any("lstm" in str(function) for function in mode.functions)
    with torch.profiler.profile() as profile:
        lstm(x, hx)
    assert any("lstm" in event.key for event in profile.key_averages())
