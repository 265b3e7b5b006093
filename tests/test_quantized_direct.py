"""Plain calls of quantised modules without their operator: its bits and messages; who sees it."""

import copy
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastlstm
from fastlstm import extension
from fastlstm.kernels.cpu import CPU
from fastlstm.layer import fast_path
from fastlstm.quantized import cell as cells
from fastlstm.quantized import layers
from fastlstm.quantized.operators import INFER

pytestmark = pytest.mark.skipif(
    extension.error() is not None and os.environ.get("FASTLSTM_REQUIRE_EXTENSION") != "1",
    reason="the compiled kernels are not here",
)
DTYPES = ("int8", "bfloat16")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"input_size": 64, "hidden_size": 130},
    "stack": {"input_size": 5, "hidden_size": 33, "num_layers": 2, "bidirectional": True},
    "deep": {"input_size": 20, "hidden_size": 16, "num_layers": 2, "bias": False},
    "both": {"input_size": 9, "hidden_size": 8, "bidirectional": True},
    "projected": {"input_size": 16, "hidden_size": 70, "num_layers": 2, "proj_size": 40},
    "batch first": {"input_size": 4, "hidden_size": 64, "batch_first": True},
    "one number": {"input_size": 1, "hidden_size": 1},
    "tanh": {"input_size": 7, "hidden_size": 70, "nonlinearity": "tanh", "bidirectional": True},
    "relu": {"input_size": 7, "hidden_size": 70, "nonlinearity": "relu", "batch_first": True},
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(options: dict[str, Any], dtype: str = "int8") -> Any:
    torch.manual_seed(0)
    kind = nn.RNN if "nonlinearity" in options else nn.LSTM
    return fastlstm.quantize(kind(**options).eval(), dtype)


def arguments(module: Any, T: int, B: int, dtype: Any = torch.float32) -> tuple[Tensor, Any]:
    shape = (B, T) if module.batch_first else (T, B)
    rows, H = module.num_layers * (1 + module.bidirectional), module.hidden_size
    h0, c0 = torch.randn(rows, B, module.proj_size or H), torch.randn(rows, B, H)
    x = torch.randn(*shape, module.input_size).to(dtype)
    return x, h0.to(dtype) if module.mode != "LSTM" else (h0.to(dtype), c0.to(dtype))


