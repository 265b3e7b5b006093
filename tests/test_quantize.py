"""fastlstm.quantize, and its modules as modules: copies, checkpoints, graphs, messages."""

import copy
import io
import os
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_sequence

import fastlstm
from fastlstm import extension

DTYPES = ("int8", "bfloat16")

pytestmark = pytest.mark.skipif(
    extension.error() is not None and os.environ.get("FASTLSTM_REQUIRE_EXTENSION") != "1",
    reason="the compiled kernels are not here",
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, 2, bidirectional=True)
        self.ours = fastlstm.LSTM(16, 8, proj_size=5, batch_first=True)
        self.cell = nn.LSTMCell(5, 7)
        self.rnn = fastlstm.RNN(7, 4, nonlinearity="relu")
        self.same = self.lstm
        self.gru = nn.GRU(3, 3)
        self.odd = fastlstm.LSTM(3, 3, layer_norm=True, peephole=True)
        self.head = nn.Linear(3, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_replaces_every_lstm(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model().eval()
    assert fastlstm.quantize(model, dtype, verbose=True) is model
    assert type(model.lstm) is fastlstm.QuantizedLSTM
    assert model.same is model.lstm
    assert type(model.ours) is fastlstm.QuantizedLSTM
    assert type(model.cell) is fastlstm.QuantizedLSTMCell
    assert type(model.rnn) is fastlstm.QuantizedRNN
    assert type(model.gru) is nn.GRU
    assert type(model.odd) is fastlstm.LSTM
    report = capsys.readouterr().out.splitlines()
    assert (
        f"lstm: nn.LSTM(6, 8, num_layers=2, bidirectional=True) -> fastlstm.QuantizedLSTM({dtype})"
        in report
    )
    assert "gru: left, fastlstm has no GRU" in report
    assert "odd: left, QuantizedLSTM has no layer_norm, peephole" in report
    before = model.lstm
    assert fastlstm.quantize(model, dtype).lstm is before


def test_patterns_and_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model().eval()
    fastlstm.quantize(model, dry_run=True)
    assert type(model.lstm) is nn.LSTM
    assert "cell: nn.LSTMCell(5, 7) -> fastlstm.QuantizedLSTMCell(int8)" in capsys.readouterr().out
    fastlstm.quantize(model, include="cell")
    assert type(model.lstm) is nn.LSTM
    assert type(model.cell) is fastlstm.QuantizedLSTMCell
    with pytest.raises(ValueError, match="no recurrent module of this model matches nothing"):
        fastlstm.quantize(model, exclude="nothing")


def test_hooks_and_parametrizations_count() -> None:
    lstm = nn.LSTM(3, 4).eval()
    nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l0")
    calls = []
    handle = lstm.register_forward_hook(lambda *_: calls.append(1))
    small = fastlstm.quantize(lstm)
    w = lstm.weight_hh_l0
    step = w.abs().amax(1, keepdim=True) / 127
    assert ((small.dequantize().weight_hh_l0 - w).abs() < step).all()
    small(torch.randn(2, 1, 3))
    handle.remove()
    small(torch.randn(2, 1, 3))
    assert calls == [1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["lstm", "ours", "cell", "rnn"])
def test_copies_and_checkpoints(dtype: str, name: str) -> None:
    model = fastlstm.quantize(Model().eval(), dtype)
    small: Any = getattr(model, name)
    x = torch.randn(4, 3, small.input_size) if name != "cell" else torch.randn(4, 5)
    want = _flat(small(x))
    again = io.BytesIO()
    torch.save(small.state_dict(), again)
    again.seek(0)
    empty: Any = fastlstm.quantize(Model().eval(), dtype).get_submodule(name)
    empty.load_state_dict(torch.load(again))
    assert not list(small.parameters())
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), empty):
        assert all(map(torch.equal, _flat(other(x)), want))
    floats = small.dequantize()
    assert not floats.training
    exact = fastlstm.quantize(floats, dtype)
    assert all(map(torch.equal, _flat(exact(x)), want))
    assert dtype in repr(small)


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in _flat(part)]