class Ways:
    """Calls a module without its operator and nothing else, or by its operator alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def direct(self, module: Any, *call: Any) -> Any:
        with self._monkeypatch.context() as patch:
            for place in (layers, cells):
                patch.setattr(place, "INFER", refuse)
            return module(*call)

    def operator(self, module: Any, *call: Any) -> Any:
        with self._monkeypatch.context() as patch:
            patch.setattr(CPU, "infer_quantized", None)
            return module(*call)

    def same(self, module: Any, *call: Any) -> None:
        got, want = self.direct(module, *call), self.operator(module, *call)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def refuse(*arguments: Any) -> Any:
    raise AssertionError("this way is closed")


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    assert CPU.infer_quantized is not None
    return Ways(monkeypatch)


# --- the same bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_bits_of_layers(
    options: dict[str, Any], dtype: str, kind: torch.dtype, ways: Ways
) -> None:
    module = made(options, dtype)
    for T, B in (1, 1), (1, 3), (5, 2), (70, 1), (3, 0):
        x, states = arguments(module, T, B, kind)
        for hx in (states, None):
            ways.same(module, x, hx)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_cell(dtype: str, bias: bool, ways: Ways) -> None:
    for sizes in (64, 130), (3, 5), (1, 1):
        cell = fastlstm.quantize(nn.LSTMCell(*sizes, bias).eval(), dtype)
        for B in (1, 4, 0):
            x, hx = torch.randn(B, sizes[0]), tuple(torch.randn(2, B, sizes[1]))
            for states in (hx, None):
                ways.same(cell, x, states)
                ways.same(cell, x.half(), None if states is None else tuple(map(Tensor.half, hx)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_other_strides(dtype: str, ways: Ways) -> None:
    module = made(KINDS["stack"], dtype)
    x, (h0, c0) = arguments(module, 4, 3)
    apart = [t.repeat(1, 2, 1)[:, ::2] for t in (h0, c0)]
    assert not apart[0].is_contiguous()
    inputs = (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),  # features apart
        x.repeat(1, 1, 2)[..., 5:],
        x[:, :1].expand(-1, 3, -1),
        x[..., :1].expand(-1, -1, 5),
    )
    for other in inputs:
        ways.same(module, other, tuple(apart))
    cell = fastlstm.quantize(nn.LSTMCell(5, 8).eval(), dtype)
    for step in (x[0], x[0].t().contiguous().t(), x[0, :1].expand(3, -1)):
        ways.same(cell, step)


def test_the_other_sign_of_one_number(ways: Ways) -> None:
    """What the imaginary part of a conjugate holds is not in its memory."""
    module = made(KINDS["one number"])
    x = torch.full((1, 1, 1), 2, dtype=torch.complex64).mul_(1j).conj().imag
    assert x.is_neg() and x.item() == -2
    torch.testing.assert_close(module(x), module(x.clone()), rtol=0, atol=0)
    ways.direct(module, torch.full((1, 1, 1), -2.0))


def test_gradients_that_nobody_asks_for(ways: Ways) -> None:
    module, cell = made(KINDS["plain"]), fastlstm.quantize(nn.LSTMCell(64, 8).eval())
    x, hx = arguments(module, 1, 2)
    want = module(x, hx)
    with torch.enable_grad():
        torch.testing.assert_close(ways.direct(module, x, hx), want, rtol=0, atol=0)
        ways.direct(cell, x[0])
        for given in ((x.clone().requires_grad_(), hx), (x, (hx[0], hx[1].requires_grad_()))):
            with pytest.raises(RuntimeError, match="does not train"):
                module(*given)
        with pytest.raises(RuntimeError, match="does not train"):
            cell(x[0].clone().requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads(dtype: str, ways: Ways) -> None:
    """Of Python: they share a module, and one does not keep the others waiting."""
    module = made({"input_size": 300, "hidden_size": 300}, dtype)
    given = [arguments(module, 2, 4) for _ in range(4)]
    want, got = [ways.direct(module, *each) for each in given], []

    def run(k: int) -> None:
        for _ in range(20):
            got.append((k, module(*given[k])))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 80
    for k, found in got:
        torch.testing.assert_close(found, want[k], rtol=0, atol=0)


# --- modules as modules -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies(dtype: str, ways: Ways) -> None:
    module = made(KINDS["stack"], dtype)
    x, hx = arguments(module, 2, 3)
    want = ways.direct(module, x, hx)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(ways.direct(other, x, hx), want, rtol=0, atol=0)


EDITS: dict[str, Callable[[Any, Any], object]] = {
    "load_state_dict": lambda mine, other: mine.load_state_dict(other.state_dict()),
    "assigned": lambda mine, other: mine.load_state_dict(other.state_dict(), assign=True),
    "another buffer": lambda mine, other: setattr(mine, "weight_hh_l0", other.weight_hh_l0),
    "other data": lambda mine, other: setattr(mine.rows_l0, "data", other.rows_l0.data),
    "set": lambda mine, other: mine.weight_ih_l0.set_(other.weight_ih_l0),
    "numpy": lambda mine, other: mine.weight_ih_l0.numpy().__imul__(-1),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_the_next_call_sees_an_edit(edit: Callable[[Any, Any], object], ways: Ways) -> None:
    module = made(KINDS["plain"])
    other = fastlstm.quantize(nn.LSTM(**KINDS["plain"]).eval())
    x, hx = arguments(module, 1, 2)
    before = ways.direct(module, x, hx)[0]
    edit(module, other)
    assert not torch.equal(ways.direct(module, x, hx)[0], before)
    ways.same(module, x, hx)


def test_functional_call(ways: Ways) -> None:
    module = made(KINDS["plain"])
    other = fastlstm.quantize(nn.LSTM(**KINDS["plain"]).eval())
    x, _ = arguments(module, 1, 2)
    got = torch.func.functional_call(module, dict(other.named_buffers()), (x,))
    torch.testing.assert_close(got, other(x), rtol=0, atol=0)


def test_results_are_tensors_like_any_other() -> None:
    module = made(KINDS["plain"])
    x, hx = arguments(module, 1, 2)
    y, (h, c) = module(x, hx)
    kept = [t.clone() for t in (y, h, c)]
    y.zero_()
    assert torch.equal(h, kept[1]) and torch.equal(c, kept[2])
    for t in (h, c):
        assert t.is_contiguous() and not t.requires_grad and not t._is_view()
        assert torch.equal(pickle.loads(pickle.dumps(t)), t)
    with torch.inference_mode():
        assert module(x, hx)[0].is_inference()


# --- what is unusual or wrong -----------------------------------------------------------------


class Subclass(Tensor):
    pass


def both(x: Tensor, hx: Any, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Any]:
    return change(x), tuple(map(change, hx))


WRONG: dict[str, Callable[[Any, Tensor, Any], Any]] = {
    "another dtype": lambda m, x, hx: (x.double(), hx),
    "integers": lambda m, x, hx: (x.int(), hx),
    "8-bit integers": lambda m, x, hx: both(x, hx, Tensor.char),
    "float64": lambda m, x, hx: both(x, hx, Tensor.double),
    "other states": lambda m, x, hx: (x, (hx[0].half(), hx[1].half())),
    "no steps": lambda m, x, hx: (x[:0], hx),
    "another size": lambda m, x, hx: (x[..., 1:], hx),
    "states of another batch": lambda m, x, hx: (x[:, :1], hx),
    "states of another size": lambda m, x, hx: (x, (hx[0][..., 1:], hx[1])),
    "states without layers": lambda m, x, hx: (x, (hx[0][0], hx[1][0])),
    "states apart": lambda m, x, hx: (x, (hx[0].repeat(1, 1, 2)[..., ::2], hx[1])),
    "one state": lambda m, x, hx: (x, (hx[0], None)),
    "one tensor": lambda m, x, hx: (x, hx[0]),
    "three": lambda m, x, hx: (x, (*hx, hx[0])),
    "a list of states": lambda m, x, hx: (x, list(hx)),
    "no tensor": lambda m, x, hx: (None, hx),
    "four dimensions": lambda m, x, hx: (x[None], hx),
    "one dimension": lambda m, x, hx: (x[0, 0], hx),
    "no batch": lambda m, x, hx: (x[:, 0], tuple(s[:, 0] for s in hx)),
    "no memory": lambda m, x, hx: (x.to("meta"), hx),
    "a subclass": lambda m, x, hx: (x.as_subclass(Subclass), hx),
    "of the states": lambda m, x, hx: (x, (hx[0].as_subclass(Subclass), hx[1])),
    "sparse": lambda m, x, hx: (x.to_sparse(), hx),
    "zeros without memory": lambda m, x, hx: (torch._efficientzerotensor(x.shape), hx),
    "misshapen": lambda m, x, hx: (m._buffers.update(rows_l0=m.rows_l0[:1]), (x, hx))[1],
    "weights of another dtype": lambda m, x, hx: (
        m._buffers.update(weight_hh_l0=m.weight_hh_l0.float()), (x, hx))[1],
    "weights apart": lambda m, x, hx: (
        m._buffers.update(rows_l0=m.rows_l0.repeat(1, 2, 1)[:, ::2]), (x, hx))[1],
    "no weights": lambda m, x, hx: (m._buffers.update(rows_l0=None), (x, hx))[1],
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_messages_of_the_operator(
    change: Callable[[Any, Tensor, Any], Any], dtype: str, ways: Ways
) -> None:
    """The direct way is not taken, and what comes instead does not know of it."""
    module = made(KINDS["plain"], dtype)
    given = change(module, *arguments(module, 2, 2))

    def outcome(run: Callable[..., Any]) -> Any:
        try:
            return run(module, *given)
        except Exception as error:
            return f"{type(error)} {error}"

    found, want = outcome(lambda module, *call: module(*call)), outcome(ways.operator)
    if isinstance(want, str):
        assert found == want
    else:
        torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert isinstance(
        outcome(ways.direct), str
    )  # it asked the operator, or found a mistake before


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("which", ["x", "a slice of x", "h0", "c0", "weight_hh_l0", "rows_l1"])
def test_storage_that_was_freed(which: str, low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Low: memory may have low addresses, not only what was freed."""
    if low:
        monkeypatch.setattr(fast_path, "MEMORY_IS_LOW", True)
    module = made({**KINDS["plain"], "num_layers": 2})
    x, (h0, c0) = arguments(module, 1, 2)
    if which == "a slice of x":
        x, which = torch.randn(1, 2, 128)[..., 64:], "x"
    module(x, (h0, c0))
    given = {"x": x, "h0": h0, "c0": c0, **dict(module.named_buffers())}
    given[which].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage"):
        module(x, (h0, c0))


# --- who sees the operator --------------------------------------------------------------------


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def names(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.nodes]


@pytest.mark.parametrize("of", ["layers", "cell"])
def test_who_looks_for_operators_sees_one(of: str) -> None:
    module = made(KINDS["plain"])
    x, hx = arguments(module, 1, 2)
    if of == "cell":
        module, x, hx = fastlstm.quantize(nn.LSTMCell(64, 130).eval()), x[0], (hx[0][0], hx[1][0])
    want = module(x, hx)
    found: dict[str, list[Any]] = {}
    for mode in (Functions(), Dispatched()):
        with mode:
            module(x, hx)
        found[type(mode).__name__] = mode.seen
    with torch.profiler.profile() as profile:
        module(x, hx)
    found["profile"] = [event.key for event in profile.key_averages()]
    for pre_dispatch in (False, True):
        traced = make_fx(module, pre_dispatch=pre_dispatch)(x, hx)
        found[f"make_fx, {pre_dispatch}"] = names(traced.graph)
    for strict in (False, True):
        program = torch.export.export(module, (x, hx), strict=strict)
        found[f"export, {strict}"] = names(program.graph)
        torch.testing.assert_close(program.module()(x, hx), want, rtol=0, atol=0)
    graphs: list[list[str]] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(names(graph.graph))
        return graph.forward

    compiled = torch.compile(module, backend=compiler, fullgraph=True)
    torch.testing.assert_close(compiled(x, hx), want, rtol=0, atol=0)
    found["compile"] = graphs[0]
    for who, seen in found.items():
        assert any("quantized_infer_cpu" in str(each) for each in seen), who


def test_a_trace() -> None:
    module = made(KINDS["plain"])
    x, hx = arguments(module, 1, 2)
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(module, (x, hx), check_trace=False)
    other = arguments(module, 1, 2)
    torch.testing.assert_close(traced(*other), module(*other), rtol=0, atol=0)
    assert "quantized_infer_cpu" in str(traced.inlined_graph)


def test_transforms_and_autocast_take_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(KINDS["plain"])
    x, hx = arguments(module, 1, 2)
    want, calls = module(x, hx), []
    seen = lambda *given: (calls.append(1), INFER(*given))[1]  # noqa: E731
    monkeypatch.setattr(layers, "INFER", seen)
    module(x, hx)
    assert not calls
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module(x, hx), want, rtol=0, atol=0)
    assert len(calls) == 1
    with torch.autograd.forward_ad.dual_level():
        module(x, hx)
    assert len(calls) == 2
    hook = torch.func.vmap(lambda scale: (module(x, hx), scale)[1])
    hook(torch.ones(2))
    assert len(calls) == 3