def test_memory() -> None:
    """Of the weights and biases of float32; scales and sums count."""
    lstm = nn.LSTM(128, 128, 2).eval()
    before = sum(w.nbytes for w in lstm.parameters())
    for dtype, bar in ("int8", 0.27), ("bfloat16", 0.52):
        small = fastlstm.quantize(copy.deepcopy(lstm), dtype)
        assert sum(b.nbytes for b in small.buffers()) <= bar * before


def test_half_and_float_leave_the_weights_alone() -> None:
    small = fastlstm.quantize(nn.LSTM(3, 4).eval(), "bfloat16")
    small.half().double().float()
    assert [b.dtype for b in small.buffers()] == [torch.bfloat16] * 2 + [torch.float32]


# --- graphs ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_graph(dtype: str) -> None:
    small = fastlstm.quantize(nn.LSTM(6, 8, 2, bidirectional=True).eval(), dtype)
    compiled = torch.compile(small, fullgraph=True)
    for T, B in (4, 2), (7, 3):
        x, lengths = torch.randn(T, B, 6), torch.arange(B)
        with torch.no_grad():
            want, got = small(x, lengths=lengths), compiled(x, lengths=lengths)
        assert all(map(torch.equal, _flat(got), _flat(want)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exported_program(dtype: str) -> None:
    small = fastlstm.quantize(nn.LSTM(6, 8, 2, bidirectional=True).eval(), dtype)
    shapes = {"input": {0: Dim("T"), 1: Dim("B")}}
    program = torch.export.export(small, (torch.randn(4, 2, 6),), dynamic_shapes=shapes)
    x = torch.randn(7, 5, 6)
    assert all(map(torch.equal, _flat(program.module()(x)), _flat(small(x))))


@pytest.mark.slow
@pytest.mark.parametrize("directions", [1, 2])
def test_onnx(directions: int) -> None:
    """One node a layer, as far from float32 as what ONNX Runtime makes of the float model."""
    import onnxruntime

    torch.manual_seed(0)
    lstm = nn.LSTM(40, 64, 2, bidirectional=directions == 2).eval()
    small = fastlstm.quantize(copy.deepcopy(lstm))
    hx = tuple(torch.randn(2 * directions, 3, 64) for _ in range(2))
    given = {"input": torch.randn(5, 3, 40), "hx": hx, "lengths": torch.tensor([5, 0, 2])}
    program = torch.onnx.export(small, kwargs=given, dynamo=True, verbose=False)
    kinds = [node.op_type for node in program.model_proto.graph.node]
    assert kinds.count("DynamicQuantizeLSTM") == 2
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    fed = [given["input"], *hx, given["lengths"]]
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, {n: v.numpy() for n, v in zip(names, fed, strict=True)})
    with torch.no_grad():
        ours = _flat(small(**given))
        truth = _flat(fastlstm.LSTM.from_torch(lstm)(**given))
    for got, mine, want in zip(found, ours, truth, strict=True):
        theirs = (torch.from_numpy(got) - want).square().mean()
        assert (mine - want).square().mean() <= 1.1**2 * theirs < 0.02**2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ONNX has a node:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_onnx_of_what_it_lacks(dtype: str) -> None:
    """Exported with float32 weights, those that dequantize() returns."""
    import onnxruntime

    small = fastlstm.quantize(nn.RNN(3, 4, 2, bidirectional=True).eval(), dtype)
    x = torch.randn(2, 3, 3)
    program = torch.onnx.export(small, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        want = _flat(small.dequantize()(x))
    for got, exact in zip(found, want, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), exact)


# --- messages ----------------------------------------------------------------------------------


def test_what_quantize_refuses() -> None:
    with pytest.raises(ValueError, match="dtype must be 'int8' or 'bfloat16', got 'int4'"):
        fastlstm.quantize(nn.LSTM(3, 4).eval(), "int4")
    model = Model()
    with pytest.raises(ValueError, match=r"in training mode.*call model.eval\(\) first"):
        fastlstm.quantize(model)
    assert type(model.lstm) is nn.LSTM
    lstm = nn.LSTM(3, 4).eval()
    with torch.no_grad():
        lstm.weight_hh_l0[2, 1] = torch.inf
    with pytest.raises(ValueError, match=r"weight_hh_l0 .* has infinite numbers"):
        fastlstm.quantize(lstm)
    with torch.no_grad():
        lstm.weight_hh_l0[2, 1] = 3.4e38  # finite, but not when it is rounded to bfloat16
    with pytest.raises(ValueError, match=r"weight_hh_l0 .* too large for torch.bfloat16"):
        fastlstm.quantize(lstm, "bfloat16")
    fastlstm.quantize(copy.deepcopy(lstm), "int8")
    with pytest.raises(ValueError, match="QuantizedLSTM has no layer_norm"):
        fastlstm.QuantizedLSTM.from_float(fastlstm.LSTM(3, 4, layer_norm=True).eval())


def test_what_a_call_refuses() -> None:
    small = fastlstm.quantize(nn.LSTM(3, 4).eval())
    x = torch.randn(2, 1, 3)
    with pytest.raises(RuntimeError, match="does not train"):
        small(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="last dimension of 3, got"):
        small(x[..., :2])
    with pytest.raises(RuntimeError, match=r"torch\.float64"):
        small(x.double())
    with pytest.raises(RuntimeError, match=r"h0 of shape \[1, 1, 4\], got \[1, 2, 4\]"):
        small(x, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)))
    with pytest.raises(IndexError, match="hx must be a pair of tensors"):
        small(x, torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match=r"lengths must be in 0\.\.2"):
        small(x, lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match="no meaning for a PackedSequence"):
        small(pack_sequence([x[:, 0]]), lengths=torch.tensor([2]))
    with pytest.raises(RuntimeError, match="computes on the CPU, and the input is on meta"):
        small(x.to("meta"))
    h, nothing = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4, device="meta")
    with pytest.raises(RuntimeError, match=r"hx\[1\] is on meta"):
        small(x, (h, nothing))
    with pytest.raises(RuntimeError, match="does not train"), torch.no_grad():
        torch.func.jvp(lambda v: small(v)[0], (x,), (x,))
    cell = fastlstm.quantize(nn.LSTMCell(3, 4).eval())
    with pytest.raises(RuntimeError, match=r"hx\[0\] is on meta"):
        cell(x[0], (nothing[0], h[0]))
    with pytest.raises(RuntimeError, match="does not train"):
        torch.func.jvp(lambda v: cell(v)[0], (x[0],), (x[0],))
    for module in (small.to("meta"), cell.to("meta")):
        with pytest.raises(RuntimeError, match=r"weight_ih.* is on meta"):
            module(x if module is small else x[0])


def test_memory_formats_of_images_leave_the_weights_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), fastlstm.quantize(nn.LSTM(3, 4).eval()))
    x = torch.randn(2, 1, 3)
    want = model[1](x)[0]
    model.to(memory_format=torch.channels_last)
    assert torch.equal(model[1](x)[0], want)


def test_a_file_is_the_same_after_a_call() -> None:
    small = fastlstm.quantize(nn.LSTM(3, 4).eval())
    before = pickle.dumps(small)
    small(torch.randn(2, 1, 3))
    assert pickle.dumps(small) == before


def test_other_checkpoints_are_refused() -> None:
    lstm = nn.LSTM(3, 4).eval()
    state = lstm.state_dict()
    small, half = (fastlstm.quantize(copy.deepcopy(lstm), dtype) for dtype in DTYPES)
    for module, given in (small, state), (small, half.state_dict()), (half, small.state_dict()):
        with pytest.raises(RuntimeError, match="load a float state dict into a float module"):
            module.load_state_dict(given)
